"""A store behind a slow link, simulated by really waiting."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from cachegen.errors import ConfigError
from cachegen.store.base import (
    BytesLike,
    CreatingStore,
    Store,
    check_range,
    check_stream,
    lacks,
    view_bytes,
)
from cachegen.units import parse_bandwidth

__all__ = ["RateLimitedStore", "parse_bandwidth"]

# Slices of this many seconds: far above what a sleep overshoots by, short enough to share fairly.
_SLICE_S = 0.01
# How far a stream may run ahead of a consumer that is busy: what a socket's buffer would hold.
_WINDOW_S = 0.05


# Seconds since the begin of a link -> its rate in bytes/s, and until when that holds.
Schedule: TypeAlias = Callable[[float], tuple[float, float]]


class RateLimitedStore:
    """Passes calls on to another store and lets reads take the time of a slow link.

    All callers of one instance share the link. Time is spent asleep, never just computed: a
    call takes latency_s, then the inner store's own time, then size / rate (less the burst).

    inner: the store behind the link.
    rate_bytes_per_s: long-run throughput of all callers together.
    burst_bytes: what an idle link delivers at once before the rate binds.
    latency_s: time before the first byte of a call; calls at the same time wait in parallel.
    limit_writes: True to let writes share the link as well.
    schedule: a link that varies: given the seconds since it was built or restarted, returns the
        rate in bytes/s and until when it holds; rate_bytes_per_s is then only a typical value.
    Raises: ConfigError unless the rate is positive and the others are not negative.
    """

    def __init__(
        self,
        inner: Store,
        rate_bytes_per_s: float,
        *,
        burst_bytes: int = 64 * 1024,
        latency_s: float = 0.0,
        limit_writes: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        if not (math.isfinite(rate_bytes_per_s) and rate_bytes_per_s > 0):
            raise ConfigError("rate in bytes/s", got=rate_bytes_per_s, expected="above 0")
        if burst_bytes < 0:
            raise ConfigError("burst in bytes", got=burst_bytes, expected="0 or more")
        if not (math.isfinite(latency_s) and latency_s >= 0):
            raise ConfigError("latency in seconds", got=latency_s, expected="0 or more")
        self.inner = inner
        self.rate_bytes_per_s = float(rate_bytes_per_s)
        self.burst_bytes = burst_bytes
        self.latency_s = latency_s
        self.limit_writes = limit_writes
        self._link = _Link(
            schedule or (lambda time_s: (self.rate_bytes_per_s, math.inf)),
            burst_s=burst_bytes / self.rate_bytes_per_s,
        )
        self._slice_bytes = max(1, round(self.rate_bytes_per_s * _SLICE_S))

    def restart(self) -> None:
        """Begin the schedule anew, on an idle link."""
        self._link.restart()

    def put(self, name: str, data: BytesLike) -> None:
        """Store data, after the time of the link if writes are limited. Raises: as inner."""
        if self.limit_writes:
            self._wait_latency()
            self._transfer(view_bytes(data).nbytes)
        self.inner.put(name, data)

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken, as put does. Raises: ConfigError, as inner."""
        if not isinstance(self.inner, CreatingStore):
            raise lacks(self.inner, "create without replacing")
        if self.limit_writes:
            self._wait_latency()
            self._transfer(view_bytes(data).nbytes)
        return self.inner.put_if_absent(name, data)

    def get(self, name: str) -> bytes | None:
        """Read a value whole, at the rate of the link. Raises: as inner."""
        self._wait_latency()
        data = self.inner.get(name)
        self._transfer(len(data) if data else 0)
        return data

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end), at the rate of the link. Raises: as inner."""
        check_range(begin, end)
        self._wait_latency()
        data = self.inner.get_range(name, begin, end)
        self._transfer(len(data) if data else 0)
        return data

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) in slices, each handed over when it is due.

        While the consumer is busy the link goes on for 50 ms, then it waits for the consumer.
        Closing the iterator ends the transfer and frees the link.
        Returns: views of slice_bytes each but for the last; None if there is no such name.
        Raises: ConfigError unless slice_bytes >= 1 and 0 <= begin <= end; as inner.
        """
        check_stream(slice_bytes, begin, end)
        self._wait_latency()
        if end is None:
            data = self.inner.get(name)
            data = data if data is None or not begin else data[begin:]
        else:
            data = self.inner.get_range(name, begin, end)
        return None if data is None else self._slices(memoryview(data), slice_bytes)

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names for one latency. Raises: as inner."""
        self._wait_latency()
        return self.inner.exists(names)

    def delete(self, name: str) -> None:
        """Delete a value, after one latency if writes are limited. Raises: as inner."""
        if self.limit_writes:
            self._wait_latency()
        self.inner.delete(name)

    def _slices(self, data: memoryview, slice_bytes: int) -> Iterator[memoryview]:
        slack_s: float | None = None
        for begin in range(0, len(data), slice_bytes):
            part = data[begin : begin + slice_bytes]
            _sleep_until(self._link.reserve(len(part), slack_s))
            slack_s = _WINDOW_S
            yield part

    def _transfer(self, size_bytes: int) -> None:
        # In slices, so that callers at the same time share the link instead of queueing.
        slack_s: float | None = None
        for begin in range(0, size_bytes, self._slice_bytes):
            size = min(self._slice_bytes, size_bytes - begin)
            _sleep_until(self._link.reserve(size, slack_s))
            # From here on all lateness is that of our own sleep, so it is repaid in full.
            slack_s = math.inf

    def _wait_latency(self) -> None:
        if self.latency_s:
            time.sleep(self.latency_s)


class _Link:
    """A token bucket kept as the instant at which the link is free again.

    Sleeping too long makes no debt: the next slice is due at a time computed from the one
    before, not from now, so a late caller catches up and the long-run rate holds.
    """

    def __init__(self, schedule: Schedule, *, burst_s: float) -> None:
        self._schedule = schedule
        self._burst_s = burst_s
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Forget the past: the link is idle, and its time begins now."""
        with self._lock:
            self._free_at = -math.inf
            self._began = time.monotonic()

    def reserve(self, size_bytes: int, slack_s: float | None) -> float:
        """Take the link for size_bytes.

        slack_s: how much idle time a transfer under way may use up afterwards; None for the
            start of a transfer, which may use up the burst only.
        Returns: the monotonic time at which the last byte is due.
        """
        # The burst is due to every caller: a full bucket belongs to whoever comes first.
        slack_s = self._burst_s if slack_s is None else max(slack_s, self._burst_s)
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - slack_s)
            self._free_at = self._carry(self._free_at, float(size_bytes))
            return self._free_at

    def _carry(self, begin: float, size_bytes: float) -> float:
        """Return when so many bytes are through that the link begins with at a time."""
        # Counted from the begin of the link, so that the ends of its pieces are hit exactly.
        time_s = begin - self._began
        while True:
            rate, until_s = self._schedule(max(0.0, time_s))
            if rate > 0 and size_bytes <= rate * (until_s - time_s):
                return self._began + time_s + size_bytes / rate
            size_bytes -= rate * (until_s - time_s)
            time_s = until_s


def _sleep_until(due: float) -> None:
    wait_s = due - time.monotonic()
    if wait_s > 0:
        time.sleep(wait_s)
