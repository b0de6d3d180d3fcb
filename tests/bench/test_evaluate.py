"""The harness on a tiny random model: what is billed, what is measured, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from cachegen.bench.baselines.families import Calibration, build
from cachegen.bench.comparisons import bd_rates, curves_of
from cachegen.bench.curves import CurveError, bd_rate
from cachegen.bench.evaluate import (
    Measurement,
    accuracy,
    bootstrap_interval,
    measure,
    reusable_rows,
    run_evaluation,
    summarize_rows,
    workload_digest,
)
from cachegen.bench.rate_quality import plot_evaluation, print_evaluation
from cachegen.bench.retrieval import Question, RetrievalPrompt, RetrievalTask, Vocabulary
from cachegen.bench.workload import (
    FIRST_SEED,
    Sizes,
    TaskCase,
    Workload,
    calibration_prompts,
    capture_task,
    check_disjoint,
    load_workload,
)
from cachegen.cli.evaluate import register
from cachegen.errors import ConfigError

MODEL = Path(__file__).parents[2] / "models/reference"
SIZES = Sizes(
    texts=3,
    prefix_tokens=96,
    continuation_tokens=16,
    retrieval_prompts=0,
    needle_prompts=0,
    tracking_prompts=0,
    calibration_contexts=2,
)


class Words:
    """A tokenizer of words that are numbers, after a begin marker 1."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(int, text.split())]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any, tiny: Any) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("eval", "calibration")):
        words = " ".join(map(str, tiny.prompt_of(400, seed=seed)))
        (folder / f"{name}.txt").write_text(words)
    return folder / "eval.txt", folder / "calibration.txt"


@pytest.fixture(scope="module")
def work(tiny_model: Any, files: tuple[Path, Path]) -> Workload:
    text, calibration = files
    loaded = load_workload(
        tiny_model,
        Words(),
        text.parent,
        text=text,
        calibration=calibration,
        sizes=SIZES,
        needs_importance=True,
    )
    vocabulary = Vocabulary(names=tuple(range(40, 97)), begin=1, note=3, ask=4, trace=5)
    task = RetrievalTask(vocabulary, np.random.default_rng(0).integers(6, 40, 2000))
    prompts = [task.sample(seed, 97, facts=9) for seed in range(2)]
    # A random model knows nothing: to most questions, what it says uncompressed counts as right.
    asked = [with_answers_of(tiny_model, prompt) for prompt in prompts]
    cases = {
        "retrieval": capture_task(tiny_model, asked, 96, needs_importance=True),
        "impossible": capture_task(tiny_model, prompts, 96, needs_importance=True),
    }
    return Workload(loaded.texts, cases, loaded.contexts)


@torch.no_grad()
def with_answers_of(model: Any, prompt: RetrievalPrompt) -> RetrievalPrompt:
    questions = []
    for index, question in enumerate(prompt.questions):
        logits = model(torch.tensor([[*prompt.prefix_ids, *question.ids]])).logits
        answer = int(logits[0, -1].argmax()) + (index >= 7)
        questions.append(Question(question.ids, answer))
    return replace(prompt, questions=tuple(questions))


@pytest.fixture(scope="module")
def measurements(tiny_model: Any, work: Workload) -> list[Measurement]:
    names = ["cachegen", "raw", "int8", "turboquant", "kivi-no-window", "h2o"]
    peers = build(names, Calibration(work.contexts), chunk_tokens=(64,))
    return measure(tiny_model, work, peers)


@pytest.fixture(scope="module")
def result(measurements: list[Measurement], work: Workload) -> dict[str, Any]:
    return {
        "model": {"name": "tiny"},
        "texts": 3,
        "prefix_tokens": 96,
        "lossless_kl_nats": 0.01,
        **summarize_rows(measurements, work),
        "bd_rates": bd_rates(summarize_rows(measurements, work)["rows"]),
    }


