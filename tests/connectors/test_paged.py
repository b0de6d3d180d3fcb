"""Blocks of real tensors, read and written through NumPy."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from cachegen.chunk import KVChunk
from cachegen.connectors.cpu_blocks import Packing
from cachegen.connectors.layout import BlockLayout, recognize
from cachegen.connectors.paged import PagedCache
from cachegen.errors import GeometryError, UnsupportedModelError

H, N, D, L = 2, 32, 64, 2


def paged(
    shape: tuple[int, ...], dtype: torch.dtype, packing: Packing, block_tokens: int = N
) -> tuple[list[torch.Tensor], PagedCache]:
    tensors = [torch.zeros(shape, dtype=dtype) for _ in range(L)]
    layout = recognize(
        shape, block_tokens=block_tokens, heads=H, key_dim=D, value_dim=D, packing=packing
    )
    return tensors, PagedCache(tensors, [layout] * L, block_tokens=block_tokens)


def chunk(tokens: int, dtype: torch.dtype) -> KVChunk:
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn((L, 2, tokens, H, D), generator=generator).to(dtype)
    return KVChunk.from_array(kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "packing"),
    [
        ((9, H, N, 2 * D), Packing.ROWS),
        ((9, H, N, 2 * D), Packing.VECTOR),
        ((9, H, N, 2 * D), Packing.TILES),
        ((2, 9, N, H, D), Packing.ROWS),
        ((9, 2, N, H, D), Packing.ROWS),
    ],
)
def test_chunks_survive_the_cache(
    shape: tuple[int, ...], packing: Packing, dtype: torch.dtype
) -> None:
    tensors, cache = paged(shape, dtype, packing)
    original = chunk(2 * N, dtype)
    for layer, blocks in enumerate(cache.to_blocks(original)):
        cache.write_layer(layer, blocks, (7, 3))
    cache.finish_writes()
    back = cache.to_chunk(cache.stage((7, 3)).ready(), first_position=0, rope=None)
    assert back.geometry == original.geometry
    np.testing.assert_array_equal(back.to_array(), original.to_array())
    # A view with other strides behaves the same: nothing assumes contiguous memory.
    assert tensors[0].abs().sum() > 0


def test_a_cache_with_smaller_blocks_of_its_own() -> None:
    tensors, cache = paged((8, H, N, 2 * D), torch.float32, Packing.ROWS, block_tokens=2 * N)
    original = chunk(2 * N, torch.float32)
    for layer, blocks in enumerate(cache.to_blocks(original)):
        cache.write_layer(layer, blocks, (3,))
    assert tensors[0][:6].abs().sum() == 0
    np.testing.assert_array_equal(
        tensors[0][6, :, :, :D].numpy(), original.layers[0].keys[:N].transpose(1, 0, 2)
    )
    back = cache.to_chunk(cache.stage((3,)).ready(), first_position=0, rope=None)
    np.testing.assert_array_equal(back.to_array(), original.to_array())


def test_strided_caches() -> None:
    base = torch.zeros((9, N, H, 2 * D))
    view = base.transpose(1, 2)
    cache = PagedCache([view], [BlockLayout("BHNC", N, H, D, D)], block_tokens=N)
    kv = np.random.default_rng(1).normal(size=(1, 2, N, H, D)).astype(np.float32)
    (blocks,) = cache.to_blocks(KVChunk.from_array(kv))
    cache.write_layer(0, blocks, (4,))
    np.testing.assert_array_equal(base[4, :, :, :D].numpy(), kv[0, 0])
    assert base[[0, 1, 2, 3, 5, 6, 7, 8]].abs().sum() == 0


def test_only_copies_of_blocks_that_will_be_written_are_waited_for() -> None:
    _, cache = paged((9, H, N, 2 * D), torch.float32, Packing.ROWS)
    opened, over = threading.Event(), threading.Event()
    cache._copier.submit(opened.wait, 20)
    staged = cache.stage((3, 4))
    assert cache.is_copying
    cache.finish_copies({1, 2, 5})  # returns, although nothing was copied yet

    def wait_for_four() -> None:
        cache.finish_copies({4, 7})
        over.set()

    thread = threading.Thread(target=wait_for_four)
    thread.start()
    assert not over.wait(0.05)
    opened.set()
    thread.join(20)
    assert over.is_set()
    assert len(staged.ready()) == len(cache._caches)
    cache.finish_copies()
    assert not cache.is_copying
    cache.close()


def test_what_does_not_fit_is_refused() -> None:
    tensors, cache = paged((9, H, N, 2 * D), torch.float32, Packing.ROWS)
    with pytest.raises(GeometryError, match="geometry of a stored chunk"):
        cache.to_blocks(chunk(N, torch.bfloat16))
    (first, _) = cache.to_blocks(chunk(2 * N, torch.float32))
    with pytest.raises(GeometryError, match="blocks to write"):
        cache.write_layer(0, first, (1,))
    layout = BlockLayout("BHNC", N, H, D, D)
    with pytest.raises(UnsupportedModelError, match="2 dtypes"):
        PagedCache([tensors[0], tensors[0].half()], [layout] * 2, block_tokens=N)
    with pytest.raises(GeometryError, match="shape of a paged cache"):
        PagedCache([tensors[0][:, :, :16]], [layout], block_tokens=N)
    with pytest.raises(GeometryError, match="layers"):
        PagedCache([], [], block_tokens=N)
