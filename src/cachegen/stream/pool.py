"""The threads of a fetcher: readers, workers that decode and deliver, and a clock.

All state is behind one lock; a thread leaves it only to read, to decode or to call the caller. Each
kind of thread waits on a condition of its own, and a change wakes only those that it concerns: one
reader, which wakes the next one if it finds something to read, one worker if there is a task, the
clock if something is due sooner than it would look, and who waits for the request that got further.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cachegen.chunk import KVChunk
from cachegen.store.clock import deadline
from cachegen.stream.bandwidth import BandwidthEstimator
from cachegen.stream.callbacks import Callbacks, Progress, Source
from cachegen.stream.link import Hedger, LinkMeter, in_turn, slice_bytes
from cachegen.stream.outcome import FetchReport, Reason
from cachegen.stream.progress import Stage
from cachegen.stream.reading import Read, parts_of
from cachegen.stream.request import RequestState, Task
from cachegen.stream.speeds import SpeedLearner

# KV bytes per second, before the first chunk was decoded.
DECODE_GUESS_KV_BYTES_PER_S = 15e6
# Threads that hang in the store are replaced, until there are so many times as many as asked for.
MOST_READERS = 4
# A store call may outlast the deadline of its request by so much before it is given up.
LATE_CALL_S = 0.05


@dataclass(eq=False)
class _Active:
    """A request under way. told: how many of its chunks those who wait for it have heard of."""

    calls: Callbacks
    heard: threading.Condition
    told: int = 0


class Pool:
    """Carries out requests on threads that start with the first one. See ``Fetcher``."""

    def __init__(
        self,
        source: Source,
        *,
        readers: int,
        decoders: int,
        held_bytes: int,
        bandwidth: BandwidthEstimator,
        speeds: SpeedLearner,
    ) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.bandwidth = bandwidth
        self.speeds = speeds
        self._source = source
        self._readers = readers
        self._decoders = decoders
        self._held_bytes = held_bytes
        self._active: dict[RequestState, _Active] = {}
        self._readable = threading.Condition(self.lock)
        self._workable = threading.Condition(self.lock)
        self._sooner = threading.Condition(self.lock)
        # When the clock looks next.
        self._looks_s = math.inf
        self._threads: list[threading.Thread] = []
        self._reader_count = self._idle_readers = 0
        self._meter = LinkMeter()
        self._hedger = Hedger()
        self._turn = 0
        self._decode_s_per_byte: float | None = None
        self._closed = False

    def add(self, state: RequestState, calls: Callbacks) -> threading.Condition | None:
        """Take on a request.

        Returns: a condition on the lock, notified when another chunk is decided or the request is
        over; None after ``close``.
        """
        with self.lock:
            if self._closed:
                return None
            heard = threading.Condition(self.lock)
            self._active[state] = _Active(calls, heard)
            self.counts["requests"] += 1
            self._start_threads()
            self._changed()
            return heard

    def cancel(self, state: RequestState, reason: Reason = Reason.CANCELLED) -> None:
        """Give up what has not come of a request."""
        with self.lock:
            state.cancel(time.monotonic(), reason)
            self._changed()

    def close(self) -> None:
        """Cancel all requests and end the threads; one that hangs in the store is left behind."""
        with self.lock:
            self._closed = True
            for state in list(self._active):
                state.cancel(time.monotonic())
            self._changed()
            self._readable.notify_all()
            self._sooner.notify()
            threads = [thread for thread in self._threads if thread.ident != threading.get_ident()]
        until_s = time.monotonic() + LATE_CALL_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def decode_cost(self, decoded_bytes: int) -> float:
        """Return the seconds that decoding to so many bytes of KV is expected to take."""
        known = self._decode_s_per_byte
        return decoded_bytes * (1 / DECODE_GUESS_KV_BYTES_PER_S if known is None else known)

    # Everything below that says "locked" is called with the lock held.

    def _changed(self) -> None:
        """Locked: carry out what is due, forget requests that are over, wake who has to act."""
        now_s = time.monotonic()
        due_s = math.inf
        for state, entry in list(self._active.items()):
            state.tick(now_s)
            if len(state.items) > entry.told or state.is_over:
                entry.told = len(state.items)
                entry.heard.notify_all()
            if state.is_over:
                del self._active[state]
                for item in state.items:
                    self.counts[f"chunks.{item.reason.value}"] += 1
            else:
                due_s = min(due_s, state.next_due_s(now_s), self._hedge_due_s(state, now_s))
        self._readable.notify()
        if any(state.has_task for state in self._active):
            self._workable.notify()
        elif self._closed and not self._active:
            self._workable.notify_all()
        if due_s < self._looks_s:
            self._looks_s = due_s
            self._sooner.notify()

    def _hedge_due_s(self, state: RequestState, now_s: float) -> float:
        """Locked: when a read that was overtaken will be a straggler; inf for never."""
        limit_s = self._hedger.limit_s
        times = (read.started_s + limit_s for read in state.reads if read.is_overtaken_once)
        return min((time_s for time_s in times if time_s > now_s), default=math.inf)

    def _start_threads(self) -> None:
        if not self._threads:
            self._start("clock", self._keep_time)
            for _ in range(self._decoders):
                self._start("decode", self._work)
        self._start_reader()

    def _start_reader(self) -> None:
        """Locked: one more reader, if none is idle and there may be one more."""
        stuck = self._meter.in_flight - sum(len(state.reads) for state in self._active)
        count = self._reader_count
        wanted = not self._idle_readers and count - max(0, stuck) < self._readers
        if wanted and count < MOST_READERS * self._readers:
            self._reader_count += 1
            self._start("read", self._read_loop)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"cachegen-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep_time(self) -> None:
        """Body of the clock thread: deadlines, and decoding or a hedged read that has to begin."""
        with self.lock:
            while not self._closed:
                left_s = self._looks_s - time.monotonic()
                if left_s > 0:
                    self._sooner.wait(None if math.isinf(left_s) else left_s)
                else:
                    self._looks_s = math.inf
                    self._changed()

    # Reading.

    def _read_loop(self) -> None:
        """Body of a reader."""
        while True:
            with self.lock:
                found = self._next_read()
                while found is None and not self._closed:
                    self._idle_readers += 1
                    self._readable.wait()
                    self._idle_readers -= 1
                    found = self._next_read()
                if found is None:
                    return
                # There may be more to read.
                self._start_reader()
                self._readable.notify()
            self._transfer(*found)

    def _next_read(self) -> tuple[Read, float, int] | None:
        """Locked: choose a read. Returns: it, now, and the bytes under way before it."""
        if self._closed:
            return None
        now_s = time.monotonic()
        read = self._next_hedge(now_s)
        if read is None:
            link = self.bandwidth.estimate(now_s)
            # Never far more than was last seen: what is asked for cannot be taken back.
            rate = min(link.rate_bytes_per_s(), 2 * (link.last_rate_bytes_per_s or 0.0))
            window = self._meter.window_bytes(rate)
            if self._under_way() >= window or self._is_full():
                return None
            size, speeds = slice_bytes(window, self._readers), self.speeds.speeds()
            for state in in_turn(list(self._active), self._turn):
                read = state.next_read(now_s, link=link, speeds=speeds, slice_bytes=size)
                if state.has_work:
                    state.has_work = False
                    self._changed()
                if read is not None:
                    state.served_turn = self._turn
                    self._turn += 1
                    break
        if read is None:
            return None
        ahead = self._meter.in_flight_bytes
        self._meter.begin(read.end - read.begin, now_s)
        self.counts["reads"] += 1
        return read, now_s, ahead

    def _under_way(self) -> int:
        """Locked: bytes that somebody waits for; a read that hangs for nobody is not counted."""
        reads = (read for state in self._active for read in state.reads)
        return sum(read.end - read.begin for read in reads)

    def _is_full(self) -> bool:
        """Locked: True if memory has to become free before more is read."""
        under_way = self._under_way()
        if under_way + sum(state.held_bytes for state in self._active) < self._held_bytes:
            return False
        if under_way or any(state.is_decoding for state in self._active):
            return True
        if any([state.squeeze() for state in self._active]):
            self._changed()
            return True
        return False  # one object alone is larger than the bound: without it nothing moves

    def _next_hedge(self, now_s: float) -> Read | None:
        """Locked: a read that later ones have overtaken, and that takes longer than they do."""
        for state in self._active:
            for read in state.reads:
                slow = now_s >= read.started_s + self._hedger.limit_s
                if slow and read.is_overtaken_once and self._hedger.spend():
                    read.sent = 2
                    state.hedged_reads += 1
                    self.counts["hedged_reads"] += 1
                    return read
        return None

    def _transfer(self, read: Read, began_s: float, ahead_bytes: int) -> None:
        """Make one call of the store and pass on what comes."""
        size, got_bytes = read.end - read.begin, 0
        latency_s: float | None = None
        is_missing, error = False, None
        try:
            left_s = read.owner.deadline_s - began_s + LATE_CALL_S
            with deadline(left_s), contextlib.closing(parts_of(self._source, read)) as parts:
                for part in parts:
                    if part is None:
                        is_missing = True
                        break
                    with self.lock:
                        now_s = time.monotonic()
                        if latency_s is None:
                            # What the link was busy with before these bytes is no latency.
                            rate = self.bandwidth.estimate(now_s).rate_bytes_per_s()
                            latency_s = now_s - began_s - (ahead_bytes + len(part)) / rate
                        self._learn(self._meter.receive(len(part), now_s), now_s)
                        read.owner.receive(read, read.begin + got_bytes, part, now_s)
                        got_bytes += len(part)
                        self._changed()
                        if not read.is_wanted and got_bytes < size:
                            break
        except Exception as failure:  # of any store: the chunk is lost, the reader is not
            error = failure
        with self.lock:
            now_s = time.monotonic()
            self._meter.end(left_bytes=size - got_bytes, latency_s=latency_s)
            if read.done or (error is not None and read.sent > 1 and not read.failed):
                read.failed = True  # the other call for the same bytes may still answer
            else:
                self._end_read(read, now_s, got_bytes, is_missing, error)
            entry = self._active.get(read.owner)
            progress = None if entry is None else entry.calls.progress
            report = None if progress is None else read.owner.report()
            self._changed()
        if progress is not None and report is not None:
            self._guarded(read.owner, progress, report)

    def _end_read(
        self, read: Read, now_s: float, got_bytes: int, is_missing: bool, error: Exception | None
    ) -> None:
        """Locked: take in the first answer to a read."""
        if error is None and not is_missing:
            self._hedger.learn(now_s - read.started_s)
        for other in read.owner.reads:
            other.overtaken |= other.started_s < read.started_s
        read.owner.end_read(read, now_s, got_bytes=got_bytes, is_missing=is_missing, error=error)

    def _learn(self, sample: tuple[int, float] | None, now_s: float) -> None:
        """Locked: pass on what the link carried."""
        if sample is not None:
            size, seconds = sample
            self.bandwidth.observe(size, seconds, now_s=now_s, first_byte_s=self._meter.latency_s)

    # Decoding, delivering, recomputing.

    def _work(self) -> None:
        """Body of a worker."""
        while True:
            with self.lock:
                task = self._next_task()
                while task is None and not (self._closed and not self._active):
                    self._workable.wait()
                    task = self._next_task()
                if task is None:
                    return
                calls = self._active[task.request].calls
                if any(state.has_task for state in self._active):
                    self._workable.notify()
            self._carry_out(task, calls)

    def _next_task(self) -> Task | None:
        """Locked: what is most urgent."""
        for state in sorted(self._active, key=lambda state: state.deadline_s):
            task = state.next_task()
            if task is not None:
                return task
        return None

    def _carry_out(self, task: Task, calls: Callbacks) -> None:
        """Decode, deliver or recompute a chunk and report back."""
        chunk: KVChunk | None = None
        error: Exception | None = None
        fenced = False
        began_s = time.monotonic()
        try:
            fenced, chunk = calls.answer(task.item, task.stage)
        except Exception as failure:  # a callback may be anybody's: the worker outlives it
            error = failure
        with self.lock:
            now_s = time.monotonic()
            seconds = now_s - began_s
            if error is None and not fenced:
                self._learn_speed(task, calls, seconds)
            if fenced:
                task.request.fence(now_s)
            else:
                task.request.end_task(task, now_s, chunk=chunk, error=error, seconds=seconds)
            report = task.request.report()
            self._changed()
        if calls.progress is not None:
            self._guarded(task.request, calls.progress, report)

    def _learn_speed(self, task: Task, calls: Callbacks, seconds: float) -> None:
        """Locked: remember how long decoding or recomputing took."""
        item = task.item
        if task.stage is Stage.RECOMPUTING:
            self.speeds.observe_prefill(item.begin_token, item.tokens, seconds)
        elif task.stage is Stage.READY or calls.direct is not None:
            self.speeds.observe_decode(item.read_bytes, seconds)
            cost = seconds / max(1, item.decoded_bytes)
            known = self._decode_s_per_byte
            # Quick to believe that it is slow: being late costs more than an early start.
            self._decode_s_per_byte = cost if known is None else max(cost, 0.8 * known + 0.2 * cost)

    def _guarded(self, state: RequestState, call: Progress, report: FetchReport) -> None:
        """Call back about progress; a callback that raises ends its request."""
        try:
            call(report)
        except Exception:
            # The callback is the caller's and may raise anything; its request ends and says so in
            # the reason of every chunk, and the other requests of this thread go on.
            self.cancel(state, Reason.CALLBACK_ERROR)