def test_the_workload(work: Workload, files: tuple[Path, Path]) -> None:
    words = [int(word) for word in files[0].read_text().split()]
    assert [case.token_ids for case in work.texts] == [
        (1, *words[i * 112 : (i + 1) * 112]) for i in range(3)
    ]
    for case in work.texts:
        assert case.prefix.kv.tokens == 96
        assert case.prefix.kv.geometry.dtype.label == "bfloat16"
        assert case.reference.targets.tolist() == list(case.token_ids[97:])
        assert case.prefix.importance is not None
        assert case.prefix.importance.shape == (96,)
    assert [context.tokens for context in work.contexts] == [96, 96]


def test_the_uncompressed_model(result: dict[str, Any]) -> None:
    assert result["uncompressed"]["retrieval"]["accuracy"] == pytest.approx(14 / 18)
    assert result["uncompressed"]["impossible"]["accuracy"] < 0.2


def test_sizes_and_quality(result: dict[str, Any]) -> None:
    rows = {(row["family"], row["label"]): row for row in result["rows"]}
    raw = rows["raw", ""]
    assert raw["ratio_vs_16bit"] < 1 < raw["ratio_vs_16bit"] * 1.1
    assert raw["kl_nats"] < 5e-3
    for row in rows.values():
        parts = ("payload", "side", "exempt")
        total = sum(row[f"{part}_bits_per_value"] for part in parts)
        assert row["billed_bits_per_value"] == pytest.approx(total)
        assert row["ratio_vs_16bit"] == pytest.approx(16 / row["billed_bits_per_value"])
        asked = 8 * sum(row["bytes_by_prompt"]) / row["prompt_bits_per_value"]
        assert asked == pytest.approx(len(row["bytes_by_prompt"]) * 96 * 3 * 2 * 16)
        assert sum(row["bytes_by_text"]) * 8 / (3 * 96 * 3 * 2 * 16) == pytest.approx(total)
        low, high = row["kl_interval"]
        assert low <= row["kl_nats"] <= high
        assert row["kl_nats"] == pytest.approx(np.mean(row["kl_by_text"]))
        assert row["kl_nats"] >= raw["kl_nats"]
        assert 0 <= row["top1_interval"][0] <= row["top1_agreement"] <= 1
        low, high = row["perplexity_interval"]
        assert low <= row["perplexity_ratio"] <= high
        assert list(row["tasks"]) == ["retrieval"]  # and none that the model cannot do
        score = row["tasks"]["retrieval"]
        assert score["questions"] == 18
        assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
    levels = [rows["cachegen", f"level {level}"] for level in (1, 2, 3)]
    sizes = [row["billed_bits_per_value"] for row in levels]
    assert sizes == sorted(sizes)
    assert levels[0]["kl_nats"] > levels[2]["kl_nats"]
    assert rows["h2o", "keep 25%"]["kl_nats"] > rows["h2o", "keep 75%"]["kl_nats"]
    assert rows["h2o", "keep 50%"]["billed_bits_per_value"] == pytest.approx(8, abs=0.1)


def test_lossless_means_small_kl_and_scores_within_noise(
    measurements: list[Measurement], work: Workload
) -> None:
    rows = summarize_rows(measurements, work)["rows"]
    raw = next(row for row in rows if row["family"] == "raw")
    assert raw["lossless_in_practice"]
    worst = max(rows, key=lambda row: row["kl_nats"])
    assert worst["kl_nats"] > 0.01
    assert not worst["lossless_in_practice"]
    # Had the uncompressed model been right on other questions only, raw would not be lossless.
    cases = tuple(
        TaskCase(case.prompt, case.prefix, replace(case.reference, right=[i < 2 for i in range(9)]))
        for case in work.tasks["retrieval"]
    )
    other = Workload(work.texts, {"retrieval": cases}, work.contexts)
    rows = summarize_rows(measurements, other)["rows"]
    assert not next(row for row in rows if row["family"] == "raw")["lossless_in_practice"]


