"""The ``hybrid`` policy: recompute from the front while loading from the back, until they meet.

Source: Cake (arXiv 2410.03065), whose aim is the earliest meeting at one quality; here each chunk
gets the finest quality with which the two still meet before the deadline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cachegen.errors import ConfigError
from cachegen.stream.plan import Action, Fetch, HandOver, PlanState
from cachegen.stream.rules import fetch_step, start_recompute, wait


@dataclass(frozen=True)
class HybridPolicy:
    """Two pointers that meet. late_target: accepted probability that they meet too late."""

    late_target: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.late_target < 1:
            raise ConfigError("late_target", got=self.late_target, expected="between 0 and 1")

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "hybrid"

    def next(self, state: PlanState) -> Action:
        """Return the next chunk from the front to recompute, or from the back to load."""
        ready = state.is_ready
        if ready and (not state.is_arriving or state.left_s <= 0):
            return HandOver()
        front = self._front(state)
        if front is not None and state.recomputing is None:
            recompute = start_recompute(state, front)
            if recompute is not None:
                return recompute
        if state.wants_fetch and not ready:
            fetch = self._load(state)
            if fetch is not None:
                return fetch
        return wait(state)

    def _front(self, state: PlanState) -> int | None:
        """Return the first chunk that nobody has taken yet."""
        for index, chunk in enumerate(state.chunks):
            if not chunk.recomputed and state.asked_bytes(index) == 0:
                return None if index == state.recomputing else index
        return None

    def _load(self, state: PlanState) -> Fetch | None:
        """Return the next step of the chunk that is being loaded, or the first of the one before.

        A chunk is loaded step by step up to the quality that fits; as long as any chunk before it
        has nothing, it is left at that and the pointer moves on.
        """
        last = None
        for index in range(len(state.chunks) - 1, -1, -1):
            chunk = state.chunks[index]
            if chunk.recomputed or index == state.recomputing or not chunk.curve.steps:
                continue
            if state.asked_bytes(index) == 0:
                # The chunk behind the pointer may still deserve its next step.
                step = self._step(state, index)
                if last is not None and not chunk.curve.separate:
                    fetch = fetch_step(state, last, min(step, self._top(state, last)))
                    if fetch is not None:
                        return self._one_step(state, fetch)
                return fetch_step(state, index, step if chunk.curve.separate else 0)
            last = index
        return None

    def _top(self, state: PlanState, index: int) -> int:
        return len(state.chunks[index].curve.steps) - 1

    def _one_step(self, state: PlanState, fetch: Fetch) -> Fetch:
        """Cut a fetch down to its first step, so that the next one is decided anew."""
        for step in state.chunks[fetch.chunk].curve.steps:
            if step.end_bytes > fetch.begin:
                return Fetch(fetch.chunk, fetch.begin, step.end_bytes)
        return fetch

    def _step(self, state: PlanState, pointer: int) -> int:
        """Return the finest step with which front and back meet before the deadline, or 0."""
        rate = state.link.rate_bytes_per_s(self.late_target)
        left_s = state.left_s - state.link.latency_s
        if left_s <= 0:
            return 0
        open_chunks = [
            index
            for index in range(pointer + 1)
            if not state.chunks[index].recomputed
            and index != state.recomputing
            and state.asked_bytes(index) == 0
        ]
        needs_s, recomputed = state.recompute_left_s(), 0
        for index in open_chunks:
            needs_s += state.recompute_s(index)
            if needs_s > left_s or math.isinf(needs_s):
                break
            recomputed += 1
        loaded = open_chunks[recomputed:] or [pointer]
        budget = rate * left_s - state.bytes_under_way
        most = max(len(state.chunks[index].curve.steps) for index in loaded)
        for step in range(most - 1, 0, -1):
            size = 0
            for index in loaded:
                steps = state.chunks[index].curve.steps
                size += steps[min(step, len(steps) - 1)].end_bytes if steps else 0
            if size <= budget:
                return step
        return 0
