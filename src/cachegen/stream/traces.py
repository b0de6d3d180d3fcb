"""Bandwidth over time: made-up links with a seed, and recorded ones from files."""

from __future__ import annotations

import glob
import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cachegen.errors import ConfigError

GBPS = 1e9 / 8
LEAST_RATE = 0.1 * GBPS
MOST_RATE = 10 * GBPS
STEP_S = 0.1
# A recorded file is read up to so many lines: an hour of packets at 10 Mbit/s.
MAX_LINES = 4_000_000
MAHIMAHI_PACKET_BYTES = 1500
MAHIMAHI_BIN_S = 0.1


@dataclass(frozen=True)
class Trace:
    """A link whose rate is constant between given times; after its end it begins anew.

    times_s: where the pieces begin, the first at 0, and the end of the last one.
    rates_bytes_per_s: one for each piece; at least one above 0.
    """

    name: str
    times_s: tuple[float, ...]
    rates_bytes_per_s: tuple[float, ...]
    _carried: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rising = all(left < right for left, right in pairwise(self.times_s))
        sound = rising and len(self.times_s) == len(self.rates_bytes_per_s) + 1
        rates = self.rates_bytes_per_s
        if not (sound and self.times_s[0] == 0 and all(map(math.isfinite, self.times_s))):
            raise ConfigError(f"times of trace {self.name}", expected="rising times from 0 on")
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
            raise ConfigError(f"rates of trace {self.name}", expected="finite, some above 0")
        carried = [0.0]
        for (begin, end), rate in zip(pairwise(self.times_s), rates, strict=True):
            carried.append(carried[-1] + rate * (end - begin))
        object.__setattr__(self, "_carried", tuple(carried))

    def rate_at(self, time_s: float) -> tuple[float, float]:
        """Return the rate at a time, and the time until which it holds."""
        length = self.times_s[-1]
        rounds = math.floor(time_s / length)
        index = self._piece(time_s - rounds * length)
        until = rounds * length + self.times_s[index + 1]
        if until <= time_s:  # rounding at the seam
            index = (index + 1) % len(self.rates_bytes_per_s)
            until = time_s + self.times_s[index + 1] - self.times_s[index]
        return self.rates_bytes_per_s[index], until

    def carried_bytes(self, begin_s: float, end_s: float) -> float:
        """Return how many bytes the link carries between two times."""
        return self._until(end_s) - self._until(begin_s) if end_s > begin_s else 0.0

    @property
    def mean_bytes_per_s(self) -> float:
        """Mean rate over the length of the trace."""
        return self._carried[-1] / self.times_s[-1]

    def _until(self, time_s: float) -> float:
        length = self.times_s[-1]
        rounds = math.floor(time_s / length)
        within = time_s - rounds * length
        index = self._piece(within)
        part = (within - self.times_s[index]) * self.rates_bytes_per_s[index]
        return rounds * self._carried[-1] + self._carried[index] + part

    def _piece(self, within_s: float) -> int:
        last = len(self.rates_bytes_per_s) - 1
        return max(0, min(bisect_right(self.times_s, within_s) - 1, last))


def constant_trace(rate_bytes_per_s: float) -> Trace:
    """Return a link that never changes."""
    return Trace("constant", (0.0, 3600.0), (rate_bytes_per_s,))


def step_trace(seed: int, *, length_s: float = 60.0) -> Trace:
    """Return a link that changes its rate suddenly, every 1 to 8 s, up to tenfold or to a tenth."""
    random_ = random.Random(f"step {seed}")
    times, rates = [0.0], [_base_rate(random_)]
    while times[-1] < length_s:
        times.append(times[-1] + random_.uniform(1.0, 8.0))
        rates.append(_clipped(rates[-1] * 10 ** random_.uniform(-1.0, 1.0)))
    return Trace(f"step {seed}", tuple(times), tuple(rates[:-1]))


def markov_trace(seed: int, *, length_s: float = 60.0) -> Trace:
    """Return a link of a busy cloud: it wanders, loses most of its rate at times, and recovers.

    Three states, in steps of 0.1 s: usual (the rate wanders by some per cent), crowded (a third of
    it, some seconds) and drop (3 to 20 % of it, 0.2 to 2 s).
    """
    random_ = random.Random(f"markov {seed}")
    base = _base_rate(random_)
    wander, factor, state = 0.0, 1.0, "usual"
    leave = {
        "usual": (("drop", 0.02), ("crowded", 0.01)),
        "crowded": (("usual", 0.03), ("drop", 0.02)),
        "drop": (("usual", 0.12), ("crowded", 0.03)),
    }
    rates = []
    for _ in range(round(length_s / STEP_S)):
        draw = random_.random()
        for other, chance in leave[state]:
            if draw < chance:
                state = other
                factor = {
                    "usual": 1.0,
                    "crowded": random_.uniform(0.2, 0.5),
                    "drop": math.exp(random_.uniform(math.log(0.03), math.log(0.2))),
                }[other]
                break
            draw -= chance
        wander = 0.95 * wander + random_.gauss(0.0, 0.08)
        rates.append(_clipped(base * factor * math.exp(wander)))
    times = tuple(STEP_S * index for index in range(len(rates) + 1))
    return Trace(f"markov {seed}", times, tuple(rates))


