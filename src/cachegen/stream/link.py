"""What a fetcher learns about its link, and how requests share it. Pure: times are passed in.

The link is measured as a whole, not per read: reads at the same time share it, so that the bytes of
one over its own time say little.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeVar

# Reads in flight should cover the latency of the link and this much of its time, but no more: what
# was asked for cannot be taken back when the bandwidth falls.
QUEUE_S = 0.025
MIN_SLICE_BYTES = 16 << 10
MAX_SLICE_BYTES = 8 << 20
# A sample of the rate lasts at least this long.
SAMPLE_S = 0.005
LATENCY_WINDOW = 64
# Every so many slices the request that waited longest gets one, whatever its deadline.
FAIR_EVERY = 4
# Hedged reads: only after this quantile of what reads took, times a margin, and not too many.
HEDGE_QUANTILE = 0.95
HEDGE_MARGIN = 1.5
HEDGE_MIN_SAMPLES = 8
HEDGE_FLOOR_S = 0.02
HEDGE_SHARE = 0.1
HEDGE_BURST = 2.0


class LinkMeter:
    """Measures rate and latency of a link from when reads begin, bring bytes and end.

    in_flight, in_flight_bytes: reads that have not ended, and what of them is still to come.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.in_flight_bytes = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._bytes = 0
        self._latencies: deque[float] = deque(maxlen=LATENCY_WINDOW)

    @property
    def latency_s(self) -> float:
        """The least time before the first byte of a read that was seen lately."""
        return min(self._latencies, default=0.0)

    def begin(self, size_bytes: int, now_s: float) -> None:
        """Take in that a read of so many bytes is sent."""
        if self.in_flight == 0:
            # Until the first byte can be here the link carries nothing.
            self._since_s = now_s + self.latency_s
        self.in_flight += 1
        self.in_flight_bytes += size_bytes

    def receive(self, size_bytes: int, now_s: float) -> tuple[int, float] | None:
        """Take in bytes. Returns: (bytes, seconds that they took), once that says something."""
        self._bytes += size_bytes
        self.in_flight_bytes = max(0, self.in_flight_bytes - size_bytes)
        self._busy_s += max(0.0, now_s - self._since_s)
        self._since_s = max(now_s, self._since_s)
        if self._busy_s < SAMPLE_S or self._bytes == 0:
            return None
        sample = (self._bytes, self._busy_s)
        self._bytes, self._busy_s = 0, 0.0
        return sample

    def end(self, *, left_bytes: int, latency_s: float | None) -> None:
        """Take in that a read is over.

        left_bytes: of it did not come. latency_s: what it took beyond the transfer, if known.
        """
        self.in_flight -= 1
        self.in_flight_bytes = max(0, self.in_flight_bytes - left_bytes)
        if latency_s is not None:
            self._latencies.append(max(0.0, latency_s))

    def window_bytes(self, rate_bytes_per_s: float) -> int:
        """Return how many bytes may be in flight: latency plus a short queue, at that rate."""
        return max(2 * MIN_SLICE_BYTES, int(rate_bytes_per_s * (self.latency_s + QUEUE_S)))


def slice_bytes(window_bytes: int, readers: int) -> int:
    """Return the length of one read, so that all readers together fill the window."""
    return min(MAX_SLICE_BYTES, max(MIN_SLICE_BYTES, window_bytes // max(1, readers)))


class Hedger:
    """Decides when a read is a straggler that a second one should overtake.

    Learns how long reads take for what they carry. A link that slows down as a whole makes every
    read late: then none is sent twice, since only a read that later ones have overtaken counts.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=LATENCY_WINDOW)
        self._budget = HEDGE_BURST
        self._limit_s = math.inf

    def learn(self, duration_s: float) -> None:
        """Take in the duration of a read that was answered."""
        self._durations.append(duration_s)
        self._budget = min(HEDGE_BURST, self._budget + HEDGE_SHARE)
        if len(self._durations) >= HEDGE_MIN_SAMPLES:
            ordered = sorted(self._durations)
            quantile = ordered[min(len(ordered) - 1, int(HEDGE_QUANTILE * len(ordered)))]
            self._limit_s = max(HEDGE_FLOOR_S, HEDGE_MARGIN * quantile)

    @property
    def limit_s(self) -> float:
        """After so many seconds a read that was overtaken is a straggler; inf: not yet known."""
        return self._limit_s

    def spend(self) -> bool:
        """Take the budget of one hedged read. Returns: False if it is used up."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


class Sharer(Protocol):
    """What sharing a link needs to know of a request."""

    @property
    def deadline_s(self) -> float:
        """When it has to be over; inf without a deadline."""

    @property
    def served_turn(self) -> int:
        """The turn in which it last got a slice."""


_Sharer = TypeVar("_Sharer", bound=Sharer)


def in_turn(requests: Sequence[_Sharer], turn: int) -> list[_Sharer]:
    """Order requests for the next slice: earliest deadline first, but nobody starves.

    turn: number of slices given out so far. In every fourth turn the request that waited longest
    is first; equal deadlines take turns.
    """
    if turn % FAIR_EVERY == FAIR_EVERY - 1:
        return sorted(requests, key=lambda request: request.served_turn)
    return sorted(requests, key=lambda request: (request.deadline_s, request.served_turn))
