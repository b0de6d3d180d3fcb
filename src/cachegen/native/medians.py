"""Medians of columns, for calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core

Floats = NDArray[np.float32]


def column_medians(values: Floats) -> Floats:
    """Return the median of every column, (N,) float32, as ``numpy.median`` does; rows not 0."""
    medians = np.empty(values.shape[1], np.float32)
    _core.column_medians(np.ascontiguousarray(values), medians)
    return medians
