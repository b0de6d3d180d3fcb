"""Chunks whose squares would leave the range of float32.

Encoders sum squares of values in float32. Of values around 2^-70 nothing would be left, and those
beyond 2^60 would be infinite. Such a chunk is encoded as a power of two of itself, which changes no
digit: only its steps and means are scaled.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cachegen.chunk import KVChunk, LayerKV
from cachegen.types import Array, KVDtype

# Root mean squares of centred values. Squares a thousand times smaller or larger are no trouble.
LEAST_SPREAD, MOST_SPREAD = 2.0**-50, 2.0**40
# Exponents of values that are left as they are.
_ORDINARY = range(-40, 41)
_HIGHEST = 98


def has_plain_squares(spread: float) -> bool:
    """Return whether a chunk of this spread can be encoded as it is."""
    return LEAST_SPREAD <= spread <= MOST_SPREAD


def balancing_exponent(chunk: KVChunk) -> int:
    """Return k so that values times 2**k are around 1 in the typical token; 0 if they need not be.

    chunk: of finite values. No value becomes larger than 2**98.
    """
    peaks = np.concatenate(
        [
            np.abs(plane.astype(np.float32)).max(axis=(1, 2), initial=0)
            for layer in chunk.layers
            for plane in (layer.keys, layer.values)
        ]
    )
    peaks = peaks[peaks > 0]
    if not peaks.size:
        return 0
    typical, highest = (int(np.frexp(value)[1]) for value in (np.median(peaks), peaks.max()))
    return 0 if typical in _ORDINARY else min(-typical, _HIGHEST - highest)


def scaled(chunk: KVChunk, exponent: int) -> KVChunk:
    """Return the chunk times 2**exponent, in float32."""

    def times(plane: Array) -> Array:
        values: Array = np.ldexp(plane.astype(np.float32), exponent)
        return values

    layers = [
        LayerKV(times(layer.keys), times(layer.values), layer.begin) for layer in chunk.layers
    ]
    geometry = replace(chunk.geometry, dtype=KVDtype.FLOAT32)
    return replace(chunk, layers=tuple(layers), geometry=geometry, _array=None)


def representable(step: float, exponent: int) -> float:
    """Return the step nearest to this one that is a float32 when divided by 2**exponent, not 0."""
    stored = np.float32(np.ldexp(step, -exponent))
    if stored == 0:
        stored = np.finfo(np.float32).smallest_subnormal
    return float(np.ldexp(np.float64(stored), exponent))
