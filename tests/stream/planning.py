"""States, curves and strategies that the planner's tests share."""

from __future__ import annotations

from hypothesis import strategies as st

from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.plan import ChunkCurve, ChunkState, PlanState, Step
from cachegen.stream.speeds import PrefillSpeed, Speeds

STEPS = (Step(1000, 0.5), Step(2000, 0.2), Step(4000, 0.05))


def curve_of(index: int, steps: tuple[Step, ...] = STEPS, *, separate: bool = False) -> ChunkCurve:
    return ChunkCurve(100, 100 * index, steps, separate)


def state_of(
    count: int = 4,
    *,
    rate: float = 10_000.0,
    deadline_s: float = 1.0,
    prefill_token_s: float | None = None,
    separate: bool = False,
    latency_s: float = 0.0,
    steps: tuple[Step, ...] = STEPS,
) -> PlanState:
    """A request that has just begun. prefill_token_s: None where nothing can be recomputed."""
    prefill = None if prefill_token_s is None else PrefillSpeed(prefill_token_s, deviation=0.0)
    return PlanState(
        0.0,
        deadline_s,
        tuple(ChunkState(curve_of(index, steps, separate=separate)) for index in range(count)),
        LinkEstimate.known(rate, latency_s=latency_s),
        Speeds(prefill, 1e9),
    )


@st.composite
def convex_steps(draw: st.DrawFn) -> tuple[Step, ...]:
    """Steps whose gain per byte falls, from nothing on."""
    sizes = draw(st.lists(st.integers(100, 2000), min_size=1, max_size=4))
    slopes = sorted(draw(st.lists(st.integers(1, 100), min_size=len(sizes), max_size=len(sizes))))
    total = sum(size * slope for size, slope in zip(sizes, reversed(slopes), strict=True))
    steps, end, left = [], 0, 1.0
    for size, slope in zip(sizes, reversed(slopes), strict=True):
        end += size
        left -= 0.99 * size * slope / total
        steps.append(Step(end, max(left, 0.0)))
    return tuple(steps)


@st.composite
def states(draw: st.DrawFn) -> PlanState:
    """Requests of up to six equal chunks on a known link, with or without recomputing."""
    return state_of(
        draw(st.integers(1, 6)),
        rate=draw(st.floats(500, 100_000)),
        deadline_s=draw(st.floats(0.05, 3.0)),
        prefill_token_s=draw(st.none() | st.floats(1e-4, 2e-2)),
        latency_s=draw(st.sampled_from((0.0, 0.004))),
        steps=draw(convex_steps()),
    )
