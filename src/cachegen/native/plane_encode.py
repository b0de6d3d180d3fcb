"""Planes quantised by max-abs scales: from K and V to the bytes of their segments, in one call.

For the ``int8`` and ``cachegen`` codecs. What it does is ``quantize``, ``count_symbols``,
``fit_classes`` or ``normalize_counts``, and ``encode_segment``, plane by plane in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _checks, _core
from cachegen.native._checks import Array, Symbols
from cachegen.native._tables import Tables
from cachegen.native.threads import threads


class FrozenTables(NamedTuple):
    """A table set that channels choose from, and what its symbols cost: see ``fit_classes``."""

    tables: Tables
    costs: NDArray[np.int16]


class EncodedPlane(NamedTuple):
    """What is stored of a plane.

    scales: (T, H) with per_head, else (T, 1), in the type of the values. kind: as in
    ``MatrixSource``. tables: classes, then rotations; or little-endian 16-bit frequencies; none
    unless the kind is rANS. body: of the symbols without the low bits that are in ``low``. Both
    are views of the encoder's memory.
    """

    scales: Array
    kind: int
    tables: bytes
    body: Symbols
    low: Symbols


def encode_planes(
    planes: Sequence[Array],
    levels: Sequence[int],
    *,
    per_head: bool,
    tables: FrozenTables | NDArray[np.float64],
    low_bits: int = 0,
) -> list[EncodedPlane]:
    """Quantise and code the planes of a chunk, several threads a plane each.

    planes: (T, H, D) each, all of one type, any strides. levels: M of each. low_bits: so many low
    bits of the symbols are packed apart, which must leave 32 values; 0: they go raw into the body.
    tables: a frozen set, or (4097,) bits saved as for ``normalize_counts``: then every channel has
    a table of its own.
    Raises: NonFiniteError for the first plane that ``quantize`` refuses, GeometryError.
    """
    fields, scales, kept = [], [], []
    dtype = _checks.check_values(planes[0])
    for plane, most in zip(planes, levels, strict=True):
        tokens, heads, dim = plane.shape
        if dim > 1 and plane.strides[2] != plane.itemsize:
            plane = np.ascontiguousarray(plane)
        found = np.zeros((tokens, heads if per_head else 1), plane.dtype)
        address = plane.__array_interface__["data"][0]
        to = found.__array_interface__["data"][0]
        fields.append((address, *plane.strides[:2], tokens, heads, dim, most, to))
        scales.append(found)
        kept.append(plane)
    shared, costs, bits_saved = None, None, None
    if isinstance(tables, FrozenTables):
        shared, costs = tables.tables._core, tables.costs
    else:
        bits_saved = tables
    encoder = _core.PlaneEncoder(
        dtype.label,
        fields,
        per_head,
        low_bits,
        shared,
        costs,
        bits_saved,
        threads(),
    )
    return [EncodedPlane(found, *encoder.encoded(index)) for index, found in enumerate(scales)]
