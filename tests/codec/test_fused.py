"""Fused decoding gives what plain NumPy gives, wherever it is told to put it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import fused_profile, reference
from cachegen.codec.base import Codec, empty_chunk
from cachegen.codec.basis import load_basis
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import BYTES, PACKED, SIDE, SPARSE, read_header
from cachegen.codec.fit import fit_basis
from cachegen.codec.header import plane_groups
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec, _basis_of, unpack_params
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode
from cachegen.codec.target import Target
from cachegen.errors import CacheGenError, ConfigError, CorruptError, DtypeError, GeometryError
from cachegen.types import KVDtype, RopeSpec


def chunk_of(
    shape: tuple[int, int, int, int],
    *,
    seed: int = 0,
    dtype: KVDtype = KVDtype.FLOAT32,
    rope: RopeSpec | None = None,
) -> KVChunk:
    layers, tokens, heads, dim = shape
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 1, (layers, 2, 1, heads, dim)))
    mean = rng.normal(0, 2, (layers, 2, 1, heads, dim))
    kv = rng.laplace(size=(layers, 2, tokens, heads, dim)) * spread + mean
    return KVChunk.from_array(kv.astype(dtype.numpy), rope=rope, first_position=300)


def rope_of(layers: int, dim: int, *, rotated: int, interleaved: bool) -> RopeSpec:
    frequencies = tuple(float(10_000 ** (-i / rotated)) for i in range(rotated))
    kinds = tuple(-1 if layer == 1 else layer % 2 for layer in range(layers))
    return RopeSpec((frequencies, frequencies[::-1]), (1.0, 1.25), kinds, interleaved)


def by_numpy(data: bytes) -> KVChunk:
    reader = ObjectReader(data, allow_partial=True)
    header = reader.header
    step, weight = unpack_params(header)
    chunk = empty_chunk(header)
    target = Target(header, chunk)
    for index, group in enumerate(_basis_of(header, None).groups):
        reference.decode_group(reader, target, index, group, None, step=step, value_weight=weight)
    return chunk


def prefixes(data: bytes) -> list[bytes]:
    header = read_header(data)
    ends = [s.end for s in header.segments[2 * len(header.groups) - 1 :]]
    return [data[:end] for end in {ends[0], ends[len(ends) // 2], len(data)}]


def assert_close(ours: KVChunk, theirs: KVChunk) -> None:
    """To within rounding of sums in float32, then of the dtype."""
    for ours_layer, theirs_layer in zip(ours.layers, theirs.layers, strict=True):
        for is_value in (False, True):
            a = ours_layer.plane(is_value=is_value).astype(np.float64)
            b = theirs_layer.plane(is_value=is_value).astype(np.float64)
            unit = {2: 2.0**-7, 4: 0.0}[ours_layer.keys.itemsize]
            if ours.geometry.dtype is KVDtype.FLOAT16:
                unit = 2.0**-10
            # RoPE mixes channels, so the error is relative to the largest of the plane.
            room = 2e-6 * np.abs(b).max(initial=0) + unit * np.abs(b)
            assert (np.abs(a - b) <= room).all()
            if ours_layer.keys.itemsize == 2:
                assert (a != b).mean() < 1e-3


@pytest.mark.parametrize("passes", [1, 2, 4, 6])
@pytest.mark.parametrize(
    ("shape", "rotated", "interleaved", "dtype"),
    [
        ((3, 256, 2, 64), 32, False, KVDtype.FLOAT32),
        ((2, 77, 3, 40), 12, True, KVDtype.FLOAT16),
        ((2, 256, 8, 128), 64, False, KVDtype.BFLOAT16),
        ((4, 31, 1, 6), 0, False, KVDtype.FLOAT32),
        ((1, 530, 1, 200), 100, False, KVDtype.BFLOAT16),
    ],
)
def test_equals_the_numpy_twin(
    isa: str,
    passes: int,
    shape: tuple[int, int, int, int],
    rotated: int,
    interleaved: bool,
    dtype: KVDtype,
) -> None:
    rope = rope_of(shape[0], shape[3], rotated=rotated, interleaved=interleaved)
    chunk = chunk_of(shape, dtype=dtype, rope=rope if rotated else None)
    for data in prefixes(ProgressiveCodec(passes=passes).encode(chunk)):
        assert_close(decode(data, allow_partial=True), by_numpy(data))


def test_every_instruction_set_gives_the_same_bits() -> None:
    rope = rope_of(2, 64, rotated=32, interleaved=False)
    data = ProgressiveCodec().encode(chunk_of((2, 200, 3, 64), rope=rope))
    before, results = native.isa(), []
    for name in native.available_isas():
        native.select_isa(name)
        results.append(decode(data).to_array())
    native.select_isa(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_segments_that_are_not_entropy_coded(isa: str, tokens: int) -> None:
    """Where states cost more than symbols: plain bytes and packed digits."""
    chunk = chunk_of((2, tokens, 1, 6))
    data = ProgressiveCodec(passes=4, step=0.05, sink_tokens=0).encode(chunk)
    assert {PACKED, BYTES} & {segment.kind for segment in read_header(data).segments}
    assert_close(decode(data), by_numpy(data))


def test_layers_with_fewer_tokens(isa: str) -> None:
    rng = np.random.default_rng(4)
    layers = [
        LayerKV(*rng.normal(0, 1, (2, held, 2, 16)).astype(np.float32), 90 - held)
        for held in (90, 40, 0)
    ]
    chunk = KVChunk.from_layers(layers, tokens=90, rope=rope_of(3, 16, rotated=8, interleaved=True))
    data = ProgressiveCodec().encode(chunk)
    assert_close(decode(data), by_numpy(data))


CODECS = [
    ProgressiveCodec(),
    RawCodec(),
    Int8Codec(),
    CacheGenCodec(),
    CacheGenCodec(level=3, delta="anchor"),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_into_strided_arrays(codec: Codec) -> None:
    data = codec.encode(chunk_of((2, 70, 2, 32), dtype=KVDtype.BFLOAT16))
    wanted = decode(data)
    room = np.zeros((2, 2, 2, 70, 48), KVDtype.BFLOAT16.numpy)  # L, K/V, H, T, D and a margin
    inner = room.transpose(0, 1, 3, 2, 4)[..., 8:40]
    out = KVChunk.from_array(inner)
    assert decode(data, out=out) is out
    np.testing.assert_array_equal(inner, wanted.to_array())
    assert not room[..., :8].any() and not room[..., 40:].any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_into_paged_blocks(codec: Codec) -> None:
    tokens, blocks, size = 70, 9, 16
    data = codec.encode(chunk_of((2, tokens, 2, 32), dtype=KVDtype.BFLOAT16))
    wanted = decode(data).to_array()
    # As vLLM lays a layer out: (2, blocks, block size, H, D).
    caches = [np.zeros((2, blocks, size, 2, 32), KVDtype.BFLOAT16.numpy) for _ in range(2)]
    slots = np.random.default_rng(5).permutation(blocks * size)[:tokens]
    slots[[0, 33]] = -1
    assert decode(data, out=[(c[0], c[1]) for c in caches], slot_mapping=slots) is None
    for layer, cache in enumerate(caches):
        for side in range(2):
            flat = cache[side].reshape(blocks * size, 2, 32)
            kept = slots >= 0
            np.testing.assert_array_equal(flat[slots[kept]], wanted[layer, side][kept])
            untouched = np.setdiff1d(np.arange(blocks * size), slots)
            assert not flat[untouched].any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_into_another_dtype(codec: Codec) -> None:
    chunk = chunk_of((2, 40, 2, 16), dtype=KVDtype.FLOAT32)
    data = codec.encode(chunk)
    exact = decode(data).to_array()
    for dtype in (KVDtype.FLOAT16, KVDtype.BFLOAT16):
        out = KVChunk.from_array(np.empty((2, 2, 40, 2, 16), dtype.numpy))
        decode(data, out=out)
        np.testing.assert_array_equal(out.to_array(), exact.astype(dtype.numpy))


def test_bad_destinations() -> None:
    data = ProgressiveCodec().encode(chunk_of((1, 40, 2, 16)))
    good = np.zeros((40, 2, 16), np.float32)
    paged = np.zeros((3, 16, 2, 16), np.float32)
    cases: list[tuple[type[CacheGenError], list[tuple[object, object]], object]] = [
        (GeometryError, [(good, good[:39])], None),
        (GeometryError, [(good, good), (good, good)], None),
        (DtypeError, [(good, good.astype(np.float16))], None),
        (GeometryError, [(good, np.zeros((40, 2, 32), np.float32)[..., ::2])], None),
        (GeometryError, [(paged, paged)], None),
        (GeometryError, [(paged, paged)], np.arange(39)),
        (GeometryError, [(paged, paged)], np.arange(10, 50)),
        (GeometryError, [(paged, paged)], np.arange(-2, 38)),
        (GeometryError, [(good, good)], np.arange(40)),
        (ConfigError, [(paged, paged)], np.zeros(40, np.int64)),
    ]
    for kind, out, slots in cases:
        with pytest.raises(kind):
            decode(data, out=out, slot_mapping=slots)


MEMORY = """
import numpy as np
from cachegen.chunk import KVChunk
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)

