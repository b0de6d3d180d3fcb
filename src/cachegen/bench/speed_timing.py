"""How speed is timed: calls that take turns, medians of rounds, ratios within a round.

One thread is timed by the processor time of the process, so that other processes of a shared
machine do not count; several threads by the wall clock.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A sample lasts at least so long: shorter calls are made several times.
SAMPLE_S = 0.005
ROUNDS = 5
# Calls that take longer than planned by this factor are made in fewer rounds, 2 at least.
PATIENCE = 8
# Destinations in turn, so that none is still in a cache: together so many times the cache's share
# of a core, within these bounds.
SHARES = 3
LEAST_BYTES, MOST_BYTES = 256 << 20, 1 << 30

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Samples:
    """Seconds of one call each, one list for each of the calls that took turns."""

    seconds: tuple[tuple[float, ...], ...]

    def median(self, call: int) -> float:
        """Return the median seconds of a call."""
        return statistics.median(self.seconds[call])

    def ratio(self, above: int, below: int) -> float:
        """Return the median over rounds of the seconds of one call by those of another."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(first / second for first, second in pairs)


def clock_of(threads: int) -> Clock:
    """Return the clock that times so many threads."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turn(calls: Sequence[Call], clock: Clock, least_s: float) -> Samples:
    """Time calls that take turns, until the slowest took ``least_s`` altogether.

    Each is made once before, for what only a first call costs, and to see how long it takes.
    """
    repeats = []
    for call in calls:
        begin = clock()
        call()
        repeats.append(max(1, round(SAMPLE_S / max(clock() - begin, 1e-7))))
    samples: list[list[float]] = [[] for _ in calls]
    while True:
        rounds, spent = len(samples[0]), max(map(sum, samples))
        if (rounds >= ROUNDS and spent >= least_s) or (rounds >= 2 and spent >= PATIENCE * least_s):
            return Samples(tuple(tuple(seconds) for seconds in samples))
        for call, count, seconds in zip(calls, repeats, samples, strict=True):
            begin = clock()
            for _ in range(count):
                call()
            seconds.append((clock() - begin) / count)


def cycle(items: Sequence[Any], call: Callable[[Any], object]) -> Call:
    """Return a call that takes the next item every time, over and over."""
    state = itertools.cycle(items)
    return lambda: call(next(state))


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Let coding use so many threads."""
    name = "CACHEGEN_THREADS"
    before = os.environ.get(name)
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Copier:
    """Copies arrays with one or more threads, each its own part.

    outs: arrays of one shape that are copied to one another in turn, as none is in a cache then.
    """

    def __init__(self, outs: Sequence[NDArray[Any]]) -> None:
        self._bytes = [out.reshape(-1).view(np.uint8) for out in outs]
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())

    def call(self, threads: int) -> Call:
        """Return a call that copies one array to the one half a round further on."""
        half = len(self._bytes) // 2
        places = range(len(self._bytes))

        def copy(place: int) -> None:
            source = self._bytes[place - half]
            target = self._bytes[place]
            if threads == 1:
                np.copyto(target, source)
                return
            bounds = np.linspace(0, len(target), threads + 1).astype(int)
            parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
            waiting = [
                self._pool.submit(np.copyto, target[part], source[part]) for part in parts[1:]
            ]
            np.copyto(target[parts[0]], source[parts[0]])
            for done in waiting:
                done.result()

        return cycle(places, copy)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def cache_share() -> int | None:
    """Return the bytes of the last-level cache that one core has, or None if unknown."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    best: tuple[int, int] | None = None
    for index in folder.glob("index*"):
        try:
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue  # an entry that some kernels leave out
        number, unit = int(size.rstrip("KM")), {"K": 10, "M": 20}.get(size[-1], 0)
        share = (number << unit) // _cores(shared)
        best = max(best or (0, 0), (level, share))
    return best[1] if best else None


def _cores(text: str) -> int:
    count = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def destination_bytes() -> int:
    """Return how much memory destinations take together."""
    return min(max(SHARES * (cache_share() or 0), LEAST_BYTES), MOST_BYTES)
