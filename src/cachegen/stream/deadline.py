"""The ``deadline`` policy: least expected distortion, late with at most a given probability.

A ``progressive`` object can be handed over at any step, so the only way to be late is a chunk that
has nothing usable. First steps therefore come before everything else, from the back, while the
machine recomputes from the front; the two meet. What is left of the link then goes wherever a byte
removes most expected distortion, over all chunks. Because the curves are convex that order is the
best one for every amount of bytes that may still come: no bet on the bandwidth is made. Only where
levels are separate objects a level has to be chosen, by the probability of being late with it.

Source: greedy on convex curves is reverse water-filling; Cake (arXiv 2410.03065) for the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cachegen.errors import ConfigError
from cachegen.stream.plan import (
    Action,
    ChunkState,
    Fetch,
    HandOver,
    PlanState,
    Recompute,
)
from cachegen.stream.rules import start_recompute, wait

# A refinement is asked for unless it is this likely to come too late.
TOO_LATE = 0.95


@dataclass(frozen=True)
class DeadlinePolicy:
    """Least expected distortion at the deadline.

    late_target: accepted probability that a chunk left to recomputing is not ready; where it is
        higher, its first step is fetched as well.
    recompute: "always" recomputes from the front for as long as the deadline allows, as the machine
        has nothing else to do; "needed" only what the link would bring too late with more than
        late_target; "never" leaves the machine alone.
    enough_distortion: mean distortion at which nothing more is fetched; 0 uses all of the time.
    """

    late_target: float = 0.05
    recompute: Literal["always", "needed", "never"] = "always"
    enough_distortion: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.late_target < 1:
            raise ConfigError("late_target", got=self.late_target, expected="between 0 and 1")
        if self.recompute not in ("always", "needed", "never"):
            raise ConfigError("recompute", got=self.recompute, expected="always, needed or never")

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "deadline"

    def next(self, state: PlanState) -> Action:
        """Return the next prefill, first step or refinement."""
        ready = state.is_ready
        if ready and state.left_s <= 0:
            return HandOver()
        asked = _Asked.of(state)
        odds = self._odds(state, asked)
        hopeless = not ready and self._is_hopeless(state, asked, odds)
        if state.recomputing is None:
            recompute = self._recompute(state, asked, odds, hopeless=hopeless)
            if recompute is not None:
                return recompute
        if state.wants_fetch:
            fetch = self._first_step(state, asked, odds, hopeless=hopeless)
            if fetch is None and state.left_s > 0:
                fetch = self._refinement(state, asked, odds)
            if fetch is not None:
                return fetch
        if ready and not state.is_arriving and state.recomputing is None:
            return HandOver()
        return wait(state)

    def _odds(self, state: PlanState, asked: _Asked) -> list[float]:
        """Return for every chunk the probability that it is recomputed by the deadline."""
        odds = [1.0 if chunk.recomputed else 0.0 for chunk in state.chunks]
        prefill = state.speeds.prefill
        if prefill is None or state.left_s <= 0:
            return odds
        needs_s = 0.0
        limit_s = state.left_s * (1.0 + 3.0 * prefill.deviation)
        running = state.recomputing
        if running is not None:
            needs_s = state.recompute_left_s()
            odds[running] = 1.0 - prefill.probability_late(needs_s, state.left_s)
        if self.recompute == "never":
            # Even so, what the store lacks has to be recomputed.
            return odds
        end = self._front_end(state, asked) if self.recompute == "needed" else len(odds)
        for index in range(end):
            if state.chunks[index].recomputed or index == running:
                continue
            curve = state.chunks[index].curve
            needs_s += prefill.seconds(curve.begin_token, curve.tokens)
            if needs_s > limit_s:
                break
            odds[index] = 1.0 - prefill.probability_late(needs_s, state.left_s)
        return odds

    def _front_end(self, state: PlanState, asked: _Asked) -> int:
        """Return how many chunks in front must be recomputed so that the rest arrives in time."""
        size = sum(
            chunk.curve.steps[0].end_bytes - asked.ends[index]
            for index, chunk in enumerate(state.chunks)
            if asked.is_open[index] and chunk.curve.steps
        )
        size += state.bytes_under_way
        for index, chunk in enumerate(state.chunks):
            if state.link.probability_late(size, state.left_s) <= self.late_target:
                return index
            if asked.is_open[index] and chunk.curve.steps:
                size -= chunk.curve.steps[0].end_bytes - asked.ends[index]
        return len(state.chunks)

    def _is_hopeless(self, state: PlanState, asked: _Asked, odds: list[float]) -> bool:
        """Return whether the deadline is more likely missed than not: then all speed counts."""
        if state.left_s <= 0:
            return True
        size = state.bytes_under_way
        for index, chunk in enumerate(state.chunks):
            if asked.is_open[index] and odds[index] < 0.5:
                if not chunk.curve.steps:
                    return True
                size += chunk.curve.steps[0].end_bytes - asked.ends[index]
        return state.link.probability_late(size, state.left_s) > 0.5

    def _recompute(
        self, state: PlanState, asked: _Asked, odds: list[float], *, hopeless: bool
    ) -> Recompute | None:
        """Return the next prefill: a chunk with nothing yet, else the first lossy one."""
        for index, chunk in enumerate(state.chunks):
            if not chunk.is_present:
                must = (hopeless and self.recompute != "never") or not chunk.curve.steps
                if asked.is_open[index] and (must or odds[index] >= 0.5):
                    return start_recompute(state, index)
                break
        if self.recompute != "always":
            return None
        for index, chunk in enumerate(state.chunks):
            if not chunk.recomputed:
                return start_recompute(state, index) if odds[index] >= 0.5 else None
        return None

    def _first_step(
        self, state: PlanState, asked: _Asked, odds: list[float], *, hopeless: bool
    ) -> Fetch | None:
        """Return the first step of the last chunk that is not safely left to recomputing.

        Where nothing is recomputed a chunk is of use only with all before it: then the first one.
        """
        places = range(len(state.chunks))
        for index in places if state.speeds.prefill is None else reversed(places):
            steps = state.chunks[index].curve.steps
            if not steps or index == state.recomputing or not asked.is_open[index]:
                continue
            if hopeless or odds[index] < 1.0 - self.late_target:
                separate = state.chunks[index].curve.separate
                level = self._level(state, asked, odds) if separate and not hopeless else 0
                return _fetch(state, index, asked.ends[index], level)
        return None

    def _level(self, state: PlanState, asked: _Asked, odds: list[float]) -> int:
        """Return the finest level at which all that is still open is in time, or the coarsest.

        Where levels are separate objects nothing can be refined later, so the risk is taken here.
        """
        open_chunks = [
            chunk.curve.steps
            for index, chunk in enumerate(state.chunks)
            if odds[index] < 1.0 - self.late_target
            and index != state.recomputing
            and chunk.curve.steps
            and asked.is_open[index]
        ]
        for level in range(max(map(len, open_chunks)) - 1, 0, -1):
            size = state.bytes_under_way
            size += sum(steps[min(level, len(steps) - 1)].end_bytes for steps in open_chunks)
            if state.link.probability_late(size, state.left_s) <= self.late_target:
                return level
        return 0

    def _refinement(self, state: PlanState, asked: _Asked, odds: list[float]) -> Fetch | None:
        """Return the step that removes most expected distortion per byte, anywhere."""
        best, best_index, best_step, left = 0.0, -1, 0, 0.0
        for index, chunk in enumerate(state.chunks):
            if chunk.recomputed or not chunk.curve.steps or chunk.curve.separate:
                continue
            curve, at = chunk.curve, asked.ends[index]
            step = asked.steps[index]
            now = curve.steps[step - 1].distortion if step else 1.0
            doubt = 1.0 - odds[index]
            left += now * curve.tokens * doubt
            if step == 0 or step >= len(curve.steps) or doubt <= self.late_target:
                continue
            size = curve.steps[step].end_bytes - at
            gain = (now - curve.steps[step].distortion) * curve.tokens * doubt / size
            # Equal gains go to the later chunk: the front may yet be recomputed.
            if gain >= best and gain > 0:
                best, best_index, best_step = gain, index, step
        total = sum(chunk.curve.tokens for chunk in state.chunks)
        if best_index < 0 or left <= self.enough_distortion * total:
            return None
        fetch = _fetch(state, best_index, asked.ends[best_index], best_step)
        size = state.bytes_under_way + fetch.end - fetch.begin
        if state.link.probability_late(size, state.left_s) > TOO_LATE:
            return None
        return fetch


@dataclass(frozen=True)
class _Asked:
    """What is there of every chunk once all that is under way has arrived.

    ends: bytes of its object. steps: how many steps they reach. is_open: nothing usable at all.
    """

    ends: list[int]
    steps: list[int]
    is_open: list[bool]

    @classmethod
    def of(cls, state: PlanState) -> _Asked:
        ends = [chunk.fetched_bytes for chunk in state.chunks]
        for fetch in state.fetches:
            ends[fetch.chunk] = max(ends[fetch.chunk], fetch.end)
        steps = [
            _steps_within(chunk, end) if end else 0
            for chunk, end in zip(state.chunks, ends, strict=True)
        ]
        is_open = [
            not (count or chunk.recomputed)
            for chunk, count in zip(state.chunks, steps, strict=True)
        ]
        return cls(ends, steps, is_open)


def _steps_within(chunk: ChunkState, size_bytes: int) -> int:
    """Return how many steps so many bytes reach."""
    steps = chunk.curve.steps
    if chunk.curve.separate:
        level = chunk.level
        whole = level is not None and size_bytes >= steps[level].end_bytes
        return level + 1 if whole and level is not None else 0
    count = 0
    for step in steps:
        if step.end_bytes > size_bytes:
            break
        count += 1
    return count


def _fetch(state: PlanState, index: int, at: int, step: int) -> Fetch:
    curve = state.chunks[index].curve
    step = min(step, len(curve.steps) - 1)
    end = curve.steps[step].end_bytes
    return Fetch(index, 0, end, step) if curve.separate else Fetch(index, at, end)