def bucket_trace(seed: int, *, length_s: float = 60.0) -> Trace:
    """Return a link of an instance with burst credit: fast until the bucket is empty, then slow.

    The credit is spent while the link is fast, by this and other tenants, and refills while it is
    slow; both phases last 1 to 10 s.
    """
    random_ = random.Random(f"bucket {seed}")
    burst = _clipped(math.exp(random_.uniform(math.log(2 * GBPS), math.log(MOST_RATE))))
    slow = _clipped(burst * random_.uniform(0.05, 0.4))
    times, rates, fast = [0.0], [], random_.random() < 0.6
    while times[-1] < length_s:
        times.append(times[-1] + random_.uniform(1.0, 10.0))
        rates.append(_clipped((burst if fast else slow) * math.exp(random_.gauss(0.0, 0.1))))
        fast = not fast
    return Trace(f"bucket {seed}", tuple(times), tuple(rates))


def cloud_traces(count: int, seed: int) -> list[Trace]:
    """Return seeded traces between 0.1 and 10 Gbit/s: of five, three Markov, a bucket, a step."""
    if count < 1:
        raise ConfigError("traces", got=count, expected="at least 1")
    kinds = (markov_trace, bucket_trace, markov_trace, step_trace, markov_trace)
    return [kinds[index % len(kinds)](seed * 1_000_003 + index) for index in range(count)]


def _base_rate(random_: random.Random) -> float:
    """Draw a usual rate, log-uniform from 0.5 to 10 Gbit/s; drops lead down from there."""
    return math.exp(random_.uniform(math.log(0.5 * GBPS), math.log(MOST_RATE)))


def _clipped(rate: float) -> float:
    return min(max(rate, LEAST_RATE), MOST_RATE)


def load_traces(pattern: str) -> list[Trace]:
    """Read every file that a pattern matches, in order of name.

    Two forms are told apart by their columns. One number in a line: Mahimahi, the millisecond at
    which a packet of 1,500 bytes may leave. Two: time in seconds and Mbit/s from then on.
    Raises: FileNotFoundError if nothing matches; ConfigError for a file that is neither.
    """
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise FileNotFoundError(2, "no trace file matches", pattern)
    return [parse_trace(Path(path).read_text(encoding="utf-8"), Path(path).name) for path in paths]


def parse_trace(text: str, name: str) -> Trace:
    """Parse one trace file. Raises: ConfigError, with the line that is wrong."""
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError:
            raise _bad_line(name, number, line) from None
        sound = len(row) in (1, 2) and all(math.isfinite(value) and value >= 0 for value in row)
        if not sound or number > MAX_LINES or (rows and len(rows[0]) != len(row)):
            raise _bad_line(name, number, line)
        if rows and (row[0] < rows[-1][0] or (len(row) == 2 and row[0] == rows[-1][0])):
            raise _bad_line(name, number, line)
        rows.append(row)
    if not rows:
        raise ConfigError(f"trace {name}", got="no lines", expected="one or two numbers in each")
    return _mahimahi(rows, name) if len(rows[0]) == 1 else _columns(rows, name)


def _bad_line(name: str, number: int, line: str) -> ConfigError:
    return ConfigError(
        f"trace {name}, line {number}",
        got=repr(line[:80]),
        expected="a time in ms, or seconds and Mbit/s; times rising, as in the first line",
    )


def _mahimahi(rows: Sequence[Sequence[float]], name: str) -> Trace:
    """Count the packets of every 0.1 s."""
    bins = [0] * (math.floor(rows[-1][0] / 1000 / MAHIMAHI_BIN_S) + 1)
    for (milliseconds,) in rows:
        bins[math.floor(milliseconds / 1000 / MAHIMAHI_BIN_S)] += 1
    times = tuple(MAHIMAHI_BIN_S * index for index in range(len(bins) + 1))
    rates = tuple(count * MAHIMAHI_PACKET_BYTES / MAHIMAHI_BIN_S for count in bins)
    return Trace(name, times, rates)


def _columns(rows: Sequence[Sequence[float]], name: str) -> Trace:
    """Let each rate hold until the next time; the last one as long as the one before it."""
    begins = [row[0] - rows[0][0] for row in rows]
    last_s = begins[-1] - begins[-2] if len(begins) > 1 else 1.0
    rates = tuple(row[1] * 1e6 / 8 for row in rows)
    return Trace(name, (*begins, begins[-1] + last_s), rates)
