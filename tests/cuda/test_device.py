"""The same on a real device: every object of the emulated tests, slots, streams, graphs, damage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachegen.chunk import KVChunk, as_numpy, as_torch
from cachegen.codec import gpu
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import FormatError
from cachegen.native.cuda.device import CudaDevice

sys.path.insert(0, str(Path(__file__).parent))
from samples import (
    BFLOAT16,
    GOLDEN_NAMES,
    SPARSE_CODEC,
    Sample,
    assert_close,
    damaged,
    draw_kv,
    empty_like,
    few_wide_values,
    golden_sample,
    profiled,
    samples,
    sparse_samples,
    with_rope,
)

pytestmark = pytest.mark.cuda
ENCODERS = (
    *(Int8Codec(), Int8Codec(entropy=False), CacheGenCodec(), CacheGenCodec(delta="anchor")),
    *(CacheGenCodec(tables="parametric"), ProgressiveCodec(), ProgressiveCodec(passes=6)),
)
ALL = [*samples(), *sparse_samples()]


def on_device(pairs: Any) -> list[tuple[Any, Any]]:
    return [(as_torch(keys).cuda(), as_torch(values).cuda()) for keys, values in pairs]


def check(sample: Sample) -> None:
    expected = sample.expected()
    out = on_device(empty_like(expected))
    options = {"profile": sample.profile, "allow_partial": sample.partial}
    assert decode(sample.data, out=out, **options) is None
    exact = not sample.name.startswith("progressive")
    for (keys, values), layer in zip(out, expected.layers, strict=True):
        assert_close(as_numpy(keys), layer.keys, exact=exact)
        assert_close(as_numpy(values), layer.values, exact=exact)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_objects(real: CudaDevice, name: str) -> None:
    check(golden_sample(name))


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.name)
def test_equal_to_the_cpu(real: CudaDevice, sample: Sample) -> None:
    check(sample)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_profiles(real: CudaDevice, dim: int) -> None:
    check(profiled(dim=dim)[0])


def test_wide_chunks(real: CudaDevice) -> None:
    """Whole chunks of a served model's width: many streams, all lanes, RoPE on 128 channels."""
    kv = with_rope(draw_kv(2, 8, 256, 128, seed=1, dtype=BFLOAT16), 64)
    for codec in (ProgressiveCodec(), Int8Codec()):
        check(Sample(codec.name, codec.encode(kv)))


def test_slots_streams_and_graphs(real: CudaDevice) -> None:
    """A launch is captured in a graph and replayed into a cache that was wiped in between."""
    import torch

    kv = with_rope(draw_kv(2, 2, 64, 32, seed=5, dtype=BFLOAT16), 16)
    expected = kv_of = decode(ProgressiveCodec().encode(kv))
    slots = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    cache = torch.full((2, 2, 16, 2, 8, 32), 7.0, dtype=torch.bfloat16, device="cuda")
    out = cache.transpose(3, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    prepared = gpu.prepare(
        [ProgressiveCodec().encode(kv)], out=out, slot_mapping=slots.cuda(), stream=stream
    )
    prepared.launch()
    prepared.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        prepared.launch(torch.cuda.current_stream())
    cache.fill_(7.0)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    flat = as_numpy(out.reshape(2, 2, 128, 2, 32).contiguous())
    rows = slots.numpy()
    for layer, held in enumerate(kv_of.layers):
        assert_close(flat[layer, 0, rows], held.keys, exact=False)
        assert_close(flat[layer, 1, rows], held.values, exact=False)
    free = np.setdiff1d(np.arange(128), rows)
    assert (flat[:, :, free] == 7).all()
    assert expected.tokens == 64


def test_hostile_objects(real: CudaDevice) -> None:
    """What the CPU refuses the device refuses, and it still works afterwards."""
    rng = np.random.default_rng(6)
    refused = 0
    for sample in ALL:
        if sample.partial:
            continue
        for _ in range(3):
            data = damaged(sample.data, rng)
            out = on_device(empty_like(sample.expected()))
            try:
                decode(data, profile=sample.profile)
            except FormatError as error:
                with pytest.raises(type(error)):
                    decode(data, out=out, profile=sample.profile)
                refused += 1
            else:
                decode(data, out=out, profile=sample.profile)
    assert refused > 20
    check(ALL[0])


@pytest.mark.parametrize("codec", ENCODERS, ids=lambda codec: str(codec.config()))
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_encoding_equals_the_cpu(real: CudaDevice, codec: Codec, dtype: Any) -> None:
    for layers, heads, tokens, dim in ((2, 2, 64, 16), (1, 3, 37, 8), (2, 8, 256, 128)):
        kv = with_rope(draw_kv(layers, heads, tokens, dim, seed=tokens, dtype=dtype), dim // 2)
        planes = on_device((layer.keys, layer.values) for layer in kv.layers)
        chunk = gpu.DeviceChunk(planes, None, kv.first_position, kv.rope)
        assert gpu.encode(codec, chunk) == codec.encode(kv)


@pytest.mark.parametrize(("tokens", "dim"), [(200, 16), (256, 128), (33, 12)])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01])
def test_encoding_sparse_first_passes(
    real: CudaDevice, tokens: int, dim: int, share: float
) -> None:
    kv = with_rope(few_wide_values(tokens, dim, share=share), dim // 2)
    planes = on_device((layer.keys, layer.values) for layer in kv.layers)
    chunk = gpu.DeviceChunk(planes, None, kv.first_position, kv.rope)
    data = gpu.encode(SPARSE_CODEC, chunk)
    assert data == SPARSE_CODEC.encode(kv)
    check(Sample("progressive sparse", data))


def test_encoding_with_a_profile(real: CudaDevice) -> None:
    for dim in (16, 128):
        sample, profile = profiled(dim=dim)
        kv = with_rope(draw_kv(2, 2, 70, dim, seed=20, dtype=BFLOAT16), dim // 2)
        planes = on_device((layer.keys, layer.values) for layer in kv.layers)
        chunk = gpu.DeviceChunk(planes, None, kv.first_position, kv.rope)
        data = gpu.encode(ProgressiveCodec(profile=profile, step=0.05), chunk)
        assert abs(len(data) - len(sample.data)) <= 8 + len(sample.data) // 100
        decode(data, profile=profile)


def test_encoding_from_blocks_in_a_graph(real: CudaDevice) -> None:
    """Encoders are captured too: what the blocks hold when a graph is replayed is encoded."""
    import torch

    chunks = [with_rope(draw_kv(2, 2, 64, 32, seed=s, dtype=BFLOAT16), 16) for s in (5, 6)]
    slots = np.random.default_rng(1).permutation(128)[:64]
    cache = torch.zeros((2, 2, 128, 2, 32), dtype=torch.bfloat16, device="cuda")

    def fill(kv: KVChunk) -> None:
        cache[:, :, torch.from_numpy(slots).cuda()] = as_torch(kv.to_array()).cuda()
        torch.cuda.synchronize()

    fill(chunks[0])
    blocks = cache.reshape(2, 2, 16, 8, 2, 32)
    part = gpu.DeviceChunk(blocks, slots, chunks[0].first_position, chunks[0].rope)
    stream = torch.cuda.Stream()
    job = gpu.prepare_encode(ProgressiveCodec(), [part], stream=stream)
    job.launch()
    assert job.finish() == [ProgressiveCodec().encode(chunks[0])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        job.launch(torch.cuda.current_stream())
    fill(chunks[1])
    graph.replay()
    torch.cuda.synchronize()
    assert job.finish() == [ProgressiveCodec().encode(chunks[1])]
