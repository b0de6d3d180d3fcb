"""Packed blocks, against the operation that vLLM's CPU backend writes its cache with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from cachegen.chunk import KVChunk
from cachegen.connectors.cpu_blocks import packing_of
from cachegen.connectors.layout import recognize
from cachegen.connectors.paged import PagedCache
from vllm import _custom_ops as ops

HEADS, BLOCKS = 3, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(isa: str, dtype: torch.dtype, dim: int, block: int) -> tuple[torch.Tensor, KVChunk]:
    """Let vLLM write random K and V of all but the first block; returns cache and K, V."""
    tokens = (BLOCKS - 1) * block
    generator = torch.Generator().manual_seed(dim + block)
    keys, values = torch.randn((2, tokens, HEADS, dim), generator=generator).to(dtype)
    cache = torch.zeros((BLOCKS, HEADS, block, 2 * dim), dtype=dtype)
    # The view that the backend itself makes of its cache.
    k_cache, v_cache = cache.view(BLOCKS, HEADS, 2 * block, dim).chunk(2, dim=2)
    slots = torch.arange(block, BLOCKS * block)
    try:
        ops.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, slots, isa, 1.0, 1.0, "auto")
    except (RuntimeError, NotImplementedError) as error:  # vLLM's op lacks this ISA or dtype here
        pytest.skip(f"this machine: {error}")
    return cache, KVChunk.from_array(torch.stack([keys, values])[None])


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["amx", "vec", "vec16"])
def test_blocks_hold_what_vllm_wrote(isa: str, dtype: torch.dtype, dim: int, block: int) -> None:
    cache, written = write(isa, dtype, dim, block)
    packing = packing_of(isa, head_dim=dim)
    layout = recognize(
        cache.shape, block_tokens=block, heads=HEADS, key_dim=dim, value_dim=dim, packing=packing
    )
    paged = PagedCache([cache], [layout], block_tokens=block)
    ids = range(1, BLOCKS)
    read = paged.to_chunk(paged.stage(ids).ready(), first_position=0, rope=None)
    np.testing.assert_array_equal(read.to_array(), written.to_array())
    # The other way: what we write is what vLLM writes, to the last bit.
    copy = torch.zeros_like(cache)
    again = PagedCache([copy], [layout], block_tokens=block)
    again.write_layer(0, again.to_blocks(written)[0], ids)
    assert torch.equal(copy, cache)


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_set_that_vllm_chooses_is_known(dtype: torch.dtype, dim: int) -> None:
    isa = _get_attn_isa(dtype, 128, dim, "auto")
    packing_of(isa, head_dim=dim)
    _, written = write(isa, dtype, dim, 128)
    assert written.tokens == 4 * 128
