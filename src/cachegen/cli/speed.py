"""``cachegen bench speed``: how fast coding is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachegen.cli.common import JsonOption, console, errors


def register(bench: typer.Typer) -> None:
    """Add the command to the ``bench`` group."""
    bench.command()(speed)


def speed(
    geometry: Annotated[
        list[str] | None, typer.Option(help="llama-3.1-8b, qwen2.5-0.5b, opt-125m or reference.")
    ] = None,
    isa: Annotated[list[str] | None, typer.Option(help="Once for each; default: all.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1 and 2.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each figure, at least.")] = 0.25,
    quick: Annotated[
        bool, typer.Option("--quick", help="One geometry, the fastest instruction set, short.")
    ] = False,
    prototype: Annotated[
        Path | None, typer.Option(help="C++ source of symbol kernels to compile and compare.")
    ] = None,
    lmcache_python: Annotated[
        Path | None, typer.Option(help="An interpreter that has lmcache, if this one has not.")
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Measure symbols, decoding and encoding against copying the same bytes."""
    from cachegen.bench.report import write_json
    from cachegen.bench.speed import SpeedSettings, run_speed
    from cachegen.bench.speed_report import plot_speed, print_speed

    defaults = SpeedSettings()
    settings = SpeedSettings(
        geometries=tuple(geometry or defaults.geometries),
        isas=tuple(isa or ()),
        threads=tuple(threads or defaults.threads),
        seconds=seconds,
        prototype=prototype,
        lmcache_python=lmcache_python,
    )
    if quick:
        settings = settings.quick()
    with errors.status("measuring") as status:
        result = run_speed(settings, status.update)
    print_speed(result, console)
    if json_file:
        write_json(json_file, result)
    if plot:
        plot_speed(result, plot)
        console.print(f"chart: {plot}")
