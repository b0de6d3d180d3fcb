"""The chart of ``cachegen bench speed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cachegen.bench.report import load_pyplot, save_figure


def plot_speed(result: dict[str, Any], path: Path) -> None:
    """Draw output bytes/s of decoding and encoding for the first geometry, a bar for each ISA.

    Raises: ConfigError without matplotlib, for a bad path.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for axis, kernel in zip(axes, ("decode", "encode"), strict=True):
        rows = [
            row
            for row in result["rows"]
            if row["kernel"] == kernel and row["geometry"] and row["threads"] == 1
        ]
        rows = [row for row in rows if row["geometry"] == rows[0]["geometry"]]
        names = [
            f"{row['codec']}{', ' + row['quality'] if row['quality'] else ''} ({row['isa']})"
            for row in rows
        ]
        axis.barh(names, [row["output_bytes_per_s"] / 1e9 for row in rows], color="#4477aa")
        axis.invert_yaxis()
        axis.set_xlabel("GB of KV per second, one thread")
        axis.set_title(f"{kernel}, {rows[0]['geometry'] if rows else ''}")
        axis.tick_params(axis="y", labelsize=7)
    save_figure(figure, path)
