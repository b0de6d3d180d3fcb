"""Kernels of the ``progressive`` encoder. ``codec.ladder`` has the same in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core

Floats = NDArray[np.float32]
Coarse = NDArray[np.int16]
Digits = NDArray[np.uint8]


def climb(values: Floats, passes: int) -> tuple[Coarse, tuple[Digits, ...]]:
    """Quantise coefficients, in finest steps, to the digits of 1 to 6 passes.

    values: (T, N) float32, finite. Returns: the signed index of pass 0, int16, and a matrix of
    digits, uint8, for each later pass. Equal to ``codec.ladder.climb``, digit for digit.
    """
    coarse = np.empty(values.shape, np.int16)
    digits = tuple(np.empty(values.shape, np.uint8) for _ in range(passes - 1))
    _core.climb(np.ascontiguousarray(values), coarse, digits)
    return coarse, digits


def count_digits(coarse: Coarse, digits: Sequence[Digits]) -> list[NDArray[np.float64]]:
    """Count per channel the magnitudes of pass 0, (N, 17), and (context, digit) of later ones."""
    counts = np.zeros((coarse.shape[1], 17 + 6 * len(digits)), np.uint32)
    _core.count_digits(coarse, digits, counts)
    wide = counts.astype(np.float64)
    return [wide[:, :17], *(wide[:, 17 + 6 * j : 23 + 6 * j] for j in range(len(digits)))]


def ladder_errors(
    values: Floats,
    coarse: Coarse,
    digits: Sequence[Digits],
    *,
    classes: Digits,
    offsets: Floats,
    stride: int,
) -> NDArray[np.float64]:
    """Return the squared error after each pass, (ways, passes), in squared finest steps.

    classes: (N,), 0 to 63. offsets: (ways, passes, 2, 64) float32, by which values significant
    since pass 0 and later ones are moved, in steps of each pass. stride: every so many rows count.
    """
    errors = np.empty(offsets.shape[:2], np.float64)
    _core.ladder_errors(
        np.ascontiguousarray(values), coarse, digits, classes, offsets, stride, errors
    )
    return errors


def column_medians(values: Floats) -> Floats:
    """Return the median of every column, (N,) float32, as ``numpy.median`` does; rows not 0."""
    medians = np.empty(values.shape[1], np.float32)
    _core.column_medians(np.ascontiguousarray(values), medians)
    return medians
