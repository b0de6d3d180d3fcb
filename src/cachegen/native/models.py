"""Statistics of the channels of a symbol matrix, and the models that an encoder takes from them.

``codec.entropy`` has the same in NumPy; integers are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Symbols

Counts = NDArray[np.uint32]


def count_symbols(symbols: Symbols, size: int, *, shift: int = 0) -> Counts:
    """Count the values of every channel without their low bits: (T, C) uint8 to (C, size) uint32.

    Values of ``size`` or more are left out.
    """
    counts = np.empty((symbols.shape[1], size), np.uint32)
    _core.count_symbols(np.ascontiguousarray(symbols), shift, counts)
    return counts


def normalize_counts(counts: Counts, bits_saved: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Scale counts (C, A) to frequencies that sum to 4096, none that occurs being 0.

    bits_saved: (4097,) log2((f + 1) / f) by frequency f; that of 0 is not looked at.
    """
    freqs = np.empty(counts.shape, np.uint16)
    _core.normalize_counts(counts, bits_saved, freqs)
    return freqs


def fit_classes(counts: Counts, costs: NDArray[np.int16]) -> tuple[Symbols, Symbols]:
    """Choose for every channel the frozen table and the rotation with the shortest code.

    counts: (C, 32). costs: (16, classes, 2), in 1/1024 bit, of pairs of values in each class.
    Returns: classes, rotations.
    """
    chosen: NDArray[Any] = np.zeros((2, len(counts)), np.uint8)
    _core.fit_classes(counts, costs, chosen[0], chosen[1])
    return chosen[0], chosen[1]
