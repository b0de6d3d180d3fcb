"""Sparse segments as places: equal to the NumPy twin, byte by byte, and refused with it."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen import native
from cachegen.codec import sparse
from cachegen.errors import CorruptError, GeometryError

SHAPES = [(1, 1), (1, 5), (31, 7), (32, 1), (33, 64), (300, 40)]
LARGEST = 254


def pairs_of(symbols: sparse.Symbols) -> np.ndarray:
    """Return what parse_sparse returns."""
    tokens, channels = symbols.shape
    places = -(-tokens // sparse.LANES)
    token, channel = np.nonzero(symbols)
    at = (token % places * channels + channel) * sparse.LANES + token // places
    order = np.argsort(at)
    return np.stack([at[order], symbols[token, channel][order]], axis=1).astype(np.uint32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_equal_to_the_numpy_twin(make_sparse, shape: tuple[int, int], count: int) -> None:
    steps = -(-shape[0] // sparse.LANES) * shape[1]
    symbols = make_sparse(*shape, count=min(count, steps))
    body, pairs = sparse.write_sparse(symbols), pairs_of(symbols)
    assert native.write_sparse(pairs, *shape) == body
    read = native.parse_sparse(body, *shape, largest=LARGEST)
    assert read.dtype == np.uint32 and read.shape == (len(pairs), 2)
    assert np.array_equal(read, pairs)


def test_damage_is_refused_with_the_numpy_twin(make_sparse, every_flip) -> None:
    symbols = make_sparse(40, 50, count=12)
    body = sparse.write_sparse(symbols)
    refused = 0
    for damaged in every_flip(body):
        try:
            expected = sparse.read_sparse(damaged, symbols.shape, LARGEST)
        except CorruptError:
            with pytest.raises(CorruptError, match="sparse segment"):
                native.parse_sparse(damaged, *symbols.shape, largest=LARGEST)
            refused += 1
        else:
            read = native.parse_sparse(damaged, *symbols.shape, largest=LARGEST)
            assert np.array_equal(read, pairs_of(expected))
    assert refused > len(body)


@pytest.mark.parametrize(
    "pairs",
    [
        [[32 * 100, 1]],  # behind the last step
        [[31, 1]],  # an idle lane
        [[33, 1], [33, 1]],
        [[64, 1], [33, 1]],
        [[0, 0]],
        [[0, 256]],
        [[i, 1] for i in range(101)],
        [[0, 1, 2]],
    ],
)
def test_pairs_that_are_none_of_a_make_sparse(make_sparse, pairs: list[list[int]]) -> None:
    with pytest.raises(GeometryError):
        native.write_sparse(np.array(pairs, np.uint32), 40, 50)


def test_places_beyond_32_bits() -> None:
    for tokens, channels in ((1 << 24, 1 << 9), (1 << 27, 1 << 20), (1, 1 << 28)):
        with pytest.raises(GeometryError, match="places of 32 bits"):
            native.parse_sparse(bytes(5), tokens, channels, largest=LARGEST)
        with pytest.raises(GeometryError, match="places of 32 bits"):
            native.write_sparse(np.zeros((0, 2), np.uint32), tokens, channels)
    assert native.parse_sparse(bytes(5), 1 << 24, 1 << 8, largest=LARGEST).shape == (0, 2)
