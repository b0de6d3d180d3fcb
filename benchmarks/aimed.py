"""What an encoder pays that is aimed at one quality: one pass, a step of its own, ideal coding."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.basis import GroupBasis
from cachegen.codec.encode_reference import OFFSETS
from cachegen.codec.ladder import (
    BASE_DEVIATION,
    CLASSES,
    CLASSES_PER_FACTOR_3,
    DEAD_ZONE,
    LOWEST_ROW,
    centroid,
)
from cachegen.codec.reference import profile_base

DECAYS = (0.0, 0.5, 1.0, 1.5)
SHAPES = (0.7, 1.0, 2.0)

Array = NDArray[np.float64]


def ideal_bits(index: NDArray[Any], statistics: GroupBasis | None, step: float) -> float:
    """Return the entropy-coded bits of an index matrix (T, N) without side information.

    Under continuous densities, magnitudes have no upper end. With a profile each component has the
    family of the profile and its deviation, all moved by the best of the codec's offsets; without
    one the family and deviation, of those that a table exists for, with the shortest code.
    """
    magnitude = np.abs(index.astype(np.int64))
    channels = magnitude.shape[1]
    size = int(magnitude.max()) + 1
    flat = (magnitude + size * np.arange(channels)).ravel()
    counts = np.bincount(flat, minlength=size * channels).reshape(channels, size)
    bits = np.array([counts @ costs for costs in _cell_costs(size)])
    if statistics is None:
        return float(bits.min(axis=0).sum())
    base = profile_base(statistics, step).astype(np.int64) - LOWEST_ROW
    rows = CLASSES - LOWEST_ROW
    totals = []
    for offset in OFFSETS:
        way = statistics.families.astype(np.int64) * rows + np.clip(base + offset, 0, rows - 1)
        totals.append(float(bits[way, np.arange(channels)].sum()))
    return min(totals)


@functools.lru_cache(maxsize=64)
def _cell_costs(size: int) -> list[Array]:
    """Return bits of the magnitudes 0 to size - 1, sign included, under every density."""
    edges = np.arange(size) + DEAD_ZONE
    grid = np.concatenate([[0.0], np.geomspace(1e-7, 400, 40_000)])
    result = []
    for shape in SHAPES:
        scale = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
        density = np.exp(-((grid / scale) ** shape))
        mass = np.concatenate([[0.0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
        tail = np.maximum(1 - mass / mass[-1], 0)
        for index in range(LOWEST_ROW, CLASSES):
            deviation = BASE_DEVIATION * 3 ** (index / CLASSES_PER_FACTOR_3)
            beyond = np.interp(edges / deviation, grid, tail)
            cells = np.concatenate([[1 - beyond[0]], (beyond[:-1] - beyond[1:]) / 2])
            result.append(-np.log2(np.maximum(cells, 1e-9)))
    return result


def quantise_aimed(
    values: NDArray[np.float32], statistics: GroupBasis | None, step: float
) -> tuple[float, float]:
    """Quantise coefficients with one step: return ideal payload bytes and the squared error."""
    scaled = np.abs(values) / np.float32(step)
    index = np.floor(scaled + np.float32(1 - DEAD_ZONE))
    deviation = np.sqrt(np.square(scaled).mean(axis=0)) + np.float32(1e-6)
    errors = []
    for decay in DECAYS:
        inside = centroid((math.sqrt(2) * decay / deviation).astype(np.float32))
        rebuilt = np.where(index > 0, index - np.float32(1 - DEAD_ZONE) + inside, 0)
        errors.append(float(np.square(rebuilt - scaled, dtype=np.float64).sum()))
    return ideal_bits(index, statistics, step) / 8, min(errors) * step * step
