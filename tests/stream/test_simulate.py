from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from cachegen.errors import ConfigError
from cachegen.stream.policies import DeadlinePolicy
from cachegen.stream.scenario import (
    CHUNK_TOKENS,
    MODELS,
    Workload,
    curves,
    draw_scene,
    find_model,
    level_points,
    measured_points,
    nested_points,
    segment_tables,
)
from cachegen.stream.simulate import (
    DEFAULT_POLICIES,
    PAPER_RULE,
    Results,
    contender,
    policy_rows,
    regrets,
    simulate,
    summary,
)
from cachegen.stream.traces import GBPS, cloud_traces, constant_trace

MODEL = MODELS["mistral-7b"]


@pytest.fixture(scope="module")
def results() -> Results:
    contenders = [contender(name) for name in DEFAULT_POLICIES]
    return simulate([MODEL], cloud_traces(5, 3), contenders, workload=Workload(requests=3))


def test_tables_are_measured_and_fall() -> None:
    assert {"model", "date", "command", "hardware"} <= set(segment_tables())
    for table in ("progressive", "progressive-profile", "cachegen", "int8"):
        points = measured_points(table)
        assert points == sorted(points)
        assert all(0 < right[1] < left[1] for left, right in pairwise(points))
    with pytest.raises(ConfigError, match="cachegen-paper"):
        measured_points("best")


def test_only_good_enough_steps_are_offered() -> None:
    for worst in (1.0, 0.1, 0.03):
        for points in (nested_points("progressive", worst), level_points("cachegen", worst)):
            assert points and all(distortion <= worst for _, distortion in points)
    with pytest.raises(ConfigError):
        nested_points("progressive", 1e-9)
    with pytest.raises(ConfigError):
        level_points("cachegen", 1e-9)


def test_sizes_scale_with_the_geometry() -> None:
    (small,) = curves([(2.0, 0.1)], MODEL, 1, separate=False)
    (large,) = curves([(2.0, 0.1)], MODELS["llama-3.1-70b"], 1, separate=False)
    assert small.steps[0].end_bytes == 2 * CHUNK_TOKENS * 2 * 32 * 8 * 128 // 8
    assert large.steps[0].end_bytes == 2.5 * small.steps[0].end_bytes
    with pytest.raises(ConfigError, match="llama-2-7b"):
        find_model("gpt")


def test_scenes_repeat_and_keep_to_the_workload() -> None:
    work = Workload(requests=20, slo_s=2.0, prefill_over_slo=(0.5, 2.0))
    scene = draw_scene(MODEL, work, "1 2")
    assert scene == draw_scene(MODEL, work, "1 2") != draw_scene(MODEL, work, "1 3")
    for request in scene.requests:
        assert request.slo_s == 2.0 and request.deadline_s < request.arrival_s + 2.0
        assert 0.7 < sum(request.recompute_s) < 4.4
    for slo in (0.0, 31.0):
        with pytest.raises(ConfigError):
            Workload(slo_s=slo)


def test_rows_have_what_a_report_needs(results: Results) -> None:
    rows = policy_rows(results)
    assert [row["policy"] for row in rows] == list(DEFAULT_POLICIES)
    for row in rows:
        assert row["requests"] == 15
        assert 0 <= row["slo_violation_rate"] <= 1 and 0 <= row["distortion_mean"] <= 1
        assert row["ttft_mean_s"] > 0 and row["regret"] >= -1e-6
    assert next(row for row in rows if row["policy"] == PAPER_RULE)["regret"] == pytest.approx(1.0)


def test_nobody_beats_the_best_case(results: Results) -> None:
    """Distortion is bounded over the requests of a trace together, for they share a link."""
    for name in ("deadline", "hybrid", "fixed", "cachegen-rule"):
        for trace in range(results.traces):
            samples = results.of(name, lambda sample, trace=trace: sample.trace == trace)
            own = statistics.fmean(sample.distortion for sample in samples)
            assert own >= statistics.fmean(s.best.distortion for s in samples) - 1e-9
            assert all(sample.best.in_time or sample.is_late for sample in samples)


def test_deadline_is_closer_to_the_best_than_the_papers_rule(results: Results) -> None:
    late = {row["policy"]: row["slo_violation_rate"] for row in policy_rows(results)}
    assert late["deadline"] <= late[PAPER_RULE] / 2
    assert statistics.median(regrets(results, "deadline")) < 0.1


def test_a_late_request_counts_as_what_had_arrived() -> None:
    slow = constant_trace(0.02 * GBPS)
    results = simulate([MODEL], [slow], [contender("fixed")], workload=Workload(requests=1))
    (sample,) = results.samples["fixed"]
    assert sample.is_late and sample.distortion == sample.outcome.distortion_at_deadline > 0.5
    figures = summary(results.samples["fixed"])
    assert figures["slo_violation_rate"] == 1.0 and figures["distortion_mean_in_time"] is None
    assert figures["never_ended"] == 1 and figures["ttft_mean_s"] is None


def test_a_link_of_any_speed_leaves_nothing_to_regret() -> None:
    fast = constant_trace(1000 * GBPS)
    names = [contender(PAPER_RULE), contender("deadline", policy=DeadlinePolicy())]
    results = simulate([MODEL], [fast], names, workload=Workload(requests=2, latency_s=1e-4))
    assert summary(results.samples["deadline"])["slo_violation_rate"] == 0.0
    assert summary(results.samples["deadline"])["distortion_mean"] < 0.012


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError):
        simulate([MODEL], cloud_traces(1, 0), [])
    with pytest.raises(ConfigError):
        contender("best")
    with pytest.raises(ConfigError):
        contender("deadline", table="none")
