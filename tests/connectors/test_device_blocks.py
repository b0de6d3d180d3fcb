"""Saving and loading where K and V lie on a device: here the emulated one, over CPU tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cachegen.chunk import KVChunk
from cachegen.codec.registry import decode
from cachegen.connectors.adapter import LoadJob
from cachegen.connectors.coding import ChunkCoder, Coding
from cachegen.connectors.cpu_blocks import Packing
from cachegen.connectors.device_blocks import DeviceBlocks, find_device
from cachegen.connectors.layout import BlockLayout, recognize
from cachegen.connectors.paged import PagedCache
from cachegen.errors import GeometryError
from cachegen.native.cuda import emulation
from cachegen.native.cuda.emulation import EmulatedDevice

sys.path.insert(0, str(Path(__file__).parent))
from paged_world import BLOCK, DIM, HEADS, LAYERS, World, chunk_of, key_of, piece, wait_for

H, N, D, L = 2, 8, 16, 2
SHAPES = [(9, H, N, 2 * D), (2, 9, N, H, D), (9, 2, N, H, D), (2, 9, H, N, D), (9, 2, H, N, D)]


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return EmulatedDevice()


def filled(layout: BlockLayout, shape: tuple[int, ...]) -> tuple[list[torch.Tensor], KVChunk]:
    """Tensors whose blocks 6 and 2 hold a chunk."""
    generator = torch.Generator().manual_seed(3)
    kv = KVChunk.from_array(
        (3 * torch.randn((L, 2, 2 * N, H, D), generator=generator)).to(torch.bfloat16)
    )
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(L)]
    host = PagedCache(tensors, [layout] * L, block_tokens=N)
    for layer, blocks in enumerate(host.to_blocks(kv)):
        host.write_layer(layer, blocks, (6, 2))
    return tensors, kv


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_coded_where_they_lie(device: EmulatedDevice, shape: tuple[int, ...]) -> None:
    layout = recognize(shape, block_tokens=N, heads=H, key_dim=D, value_dim=D)
    tensors, kv = filled(layout, shape)
    cache = PagedCache(tensors, [layout] * L, block_tokens=N, device=device)
    staged = cache.to_chunk(cache.stage((6, 2)).ready(), first_position=64, rope=None)
    assert isinstance(staged, DeviceBlocks) and staged.tokens == 2 * N
    np.testing.assert_array_equal(staged.to_host().to_array(), kv.to_array())
    coder, key = ChunkCoder(Coding.choose("balanced")), key_of(0)
    device.launches.clear()
    data = coder.encode(staged, key)
    assert "encode_progressive" in device.launches
    assert data == coder.encode(staged.to_host(), key)

    room = cache.room(2 * N)
    assert room is not None
    device.launches.clear()
    decoded = coder.decode(data, key, profile=None, room=room)
    assert decoded is room and any("decode" in name for name in device.launches)
    for layer, blocks in enumerate(cache.to_blocks(decoded)):
        cache.write_layer(layer, blocks, (1, 4))
    got = PagedCache(tensors, [layout] * L, block_tokens=N)
    back = got.to_chunk(got.stage((1, 4)).ready(), first_position=64, rope=None)
    expected = decode(data).to_array().astype(np.float32)
    apart = np.abs(back.to_array().astype(np.float32) - expected)
    assert apart.max() <= 2.0**-7 * np.abs(expected).max()
    with pytest.raises(GeometryError):
        coder.decode(data, key, profile=None, room=cache.room(N))


def test_a_worker_saves_and_loads(device: EmulatedDevice) -> None:
    """The whole way of a connector: stage, encode, store, fetch, decode, write."""
    world = World(Coding.choose("balanced", codec="int8"))
    layouts = [BlockLayout("BHNC", BLOCK, HEADS, DIM, DIM)] * LAYERS
    cache = PagedCache(world.tensors, layouts, block_tokens=BLOCK, device=device)
    for layer, blocks in enumerate(world.cache.to_blocks(chunk_of(0))):
        world.cache.write_layer(layer, blocks, (0, 1))
    key = key_of(0, world.coder.coding)
    staged = cache.to_chunk(cache.stage((0, 1)).ready(), first_position=0, rope=None)
    world.store.put(key.name, world.coder.encode(staged, key))
    world.loader._cache = cache
    device.launches.clear()
    world.loader.start(LoadJob("r", (piece(0, 4, 5),), budget_s=30.0))
    (report,) = wait_for(world.loader.poll)
    assert report.failed_block_ids == frozenset() and report.reason is None
    assert "decode_rows" in device.launches
    expected = decode(world.store.get(key.name)).to_array()
    np.testing.assert_array_equal(world.held(4, 5), expected)
    world.close()


def test_the_host_codes_what_no_device_can() -> None:
    rows = BlockLayout("BHNC", N, H, D, D)
    packed = BlockLayout("BHNC", 32, H, 64, 64, Packing.VECTOR)
    assert find_device(torch.zeros(1), [rows]) is None
    assert find_device(torch.zeros(1, device="meta"), [packed]) is None
    cache = PagedCache([torch.zeros((2, H, N, 2 * D))], [rows], block_tokens=N)
    assert cache.room(N) is None
