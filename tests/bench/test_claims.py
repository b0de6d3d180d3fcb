"""Claims follow from the rows of an evaluation, by hand-made rows whose answers are plain."""

from __future__ import annotations

from typing import Any

import pytest

from cachegen.bench.claims import claims, headline, lossless, never_above


def row(family: str, label: str, bits: float, **changes: Any) -> dict[str, Any]:
    retrieval = changes.pop("retrieval", 1.0)
    return {
        "family": family,
        "label": label,
        "billed_bits_per_value": bits,
        "prompt_bits_per_value": None,
        "ratio_vs_16bit": 16 / bits,
        "calibration_bytes": 0,
        "kl_nats": 0.001,
        "answer_kl_nats": 0.001,
        "top1_agreement": 0.99,
        "accuracy_ratio": 1.0,
        "lossless_in_practice": True,
        "named": False,
        "tasks": {"retrieval": {"accuracy": retrieval}},
        **changes,
    }


def evaluation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": rows,
        "lossless_kl_nats": 0.01,
        "uncompressed": {"retrieval": {"accuracy": 1.0}},
        "bd_rates": [],
    }


def test_the_headline_takes_the_smallest_point_that_loses_little() -> None:
    result = evaluation(
        [
            row("int8@256", "plain", 8.0),
            row("ours", "cut 0", 0.5, retrieval=0.97),
            row("ours", "cut 1", 1.0, top1_agreement=0.97),
            row("ours", "cut 2", 2.0),
        ]
    )
    loose, strict = (entry for entry in headline(result) if entry["family"] == "ours")
    assert (loose["point"], loose["times_smaller_than_8_bit"], loose["met"]) == ("cut 1", 8.0, True)
    assert loose["beyond_the_headline"] == pytest.approx(8 / 4.3)
    assert (strict["point"], strict["met"]) == ("cut 2", False)
    assert strict["losses"]["top1_agreement"] == pytest.approx(0.01)


def test_the_larger_of_texts_and_prompts_is_billed() -> None:
    rows = [
        row("int8@256", "plain", 8.0, prompt_bits_per_value=8.0),
        row("ours", "cut 0", 1.0, prompt_bits_per_value=2.5),
        row("ours", "lossless-in-practice", 2.0, prompt_bits_per_value=1.0, named=True),
    ]
    (entry, _) = (entry for entry in headline(evaluation(rows)) if entry["family"] == "ours")
    assert (entry["point"], entry["bits_per_value"]) == ("lossless-in-practice", 2.0)
    (entry,) = (entry for entry in lossless(evaluation(rows)) if entry["family"] == "ours")
    assert entry["named"]["ratio_vs_16bit"] == 8.0


def test_on_top_of_eviction_it_is_compared_with_eviction_alone() -> None:
    result = evaluation(
        [
            row("int8", "plain", 8.0),
            row("h2o", "keep 50%", 8.0, retrieval=0.5, accuracy_ratio=0.9, top1_agreement=0.8),
            row("h2o+int8", "keep 50% plain", 4.0, retrieval=0.5),
            row("h2o+ours", "keep 50% cut 0", 0.5, retrieval=0.495, accuracy_ratio=0.9),
            row("h2o+ours", "keep 50% cut 1", 0.6, retrieval=0.48),
        ]
    )
    entry = next(e for e in headline(result) if e["family"] == "h2o+ours" and not e["strict"])
    assert (entry["eviction"], entry["point"]) == ("keep 50%", "keep 50% cut 0")
    assert entry["times_smaller_than_8_bit"] == 8.0
    assert entry["losses"]["retrieval"] == pytest.approx(0.01)


def test_a_family_that_loses_too_much_has_no_point() -> None:
    result = evaluation([row("int8", "plain", 8.0), row("bad", "", 1.0, retrieval=0.5)])
    bad = [entry for entry in headline(result) if entry["family"] == "bad"]
    assert [(entry["point"], entry["met"]) for entry in bad] == [(None, False)] * 2


def test_lossless_shows_the_smallest_and_the_named_point() -> None:
    result = evaluation(
        [
            row("ours", "cut 0", 0.5, lossless_in_practice=False, kl_nats=0.1),
            row("ours", "cut 1", 1.0),
            row("ours", "lossless-in-practice", 2.0, named=True),
        ]
    )
    (entry,) = lossless(result)
    assert entry["smallest"]["ratio_vs_16bit"] == 16.0
    assert entry["named"]["ratio_vs_16bit"] == 8.0
    # KL falls from 0.1 to 0.001 as the bits double: 0.01 is half-way, in logarithms.
    assert entry["ratio_at_largest_kl"] == pytest.approx(32 / 2**0.5)
    assert claims(result)["lossless"] == [entry]


def test_never_above_needs_the_worst_place() -> None:
    names = {"curve": "ours", "peer": "theirs", "quality": "text"}
    rates = [
        {**names, "percent": -50.0, "worst_percent": -3.0},
        {**names, "percent": -50.0, "worst_percent": 4.0},
        {**names, "percent": None, "reason": "no common range"},
    ]
    assert [entry["holds"] for entry in never_above(rates)] == [True, False]
