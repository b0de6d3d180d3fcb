"""Quantities as people write them: sizes, bandwidths, times."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from cachegen.errors import ConfigError

_SIZE_UNITS = {
    "": 1.0,
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}

_BANDWIDTH_UNITS = {
    "bps": 1 / 8,
    "kbps": 1e3 / 8,
    "Mbps": 1e6 / 8,
    "Gbps": 1e9 / 8,
    "B/s": 1.0,
    "KB/s": 1e3,
    "MB/s": 1e6,
    "GB/s": 1e9,
    "KiB/s": 2.0**10,
    "MiB/s": 2.0**20,
    "GiB/s": 2.0**30,
}

_TIME_UNITS = {
    "": 1.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}


def parse_size(text: str) -> int:
    """Read a size such as ``"50GiB"``, ``"1.5 MB"`` or ``"4096"``.

    Returns: bytes, rounded down. Units: B, KB to TB (powers of 1000), KiB to TiB (of 1024).
    Raises: ConfigError for anything else or less than one byte.
    """
    size_bytes = int(parse_quantity(text, _SIZE_UNITS, what="size"))
    if size_bytes < 1:
        raise ConfigError("size", got=repr(text), expected="at least one byte")
    return size_bytes


def parse_bandwidth(text: str) -> float:
    """Read a bandwidth such as ``"100Mbps"`` or ``"12.5 MB/s"``.

    Returns: bytes per second. bps, kbps, Mbps and Gbps count bits in powers of 1000; B/s,
        KB/s, MB/s and GB/s bytes in powers of 1000; KiB/s, MiB/s and GiB/s in powers of 1024.
    Raises: ConfigError for anything else; units are case-sensitive, since b is not B.
    """
    return parse_quantity(text, _BANDWIDTH_UNITS, what="bandwidth")


def parse_seconds(text: str) -> float:
    """Read a time such as ``"0.5s"``, ``"200ms"``, ``"7d"`` or ``"2"``, which is seconds.

    Returns: seconds. Units: us, ms, s, min, h, d. Raises: ConfigError for anything else.
    """
    return parse_quantity(text, _TIME_UNITS, what="time")


def parse_quantity(text: str, units: Mapping[str, float], *, what: str) -> float:
    """Read a positive decimal number and a unit.

    Returns: the number times the value of the unit. Raises: ConfigError, naming the units.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)\s*", text)
    scale = units.get(match[2]) if match else None
    if match is None or scale is None or not math.isfinite(value := float(match[1]) * scale):
        known = ", ".join(unit for unit in units if unit)
        raise ConfigError(what, got=repr(text), expected=f"a number and one of {known}")
    if value <= 0:
        raise ConfigError(what, got=repr(text), expected="more than 0")
    return value


def format_size(size_bytes: float) -> str:
    """Write bytes for people, such as ``"1.50 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} TiB"
