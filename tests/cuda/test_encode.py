"""Encoding on the emulated device: the objects that the CPU makes, byte by byte."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import gpu
from cachegen.codec.base import Codec, planes_of
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import RANS, SIDE, SPARSE, read_header
from cachegen.codec.entropy import normalize_counts
from cachegen.codec.gpu import encode_batch, encode_tables
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode
from cachegen.codec.sparse import SHARE
from cachegen.errors import ConfigError, GeometryError, NonFiniteError
from cachegen.native.cuda.emulation import EmulatedDevice
from cachegen.profile import Profile

sys.path.insert(0, str(Path(__file__).parent))
from samples import (
    BFLOAT16,
    GOLDEN,
    SPARSE_CODEC,
    assert_close,
    draw_kv,
    few_wide_values,
    golden_script,
    profiled,
    ragged,
    with_rope,
)

CODECS = (
    Int8Codec(),
    Int8Codec(entropy=False),
    CacheGenCodec(),
    CacheGenCodec(level=1, tables="parametric"),
    CacheGenCodec(delta="anchor"),
    CacheGenCodec(delta="anchor", level=3, tables="parametric"),
    ProgressiveCodec(),
    ProgressiveCodec(passes=1),
    ProgressiveCodec(passes=6, step=0.01),
)


def on_device(kv: KVChunk) -> gpu.DeviceChunk:
    begins = None if kv.is_uniform else tuple(layer.begin for layer in kv.layers)
    pairs = [(layer.keys, layer.values) for layer in kv.layers]
    return gpu.DeviceChunk(pairs, None, kv.first_position, kv.rope, begins)


def encoded(device: EmulatedDevice, codec: Codec, kv: KVChunk, **options: Any) -> bytes:
    job = gpu.prepare_encode(codec, [on_device(kv)], device=device, **options)
    for _ in range(2):  # launches can be repeated
        job.launch()
    (data,) = job.finish()
    assert job.fallbacks == 0
    return data


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(codec.config()))
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_equal_to_the_cpu(emulated: EmulatedDevice, codec: Codec, dtype: Any) -> None:
    for layers, heads, tokens, dim in ((2, 2, 64, 16), (1, 3, 37, 8), (1, 1, 5, 12)):
        kv = draw_kv(layers, heads, tokens, dim, seed=tokens, dtype=dtype)
        assert encoded(emulated, codec, kv) == codec.encode(kv)


@pytest.mark.parametrize("codec", CODECS[:7], ids=lambda codec: str(codec.config()))
def test_long_enough_for_entropy_coding(emulated: EmulatedDevice, codec: Codec) -> None:
    kv = draw_kv(1, 2, 300, 24, seed=1, dtype=BFLOAT16)
    data = encoded(emulated, codec, kv)
    assert data == codec.encode(kv)
    kinds = {segment.kind for segment in read_header(data).segments}
    assert (1 in kinds) == (codec != Int8Codec(entropy=False))


@pytest.mark.parametrize("codec", CODECS[:7], ids=lambda codec: str(codec.config()))
def test_layers_with_fewer_tokens(emulated: EmulatedDevice, codec: Codec) -> None:
    kv = ragged(draw_kv(2, 2, 64, 16, seed=9, dtype=BFLOAT16))
    assert encoded(emulated, codec, kv) == codec.encode(kv)


@pytest.mark.parametrize(
    ("half", "dim", "interleaved"), [(8, 16, False), (4, 16, False), (8, 16, True), (6, 12, False)]
)
def test_keys_after_rope(emulated: EmulatedDevice, half: int, dim: int, interleaved: bool) -> None:
    kv = draw_kv(2, 2, 40, dim, seed=half + dim, dtype=BFLOAT16)
    kv = with_rope(kv, half, interleaved=interleaved)
    codec = ProgressiveCodec()
    assert encoded(emulated, codec, kv) == codec.encode(kv)


def coarse_kinds(data: bytes) -> set[int]:
    segments = read_header(data).segments
    return {one.kind for one in segments if one.pass_index == 0 and one.kind != SIDE}


@pytest.mark.parametrize(("tokens", "dim"), [(200, 16), (70, 40), (33, 12), (5, 9)])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.004])
def test_sparse_first_passes(emulated: EmulatedDevice, tokens: int, dim: int, share: float) -> None:
    kv = few_wide_values(tokens, dim, share=share)
    for chunk in (kv, with_rope(kv, dim // 4), ragged(kv)):
        data = encoded(emulated, SPARSE_CODEC, chunk)
        assert data == SPARSE_CODEC.encode(chunk)
    assert SPARSE in coarse_kinds(data) or share > 0.001


def test_sparse_and_dense_groups_beside_each_other(emulated: EmulatedDevice) -> None:
    sparse, dense = few_wide_values(70), few_wide_values(70, share=0.03)
    pairs = zip(sparse.layers, dense.layers, strict=True)
    kv = KVChunk.from_layers([LayerKV(one.keys, other.values) for one, other in pairs])
    data = encoded(emulated, SPARSE_CODEC, kv)
    assert data == SPARSE_CODEC.encode(kv)
    assert coarse_kinds(data) == {SPARSE, RANS}


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_share_at_which_a_pass_is_sparse(emulated: EmulatedDevice, beyond: int) -> None:
    wide = 60 * 2 * 16 // SHARE + beyond
    values = np.random.default_rng(3).choice([-1.0, 1.0], (60, 2, 16))
    keys = values.copy()
    keys[np.arange(wide) * 6 + 3, 0, np.arange(wide)] *= 9
    kv = KVChunk.from_layers([LayerKV(keys.astype(BFLOAT16), values.astype(BFLOAT16))])
    codec = ProgressiveCodec(passes=4, step=0.1)
    data = encoded(emulated, codec, kv)
    assert data == codec.encode(kv)
    found = [s.kind for s in read_header(data).segments if s.pass_index == 0 and s.kind != SIDE]
    assert (found[0] == SPARSE) == (beyond <= 0)
    assert found[1] == SPARSE


def test_launches_allot_nothing_and_see_what_the_chunk_holds_then(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph replays them: first passes become dense and sparse again."""
    kinds = few_wide_values(70), few_wide_values(70, share=0.03)
    planes = [(layer.keys.copy(), layer.values.copy()) for layer in kinds[0].layers]
    job = gpu.prepare_encode(SPARSE_CODEC, [gpu.DeviceChunk(planes)], device=emulated)
    found = []
    for kv in (*kinds, kinds[0]):
        for pair, layer in zip(planes, kv.layers, strict=True):
            pair[0][:], pair[1][:] = layer.keys, layer.values
        with monkeypatch.context() as patch:
            for name in ("allocate", "upload", "download"):
                patch.setattr(emulated, name, None)
            job.launch()
        (data,) = job.finish()
        assert data == SPARSE_CODEC.encode(kv)
        found.append(coarse_kinds(data))
    assert found == [{SPARSE}, {RANS}, {SPARSE}] and job.fallbacks == 0


