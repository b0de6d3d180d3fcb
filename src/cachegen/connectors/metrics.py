"""Counters of a connector: what was asked, hit, loaded and saved, and why something was not.

Plain numbers, so that they can be sent between processes; ``render`` writes them as Prometheus
text.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

PREFIX = "cachegen_"

# Name without prefix, the label it is split by or None, and what it counts.
FAMILIES: dict[str, tuple[str | None, str]] = {
    "requests_total": (None, "requests looked up"),
    "request_hits_total": (None, "requests with at least one chunk in the store"),
    "request_misses_total": ("reason", "requests without any, by reason"),
    "looked_up_tokens_total": (None, "prompt tokens looked up"),
    "hit_tokens_total": (None, "tokens found in the store"),
    "loaded_tokens_total": (None, "tokens written into the engine's cache"),
    "loaded_bytes_total": (None, "bytes of stored objects read for them"),
    "load_seconds_total": (None, "time from the start of a load to its report"),
    "network_seconds_total": (None, "time that loads waited for the store"),
    "decode_seconds_total": (None, "time that loads spent decoding"),
    "loads_total": (None, "loads reported"),
    "failed_loads_total": ("reason", "loads that ended early, by reason"),
    "saved_chunks_total": (None, "chunks stored"),
    "saved_tokens_total": (None, "tokens stored"),
    "saved_bytes_total": (None, "bytes of stored objects written"),
    "save_seconds_total": (None, "time spent encoding and storing"),
    "staged_chunks_total": (None, "chunks copied out of the engine's cache to be saved"),
    "settled_chunks_total": (None, "of these, chunks that were stored or dropped since"),
    "staged_bytes_total": (None, "bytes copied out of the engine's cache to be saved"),
    "stage_seconds_total": (None, "time that engine steps waited for these copies"),
    "skipped_saves_total": ("reason", "chunks not stored, by reason"),
}

Snapshot = dict[str, float]


class Counters:
    """Thread-safe counters; a key is a name of ``FAMILIES`` or ``name|label value``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: Snapshot = {}
        self._since: Snapshot = {}

    def add(self, name: str, amount: float = 1, *, reason: str | None = None) -> None:
        """Add to a counter. reason: for the families that are split by it."""
        label, _ = FAMILIES[name]
        assert (label is None) == (reason is None), name
        key = name if reason is None else f"{name}|{reason}"
        with self._lock:
            self._total[key] = self._total.get(key, 0) + amount
            self._since[key] = self._since.get(key, 0) + amount

    def get(self, name: str, *, reason: str | None = None) -> float:
        """Return a counter's value since the start."""
        with self._lock:
            return self._total.get(name if reason is None else f"{name}|{reason}", 0)

    def snapshot(self) -> Snapshot:
        """Return all counters since the start."""
        with self._lock:
            return dict(self._total)

    def drain(self) -> Snapshot:
        """Return what was added since the last call."""
        with self._lock:
            since, self._since = self._since, {}
            return since


def merge(left: Mapping[str, float], right: Mapping[str, float]) -> Snapshot:
    """Add two snapshots."""
    return {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}


def split(key: str) -> tuple[str, str | None]:
    """Return name and label value of a snapshot's key."""
    name, _, value = key.partition("|")
    return name, value or None


def render(snapshot: Mapping[str, float]) -> str:
    """Write a snapshot in Prometheus' text format."""
    lines = []
    for name, (label, text) in FAMILIES.items():
        keys = sorted(key for key in snapshot if split(key)[0] == name)
        if not keys:
            continue
        lines += [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} counter"]
        for key in keys:
            value = split(key)[1]
            labels = "" if value is None else f'{{{label}="{value}"}}'
            lines.append(f"{PREFIX}{name}{labels} {snapshot[key]:.10g}")
    return "\n".join(lines) + "\n" if lines else ""


def summary(snapshot: Mapping[str, float]) -> dict[str, float]:
    """Return the few figures that a log line shows, derived ones among them."""
    get = snapshot.get
    looked_up, load_s = get("looked_up_tokens_total", 0), get("load_seconds_total", 0)
    return {
        "requests": get("requests_total", 0),
        "hit_rate": round(get("hit_tokens_total", 0) / looked_up, 4) if looked_up else 0.0,
        "loaded_tokens": get("loaded_tokens_total", 0),
        "load_MB_per_s": round(get("loaded_bytes_total", 0) / load_s / 1e6, 3) if load_s else 0.0,
        "failed_loads": sum(v for k, v in snapshot.items() if k.startswith("failed_loads_total")),
        "saved_tokens": get("saved_tokens_total", 0),
        "skipped_saves": sum(v for k, v in snapshot.items() if k.startswith("skipped_saves_total")),
    }
