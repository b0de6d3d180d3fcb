"""``cachegen demo``: everything in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from cachegen.cli.common import JsonOption, console, errors, model_folder
from cachegen.errors import ConfigError

if TYPE_CHECKING:
    from cachegen.stream.traces import Trace

DEFAULT_BANDWIDTH = "100Mbps"
# How long the last rate of a trace holds that says nothing else.
_LAST_S = 3600.0


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command()(demo)


def demo(
    model: Annotated[
        str, typer.Option(help="Folder of a model with tokenizer, texts and retrieval.json.")
    ] = "models/reference",
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the objects go; default: a new folder.")
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            help=f"Of a simulated link before the store, such as 1Gbps, or none. Default: "
            f"{DEFAULT_BANDWIDTH}, none with --store."
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SPEC",
            help="A bandwidth that changes: a trace file, or such as 100Mbps:200ms,10Mbps.",
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(metavar="0.5s", help="Adds a row: the first token within this time."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="How to keep to --slo: deadline, hybrid, cachegen or fixed.")
    ] = "deadline",
    profile: Annotated[
        str | None,
        typer.Option(metavar="FILE|none", help="Of the model; default: the one in its folder."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompt of at least 1,000 tokens; default: the model's.")
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Capture, encode, stream back, decode, inject and generate: every mode in one table."""
    from cachegen.bench.coding import find_profile
    from cachegen.bench.report import plot_demo, print_demo, write_json
    from cachegen.store.open import open_store
    from cachegen.stream.policies import get_policy
    from cachegen.units import parse_bandwidth, parse_seconds

    get_policy(policy)
    bandwidth = bandwidth or ("none" if store or trace else DEFAULT_BANDWIDTH)
    rate = None if bandwidth == "none" else parse_bandwidth(bandwidth)
    slo_s = None if slo is None else parse_seconds(slo)
    varying = None if trace is None else read_trace(trace)
    folder = model_folder(model)
    opened = open_store(store) if store else None
    statistics = find_profile(folder, profile)
    with errors.status("loading libraries"):
        from cachegen.bench.demo import STEPS, Setup, run_demo
    setup = Setup(
        store=opened,
        rate_bytes_per_s=rate,
        trace=varying,
        profile=statistics,
        slo_s=slo_s,
        policy=policy,
    )
    with Progress(console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=STEPS)
        result = run_demo(
            folder,
            setup,
            prompt_file=prompt_file,
            progress=lambda text: bar.update(task, description=text, advance=1),
        )
    print_demo(result, console)
    if json_file:
        write_json(json_file, result)
    if plot:
        plot_demo(result, plot)
        console.print(f"chart: {plot}")


def read_trace(text: str) -> Trace:
    """Read a trace file, or a specification such as ``"100Mbps:200ms,10Mbps"``.

    Every rate holds for the time behind its colon; the last one may do without.
    Raises: ConfigError, FileNotFoundError if it is neither.
    """
    from cachegen.stream.traces import Trace, parse_trace
    from cachegen.units import parse_bandwidth, parse_seconds

    path = Path(text)
    if path.is_file():
        return parse_trace(path.read_text(encoding="utf-8"), path.name)
    if "bps" not in text and "B/s" not in text:
        raise FileNotFoundError(2, "no such trace", text)
    times, rates = [0.0], []
    pieces = text.split(",")
    for index, piece in enumerate(pieces):
        rate, colon, seconds = piece.partition(":")
        if not colon and index + 1 < len(pieces):
            raise ConfigError(
                "trace", got=repr(piece), expected="a rate and for how long, such as 100Mbps:0.2s"
            )
        rates.append(parse_bandwidth(rate))
        lasts = parse_seconds(seconds) if colon else _LAST_S
        times.append(times[-1] + lasts)
    return Trace(text, tuple(times), tuple(rates))
