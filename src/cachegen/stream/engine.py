"""A virtual clock for planners: one link, several requests, each with a machine of its own.

Of requests that load at the same time the one with the earliest deadline gets three quarters of the
link, as the fetcher gives it three slices of four; the rest is shared equally. Fetches of one
request arrive in the order they were asked for, each after the latency of its first byte; arrived
bytes are decoded one after the other. Policies see only what a fetcher sees: estimates, never the
trace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cachegen.stream.bandwidth import BandwidthEstimator, LinkEstimate, LinkPrior
from cachegen.stream.plan import (
    ChunkCurve,
    ChunkState,
    Fetch,
    HandOver,
    PlanState,
    Policy,
    Recompute,
    Wait,
)
from cachegen.stream.speeds import SpeedLearner, Speeds
from cachegen.stream.traces import Trace, constant_trace

# A request that is not over by then counts as it stands: the link is too slow to ever end it.
GIVE_UP_S = 60.0
# Of the link, for the request with the earliest deadline, before the rest is shared equally.
FIRST_SHARE = 0.75
_EPSILON_S = 1e-9
_EPSILON_BYTES = 1e-3


@dataclass(frozen=True)
class Job:
    """One request with the truth about its machine.

    deadline_s: when the prefix has to be ready, on the virtual clock. recompute_s: true time of
    prefilling each chunk; None where nothing can be recomputed.
    """

    arrival_s: float
    deadline_s: float
    curves: tuple[ChunkCurve, ...]
    recompute_s: tuple[float, ...] | None
    decode_bytes_per_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    ready_s: when it was handed over; infinite if it never was. distortion_at_deadline: of what was
    usable by then. distortion: of what was handed over. fetched_bytes: all that arrived.
    """

    ready_s: float
    distortion_at_deadline: float
    distortion: float
    fetched_bytes: int
    recomputed_tokens: int


class Knowledge:
    """What requests that share a link and a kind of machine learn together.

    guess: of the speeds, before anything ran. prior: belief about the link.
    """

    def __init__(self, guess: Speeds, prior: LinkPrior | None = None) -> None:
        self._link = BandwidthEstimator(prior)
        self._speeds = SpeedLearner(guess)

    def link(self, now_s: float) -> LinkEstimate:
        """Return what is known of the link at a time."""
        return self._link.estimate(now_s)

    def speeds(self) -> Speeds:
        """Return what is known of the machine."""
        return self._speeds.speeds()

    def transferred(
        self, size_bytes: int, seconds: float, *, now_s: float, first_byte_s: float
    ) -> None:
        """Learn from a transfer that ended."""
        self._link.observe(size_bytes, seconds, now_s=now_s, first_byte_s=first_byte_s)

    def decoded(self, size_bytes: int, seconds: float) -> None:
        """Learn from bytes that were decoded."""
        self._speeds.observe_decode(size_bytes, seconds)

    def prefilled(self, begin_token: int, tokens: int, seconds: float) -> None:
        """Learn from a chunk that was recomputed."""
        self._speeds.observe_prefill(begin_token, tokens, seconds)


class Certainty(Knowledge):
    """Knowledge that stays as it is: for playing out a plan as if the estimates were the truth."""

    def __init__(self, link: LinkEstimate, speeds: Speeds) -> None:
        super().__init__(speeds)
        self._held = link, speeds

    def link(self, now_s: float) -> LinkEstimate:
        """Return the estimate."""
        return self._held[0]

    def speeds(self) -> Speeds:
        """Return the speeds."""
        return self._held[1]


@dataclass
class _Transfer:
    fetch: Fetch
    flows_s: float
    left: float
    began_s: float | None = None


@dataclass
class _Run:
    """One request in progress."""

    job: Job
    chunks: list[ChunkState]
    transfers: deque[_Transfer] = field(default_factory=deque)
    decoding: deque[tuple[float, float, Fetch]] = field(default_factory=deque)
    recomputing: int | None = None
    recompute_began_s: float = 0.0
    recompute_ends_s: float = math.inf
    wakes_s: float = 0.0
    outcome: Outcome | None = None
    at_deadline: float | None = None
    fetched: float = 0.0
    started: list[tuple[float, Fetch | Recompute]] = field(default_factory=list)

    def state(self, now_s: float, link: LinkEstimate, speeds: Speeds) -> PlanState:
        return PlanState(
            now_s,
            self.job.deadline_s,
            tuple(self.chunks),
            link,
            speeds,
            tuple(transfer.fetch for transfer in self.transfers),
            self.recomputing,
            self.recompute_began_s,
        )

    def distortion(self) -> float:
        total = sum(chunk.curve.tokens for chunk in self.chunks)
        return math.fsum(chunk.distortion * chunk.curve.tokens for chunk in self.chunks) / total


