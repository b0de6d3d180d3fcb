"""Which rate-quality curves of an evaluation are compared, and on which quality.

Two qualities: KL on a teacher-forced continuation of text, and KL at the answers to questions. The
first hardly depends on what is far away, the second depends on single tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cachegen.bench.curves import Curve, CurveError, bd_rate

RESAMPLES = 500
# A curve billed without what only makes objects of it: to a peer's advantage.
UNFRAMED = ", framing not billed"

Row = dict[str, Any]
# Per-prompt sizes, framing in them, and KL of a row, for each quality.
FIELDS = {
    "text": ("bytes_by_text", "framing_by_text", "kl_by_text"),
    "answers": ("bytes_by_prompt", "framing_by_prompt", "answer_kl_by_prompt"),
}


def bd_rates(rows: Sequence[Row]) -> list[Row]:
    """Compare every setting of the first family with the peers of the same chunk size.

    rows: operating points of an evaluation. Peers that code whole prefixes are compared at every
    chunk size, token eviction with none. Returns: for each pair and quality the BD-rate in per cent
    with its interval and its worst place, or why there is none.
    """
    results: list[Row] = []
    for quality in FIELDS:
        curves = curves_of(rows, quality)
        if not curves:
            continue
        first = _setting(curves[0].name)[0]
        subjects = [curve for curve in curves if _setting(curve.name)[0] == first]
        for index, subject in enumerate(subjects):
            others = [c for c in curves if c not in subjects and not _evicts(c)]
            peers = [*subjects[index + 1 :], *others]
            for peer in peers:
                sizes = {_setting(curve.name)[1] for curve in (subject, peer)} - {""}
                if len(sizes) <= 1 and not _is_unframed(subject):
                    results.append(_compared(subject, peer, quality))
    return results


def curves_of(rows: Sequence[Row], quality: str = "text") -> list[Curve]:
    """Return the curve of each family, in the order of their first points.

    quality: "text" or "answers". The paper's setting has a second curve, without framing.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        if not row["named"]:
            families.setdefault(row["family"], []).append(row)
    curves = []
    for name, points in families.items():
        size, framing, kl = (
            np.array([point[field] for point in points], np.float64) for field in FIELDS[quality]
        )
        if not kl.size:
            continue
        curves.append(Curve(name, size, kl))
        if name.removeprefix("h2o+").startswith("cachegen-paper"):
            curves.append(Curve(name + UNFRAMED, size - framing, kl))
    return curves


def _evicts(curve: Curve) -> bool:
    """Tokens that are gone lose answers whatever the rate: no curve of the same kind."""
    return curve.name.startswith("h2o")


def _is_unframed(curve: Curve) -> bool:
    return curve.name.endswith(UNFRAMED)


def _setting(name: str) -> tuple[str, str]:
    """Split a curve's name into the plain name of its family and its chunk size, "" for none."""
    plain, _, size = name.removesuffix(UNFRAMED).partition("@")
    return plain.partition(":")[0], size


def _compared(subject: Curve, peer: Curve, quality: str) -> dict[str, Any]:
    result: dict[str, Any] = {"curve": subject.name, "peer": peer.name, "quality": quality}
    try:
        rate = bd_rate(subject, peer, resamples=RESAMPLES)
    except CurveError as error:
        return result | {"percent": None, "reason": str(error)}
    return result | {
        "percent": rate.percent,
        "interval": [rate.low, rate.high],
        "worst_percent": rate.worst,
        "kl_range_nats": list(rate.kl_range),
        "resamples": rate.resamples,
    }
