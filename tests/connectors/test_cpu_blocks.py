"""Packings of vLLM's CPU backend, against what its own operation was recorded to do."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cachegen.connectors.cpu_blocks import (
    Packing,
    check_block,
    pack_keys,
    pack_values,
    packing_of,
    unpack_keys,
    unpack_values,
)
from cachegen.errors import GeometryError, UnsupportedModelError

# For each case the token-major index of the value at every place of a packed block, written by
# vLLM 0.32's cpu_attn_reshape_and_cache; tests/vllm repeats this against the installed vLLM.
RECORDED = np.load(Path(__file__).parent / "recorded" / "vllm_0_32_cpu_packings.npz")
CASES = sorted({name[:-2] for name in RECORDED.files})


@pytest.mark.parametrize("case", CASES)
def test_packing_is_that_of_vllm(case: str) -> None:
    isa, name, dim_text, tokens_text = case.split("-")
    dim, tokens = int(dim_text), int(tokens_text)
    packing = packing_of(isa, head_dim=dim)
    bits = np.uint16 if name == "bfloat16" else np.uint32
    rows = np.arange(tokens * dim, dtype=bits).reshape(1, tokens, dim)
    for pack, unpack, plane in (
        (pack_keys, unpack_keys, "k"),
        (pack_values, unpack_values, "v"),
    ):
        packed = RECORDED[f"{case}-{plane}"].astype(bits).reshape(1, tokens, dim)
        np.testing.assert_array_equal(pack(rows, packing), packed)
        np.testing.assert_array_equal(unpack(packed, packing), rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("packing", list(Packing))
def test_round_trip(packing: Packing, dtype: object) -> None:
    rows = np.random.default_rng(1).normal(size=(3, 2, 32, 64)).astype(dtype)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        packed = pack(rows, packing)
        assert packed.shape == rows.shape
        np.testing.assert_array_equal(unpack(packed, packing), rows)
    assert (packing is Packing.ROWS) == np.array_equal(pack_keys(rows, packing), rows)


def test_amx_falls_back_where_tiles_do_not_fit() -> None:
    assert packing_of("amx", head_dim=64) is Packing.TILES
    assert packing_of("amx", head_dim=80) is Packing.VECTOR


@pytest.mark.parametrize("isa", ["neon", "rvv", "vxe", "vsx", ""])
def test_unproven_instruction_sets_are_refused_by_name(isa: str) -> None:
    with pytest.raises(UnsupportedModelError, match=repr(isa)):
        packing_of(isa, head_dim=64)


def test_blocks_that_do_not_fill_tiles_are_refused() -> None:
    check_block(Packing.TILES, block_tokens=32, head_dim=64, item_bytes=2)
    check_block(Packing.VECTOR, block_tokens=5, head_dim=7, item_bytes=2)
    with pytest.raises(GeometryError, match="tiles of 16"):
        check_block(Packing.TILES, block_tokens=24, head_dim=64, item_bytes=2)
