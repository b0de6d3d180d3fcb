"""Tables and the chart of ``cachegen bench speed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cachegen.bench.report import format_cell, load_pyplot, save_figure
from cachegen.bench.speed_rows import Row

COLUMNS = (
    ("kernel", ""),
    ("isa", ""),
    ("codec", ""),
    ("quality", ""),
    ("transform", ""),
    ("rope", ""),
    ("geometry", ""),
    ("passes", ""),
    ("threads", ""),
    ("billed_bits_per_value", ".2f"),
    ("gsym_per_s", ".3f"),
    ("output_bytes_per_s", ".3g"),
    ("ratio_to_memcpy", ".3f"),
    ("speedup", ".2f"),
)
COLOURS = {"scalar": "#bbbbbb", "avx2": "#88ccee", "neon": "#88ccee", "avx512": "#4477aa"}
OTHER = "#ee6677"
WIDEST = 1000


def print_speed(result: dict[str, Any], console: Console) -> None:
    """Print all rows and the ratios; whole lines where they do not go to a terminal."""
    for table in (_rows(result), _ratios(result)):
        if not console.is_terminal:
            width = Console(width=WIDEST).measure(table).maximum
            console = Console(file=console.file, width=width)
        console.print(table)
    console.print(f"LMCache: {result['lmcache']}")


def _rows(result: dict[str, Any]) -> Table:
    """Return every row."""
    table = Table(title="medians; ratio: to memcpy of the same output, with as many threads")
    for name, _ in COLUMNS:
        table.add_column(name)
    for row in result["rows"]:
        table.add_row(*(format_cell(row[name], spec) for name, spec in COLUMNS))
    return table


def _ratios(result: dict[str, Any]) -> Table:
    """Return the ratios that were measured for, and whether they are what is wanted."""
    table = Table(title="ratios within this run")
    for name in ("what", "isa", "geometry", "ratio", "wanted", ""):
        table.add_column(name, justify="right" if name == "ratio" else "left")
    for one in result["comparisons"]:
        sign = "<=" if one["at_most"] else ">="
        table.add_row(
            one["what"],
            one["isa"],
            one["geometry"] or "-",
            f"{one['ratio']:.3g}",
            f"{sign} {one['goal']:.3g}",
            "yes" if one["reached"] else "no",
        )
    return table


def plot_speed(result: dict[str, Any], path: Path) -> None:
    """Draw output bytes/s of decoding and encoding for the first geometry, a bar for each ISA.

    Logarithmic, because peers are hundreds of times slower. Raises: ConfigError without matplotlib,
    for a bad path.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6))
    geometry = next((row["geometry"] for row in result["rows"] if row["geometry"]), None)
    for axis, kernel in zip(axes, ("decode", "encode"), strict=True):
        rows = [
            row
            for row in result["rows"]
            if row["kernel"] == kernel
            and row["threads"] == 1
            and row["geometry"]
            and row["geometry"].partition(",")[0] == geometry
        ]
        names = list(dict.fromkeys(_name(row) for row in rows))
        isas = list(dict.fromkeys(row["isa"] for row in rows if row["isa"] in COLOURS))
        height = 0.8 / max(len(isas), 1)
        for row in rows:
            own = row["isa"] in COLOURS
            place = float(names.index(_name(row)))
            if own:
                place += (isas.index(row["isa"]) - (len(isas) - 1) / 2) * height
            rate = row["output_bytes_per_s"] / 1e9
            colour = COLOURS.get(row["isa"], OTHER)
            axis.barh(place, rate, height if own else 0.4, color=colour)
            axis.annotate(
                f" {rate:.2g}", (rate, place), va="center", fontsize=7, annotation_clip=False
            )
        for isa in isas:
            axis.barh([0], [0], color=COLOURS[isa], label=isa)
        copies = [
            row["output_bytes_per_s"] / row["ratio_to_memcpy"] / 1e9
            for row in rows
            if row["ratio_to_memcpy"]
        ]
        if copies:
            copy = sorted(copies)[len(copies) // 2]
            axis.axvline(copy, color="#333333", linewidth=1, linestyle="--", label="memcpy")
        axis.set_yticks(range(len(names)), names)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.set_xlabel("GB of KV per second, one thread (zstd: of int8)")
        axis.set_title(f"{kernel}, {geometry or ''}")
        axis.tick_params(axis="y", labelsize=8)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    save_figure(figure, path)


def _name(row: Row) -> str:
    parts = [row["codec"]]
    if row["quality"]:
        parts.append(row["quality"])
    if row["transform"] in ("head", "joint"):
        parts.append(f"KLT {row['transform']}")
    if row["kernel"] == "decode" and row["rope"] is False:
        parts.append("no RoPE")
    return ", ".join(parts)
