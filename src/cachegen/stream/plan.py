"""Planning: what to fetch next, what to recompute, when to hand over.

Everything here is pure: there is no clock and no I/O. Whoever fetches describes where a request
stands as a ``PlanState`` and asks a policy for the next ``Action``; the fetcher does so with wall
time, the simulator with a virtual clock.

Distortion is relative: weighted squared error over the squared spread of a chunk's centred values.
A chunk of which nothing usable is there has distortion 1, a recomputed one 0.
Source: CacheGen (SIGCOMM'24), section 5.3; Cake (arXiv 2410.03065) for recomputing while loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from cachegen.codec.header import Header
from cachegen.codec.levels import relative_distortions
from cachegen.errors import ConfigError
from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.speeds import Speeds

NOTHING = 1.0
DEFAULT_STEPS = 12


@dataclass(frozen=True)
class Step:
    """A prefix that decodes: its bytes, and the relative distortion it leaves."""

    end_bytes: int
    distortion: float


@dataclass(frozen=True)
class ChunkCurve:
    """What is stored of one chunk: quality against bytes.

    tokens, begin_token: the tokens [begin_token, begin_token + tokens) of the context.
    steps: bytes rise, distortion does not; the first is the end of pass 0. None at all: the store
        does not have this chunk, it can only be recomputed.
    separate: every step is an object of its own, as the paper's levels are: bytes of one are of no
        use to another. Otherwise the steps are prefixes of one object.
    """

    tokens: int
    begin_token: int
    steps: tuple[Step, ...]
    separate: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.begin_token < 0:
            raise ConfigError("tokens", got=(self.begin_token, self.tokens), expected=">= (0, 1)")
        last = Step(0, math.inf)
        for step in self.steps:
            if not (step.end_bytes > last.end_bytes and 0 <= step.distortion <= last.distortion):
                raise ConfigError(
                    "steps of a chunk", got=step, expected="rising bytes, distortion that falls"
                )
            last = step

    @property
    def end_token(self) -> int:
        """The token after the last one."""
        return self.begin_token + self.tokens

    @classmethod
    def of_points(
        cls,
        points: Iterable[tuple[int, float]],
        *,
        tokens: int,
        begin_token: int,
        most_steps: int = DEFAULT_STEPS,
        worst_distortion: float = NOTHING,
    ) -> ChunkCurve:
        """Build from (prefix bytes, relative distortion) pairs of ``relative_distortions``.

        Keeps the first point and those on the lower convex hull, at most most_steps of them: what
        lies above the hull is never worth stopping at, and fewer steps are planned faster.
        worst_distortion: coarser prefixes are of no use to the caller and left out, but for the
            finest one.
        """
        hull: list[tuple[int, float]] = []
        listed = list(points)
        for size, distortion in [p for p in listed if p[1] <= worst_distortion] or listed[-1:]:
            if hull and distortion >= hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(
                hull[-1], (size, distortion)
            ):
                hull.pop()
            hull.append((size, distortion))
        if len(hull) > most_steps:
            hull = _thin(hull, most_steps)
        return cls(tokens, begin_token, tuple(Step(*point) for point in hull))

    @classmethod
    def of_header(
        cls,
        header: Header,
        *,
        begin_token: int,
        most_steps: int = DEFAULT_STEPS,
        worst_distortion: float = NOTHING,
    ) -> ChunkCurve:
        """Build from the header of a ``progressive`` object. Raises: ConfigError for others."""
        return cls.of_points(
            relative_distortions(header),
            tokens=header.tokens,
            begin_token=begin_token,
            most_steps=most_steps,
            worst_distortion=worst_distortion,
        )

    def distortion_at(self, size_bytes: int) -> float:
        """Return the distortion that the first size_bytes of the object leave."""
        left = NOTHING
        for step in self.steps:
            if step.end_bytes > size_bytes:
                break
            left = step.distortion
        return left


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    """Return the distortion removed per byte, always positive on a falling curve."""
    return (left[1] - right[1]) / (right[0] - left[0])


def _thin(hull: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Keep first and last, and between them points at about equal ratios of distortion."""
    top, bottom = math.log(hull[0][1]), math.log(max(hull[-1][1], 1e-12))
    kept = [hull[0]]
    for point in hull[1:-1]:
        due = top + (bottom - top) * len(kept) / (most - 1)
        if len(kept) < most - 1 and math.log(max(point[1], 1e-12)) <= due:
            kept.append(point)
    return [*kept, hull[-1]]


@dataclass(frozen=True)
class ChunkState:
    """Where one chunk stands.

    fetched_bytes: so many bytes of the object have arrived, from its begin. decoded_bytes: so many
    of them are decoded too. level: with separate objects, the step they belong to.
    """

    curve: ChunkCurve
    fetched_bytes: int = 0
    decoded_bytes: int = 0
    level: int | None = None
    recomputed: bool = False

    @property
    def distortion(self) -> float:
        """Relative distortion if the chunk were handed over now."""
        return 0.0 if self.recomputed else self.distortion_with(self.decoded_bytes)

    def distortion_with(self, size_bytes: int) -> float:
        """Return the distortion once so many bytes of the object are decoded."""
        if not self.curve.separate:
            return self.curve.distortion_at(size_bytes)
        if self.level is None or size_bytes < self.curve.steps[self.level].end_bytes:
            return NOTHING
        return self.curve.steps[self.level].distortion

    @property
    def is_present(self) -> bool:
        """True if the chunk can be handed over: recomputed, or decoded at least to pass 0."""
        if self.recomputed:
            return True
        if self.curve.separate:
            level = self.level
            return level is not None and self.decoded_bytes >= self.curve.steps[level].end_bytes
        return bool(self.curve.steps) and self.decoded_bytes >= self.curve.steps[0].end_bytes


