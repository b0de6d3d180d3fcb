"""Sparse segments: what is stored comes back, on both sides alike; everything else is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen.codec import sparse
from cachegen.errors import CorruptError

LARGEST = 254


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (31, 7), (32, 1), (33, 64), (300, 40)])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_symbols_come_back(make_sparse, shape: tuple[int, int], count: int) -> None:
    steps = -(-shape[0] // sparse.LANES) * shape[1]
    symbols = make_sparse(*shape, count=min(count, steps))
    body = sparse.write_sparse(symbols)
    assert np.array_equal(sparse.read_sparse(body, shape, LARGEST), symbols)


def test_a_symbol_costs_about_its_information(make_sparse) -> None:
    symbols = make_sparse(256, 1024, count=600)
    bits = 8 * len(sparse.write_sparse(symbols)) / 600
    assert bits < np.log2(symbols.size / 600) + 6


def test_damage_is_refused_or_decodes_within_the_matrix(make_sparse, every_flip) -> None:
    symbols = make_sparse(40, 50, count=12)
    body = sparse.write_sparse(symbols)
    refused = 0
    for damaged in every_flip(body):
        try:
            read = sparse.read_sparse(damaged, symbols.shape, LARGEST)
        except CorruptError:
            refused += 1
        else:
            assert read.shape == symbols.shape
            assert not np.array_equal(read, symbols)
    assert refused > len(body)


@pytest.mark.parametrize("cut", range(1, 12))
def test_missing_and_additional_bytes_are_refused(make_sparse, cut: int) -> None:
    symbols = make_sparse(40, 50, count=12)
    body = sparse.write_sparse(symbols)
    for wrong in (body[:-cut], body + bytes(cut)):
        with pytest.raises(CorruptError):
            sparse.read_sparse(wrong, symbols.shape, LARGEST)
