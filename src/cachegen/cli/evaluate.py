"""The ``eval`` command: rate and quality of codecs and their peers on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cachegen.cli.common import JsonOption, ModelArgument, console, errors, model_folder

CALIBRATION_TOKENS = 16_384
DEFAULT_CODECS = ["cachegen", "raw", "int8"]


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command(name="eval")(evaluate)


def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text; default: the model's eval_text.txt.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codec or peer, once for each: NAME, NAME:key=value,... or h2o+NAME."),
    ] = None,
    chunk_tokens: Annotated[
        list[int] | None, typer.Option(help="Chunk size, once for each; default 256.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate on; default: the model's calibration_text.txt."),
    ] = None,
    calibration_prompts: Annotated[
        int, typer.Option(help="Retrieval prompts to calibrate on beside the text.")
    ] = 8,
    profile: Annotated[Path | None, typer.Option(help="Profile for codecs that take one.")] = None,
    texts: Annotated[int, typer.Option(help="Number of held-out texts.")] = 8,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of a prefix.")] = 1024,
    continuation_tokens: Annotated[
        int, typer.Option(help="Tokens predicted after each prefix.")
    ] = 256,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(help="Result of an earlier run: its families are not measured again."),
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Measure billed bits/value against KL and task accuracy, with intervals and BD-rates."""
    from cachegen.bench.report import write_json
    from cachegen.profile import Profile

    loaded = Profile.load(profile) if profile else None
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in reuse or ()]
    with errors.status("loading libraries") as status:
        from cachegen.bench.evaluate import run_evaluation
        from cachegen.bench.rate_quality import plot_evaluation, print_evaluation
        from cachegen.bench.workload import Sizes

        result = run_evaluation(
            model_folder(model),
            codec or DEFAULT_CODECS,
            text=text,
            calibration_text=calibration,
            profile=loaded,
            chunk_tokens=chunk_tokens or (256,),
            sizes=Sizes(
                texts=texts,
                prefix_tokens=prefix_tokens,
                continuation_tokens=continuation_tokens,
                calibration_contexts=max(16, CALIBRATION_TOKENS // prefix_tokens),
                calibration_prompts=calibration_prompts,
            ),
            reuse=earlier,
            progress=status.update,
        )
    print_evaluation(result, console)
    if json_file:
        write_json(json_file, result)
    if plot:
        plot_evaluation(result, plot)
        console.print(f"chart: {plot}")
