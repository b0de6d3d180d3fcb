"""``progressive``: one object, every quality; with and without a profile; with RoPE undone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import levels
from cachegen.codec.basis import planes_of_group
from cachegen.codec.container import SIDE, read_header
from cachegen.codec.fit import choose_groups, fit_basis
from cachegen.codec.header import Group
from cachegen.codec.progressive import ProgressiveCodec, weight_of
from cachegen.codec.registry import decode
from cachegen.codec.rotary import rotate
from cachegen.codec.summary import summarize
from cachegen.errors import ConfigError, GeometryError, ProfileError, TruncatedError
from cachegen.profile import Profile
from cachegen.types import Geometry, KVDtype, RopeSpec


def rope(layers: int, dim: int, **changes: object) -> RopeSpec:
    frequencies = tuple(10_000.0 ** (-2 * i / dim) for i in range(dim // 2))
    return RopeSpec((frequencies,), (1.0,), (0,) * layers, **changes)


def correlated_kv(
    seed: int, *, tokens: int = 256, layers: int = 3, rotated: bool = True
) -> KVChunk:
    """Draw low-rank KV with means, the same mixing for every seed; keys rotated like a model's."""
    fixed, rng = np.random.default_rng(1), np.random.default_rng([2, seed])
    heads, dim = 2, 16
    width = layers * 2 * heads * dim
    mixing = fixed.normal(0, 1, (24, width)) * np.exp(fixed.normal(0, 0.5, width))
    mean = fixed.normal(0, 3, width)
    rows = rng.normal(0, 1, (tokens, 24)) @ mixing / 5 + 0.1 * rng.normal(0, 1, (tokens, width))
    planes = (rows + mean).reshape(tokens, layers, 2, heads, dim).astype(np.float32)
    spec = rope(layers, dim) if rotated else None
    built = []
    for layer in range(layers):
        keys = planes[:, layer, 0]
        if spec is not None:
            keys = rotate(keys, spec, layer, 512, back=False)
        built.append(LayerKV(keys.astype(np.float16), planes[:, layer, 1].astype(np.float16)))
    return KVChunk.from_layers(built, first_position=512, rope=spec)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return fit_basis([correlated_kv(seed) for seed in range(1, 9)], model_name="synthetic")


def error(chunk: KVChunk, other: KVChunk) -> float:
    a, b = chunk.to_array().astype(np.float64), other.to_array().astype(np.float64)
    spread = np.square(a - a.mean(axis=2, keepdims=True)).mean()
    return float(np.square(a - b).mean() / max(spread, 1e-30))


@pytest.mark.parametrize("rotated", [True, False])
def test_every_prefix_is_better_than_a_shorter_one(rotated: bool) -> None:
    chunk = correlated_kv(0, rotated=rotated)
    data = ProgressiveCodec().encode(chunk)
    header = read_header(data)
    assert (header.rope is not None) == rotated
    cuts = [s.offset + s.length for s in header.segments if s.pass_index > 0]
    first = min(s.offset for s in header.segments if s.pass_index > 0)
    errors = [error(chunk, decode(data[:first], allow_partial=True))]
    errors += [error(chunk, decode(data[:cut], allow_partial=True)) for cut in cuts]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.02 < errors[0] < 1
    with pytest.raises(TruncatedError):
        decode(data[: first - 1 - 4], allow_partial=True)


def test_distortions_in_the_table_are_the_true_ones() -> None:
    """In float32, where nothing else rounds; K and V in one unit, V weighted."""
    chunk = correlated_kv(0).astype(KVDtype.FLOAT32)
    data = ProgressiveCodec().encode(chunk)
    header = read_header(data)
    decoded = decode(data)
    last = {s.group: s.distortion for s in header.segments if s.kind != SIDE}
    for index, group in enumerate(header.groups):
        total = 0.0
        for layer, side in planes_of_group(group):
            a = chunk.layers[layer].plane(is_value=side).astype(np.float64)
            b = decoded.layers[layer].plane(is_value=side).astype(np.float64)
            total += np.square(a - b).sum() * (weight_of(header) ** 2 if side else 1.0)
        assert total == pytest.approx(last[index], rel=0.02)


