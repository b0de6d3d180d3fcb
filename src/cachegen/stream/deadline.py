"""The ``deadline`` policy: least expected distortion, late with at most a given probability.

A ``progressive`` object can be handed over at any step, so the only way to be late is a chunk that
has nothing usable. First steps therefore come before everything else, from the back, while the
machine recomputes from the front; the two meet. What is left of the link then goes wherever a byte
removes most expected distortion, over all chunks. Because the curves are convex that order is the
best one for every amount of bytes that may still come: no bet on the bandwidth is made.

Source: greedy on convex curves is reverse water-filling; Cake (arXiv 2410.03065) for the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cachegen.errors import ConfigError
from cachegen.stream.plan import Action, Fetch, HandOver, PlanState, Recompute
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
        asked = _asked(state)
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
        if ready and not state.fetches and state.recomputing is None:
            return HandOver()
        return wait(state)

    def _odds(self, state: PlanState, asked: list[int]) -> list[float]:
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
            needs_s += state.recompute_s(index)
            if needs_s > limit_s:
                break
            odds[index] = 1.0 - prefill.probability_late(needs_s, state.left_s)
        return odds

    def _front_end(self, state: PlanState, asked: list[int]) -> int:
        """Return how many chunks in front must be recomputed so that the rest arrives in time."""
        size = sum(
            chunk.curve.steps[0].end_bytes - asked[index]
            for index, chunk in enumerate(state.chunks)
            if _is_open(state, asked, index) and chunk.curve.steps
        )
        size += state.bytes_under_way
        for index, chunk in enumerate(state.chunks):
            if state.link.probability_late(size, state.left_s) <= self.late_target:
                return index
            if _is_open(state, asked, index) and chunk.curve.steps:
                size -= chunk.curve.steps[0].end_bytes - asked[index]
        return len(state.chunks)

    def _is_hopeless(self, state: PlanState, asked: list[int], odds: list[float]) -> bool:
        """Return whether the deadline is more likely missed than not: then all speed counts."""
        if state.left_s <= 0:
            return True
        size = state.bytes_under_way
        for index, chunk in enumerate(state.chunks):
            if _is_open(state, asked, index) and odds[index] < 0.5:
                if not chunk.curve.steps:
                    return True
                size += chunk.curve.steps[0].end_bytes - asked[index]
        return state.link.probability_late(size, state.left_s) > 0.5

    def _recompute(
        self, state: PlanState, asked: list[int], odds: list[float], *, hopeless: bool
    ) -> Recompute | None:
        """Return the next prefill: a chunk with nothing yet, else the first lossy one."""
        for index, chunk in enumerate(state.chunks):
            if not chunk.is_present:
                must = hopeless or not chunk.curve.steps
                if _is_open(state, asked, index) and (must or odds[index] >= 0.5):
                    return start_recompute(state, index)
                break
        if self.recompute != "always":
            return None
        for index, chunk in enumerate(state.chunks):
            if not chunk.recomputed:
                return start_recompute(state, index) if odds[index] >= 0.5 else None
        return None

    def _first_step(
        self, state: PlanState, asked: list[int], odds: list[float], *, hopeless: bool
    ) -> Fetch | None:
        """Return the first step of the last chunk that is not safely left to recomputing."""
        for index in range(len(state.chunks) - 1, -1, -1):
            steps = state.chunks[index].curve.steps
            if not steps or index == state.recomputing or not _is_open(state, asked, index):
                continue
            if hopeless or odds[index] < 1.0 - self.late_target:
                return _fetch(state, index, asked[index], 0)
        return None

    def _refinement(self, state: PlanState, asked: list[int], odds: list[float]) -> Fetch | None:
        """Return the step that removes most expected distortion per byte, anywhere."""
        best, best_index, best_step, left = 0.0, -1, 0, 0.0
        for index, chunk in enumerate(state.chunks):
            if chunk.recomputed or not chunk.curve.steps:
                continue
            curve, at = chunk.curve, asked[index]
            step = _steps_within(state, index, at)
            now = curve.steps[step - 1].distortion if step else 1.0
            doubt = 1.0 - odds[index]
            left += now * curve.tokens * doubt
            if step == 0 or step >= len(curve.steps) or doubt <= self.late_target:
                continue
            size = curve.steps[step].end_bytes - (0 if curve.separate else at)
            gain = (now - curve.steps[step].distortion) * curve.tokens * doubt / size
            # Equal gains go to the later chunk: the front may yet be recomputed.
            if gain >= best and gain > 0:
                best, best_index, best_step = gain, index, step
        total = sum(chunk.curve.tokens for chunk in state.chunks)
        if best_index < 0 or left <= self.enough_distortion * total:
            return None
        fetch = _fetch(state, best_index, asked[best_index], best_step)
        size = state.bytes_under_way + fetch.end - fetch.begin
        if state.link.probability_late(size, state.left_s) > TOO_LATE:
            return None
        return fetch


def _asked(state: PlanState) -> list[int]:
    """Return for every chunk how far it is fetched once all that is under way has arrived."""
    asked = [chunk.fetched_bytes for chunk in state.chunks]
    for fetch in state.fetches:
        asked[fetch.chunk] = max(asked[fetch.chunk], fetch.end)
    return asked


def _is_open(state: PlanState, asked: list[int], index: int) -> bool:
    """Return whether a chunk has nothing usable, not even under way."""
    chunk = state.chunks[index]
    if chunk.recomputed:
        return False
    return _steps_within(state, index, asked[index]) == 0


def _steps_within(state: PlanState, index: int, size_bytes: int) -> int:
    """Return how many steps so many bytes reach."""
    chunk = state.chunks[index]
    steps = chunk.curve.steps
    if chunk.curve.separate:
        level = chunk.level
        whole = level is not None and size_bytes >= steps[level].end_bytes
        return level + 1 if whole and level is not None else 0
    count = 0
    while count < len(steps) and steps[count].end_bytes <= size_bytes:
        count += 1
    return count


def _fetch(state: PlanState, index: int, at: int, step: int) -> Fetch:
    curve = state.chunks[index].curve
    end = curve.steps[step].end_bytes
    return Fetch(index, 0, end, step) if curve.separate else Fetch(index, at, end)
