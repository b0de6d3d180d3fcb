"""What the tests of the fetcher share: stored chunks, a store that misbehaves, a virtual clock."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.outcome import FetchReport
from cachegen.stream.progress import Stage
from cachegen.stream.request import RequestState
from cachegen.stream.speeds import PrefillSpeed, Speeds
from cachegen.types import ChunkKey


def keys_of(count: int, codec: bytes = b"c") -> list[ChunkKey]:
    return [ChunkKey(b"n" * 32, bytes([index]) * 32, codec * 32) for index in range(count)]


def encode_all(codec: Codec, chunks: Sequence[KVChunk], keys: Sequence[ChunkKey]) -> dict:
    return {key.name: codec.encode(chunk, key=key) for key, chunk in zip(keys, chunks, strict=True)}


class FakeStore:
    """Holds objects and does what ``act`` says with every read.

    act: called with the number of the read, its name and its range, before it is answered; it may
        sleep, wait, raise, or return bytes to answer with instead.
    """

    def __init__(self, objects: dict[str, bytes], act: Callable | None = None) -> None:
        self.objects = dict(objects)
        self.act = act
        self.reads: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        with self._lock:
            number = len(self.reads)
            self.reads.append((name, begin, end))
        instead = self.act(number, name, begin, end) if self.act else None
        if instead is not None:
            return instead
        data = self.objects.get(name)
        return None if data is None else data[begin:end]


class Paced(FakeStore):
    """A store behind a link of so many bytes per second, which all reads share."""

    def __init__(self, objects: dict[str, bytes], rate: float) -> None:
        super().__init__(objects)
        self.rate = rate
        self.busy_s = 0.0
        self._turn = threading.Lock()

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        data = super().get_range(name, begin, end)
        with self._turn:
            begin = time.perf_counter()
            time.sleep(len(data or b"") / self.rate)
            self.busy_s += time.perf_counter() - begin
        return data


class VirtualRun:
    """Runs one request on a virtual clock: a link of a given rate over time, one decoder.

    rate: bytes per second at a time. decode_s: time of decoding a chunk. fail: given the number of
        a decode, returns the error it raises, or None.
    """

    def __init__(
        self,
        state: RequestState,
        objects: dict[str, bytes],
        *,
        rate: Callable[[float], float],
        decode_s: float = 0.01,
        prefill_s: float | None = None,
        slice_bytes: int = 4096,
    ) -> None:
        self.state, self.objects, self.rate = state, objects, rate
        self.decode_s, self.prefill_s, self.slice_bytes = decode_s, prefill_s, slice_bytes
        self.now = 0.0
        self.known = rate(0.0)
        self.decodes = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._link_free = self._decoder_free = self._model_free = 0.0

    def run(self, until: float = 60.0) -> FetchReport:
        while not self.state.is_over:
            self.state.tick(self.now)
            self._start()
            if self.state.is_over:
                break
            due = self.state.next_due_s(self.now)
            if self.events and self.events[0][0] <= due:
                self.now, _, call = heapq.heappop(self.events)
                call()
                continue
            assert due < until, "nothing will ever happen again"
            self.now = due
        return self.state.report()

    def _at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self._order), call))

    def _start(self) -> None:
        prefill = None
        if self.prefill_s is not None:
            prefill = PrefillSpeed(self.prefill_s / 64)
        speeds = Speeds(prefill, 1e9)
        while len(self.state.reads) < 2:
            link = LinkEstimate.known(self.known)
            read = self.state.next_read(
                self.now, link=link, speeds=speeds, slice_bytes=self.slice_bytes
            )
            if read is None:
                break
            begins = max(self.now, self._link_free)
            data = self.objects.get(read.name, b"")[read.begin : read.end]
            self._link_free = begins + max(1e-6, len(data) / self.rate(begins))
            self._at(self._link_free, lambda read=read, data=data: self._arrive(read, data))
        while (task := self.state.next_task()) is not None:
            is_prefill = task.stage is Stage.RECOMPUTING
            begins = max(self.now, self._model_free if is_prefill else self._decoder_free)
            takes = self.decode_s if task.stage is Stage.READY else 0.0
            if is_prefill:
                takes = self.prefill_s or 0.0
                self._model_free = begins + takes
            else:
                self._decoder_free = begins + takes
            self._at(begins + takes, lambda task=task: self.state.end_task(task, self.now))

    def _arrive(self, read, data: bytes) -> None:
        self.known = self.rate(self.now)
        missing = read.name not in self.objects
        if not missing:
            self.state.receive(read, read.begin, data, self.now)
        self.state.end_read(read, self.now, got_bytes=len(data), is_missing=missing)