def test_slopes_fall_and_every_prefix_has_the_least_distortion() -> None:
    data = ProgressiveCodec().encode(correlated_kv(0))
    points = levels.relative_distortions(read_header(data))
    slopes = [
        (before - after) / (end - begin)
        for (begin, before), (end, after) in itertools.pairwise(points)
    ]
    # Convex but for the few bytes of padding and the hulls of single groups.
    assert all(later <= 1.35 * earlier for earlier, later in itertools.pairwise(slopes))


def test_a_profile_makes_objects_smaller(profile: Profile) -> None:
    chunk = correlated_kv(0)
    plain = ProgressiveCodec(step=0.2)
    joint = ProgressiveCodec(step=0.2, profile=profile)
    small, large = joint.encode(chunk), plain.encode(chunk)
    assert len(small) < 0.75 * len(large)
    assert error(chunk, decode(small, profile=profile)) < 1.5 * error(chunk, decode(large))
    assert read_header(small).profile == profile.digest
    with pytest.raises(ProfileError, match=profile.digest.hex()):
        decode(small)
    with pytest.raises(ProfileError):
        decode(small, profile=fit_basis([correlated_kv(9)]))


def test_profiles_that_do_not_fit(profile: Profile) -> None:
    codec = ProgressiveCodec(profile=profile)
    with pytest.raises(ProfileError, match="geometry"):
        codec.encode(correlated_kv(0, layers=2))
    with pytest.raises(ProfileError, match="RoPE"):
        codec.encode(correlated_kv(0, rotated=False))
    with pytest.raises(ProfileError, match="kind"):
        ProgressiveCodec(profile=Profile("x", {})).encode(correlated_kv(0))
    arrays = dict(profile.arrays)
    arrays["group0.basis"] = arrays["group0.basis"][:-1]
    with pytest.raises(ProfileError, match="basis of group 0"):
        ProgressiveCodec(profile=Profile("x", arrays, profile.meta)).encode(correlated_kv(0))
    arrays = dict(profile.arrays)
    arrays["group0.mean"] = np.full_like(arrays["group0.mean"], np.nan)
    with pytest.raises(ProfileError, match="out of range"):
        ProgressiveCodec(profile=Profile("x", arrays, profile.meta)).encode(correlated_kv(0))


def test_layers_with_fewer_tokens_go_without_the_profile(profile: Profile) -> None:
    full = correlated_kv(0)
    a, b, c = full.layers
    layers = [a, LayerKV(b.keys[200:], b.values[200:], 200), c]
    chunk = KVChunk.from_layers(layers, tokens=256, first_position=512, rope=full.rope)
    data = ProgressiveCodec(profile=profile).encode(chunk)
    decoded = decode(data)
    assert read_header(data).profile is None
    assert decoded.layers[1].begin == 200
    gap = np.abs(decoded.layers[1].keys.astype(float) - b.keys[200:].astype(float))
    assert gap.mean() < 0.2 * np.abs(b.keys.astype(float)).mean()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    """Undoing is the inverse of a plain complex rotation; partial and no-RoPE layers stay."""
    rng = np.random.default_rng(0)
    keys = rng.normal(0, 1, (5, 2, 12)).astype(np.float32)
    spec = RopeSpec(((0.5, 0.1, 0.02, 0.001),), (1.25,), (0, -1), interleaved)
    rotated = rotate(keys, spec, 0, 100, back=False)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    for token in range(5):
        for index, (a, b) in enumerate(pairs):
            angle = np.float32(100 + token) * np.float32(spec.frequencies[0][index])
            z = (keys[token, :, a] + 1j * keys[token, :, b]) * np.exp(1j * float(angle)) * 1.25
            assert np.allclose(rotated[token, :, a] + 1j * rotated[token, :, b], z, atol=1e-5)
    assert np.array_equal(rotated[..., 8:], keys[..., 8:])
    assert np.allclose(rotate(rotated, spec, 0, 100, back=True), keys, atol=1e-5)
    assert np.array_equal(rotate(keys, spec, 1, 100, back=False), keys)