def test_sparse_first_passes_with_a_profile(emulated: EmulatedDevice) -> None:
    _, profile = profiled()
    kv = with_rope(draw_kv(2, 2, 70, 16, seed=20, dtype=BFLOAT16), 8)
    codec = ProgressiveCodec(profile=profile, passes=6, step=0.05)
    data, expected = encoded(emulated, codec, kv), codec.encode(kv)
    assert coarse_kinds(data) == coarse_kinds(expected) == {SPARSE}
    for mine, theirs in zip(
        script_digits(data, codec), script_digits(expected, codec), strict=True
    ):
        assert np.array_equal(mine, theirs)


def script_digits(data: bytes, codec: ProgressiveCodec) -> list[np.ndarray]:
    digits = golden_script().decoded_digits(ObjectReader(data), codec.profile)
    return [ladder.coarse for _, ladder in digits]


@pytest.mark.parametrize(
    "name",
    [
        *("int8", "int8_bytes", "cachegen_chunk", "cachegen_parametric", "cachegen_profile"),
        "cachegen_anchor",
    ],
)
def test_golden_objects(emulated: EmulatedDevice, name: str) -> None:
    """What is frozen comes out again, byte by byte."""
    script = golden_script()
    data = encoded(emulated, script.codecs()[name], script.chunk(), keys=[script.key()])
    assert data == (GOLDEN / f"{name}.cgen").read_bytes()


def test_a_golden_chunk(emulated: EmulatedDevice) -> None:
    """Of progressive it is frozen how objects decode; encoders must agree with each other."""
    script, codec = golden_script(), ProgressiveCodec()
    data = encoded(emulated, codec, script.rotated_chunk(0), keys=[script.key()])
    assert data == codec.encode(script.rotated_chunk(0), key=script.key())


