"""What a link is expected to carry: a distribution of its rate, learned from finished transfers.

The rate of the next transfer is taken as log-normal. Samples age, so that a link that changed is
believed anew, and one that was not used for long is uncertain again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from cachegen.errors import ConfigError

_NORMAL = NormalDist()
# A link is never known better than this: even a quiet one moves by a few per cent.
LEAST_DEVIATION = 0.05
# A transfer of so many seconds counts half: short ones say little about the rate.
HALF_WEIGHT_S = 0.02


@dataclass(frozen=True)
class LinkEstimate:
    """Distribution of what one more transfer gets from a link.

    log_rate, deviation: mean and deviation of the natural logarithm of bytes/s.
    latency_s: from asking until the first byte. last_rate_bytes_per_s: of the last transfer alone,
    which is all that CacheGen's own rule looks at; None before there was one.
    """

    log_rate: float
    deviation: float
    latency_s: float = 0.0
    last_rate_bytes_per_s: float | None = None

    @classmethod
    def known(cls, rate_bytes_per_s: float, *, latency_s: float = 0.0) -> LinkEstimate:
        """Return the estimate of a link whose rate is given and constant."""
        _require_positive("rate_bytes_per_s", rate_bytes_per_s)
        return cls(math.log(rate_bytes_per_s), 0.0, latency_s, rate_bytes_per_s)

    def rate_bytes_per_s(self, quantile: float = 0.5) -> float:
        """Return the rate that is fallen short of with this probability; 0.5 is the median."""
        shift = 0.0 if quantile == 0.5 else self.deviation * _NORMAL.inv_cdf(quantile)
        return math.exp(self.log_rate + shift)

    def transfer_s(self, size_bytes: int, *, quantile: float = 0.5) -> float:
        """Return the time that a transfer stays within with this probability."""
        return self.latency_s + size_bytes / self.rate_bytes_per_s(1.0 - quantile)

    def probability_late(self, size_bytes: int, seconds: float) -> float:
        """Return the probability that a transfer takes longer than so many seconds."""
        if size_bytes <= 0:
            return 0.0
        left = seconds - self.latency_s
        if left <= 0:
            return 1.0
        short = math.log(size_bytes / left) - self.log_rate
        if self.deviation <= 0:
            return float(short > 1e-9)
        return _NORMAL.cdf(short / self.deviation)


@dataclass(frozen=True)
class LinkPrior:
    """What is believed of a link before it was used: about 1 Gbit/s, give or take a factor of 3.

    weight: how many transfers this belief is worth. half_life_s: age at which a sample counts half.
    """

    rate_bytes_per_s: float = 125e6
    deviation: float = 1.1
    latency_s: float = 0.005
    weight: float = 0.2
    half_life_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("rate_bytes_per_s", "deviation", "weight", "half_life_s"):
            _require_positive(name, getattr(self, name))


class BandwidthEstimator:
    """Learns a link from observed transfers; the caller passes the time, there is no clock here."""

    def __init__(self, prior: LinkPrior | None = None) -> None:
        self._prior = prior or LinkPrior()
        self._weight = self._mean = self._scatter = 0.0
        self._latency_weight = 0.0
        self._latency_s = self._prior.latency_s
        self._observed_s: float | None = None
        self._last_rate: float | None = None

    def observe(
        self, size_bytes: int, seconds: float, *, now_s: float, first_byte_s: float | None = None
    ) -> None:
        """Take in one transfer, or the part of one that has arrived so far.

        seconds: from the first byte to the last. first_byte_s: from asking to the first byte.
        now_s: when the last byte came, on the clock that ``estimate`` is asked by.
        """
        if size_bytes <= 0 or seconds <= 0:
            return
        self._age(now_s)
        weight = seconds / (seconds + HALF_WEIGHT_S)
        value = math.log(size_bytes / seconds)
        self._weight += weight
        step = (value - self._mean) * weight / self._weight
        self._scatter += weight * (value - self._mean) * (value - self._mean - step)
        self._mean += step
        self._last_rate = size_bytes / seconds
        if first_byte_s is not None:
            self._latency_weight = min(self._latency_weight + 1.0, 8.0)
            share = 1.0 / self._latency_weight
            self._latency_s += (first_byte_s - self._latency_s) * share

    def estimate(self, now_s: float) -> LinkEstimate:
        """Return what is known at a time."""
        self._age(now_s)
        prior = self._prior
        total = prior.weight + self._weight
        middle = math.log(prior.rate_bytes_per_s)
        mean = (prior.weight * middle + self._weight * self._mean) / total
        # Posterior of a normal with unknown mean and variance: own scatter, the prior's, and how
        # far the two disagree; then widened, because the mean itself is uncertain.
        apart = prior.weight * self._weight / total * (self._mean - middle) ** 2
        variance = (prior.weight * prior.deviation**2 + self._scatter + apart) / total
        deviation = max(math.sqrt(variance * (1.0 + 1.0 / (1.0 + total))), LEAST_DEVIATION)
        return LinkEstimate(mean, deviation, self._latency_s, self._last_rate)

    def _age(self, now_s: float) -> None:
        if self._observed_s is not None and now_s > self._observed_s:
            factor = 0.5 ** ((now_s - self._observed_s) / self._prior.half_life_s)
            self._weight *= factor
            self._scatter *= factor
        if self._observed_s is None or now_s > self._observed_s:
            self._observed_s = now_s


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(name, got=value, expected="a finite number above 0")
