"""Planes of the ``lossless`` codec, all of a chunk in one call.

``codec.reference_lossless`` has the same in NumPy; bytes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Array, Symbols, check_values
from cachegen.native.fused import PlaneTarget
from cachegen.native.threads import threads
from cachegen.types import KVDtype


class LosslessSource(NamedTuple):
    """The bytes of one plane and where it goes; RoPE of the target is not looked at.

    side: uint8, empty for a plane that is stored as it is; body: uint8.
    """

    tokens: int
    side: Symbols
    body: Symbols
    target: PlaneTarget


def encode_lossless(
    planes: Sequence[Array],
    *,
    dtype: KVDtype,
    costs: NDArray[np.int16],
    bits_saved: NDArray[np.float64],
) -> list[tuple[Symbols, Symbols]]:
    """Encode planes (T, H, D) of one dtype and any strides, several threads a plane each.

    costs: (4097,) what a symbol of each frequency takes, in 1/1024 bit. bits_saved: as in
    ``normalize_counts``.
    Returns: for each plane its side information and its body, both empty where they would be no
        smaller than the plane. Raises: DtypeError, GeometryError.
    """
    kept = []  # alive until the call returns
    views = []
    for plane in planes:
        check_values(plane)
        if plane.size and plane.shape[2] > 1 and plane.strides[2] != plane.itemsize:
            plane = np.ascontiguousarray(plane)
        kept.append(plane)
        address = plane.__array_interface__["data"][0]
        views.append((address, *plane.shape, *plane.strides[:2]))
    return _core.encode_lossless(dtype.label, views, costs, bits_saved, threads())


def decode_lossless(planes: Sequence[LosslessSource], *, dtype: KVDtype, stored: KVDtype) -> None:
    """Decode planes of one object into their targets, several threads a plane each.

    dtype: of the targets. stored: of the object.
    Raises: TruncatedError, CorruptError, GeometryError; after an error the targets hold anything.
    """
    _core.decode_lossless(dtype.label, stored.label, planes, threads())
