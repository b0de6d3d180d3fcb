"""Comparing rate-quality curves: BD-rate with an interval over prompts.

BD-rate is the mean difference of log bytes between two curves at equal quality, in per cent: -50
means half the bytes for the same KL. Quality is log KL; the curves are log bytes as a function of
it, joined by monotone cubics, and compared where both have points.
Source: Bjontegaard, VCEG-M33 (2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import ConfigError, InputError

Array1 = NDArray[np.float64]

RESAMPLES = 1000
SEED = 0
# KL of rounding to 16 bits is of this order: below it, curves compare noise.
KL_FLOOR = 1e-9
# Places at which two curves are compared point by point.
GRID = 200


class CurveError(InputError):
    """Two curves cannot be compared: too few points, or no common range of quality."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Operating points of one family, measured on the same prompts.

    size: (P, N) billed bytes, or bits per value, of point p on prompt n. kl: (P, N) nats/token.
    Raises: ConfigError for other shapes, fewer than one prompt, or sizes that are not positive.
    """

    name: str
    size: NDArray[np.float64]
    kl: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.size.shape != self.kl.shape or self.size.ndim != 2 or not self.size.size:
            raise ConfigError(
                f"curve {self.name}", got=(self.size.shape, self.kl.shape), expected="(P, N) twice"
            )
        if not (np.isfinite(self.kl).all() and np.isfinite(self.size).all()):
            raise ConfigError(f"curve {self.name}", got="NaN or Inf", expected="finite numbers")
        if not (self.size > 0).all():
            raise ConfigError(f"sizes of curve {self.name}", got="0 or less", expected="positive")

    def front(self, prompts: NDArray[np.int64] | None = None) -> tuple[Array1, Array1]:
        """Return (log KL ascending, log size descending) of the means over prompts.

        prompts: indices, with repetition; None for all, once. Points that are no smaller and no
        better than another one are left out: a curve needs one size for each quality.
        """
        chosen = slice(None) if prompts is None else prompts
        size = self.size[:, chosen].mean(axis=1)
        kl = np.maximum(self.kl[:, chosen].mean(axis=1), KL_FLOOR)
        order = np.lexsort((size, kl))
        x: list[float] = []
        y: list[float] = []
        for quality, bytes_ in zip(np.log(kl[order]), np.log(size[order]), strict=True):
            if not y or (bytes_ < y[-1] and quality > x[-1]):
                x.append(float(quality))
                y.append(float(bytes_))
        return np.array(x), np.array(y)


@dataclass(frozen=True)
class BDRate:
    """Difference in size at equal quality, per cent; negative: the first curve is smaller.

    low, high: 95 % bootstrap interval over prompts. kl_range: common range, nats/token.
    resamples: bootstrap samples in which the curves still had a common range.
    worst: the largest difference anywhere in the range, per cent; below 0, the first curve is
        never above the peer's.
    """

    percent: float
    low: float
    high: float
    kl_range: tuple[float, float]
    resamples: int
    worst: float


def bd_rate(curve: Curve, peer: Curve, *, resamples: int = RESAMPLES, seed: int = SEED) -> BDRate:
    """Compare a curve with a peer's, prompts resampled jointly.

    Raises: CurveError if the curves have fewer than two points or no common range of quality, or
        lose it in more than half of the bootstrap samples; ConfigError for different prompts.
    """
    count = curve.size.shape[1]
    if peer.size.shape[1] != count:
        raise ConfigError("prompts of the curves", got=peer.size.shape[1], expected=count)
    percent, kl_range, worst = _difference(curve, peer, None)
    rng = np.random.default_rng(seed)
    samples: list[float] = []
    for _ in range(resamples):
        prompts = rng.integers(count, size=(count,))
        try:
            samples.append(_difference(curve, peer, prompts)[0])
        except CurveError:
            continue  # counted by what is missing in ``resamples``
    if 2 * len(samples) < resamples:
        raise CurveError(
            f"range of {curve.name} and {peer.name}",
            got=f"common in {len(samples)} of {resamples} bootstrap samples",
            expected="at least half",
            remedy="measure more operating points or more prompts",
        )
    low, high = np.percentile(samples, (2.5, 97.5)) if samples else (percent, percent)
    return BDRate(percent, float(low), float(high), kl_range, len(samples), worst)


def _difference(
    curve: Curve, peer: Curve, prompts: NDArray[np.int64] | None
) -> tuple[float, tuple[float, float], float]:
    """Return the mean difference, the common range and, for all prompts, the largest one."""
    fronts = [(c.name, *c.front(prompts)) for c in (curve, peer)]
    for name, x, _ in fronts:
        if len(x) < 2:
            raise CurveError(
                f"curve {name}",
                got=f"{len(x)} point(s) that trade size for quality",
                expected="at least 2",
                remedy="measure more operating points",
            )
    low = max(float(x[0]) for _, x, _ in fronts)
    high = min(float(x[-1]) for _, x, _ in fronts)
    if high <= low:
        ranges = {name: f"{np.exp(x[0]):.1e} to {np.exp(x[-1]):.1e}" for name, x, _ in fronts}
        raise CurveError(
            f"KL of {curve.name} and {peer.name}",
            got=" and ".join(ranges.values()),
            expected="ranges that overlap",
            remedy="measure operating points of similar quality",
        )
    splines = [Pchip.fit(x, y) for _, x, y in fronts]
    first, second = (spline.integral(low, high) for spline in splines)
    mean = (first - second) / (high - low)
    largest = mean
    if prompts is None:
        grid = np.linspace(low, high, GRID)
        largest = float((splines[0](grid) - splines[1](grid)).max())
    kl_range = float(np.exp(low)), float(np.exp(high))
    return 100 * float(np.expm1(mean)), kl_range, 100 * float(np.expm1(largest))


@dataclass(frozen=True)
class Pchip:
    """A monotone piecewise cubic through points: no overshoot between them.

    x: (n,) ascending. y, slopes: (n,) values and derivatives there.
    Source: Fritsch and Butland (1984); end slopes by the three-point formula, as in MATLAB.
    """

    x: Array1
    y: Array1
    slopes: Array1

    @classmethod
    def fit(cls, x: Array1, y: Array1) -> Pchip:
        """Fit to two or more points. Raises: ConfigError if x does not ascend."""
        if len(x) < 2 or len(x) != len(y) or not (np.diff(x) > 0).all():
            raise ConfigError("points", got=x.tolist(), expected="2 or more, x ascending")
        h = np.diff(x)
        secants = np.diff(y) / h
        if len(x) == 2:
            return cls(x, y, np.repeat(secants, 2))
        slopes = np.zeros(len(x))
        left, right = secants[:-1], secants[1:]
        w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        same = left * right > 0
        safe = np.where(same, left, 1), np.where(same, right, 1)
        slopes[1:-1] = np.where(same, (w1 + w2) / (w1 / safe[0] + w2 / safe[1]), 0)
        slopes[0] = _end_slope(h[0], h[1], secants[0], secants[1])
        slopes[-1] = _end_slope(h[-1], h[-2], secants[-1], secants[-2])
        return cls(x, y, slopes)

    def __call__(self, at: Array1) -> Array1:
        """Return the values at points within [x[0], x[-1]]."""
        i = np.clip(np.searchsorted(self.x, at, side="right") - 1, 0, len(self.x) - 2)
        h = self.x[i + 1] - self.x[i]
        t = (at - self.x[i]) / h
        result: Array1 = (
            self.y[i] * (1 + 2 * t) * (1 - t) ** 2
            + self.slopes[i] * h * t * (1 - t) ** 2
            + self.y[i + 1] * t**2 * (3 - 2 * t)
            + self.slopes[i + 1] * h * t**2 * (t - 1)
        )
        return result

    def integral(self, low: float, high: float) -> float:
        """Return the exact integral over [low, high], within [x[0], x[-1]]."""
        inner = self.x[(self.x > low) & (self.x < high)]
        knots = np.array([low, *inner, high])
        # Simpson's rule is exact for cubics.
        middle = self((knots[1:] + knots[:-1]) / 2)
        ends = self(knots)
        return float(np.sum(np.diff(knots) * (ends[:-1] + 4 * middle + ends[1:]) / 6))


def _end_slope(h0: float, h1: float, d0: float, d1: float) -> float:
    """One-sided three-point derivative, kept monotone."""
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    if slope * d0 <= 0:
        return 0.0
    return 3 * d0 if d0 * d1 <= 0 and abs(slope) > abs(3 * d0) else slope
