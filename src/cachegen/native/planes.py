"""Planes quantised by max-abs scales: from the bytes of their passes to K and V in place.

For the ``int8`` and ``cachegen`` codecs. What a block of 128 channels and 32 tokens needs stays in
the first-level cache; no matrix of symbols is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Symbols
from cachegen.native._tables import Tables
from cachegen.native.fused import PlaneTarget
from cachegen.native.threads import threads
from cachegen.types import KVDtype

Bytes = NDArray[np.uint8]
NOTHING: Bytes = np.zeros(0, np.uint8)


class MatrixSource(NamedTuple):
    """One pass of a plane: a matrix of symbols, 0 to 2 * levels, and its scales.

    rows: tokens. kind: ``fused.RANS``, ``BYTES`` or ``PACKED``, then with ``bits``. body: uint8.
    freqs: little-endian 16-bit frequencies, ``alphabet`` for each channel; or none, then classes
    and rotations: (C,) uint8 each, of the frozen set. shift: raw low bits within rANS.
    low_bits: digits that come apart, packed in ``low``, which is empty where they are missing: then
    they are taken to be in the middle. scales: the bytes of (rows, H) if per_head, else (rows,).
    """

    rows: int
    kind: int
    bits: int
    body: Bytes
    freqs: Bytes
    alphabet: int
    classes: Symbols
    rotations: Symbols
    shift: int
    low_bits: int
    low: Bytes
    levels: int
    scales: Bytes
    per_head: bool


class QuantizedPlane(NamedTuple):
    """One plane and where it goes; RoPE of the target is not looked at.

    group_tokens: 0, or every how many tokens an anchor stands: then rows of the first pass are the
    anchors, and those of the second, if it is there, the other tokens less their anchor.
    """

    tokens: int
    group_tokens: int
    passes: Sequence[MatrixSource]
    target: PlaneTarget


def decode_planes(
    planes: Sequence[QuantizedPlane], *, dtype: KVDtype, stored: KVDtype, shared: Tables
) -> None:
    """Decode planes of one object into their targets, several threads a plane each.

    dtype: of the targets. stored: of the object. shared: the frozen table set.
    Raises: TruncatedError, CorruptError, GeometryError; after an error the targets hold anything.
    """
    _core.decode_planes(dtype.label, stored.label, shared._core, planes, threads())
