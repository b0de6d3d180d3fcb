"""One request for chunks as a state machine: no thread, no clock, no store.

``fetch.Fetcher`` calls it under its lock and does the waiting, reading and decoding. All times are
those of the caller's clock, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from cachegen.chunk import KVChunk
from cachegen.stream.outcome import FetchedChunk, FetchReport, Reason, reason_of
from cachegen.stream.plan import Policy
from cachegen.stream.progress import ChunkProgress, Stage
from cachegen.stream.reading import Keys, Reading

# Decoding begins early enough for this much more time than it is expected to take, and for threads
# that a busy machine wakes late: a share of the time that there is, within bounds.
DECODE_MARGIN = 1.3
SLACK_SHARE = 0.04
MIN_SLACK_S, MAX_SLACK_S = 0.004, 0.05

DecodeCost = Callable[[int], float]


@dataclass(frozen=True, eq=False)
class Task:
    """Something for a worker to do: decode (READY), deliver (DECODED) or recompute a chunk."""

    request: RequestState
    stage: Stage
    item: FetchedChunk


class RequestState(Reading):
    """A request under way. The caller holds a lock around every call.

    keys: for each chunk its key, or the keys of the objects that may serve it.
    policy: asked for every read. quality: nothing beyond it is read.
    decode_cost: seconds that decoding to so many bytes of KV is expected to take.
    can_recompute: the caller prefills what the policy says and what cannot be loaded; otherwise
        nothing behind the first chunk that does not come is of any use.
    delivers: chunks are handed to a callback, one at a time. decodes: False if that decodes them.
    """

    def __init__(
        self,
        keys: Keys,
        policy: Policy,
        *,
        now_s: float,
        decode_cost: DecodeCost,
        deadline_s: float = math.inf,
        quality: str | None = None,
        can_recompute: bool = False,
        delivers: bool = False,
        decodes: bool = True,
    ) -> None:
        super().__init__(keys, policy, quality=quality, can_recompute=can_recompute)
        self.began_s = now_s
        for chunk in self.chunks:
            chunk.request_s = chunk.arrived_s = now_s
        self.deadline_s = deadline_s
        share_s = SLACK_SHARE * (deadline_s - now_s)
        self._slack_s = min(MAX_SLACK_S, max(MIN_SLACK_S, share_s))
        self.served_turn = -1
        self.ended_s = now_s
        # In order of their tokens: how the chunks came out, as far as that is decided.
        self.items: list[FetchedChunk] = []
        self._decode_cost = decode_cost
        self._delivers = delivers
        self._decodes = decodes
        # The chunk that a worker delivers or recomputes; nothing is over before that has ended.
        self._delivering: ChunkProgress | None = None
        self._closing = False
        self._advance(now_s)

    def _owner(self) -> RequestState:
        return self

    # Time.

    def _decode_s(self, chunk: ChunkProgress) -> float:
        size = chunk.decoded_bytes
        if size is None:
            sizes = [other.decoded_bytes for other in self.chunks]
            size = max((known for known in sizes if known is not None), default=0)
        return self._decode_cost(size) * DECODE_MARGIN

    @property
    def plan_deadline_s(self) -> float:
        """When the last byte has to be here: the last decoding hides behind no transfer."""
        undone = (Stage.LOADING, Stage.READY, Stage.DECODING)
        costs = [self._decode_s(chunk) for chunk in self.chunks if chunk.stage in undone]
        return self.deadline_s - max(costs, default=0.0) - self._slack_s

    def _decode_starts(self) -> list[tuple[float, ChunkProgress]]:
        """Return for each chunk that loads when its decoding has to begin at the latest."""
        left_s, starts = self._slack_s, []
        for chunk in reversed(self.chunks):
            if chunk.stage in (Stage.LOADING, Stage.READY, Stage.DECODING):
                left_s += self._decode_s(chunk)
                if chunk.stage is Stage.LOADING:
                    starts.append((self.deadline_s - left_s, chunk))
        return starts[::-1]

    def next_due_s(self, now_s: float) -> float:
        """Return when ``tick`` has something to do next, after one now; inf for never."""
        if self.is_over or self._closing:
            return math.inf
        times = [start for start, chunk in self._decode_starts() if chunk.level is not None]
        times += [self.deadline_s, self._asleep_until_s]
        return min((time for time in times if time > now_s), default=math.inf)

    def tick(self, now_s: float) -> bool:
        """Let time pass: decode what has to be decoded now, end the request at its deadline.

        Returns: True if something changed.
        """
        if self.is_over or self._closing:
            return False
        if now_s >= self.deadline_s:
            self._close(Reason.LATE, now_s)
            return True
        changed = -math.inf < self._asleep_until_s <= now_s
        if changed:
            self._wake()
        for start, chunk in self._decode_starts():
            if start > now_s:
                break
            if chunk.level is not None:
                chunk.stage = Stage.READY
                self._wake()
                changed = True
        return changed

    # Decoding and delivery.

    @property
    def has_task(self) -> bool:
        """True if ``next_task`` has something for a worker."""
        return self._next_chunk() is not None

    def next_task(self) -> Task | None:
        """Return what a worker should do next. The caller reports back with ``end_task``."""
        chunk = self._next_chunk()
        if chunk is None:
            return None
        if chunk.stage is Stage.READY and self._decodes:
            chunk.stage = Stage.DECODING
            return Task(self, Stage.READY, self._whole(chunk))
        if chunk.stage is Stage.READY:
            chunk.item, chunk.stage = self._whole(chunk), Stage.DECODED
        elif chunk.stage is Stage.RECOMPUTING:
            chunk.item = chunk.fetched_chunk(Reason.RECOMPUTED)
        assert chunk.item is not None
        self._delivering = chunk
        return Task(self, chunk.stage, chunk.item)

    def _next_chunk(self) -> ChunkProgress | None:
        """Return the chunk that a worker has to do with next: its turn to be delivered first."""
        if self.is_over or self._closing:
            return None
        first = next((c for c in self.chunks if c.stage is not Stage.RESOLVED), None)
        if first is not None and self._delivering is None:
            if first.stage in (Stage.DECODED, Stage.RECOMPUTING):
                return first
            if first.stage is Stage.READY and not self._decodes:
                return first
        ready = (chunk for chunk in self.chunks if chunk.stage is Stage.READY)
        return next(ready, None) if self._decodes else None

    @property
    def is_decoding(self) -> bool:
        """True while encoded bytes will be freed by themselves."""
        return any(chunk.stage in (Stage.READY, Stage.DECODING) for chunk in self.chunks)

    def squeeze(self) -> bool:
        """Decode the first chunk that can be decoded although more of it could be read.

        Returns: False if there is none.
        """
        for chunk in self.chunks:
            if chunk.stage is Stage.LOADING and chunk.level is not None:
                chunk.stage = Stage.READY
                self._wake()
                return True
        return False

    def _whole(self, chunk: ChunkProgress) -> FetchedChunk:
        level = chunk.level
        assert level is not None
        return chunk.fetched_chunk(Reason.LOADED, data=chunk.object.prefix(level.end_bytes))

    def end_task(
        self,
        task: Task,
        now_s: float,
        *,
        chunk: KVChunk | None = None,
        error: Exception | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Take in what a worker did.

        chunk: the KV that was decoded or recomputed. error: what the work raised.
        """
        state = self.chunks[task.item.index]
        if task.stage is Stage.READY:
            if state.stage is not Stage.DECODING:
                return  # too late: nobody waits for it any more
            state.object.drop()
            if error is not None:
                self._lose(state, reason_of(error, Reason.DECODE_ERROR), error, now_s)
            else:
                state.item = replace(task.item, chunk=chunk, data=b"", decode_s=seconds)
                state.stage = Stage.DECODED
                if not self._delivers:
                    self._advance(now_s)
        else:
            self._delivering = None
            item = replace(task.item, data=b"")
            if task.stage is Stage.RECOMPUTING or not self._decodes:
                item = replace(item, chunk=chunk or item.chunk, decode_s=seconds)
            if error is not None:
                self._lose(state, reason_of(error, Reason.CALLBACK_ERROR), error, now_s)
            else:
                self._resolve(state, item, now_s)
            if self._closing:
                self._finish(now_s)
        self._wake()

    # Ends.

    def fence(self, now_s: float) -> None:
        """Take in that the fence said no: nothing is handed over any more."""
        self._delivering = None
        self.cancel(now_s, Reason.FENCED)

    def cancel(self, now_s: float, reason: Reason = Reason.CANCELLED) -> None:
        """Give up all that has not come; a delivery under way still ends first."""
        if not self.is_over:
            self._close(reason, now_s)

    def _stop_loading(self, now_s: float) -> None:
        """Decode what is here and give up the rest."""
        for chunk in self.chunks:
            self.has_work |= chunk.stage in (Stage.LOADING, Stage.LOST)
            if chunk.stage is Stage.LOADING and chunk.level is not None:
                chunk.stage = Stage.READY
            elif chunk.stage in (Stage.LOADING, Stage.LOST):
                reason = Reason.LEFT_OUT if chunk.error is None else reason_of(chunk.error)
                self._resolve(chunk, chunk.fetched_chunk(reason), now_s)

    def _lose(
        self, chunk: ChunkProgress, reason: Reason, error: Exception | None, now_s: float
    ) -> None:
        chunk.object.drop()
        chunk.error = error or chunk.error
        chunk.item = None
        self._wake()
        if self.can_recompute and not self._closing and reason is not Reason.CALLBACK_ERROR:
            chunk.stage = Stage.LOST
        else:
            self._resolve(chunk, chunk.fetched_chunk(reason, error), now_s)

    def _resolve(self, chunk: ChunkProgress, item: FetchedChunk, now_s: float) -> None:
        chunk.stage, chunk.item = Stage.RESOLVED, item
        chunk.object.drop()
        if not item.came:
            for later in self.chunks[chunk.index + 1 :]:
                if later.stage is not Stage.RESOLVED:
                    later.object.drop()
                    later.stage = Stage.RESOLVED
                    later.item = later.fetched_chunk(Reason.AFTER_MISS)
        self._advance(now_s)

    def _advance(self, now_s: float) -> None:
        """Move what is decided to ``items``, in order; ends the request behind the last chunk."""
        while len(self.items) < len(self.chunks) and not self.is_over:
            chunk = self.chunks[len(self.items)]
            if chunk.stage is Stage.DECODED and not self._delivers:
                chunk.stage = Stage.RESOLVED
            if chunk.stage is not Stage.RESOLVED or chunk.item is None:
                return
            self.items.append(chunk.item)
        if self._delivering is None:
            self._finish(now_s)

    def _close(self, reason: Reason, now_s: float) -> None:
        self._closing = True
        for chunk in self.chunks:
            if chunk.stage is not Stage.RESOLVED and chunk is not self._delivering:
                chunk.object.drop()
                chunk.stage = Stage.RESOLVED
                chunk.item = chunk.fetched_chunk(reason)
        self._advance(now_s)
        if self._delivering is None:
            self._finish(now_s)

    def _finish(self, now_s: float) -> None:
        if not self.is_over:
            self.is_over = True
            self.ended_s = now_s
            self.reads.clear()

    def report(self) -> FetchReport:
        """Sum up; call it when the request is over."""
        return FetchReport(
            tuple(self.items),
            self.ended_s - self.began_s,
            self.wire_bytes,
            self.sent_reads,
            self.hedged_reads,
        )
