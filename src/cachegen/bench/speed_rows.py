"""Rows of a result of ``cachegen bench speed``."""

from __future__ import annotations

from typing import Any

from cachegen.codec.container import SIDE, read_header
from cachegen.codec.header import Header

Row = dict[str, Any]


def row_of(kernel: str, isa: str, **values: Any) -> Row:
    """Return a row with all keys; what is not given is None.

    kernel: "decode", "encode" or "symbols". transform: "identity", "head" or "joint" of decoding.
    rope: whether keys are turned, or None for a geometry without RoPE.
    speedup, memcpy_speedup: of several threads over one, in the same rounds. ratio_to_product:
    time over that of the matrix products alone.
    """
    row = {
        "kernel": kernel,
        "isa": isa,
        "codec": None,
        "quality": None,
        "geometry": None,
        "passes": None,
        "threads": 1,
        "billed_bits_per_value": None,
        "gsym_per_s": None,
        "output_bytes_per_s": None,
        "ratio_to_memcpy": None,
        "transform": None,
        "rope": None,
        "speedup": None,
        "memcpy_speedup": None,
        "ratio_to_product": None,
    }
    assert set(values) <= set(row)
    return row | values


def coding_row(
    kernel: str,
    isa: str,
    data: bytes,
    figures: tuple[float, float, dict[str, float]],
    *,
    transform: str = "identity",
    **values: Any,
) -> Row:
    """Return the row of an object or a prefix of one.

    figures: seconds, ratio of a copy to them, and gains over one thread, from ``measure``.
    """
    seconds, ratio, gains = figures
    header = read_header(data)
    present = [s for s in header.segments if s.kind != SIDE and s.offset + s.length <= len(data)]
    symbols = sum(_symbols_of(header, segment.group) for segment in present)
    return row_of(
        kernel,
        isa,
        passes=round(len(present) / len(header.groups), 2),
        billed_bits_per_value=8 * len(data) / header.value_count,
        gsym_per_s=symbols / seconds / 1e9,
        output_bytes_per_s=header.decoded_bytes / seconds,
        ratio_to_memcpy=ratio,
        transform=transform,
        **gains,
        **values,
    )


def _symbols_of(header: Header, group: int) -> int:
    entry = header.groups[group]
    begin, end = header.ranges[entry.layer]
    planes = entry.layers * (entry.planes.bit_count())
    return (end - begin) * planes * header.geometry.kv_heads * header.geometry.key_dim