rng = np.random.default_rng(0)
kv = rng.normal(0, 1, (24, 2, 256, 4, 64)).astype(np.float16)
data = ProgressiveCodec(passes=2).encode(KVChunk.from_array(kv))
out = KVChunk.from_array(np.ones_like(kv))
small = KVChunk.from_array(kv[:1, :, :40].copy())
decode(ProgressiveCodec(passes=2).encode(small))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
decode(data, out=out)
print((peak() - before) * 1024, kv.nbytes)
"""


# Peak memory is read from the kernel: no other system tells it for one call.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_bounded() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    extra, output = map(int, run.stdout.split())
    assert output >= 6 << 20
    assert extra <= 4 << 20


def few_wide_values(layers: int, dim: int) -> KVChunk:
    """Values of one spread, but for a few: the first pass of a fine ladder is nearly all zero."""
    rng = np.random.default_rng(5)
    kv = rng.normal(size=(layers, 2, 200, 2, dim))
    kv[rng.random(kv.shape) < 0.0005] *= 20
    rope = rope_of(layers, dim, rotated=dim // 2, interleaved=False)
    return KVChunk.from_array(kv.astype(KVDtype.BFLOAT16.numpy), rope=rope)


def assert_right(part: bytes, isa: str) -> None:
    """Near the NumPy twin, and equal to the scalar kernels."""
    read = decode(part, allow_partial=True)
    assert_close(read, by_numpy(part))
    native.select_isa("scalar")
    plain = decode(part, allow_partial=True)
    native.select_isa(isa)
    np.testing.assert_array_equal(read.to_array(), plain.to_array())


@pytest.mark.parametrize("dim", [64, 80])
def test_a_sparse_first_pass_equals_the_numpy_twin(isa: str, dim: int) -> None:
    chunk = few_wide_values(3, dim)
    data = ProgressiveCodec(passes=4, step=0.3).encode(chunk)
    coded = [s for s in read_header(data).segments if s.pass_index == 0 and s.kind != SIDE]
    assert {s.kind for s in coded} == {SPARSE}
    assert min(s.length for s in coded) > 5
    for part in prefixes(data):
        assert_right(part, isa)


@pytest.mark.parametrize(
    ("dim", "rotated", "interleaved", "dtype"),
    [
        (128, 64, False, KVDtype.BFLOAT16),
        (64, 32, False, KVDtype.FLOAT16),
        (64, 32, True, KVDtype.BFLOAT16),
        (80, 24, False, KVDtype.BFLOAT16),
        (48, 0, False, KVDtype.FLOAT16),
        (64, 32, False, KVDtype.FLOAT32),
    ],
)
def test_rows_of_means_equal_the_numpy_twin(
    isa: str, dim: int, rotated: int, interleaved: bool, dtype: KVDtype
) -> None:
    rng = np.random.default_rng(7)
    kv = rng.normal(size=(2, 2, 400, 4, dim)) + rng.normal(0, 2, (2, 2, 1, 4, dim))
    kv[rng.random(kv.shape) < 0.0004] *= 30
    kv[:, :, 5, 1, [3, 3 + dim // 2]] = 40  # two of a pair, and of a token
    kinds = (0, 0) if rotated else (-1, -1)
    frequencies = tuple(float(10_000 ** (-i / max(rotated, 1))) for i in range(rotated))
    rope = RopeSpec((frequencies,), (1.0,), kinds, interleaved)
    chunk = KVChunk.from_array(kv.astype(dtype.numpy), rope=rope)
    codec = ProgressiveCodec(passes=4, step=0.3, sink_tokens=2)
    data = codec.encode(chunk)
    header = read_header(data)
    coded = [s for s in header.segments if s.pass_index == 0 and s.kind != SIDE]
    assert {s.kind for s in coded} == {SPARSE}
    assert_right(data[: max(s.end for s in coded)], isa)


def test_a_damaged_sparse_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = ProgressiveCodec(passes=4, step=0.3).encode(few_wide_values(1, 64))
    header = read_header(good)
    reader, target = ObjectReader(good), Target(header, empty_chunk(header))
    _, body = reader.segment(0, 0)
    original = reader.coded
    refused = 0
    for wrong in (body[:3], body[:-1], bytes(body) + b"\1", b"\xff" * 4 + bytes(body[4:])):

        def replaced(group: int, wrong: bytes = wrong) -> list[tuple[int, int, memoryview]]:
            (kind, bits, first), *others = original(group)
            return [(kind, bits, first if group else memoryview(wrong)), *others]

        monkeypatch.setattr(reader, "coded", replaced)
        with pytest.raises(CorruptError, match="sparse segment"):
            ProgressiveCodec.decode_into(reader, target, profile=None)
        refused += 1
    assert refused == 4


@pytest.mark.parametrize("layers", [1, 12])
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    rope = rope_of(layers, 64, rotated=32, interleaved=False)
    data = ProgressiveCodec(passes=3).encode(chunk_of((layers, 256, 4, 64), rope=rope))
    results = []
    for count in ("1", "2", "5"):
        monkeypatch.setattr(native.fused, "threads", lambda count=count: int(count))
        results.append(decode(data).to_array())
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunk_of((12, 256, 4, 64))
    good = ProgressiveCodec(passes=2).encode(chunk)
    header = read_header(good)
    target = Target(header, empty_chunk(header))
    reader = ObjectReader(good)
    _, body = reader.segment(4, 1)
    damaged = bytearray(body)
    damaged[-5] ^= 1

    def replaced(group: int) -> list[tuple[int, int, memoryview]]:
        first, (kind, bits, second) = original(group)
        return [first, (kind, bits, memoryview(damaged) if group == 4 else second)]

    original = reader.coded
    monkeypatch.setattr(reader, "coded", replaced)
    for count in (1, 3):
        monkeypatch.setattr(native.fused, "threads", lambda count=count: count)
        with pytest.raises(CorruptError, match="rANS stream"):
            ProgressiveCodec.decode_into(reader, target, profile=None)


def test_a_profile_equals_the_numpy_twin(isa: str) -> None:
    rope = rope_of(4, 16, rotated=8, interleaved=False)
    fitting = [chunk_of((4, 256, 2, 16), seed=seed, rope=rope) for seed in range(3)]
    for groups in (None, plane_groups(4)):
        profile = fit_basis(fitting, groups=groups)
        chunk = chunk_of((4, 200, 2, 16), seed=9, rope=rope)
        data = ProgressiveCodec(profile=profile).encode(chunk)
        basis = load_basis(profile, chunk.geometry)
        reader = ObjectReader(data)
        step, _ = unpack_params(reader.header)
        wanted = empty_chunk(reader.header)
        target = Target(reader.header, wanted)
        for index, pair in enumerate(zip(basis.groups, basis.bases, strict=True)):
            reference.decode_group(
                reader, target, index, *pair, step=step, value_weight=basis.value_weight
            )
        ours, theirs = decode(data, profile=profile).to_array(), wanted.to_array()
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_basis_of_single_heads_is_used_head_by_head() -> None:
    rng = np.random.default_rng(6)
    profile = fit_basis([chunk_of((1, 256, 4, 16), seed=seed) for seed in range(3)])
    chunk = chunk_of((1, 200, 4, 16), seed=9)
    (basis,) = load_basis(profile, chunk.geometry).bases
    assert basis is not None
    blocks = np.zeros_like(basis.basis)
    for head in range(8):
        turn, _ = np.linalg.qr(rng.normal(size=(16, 16)))
        blocks[head * 16 : head * 16 + 16, head::8] = turn  # components of heads interleaved
    heads = fused_profile._heads_of(dataclasses.replace(basis, basis=blocks), 16)
    assert heads is not None and fused_profile._heads_of(basis, 16) is None
    values = rng.normal(size=(128, 224)).astype(np.float32)
    used = (rng.random(128) < 0.6).astype(np.uint8)
    values[used == 0] = 0
    ours = np.empty((224, 64), np.float32)
    fused_profile._per_head(values, used, heads, 2, ours)
    np.testing.assert_allclose(ours, (values.T @ blocks.T)[:, 32:96], atol=1e-4)
