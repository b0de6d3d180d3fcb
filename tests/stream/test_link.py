"""Measuring a link, and sharing it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from cachegen.stream.link import (
    FAIR_EVERY,
    HEDGE_BURST,
    HEDGE_FLOOR_S,
    MAX_SLICE_BYTES,
    MIN_SLICE_BYTES,
    QUEUE_S,
    SAMPLE_S,
    Hedger,
    LinkMeter,
    in_turn,
    slice_bytes,
)


def carry(meter: LinkMeter, *, rate: float, latency: float, reads: int, size: int, begin=0.0):
    """Two reads at a time over a link; returns the samples."""
    samples, sent, free = [], [], begin
    for _ in range(reads):
        start = begin if len(sent) < 2 else sent[-2]
        meter.begin(size, start)
        free = max(free, start + latency) + size / rate
        sent.append(free)
        if len(sent) >= 2:
            done = sent[-2]
            samples.append(meter.receive(size, done))
            meter.end(left_bytes=0, latency_s=latency)
    samples.append(meter.receive(size, free))
    meter.end(left_bytes=0, latency_s=latency)
    return [sample for sample in samples if sample]


def test_a_busy_link_is_measured_whatever_shares_it() -> None:
    meter = LinkMeter()
    carry(meter, rate=1e7, latency=0.002, reads=2, size=1000)
    samples = carry(meter, rate=1e7, latency=0.002, reads=40, size=100_000, begin=10.0)
    rates = [size / seconds for size, seconds in samples]
    assert min(rates) > 0.7e7 and max(rates) < 1.3e7
    assert meter.in_flight == meter.in_flight_bytes == 0
    assert meter.latency_s == pytest.approx(0.002)


def test_waiting_for_the_first_byte_is_not_transfer() -> None:
    meter = LinkMeter()
    for number in range(20):
        begin = 1.0 * number
        meter.begin(100_000, begin)
        sample = meter.receive(100_000, begin + 0.05 + 2 * SAMPLE_S)
        meter.end(left_bytes=0, latency_s=0.05)
        if number:
            assert sample is not None
            assert sample[1] == pytest.approx(2 * SAMPLE_S)


def test_a_read_that_ends_early_frees_the_link() -> None:
    meter = LinkMeter()
    meter.begin(1000, 0.0)
    meter.receive(400, 0.1)
    assert meter.in_flight_bytes == 600
    meter.end(left_bytes=600, latency_s=None)
    assert meter.in_flight == meter.in_flight_bytes == 0
    assert meter.latency_s == 0.0


def test_the_window_covers_latency_and_a_short_queue() -> None:
    meter = LinkMeter()
    assert meter.window_bytes(0.0) == 2 * MIN_SLICE_BYTES
    meter.begin(1, 0.0)
    meter.end(left_bytes=1, latency_s=0.075)
    assert meter.window_bytes(1e8) == int(1e8 * (0.075 + QUEUE_S))
    assert slice_bytes(1 << 20, 4) == 1 << 18
    assert slice_bytes(1, 4) == MIN_SLICE_BYTES
    assert slice_bytes(1 << 40, 4) == MAX_SLICE_BYTES


def test_hedging_needs_experience_and_has_a_budget() -> None:
    hedger = Hedger()
    assert math.isinf(hedger.limit_s)
    for _ in range(20):
        hedger.learn(0.1)
    assert 0.1 < hedger.limit_s < 0.2
    spent = 0
    while hedger.spend():
        spent += 1
    assert spent == HEDGE_BURST
    for _ in range(100):
        hedger.learn(0.0001)
    assert hedger.limit_s == HEDGE_FLOOR_S
    assert hedger.spend()


@dataclass
class Asker:
    name: str
    deadline_s: float
    served_turn: int = -1
    served: int = 0


def serve(askers: list[Asker], turns: int) -> dict[str, int]:
    for turn in range(turns):
        first = in_turn(askers, turn)[0]
        first.served_turn = turn
        first.served += 1
    return {asker.name: asker.served for asker in askers}


def test_the_earliest_deadline_comes_first_but_nobody_starves() -> None:
    served = serve([Asker("soon", 1.0), Asker("later", 2.0), Asker("whenever", math.inf)], 120)
    assert served["soon"] > 120 * 0.7
    assert min(served["later"], served["whenever"]) >= 120 // FAIR_EVERY // 3


def test_equal_deadlines_share() -> None:
    served = serve([Asker("a", 1.0), Asker("b", 1.0), Asker("c", 1.0)], 120)
    assert max(served.values()) - min(served.values()) <= 2
