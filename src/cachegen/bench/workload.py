"""The prompts of an evaluation: held-out texts and generated tasks, captured once.

Calibration text and evaluation text must not overlap; this is checked, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cachegen.bench.baselines.base import Prefix
from cachegen.bench.baselines.h2o import accumulated_attention
from cachegen.bench.quality import Answers, Continuation, answers, continuation
from cachegen.bench.retrieval import RetrievalPrompt, RetrievalTask, Vocabulary
from cachegen.chunk import KVChunk
from cachegen.errors import ConfigError
from cachegen.hf.capture import capture
from cachegen.types import KVDtype

STORED_DTYPE = KVDtype.BFLOAT16
OVERLAP_TOKENS = 32
# Far from the seeds of training and of the model's own card.
FIRST_SEED = 5_000_000
CALIBRATION_SEED = 7_000_000
# Facts and chains of a prompt of this many tokens; shorter ones have as many fewer.
FULL_TOKENS = 1024
QUESTIONS = 40
NEEDLES = 6
MENTIONS = 40
CHAINS = 10
# Of a question and its answer, twice.
ANSWERED_TOKENS = 6
# Below this share of right answers a task says nothing about codecs.
MIN_ACCURACY = 0.2


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    texts: held-out prompts. prefix_tokens: of every prompt, what is compressed.
    continuation_tokens: predicted after each text. ..._prompts: prompts of each generated task.
    calibration_contexts: texts of prefix_tokens tokens that calibrated peers are fitted to.
    calibration_prompts: retrieval prompts among calibration text, other ones than are asked, that
        they are fitted to as well. A transform that was fitted to prose alone has not seen the
        directions in which names lie, and drops them.
    """

    texts: int = 8
    prefix_tokens: int = 1024
    continuation_tokens: int = 256
    retrieval_prompts: int = 4
    needle_prompts: int = 6
    tracking_prompts: int = 6
    calibration_contexts: int = 16
    calibration_prompts: int = 8


@dataclass(frozen=True, eq=False)
class TextCase:
    """A held-out text. token_ids: prefix and continuation. reference: of the uncompressed model."""

    token_ids: tuple[int, ...]
    prefix: Prefix
    reference: Continuation


@dataclass(frozen=True, eq=False)
class TaskCase:
    """A prompt of a task. reference: the answers of the uncompressed model."""

    prompt: RetrievalPrompt
    prefix: Prefix
    reference: Answers


@dataclass(frozen=True, eq=False)
class Workload:
    """Everything that operating points are measured on, and what may be calibrated on.

    contexts, fit_ids: 16-bit KV and token ids of each calibration context.
    """

    texts: tuple[TextCase, ...]
    tasks: dict[str, tuple[TaskCase, ...]]
    contexts: tuple[KVChunk, ...]
    fit_ids: tuple[tuple[int, ...], ...] = ()

    @property
    def measured_tasks(self) -> dict[str, tuple[TaskCase, ...]]:
        """The tasks that the uncompressed model can do at all: 20 % of answers right."""
        return {
            name: cases
            for name, cases in self.tasks.items()
            if np.mean([right for case in cases for right in case.reference.right]) >= MIN_ACCURACY
        }


