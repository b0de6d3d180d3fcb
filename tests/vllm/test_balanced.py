"""With ``balanced``, vLLM retrieves and predicts as well as the evaluation says."""

from __future__ import annotations

import json
import math
from pathlib import Path

from engines import CHUNK, MODEL, engine, text_tokens

from cachegen.bench.retrieval import RetrievalTask

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "evaluation.json"
PREFIX = 1024
# The token that begins every context.
BEGIN = 1
QUESTIONS, PLACES = 80, 192
TEXTS = 8


def evaluated() -> dict[str, float]:
    """Return what ``cachegen eval`` measured for balanced, through transformers."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    family = f"progressive:profile=false@{CHUNK}"
    (row,) = [row for row in rows if (row["family"], row["label"]) == (family, "balanced")]
    return row


def at_least(share: float, count: int) -> float:
    """Return what three standard deviations below a share of so many trials is."""
    return share - 3 * math.sqrt(max(share * (1 - share), 1 / count) / count)


def test_retrieval_and_top_1(tmp_path: Path) -> None:
    task = RetrievalTask.load(MODEL)
    samples = [task.sample(100 + seed, PREFIX, questions=16) for seed in range(5)]
    asked = [(list(s.prefix_ids) + list(q.ids), q.answer) for s in samples for q in s.questions]
    begin, text = text_tokens()[:BEGIN], text_tokens()[BEGIN:]
    # As the evaluation does: a prefix, and places in the 256 tokens behind it, in float32, where
    # the best two are never equal by rounding.
    places = [
        begin + text[3000 * (i % TEXTS) :][: PREFIX + 10 * (i // TEXTS)] for i in range(PLACES)
    ]
    prompts = [prompt for prompt, _ in asked] + places
    # The first pass computes and saves, the second one loads.
    options = {"dtype": "float32", "quality": "balanced", "policy": "fixed"}
    options |= {"profile": "none", "enable_prefix_caching": True}
    with engine(str(tmp_path), **options) as live:
        first = [a.tokens[0] for a in live.ask(prompts, 1)]
        live.settle()
        assert live.llm.reset_prefix_cache()
        answers = live.ask(prompts, 1)
        second = [a.tokens[0] for a in answers]
        assert all(a.cached_tokens >= PREFIX for a in answers)
        assert live.counted("failed_loads_total", "late") == 0
        read = live.counted("loaded_bytes_total") / live.counted("loaded_tokens_total")
        whole = live.worker._worker._cache.geometry.values_per_token * 2
        print(f"{read / whole * 16:.2f} bits per value read")
    wanted = evaluated()
    right = [
        sum(got == answer for got, (_, answer) in zip(tokens, asked, strict=False)) / QUESTIONS
        for tokens in (first, second)
    ]
    pairs = zip(first[QUESTIONS:], second[QUESTIONS:], strict=True)
    agree = sum(a == b for a, b in pairs) / PLACES
    print(f"retrieval {right[0]:.3f} computed, {right[1]:.3f} loaded; top-1 {agree:.3f}")
    assert right[1] >= at_least(min(1.0, wanted["accuracy_ratio"] * right[0]), QUESTIONS)
    assert agree >= at_least(wanted["top1_agreement"], PLACES)
