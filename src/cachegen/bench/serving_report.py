"""How a serving benchmark is shown: two tables and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cachegen.bench.report import format_cell, load_pyplot, save_figure

_COLOURS = ("#bbbbbb", "#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#228833", "#aa3377")
# Column: key of a row, heading, format; times are dictionaries with an interval.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("mode", "mode", ""),
    ("bits_per_value", "bits/value", ".2f"),
    ("kl_nats", "KL nats", ".1e"),
    ("top1_agreement", "top-1", ".3f"),
    ("hit_rate", "hit rate", ".0%"),
    ("ttft_s", "TTFT ms", ".0f"),
    ("ttft_ratio", "of baseline", ".2f"),
    ("miss_ttft_s", "TTFT of a miss ms", ".0f"),
    ("network_s", "network ms", ".0f"),
    ("decode_s", "decode ms", ".0f"),
    ("e2e_s", "end to end ms", ".0f"),
    ("output_tokens_per_s", "tokens/s", ".0f"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row; times in ms with their 95 % intervals."""
    return [_cell(key, row.get(key), spec) for key, _, spec in COLUMNS]


def _cell(key: str, value: Any, spec: str) -> str:
    if not isinstance(value, dict):
        return format_cell(value, spec)
    scale = 1000 if key.endswith("_s") else 1
    middle, low, high = (format(scale * value[name], spec) for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def link_words(result: dict[str, Any]) -> str:
    """Say over what the store was read."""
    rate = result["bandwidth_bytes_per_s"]
    link = f"{rate * 8 / 1e6:g} Mbit/s" if rate else "no limit"
    return f"{result['store']} store, {link}, {1000 * result['latency_s']:g} ms"


def print_serving(result: dict[str, Any], console: Console) -> None:
    """Print the modes, and TTFT and hit rate turn by turn."""
    tokens = result["prompt_tokens"]
    title = (
        f"{result['model']['name']}, {result['engine']}: {result['prompts']} prompts of "
        f"{min(tokens)} to {max(tokens)} tokens, {link_words(result)}"
    )
    _print([[h for _, h, _ in COLUMNS], *(cells(row) for row in result["rows"])], title, console)
    if result["conversations"]:
        turns = [turn["turn"] for turn in result["rows"][0]["turns"]]
        grid = [["mode", *(f"turn {turn}: TTFT ms, hits" for turn in turns)]]
        for row in result["rows"]:
            shown = [
                f"{_cell('ttft_s', turn['ttft_s'], '.0f')}, {turn['hit_rate']:.0%}"
                for turn in row["turns"]
            ]
            grid.append([row["mode"], *shown])
        _print(grid, f"{result['conversations']} conversations", console)


def _print(grid: list[list[str]], title: str, console: Console) -> None:
    if not console.is_terminal:
        widths = [max(len(line[i]) for line in grid) + 3 for i in range(len(grid[0]))]
        console = Console(file=console.file, width=sum(widths) + 1)
    table = Table(title=title)
    for index, heading in enumerate(grid[0]):
        table.add_column(heading, justify="right" if index else "left")
    for line in grid[1:]:
        table.add_row(*line)
    console.print(table)


def plot_serving(result: dict[str, Any], path: Path) -> None:
    """Draw TTFT and end-to-end time by mode with intervals, and TTFT turn by turn.

    Raises: ConfigError without matplotlib or for a bad path.
    """
    pyplot = load_pyplot()
    rows = result["rows"]
    names = [row["mode"] for row in rows]
    panels = 2 if result["conversations"] else 1
    figure, drawn = pyplot.subplots(1, panels, figsize=(3 + 5 * panels, 4.5), squeeze=False)
    axes = drawn[0][0]
    for offset, key, label, colour in (
        (-0.2, "ttft_s", "first token", "#4477aa"),
        (0.2, "e2e_s", "end to end", "#bbccee"),
    ):
        middle = [1000 * row[key]["median"] for row in rows]
        spread = [
            [1000 * (row[key]["median"] - row[key]["low"]) for row in rows],
            [1000 * (row[key]["high"] - row[key]["median"]) for row in rows],
        ]
        places = [index + offset for index in range(len(rows))]
        axes.bar(places, middle, 0.38, yerr=spread, capsize=3, label=label, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("ms")
    axes.set_title(link_words(result))
    axes.legend()
    if panels == 2:
        axes = drawn[0][1]
        for index, row in enumerate(rows):
            turns = [turn["turn"] for turn in row["turns"]]
            middle = [1000 * turn["ttft_s"]["median"] for turn in row["turns"]]
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(turns, middle, "o-", label=row["mode"], color=colour)
        axes.set_xticks(turns)
        axes.set_xlabel("turn of a conversation")
        axes.set_ylabel("time to first token, ms")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(f"{result['model']['name']}: {result['prompts']} prompts, {result['engine']}")
    save_figure(figure, path)
