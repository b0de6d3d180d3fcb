"""With ``balanced``, vLLM retrieves and predicts as well as the evaluation says."""

from __future__ import annotations

import json
from pathlib import Path

from engines import CHUNK, MODEL, engine, text_tokens

from cachegen.bench.retrieval import RetrievalTask

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo.json"
PREFIX = 1024
# Of 80 questions and 80 places; the evaluation asks as many.
TOLERANCE = 0.04


def evaluated() -> dict[str, float]:
    """Return what ``cachegen demo`` measured for balanced, through transformers."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    (row,) = [row for row in rows if row["mode"] == "progressive balanced"]
    return row


def test_retrieval_and_top_1(tmp_path: Path) -> None:
    task = RetrievalTask.load(MODEL)
    samples = [task.sample(100 + seed, PREFIX, questions=16) for seed in range(5)]
    asked = [(list(s.prefix_ids) + list(q.ids), q.answer) for s in samples for q in s.questions]
    text = text_tokens()
    # Ten prefixes of two chunks, each continued to eight places.
    places = [text[2500 * (i % 10) :][: 2 * CHUNK + 1 + 23 * (i // 10)] for i in range(80)]
    prompts = [prompt for prompt, _ in asked] + places
    # The first pass computes and saves, the second one loads.
    options = {"dtype": "bfloat16", "quality": "balanced", "policy": "fixed"}
    options |= {"profile": "none", "slo_s": 60.0}  # nothing is late here, however busy the machine
    with engine(str(tmp_path), **options) as live:
        first = [a.tokens[0] for a in live.ask(prompts, 1)]
        live.settle()
        answers = live.ask(prompts, 1)
        second = [a.tokens[0] for a in answers]
        assert sum(a.cached_tokens for a in answers) == 80 * PREFIX + 80 * 2 * CHUNK
        assert live.counted("failed_loads_total", "late") == 0
        read = live.counted("loaded_bytes_total") / live.counted("loaded_tokens_total")
        whole = live.worker._worker._cache.geometry.values_per_token * 2
        print(f"{read / whole * 16:.2f} bits per value read")
    wanted = evaluated()
    right = [
        sum(got == answer for got, (_, answer) in zip(tokens[:80], asked, strict=True)) / 80
        for tokens in (first, second)
    ]
    agree = sum(a == b for a, b in zip(first[80:], second[80:], strict=True)) / 80
    print(f"retrieval {right[0]:.3f} computed, {right[1]:.3f} loaded; top-1 {agree:.3f}")
    assert right[1] >= wanted["retrieval_accuracy"] - TOLERANCE
    assert agree >= wanted["top1_agreement"] - TOLERANCE
