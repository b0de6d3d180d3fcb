"""The best any schedule could have done, knowing the link and the machine in advance.

Several requests share a link; each has an arrival, a deadline and its chunks' curves. Bytes are
taken as fluid and decoding as instant, and distortion may fall between two steps, so what comes out
is a lower bound on the distortion of every schedule, and reached by one where steps are small.

What a shared link can carry is a polymatroid: amounts x_r fit exactly if for every arrival a and
deadline d the requests within [a, d] need no more than the link carries between them. Over it, and
for convex curves, taking steps by distortion removed per byte, as far as each fits, is optimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cachegen.stream.plan import NOTHING, ChunkCurve
from cachegen.stream.traces import Trace


@dataclass(frozen=True)
class Demand:
    """One request, as the oracle sees it.

    recompute_s: the true time that prefilling each chunk takes, or None where that is impossible.
    """

    arrival_s: float
    deadline_s: float
    curves: tuple[ChunkCurve, ...]
    recompute_s: tuple[float, ...] | None


@dataclass(frozen=True)
class BestCase:
    """distortion: lower bound on the mean distortion at the deadline. in_time: whether this request
    could be ready at its deadline if it had the link to itself."""

    distortion: float
    in_time: bool


def best_cases(demands: Sequence[Demand], trace: Trace) -> list[BestCase]:
    """Return what the best schedule reaches for every request.

    It minimises the mean over the requests of their distortion. Chunks are recomputed from the
    front for as long as there is time: that takes nothing from the link, needs nothing loaded
    before it, and a front is the cheapest set of its size, as attention makes later chunks dearer.
    So it is the best set where all chunks of a request have the same curve.
    """
    link = _Link(demands, trace)
    left = [_distortion_without_link(demand) for demand in demands]
    steps = []
    for index, demand in enumerate(demands):
        for curve in demand.curves[_recomputable(demand) :]:
            share = curve.tokens / _tokens(demand)
            steps += [(fall * share / size, index, size) for size, fall in _hull_steps(curve)]
    # A stable sort: of equal gains the earlier step of a chunk comes first.
    for gain, index, size in sorted(steps, key=lambda step: -step[0]):
        left[index] -= gain * link.take(index, size)
    return [
        BestCase(max(distortion, 0.0), _fits_alone(demand, trace))
        for demand, distortion in zip(demands, left, strict=True)
    ]


class _Link:
    """What is left of a shared link: for every pair of an arrival and a deadline, its slack."""

    def __init__(self, demands: Sequence[Demand], trace: Trace) -> None:
        arrivals = sorted({demand.arrival_s for demand in demands})
        deadlines = sorted({demand.deadline_s for demand in demands})
        self._slack = {
            (begin, end): trace.carried_bytes(begin, end)
            for begin in arrivals
            for end in deadlines
            if end > begin
        }
        self._within = [
            [
                (begin, end)
                for begin, end in self._slack
                if begin <= demand.arrival_s and demand.deadline_s <= end
            ]
            for demand in demands
        ]

    def take(self, index: int, size: float) -> float:
        """Give a request up to so many bytes; return how many there were."""
        windows = self._within[index]
        taken = min((self._slack[window] for window in windows), default=0.0)
        taken = min(max(taken, 0.0), size)
        for window in windows:
            self._slack[window] -= taken
        return taken


def _tokens(demand: Demand) -> int:
    return sum(curve.tokens for curve in demand.curves)


def _recomputable(demand: Demand) -> int:
    """Return how many chunks can be recomputed from the front in time."""
    if demand.recompute_s is None:
        return 0
    left_s = demand.deadline_s - demand.arrival_s
    for index, seconds in enumerate(demand.recompute_s):
        left_s -= seconds
        if left_s < -1e-12:
            return index
    return len(demand.recompute_s)


def _distortion_without_link(demand: Demand) -> float:
    loaded = demand.curves[_recomputable(demand) :]
    return NOTHING * sum(curve.tokens for curve in loaded) / _tokens(demand)


def _hull_steps(curve: ChunkCurve) -> list[tuple[float, float]]:
    """Return (bytes, fall of distortion) along the lower convex hull from nothing on."""
    hull = [(0.0, NOTHING)]
    for step in curve.steps:
        point = (float(step.end_bytes), step.distortion)
        if point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(right[0] - left[0], left[1] - right[1]) for left, right in pairwise(hull)]


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (left[1] - right[1]) / (right[0] - left[0])


def _fits_alone(demand: Demand, trace: Trace) -> bool:
    """Return whether one request alone can have every chunk at its first step or recomputed."""
    loaded = demand.curves[_recomputable(demand) :]
    if not all(curve.steps for curve in loaded):
        return False
    size = sum(curve.steps[0].end_bytes for curve in loaded)
    return size <= trace.carried_bytes(demand.arrival_s, demand.deadline_s)