@dataclass(frozen=True)
class Fetch:
    """Read the bytes [begin, end) of a chunk's object; level says which, if they are separate."""

    chunk: int
    begin: int
    end: int
    level: int | None = None


@dataclass(frozen=True)
class Recompute:
    """Prefill a chunk; everything before it is present."""

    chunk: int


@dataclass(frozen=True)
class Wait:
    """Nothing to start now: ask again when something has ended, or at until_s at the latest.

    until_s: infinite if there is nothing to wait for but what is under way.
    """

    until_s: float


@dataclass(frozen=True)
class HandOver:
    """Stop: cancel what is under way and hand over what is decoded or recomputed."""


Action = Fetch | Recompute | Wait | HandOver


@dataclass(frozen=True)
class PlanState:
    """Where one request stands, and what is known of link and machine.

    now_s, deadline_s: on the caller's clock; the deadline is when the stored prefix has to be
        ready, so the caller takes off what the rest of the prompt needs.
    chunks: in order of their tokens, without gaps, from token 0 on.
    fetches: under way, oldest first; of one chunk in order of their bytes.
    recomputing: the chunk that is being prefilled, since recompute_began_s.
    """

    now_s: float
    deadline_s: float
    chunks: tuple[ChunkState, ...]
    link: LinkEstimate
    speeds: Speeds
    fetches: tuple[Fetch, ...] = ()
    recomputing: int | None = None
    recompute_began_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative behind it."""
        return self.deadline_s - self.now_s

    @property
    def is_ready(self) -> bool:
        """True if every chunk can be handed over."""
        return all(chunk.is_present for chunk in self.chunks)

    @property
    def is_arriving(self) -> bool:
        """True while bytes are under way, or here and not decoded yet."""
        return bool(self.fetches) or any(
            chunk.decoded_bytes < chunk.fetched_bytes and not chunk.recomputed
            for chunk in self.chunks
        )

    @property
    def distortion(self) -> float:
        """Mean relative distortion over the tokens, if handed over now."""
        total = sum(chunk.curve.tokens for chunk in self.chunks)
        return math.fsum(chunk.distortion * chunk.curve.tokens for chunk in self.chunks) / total

    @property
    def bytes_under_way(self) -> int:
        """Bytes of all fetches that have not finished."""
        return sum(fetch.end - fetch.begin for fetch in self.fetches)

    def asked_bytes(self, chunk: int) -> int:
        """Return how far a chunk is fetched once everything under way has arrived."""
        ends = [fetch.end for fetch in self.fetches if fetch.chunk == chunk]
        return max(ends, default=self.chunks[chunk].fetched_bytes)

    def recompute_s(self, chunk: int) -> float:
        """Return the expected time of prefilling a chunk; infinite where that cannot be done."""
        prefill = self.speeds.prefill
        curve = self.chunks[chunk].curve
        return math.inf if prefill is None else prefill.seconds(curve.begin_token, curve.tokens)

    def recompute_left_s(self) -> float:
        """Return the expected time until the prefill under way ends; 0 without one."""
        if self.recomputing is None:
            return 0.0
        ends_s = self.recompute_began_s + self.recompute_s(self.recomputing)
        return max(ends_s - self.now_s, 0.0)

    def started(self, action: Fetch | Recompute) -> PlanState:
        """Return the state once the caller has begun an action."""
        if isinstance(action, Recompute):
            return replace(self, recomputing=action.chunk, recompute_began_s=self.now_s)
        chunks = self.chunks
        if action.level is not None:
            changed = replace(chunks[action.chunk], level=action.level)
            chunks = (*chunks[: action.chunk], changed, *chunks[action.chunk + 1 :])
        return replace(self, chunks=chunks, fetches=(*self.fetches, action))

    @property
    def wants_fetch(self) -> bool:
        """True if one more fetch should be started, so that the link does not fall idle.

        Two are always under way; more where the link carries more in two latencies than they hold.
        """
        if len(self.fetches) < 2:
            return True
        ahead = 2.0 * self.link.latency_s * self.link.rate_bytes_per_s()
        return len(self.fetches) < MOST_FETCHES and self.bytes_under_way < ahead


# More fetches at once than this do not fill any link better.
MOST_FETCHES = 16


class Policy(Protocol):
    """Decides what to do next. Holds settings only: the same state gives the same action."""

    @property
    def name(self) -> str:
        """What the policy is called on the command line and in reports."""

    def next(self, state: PlanState) -> Action:
        """Return what to start now. Called until it says Wait or HandOver.

        A fetch is returned only while ``state.wants_fetch``, a recompute only while none is under
        way; the caller adds what it started to the state before it asks again.
        """
