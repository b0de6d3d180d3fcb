"""``cachegen bench speed``: how fast coding is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

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
    seconds: Annotated[float, typer.Option(help="Of each figure, at least.")] = 0.5,
    prototype: Annotated[
        Path | None, typer.Option(help="C++ source of symbol kernels to compile and compare.")
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Measure symbols, decoding and encoding against copying the same bytes."""
    from cachegen.bench.report import format_cell, write_json
    from cachegen.bench.speed import SpeedSettings, run_speed
    from cachegen.bench.speed_report import plot_speed

    defaults = SpeedSettings()
    settings = SpeedSettings(
        geometries=tuple(geometry or defaults.geometries),
        isas=tuple(isa or ()),
        threads=tuple(threads or defaults.threads),
        seconds=seconds,
        prototype=prototype,
    )
    with errors.status("measuring") as status:
        result = run_speed(settings, status.update)
    table = Table(title="medians; ratio: to memcpy of the same output")
    columns = (
        ("kernel", ""),
        ("isa", ""),
        ("codec", ""),
        ("quality", ""),
        ("geometry", ""),
        ("passes", ""),
        ("threads", ""),
        ("billed_bits_per_value", ".2f"),
        ("gsym_per_s", ".3f"),
        ("output_bytes_per_s", ".3g"),
        ("ratio_to_memcpy", ".3f"),
    )
    for name, _ in columns:
        table.add_column(name)
    for row in result["rows"]:
        table.add_row(*(format_cell(row[name], spec) for name, spec in columns))
    console.print(table)
    if json_file:
        write_json(json_file, result)
    if plot:
        plot_speed(result, plot)
        console.print(f"chart: {plot}")
