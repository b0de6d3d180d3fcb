"""How an evaluation is shown: a table of operating points, BD-rates, and the rate-quality plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cachegen.bench.report import format_cell, load_pyplot, save_figure
from cachegen.chunk import DEFAULT_CHUNK_TOKENS

# Column of the table: key of a row, heading, format.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("billed_bits_per_value", "bits/value", ".3f"),
    ("side_bits_per_value", "side", ".3f"),
    ("exempt_bits_per_value", "exempt", ".3f"),
    ("ratio_vs_16bit", "ratio", ".2f"),
    ("kl_nats", "KL nats", ".2e"),
    ("kl_interval", "KL 95 %", ""),
    ("answer_kl_nats", "at answers", ".2e"),
    ("top1_agreement", "top-1", ".4f"),
    ("accuracy_ratio", "right ratio", ".4f"),
    ("perplexity_ratio", "ppl ratio", ".4f"),
)
_COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"),
    *("#222255", "#ee8866", "#117733", "#997700", "#555555"),
)
_MARKERS = "osD^vP"
_KL_FLOOR = 1e-8


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Print operating points and BD-rates. result: what ``run_evaluation`` returned."""
    tasks = list(result["rows"][0]["tasks"])
    grid = [["codec", "point", *(heading for _, heading, _ in COLUMNS), *tasks, "lossless"]]
    for row in result["rows"]:
        cells = [_cell(row[key], spec) for key, _, spec in COLUMNS]
        scores = [format_cell(row["tasks"][task]["accuracy"], ".3f") for task in tasks]
        mark = "yes" if row["lossless_in_practice"] else "no"
        grid.append([row["family"], row["label"], *cells, *scores, mark])
    model = result["model"]["name"]
    title = f"{model}: {result['texts']} texts, prefixes of {result['prefix_tokens']} tokens"
    _print_grid(grid, title, console)
    plain = ", ".join(
        f"{task} {score['accuracy']:.3f}" for task, score in result["uncompressed"].items()
    )
    if plain:
        console.print(f"uncompressed: {plain}", highlight=False)
    if result["bd_rates"]:
        grid = [["curve", "against", "KL", "BD-rate %", "95 %", "worst %"]]
        for rate in result["bd_rates"]:
            shown = format_cell(rate["percent"], "+.1f")
            interval = _cell(rate["interval"], "+.1f") if "interval" in rate else rate["reason"]
            worst = format_cell(rate.get("worst_percent"), "+.1f")
            grid.append(
                [rate["curve"], rate["peer"], rate["quality"], shown, interval, worst],
            )
        _print_grid(grid, "bytes at equal KL", console)


def _cell(value: Any, spec: str) -> str:
    if isinstance(value, list):
        return " to ".join(format(edge, spec or ".1e") for edge in value)
    return format_cell(value, spec)


def _print_grid(grid: list[list[str]], title: str, console: Console) -> None:
    """Print a table; not cut to 80 columns where the output is no terminal."""
    if not console.is_terminal:
        widths = [max(len(line[i]) for line in grid) + 3 for i in range(len(grid[0]))]
        console = Console(file=console.file, width=sum(widths) + 1)
    table = Table(title=title)
    for index, heading in enumerate(grid[0]):
        table.add_column(heading, justify="right" if index > 1 else "left")
    for line in grid[1:]:
        table.add_row(*line)
    console.print(table)


def plot_evaluation(result: dict[str, Any], path: Path) -> None:
    """Draw KL against billed bits/value, both logarithmic, a line for each family.

    Left on text, right at the answers of tasks. Error bars are intervals, stars named levels. Of
    several chunk sizes 256 is drawn, or the first. Raises: ConfigError without matplotlib or for a
    bad path.
    """
    pyplot = load_pyplot()
    sizes = [row["chunk_tokens"] for row in result["rows"] if "@" in row["family"]]
    size = DEFAULT_CHUNK_TOKENS if DEFAULT_CHUNK_TOKENS in sizes else next(iter(sizes), None)
    families: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        other = "@" in row["family"] and row["chunk_tokens"] != size
        if not other and not row["family"].startswith("h2o+"):
            families.setdefault(row["family"].partition("@")[0], []).append(row)
    tasks = any(row["answer_kl_nats"] is not None for row in result["rows"])
    panels = [("kl", "on text")] + ([("answer_kl", "at answers")] if tasks else [])
    figure, drawn = pyplot.subplots(1, len(panels), figsize=(6 + 5 * len(panels), 6.5))
    for (key, title), axes in zip(panels, np.atleast_1d(drawn), strict=True):
        for index, (family, rows) in enumerate(families.items()):
            _draw_family(axes, rows, key, index, family)
        axes.axhline(result["lossless_kl_nats"], color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("billed bits per value")
        axes.set_ylabel(f"KL to the uncompressed model {title}, nats/token")
        axes.grid(True, which="major", color="#eeeeee")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"{result['model']['name']}: {result['texts']} prefixes of {result['prefix_tokens']} "
        "tokens, down and left is better"
    )
    save_figure(figure, path)


def _draw_family(
    axes: Any, rows: Sequence[dict[str, Any]], key: str, index: int, family: str
) -> None:
    """Draw one family's curve with error bars, and its named levels as stars."""
    rows = sorted(rows, key=lambda row: float(row["billed_bits_per_value"]))
    colour = _COLOURS[index % len(_COLOURS)]
    curve = [row for row in rows if not row["named"]]
    named = [row for row in rows if row["named"]]
    kl = [max(row[f"{key}_nats"], _KL_FLOOR) for row in curve]
    edges = [[max(edge, _KL_FLOOR) for edge in row[f"{key}_interval"]] for row in curve]
    below = [max(mean - low, 0) for mean, (low, _) in zip(kl, edges, strict=True)]
    above = [max(high - mean, 0) for mean, (_, high) in zip(kl, edges, strict=True)]
    axes.errorbar(
        [row["billed_bits_per_value"] for row in curve],
        kl,
        yerr=[below, above],
        label=family,
        color=colour,
        marker=_MARKERS[index // 3 % len(_MARKERS)],
        linestyle="-" if index < len(_COLOURS) else "--",
        linewidth=2.5 if index == 0 else 1.3,
        markersize=5,
        capsize=2,
        elinewidth=0.8,
    )
    axes.plot(
        [row["billed_bits_per_value"] for row in named],
        [max(row[f"{key}_nats"], _KL_FLOOR) for row in named],
        "*",
        color=colour,
        markersize=13,
        markeredgecolor="white",
    )
