"""The kernels, lane by lane on the host: the golden objects, and objects of every kind."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cachegen.chunk import KVChunk
from cachegen.codec import gpu
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import SPARSE, read_header
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.registry import decode
from cachegen.errors import DtypeError, GeometryError
from cachegen.native.cuda.emulation import EmulatedDevice

sys.path.insert(0, str(Path(__file__).parent))
from samples import (
    BFLOAT16,
    GOLDEN,
    GOLDEN_NAMES,
    SPARSE_CODEC,
    Sample,
    assert_close,
    draw_kv,
    empty_like,
    few_wide_values,
    golden_sample,
    golden_script,
    partial,
    profiled,
    restreamed,
    samples,
    sparse_samples,
    with_rope,
)

ALL = list(samples())
SPARSE_SAMPLES = list(sparse_samples())


def check(device: EmulatedDevice, sample: Sample, *, fallbacks: int = 0) -> None:
    expected = sample.expected()
    out = empty_like(expected)
    prepared = gpu.prepare(
        [sample.data],
        out=out,
        profile=sample.profile,
        allow_partial=sample.partial,
        device=device,
    )
    assert prepared.fallbacks == fallbacks
    for _ in range(2):  # a batch can be launched again
        prepared.launch()
    prepared.check()
    exact = not sample.name.startswith("progressive")
    for (keys, values), layer in zip(out, expected.layers, strict=True):
        assert_close(keys, layer.keys, exact=exact)
        assert_close(values, layer.values, exact=exact)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_objects(emulated: EmulatedDevice, name: str) -> None:
    sample = golden_sample(name)
    check(emulated, sample, fallbacks=int(name == "lossless"))
    if name.startswith("progressive"):
        return
    out = empty_like(sample.expected())
    key = golden_script().key()
    gpu.decode(sample.data, out=out, key=key, profile=sample.profile, device=emulated)
    stored = b"".join(plane.tobytes() for pair in out for plane in pair)
    assert stored == (GOLDEN / f"{name}.decoded").read_bytes()


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.name)
def test_equal_to_the_cpu(emulated: EmulatedDevice, sample: Sample) -> None:
    check(emulated, sample)


@pytest.mark.parametrize("sample", SPARSE_SAMPLES, ids=lambda sample: sample.name)
def test_sparse_first_passes(emulated: EmulatedDevice, sample: Sample) -> None:
    check(emulated, sample)


def test_sparse_first_passes_of_every_size(emulated: EmulatedDevice) -> None:
    counts = {
        int.from_bytes(sample.data[segment.offset : segment.offset + 4], "little")
        for sample in SPARSE_SAMPLES
        for segment in read_header(sample.data).segments
        if segment.kind == SPARSE and segment.pass_index == 0
    }
    assert 0 in counts and max(counts) > 5


def test_launches_allot_nothing(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SPARSE_SAMPLES[0]
    out = empty_like(sample.expected())
    prepared = gpu.prepare([sample.data], out=out, device=emulated)
    with monkeypatch.context() as patch:
        for name in ("allocate", "upload", "download"):
            patch.setattr(emulated, name, None)
        prepared.launch()
    prepared.check()
    assert_close(out[0][0], sample.expected().layers[0].keys, exact=False)


def test_streams_of_sparse_groups_that_begin_within_a_head(emulated: EmulatedDevice) -> None:
    """Restart points are those of later passes, pass 0 has none of its own."""
    kv = with_rope(few_wide_values(70), 8)
    data = restreamed(kv, SPARSE_CODEC, (20,))
    assert SPARSE in {segment.kind for segment in read_header(data).segments}
    check(emulated, Sample("progressive odd streams, sparse", data))


@pytest.mark.parametrize(("dim", "turned"), [(16, True), (24, False)])
def test_profiles(emulated: EmulatedDevice, dim: int, turned: bool) -> None:
    sample, _ = profiled(dim=dim, turned=turned)
    check(emulated, sample)
    check(emulated, partial(sample))


@pytest.mark.parametrize("codec", [RawCodec(), Int8Codec(), CacheGenCodec(), ProgressiveCodec()])
def test_paged_blocks(emulated: EmulatedDevice, codec: object) -> None:
    """Tokens go to their slots, -1 to none; what no token owns stays as it was."""
    kv = with_rope(draw_kv(2, 2, 40, 16, seed=5, dtype=BFLOAT16), 8)
    data = codec.encode(kv)
    expected = decode(data)
    slots = np.random.default_rng(1).permutation(64)[:40]
    slots[[3, 11]] = -1
    # (B, H, N, D) in memory, passed transposed as (B, N, H, D).
    stored = np.full((2, 2, 8, 2, 8, 16), 7, BFLOAT16)
    out = stored.transpose(0, 1, 2, 4, 3, 5)
    gpu.decode(data, out=out, slot_mapping=slots, device=emulated)
    flat = out.reshape(2, 2, 64, 2, 16)
    kept = slots >= 0
    exact = codec.name != "progressive"
    for layer, held in enumerate(expected.layers):
        assert_close(flat[layer, 0, slots[kept]], held.keys[kept], exact=exact)
        assert_close(flat[layer, 1, slots[kept]], held.values[kept], exact=exact)
    free = np.setdiff1d(np.arange(64), slots[kept])
    assert (flat[:, :, free] == 7).all()


def test_a_batch_of_several_objects(emulated: EmulatedDevice) -> None:
    chunks = [draw_kv(1, 2, tokens, 16, seed=tokens, dtype=np.float16) for tokens in (33, 64, 7)]
    codecs = [Int8Codec(), ProgressiveCodec(), CacheGenCodec(delta="anchor")]
    objects = [codec.encode(kv) for codec, kv in zip(codecs, chunks, strict=True)]
    slots = np.random.default_rng(2).permutation(112)[:104].astype(np.int32)
    out = np.full((1, 2, 7, 16, 2, 16), 7, np.float16)
    prepared = gpu.prepare(objects, out=out, slot_mapping=slots, device=emulated)
    prepared.launch()
    prepared.check()
    flat, begin = out.reshape(1, 2, 112, 2, 16), 0
    for data, kv in zip(objects, chunks, strict=True):
        expected: KVChunk = decode(data)
        rows = slots[begin : begin + kv.tokens]
        assert_close(flat[0, 0, rows], expected.layers[0].keys, exact=False)
        assert_close(flat[0, 1, rows], expected.layers[0].values, exact=False)
        begin += kv.tokens


def test_what_the_kernels_leave_to_the_cpu(emulated: EmulatedDevice) -> None:
    """Passes with unequal restart points: no encoder writes them, the format allows them."""
    kv = draw_kv(1, 2, 64, 16, seed=1, dtype=np.float16)
    data = restreamed(kv, ProgressiveCodec(passes=2, step=0.5), (16, 32))
    check(emulated, Sample("progressive uneven", data), fallbacks=1)


def test_streams_that_begin_within_a_head(emulated: EmulatedDevice) -> None:
    kv = with_rope(draw_kv(1, 2, 70, 16, seed=1, dtype=BFLOAT16), 8)
    data = restreamed(kv, ProgressiveCodec(), (20,))
    check(emulated, Sample("progressive odd streams", data))


def test_refusals(emulated: EmulatedDevice) -> None:
    kv = draw_kv(1, 2, 8, 16, seed=1, dtype=np.float16)
    data = Int8Codec().encode(kv)

    def attempt(out: object, **options: object) -> None:
        gpu.decode(data, out=out, device=emulated, **options)

    good = empty_like(kv)
    with pytest.raises(GeometryError, match="layers"):
        attempt(good * 2)
    with pytest.raises(GeometryError, match="tokens of layer 0"):
        attempt([(np.zeros((9, 2, 16), np.float16),) * 2])
    with pytest.raises(DtypeError):
        attempt([(np.zeros((8, 2, 16), np.float32),) * 2])
    with pytest.raises(GeometryError, match="K cache"):
        attempt([(np.zeros((8, 3, 16), np.float16),) * 2])
    with pytest.raises(GeometryError, match="slot mapping"):
        attempt(np.zeros((1, 2, 2, 8, 2, 16), np.float16), slot_mapping=np.arange(7))
    with pytest.raises(GeometryError, match="slot mapping"):
        attempt(np.zeros((1, 2, 2, 8, 2, 16), np.float16), slot_mapping=np.arange(10, 18))
    with pytest.raises(GeometryError, match="memory of the host"):
        gpu.decode(data, out=good)
    assert not gpu.is_on_gpu(good)
