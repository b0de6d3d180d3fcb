"""The plain rules to compare with: one fixed quality, and CacheGen's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cachegen.stream.plan import (
    Action,
    ChunkState,
    Fetch,
    HandOver,
    PlanState,
    Recompute,
    Wait,
)


@dataclass(frozen=True)
class FixedPolicy:
    """Load every chunk in order at one quality, however long it takes.

    step: index into the steps of every chunk; negative counts from the end. A chunk that the store
    lacks is recomputed.
    """

    step: int = -1

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "fixed"

    def next(self, state: PlanState) -> Action:
        """Return the next chunk in order."""
        if state.is_ready and not state.is_arriving:
            return HandOver()
        for index, chunk in enumerate(state.chunks):
            if not chunk.curve.steps:
                recompute = start_recompute(state, index)
                if recompute is not None:
                    return recompute
                continue
            step = _clamped(self.step, chunk)
            fetch = fetch_step(state, index, step)
            if fetch is not None:
                return fetch if state.wants_fetch else wait(state)
        return wait(state)


@dataclass(frozen=True)
class CachegenPolicy:
    """CacheGen's rule: assume the last chunk's throughput, take the least loss that fits.

    Chunk by chunk, in order: the text (no loss) if recomputing all that is left fits in the time
    left; else the finest level at which all that is left fits; if none fits, whichever is over
    first. Before anything was measured it takes the middle level. A level is a separate object,
    once asked for it is not changed.
    margin: share of the time left that levels are planned for; the paper uses all of it.
    Source: CacheGen (SIGCOMM'24), section 5.3 and Algorithm 1.
    """

    margin: float = 1.0

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "cachegen"

    def next(self, state: PlanState) -> Action:
        """Return the next chunk as level or as text."""
        if state.is_ready and not state.is_arriving:
            return HandOver()
        index = self._undecided(state)
        if index is None or state.recomputing is not None:
            return wait(state)
        level = self._level(state, index)
        if level is None:
            # Text is prefilled after everything before it, and the next decision waits for it.
            return start_recompute(state, index) or wait(state)
        fetch = fetch_step(state, index, level)
        return fetch if fetch is not None and state.wants_fetch else wait(state)

    def _undecided(self, state: PlanState) -> int | None:
        """Return the first chunk that is neither there nor asked for."""
        asked = {fetch.chunk for fetch in state.fetches}
        for index, chunk in enumerate(state.chunks):
            if not chunk.recomputed and chunk.fetched_bytes == 0 and index not in asked:
                return index
        return None

    def _level(self, state: PlanState, index: int) -> int | None:
        """Return the step for a chunk, or None for its text."""
        rest = range(index, len(state.chunks))
        steps = state.chunks[index].curve.steps
        left_s = state.left_s * self.margin
        text_s = math.fsum(state.recompute_s(chunk) for chunk in rest)
        if not steps or text_s <= state.left_s:
            return None
        rate = state.link.last_rate_bytes_per_s
        if rate is None:
            return len(steps) // 2
        # All that is left at each level; a chunk with fewer levels stays at its finest one.
        sizes = [state.bytes_under_way] * len(steps)
        for chunk in state.chunks[index:]:
            ends = [step.end_bytes for step in chunk.curve.steps]
            for level in range(len(steps) if ends else 0):
                sizes[level] += ends[min(level, len(ends) - 1)]
        delays = [size / rate for size in sizes]
        fitting = [level for level, delay in enumerate(delays) if delay <= left_s]
        if fitting:
            return fitting[-1]
        return None if text_s < delays[0] else 0


def _clamped(step: int, chunk: ChunkState) -> int:
    """Return the index of a step a chunk has; negative counts from the end."""
    count = len(chunk.curve.steps)
    return max(0, min(step if step >= 0 else count + step, count - 1))


def fetch_step(state: PlanState, index: int, step: int) -> Fetch | None:
    """Return what is still to be asked for, to have a chunk at a step; None if nothing is."""
    chunk = state.chunks[index]
    if chunk.recomputed or not chunk.curve.steps:
        return None
    begin, end = state.asked_bytes(index), chunk.curve.steps[step].end_bytes
    if begin >= end:
        return None
    return Fetch(index, begin, end, step if chunk.curve.separate else None)


def start_recompute(state: PlanState, index: int) -> Recompute | None:
    """Return the prefill of a chunk, if it can begin now: all before it is there, none runs."""
    if state.recomputing is not None or state.chunks[index].recomputed:
        return None
    if state.speeds.prefill is None:
        return None
    if not all(chunk.is_present for chunk in state.chunks[:index]):
        return None
    return Recompute(index)


def wait(state: PlanState) -> Wait:
    """Return a wait until something ends; before the deadline, at the latest until then."""
    return Wait(state.deadline_s if state.now_s < state.deadline_s else math.inf)
