"""What the demo is run on: a prompt that is timed, texts and questions that tell the quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachegen.bench.quality import (
    Continuation,
    answer_questions,
    compare,
    continuation,
    wilson_interval,
)
from cachegen.bench.retrieval import RetrievalPrompt, RetrievalTask
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.errors import InputError
from cachegen.hf.capture import capture

MIN_PROMPT_TOKENS = 1000
CONTINUATION_TOKENS = 256
CONTINUATIONS = 2
QUESTIONS = 40
RETRIEVAL_PROMPTS = 2
OUTPUT_TOKENS = 32

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What every mode is run on.

    prompt_ids: the prompt that is timed. texts: token ids of prefix and continuation, held-out.
    prompts: retrieval prompts. kv: the captured KV of all of them, by token ids, model's dtype.
    """

    prompt_ids: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    prompts: tuple[RetrievalPrompt, ...]
    kv: dict[tuple[int, ...], KVChunk]
    references: tuple[Continuation, ...]


def whole_tokens(tokens: int) -> int:
    """Tokens in whole chunks, at least one token left for the model to read."""
    return (tokens - 1) // DEFAULT_CHUNK_TOKENS * DEFAULT_CHUNK_TOKENS


def load_workload(
    model: Any,
    tokenizer: Any,
    folder: Path,
    prompt_file: Path | None = None,
    *,
    progress: Progress = lambda text: None,
) -> Workload:
    """Capture the prompt, held-out texts and retrieval prompts of a model's folder.

    Raises: InputError for a prompt that is too short or too long for the model.
    """
    path = prompt_file or folder / "demo_prompt.txt"
    limit = int(model.config.max_position_embeddings)
    prompt_ids = tuple(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
    if not MIN_PROMPT_TOKENS <= len(prompt_ids) <= limit - OUTPUT_TOKENS:
        raise InputError(
            f"prompt {path.name}",
            got=f"{len(prompt_ids)} tokens",
            expected=f"{MIN_PROMPT_TOKENS} to {limit - OUTPUT_TOKENS}",
            remedy="shorten or lengthen the prompt file",
        )
    begin = tuple(tokenizer("")["input_ids"])
    held_out = tokenizer((folder / "eval_text.txt").read_text(encoding="utf-8"))["input_ids"]
    prefix = 4 * DEFAULT_CHUNK_TOKENS
    span = prefix + CONTINUATION_TOKENS + 1 - len(begin)
    text = held_out[len(begin) :]
    texts = tuple(
        begin + tuple(text[index * span : (index + 1) * span]) for index in range(CONTINUATIONS)
    )
    task = RetrievalTask.load(folder)
    prompts = tuple(
        task.sample(seed, prefix + 1, facts=QUESTIONS) for seed in range(RETRIEVAL_PROMPTS)
    )
    progress("capturing KV caches")
    kv: dict[tuple[int, ...], KVChunk] = {}
    cuts = {prompt_ids: whole_tokens(len(prompt_ids))}
    cuts.update({ids: prefix for ids in (*texts, *(prompt.prefix_ids for prompt in prompts))})
    for ids, tokens in cuts.items():
        kv[ids] = capture(model, [list(ids[:tokens])])[0].kv
    references = tuple(continuation(model, kv[ids], ids) for ids in texts)
    return Workload(prompt_ids, texts, prompts, kv, references)


def measure_quality(
    model: Any, work: Workload, decoded: Callable[[KVChunk], KVChunk]
) -> dict[str, float | list[float]]:
    """Measure top-1, KL and retrieval with every captured prefix replaced by decoded(prefix)."""
    agreements = [
        compare(reference, continuation(model, decoded(work.kv[ids]), ids))
        for ids, reference in zip(work.texts, work.references, strict=True)
    ]
    right: list[bool] = []
    for prompt in work.prompts:
        right += answer_questions(model, decoded(work.kv[prompt.prefix_ids]), prompt)
    count = len(agreements)
    return {
        "top1_agreement": sum(agreement.top1 for agreement in agreements) / count,
        "kl_nats": sum(agreement.kl_nats for agreement in agreements) / count,
        "perplexity_ratio": sum(agreement.perplexity_ratio for agreement in agreements) / count,
        "retrieval_accuracy": sum(right) / len(right),
        "retrieval_interval": list(wilson_interval(sum(right), len(right))),
    }
