"""The oracle against brute force: every set of recomputed chunks, every order of fetches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stream.planning import convex_steps, curve_of

from cachegen.stream.engine import Job, Knowledge, run_jobs
from cachegen.stream.oracle import Demand, best_cases
from cachegen.stream.plan import ChunkCurve, Step
from cachegen.stream.policies import DeadlinePolicy
from cachegen.stream.speeds import PrefillSpeed, Speeds
from cachegen.stream.traces import Trace

UNIT = 100  # bytes of a step, and what a link carries in a second is a multiple of it


def unit_steps(gains: list[int]) -> tuple[Step, ...]:
    """Steps of one unit each, whose gains fall and sum up to less than 1."""
    falling = sorted(gains, reverse=True)
    left = [1.0 - sum(falling[: i + 1]) / (sum(falling) + 1) for i in range(len(falling))]
    return tuple(Step(UNIT * (i + 1), value) for i, value in enumerate(left))


def front_times(demand: Demand, chosen: tuple[int, ...]) -> float:
    """When a set of chunks would be recomputed, one after the other, nothing else counted."""
    assert demand.recompute_s is not None
    return demand.arrival_s + sum(demand.recompute_s[index] for index in chosen)


def brute_force(demands: list[Demand], trace: Trace) -> float:
    """Least sum of distortions over all ways to recompute and to order whole steps on the link.

    Any set of chunks may be recomputed, also one behind a chunk that is not there yet: that is
    more than a machine can do, so the oracle may not do better.
    """
    options = [list(ways_to_recompute(demand)) for demand in demands]
    best = math.inf
    for choice in itertools.product(*options):
        steps: list[tuple[int, int]] = []  # (request, chunk), once for each step
        for request, (demand, chosen) in enumerate(zip(demands, choice, strict=True)):
            for index, curve in enumerate(demand.curves):
                if index not in chosen:
                    steps += [(request, index)] * len(curve.steps)
        for order in set(itertools.permutations(steps)):
            best = min(best, carried_out(demands, choice, order, trace))
    return best


def ways_to_recompute(demand: Demand) -> Iterator[tuple[int, ...]]:
    if demand.recompute_s is None:
        yield ()
        return
    for size in range(len(demand.curves) + 1):
        for chosen in itertools.combinations(range(len(demand.curves)), size):
            if front_times(demand, chosen) <= demand.deadline_s + 1e-9:
                yield chosen


def carried_out(
    demands: list[Demand],
    choice: tuple[tuple[int, ...], ...],
    order: tuple[tuple[int, int], ...],
    trace: Trace,
) -> float:
    """Send steps in an order, each once its request has arrived; count those in time."""
    reached = [[0] * len(demand.curves) for demand in demands]
    now_s = 0.0
    for request, chunk in order:
        demand = demands[request]
        curve = demand.curves[chunk]
        step = reached[request][chunk]
        size = curve.steps[step].end_bytes - (curve.steps[step - 1].end_bytes if step else 0)
        begin_s = max(now_s, demand.arrival_s)
        end_s = finish(trace, begin_s, size)
        if end_s > demand.deadline_s + 1e-9:
            continue  # not sent at all
        now_s = end_s
        reached[request][chunk] = step + 1
    total = 0.0
    for demand, chosen, steps in zip(demands, choice, reached, strict=True):
        tokens = sum(curve.tokens for curve in demand.curves)
        for index, (curve, count) in enumerate(zip(demand.curves, steps, strict=True)):
            if index not in chosen:
                left = curve.steps[count - 1].distortion if count else 1.0
                total += left * curve.tokens / tokens
    return total


def finish(trace: Trace, begin_s: float, size: float) -> float:
    now_s = begin_s
    while size > 1e-9:
        rate, until_s = trace.rate_at(now_s)
        if rate * (until_s - now_s) >= size:
            return now_s + size / rate
        size -= rate * (until_s - now_s)
        now_s = until_s
    return now_s


@st.composite
def small_links(draw: st.DrawFn) -> Trace:
    """Links that carry whole units in each of five seconds."""
    units = draw(st.lists(st.integers(0, 3), min_size=5, max_size=5).filter(any))
    return Trace("small", tuple(map(float, range(6))), tuple(float(UNIT * n) for n in units))


@st.composite
def one_request(draw: st.DrawFn) -> Demand:
    chunks = draw(st.integers(1, 3))
    steps = unit_steps(draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    recompute = draw(st.none() | st.lists(st.floats(0.3, 4.0), min_size=chunks, max_size=chunks))
    rising = None if recompute is None else tuple(sorted(recompute))
    curves = tuple(curve_of(index, steps) for index in range(chunks))
    return Demand(0.0, float(draw(st.integers(1, 5))), curves, rising)


@given(one_request(), small_links())
@settings(max_examples=150, deadline=None)
def test_one_request_is_optimal(demand: Demand, trace: Trace) -> None:
    (best,) = best_cases([demand], trace)
    assert best.distortion == pytest.approx(brute_force([demand], trace), abs=1e-9)


@given(st.data(), small_links())
@settings(max_examples=60, deadline=None)
def test_a_shared_link_is_optimal(data: st.DataObject, trace: Trace) -> None:
    """Two requests that overlap, arriving and due at whole seconds."""
    demands = []
    for _ in range(2):
        arrival = data.draw(st.integers(0, 3))
        deadline = data.draw(st.integers(arrival + 1, 5))
        steps = unit_steps(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        demands.append(Demand(float(arrival), float(deadline), (curve_of(0, steps),), None))
    best = best_cases(demands, trace)
    total = sum(case.distortion for case in best)
    assert total == pytest.approx(brute_force(demands, trace), abs=1e-9)


@given(st.lists(convex_steps(), min_size=1, max_size=2), st.integers(50, 4000))
@settings(max_examples=100, deadline=None)
def test_steps_of_any_size_are_bounded_from_below(
    all_steps: list[tuple[Step, ...]], rate: int
) -> None:
    trace = Trace("flat", (0.0, 10.0), (float(rate),))
    curves = tuple(curve_of(index, steps) for index, steps in enumerate(all_steps))
    demand = Demand(0.0, 1.0, curves, None)
    (best,) = best_cases([demand], trace)
    reached = brute_force([demand], trace)
    assert best.distortion <= reached + 1e-9
    # No further away than the one step that did not fit.
    largest = max(
        left - step.distortion
        for curve in curves
        for left, step in zip(
            (1.0, *(s.distortion for s in curve.steps)), curve.steps, strict=False
        )
    )
    assert reached - best.distortion <= largest + 1e-9


def test_in_time_means_alone_on_the_link() -> None:
    trace = Trace("flat", (0.0, 10.0), (float(UNIT),))
    curves = (curve_of(0, unit_steps([1])), curve_of(1, unit_steps([1])))
    cases = best_cases(
        [
            Demand(0.0, 2.0, curves, None),
            Demand(0.0, 1.9, curves, None),
            Demand(0.0, 1.9, curves, (1.0, 1.0)),
        ],
        trace,
    )
    assert [case.in_time for case in cases] == [True, False, True]
    missing = (ChunkCurve(100, 0, ()), curves[1])
    assert not best_cases([Demand(0.0, 9.0, missing, None)], trace)[0].in_time


@given(st.lists(one_request(), min_size=1, max_size=3), small_links(), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_no_policy_beats_the_oracle(demands: list[Demand], trace: Trace, gap: int) -> None:
    moved = [
        Demand(gap * i + d.arrival_s, gap * i + d.deadline_s, d.curves, d.recompute_s)
        for i, d in enumerate(demands)
    ]
    jobs = [Job(d.arrival_s, d.deadline_s, d.curves, d.recompute_s, 1e12) for d in moved]
    knowledge = Knowledge(Speeds(PrefillSpeed(0.01), 1e9))
    if any(d.recompute_s is None for d in moved):
        jobs = [Job(j.arrival_s, j.deadline_s, j.curves, None, 1e12) for j in jobs]
        moved = [Demand(d.arrival_s, d.deadline_s, d.curves, None) for d in moved]
        knowledge = Knowledge(Speeds(None, 1e9))
    outcomes = run_jobs(jobs, DeadlinePolicy(), trace, latency_s=0.0, knowledge=knowledge)
    best = sum(case.distortion for case in best_cases(moved, trace))
    assert best <= sum(o.distortion_at_deadline for o in outcomes) + 1e-9
