"""Which rate-quality curves of an evaluation are compared, and on which quality.

Two qualities: KL on a teacher-forced continuation of text, and KL at the answers to questions. The
first hardly depends on what is far away, the second depends on single tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cachegen.bench.baselines.base import Bill
from cachegen.bench.curves import Curve, CurveError, bd_rate

if TYPE_CHECKING:
    from cachegen.bench.evaluate import Measurement

# A curve billed without what only makes objects of it: to a peer's advantage.
UNFRAMED = ", framing not billed"

Sizes = Callable[[Bill], int]


def bd_rates(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Compare every setting of the first family with the peers of the same chunk size.

    Peers that code whole prefixes are compared at every chunk size. Returns: for each pair and
    quality the BD-rate in per cent with its interval and its worst place, or why there is none.
    """
    results: list[dict[str, Any]] = []
    for quality in ("text", "answers"):
        curves = curves_of(measurements, quality)
        if not curves:
            continue
        first = _setting(curves[0].name)[0]
        subjects = [curve for curve in curves if _setting(curve.name)[0] == first]
        for index, subject in enumerate(subjects):
            peers = [*subjects[index + 1 :], *(c for c in curves if c not in subjects)]
            for peer in peers:
                sizes = {_setting(curve.name)[1] for curve in (subject, peer)} - {""}
                if len(sizes) <= 1 and not _is_unframed(subject):
                    results.append(_compared(subject, peer, quality))
    return results


def curves_of(measurements: Sequence[Measurement], quality: str = "text") -> list[Curve]:
    """Return the curve of each family, in the order of their first points.

    quality: "text" or "answers". Families that are billed for framing and share no tables with
    their chunks have a second curve without it, where they follow the paper's setting.
    """
    families: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        if not measurement.named:
            families.setdefault(measurement.family, []).append(measurement)
    curves = []
    for name, points in families.items():
        bills, kl = _measured(points, quality)
        if not kl.size:
            continue
        curves.append(Curve(name, _sizes(bills, lambda bill: bill.total_bytes), kl))
        if name.removeprefix("h2o+").startswith("cachegen-paper"):
            bare = _sizes(bills, lambda bill: bill.total_bytes - bill.framing_bytes)
            curves.append(Curve(name + UNFRAMED, bare, kl))
    return curves


def _measured(
    points: Sequence[Measurement], quality: str
) -> tuple[list[list[Bill]], NDArray[np.float64]]:
    if quality == "answers":
        return [p.task_bills for p in points], np.array([p.answer_kl for p in points], np.float64)
    kl = [[agreement.kl_nats for agreement in point.agreements] for point in points]
    return [point.bills for point in points], np.array(kl, np.float64)


def _sizes(bills: Sequence[Sequence[Bill]], size: Sizes) -> NDArray[np.float64]:
    return np.array([[size(bill) for bill in row] for row in bills], np.float64)


def _is_unframed(curve: Curve) -> bool:
    return curve.name.endswith(UNFRAMED)


def _setting(name: str) -> tuple[str, str]:
    """Split a curve's name into the plain name of its family and its chunk size, "" for none."""
    plain, _, size = name.removesuffix(UNFRAMED).partition("@")
    return plain.partition(":")[0], size


def _compared(subject: Curve, peer: Curve, quality: str) -> dict[str, Any]:
    result: dict[str, Any] = {"curve": subject.name, "peer": peer.name, "quality": quality}
    try:
        rate = bd_rate(subject, peer)
    except CurveError as error:
        return result | {"percent": None, "reason": str(error)}
    return result | {
        "percent": rate.percent,
        "interval": [rate.low, rate.high],
        "worst_percent": rate.worst,
        "kl_range_nats": list(rate.kl_range),
        "resamples": rate.resamples,
    }
