"""The ratios that a result of ``cachegen bench speed`` is for, each with what is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cachegen.bench.speed_lmcache import CODEC
from cachegen.bench.speed_peers import ZSTD
from cachegen.bench.speed_rows import Row

PROTOTYPE_GOAL = 0.85
MEMCPY_GOALS = {"identity": 0.5, "head": 0.25}
PRODUCT_GOAL = 1.3
ENCODE_GOAL = 0.15
LMCACHE_GOAL = 200.0
ZSTD_GOAL = 2.0
THREADS_GOAL, COPY_SHARE = 1.8, 0.8


class Comparison(NamedTuple):
    """One ratio. goal: what it has to reach, or with ``at_most`` must not pass."""

    what: str
    isa: str
    geometry: str | None
    ratio: float
    goal: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


def summarise(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparisons of a result, as JSON-able values."""
    found = [
        *_prototype(result.get("prototype") or {}),
        *_memcpy(result["rows"]),
        *_peers(result["rows"]),
        *_threads(result["rows"]),
    ]
    return [{**one._asdict(), "reached": one.reached} for one in found]


def _prototype(rounds: dict[str, Any]) -> Iterator[Comparison]:
    for isa, figures in rounds.items():
        yield Comparison("symbols: rate / prototype", isa, None, figures["ratio"], PROTOTYPE_GOAL)


def _is_wanted(row: Row) -> bool:
    """Whether a row is whole decoding as it is wanted: "balanced", or two passes, both read."""
    balanced = row["codec"] == "progressive" and row["quality"] == "balanced"
    return bool(row["kernel"] == "decode" and (balanced or row["codec"] == "progressive-2"))


def _memcpy(rows: list[Row]) -> Iterator[Comparison]:
    for row in rows:
        if row["threads"] != 1 or row["transform"] is None:
            continue
        place = (row["isa"], row["geometry"])
        if row["kernel"] == "encode":
            what = f"encode {row['codec']}: speed / memcpy"
            yield Comparison(what, *place, row["ratio_to_memcpy"], ENCODE_GOAL)
        elif _is_wanted(row):
            transform = row["transform"]
            name = transform + (", no RoPE" if row["rope"] is False else "")
            if transform in MEMCPY_GOALS:
                what = f"decode {row['codec']}, {name}: speed / memcpy"
                goal = MEMCPY_GOALS[transform]
                yield Comparison(what, *place, row["ratio_to_memcpy"], goal)
            else:
                what = f"decode {row['codec']}, {name}: time / matrix product"
                yield Comparison(what, *place, row["ratio_to_product"], PRODUCT_GOAL, at_most=True)


def _peers(rows: list[Row]) -> Iterator[Comparison]:
    for row in rows:
        if row["codec"] == CODEC:
            for name, ratio in row["ratio_to_own"].items():
                what = f"{row['kernel']} {name}: speed / LMCache on a CPU"
                yield Comparison(what, "fastest", row["geometry"], ratio, LMCACHE_GOAL)
    zstd = {
        row["geometry"]: row["gsym_per_s"]
        for row in rows
        if row["codec"] == ZSTD.format(level=3) and row["kernel"] == "decode"
    }
    for row in rows:
        first = row["threads"] == 1 and _is_wanted(row) and row["transform"] == "identity"
        # Once for each geometry: with the RoPE that it has.
        if first and row["geometry"] in zstd and row["rope"] is not False:
            # Values: an output element is two bytes.
            ratio = row["output_bytes_per_s"] / 2e9 / zstd[row["geometry"]]
            what = f"decode {row['codec']}: values per second / zstd-3 of int8"
            yield Comparison(what, row["isa"], row["geometry"], ratio, ZSTD_GOAL)


def _threads(rows: list[Row]) -> Iterator[Comparison]:
    for row in rows:
        if row["threads"] != 2 or row["speedup"] is None:
            continue
        if row["kernel"] == "symbols":
            what = f"symbols {row['codec']}: two threads / one"
            yield Comparison(what, row["isa"], None, row["speedup"], THREADS_GOAL)
        elif _is_wanted(row) and row["transform"] == "identity" and row["rope"] is not False:
            what = f"decode {row['codec']}: two threads / one"
            goal = min(THREADS_GOAL, COPY_SHARE * row["memcpy_speedup"])
            yield Comparison(what, row["isa"], row["geometry"], row["speedup"], goal)
