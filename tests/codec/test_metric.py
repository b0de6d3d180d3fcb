"""What errors cost: gradients to weights, and bases in which all errors cost the same."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen.chunk import KVChunk
from cachegen.codec.basis import load_basis, planes_of_group
from cachegen.codec.fit import BasisFit, choose_groups, fit_basis
from cachegen.codec.header import Group
from cachegen.codec.metric import FLOOR, RIDGE, Metric, MetricFit, weigh
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import ConfigError, GeometryError, ProfileError
from cachegen.profile import Profile
from cachegen.types import Geometry, KVDtype

GEOMETRY = Geometry(2, 2, 4, 6, KVDtype.FLOAT32)


def gradients(seed: int, scale: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = rng.normal(0, 1, (2, 400, 2, 4)) * scale
    return keys.astype(np.float32), rng.normal(0, 0.1, (2, 400, 2, 6)).astype(np.float32)


def test_weights_are_second_moments() -> None:
    fit = MetricFit(GEOMETRY)
    scale = np.array([1.0, 1.0, 3.0, 1.0])
    for seed in range(20):
        fit.add(*gradients(seed, scale))
    metric = fit.finish()
    squared = metric.keys[0, 0] @ metric.keys[0, 0]
    ratio = squared[2, 2] / squared[0, 0]
    # 9 : 1, less the ridge of 0.3 of the mean of 3 on both.
    assert ratio == pytest.approx((9 + 3 * RIDGE) / (1 + 3 * RIDGE), rel=0.1)
    values = metric.values[1, 1] @ metric.values[1, 1]
    assert values[0, 0] / squared[0, 0] == pytest.approx(0.013 / (1 + 3 * RIDGE), rel=0.1)


def test_loud_tokens_are_clipped() -> None:
    calm, loud = MetricFit(GEOMETRY), MetricFit(GEOMETRY)
    keys, values = gradients(0)
    calm.add(keys, values)
    keys = keys.copy()
    keys[:, 5] *= 1e4
    loud.add(keys, values)
    assert np.allclose(calm.finish().keys, loud.finish().keys, rtol=0.1, atol=0.05)


def test_heads_without_gradients_keep_a_floor() -> None:
    fit = MetricFit(GEOMETRY)
    keys, values = gradients(0)
    keys[1] = 0
    fit.add(keys, values)
    metric = fit.finish()
    weight = (metric.keys[1, 0] @ metric.keys[1, 0])[0, 0]
    assert weight == pytest.approx(RIDGE * FLOOR, rel=1e-3)
    empty = MetricFit(GEOMETRY)
    empty.add(np.zeros_like(keys), np.zeros_like(values))
    assert empty.finish() is None


@pytest.mark.parametrize("change", ["heads", "nan", "axes"])
def test_gradients_of_another_shape(change: str) -> None:
    keys, values = gradients(0)
    if change == "heads":
        keys = keys[:, :, :1]
    elif change == "nan":
        keys[0, 0, 0, 0] = np.nan
    else:
        values = values[0]
    with pytest.raises(GeometryError, match="gradients"):
        MetricFit(GEOMETRY).add(keys, values)


def test_weigh_is_a_block_diagonal_product() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.normal(0, 1, (2, 3, 3)), rng.normal(0, 1, (1, 4, 4))]
    rows = rng.normal(0, 1, (5, 10))
    whole = np.zeros((10, 10))
    for begin, block in ((0, blocks[0][0]), (3, blocks[0][1]), (6, blocks[1][0])):
        whole[begin : begin + len(block), begin : begin + len(block)] = block
    assert np.allclose(weigh(rows, blocks), rows @ whole)


@pytest.fixture(scope="module")
def measured(make_kv) -> Profile:
    chunks = [make_kv(layers=2, tokens=200, dim=8, value_dim=12, seed=s) for s in range(4)]
    fit = MetricFit(chunks[0].geometry)
    rng = np.random.default_rng(1)
    loudness = np.array([5.0, 0.2])[:, None, None, None]
    for _ in range(4):
        keys = rng.normal(0, 1, (2, 300, 2, 8)) * loudness
        fit.add(keys.astype(np.float32), rng.normal(0, 1, (2, 300, 2, 12)).astype(np.float32))
    return fit_basis(chunks, groups=[Group(0, 2, 3)], metric=fit.finish())


def test_components_and_channels_are_inverse(measured: Profile, make_kv) -> None:
    geometry = make_kv(layers=2, dim=8, value_dim=12).geometry
    (basis,) = load_basis(measured, geometry).bases
    assert load_basis(measured, geometry).value_weight == 1.0
    rows = np.random.default_rng(2).normal(0, 3, (50, 80)).astype(np.float32)
    back = basis.analyse(rows) @ basis.basis.T + basis.mean
    assert np.allclose(back, rows, atol=2e-3)
    # An error of one component costs what its square says, whichever it is.
    blocks = load_basis(measured, geometry).bases[0].blocks
    cost = np.square(weigh(basis.basis.T, blocks)).sum(axis=1)
    assert np.allclose(cost, 1, atol=0.05)


def test_sensitive_layers_are_kept_better(measured: Profile, make_kv) -> None:
    chunk = make_kv(layers=2, tokens=200, dim=8, value_dim=12, seed=9)
    decoded = decode(
        ProgressiveCodec(profile=measured, step=1.0, passes=1, sink_tokens=0).encode(chunk),
        profile=measured,
    )
    gaps = [
        float(np.square(a.keys.astype(float) - b.keys.astype(float)).mean())
        for a, b in zip(chunk.layers, decoded.layers, strict=True)
    ]
    assert gaps[0] < 0.2 * gaps[1]


def test_fewer_components(make_kv) -> None:
    chunks = [make_kv(tokens=200, seed=seed) for seed in range(4)]
    fit = BasisFit(chunks[0].geometry, groups=[Group(0, 3, 3)])
    for chunk in chunks:
        fit.add(chunk)
    whole, half = fit.finish(), fit.finish(components=0.5)
    assert half.arrays["group0.basis"].shape == (192, 96)
    assert len(half.to_bytes()) < 0.6 * len(whole.to_bytes())
    (basis,) = load_basis(half, chunks[0].geometry).bases
    assert basis.basis.shape == (192, 192)
    assert not basis.basis[:, 96:].any()
    data = ProgressiveCodec(profile=half).encode(chunks[0])
    assert decode(data, profile=half).tokens == 200
    with pytest.raises(ConfigError, match="components"):
        fit.finish(components=0.0)


def broken(profile: Profile, **changes: np.ndarray) -> Profile:
    arrays = dict(profile.arrays)
    arrays.update({name.replace("__", "."): array for name, array in changes.items()})
    return Profile("x", arrays, profile.meta)


def test_corrupt_profiles(measured: Profile, make_kv) -> None:
    """Wrong ranks and shapes, numbers out of range, vectors that are no basis."""
    chunk = make_kv(layers=2, tokens=40, dim=8, value_dim=12)
    keys = measured.arrays["metric.keys"]
    cases = {
        "metric of keys": broken(measured, metric__keys=keys[:, :1]),
        "positive": broken(measured, metric__keys=-keys),
        "scale of group 0": broken(measured, group0__scale=measured.arrays["group0.scale"][1:]),
        "basis of group 0": broken(measured, group0__basis=measured.arrays["group0.basis"][0]),
        "families of group 0": broken(measured, group0__families=np.zeros(3, np.uint8)),
        "out of range": broken(measured, group0__families=np.full(80, 9, np.uint8)),
        "orthonormal": broken(measured, group0__basis=np.ones((80, 80), np.int8)),
        "groups of the profile": Profile(
            "x", measured.arrays, measured.meta | {"groups": [[0, 1, 3]]}
        ),
    }
    cases["groups"] = Profile("x", measured.arrays, measured.meta | {"groups": "all"})
    for message, profile in cases.items():
        with pytest.raises(ProfileError, match=message):
            ProgressiveCodec(profile=profile).encode(chunk)


def test_which_planes_join() -> None:
    wide = Geometry(32, 8, 128, 128, KVDtype.BFLOAT16)
    assert choose_groups(wide)[1] == Group(1, 1, 3)
    reference = Geometry(4, 2, 64, 64, KVDtype.BFLOAT16)
    assert choose_groups(reference) == [Group(0, 2, 3), Group(2, 2, 3)]
    assert choose_groups(reference, layers=4) == [Group(0, 4, 3)]
    apart = choose_groups(reference, layers=2, joint=False)
    assert apart == [Group(0, 2, 1), Group(0, 2, 2), Group(2, 2, 1), Group(2, 2, 2)]
    assert len([p for g in apart for p in planes_of_group(g)]) == 8
    with pytest.raises(ConfigError, match="layers of a group"):
        choose_groups(reference, layers=3)


def test_plain_weights_leave_channels_alone() -> None:
    metric = Metric.plain(GEOMETRY)
    chunk = KVChunk.from_array(np.ones((2, 2, 8, 2, 4), np.float32))
    rows = chunk.layers[0].keys.reshape(8, 8)
    assert np.array_equal(weigh(rows, metric.blocks([(0, False)])), rows)
