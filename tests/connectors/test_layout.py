"""Paged blocks to rows and back, for every layout that vLLM versions have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cachegen.connectors.cpu_blocks import Packing
from cachegen.connectors.layout import KNOWN_AXES, BlockLayout, recognize
from cachegen.errors import GeometryError, UnsupportedModelError

B, H, N, D = 7, 2, 16, 32
VERSIONS = json.loads((Path(__file__).parent / "recorded" / "vllm_layouts.json").read_text())[
    "versions"
]
RECORDED = [(v, b, axes) for v, found in VERSIONS.items() for b, axes in found.items()]
SIZES = {"2": 2, "B": B, "H": H, "N": N, "D": D, "C": 2 * D}


def shape_of(axes: str) -> tuple[int, ...]:
    return tuple(SIZES[axis] for axis in axes)


def fill(axes: str, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Build a cache by plain loops, the way the letters say. keys, values: (B, N, H, D)."""
    cache = np.zeros(shape_of(axes), keys.dtype)
    for index in np.ndindex(cache.shape):
        at = dict(zip(axes, index, strict=True))
        if "C" in at:
            source, d = (keys, at["C"]) if at["C"] < D else (values, at["C"] - D)
        else:
            source, d = (values if at["2"] else keys), at["D"]
        cache[index] = source[at["B"], at["N"], at["H"], d]
    return cache


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, N, H, D)).astype(np.float32)


@pytest.mark.parametrize("axes", KNOWN_AXES)
def test_unpack_reads_what_the_letters_say(axes: str) -> None:
    keys, values = rows(1), rows(2)
    cache = fill(axes, keys, values)
    layout = recognize(cache.shape, block_tokens=N, heads=H, key_dim=D, value_dim=D)
    assert layout.axes == axes
    ids = [5, 0, 3]
    blocks = np.moveaxis(cache, layout.block_axis, 0)[ids]
    got_k, got_v = layout.unpack(blocks)
    np.testing.assert_array_equal(got_k, keys[ids].reshape(-1, H, D))
    np.testing.assert_array_equal(got_v, values[ids].reshape(-1, H, D))
    np.testing.assert_array_equal(layout.pack(got_k, got_v), blocks)


@pytest.mark.parametrize(("version", "backend", "axes"), RECORDED)
def test_recorded_versions_are_recognised(version: str, backend: str, axes: str) -> None:
    packing = Packing.VECTOR if backend == "cpu_attn" else Packing.ROWS
    layout = recognize(
        shape_of(axes), block_tokens=N, heads=H, key_dim=D, value_dim=D, packing=packing
    )
    assert (layout.axes, layout.block_tokens, layout.packing) == (axes, N, packing)


@pytest.mark.parametrize("axes", ["BHNC", "2BHND"])
@pytest.mark.parametrize("packing", [Packing.VECTOR, Packing.TILES])
def test_packed_blocks_round_trip(axes: str, packing: Packing) -> None:
    layout = BlockLayout(axes, N, H, D, D, packing)
    keys, values = rows(3).reshape(-1, H, D), rows(4).reshape(-1, H, D)
    blocks = layout.pack(keys, values)
    assert blocks.shape == (B, *layout.block_shape)
    got_k, got_v = layout.unpack(blocks)
    np.testing.assert_array_equal(got_k, keys)
    np.testing.assert_array_equal(got_v, values)


def test_packed_keys_lie_before_values() -> None:
    layout = BlockLayout("BHNC", N, H, D, D, Packing.VECTOR)
    zeros, ones = np.zeros((N, H, D), np.float32), np.ones((N, H, D), np.float32)
    flat = layout.pack(zeros, ones).reshape(1, H, -1)
    assert not flat[..., : N * D].any()
    assert flat[..., N * D :].all()


def test_own_blocks_may_be_a_fraction_of_the_schedulers() -> None:
    layout = recognize((B, H, N, 2 * D), block_tokens=4 * N, heads=H, key_dim=D, value_dim=D)
    assert layout.block_tokens == N
    with pytest.raises(UnsupportedModelError):
        recognize((B, H, N, 2 * D), block_tokens=N + 1, heads=H, key_dim=D, value_dim=D)


def test_k_and_v_of_different_dimension() -> None:
    layout = recognize((B, H, N, 24), block_tokens=N, heads=H, key_dim=16, value_dim=8)
    keys = np.random.default_rng(5).normal(size=(2 * N, H, 16)).astype(np.float32)
    values = np.random.default_rng(6).normal(size=(2 * N, H, 8)).astype(np.float32)
    got_k, got_v = layout.unpack(layout.pack(keys, values))
    np.testing.assert_array_equal(got_k, keys)
    np.testing.assert_array_equal(got_v, values)
    with pytest.raises(GeometryError, match="dimensions 16 and 8"):
        BlockLayout("2BNHD", N, H, 16, 8)


@pytest.mark.parametrize(
    "shape",
    [
        (B, N, D),  # MLA
        (B, 2 * H, N, D),  # quantised, scales beside
        (B, H, N, 2 * D + 4),
        (2, B, 4, 4, D),
        (2, 2, N, H, D),  # two blocks: K and V cannot be told from blocks
    ],
)
def test_unknown_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match="shape of the paged cache"):
        recognize(shape, block_tokens=N, heads=H, key_dim=D, value_dim=D)


def test_rows_that_do_not_fit_are_refused() -> None:
    layout = BlockLayout("BHNC", N, H, D, D)
    good = np.zeros((N, H, D), np.float32)
    with pytest.raises(GeometryError, match="keys"):
        layout.pack(good[:-1], good[:-1])
    with pytest.raises(GeometryError, match="values"):
        layout.pack(good, good[..., :-1])
    with pytest.raises(UnsupportedModelError, match="NHBD"):
        BlockLayout("NHBD", N, H, D, D)