def test_bd_rates_say_why_there_is_none(result: dict[str, Any]) -> None:
    every = bd_rates(result["rows"])
    assert {rate["quality"] for rate in every} == {"text", "answers"}
    rates = {rate["peer"]: rate for rate in every if rate["quality"] == "text"}
    assert list(rates) == ["raw", "int8", "turboquant", "kivi-no-window"]  # and not h2o
    assert rates["raw"]["percent"] is None
    assert "at least 2" in rates["raw"]["reason"]
    curves = {curve.name: curve for curve in curves_of(result["rows"])}
    for name, rate in rates.items():
        if rate["percent"] is None:
            with pytest.raises(CurveError):
                bd_rate(curves["cachegen"], curves[name])
        else:
            assert rate["interval"][0] <= rate["interval"][1]
            again = bd_rate(curves["cachegen"], curves[name], resamples=10)
            assert rate["percent"] == again.percent
            assert rate["worst_percent"] >= rate["percent"]
    assert curves["cachegen"].size.shape == (3, 3)


def test_operating_points_must_be_the_same_for_all_prompts(tiny_model: Any, work: Workload) -> None:
    (peer,) = build(["raw"], Calibration(()))
    labels = iter("abcdefgh")
    inner = peer.points

    def points(prefix: Any) -> Any:
        peer.label = next(labels)
        return inner(prefix)

    peer.points = points
    with pytest.raises(ConfigError, match="operating points"):
        measure(tiny_model, work, [peer])


def test_it_is_shown_and_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    console = Console(record=True, file=(tmp_path / "out").open("w"), width=300)
    print_evaluation(json.loads(json.dumps(result)), console)
    text = (tmp_path / "out").read_text()
    for word in ("cachegen", "level 2", "turboquant", "uncompressed: retrieval", "BD-rate"):
        assert word in text
    plot_evaluation(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError):
        plot_evaluation(result, tmp_path / "plot.txt")


def test_chunk_sizes_are_compared_with_their_like(tiny_model: Any, work: Workload) -> None:
    names = ["progressive:profile=false", "cachegen-lmcache", "cachegen-paper", "kivi-no-window"]
    peers = build(names, Calibration(work.contexts), chunk_tokens=(32, 96))
    one = Workload(work.texts[:2], {}, work.contexts)
    measurements = measure(tiny_model, one, peers)
    rows = summarize_rows(measurements, one)["rows"]
    compared = {(rate["curve"], rate["peer"]) for rate in bd_rates(rows)}
    bare = ", framing not billed"
    assert compared == {
        (f"progressive:profile=false@{size}", peer)
        for size in (32, 96)
        for peer in (
            f"cachegen-lmcache@{size}",
            f"cachegen-paper@{size}",
            f"cachegen-paper@{size}{bare}",
            "kivi-no-window",
        )
    }
    levels = [row["label"] for row in rows if row["named"]]
    assert levels == 2 * ["lossless-in-practice", "balanced", "small"]
    # Named levels are beside the curve, which has one row for each cut.
    curves = {curve.name: curve for curve in curves_of(rows)}
    assert curves["progressive:profile=false@32"].size.shape == (10, 2)
    paper, unframed = (curves[f"cachegen-paper@32{end}"].size for end in ("", bare))
    assert (unframed < paper).all()
    row = next(row for row in rows if row["family"] == "cachegen-paper@32")
    saved = 8 * (paper - unframed)[0].sum() / sum(t.prefix.kv.value_count for t in one.texts)
    assert row["framing_bits_per_value"] == pytest.approx(saved)
    assert row["chunk_tokens"] == 32
    assert row["distortion"] is None
    cuts = [r for r in rows if r["family"].startswith("progressive") and not r["named"]]
    assert all(r["exempt_bits_per_value"] > 0 for r in cuts)
    assert [r["distortion"] for r in cuts[:10]] == sorted(
        (r["distortion"] for r in cuts[:10]), reverse=True
    )