def run_jobs(
    jobs: Sequence[Job],
    policy: Policy,
    trace: Trace,
    *,
    latency_s: float,
    knowledge: Knowledge,
) -> list[Outcome]:
    """Run requests against a trace. latency_s: from asking to the first byte, of every fetch.

    knowledge: learned from as transfers and prefills end. Returns: outcomes in order of the jobs.
    """
    runs = [_Run(job, [ChunkState(curve) for curve in job.curves]) for job in jobs]
    return _Clock(runs, policy, trace, latency_s, knowledge).run()


def play_out(
    policy: Policy, state: PlanState
) -> tuple[Outcome, tuple[tuple[float, Fetch | Recompute], ...]]:
    """Run one request on from where it stands, as if its estimates were the truth.

    Fetches under way are taken to have just begun. Returns: the outcome, and what is begun when.
    """
    chunks = [chunk for chunk in state.chunks]
    seconds = tuple(state.recompute_s(index) for index in range(len(chunks)))
    job = Job(
        state.now_s,
        state.deadline_s,
        tuple(chunk.curve for chunk in chunks),
        seconds if state.speeds.prefill is not None else None,
        state.speeds.decode_bytes_per_s,
    )
    run = _Run(job, chunks, recomputing=state.recomputing)
    for fetch in state.fetches:
        run.transfers.append(_Transfer(fetch, state.now_s, float(fetch.end - fetch.begin)))
    for index, chunk in enumerate(chunks):
        if chunk.decoded_bytes < chunk.fetched_bytes:
            rest = Fetch(index, chunk.decoded_bytes, chunk.fetched_bytes, chunk.level)
            takes = (rest.end - rest.begin) / job.decode_bytes_per_s
            begins = run.decoding[-1][0] if run.decoding else state.now_s
            run.decoding.append((begins + takes, takes, rest))
    if state.recomputing is not None:
        run.recompute_began_s = state.recompute_began_s
        run.recompute_ends_s = state.now_s + state.recompute_left_s()
    link = constant_trace(state.link.rate_bytes_per_s())
    clock = _Clock([run], policy, link, state.link.latency_s, Certainty(state.link, state.speeds))
    return clock.run()[0], tuple(run.started)


