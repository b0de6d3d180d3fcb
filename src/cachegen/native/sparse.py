"""Sparse segments for devices, as the places of what is not 0; ``codec/sparse.py`` is the twin."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Body, as_bytes

Pairs = NDArray[np.uint32]


def parse_sparse(body: Body, tokens: int, channels: int, *, largest: int) -> Pairs:
    """Return the symbols of a sparse segment that are not 0, in order of place.

    body: any contiguous buffer. tokens, channels: of the matrix; ceil(tokens / 32) * channels steps
    of 32 places each must fit 32 bits. largest: symbol, 1 to 255.
    Returns: (N, 2) uint32, ``32 * step + lane`` and the symbol.
    Raises: CorruptError, GeometryError.
    """
    return _core.parse_sparse(as_bytes(body), tokens, channels, largest)


def write_sparse(pairs: Pairs, tokens: int, channels: int) -> bytes:
    """Return the body of a sparse segment; pairs as ``parse_sparse`` returns them.

    Raises: GeometryError for places out of order or without a token, symbols beyond 1 to 255.
    """
    return _core.write_sparse(np.ascontiguousarray(pairs, np.uint32), tokens, channels)