def test_digits_of_a_golden_profile(emulated: EmulatedDevice) -> None:
    """Products of matrices differ in the last bits; hardly a digit does."""
    script = golden_script()
    codec = ProgressiveCodec(profile=Profile.load(GOLDEN / script.PROFILE))
    data = encoded(emulated, codec, script.rotated_chunk(0))
    other = total = 0
    for mine, theirs in zip(
        script.decoded_digits(ObjectReader(data), codec.profile),
        script.decoded_digits(ObjectReader(codec.encode(script.rotated_chunk(0))), codec.profile),
        strict=True,
    ):
        (classes, ladder), (others, twin) = mine, theirs
        assert np.array_equal(classes, others)
        planes = (ladder.coarse, *ladder.digits), (twin.coarse, *twin.digits)
        for a, b in zip(*planes, strict=True):
            other += int((a != b).sum())
            total += a.size
    assert other <= total // 2000


@pytest.mark.parametrize("dim", [16, 24, 80])
def test_profiles(emulated: EmulatedDevice, dim: int) -> None:
    """Coefficients are products of matrices: nearly the same, and coded alike."""
    _, profile = profiled(dim=dim)
    kv = with_rope(draw_kv(2, 2, 70, dim, seed=20, dtype=BFLOAT16), dim // 2)
    codec = ProgressiveCodec(profile=profile, step=0.05)
    data, expected = encoded(emulated, codec, kv), codec.encode(kv)
    headers = read_header(data), read_header(expected)
    assert headers[0].profile == headers[1].profile
    for mine, theirs in zip(*(header.segments for header in headers), strict=True):
        assert mine[:3] == theirs[:3]
        assert mine.distortion == pytest.approx(theirs.distortion, rel=2e-3)
        assert abs(mine.length - theirs.length) <= 4 + theirs.length // 200
    decoded = [decode(one, profile=profile) for one in (data, expected)]
    reader = ObjectReader(data)
    step = np.frombuffer(reader.header.params, "<f4", 1, 4)[0]
    for mine, theirs in zip(decoded[0].layers, decoded[1].layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            apart = np.abs(a.astype(np.float32) - b.astype(np.float32))
            # A coefficient at the edge of a cell may fall into the next one: rare, and a step wide.
            assert np.mean(apart > 0.02 * np.abs(b.astype(np.float32)).max()) < 0.01
            assert apart.max() < 8 * step + 0.02 * np.abs(b.astype(np.float32)).max()


def test_profile_tables(emulated: EmulatedDevice) -> None:
    kv = draw_kv(2, 2, 200, 16, seed=4, dtype=BFLOAT16)
    for delta in ("none", "anchor"):
        profile = CacheGenCodec(delta=delta).fit_profile([kv])
        codec = CacheGenCodec(delta=delta, tables="profile", profile=profile)
        assert encoded(emulated, codec, kv) == codec.encode(kv)


def test_paged_blocks(emulated: EmulatedDevice) -> None:
    """Chunks are read through slots from blocks of any strides, several in a batch."""
    kv = with_rope(draw_kv(2, 2, 72, 16, seed=5, dtype=BFLOAT16), 8)
    slots = np.random.default_rng(1).permutation(80)[:72]
    stored = np.full((2, 2, 10, 2, 8, 16), 7, BFLOAT16)  # (B, H, N, D), passed as (B, N, H, D)
    cache = stored.transpose(0, 1, 2, 4, 3, 5)
    for layer, held in enumerate(kv.layers):
        cache[layer, 0, slots // 8, slots % 8] = held.keys
        cache[layer, 1, slots // 8, slots % 8] = held.values
    for codec in (Int8Codec(), CacheGenCodec(delta="anchor"), ProgressiveCodec(), RawCodec()):
        parts, spans = [], ((0, 40), (40, 72))
        for begin, end in spans:
            position = kv.first_position + begin
            parts.append(gpu.DeviceChunk(cache, slots[begin:end], position, kv.rope))
        expected = [codec.encode(kv.slice_tokens(*span)) for span in spans]
        if isinstance(codec, RawCodec):
            assert [gpu.encode(codec, part, device=emulated) for part in parts] == expected
            continue
        job = gpu.prepare_encode(codec, parts, device=emulated)
        job.launch()
        assert job.finish() == expected
        assert job.fallbacks == 0


def test_what_the_kernels_leave_to_the_cpu(
    emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = draw_kv(1, 2, 64, 16, seed=1, dtype=np.float32)
    for codec in (RawCodec(), LosslessCodec()):
        assert gpu.encode(codec, on_device(kv), device=emulated) == codec.encode(kv)
    # A value that the coarsest pass does not reach is stored exactly, which moves the mean.
    far = kv.layers[0].keys.copy()
    far[:, 1, 3] *= np.where(np.arange(64) == 20, 1e4, 1)
    wide = KVChunk.from_layers([LayerKV(far, kv.layers[0].values)])
    tiny = KVChunk.from_layers(
        [LayerKV(*(plane * np.float32(2.0**-80) for plane in planes_of(kv)))]
    )
    for codec, chunk in (
        (ProgressiveCodec(passes=1, step=0.001), wide),
        (ProgressiveCodec(), tiny),
    ):
        job = gpu.prepare_encode(codec, [on_device(chunk)], device=emulated)
        job.launch()
        assert job.finish() == [codec.encode(chunk)]
        assert job.fallbacks == 1
    # Streams without room.
    monkeypatch.setattr(encode_batch, "SPARE", 0)
    monkeypatch.setattr(encode_batch, "ROOM", {"bytes": (1 / 16, 0.0), "digits": (1 / 64, 0.0)})
    for codec in (Int8Codec(), CacheGenCodec(), ProgressiveCodec()):
        job = gpu.prepare_encode(codec, [on_device(kv)], device=emulated)
        job.launch()
        assert job.finish() == [codec.encode(kv)]
        assert job.fallbacks == 1


def test_refusals(emulated: EmulatedDevice) -> None:
    kv = draw_kv(1, 2, 20, 16, seed=1, dtype=np.float16)
    for value in (np.nan, np.inf, -np.inf):
        keys = kv.layers[0].keys.copy()
        keys[7, 1, 3] = value
        broken = KVChunk.from_layers([LayerKV(keys, kv.layers[0].values)])
        for codec in (Int8Codec(), CacheGenCodec(), CacheGenCodec(delta="anchor"), CODECS[6]):
            with pytest.raises(NonFiniteError) as mine:
                gpu.encode(codec, on_device(broken), device=emulated)
            with pytest.raises(NonFiniteError) as theirs:
                codec.encode(broken)
            assert str(mine.value) == str(theirs.value)
    blocks = np.zeros((1, 2, 3, 8, 2, 16), np.float16)
    for slots in (np.arange(10, 30), np.arange(-1, 19)):
        with pytest.raises(GeometryError, match="slot mapping"):
            gpu.encode(Int8Codec(), gpu.DeviceChunk(blocks, slots), device=emulated)
    with pytest.raises(GeometryError, match="tokens"):
        short = replace(on_device(kv), planes=[(kv.layers[0].keys, kv.layers[0].values[:9])])
        gpu.encode(Int8Codec(), short, device=emulated)
    with pytest.raises(GeometryError, match="memory of the host"):
        gpu.encode(Int8Codec(), on_device(kv))
    with pytest.raises(GeometryError, match="chunks"):
        gpu.prepare_encode(Int8Codec(), [], device=emulated)
    with pytest.raises(ConfigError, match="raw"):
        gpu.prepare_encode(RawCodec(), [on_device(kv)], device=emulated)


def test_frequencies_as_normalized_on_the_cpu() -> None:
    """The device looks gains up; they are what normalize_counts computes, bit by bit."""
    gains = encode_tables.unit_gains()
    n = np.arange(1, 4097)
    assert gains[0] == 0 and np.array_equal(gains[1:], np.log2((n + 1) / n))
    freqs = normalize_counts(np.random.default_rng(0).integers(0, 9, (50, 31)))
    assert (freqs.sum(axis=1) == 4096).all()


def test_objects_decode_where_they_came_from(emulated: EmulatedDevice) -> None:
    """There and back without the host: what the device encoded it decodes."""
    kv = with_rope(draw_kv(2, 2, 70, 16, seed=6, dtype=BFLOAT16), 8)
    data = encoded(emulated, ProgressiveCodec(), kv)
    out = [(np.zeros_like(layer.keys), np.zeros_like(layer.values)) for layer in kv.layers]
    gpu.decode(data, out=out, device=emulated)
    for (keys, values), layer in zip(out, decode(data).layers, strict=True):
        assert_close(keys, layer.keys, exact=False)
        assert_close(values, layer.values, exact=False)