class _Clock:
    """The event loop: find the next instant at which anything changes, go there, ask again."""

    def __init__(
        self,
        runs: Sequence[_Run],
        policy: Policy,
        trace: Trace,
        latency_s: float,
        knowledge: Knowledge,
    ) -> None:
        self._policy = policy
        self._trace = trace
        self._latency_s = latency_s
        self._knowledge = knowledge
        self._runs = list(runs)
        self._waiting = deque(sorted(self._runs, key=lambda run: run.job.arrival_s))
        self._active: list[_Run] = []
        self._now = self._waiting[0].job.arrival_s if self._waiting else 0.0

    def run(self) -> list[Outcome]:
        while self._active or self._waiting:
            flowing = self._flowing()
            next_s = self._next_event(flowing)
            self._carry(flowing, next_s)
            self._now = next_s
            self._settle()
        outcomes = [run.outcome for run in self._runs]
        assert all(outcome is not None for outcome in outcomes)
        return [outcome for outcome in outcomes if outcome is not None]

    def _flowing(self) -> list[tuple[_Transfer, float]]:
        """Return the transfers that get bytes now: the oldest of every request, once it flows.

        With each the share of the link that it gets.
        """
        heads = [
            (run.job.deadline_s, run.transfers[0])
            for run in self._active
            if run.transfers and run.transfers[0].flows_s <= self._now + _EPSILON_S
        ]
        for _, head in heads:
            if head.began_s is None:
                head.began_s = self._now
        # A deadline that is past gives no right of way: it cannot be met any more.
        ahead = [deadline_s for deadline_s, _ in heads if deadline_s > self._now]
        if not ahead:
            return [(head, 1.0 / len(heads)) for _, head in heads]
        first = min(ahead)
        equal = (1.0 - FIRST_SHARE) / len(heads)
        extra = FIRST_SHARE / ahead.count(first)
        return [
            (head, equal + extra if deadline_s == first else equal) for deadline_s, head in heads
        ]

    def _next_event(self, flowing: Sequence[tuple[_Transfer, float]]) -> float:
        times = [self._waiting[0].job.arrival_s] if self._waiting else []
        for run in self._active:
            times.append(run.job.arrival_s + GIVE_UP_S)
            times.append(run.wakes_s)
            times.append(run.recompute_ends_s)
            if run.at_deadline is None:
                times.append(run.job.deadline_s)
            if run.transfers and run.transfers[0].flows_s > self._now + _EPSILON_S:
                times.append(run.transfers[0].flows_s)
            if run.decoding:
                times.append(run.decoding[0][0])
        if flowing:
            rate, until_s = self._trace.rate_at(self._now)
            times.append(until_s)
            if rate > 0:
                least_s = min(transfer.left / share for transfer, share in flowing) / rate
                times.append(self._now + least_s)
        return max(min(times), self._now)

    def _carry(self, flowing: Sequence[tuple[_Transfer, float]], next_s: float) -> None:
        if not flowing or next_s <= self._now:
            return
        carried = self._trace.rate_at(self._now)[0] * (next_s - self._now)
        for transfer, share in flowing:
            transfer.left -= carried * share

    def _settle(self) -> None:
        """Take in everything that has happened by now, and ask whoever it happened to."""
        now = self._now
        asking: list[_Run] = []
        for run in self._active:
            changed = self._arrivals(run)
            changed |= self._decodes(run)
            changed |= self._prefills(run)
            if run.at_deadline is None and now >= run.job.deadline_s - _EPSILON_S:
                run.at_deadline = run.distortion()
                changed = True
            if changed or run.wakes_s <= now + _EPSILON_S:
                asking.append(run)
        while self._waiting and self._waiting[0].job.arrival_s <= now + _EPSILON_S:
            run = self._waiting.popleft()
            self._active.append(run)
            asking.append(run)
        for run in asking:
            self._ask(run)
        for run in self._active:
            if run.outcome is None and now >= run.job.arrival_s + GIVE_UP_S - _EPSILON_S:
                self._end(run, math.inf)
        self._active = [run for run in self._active if run.outcome is None]

    def _arrivals(self, run: _Run) -> bool:
        changed = False
        while run.transfers and run.transfers[0].left <= _EPSILON_BYTES:
            transfer = run.transfers.popleft()
            fetch, began = transfer.fetch, transfer.began_s
            size = fetch.end - fetch.begin
            run.fetched += size
            assert began is not None
            self._knowledge.transferred(
                size,
                max(self._now - began, _EPSILON_S),
                now_s=self._now,
                first_byte_s=self._latency_s,
            )
            chunk = run.chunks[fetch.chunk]
            run.chunks[fetch.chunk] = replace(chunk, fetched_bytes=fetch.end)
            begins = max(self._now, run.decoding[-1][0] if run.decoding else 0.0)
            takes = size / run.job.decode_bytes_per_s
            run.decoding.append((begins + takes, takes, fetch))
            changed = True
        return changed

    def _decodes(self, run: _Run) -> bool:
        changed = False
        while run.decoding and run.decoding[0][0] <= self._now + _EPSILON_S:
            _, takes, fetch = run.decoding.popleft()
            self._knowledge.decoded(fetch.end - fetch.begin, takes)
            chunk = run.chunks[fetch.chunk]
            run.chunks[fetch.chunk] = replace(chunk, decoded_bytes=fetch.end)
            changed = True
        return changed

    def _prefills(self, run: _Run) -> bool:
        if run.recompute_ends_s > self._now + _EPSILON_S or run.recomputing is None:
            return False
        index = run.recomputing
        curve = run.chunks[index].curve
        seconds = run.recompute_ends_s - run.recompute_began_s
        self._knowledge.prefilled(curve.begin_token, curve.tokens, seconds)
        run.chunks[index] = replace(run.chunks[index], recomputed=True)
        run.recomputing, run.recompute_ends_s = None, math.inf
        return True

    def _ask(self, run: _Run) -> None:
        """Start what the policy wants, until it waits or hands over."""
        link = self._knowledge.link(self._now)
        state = run.state(self._now, link, self._knowledge.speeds())
        while True:
            action = self._policy.next(state)
            if isinstance(action, Wait):
                # A wait for something that is past would ask again at once, for ever.
                run.wakes_s = action.until_s if action.until_s > self._now else math.inf
                return
            if isinstance(action, HandOver):
                self._end(run, self._now)
                return
            state = state.started(action)
            run.started.append((self._now, action))
            if isinstance(action, Recompute):
                assert run.job.recompute_s is not None and run.recomputing is None
                run.recomputing, run.recompute_began_s = action.chunk, self._now
                run.recompute_ends_s = self._now + run.job.recompute_s[action.chunk]
            else:
                run.chunks = list(state.chunks)
                flows_s = self._now + self._latency_s
                size = float(action.end - action.begin)
                run.transfers.append(_Transfer(action, flows_s, size))

    def _end(self, run: _Run, ready_s: float) -> None:
        now = run.distortion()
        run.outcome = Outcome(
            ready_s,
            now if run.at_deadline is None else run.at_deadline,
            now,
            round(run.fetched + sum(_arrived(transfer) for transfer in run.transfers)),
            sum(chunk.curve.tokens for chunk in run.chunks if chunk.recomputed),
        )


def _arrived(transfer: _Transfer) -> float:
    return transfer.fetch.end - transfer.fetch.begin - transfer.left
