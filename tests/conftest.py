"""Shared fixtures: seeded KV caches with the shape of real ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Before anything loads OpenMP: tests run side by side, and more threads than cores only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV

# A busy machine is no reason to fail: how long an example takes is not what tests are about.
settings.register_profile("cachegen", deadline=None)
settings.load_profile("cachegen")

MakeKV = Callable[..., KVChunk]
MakeSymbols = Callable[..., NDArray[np.uint8]]


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the kernels of every instruction set that this machine has."""
    before = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


def synthetic_kv(
    layers: int = 3,
    heads: int = 2,
    tokens: int = 64,
    dim: int = 16,
    *,
    value_dim: int | None = None,
    dtype: object = ml_dtypes.bfloat16,
    seed: int = 7,
) -> KVChunk:
    """Draw K and V with a mean and a spread per channel, and correlation between tokens."""
    rng = np.random.default_rng(seed)

    def plane(width: int) -> np.ndarray:
        mean = rng.normal(0, 2, (1, heads, width))
        spread = np.exp(rng.normal(-0.5, 0.7, (1, heads, width)))
        noise = rng.normal(0, 1, (tokens, heads, width))
        for token in range(1, tokens):
            noise[token] = 0.6 * noise[token - 1] + 0.8 * noise[token]
        return (mean + spread * noise).astype(dtype)

    rows = [LayerKV(plane(dim), plane(value_dim or dim)) for _ in range(layers)]
    return KVChunk.from_layers(rows)


@pytest.fixture(scope="session")
def make_kv() -> MakeKV:
    return synthetic_kv


def sparse_symbols(
    tokens: int, channels: int, *, count: int, largest: int = 254
) -> NDArray[np.uint8]:
    """Draw a matrix with up to so many symbols that are not 0, the largest one among them."""
    rng = np.random.default_rng(count)
    symbols = np.zeros((tokens, channels), np.uint8)
    at = rng.choice(symbols.size, min(count, symbols.size), replace=False)
    symbols.flat[at] = np.minimum(rng.geometric(0.4, len(at)), largest)
    symbols.flat[at[:3]] = [largest, 3, 2][: len(at[:3])]
    return symbols


@pytest.fixture(scope="session")
def make_sparse() -> MakeSymbols:
    return sparse_symbols


def flips(body: bytes) -> Iterator[bytes]:
    """Yield a body with each of its bits flipped in turn."""
    for bit in range(8 * len(body)):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


@pytest.fixture(scope="session")
def every_flip() -> Callable[[bytes], Iterator[bytes]]:
    return flips
