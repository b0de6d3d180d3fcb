"""The reading half of a request: what is asked of the store next, and taking in what comes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cachegen.chunk import DEFAULT_CHUNK_TOKENS
from cachegen.errors import CacheGenError
from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.callbacks import Source
from cachegen.stream.outcome import Reason, reason_of
from cachegen.stream.partial import ObjectState
from cachegen.stream.plan import ChunkCurve, Fetch, HandOver, PlanState, Policy, Recompute
from cachegen.stream.progress import ChunkProgress, Stage
from cachegen.stream.speeds import Speeds
from cachegen.types import ChunkKey

if TYPE_CHECKING:
    from cachegen.stream.request import RequestState

# So many headers are read before the policy is asked; of later chunks it is told that they are like
# the one before them, until their headers come along with their first bytes.
HEADERS_FIRST = 8

# A store that streams delivers in slices of this length.
STREAM_BYTES = 64 << 10

# What a policy is told of a request that has all the time in the world.
NO_DEADLINE_S = 3600.0

Keys = Sequence[ChunkKey | Sequence[ChunkKey]]


@dataclass(eq=False)
class Read:
    """Bytes [begin, end) of one object that were asked of the store.

    sent: how many calls were made for it; the first answer wins. overtaken: a read that was sent
    later is over already. failed: one of two calls failed.
    """

    owner: RequestState
    chunk: int
    version: int
    begin: int
    end: int
    started_s: float
    sent: int = 1
    overtaken: bool = False
    failed: bool = False
    done: bool = False

    @property
    def name(self) -> str:
        """Name of the object in the store."""
        return self.owner.chunks[self.chunk].versions[self.version].key.name

    @property
    def is_overtaken_once(self) -> bool:
        """True if a second call for its bytes may be worth it."""
        return self.overtaken and self.sent == 1

    @property
    def is_wanted(self) -> bool:
        """False once the request or the chunk has no more use for the answer."""
        stage = self.owner.chunks[self.chunk].stage
        return not self.done and not self.owner.is_over and stage is Stage.LOADING


def parts_of(source: Source, read: Read) -> Generator[bytes | None]:
    """Yield the bytes of a read as they come; None if there is no such object."""
    stream = getattr(source, "get_stream", None)
    if stream is None:
        yield source.get_range(read.name, read.begin, read.end)
        return
    slices = stream(read.name, slice_bytes=STREAM_BYTES, begin=read.begin, end=read.end)
    if slices is None:
        yield None
        return
    try:
        for part in slices:
            yield bytes(part)
    finally:
        close = getattr(slices, "close", None)
        if close is not None:
            close()


@dataclass(eq=False)
class _Order:
    """A fetch of the policy; it is cut into reads, and under way until all of it is here."""

    chunk: ChunkProgress
    version: int
    begin: int
    end: int

    @property
    def left(self) -> ObjectState | None:
        """The object, if not all reads of this order have been sent; else None."""
        entry = self.chunk.versions[self.version]
        wanted = self.chunk.stage is Stage.LOADING and entry.asked_bytes < self._last(entry)
        return entry if wanted else None

    @property
    def is_under_way(self) -> bool:
        """True until all of it is here."""
        entry = self.chunk.versions[self.version]
        return self.chunk.stage is Stage.LOADING and entry.have_bytes < self._last(entry)

    def _last(self, entry: ObjectState) -> int:
        """Where it ends: the policy may have guessed the length of the object."""
        end = min(self.end, entry.limit_bytes)
        return end if entry.header is None else min(end, entry.header.object_bytes)


class Reading(ABC):
    """Chunks of a request and the reads for them.

    chunks: one entry for every key. reads: those under way, oldest first.
    has_work: set when the policy has left something for a worker; whoever wakes them clears it.
    """

    def __init__(
        self, keys: Keys, policy: Policy, *, quality: str | None, can_recompute: bool
    ) -> None:
        self.policy = policy
        self.quality = quality
        self.can_recompute = can_recompute
        self.is_over = False
        self.has_work = False
        self.reads: list[Read] = []
        self.wire_bytes = self.sent_reads = self.hedged_reads = 0
        self.chunks = [
            ChunkProgress(
                index, tuple(map(ObjectState, [key] if isinstance(key, ChunkKey) else key))
            )
            for index, key in enumerate(keys)
        ]
        self._orders: list[_Order] = []
        self._asleep_until_s = -math.inf
        self._recompute_began_s = 0.0

    @abstractmethod
    def _lose(
        self, chunk: ChunkProgress, reason: Reason, error: Exception | None, now_s: float
    ) -> None:
        """Take in that a chunk cannot be loaded."""

    @abstractmethod
    def _stop_loading(self, now_s: float) -> None:
        """Decode what is here and give up the rest."""

    @abstractmethod
    def _owner(self) -> RequestState:
        """Return the request itself."""

    @property
    @abstractmethod
    def plan_deadline_s(self) -> float:
        """When the last byte has to be here."""

    def next_read(
        self, now_s: float, *, link: LinkEstimate, speeds: Speeds, slice_bytes: int
    ) -> Read | None:
        """Return the next read to send, or None if there is nothing to read now."""
        if self.is_over or now_s < self._asleep_until_s:
            return None
        first = self.chunks[:HEADERS_FIRST]
        for chunk in first:
            read = self._read_header(chunk, now_s)
            if read is not None:
                return read
        if any(chunk.stage is Stage.LOADING and chunk.curve is None for chunk in first):
            return None
        while True:
            self._orders = [order for order in self._orders if order.is_under_way]
            for order in self._orders:
                entry = order.left
                if entry is not None:
                    end = min(order.end, entry.asked_bytes + slice_bytes)
                    if entry.header is None:
                        end = max(end, entry.header_bytes)
                    return self._send(order.chunk, order.version, end, now_s)
            if not self._ask(now_s, link, speeds):
                return None

    def _read_header(self, chunk: ChunkProgress, now_s: float) -> Read | None:
        if chunk.stage is Stage.LOADING and chunk.curve is None:
            for version, entry in enumerate(chunk.versions):
                if entry.header is None and not entry.missing:
                    end = entry.header_bytes
                    if entry.asked_bytes < end:
                        return self._send(chunk, version, end, now_s)
        return None

    def _send(self, chunk: ChunkProgress, version: int, end: int, now_s: float) -> Read:
        entry = chunk.versions[version]
        read = Read(self._owner(), chunk.index, version, entry.asked_bytes, end, now_s)
        entry.asked_bytes = end
        chunk.began_s = min(chunk.began_s, now_s)
        self.reads.append(read)
        self.sent_reads += 1
        return read

    def _ask(self, now_s: float, link: LinkEstimate, speeds: Speeds) -> bool:
        """Ask the policy. Returns: True if there is something new to do."""
        if not any(chunk.stage in (Stage.LOADING, Stage.LOST) for chunk in self.chunks):
            return self._sleep(math.inf, now_s)  # nothing is left to decide
        state = self._plan_state(now_s, link, speeds)
        action = self.policy.next(state) if state.chunks else HandOver()
        if isinstance(action, Fetch):
            chunk = self.chunks[action.chunk]
            if action.level is not None:
                if not chunk.choices:
                    chunk.choices = self._example.choices
                chunk.version = chunk.choices[action.level]
            order = _Order(chunk, chunk.version, action.begin, action.end)
            is_new = not chunk.is_chosen or order.left is not None
            chunk.is_chosen = True
            if order.is_under_way:
                self._orders.append(order)
            return is_new or self._sleep(math.inf, now_s)
        if isinstance(action, Recompute):
            chunk = self.chunks[action.chunk]
            is_new = chunk.stage in (Stage.LOADING, Stage.LOST)
            if is_new:
                chunk.stage = Stage.RECOMPUTING
                self.has_work = True
                self._recompute_began_s = now_s
            return is_new or self._sleep(math.inf, now_s)
        if isinstance(action, HandOver):
            self._stop_loading(now_s)
            return self._sleep(math.inf, now_s)
        return self._sleep(action.until_s, now_s)

    def _sleep(self, until_s: float, now_s: float) -> bool:
        """Do not ask again before something has ended, or that time. Returns: False."""
        self._asleep_until_s = until_s if until_s > now_s else math.inf
        if self._asleep_until_s >= self.plan_deadline_s and not self._is_busy:
            self._stop_loading(now_s)  # nothing will ever change
        return False

    @property
    def _is_busy(self) -> bool:
        """True while something is under way that will end by itself."""
        working = (Stage.READY, Stage.DECODING, Stage.DECODED, Stage.RECOMPUTING)
        return bool(self.reads) or any(chunk.stage in working for chunk in self.chunks)

    @property
    def _example(self) -> ChunkProgress:
        """A chunk whose curve is known, for those whose curve is not."""
        return next(chunk for chunk in self.chunks if chunk.curve is not None)

    def _plan_state(self, now_s: float, link: LinkEstimate, speeds: Speeds) -> PlanState:
        views = []
        like, token = ChunkCurve(DEFAULT_CHUNK_TOKENS, 0, ()), 0
        known = [chunk for chunk in self.chunks if chunk.curve is not None]
        if known and known[0].curve is not None:
            like = known[0].curve
            token = max(0, like.begin_token - known[0].index * like.tokens)
        for chunk in self.chunks:
            if chunk.item is not None and not chunk.item.came:
                break  # and nothing behind it is of use
            like = chunk.curve or replace(like, begin_token=token)
            views.append(chunk.view(like))
            token = like.end_token
        recomputing = [chunk.index for chunk in self.chunks if chunk.stage is Stage.RECOMPUTING]
        return PlanState(
            now_s=now_s,
            deadline_s=min(self.plan_deadline_s, now_s + NO_DEADLINE_S),
            chunks=tuple(views),
            link=link,
            speeds=speeds if self.can_recompute else replace(speeds, prefill=None),
            fetches=tuple(self._fetch(order) for order in self._orders if order.is_under_way),
            recomputing=recomputing[0] if recomputing else None,
            recompute_began_s=self._recompute_began_s,
        )

    def _fetch(self, order: _Order) -> Fetch:
        choices = order.chunk.choices
        level = choices.index(order.version) if order.version in choices else None
        begin = max(order.begin, order.chunk.versions[order.version].have_bytes)
        return Fetch(order.chunk.index, begin, order.end, level)

    def receive(self, read: Read, begin: int, data: bytes, now_s: float) -> None:
        """Take in bytes of a read: all of them, or a part if the store streams."""
        self.wire_bytes += len(data)
        if not read.is_wanted:
            return
        chunk = self.chunks[read.chunk]
        chunk.arrived_s = now_s
        try:
            chunk.versions[read.version].take(begin, data)
            chunk.learn_curve(self.quality)
        except CacheGenError as error:
            self._lose(chunk, reason_of(error, Reason.DAMAGED), error, now_s)
        else:
            if chunk.is_complete:
                chunk.stage = Stage.READY
        self._wake()

    def end_read(
        self,
        read: Read,
        now_s: float,
        *,
        got_bytes: int = 0,
        is_missing: bool = False,
        error: Exception | None = None,
    ) -> None:
        """Take in that a read is over.

        got_bytes: length of the whole answer. is_missing: the store has no such object.
        error: what the store raised; what has come before is used if it is enough.
        """
        wanted = read.is_wanted
        read.done = True
        if read in self.reads:
            self.reads.remove(read)
        self._wake()
        if not wanted:
            return
        chunk = self.chunks[read.chunk]
        entry = chunk.versions[read.version]
        try:
            if error is not None:
                raise error
            if is_missing:
                entry.missing = True
                if chunk.curve is not None or all(item.missing for item in chunk.versions):
                    entry.limit_bytes = min(entry.limit_bytes, read.begin)
                else:
                    chunk.learn_curve(self.quality)
            else:
                entry.check_end(read.begin, read.end, got_bytes)
        except Exception as failure:  # a store may be anybody's: all it raises is one chunk's loss
            entry.limit_bytes = min(entry.limit_bytes, read.begin)
            chunk.error = failure
        if entry.is_cut:
            self._end_early(chunk, read.version, now_s)

    def _end_early(self, chunk: ChunkProgress, version: int, now_s: float) -> None:
        """Read no more of a chunk; what is whole stays good if the rest only failed to come."""
        limit = chunk.versions[version].limit_bytes
        reason = Reason.MISSING if chunk.error is None else reason_of(chunk.error)
        is_sound = reason is not Reason.DAMAGED
        if is_sound and any(
            (read.chunk, read.version) == (chunk.index, version) and read.begin < limit
            for read in self.reads
        ):
            return  # what these bring may be enough
        if is_sound and chunk.level is not None:
            chunk.stage = Stage.READY
        else:
            self._lose(chunk, reason, chunk.error, now_s)

    def _wake(self) -> None:
        self._asleep_until_s = -math.inf

    @property
    def held_bytes(self) -> int:
        """Encoded bytes in memory."""
        return sum(entry.held_bytes for chunk in self.chunks for entry in chunk.versions)