def test_outlier_tokens_are_kept_exactly() -> None:
    chunk = correlated_kv(0)
    layers = [LayerKV(layer.keys.copy(), layer.values.copy()) for layer in chunk.layers]
    layers[1].values[17] *= 40
    loud = KVChunk.from_layers(layers, first_position=512, rope=chunk.rope)
    decoded = decode(ProgressiveCodec().encode(loud))
    assert np.array_equal(decoded.layers[1].values[17], layers[1].values[17])


def test_extreme_values_have_a_defined_result() -> None:
    """All zero, constant channels, one huge value, one token."""
    zero = KVChunk.from_array(np.zeros((1, 2, 40, 1, 4), np.float16))
    assert not decode(ProgressiveCodec().encode(zero)).to_array().any()
    constant = np.broadcast_to(np.arange(8, dtype=np.float16), (1, 2, 40, 2, 8)).copy()
    decoded = decode(ProgressiveCodec().encode(KVChunk.from_array(constant))).to_array()
    assert np.abs(decoded.astype(float) - constant).max() <= 0.06
    huge = np.zeros((1, 2, 64, 1, 4), np.float32)
    huge[0, 0, 3, 0, 1] = 1e20
    decoded = decode(ProgressiveCodec().encode(KVChunk.from_array(huge))).to_array()
    assert decoded[0, 0, 3, 0, 1] == np.float32(1e20)
    single = correlated_kv(0, tokens=1)
    assert error(single, decode(ProgressiveCodec().encode(single))) >= 0


def test_names_bits_and_budgets() -> None:
    chunk = correlated_kv(0)
    data = ProgressiveCodec().encode(chunk)
    header = read_header(data)
    sizes = [levels.prefix_bytes(header, name) for name in ("small", "balanced")]
    sizes.append(levels.prefix_bytes(header, "lossless-in-practice"))
    assert sizes == sorted(sizes)
    for size in sizes:
        decode(data[:size], allow_partial=True)
    wanted = levels.prefix_bytes(header, bits_per_value=2.0)
    assert wanted <= 2.0 * chunk.value_count / 8
    decode(data[:wanted], allow_partial=True)
    assert levels.prefix_bytes(header, budget_bytes=len(data)) in (
        len(data),
        len(data) - 1,
        len(data) - 2,
        len(data) - 3,
    )
    with pytest.raises(ConfigError, match="budget"):
        levels.prefix_bytes(header, budget_bytes=header.header_bytes)
    with pytest.raises(ConfigError, match="quality"):
        levels.prefix_bytes(header, "best")
    from cachegen.codec.int8 import Int8Codec

    with pytest.raises(ConfigError, match="progressive"):
        levels.prefix_bytes(read_header(Int8Codec().encode(chunk)))


def test_side_information_of_a_wide_model() -> None:
    """At most 0.12 bit/value over three passes at 256 tokens of 8 heads of 128, but for sinks."""
    rng = np.random.default_rng(0)
    planes = rng.laplace(0, 1, (2, 2, 256, 8, 128)) * np.exp(rng.normal(0, 0.6, (2, 2, 1, 8, 128)))
    chunk = KVChunk.from_array(planes.astype(np.float16))
    summary = summarize(ProgressiveCodec(passes=3, sink_tokens=0).encode(chunk))
    # A 32-layer object spreads its header further; all else is per plane.
    assert 8 * summary.side_bytes / chunk.value_count <= 0.12


def test_settings() -> None:
    with pytest.raises(ConfigError, match="passes"):
        ProgressiveCodec(passes=9)
    with pytest.raises(ConfigError, match="step"):
        ProgressiveCodec(step=0.0)
    with pytest.raises(GeometryError):
        fit_basis([])