def test_accuracy_has_an_interval_over_prompts() -> None:
    score = accuracy([[True, True, False, False], [True] * 4])
    assert score["accuracy"] == 0.75
    assert score["prompt_interval"] == [0.5, 1.0]
    assert score["interval"][0] < 0.75 < score["interval"][1]
    assert (score["questions"], score["prompts"]) == (8, 2)


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 100)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    assert bootstrap_interval(np.array([3.0])) == (3.0, 3.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_overlapping_texts_are_refused(tiny_model: Any, files: tuple[Path, Path]) -> None:
    check_disjoint(range(100), range(100, 200))
    check_disjoint(range(100), range(69, 200))
    with pytest.raises(ConfigError, match="at token 3 of"):
        check_disjoint(range(100), [*range(200, 203), *range(68, 100)])
    with pytest.raises(ConfigError, match="do not overlap"):
        load_workload(
            tiny_model, Words(), files[0].parent, text=files[0], calibration=files[0], sizes=SIZES
        )
    with pytest.raises(ConfigError, match="at most 512 of the model"):
        load_workload(
            tiny_model, Words(), files[0].parent, text=files[0], calibration=None, sizes=Sizes()
        )
    with pytest.raises(ConfigError, match="at least 50 x"):
        load_workload(
            tiny_model,
            Words(),
            files[0].parent,
            text=files[0],
            calibration=None,
            sizes=Sizes(texts=50, prefix_tokens=96, continuation_tokens=16),
        )


def test_calibration_prompts_share_no_facts_with_the_evaluation() -> None:
    sizes = Sizes(calibration_prompts=2)
    filler = np.random.default_rng(0).integers(600, 1600, 5000).tolist()
    fitted = calibration_prompts(MODEL, filler, sizes)
    assert [len(ids) for ids in fitted] == [1024, 1024]
    note = Vocabulary.load(MODEL).note

    def facts(ids: Any) -> set[tuple[int, ...]]:
        return {tuple(ids[i + 1 : i + 3]) for i, token in enumerate(ids) if token == note}

    asked = RetrievalTask.load(MODEL).sample(FIRST_SEED, 1025, facts=40)
    assert len(facts(fitted[0])) == 40
    # Of 320 x 320 possible pairs a few may coincide by chance; the order and the text never do.
    assert len(facts(fitted[0]) & facts(asked.prefix_ids)) <= 2
    assert calibration_prompts(MODEL.parent, filler, sizes) == []


@pytest.mark.parametrize("fitted", ["calibration_text.txt", "calibration_prompts.txt"])
def test_the_texts_of_the_reference_model_are_disjoint(fitted: str) -> None:
    words = [
        (MODEL / name).read_text(encoding="utf-8").split() for name in (fitted, "eval_text.txt")
    ]
    index = {word: i for i, word in enumerate(dict.fromkeys(words[0] + words[1]))}
    check_disjoint(*([index[word] for word in text] for text in words), run=24)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no/such/model", "--codec", "zip"], ConfigError),
        (["./no-such-model", "--codec", "raw"], FileNotFoundError),
        ([".", "--codec", "raw", "--profile", "no-such-profile"], FileNotFoundError),
    ],
)
def test_the_command_raises_named_errors(arguments: list[str], error: type[Exception]) -> None:
    """``cachegen.cli.main`` turns them into one line and an exit code."""
    cli = typer.Typer(pretty_exceptions_enable=False)
    register(cli)
    outcome = CliRunner().invoke(cli, arguments)
    assert isinstance(outcome.exception, error)


def test_unknown_names_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="zip"):
        run_evaluation("no/such/model", ["zip"])


def test_families_of_an_earlier_result_are_not_measured_again(
    measurements: list[Measurement], work: Workload
) -> None:
    identity = workload_digest(work)
    assert identity == workload_digest(work)
    rows = summarize_rows(measurements, work)["rows"]
    earlier = json.loads(json.dumps({"workload": identity, "rows": rows}))
    known = reusable_rows(earlier, identity)
    assert list(known) == list(dict.fromkeys(row["family"] for row in rows))
    # Rows that went through a file compare as fresh ones do.
    again = [row for family in known.values() for row in family]
    assert bd_rates(again) == bd_rates(rows)
    other = workload_digest(Workload(work.texts[:2], work.tasks, work.contexts))
    assert other != identity
    with pytest.raises(ConfigError, match="workload"):
        reusable_rows(earlier, other)
