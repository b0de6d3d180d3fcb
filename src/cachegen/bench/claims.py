"""What an evaluation shows of the project's claims, from its operating points alone.

Three questions: how far below 8-bit quantisation at a loss of at most 2 %, with token eviction
beneath it and without; how small what is lossless in practice; and whether any curve is above a
peer's anywhere. Each answer names the operating point that gives it. Sizes are those on texts or on
the prompts of tasks, whichever are larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# CacheGen's own headline: bytes of 8-bit quantisation over its bytes, at a loss of at most 2 %.
HEADLINE_FACTOR = 4.3
MAX_LOSS = 0.02
EVICTION = "h2o"
EIGHT_BIT = ("int8", "plain")

Row = dict[str, Any]


def claims(result: dict[str, Any]) -> dict[str, Any]:
    """Return the answers for the rows of an evaluation (``rows``, ``uncompressed``, ``bd_rates``).

    Returns: ``headline``, ``lossless`` and ``never_above``, JSON-able.
    """
    return {
        "headline": headline(result),
        "lossless": lossless(result),
        "never_above": never_above(result["bd_rates"]),
    }


def headline(result: dict[str, Any]) -> list[Row]:
    """Return each family's smallest point that loses at most 2 %, against 8-bit quantisation.

    The loss is the largest of: retrieval accuracy against the uncompressed model's, share of next
    tokens predicted right, and top-1 agreement, the last by ``strict`` alone. With eviction beneath
    a codec, loss is against eviction alone and size against 8 bits on top of the same eviction.
    """
    rows: Sequence[Row] = result["rows"]
    answers: list[Row] = []
    for family, points in _families(rows).items():
        evicts = family.startswith(f"{EVICTION}+")
        for share in sorted({_share(row["label"]) for row in points}) if evicts else [""]:
            plain = _eight_bit(rows, share)
            base = _eviction_alone(rows, share) if evicts else None
            if plain is None or (evicts and base is None):
                continue
            asked = [row for row in points if _share(row["label"]) == share or not evicts]
            for strict in (False, True):
                losses = {row["label"]: _losses(row, base, result, strict=strict) for row in asked}
                good = [row for row in asked if max(losses[row["label"]].values()) <= MAX_LOSS]
                best = min(good, key=_bits, default=None)
                entry: Row = {"family": family, "eviction": share or None, "strict": strict}
                if best is None:
                    answers.append(entry | {"point": None, "met": False})
                    continue
                factor = _bits(plain) / _bits(best)
                answers.append(
                    entry
                    | {
                        "point": best["label"],
                        "bits_per_value": _bits(best),
                        "eight_bit_bits_per_value": _bits(plain),
                        "times_smaller_than_8_bit": factor,
                        "beyond_the_headline": factor / HEADLINE_FACTOR,
                        "losses": losses[best["label"]],
                        "calibration_bytes": best["calibration_bytes"],
                        "met": factor >= HEADLINE_FACTOR,
                    }
                )
    return answers


def lossless(result: dict[str, Any]) -> list[Row]:
    """Return for each family the smallest point that is lossless in practice, and the named level.

    The first knows the outcome of the evaluation, the second is what an object promises by itself.
    Between the points the curve says at which ratio it crosses the largest KL that counts as such.
    """
    answers: list[Row] = []
    for family, points in _families(result["rows"]).items():
        good = [row for row in points if row["lossless_in_practice"]]
        best = min(good, key=_bits, default=None)
        level = next((row for row in points if row["label"] == "lossless-in-practice"), None)
        answers.append(
            {
                "family": family,
                "calibration_bytes": points[0]["calibration_bytes"],
                "smallest": _point(best),
                "named": _point(level),
                "ratio_at_largest_kl": _crossing(points, result["lossless_kl_nats"]),
            }
        )
    return answers


def never_above(bd_rates: Sequence[Row]) -> list[Row]:
    """Say of each compared pair whether the curve is below the peer's over all of their range."""
    return [
        {
            "curve": rate["curve"],
            "peer": rate["peer"],
            "quality": rate["quality"],
            "holds": rate["worst_percent"] <= 0,
            "worst_percent": rate["worst_percent"],
        }
        for rate in bd_rates
        if rate["percent"] is not None
    ]


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    return families


def _share(label: str) -> str:
    """Return the share of tokens kept, "keep 50%", that a label starts with, else nothing."""
    words = label.split()
    return " ".join(words[:2]) if words[:1] == ["keep"] else ""


def _eight_bit(rows: Sequence[Row], share: str) -> Row | None:
    """Find plain 8-bit quantisation, on top of the eviction that is asked for."""
    family, label = EIGHT_BIT
    wanted = (f"{EVICTION}+{family}", f"{share} {label}") if share else (family, label)
    for row in rows:
        if (row["family"].partition("@")[0], row["label"]) == wanted:
            return row
    return None


def _eviction_alone(rows: Sequence[Row], share: str) -> Row | None:
    return next((r for r in rows if r["family"] == EVICTION and r["label"] == share), None)


def _losses(row: Row, base: Row | None, result: Row, *, strict: bool) -> dict[str, float]:
    """Return what a point loses, as shares of what it is compared with."""
    scores = base["tasks"] if base else result["uncompressed"]
    losses = {}
    if "retrieval" in row["tasks"]:
        before = scores["retrieval"]["accuracy"]
        losses["retrieval"] = 1 - row["tasks"]["retrieval"]["accuracy"] / max(before, 1e-9)
    losses["right_next_tokens"] = 1 - row["accuracy_ratio"] / (
        base["accuracy_ratio"] if base else 1
    )
    if strict:
        before = base["top1_agreement"] if base else 1.0
        losses["top1_agreement"] = 1 - row["top1_agreement"] / before
    return losses


def _bits(row: Row) -> float:
    """Return the billed bits/value of a point, on texts or on prompts."""
    return max(float(row["billed_bits_per_value"]), float(row["prompt_bits_per_value"] or 0.0))


def _point(row: Row | None) -> Row | None:
    if row is None:
        return None
    return {
        "label": row["label"],
        "bits_per_value": _bits(row),
        "ratio_vs_16bit": 16 / _bits(row),
        "kl_nats": row["kl_nats"],
        "answer_kl_nats": row["answer_kl_nats"],
        "lossless_in_practice": row["lossless_in_practice"],
    }


def _crossing(points: Sequence[Row], kl: float) -> float | None:
    """Return the ratio at which a family's curve crosses a KL, on straight lines in logarithms."""
    curve = sorted(
        (math.log(_bits(row)), math.log(max(row["kl_nats"], 1e-12)))
        for row in points
        if not row["named"]
    )
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 > math.log(kl) >= y1:
            share = (y0 - math.log(kl)) / (y0 - y1)
            return 16 / math.exp(x0 + share * (x1 - x0))
    return None