def test_groups_join_layers_as_far_as_they_fit() -> None:
    narrow = Geometry(6, 2, 64, 64, KVDtype.BFLOAT16)
    assert choose_groups(narrow) == [Group(0, 2, 3), Group(2, 2, 3), Group(4, 2, 3)]
    assert choose_groups(narrow, 600) == [Group(0, 2, 3), Group(2, 2, 3), Group(4, 2, 3)]
    wide = Geometry(2, 32, 128, 128, KVDtype.BFLOAT16)
    assert len(choose_groups(wide)) == 4


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 33])
def test_short_chunks_with_a_profile(profile: Profile, tokens: int) -> None:
    chunk = correlated_kv(0, tokens=tokens)
    codec = ProgressiveCodec(profile=profile)
    decoded = decode(codec.encode(chunk), profile=profile)
    assert decoded.tokens == tokens
    gap = np.abs(decoded.to_array().astype(float) - chunk.to_array().astype(float))
    assert gap.mean() < 0.05 * np.abs(chunk.to_array().astype(float)).mean()


def test_constant_and_zero_channels_with_a_profile() -> None:
    """Channels that never moved in the calibration have no variance; they may move later."""
    rng = np.random.default_rng(0)

    def draw(tokens: int) -> np.ndarray:
        kv = rng.normal(0, 1, (1, 2, tokens, 2, 8)).astype(np.float32)
        kv[..., 0, 3] = 0
        kv[..., 1, 5] = 7
        return kv

    fitted = fit_basis([KVChunk.from_array(draw(200)) for _ in range(3)])
    codec = ProgressiveCodec(profile=fitted)
    chunk = KVChunk.from_array(draw(64))
    decoded = decode(codec.encode(chunk), profile=fitted).to_array()
    assert np.abs(decoded - chunk.to_array()).max() < 0.5
    moved = draw(64)
    moved[..., 0, 3] = rng.normal(0, 1, moved[..., 0, 3].shape)
    decoded = decode(codec.encode(KVChunk.from_array(moved)), profile=fitted).to_array()
    assert np.abs(decoded - moved).max() < 0.5
    zero = KVChunk.from_array(np.zeros((1, 2, 64, 2, 8), np.float32))
    decoded = decode(codec.encode(zero), profile=fitted).to_array()
    assert np.abs(decoded).max() < 0.5


@pytest.mark.parametrize("joint", [False, True])
def test_values_near_the_end_of_float16(profile: Profile, joint: bool) -> None:
    """Finite in, finite out: what overshoots is clamped."""
    chunk = correlated_kv(0)
    largest = max(float(np.abs(chunk.to_array().astype(float)).max()), 1.0)
    layers = [
        LayerKV(
            (layer.keys.astype(np.float32) * (65504 / largest)).astype(np.float16),
            (layer.values.astype(np.float32) * (65504 / largest)).astype(np.float16),
        )
        for layer in chunk.layers
    ]
    loud = KVChunk.from_layers(layers, first_position=512, rope=chunk.rope)
    used = profile if joint else None
    decoded = decode(ProgressiveCodec(profile=used).encode(loud), profile=used).to_array()
    assert np.isfinite(decoded.astype(float)).all()
    assert error(loud, decode(ProgressiveCodec(profile=used).encode(loud), profile=used)) < 0.02


def test_wide_channels_cost_little_more_than_their_digits() -> None:
    """One channel in 16 is 64 times wider: 6 bits more each is the least they can cost."""
    rng = np.random.default_rng(0)
    planes = rng.normal(0, 1, (1, 2, 256, 4, 64)).astype(np.float32)
    ordinary = len(ProgressiveCodec(step=0.3).encode(KVChunk.from_array(planes)))
    planes[..., ::16] *= 64
    spread = float(np.sqrt(np.square(planes).mean()))
    wide = ProgressiveCodec(step=0.3 / spread).encode(KVChunk.from_array(planes))
    extra = 8 * (len(wide) - ordinary) / planes.size
    assert 6 / 16 - 0.02 < extra < 6 / 16 + 0.06
    gap = np.abs(decode(wide).to_array() - planes)
    assert gap.max() <= 0.31


