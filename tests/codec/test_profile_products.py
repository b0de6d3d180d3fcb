"""Decoding with a profile: products in tiles, in floats and by NumPy give what the twin gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from cachegen import native
from cachegen.bench.speed_data import SpeedGeometry
from cachegen.bench.speed_profile import profile_case
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import fused_profile, reference
from cachegen.codec.base import empty_chunk
from cachegen.codec.basis import load_basis
from cachegen.codec.container import read_header
from cachegen.codec.fit import fit_basis
from cachegen.codec.header import Group, plane_groups
from cachegen.codec.metric import Metric
from cachegen.codec.progressive import ProgressiveCodec, unpack_params
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode
from cachegen.codec.target import Target
from cachegen.errors import ChecksumError, CorruptError, TruncatedError
from cachegen.profile import Profile
from cachegen.types import KVDtype, RopeSpec

FASTEST = native.available_isas()[-1]


@pytest.fixture(params=["tiles", "floats", "numpy"])
def product(request: pytest.FixtureRequest) -> Iterator[str]:
    """Multiply in one of the ways that this machine has."""
    before, tiles = native.isa(), native.allow_tiles(request.param == "tiles")
    if request.param == "numpy":
        native.select_isa("scalar")
    else:
        native.select_isa(FASTEST)
        if not native.can_transform(KVDtype.BFLOAT16):
            pytest.skip("no AVX-512")
    if request.param == "tiles" and not native.uses_tiles(KVDtype.BFLOAT16):
        pytest.skip("no matrix unit")
    yield request.param
    native.allow_tiles(tiles)
    native.select_isa(before)


def chunk_of(
    shape: tuple[int, int, int, int],
    *,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: KVDtype = KVDtype.BFLOAT16,
    interleaved: bool = False,
) -> KVChunk:
    """K and V whose channels have something in common; shape: (L, T, H, D)."""
    layers, tokens, heads, dim = shape
    common = np.random.default_rng(7)
    rng = np.random.default_rng(seed)
    sources = rng.laplace(size=(tokens, 24))

    def plane(width: int) -> np.ndarray:
        mixed = sources @ common.normal(0, 1, (24, heads * width)) / 4
        noise = rng.normal(0, 0.2, mixed.shape) + common.normal(0, 1, heads * width)
        return (mixed + noise).reshape(tokens, heads, width).astype(dtype.numpy)

    held = [LayerKV(plane(dim), plane(value_dim or dim)) for _ in range(layers)]
    half = dim // 2 - dim // 8  # some channels stay as they are
    frequencies = tuple(float(10_000 ** (-i / half)) for i in range(half))
    rope = RopeSpec((frequencies,), (1.25,), (0,) * layers, interleaved)
    return KVChunk.from_layers(held, first_position=40, rope=rope)


def by_numpy(data: bytes, profile: Profile) -> KVChunk:
    reader = ObjectReader(data, allow_partial=True)
    basis = load_basis(profile, reader.header.geometry)
    step, _ = unpack_params(reader.header)
    wanted = empty_chunk(reader.header)
    target = Target(reader.header, wanted)
    for index, pair in enumerate(zip(basis.groups, basis.bases, strict=True)):
        reference.decode_group(
            reader, target, index, *pair, step=step, value_weight=basis.value_weight
        )
    return wanted


def assert_close(ours: KVChunk, theirs: KVChunk) -> None:
    """What docs/fused-decode.md states: nearly all values equal, the others rounded to a neighbour.

    Near a border, or where a value is small beside those of its plane, sums decide.
    """
    dtype = ours.geometry.dtype
    unit = {KVDtype.BFLOAT16: 2.0**-7, KVDtype.FLOAT16: 2.0**-10, KVDtype.FLOAT32: 0.0}[dtype]
    unequal = {KVDtype.BFLOAT16: 0.005, KVDtype.FLOAT16: 0.03, KVDtype.FLOAT32: 1.0}[dtype]
    for ours_layer, theirs_layer in zip(ours.layers, theirs.layers, strict=True):
        for is_value in (False, True):
            a = ours_layer.plane(is_value=is_value).astype(np.float64)
            b = theirs_layer.plane(is_value=is_value).astype(np.float64)
            assert np.isfinite(a).all()
            room = unit * np.abs(b) + 2.0**-14 * np.sqrt(np.square(b).mean())
            assert (np.abs(a - b) <= room).all()
            assert (a != b).mean() <= unequal


def metric_of(chunk: KVChunk) -> Metric:
    """Weights that no 8-bit basis holds."""
    rng = np.random.default_rng(3)
    geometry = chunk.geometry

    def blocks(dim: int) -> np.ndarray:
        turned = rng.normal(0, 1, (geometry.layers, geometry.kv_heads, dim, dim)) / dim
        return (turned @ turned.swapaxes(-1, -2) + np.eye(dim)).astype(np.float32)

    return Metric(blocks(geometry.key_dim), blocks(geometry.value_dim))


JOINT = [Group(0, 2, 3)]


@pytest.mark.parametrize(
    ("shape", "value_dim", "groups", "weighed"),
    [
        ((1, 256, 2, 128), None, None, False),
        ((2, 77, 2, 64), None, JOINT, True),
        ((2, 31, 1, 80), 48, JOINT, False),
        ((2, 1, 1, 80), None, plane_groups(2), True),
        ((2, 330, 3, 40), 24, None, True),
        ((1, 64, 1, 200), 6, plane_groups(1), False),
    ],
)
@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT16, KVDtype.FLOAT32])
def test_equals_the_numpy_twin(
    product: str,
    shape: tuple[int, int, int, int],
    value_dim: int | None,
    groups: list[Group] | None,
    weighed: bool,
    dtype: KVDtype,
) -> None:
    layers, _, heads, dim = shape
    fitting = [
        chunk_of((layers, 256, heads, dim), value_dim=value_dim, seed=seed) for seed in (1, 2)
    ]
    profile = fit_basis(fitting, groups=groups, metric=metric_of(fitting[0]) if weighed else None)
    chunk = chunk_of(shape, value_dim=value_dim, seed=9, dtype=dtype, interleaved=weighed)
    # A sink token and outliers are exempt.
    chunk = KVChunk.from_layers(chunk.layers, rope=chunk.rope)
    data = ProgressiveCodec(profile=profile, step=0.2, sink_tokens=2).encode(chunk)
    header = read_header(data)
    first = max(segment.end for segment in header.segments if segment.pass_index == 0)
    for prefix in (data, data[:first]):
        ours = decode(prefix, allow_partial=True, profile=profile)
        assert_close(ours, by_numpy(prefix, profile))
        assert_close_exempt(ours, chunk)


def assert_close_exempt(ours: KVChunk, chunk: KVChunk) -> None:
    for ours_layer, layer in zip(ours.layers, chunk.layers, strict=True):
        for is_value in (False, True):
            kept = ours_layer.plane(is_value=is_value)[:2]
            np.testing.assert_array_equal(kept, layer.plane(is_value=is_value)[:2])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [256, 45])
def test_a_basis_of_single_heads(product: str, dim: int, tokens: int) -> None:
    case = profile_case(SpeedGeometry("small", 2, 3, dim, 10_000.0), "head")
    basis = load_basis(case.profile, case.chunk.geometry).bases[0]
    packed = native.PackedBasis(basis.basis, basis.mean, dims=[dim] * 3)
    assert not packed.is_joint
    layers = [LayerKV(layer.keys[:tokens], layer.values[:tokens]) for layer in case.chunk.layers]
    chunk = KVChunk.from_layers(layers, rope=case.chunk.rope)
    data = ProgressiveCodec(profile=case.profile).encode(chunk)
    assert_close(decode(data, profile=case.profile), by_numpy(data, case.profile))


def test_one_component_and_none(product: str) -> None:
    """A profile of one vector, and a step so wide that every component is zero."""
    rng = np.random.default_rng(1)
    tokens, dim = 96, 64
    direction = rng.normal(0, 1, (2, dim))
    kv = rng.normal(0, 1, (1, 2, tokens, 1, 1)) * direction[:, None, None, :]
    chunk = KVChunk.from_array(kv.astype(KVDtype.BFLOAT16.numpy))
    profile = fit_basis([chunk], groups=plane_groups(1))
    assert decode_used(chunk, profile, 0.05) > 0
    assert decode_used(chunk, profile, 100.0) == 0


def decode_used(chunk: KVChunk, profile: Profile, step: float) -> int:
    """Check a decode; returns how many values differ from the mean."""
    codec = ProgressiveCodec(profile=profile, step=step, sink_tokens=0, passes=2)
    data = codec.encode(chunk)
    ours = decode(data, profile=profile)
    assert_close(ours, by_numpy(data, profile))
    keys = ours.layers[0].keys
    return int((keys != keys[:1]).sum())


def test_into_paged_blocks_of_another_type(product: str) -> None:
    tokens, blocks, size = 70, 9, 16
    chunk = chunk_of((2, tokens, 2, 32))
    profile = fit_basis([chunk_of((2, 256, 2, 32), seed=4)])
    data = ProgressiveCodec(profile=profile).encode(chunk)
    wanted = decode(data, profile=profile).to_array()
    for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT16):
        caches = [np.zeros((2, blocks, size, 2, 32), dtype.numpy) for _ in range(2)]
        slots = np.random.default_rng(5).permutation(blocks * size)[:tokens]
        slots[[0, 33]] = -1
        out = [(cache[0], cache[1]) for cache in caches]
        decode(data, out=out, slot_mapping=slots, profile=profile)
        kept = slots >= 0
        for layer, cache in enumerate(caches):
            for side in range(2):
                flat = cache[side].reshape(blocks * size, 2, 32)
                assert not flat[np.setdiff1d(np.arange(blocks * size), slots)].any()
                if dtype is KVDtype.BFLOAT16:
                    np.testing.assert_array_equal(flat[slots[kept]], wanted[layer, side][kept])
                else:
                    np.testing.assert_allclose(
                        flat[slots[kept]].astype(np.float32),
                        wanted[layer, side][kept].astype(np.float32),
                        rtol=2.0**-6,
                        atol=1e-3,
                    )


@pytest.mark.parametrize("transform", ["head", "joint"])
def test_threads_change_nothing(
    product: str, transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = profile_case(SpeedGeometry("small", 6, 2, 64, 10_000.0), transform)
    data = ProgressiveCodec(profile=case.profile).encode(case.chunk)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("cachegen.native.transform.threads", lambda count=threads: count)
        results.append(decode(data, profile=case.profile).to_array().view(np.uint16))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_damage_is_refused(product: str) -> None:
    chunk = chunk_of((1, 64, 2, 32))
    profile = fit_basis([chunk_of((1, 256, 2, 32), seed=4)])
    data = ProgressiveCodec(profile=profile, sink_tokens=0).encode(chunk)
    header = read_header(data)
    damaged = bytearray(data)
    damaged[header.segments[-1].offset] ^= 1
    with pytest.raises(ChecksumError):
        decode(bytes(damaged), profile=profile)
    reader = ObjectReader(data)
    whole = reader.coded

    def cut(group: int) -> list[tuple[int, int, memoryview]]:
        return [(kind, bits, body[:-2]) for kind, bits, body in whole(group)]

    reader.coded = cut  # type: ignore[method-assign]
    with pytest.raises((CorruptError, TruncatedError)):
        ProgressiveCodec.decode_into(reader, Target(header, empty_chunk(header)), profile=profile)


def test_classes_of_all_groups_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    profile = fit_basis([chunk_of((2, 256, 2, 32), seed=seed) for seed in range(2)])
    bases = load_basis(profile, chunk_of((2, 1, 2, 32)).geometry).bases
    classes = fused_profile._Classes(bases)
    for step in rng.uniform(1e-3, 10, 20):
        offsets = rng.integers(-70, 70, len(bases)).tolist()
        for part, basis, offset in zip(classes.of(step, offsets), bases, offsets, strict=True):
            np.testing.assert_array_equal(part, reference.profile_classes(basis, step, offset))


MEMORY = """
import ctypes
from cachegen.bench.speed_data import SpeedGeometry
from cachegen.bench.speed_profile import profile_case
from cachegen.chunk import KVChunk
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)

case = profile_case(SpeedGeometry("small", 2, 4, 128, 10_000.0), "joint")
codec = ProgressiveCodec(profile=case.profile)
data = codec.encode(case.chunk)
out = KVChunk.from_array(case.chunk.to_array().copy(), rope=case.chunk.rope)
# Packs the basis and loads all code.
decode(data, out=out, profile=case.profile)
ctypes.CDLL(None).malloc_trim(0)  # what preparations left would hide it
open("/proc/self/clear_refs", "w").write("5")
before = peak()
decode(data, out=out, profile=case.profile)
print((peak() - before) * 1024)
"""


# Peak memory is read from the kernel: no other system tells it for one call.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_bounded() -> None:
    """Of one thread, beyond the packed basis, which a process has once."""
    if not native.can_transform(KVDtype.BFLOAT16):
        pytest.skip("no AVX-512")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CACHEGEN_THREADS": "1"},
    )
    # 4 MiB; the kernel may round up to a huge page.
    assert int(run.stdout) <= (4 << 20) + (2 << 20)
