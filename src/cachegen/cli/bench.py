"""The ``bench`` commands: serving with and without a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachegen.cli import speed
from cachegen.cli.common import JsonOption, console, errors, model_folder

bench = typer.Typer(help="Measure on this machine: serving, by default.")

DEFAULT_MODES = ["recompute", "raw", "int8", "cachegen", "progressive", "progressive+profile"]


def register(cli: typer.Typer) -> None:
    """Add the group to the command line."""
    speed.register(bench)
    cli.add_typer(bench, name="bench")


@bench.callback(invoke_without_command=True)
def serving(
    context: typer.Context,
    engine: Annotated[str, typer.Option(help="hf or vllm.")] = "hf",
    model: Annotated[str, typer.Option(help="Folder or name of a causal LM.")] = "models/reference",
    server: Annotated[
        list[str] | None,
        typer.Option(help="With --engine vllm, MODE=URL of a running server, once for each."),
    ] = None,
    start_servers: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            help="With --engine vllm: start a server for each mode with this interpreter.",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help=f"Once for each: {', '.join(DEFAULT_MODES)}; the first is the baseline."),
    ] = None,
    quality: Annotated[str, typer.Option(help="How much of progressive objects is read.")] = (
        "balanced"
    ),
    profile: Annotated[
        Path | None,
        typer.Option(help="For progressive+profile; default: fitted to the calibration text."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="URL of a store; default: in memory, behind the link.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the link, such as 100Mbps; with --store none by default.")
    ] = None,
    latency_ms: Annotated[float, typer.Option(help="Of the link, for each read.")] = 0.0,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="Text of a prompt, once for each; default: held-out.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts from the held-out text.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each of them.")] = 1200,
    turns: Annotated[int, typer.Option(help="Of each conversation; 0 for none.")] = 3,
    repeats: Annotated[int, typer.Option(help="Of every prompt in every mode.")] = 5,
    output_tokens: Annotated[int, typer.Option(help="Of every answer.")] = 32,
    chunk_tokens: Annotated[int, typer.Option(help="Of a chunk.")] = 256,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Serve real prompts in every mode: TTFT, end-to-end time, throughput, hits, turn by turn."""
    if context.invoked_subcommand is not None:
        return
    from cachegen.bench.report import write_json
    from cachegen.bench.serving_run import Settings, check_engine

    check_engine(engine)
    with errors.status("loading libraries") as status:
        from cachegen.bench.serving_report import plot_serving, print_serving
        from cachegen.bench.serving_run import run_bench

        result = run_bench(
            Settings(
                engine=engine,
                model=model_folder(model),
                modes=tuple(mode or DEFAULT_MODES),
                quality=quality,
                profile=profile,
                store=store,
                bandwidth=bandwidth,
                latency_s=latency_ms / 1000,
                prompt_files=tuple(prompt_file or ()),
                prompts=prompts,
                prompt_tokens=prompt_tokens,
                turns=turns,
                repeats=repeats,
                output_tokens=output_tokens,
                chunk_tokens=chunk_tokens,
                servers=tuple(server or ()),
                vllm_python=start_servers,
            ),
            progress=status.update,
        )
    print_serving(result, console)
    if json_file:
        write_json(json_file, result)
    if plot:
        plot_serving(result, plot)
        console.print(f"chart: {plot}")