def test_a_profile_of_another_model(profile: Profile) -> None:
    """Same shape, other statistics: right, only larger."""
    chunk = correlated_kv(0)
    rng = np.random.default_rng(5)
    foreign = [
        KVChunk.from_array(rng.normal(0, 9, (3, 2, 200, 2, 16)).astype(np.float16), rope=chunk.rope)
        for _ in range(2)
    ]
    other = fit_basis(foreign)
    data = ProgressiveCodec(profile=other).encode(chunk)
    assert len(data) > len(ProgressiveCodec(profile=profile).encode(chunk))
    assert error(chunk, decode(data, profile=other)) < 0.02
    wide = fit_basis([KVChunk.from_array(np.ones((3, 2, 40, 4, 16), np.float16))])
    with pytest.raises(ProfileError, match="geometry"):
        ProgressiveCodec(profile=wide).encode(chunk)


def test_a_budget_below_pass_0(profile: Profile) -> None:
    data = ProgressiveCodec(profile=profile).encode(correlated_kv(0))
    header = read_header(data)
    least = levels.relative_distortions(header)[0][0]
    assert levels.prefix_bytes(header, budget_bytes=least) == least
    with pytest.raises(ConfigError, match=f"at least {least}"):
        levels.prefix_bytes(header, budget_bytes=least - 1)


def test_quality_curves_rise() -> None:
    for curve in (levels.PLAIN_CURVE, levels.PROFILE_CURVE, levels.MEASURED_CURVE):
        expected = [curve.kl(distortion) for distortion in (-1.0, 0.0, 0.01, 0.1, 1.0)]
        assert expected[:2] == [0, 0]
        assert expected == sorted(expected)


def test_early_layers_come_first_without_a_profile() -> None:
    chunk = correlated_kv(0, layers=6)
    wide = KVChunk.from_layers(
        [LayerKV(np.tile(x.keys, (1, 4, 1)), np.tile(x.values, (1, 4, 1))) for x in chunk.layers],
        first_position=512,
        rope=chunk.rope,
    )
    header = read_header(ProgressiveCodec().encode(wide))
    assert len(header.groups) == 6
    refined = [header.groups[s.group].layer for s in header.segments if s.pass_index == 1]
    assert np.mean(refined[:2]) < np.mean(refined[-2:])


def outlying_kv(seed: int, tokens: int = 96) -> KVChunk:
    """KV of low rank with wide channels: components of it are hardly more than one channel each."""
    rng = np.random.default_rng(seed)
    heads, dim, rank = 12, 64, 24
    planes = rng.normal(size=(2, 2, tokens, rank)) @ rng.normal(size=(2, 2, rank, heads * dim))
    planes = planes.reshape(2, 2, tokens, heads, dim)
    planes[..., ::16] *= 20
    planes += 0.01 * rng.normal(size=planes.shape)
    return KVChunk.from_array(planes.astype(np.float16))


def test_a_profile_of_few_tokens_with_wide_channels() -> None:
    profile = fit_basis([outlying_kv(0), outlying_kv(1)])
    chunk = outlying_kv(2)
    codec = ProgressiveCodec(profile=profile)
    assert error(chunk, decode(codec.encode(chunk), profile=profile)) < 0.01


def test_vectors_that_do_not_span_their_dimensions_are_refused() -> None:
    chunk = correlated_kv(0)
    profile = fit_basis([correlated_kv(1), correlated_kv(2)])
    arrays = dict(profile.arrays)
    name = next(name for name in arrays if name.endswith(".basis"))
    arrays[name] = arrays[name].copy()
    arrays[name][:, 1] = arrays[name][:, 0]
    damaged = dataclasses.replace(profile, arrays=arrays)
    with pytest.raises(ProfileError, match="orthonormal"):
        ProgressiveCodec(profile=damaged).encode(chunk)
