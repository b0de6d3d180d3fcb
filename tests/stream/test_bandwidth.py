from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachegen.errors import ConfigError
from cachegen.stream.bandwidth import (
    LEAST_DEVIATION,
    BandwidthEstimator,
    LinkEstimate,
    LinkPrior,
)


def fed(rates: list[float], *, every_s: float = 0.2) -> tuple[BandwidthEstimator, float]:
    """An estimator that saw transfers of 0.1 s, and the time of the last one."""
    estimator, now_s = BandwidthEstimator(), 0.0
    for rate in rates:
        now_s += every_s
        estimator.observe(round(rate * 0.1), 0.1, now_s=now_s, first_byte_s=0.02)
    return estimator, now_s


def test_a_known_link_is_certain() -> None:
    link = LinkEstimate.known(1000.0, latency_s=0.5)
    assert link.rate_bytes_per_s(0.01) == pytest.approx(1000.0)
    assert link.transfer_s(2000, quantile=0.99) == pytest.approx(2.5)
    assert link.probability_late(2000, 2.5) == 0.0 and link.probability_late(2000, 2.4) == 1.0
    assert link.probability_late(0, -1.0) == 0.0
    with pytest.raises(ConfigError):
        LinkEstimate.known(0.0)
    with pytest.raises(ConfigError):
        LinkPrior(weight=0.0)


@given(st.floats(0.05, 0.95), st.integers(1, 10**9))
def test_quantiles_and_probabilities_agree(quantile: float, size: int) -> None:
    link = LinkEstimate(math.log(1e6), 0.7, latency_s=0.01)
    late = link.probability_late(size, link.transfer_s(size, quantile=quantile))
    assert late == pytest.approx(1.0 - quantile, abs=1e-6)


def test_the_prior_is_wide_and_gives_way() -> None:
    before = BandwidthEstimator().estimate(0.0)
    assert before.rate_bytes_per_s() == pytest.approx(125e6)
    assert before.deviation > 1.0 and before.last_rate_bytes_per_s is None
    once, now_s = fed([10e6])
    after = once.estimate(now_s)
    assert 10e6 < after.rate_bytes_per_s() < 30e6


def test_estimates_converge_to_a_noisy_link() -> None:
    random_ = random.Random(1)
    rates = [50e6 * math.exp(random_.gauss(0.0, 0.3)) for _ in range(400)]
    estimator, now_s = fed(rates)
    link = estimator.estimate(now_s)
    assert link.rate_bytes_per_s() == pytest.approx(50e6, rel=0.15)
    assert link.deviation == pytest.approx(0.3, rel=0.35)
    assert link.latency_s == pytest.approx(0.02)
    assert link.last_rate_bytes_per_s == pytest.approx(rates[-1], rel=0.01)
    # Calibrated: about one transfer in ten falls short of the lower tenth.
    short = sum(rate < link.rate_bytes_per_s(0.1) for rate in rates) / len(rates)
    assert 0.02 < short < 0.2


def test_a_changed_link_is_believed_anew() -> None:
    estimator, now_s = fed([100e6] * 50 + [10e6] * 50)
    assert estimator.estimate(now_s).rate_bytes_per_s() == pytest.approx(10e6, rel=0.6)


def test_certainty_ages() -> None:
    estimator, now_s = fed([50e6] * 50)
    fresh = estimator.estimate(now_s)
    assert fresh.deviation < 0.2
    stale = estimator.estimate(now_s + 120.0)
    assert stale.deviation > 0.9
    # Asking for an earlier time changes nothing.
    assert estimator.estimate(now_s).deviation == stale.deviation


def test_long_transfers_say_more_than_short_ones() -> None:
    estimator = BandwidthEstimator()
    estimator.observe(10_000_000, 1.0, now_s=1.0)
    estimator.observe(1_000, 1e-6, now_s=1.0)  # 1 GB/s, a moment long
    assert estimator.estimate(1.0).rate_bytes_per_s() < 20e6


def test_nothing_is_learned_from_nothing() -> None:
    estimator = BandwidthEstimator()
    before = estimator.estimate(0.0)
    estimator.observe(0, 1.0, now_s=0.0)
    estimator.observe(10, 0.0, now_s=0.0)
    assert estimator.estimate(0.0) == before
    steady, now_s = fed([1e6] * 2000)
    assert steady.estimate(now_s).deviation >= LEAST_DEVIATION
