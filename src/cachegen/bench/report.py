"""What every result file carries, how it is written, and the tables and charts made from it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cachegen.errors import ConfigError

_PACKAGES = ("cachegen", "numpy", "torch", "transformers")


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe hardware, versions, date and command, for a result file."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    words = list(command) if command else _own_command()
    return {
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(words),
    }


def _own_command() -> list[str]:
    """Return how this program was called, as it would be called in any folder."""
    program, *words = [_portable(word) for word in sys.argv]
    if program.endswith(".py"):
        return ["python", program, *words]
    # An entry point that imports the library says nothing of its name.
    return ["cachegen" if program in ("-c", "-m") else Path(program).name, *words]


def _portable(word: str) -> str:
    """Return a word without the part of a path that is this machine's."""
    path = Path(word)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or "unknown"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file; temp then rename, so that no half file is left behind."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing. Raises: ConfigError if the folder does not exist."""
    if not path.parent.is_dir():
        raise ConfigError("folder", got=path.parent, expected="a folder", remedy="create it first")
    handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        os.replace(temp, path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


# Column of the demo's table: key of a row, heading, format.
DEMO_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("mode", "mode", ""),
    ("bytes", "bytes", ",d"),
    ("billed_bits_per_value", "bits/value", ".2f"),
    ("ratio_vs_16bit", "ratio", ".2f"),
    ("encode_s", "encode s", ".3f"),
    ("network_s", "network s", ".3f"),
    ("decode_s", "decode s", ".3f"),
    ("ttft_s", "TTFT s", ".3f"),
    ("e2e_s", "e2e s", ".3f"),
    ("tokens_per_s", "tokens/s", ".1f"),
    ("top1_agreement", "top-1", ".4f"),
    ("kl_nats", "KL nats", ".2e"),
    ("retrieval_accuracy", "retrieval", ".3f"),
)


def format_cell(value: object, spec: str) -> str:
    """Format a value of a row; a dash where a row has none."""
    return "-" if value is None else format(value, spec)


def print_demo(result: dict[str, Any], console: Console) -> None:
    """Print the demo's table: a row for each mode, or a column on a narrow terminal."""
    title = f"{result['model']['name']}: {result['prompt_tokens']} tokens {demo_link(result)}"
    grid = [[heading for _, heading, _ in DEMO_COLUMNS]]
    for row in result["rows"]:
        grid.append([format_cell(row[key], spec) for key, _, spec in DEMO_COLUMNS])
    needed = sum(max(len(line[i]) for line in grid) + 3 for i in range(len(DEMO_COLUMNS))) + 1
    if not console.is_terminal:
        console = Console(file=console.file, width=needed)
    elif console.width < needed:
        grid = [list(line) for line in zip(*grid, strict=True)]
    table = Table(title=title)
    for index, heading in enumerate(grid[0]):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for line in grid[1:]:
        table.add_row(*line)
    console.print(table)


def demo_link(result: dict[str, Any]) -> str:
    """Say in words what the demo's objects came over."""
    if result.get("trace"):
        return f"over a link of {result['trace']}"
    rate = result["bandwidth_bytes_per_s"]
    return "from the store as it is" if rate is None else f"at {rate * 8e-6:g} Mbit/s"


def demo_markdown(result: dict[str, Any]) -> str:
    """Return the demo's table as Markdown, for the README."""
    heads = [heading for _, heading, _ in DEMO_COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in result["rows"]:
        cells = [format_cell(row[key], spec) for key, _, spec in DEMO_COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_demo(result: dict[str, Any], path: Path) -> None:
    """Draw TTFT stacked by stage, and quality against size. Needs matplotlib.

    Raises: ConfigError if matplotlib is not installed or the suffix is not an image's.
    """
    pyplot = load_pyplot()
    rows = result["rows"]
    names = [row["mode"].removeprefix("progressive ") for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    bottoms = [0.0] * len(rows)
    stages = (
        ("network", "wait_network_s", "#4477aa"),
        ("decode not hidden", "wait_decode_s", "#ee6677"),
        ("inject and prefill", "wait_compute_s", "#ccbb44"),
    )
    for label, key, colour in stages:
        heights = [row["stages"][key] * 1000 for row in rows]
        left.bar(names, heights, bottom=bottoms, label=label, color=colour)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    left.set_ylabel("time to first token, ms")
    left.set_title(f"TTFT, {result['prompt_tokens']} tokens {demo_link(result)}")
    left.tick_params(axis="x", labelrotation=20)
    left.legend()
    labels: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row["billed_bits_per_value"] is not None:
            point = (row["billed_bits_per_value"], max(row["kl_nats"], 1e-9))
            name = row["mode"].removeprefix("progressive ")
            labels.setdefault(point, []).append(f"{name} ({row['retrieval_accuracy']:.0%})")
    for point, names in labels.items():
        right.plot(*point, "o", color="#228833")
        on_the_left = point[0] > 12
        right.annotate(
            ", ".join(names),
            point,
            xytext=(-7 if on_the_left else 7, -3),
            textcoords="offset points",
            horizontalalignment="right" if on_the_left else "left",
        )
    right.set_yscale("log")
    right.set_xlim(0, 18)
    right.margins(y=0.2)
    right.set_xlabel("billed bits per value")
    right.set_ylabel("KL to the uncompressed model, nats/token")
    right.set_title("quality against size (retrieval accuracy)")
    save_figure(figure, path)


def load_pyplot() -> Any:
    """Import pyplot for drawing into files. Raises: ConfigError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "matplotlib", got="not installed", expected="installed", remedy="pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and close it. Raises: ConfigError for a bad folder or suffix."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (ValueError, OSError) as error:
        raise ConfigError("plot file", got=path, expected=str(error)) from None
    finally:
        load_pyplot().close(figure)