def load_workload(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    text: Path,
    calibration: Path | None,
    sizes: Sizes,
    needs_importance: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Workload:
    """Capture texts, tasks and calibration contexts.

    folder: of the model; tasks need its ``retrieval.json``, without one there are none.
    needs_importance: measure the attention that tokens receive, for H2O.
    Raises: ConfigError if a text is too short, the prompts are too long for the model, or
        calibration and evaluation text overlap.
    """
    longest = sizes.prefix_tokens + sizes.continuation_tokens + 1
    limit = getattr(model.config, "max_position_embeddings", None) or longest
    if longest > limit:
        raise ConfigError(
            "prefix and continuation",
            got=f"{longest} tokens",
            expected=f"at most {limit} of the model",
            remedy="measure shorter prefixes",
        )
    begin = list(tokenizer("")["input_ids"])
    held_out = _ids(tokenizer, text, begin)
    span = sizes.prefix_tokens + sizes.continuation_tokens + 1 - len(begin)
    spans = _spans(held_out, span, sizes.texts, text)
    fit_ids: list[list[int]] = []
    if calibration is not None and sizes.calibration_contexts:
        fit = _ids(tokenizer, calibration, begin)
        check_disjoint(fit, held_out)
        fit_ids = [
            [*begin, *ids]
            for ids in _spans(
                fit, sizes.prefix_tokens - len(begin), sizes.calibration_contexts, calibration
            )
        ]
        fit_ids += calibration_prompts(folder, fit, sizes)
    progress("capturing texts")
    texts = []
    for ids in spans:
        whole = (*begin, *ids)
        kv, prefix = _captured(model, whole, sizes.prefix_tokens, needs_importance)
        texts.append(TextCase(whole, prefix, continuation(model, kv, whole)))
    progress("capturing tasks")
    tasks = {
        name: capture_task(model, prompts, sizes.prefix_tokens, needs_importance=needs_importance)
        for name, prompts in _task_prompts(folder, sizes).items()
    }
    progress("capturing calibration texts")
    contexts = tuple(capture(model, [ids])[0].kv.astype(STORED_DTYPE) for ids in fit_ids)
    return Workload(tuple(texts), tasks, contexts, tuple(map(tuple, fit_ids)))


def capture_task(
    model: Any,
    prompts: Sequence[RetrievalPrompt],
    prefix_tokens: int,
    *,
    needs_importance: bool = False,
) -> tuple[TaskCase, ...]:
    """Capture the prompts of a task and let the uncompressed model answer their questions.

    prefix_tokens: how many tokens of each are compressed; at least one is left for the model.
    """
    cases = []
    for prompt in prompts:
        kv, prefix = _captured(model, prompt.prefix_ids, prefix_tokens, needs_importance)
        cases.append(TaskCase(prompt, prefix, answers(model, kv, prompt)))
    return tuple(cases)


def check_disjoint(
    calibration_ids: Sequence[int], evaluation_ids: Sequence[int], run: int = OVERLAP_TOKENS
) -> None:
    """Refuse texts that share a run of tokens, wherever it stands.

    Raises: ConfigError with the place of the first common run of ``run`` tokens.
    """
    seen = {tuple(calibration_ids[i : i + run]) for i in range(len(calibration_ids) - run + 1)}
    for place in range(len(evaluation_ids) - run + 1):
        if tuple(evaluation_ids[place : place + run]) in seen:
            raise ConfigError(
                "calibration and evaluation text",
                got=f"{run} tokens in common, at token {place} of the evaluation text",
                expected="texts that do not overlap",
                remedy="hold out the evaluation text before calibrating",
            )


def _ids(tokenizer: Any, path: Path, begin: list[int]) -> list[int]:
    ids: list[int] = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    return ids[len(begin) :]


def _spans(ids: list[int], span: int, count: int, path: Path) -> list[list[int]]:
    if span * count > len(ids) or span < 1 or count < 1:
        raise ConfigError(
            f"tokens of {path.name}",
            got=len(ids),
            expected=f"at least {count} x {span}",
            remedy="pass a longer text, or ask for fewer prompts",
        )
    return [ids[index * span : (index + 1) * span] for index in range(count)]


def _captured(
    model: Any, ids: Sequence[int], tokens: int, needs_importance: bool
) -> tuple[KVChunk, Prefix]:
    """Return the KV in the model's dtype, and what peers get: 16 bits, and importance if needed."""
    kv = capture(model, [list(ids[:tokens])])[0].kv
    importance = accumulated_attention(model, ids[:tokens]) if needs_importance else None
    return kv, Prefix(kv.astype(STORED_DTYPE), importance)


def calibration_prompts(folder: Path, filler: list[int], sizes: Sizes) -> list[list[int]]:
    """Draw contexts with facts in calibration text, then every question with its answer, twice.

    No evaluation prompt contains these facts. A profile weighs errors by what they do to the
    predictions at the end of a context: that of prose alone takes what recall needs for noise.
    """
    if not (folder / "retrieval.json").is_file():
        return []
    task = RetrievalTask(Vocabulary.load(folder), filler)
    facts = _scaled(QUESTIONS, sizes)
    drawn = []
    for i in range(sizes.calibration_prompts):
        prompt = task.sample(
            CALIBRATION_SEED + i, sizes.prefix_tokens - ANSWERED_TOKENS * facts, facts=facts
        )
        asked = [token for q in prompt.questions for token in (*q.ids, q.answer)]
        drawn.append([*prompt.prefix_ids, *asked, *asked])
    return drawn


def _task_prompts(folder: Path, sizes: Sizes) -> dict[str, list[RetrievalPrompt]]:
    """Draw the prompts; one token of each is left for the model to read itself."""
    if not (folder / "retrieval.json").is_file():
        return {}
    task = RetrievalTask.load(folder)
    tokens = sizes.prefix_tokens + 1
    prompts = {
        "retrieval": [
            task.sample(FIRST_SEED + i, tokens, facts=_scaled(QUESTIONS, sizes))
            for i in range(sizes.retrieval_prompts)
        ],
        "needle": [
            task.needle(FIRST_SEED + i, tokens, needles=NEEDLES, mentions=_scaled(MENTIONS, sizes))
            for i in range(sizes.needle_prompts)
        ],
        "tracking": [
            task.trace(FIRST_SEED + i, tokens, chains=_scaled(CHAINS, sizes))
            for i in range(sizes.tracking_prompts)
        ],
    }
    return {name: drawn for name, drawn in prompts.items() if drawn}


def _scaled(count: int, sizes: Sizes) -> int:
    """Return how many of something a prompt of this length has."""
    return max(2, min(count, count * sizes.prefix_tokens // FULL_TOKENS))
