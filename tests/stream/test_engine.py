from __future__ import annotations

import math

import pytest
from tests.stream.planning import STEPS, curve_of

from cachegen.stream.engine import GIVE_UP_S, Job, Knowledge, run_jobs
from cachegen.stream.plan import ChunkCurve, Step
from cachegen.stream.policies import CachegenPolicy, DeadlinePolicy, FixedPolicy
from cachegen.stream.speeds import PrefillSpeed, Speeds
from cachegen.stream.traces import Trace, constant_trace

KNOWN = Speeds(PrefillSpeed(0.01, deviation=0.05), 1e6)


def job(
    count: int = 2,
    *,
    arrival_s: float = 0.0,
    deadline_s: float = 1.0,
    recompute_s: float | None = None,
    decode: float = 1e9,
    separate: bool = False,
) -> Job:
    curves = tuple(curve_of(index, separate=separate) for index in range(count))
    times = None if recompute_s is None else (recompute_s,) * count
    return Job(arrival_s, deadline_s, curves, times, decode)


def run(jobs: list[Job], policy: object, trace: Trace, *, latency_s: float = 0.0) -> list[object]:
    speeds = KNOWN if jobs[0].recompute_s is not None else Speeds(None, 1e6)
    return list(
        run_jobs(jobs, policy, trace, latency_s=latency_s, knowledge=Knowledge(speeds))  # type: ignore[arg-type]
    )


def test_a_transfer_takes_latency_and_bytes() -> None:
    (outcome,) = run([job(1)], FixedPolicy(), constant_trace(10_000.0), latency_s=0.25)
    assert outcome.ready_s == pytest.approx(0.25 + 4000 / 10_000, abs=1e-4)
    assert outcome.distortion == 0.05 and outcome.fetched_bytes == 4000


def test_latencies_of_reads_that_are_asked_for_together_overlap() -> None:
    (outcome,) = run([job(4)], FixedPolicy(), constant_trace(10_000.0), latency_s=0.2)
    assert outcome.ready_s == pytest.approx(0.2 + 16_000 / 10_000, abs=1e-4)


def test_decoding_follows_arrival() -> None:
    (outcome,) = run([job(2, decode=8000.0)], FixedPolicy(), constant_trace(1e6))
    assert outcome.ready_s == pytest.approx(0.004 + 2 * 4000 / 8000, abs=1e-3)


def test_bandwidth_changes_under_way() -> None:
    trace = Trace("drop", (0.0, 0.2, 10.0), (10_000.0, 1000.0))
    (outcome,) = run([job(1)], FixedPolicy(), trace)
    assert outcome.ready_s == pytest.approx(0.2 + 2.0, abs=1e-4)
    # At the deadline of 1 s 2,800 of 4,000 bytes had arrived, of one fetch: nothing usable.
    assert outcome.distortion_at_deadline == 1.0 and outcome.distortion == 0.05


def test_deadline_hands_over_what_there_is_when_the_link_drops() -> None:
    trace = Trace("drop", (0.0, 0.15, 100.0), (20_000.0, 1000.0))
    (adaptive,) = run([job(2)], DeadlinePolicy(), trace)
    (paper,) = run([job(2, separate=True)], CachegenPolicy(), trace)
    assert adaptive.ready_s <= 1.0 < paper.ready_s
    assert adaptive.distortion <= 0.35 < paper.distortion_at_deadline


def test_the_earliest_deadline_gets_most_of_a_shared_link() -> None:
    jobs = [job(1, deadline_s=9.0), job(1, deadline_s=8.0)]
    late, early = run(jobs, FixedPolicy(), constant_trace(1000.0))
    assert early.ready_s == pytest.approx(4000 / 875, abs=1e-3)  # 3/4 and half of the rest
    assert late.ready_s == pytest.approx(8.0, abs=1e-3)
    same = run([job(1, deadline_s=9.0)] * 2, FixedPolicy(), constant_trace(1000.0))
    assert [o.ready_s for o in same] == pytest.approx([8.0, 8.0], abs=1e-3)


def test_prefill_and_link_work_at_the_same_time() -> None:
    (outcome,) = run([job(2, recompute_s=0.9)], DeadlinePolicy(), constant_trace(5000.0))
    assert outcome.ready_s == pytest.approx(0.9, abs=1e-3)
    assert outcome.recomputed_tokens == 100
    assert outcome.distortion == pytest.approx(0.05 / 2)


def test_what_never_ends_is_given_up() -> None:
    (outcome,) = run([job(1)], FixedPolicy(), constant_trace(10.0))
    assert math.isinf(outcome.ready_s) and outcome.distortion == 1.0
    assert outcome.fetched_bytes == pytest.approx(10 * GIVE_UP_S, rel=0.01)
    missing = Job(0.0, 1.0, (ChunkCurve(100, 0, ()),), None, 1e9)
    (outcome,) = run([missing], DeadlinePolicy(), constant_trace(1e6))
    assert math.isinf(outcome.ready_s)


def test_requests_learn_from_each_other() -> None:
    """The second request knows the link, so the rule leaves the middle level."""
    steps = (Step(1000, 0.5), Step(2000, 0.2), Step(50_000, 0.01))
    curves = (ChunkCurve(100, 0, steps, separate=True),)
    jobs = [Job(at, at + 1.0, curves, None, 1e9) for at in (0.0, 2.0)]
    first, second = run(jobs, CachegenPolicy(), constant_trace(60_000.0))
    assert (first.distortion, second.distortion) == (0.2, 0.01)


def test_the_same_run_gives_the_same_outcome() -> None:
    trace = Trace("drop", (0.0, 0.3, 1.0), (10_000.0, 3000.0))
    jobs = [job(3, arrival_s=0.1 * i, deadline_s=1 + 0.1 * i, recompute_s=0.4) for i in range(3)]
    assert run(jobs, DeadlinePolicy(), trace) == run(jobs, DeadlinePolicy(), trace)
    assert STEPS[0].end_bytes == 1000
