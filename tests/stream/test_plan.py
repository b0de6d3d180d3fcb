from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.stream.planning import STEPS, curve_of, state_of

from cachegen.chunk import KVChunk
from cachegen.codec.container import read_header
from cachegen.codec.levels import relative_distortions
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.errors import ConfigError
from cachegen.stream.plan import NOTHING, ChunkCurve, ChunkState, Fetch, Recompute, Step


@pytest.mark.parametrize(
    "steps",
    [
        (Step(10, 0.5), Step(10, 0.4)),
        (Step(10, 0.5), Step(20, 0.6)),
        (Step(0, 0.5),),
        (Step(10, -0.1),),
        (Step(10, float("nan")),),
    ],
)
def test_curves_that_do_not_fall_are_refused(steps: tuple[Step, ...]) -> None:
    with pytest.raises(ConfigError):
        ChunkCurve(100, 0, steps)


def test_points_above_the_hull_are_left_out() -> None:
    points = [(10, 0.9), (20, 0.85), (30, 0.3), (40, 0.29), (60, 0.1), (70, 0.1)]
    curve = ChunkCurve.of_points(points, tokens=8, begin_token=0)
    assert [step.end_bytes for step in curve.steps] == [10, 30, 60]


def test_what_is_too_coarse_is_not_offered() -> None:
    points = [(10, 0.9), (20, 0.6), (30, 0.3), (60, 0.1)]
    for worst, ends in ((0.5, [30, 60]), (0.3, [30, 60]), (0.01, [60])):
        curve = ChunkCurve.of_points(points, tokens=8, begin_token=0, worst_distortion=worst)
        assert [step.end_bytes for step in curve.steps] == ends


def test_many_points_are_thinned_to_both_ends() -> None:
    points = [(size, 1.0 / size) for size in range(1, 200)]
    curve = ChunkCurve.of_points(points, tokens=8, begin_token=0, most_steps=6)
    assert 3 <= len(curve.steps) <= 6
    assert curve.steps[0].end_bytes == 1 and curve.steps[-1].end_bytes == 199


def test_a_curve_comes_from_the_header_of_an_object() -> None:
    kv = np.random.default_rng(0).normal(size=(2, 2, 64, 2, 16)).astype(np.float16)
    header = read_header(ProgressiveCodec().encode(KVChunk.from_array(kv)))
    curve = ChunkCurve.of_header(header, begin_token=128, most_steps=99)
    points = [point for point in relative_distortions(header) if point[1] <= NOTHING]
    assert curve.tokens == 64 and curve.end_token == 192
    assert curve.steps[0].end_bytes == points[0][0]
    assert curve.steps[-1].distortion == min(distortion for _, distortion in points)
    assert {(step.end_bytes, step.distortion) for step in curve.steps} <= set(points)


def test_distortion_follows_what_is_decoded() -> None:
    chunk = ChunkState(curve_of(0))
    seen = [replace(chunk, decoded_bytes=size).distortion for size in (0, 999, 1000, 3999, 9999)]
    assert seen == [1.0, 1.0, 0.5, 0.2, 0.05]
    assert not replace(chunk, decoded_bytes=999, fetched_bytes=4000).is_present
    assert replace(chunk, decoded_bytes=1000).is_present
    assert replace(chunk, recomputed=True).distortion == 0.0


def test_bytes_of_another_level_are_lost() -> None:
    chunk = ChunkState(curve_of(0, separate=True), decoded_bytes=2000, level=2)
    assert chunk.distortion == 1.0 and not chunk.is_present
    assert replace(chunk, level=1).distortion == 0.2


def test_what_is_started_counts_as_asked_for() -> None:
    state = state_of(3)
    state = state.started(Fetch(2, 0, 1000)).started(Fetch(2, 1000, 2000)).started(Recompute(0))
    assert state.asked_bytes(2) == 2000 and state.asked_bytes(1) == 0
    assert state.bytes_under_way == 2000 and state.recomputing == 0
    separate = state_of(2, separate=True).started(Fetch(1, 0, 2000, level=1))
    assert separate.chunks[1].level == 1 and separate.chunks[0].level is None


def test_the_link_is_kept_busy_over_its_latency() -> None:
    state = state_of(4, rate=1e6, latency_s=0.01)  # 20,000 bytes in two latencies
    for index in range(2):
        assert state.wants_fetch
        state = state.started(Fetch(index, 0, 4000))
    assert state.wants_fetch
    assert not replace(state, fetches=(*state.fetches, Fetch(2, 0, 20_000))).wants_fetch
    quick = replace(state_of(4), fetches=(Fetch(0, 0, 1000), Fetch(1, 0, 1000)))
    assert not quick.wants_fetch


def test_mean_distortion_weighs_tokens() -> None:
    state = state_of(2)
    long = ChunkState(ChunkCurve(300, 100, STEPS), decoded_bytes=4000)
    state = replace(state, chunks=(state.chunks[0], long))
    assert state.distortion == pytest.approx((100 * 1.0 + 300 * 0.05) / 400)
