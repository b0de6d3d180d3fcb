"""Quality of a decoded prefix, measured through the model: KL, top-1 agreement, retrieval.

Source: CacheGen (SIGCOMM'24), section 7.1 measures perplexity and task accuracy the same way: the
prefix comes from the cache, what follows is computed by the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.bench.retrieval import RetrievalPrompt
from cachegen.chunk import KVChunk
from cachegen.hf.inject import clone, forward_suffix, inject

Logits = NDArray[np.float32]
Kept = NDArray[np.bool_]

QUESTION_BATCH = 8


@dataclass(frozen=True)
class Continuation:
    """Logits of a teacher-forced continuation after a prefix.

    logits: (n, vocabulary) float32, row i predicts token i + 1. targets: (n,) those tokens.
    """

    logits: Logits
    targets: NDArray[np.int64]

    @property
    def log_probs(self) -> Logits:
        """Log-probabilities in nats, (n, vocabulary)."""
        return log_softmax(self.logits)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the targets, nats/token."""
        return -float(self.log_probs[np.arange(len(self.targets)), self.targets].mean())


@dataclass(frozen=True)
class Agreement:
    """How a continuation differs from the uncompressed model's.

    kl_nats: mean KL divergence, nats/token. top1: share of tokens with the same most likely token.
    perplexity_ratio: perplexity divided by that of the uncompressed model.
    accuracy_ratio: share of next tokens predicted right, divided by that of the uncompressed model.
    """

    kl_nats: float
    top1: float
    perplexity_ratio: float
    accuracy_ratio: float = 1.0


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers to the questions of one prompt.

    right: for each question whether the generated token is the answer.
    log_probs: (questions, vocabulary) float32 of the answer token, nats.
    """

    right: list[bool]
    log_probs: Logits


def continuation(
    model: Any, kv: KVChunk, token_ids: Sequence[int], *, kept: Kept | None = None
) -> Continuation:
    """Run the tokens after a prefix, each seeing the true ones before it.

    kv: the first n tokens, n = kv.tokens. token_ids: prefix and continuation together.
    kept: (n,) bool, False for evicted tokens that nothing attends to; positions stay as they are.
    """
    suffix = list(token_ids[kv.tokens :])
    logits = _forward(model, inject(model, kv), [suffix[:-1]], kept)[0]
    array = np.asarray(logits.float().cpu().numpy(), np.float32)
    return Continuation(array, np.asarray(suffix[1:], np.int64))


def compare(reference: Continuation, other: Continuation) -> Agreement:
    """Compare a continuation with the uncompressed model's, token by token."""
    kl = mean_kl(reference.log_probs, other.log_probs)
    before, after = reference.logits.argmax(axis=1), other.logits.argmax(axis=1)
    ratio = np.exp(other.nll - reference.nll)
    right = (after == reference.targets).mean() / max((before == reference.targets).mean(), 1e-9)
    return Agreement(kl, float((before == after).mean()), float(ratio), float(right))


def log_softmax(logits: Logits) -> Logits:
    """Return log-probabilities in nats, (n, vocabulary)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Logits = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def mean_kl(reference: Logits, other: Logits) -> float:
    """Return the mean KL divergence in nats of (n, vocabulary) log-probabilities."""
    p, q = reference.astype(np.float64), other.astype(np.float64)
    return max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean()))


def answer_questions(
    model: Any, kv: KVChunk, prompt: RetrievalPrompt, *, kept: Kept | None = None
) -> list[bool]:
    """Ask every question after the decoded prefix; the model generates its one-token answer.

    Arguments as for ``answers``. Returns: for each question whether the token is the answer.
    """
    return answers(model, kv, prompt, kept=kept).right


def answers(
    model: Any, kv: KVChunk, prompt: RetrievalPrompt, *, kept: Kept | None = None
) -> Answers:
    """Ask every question after the decoded prefix; the model generates its one-token answer.

    kv: the first n tokens of the prompt; the model reads the rest itself. Greedy.
    kept: as for ``continuation``.
    """
    rest = prompt.prefix_ids[kv.tokens :]
    cache = inject(model, kv)
    rows: list[Logits] = []
    for begin in range(0, len(prompt.questions), QUESTION_BATCH):
        batch = prompt.questions[begin : begin + QUESTION_BATCH]
        logits = _forward(model, cache, [[*rest, *question.ids] for question in batch], kept)
        rows.append(np.asarray(logits[:, -1].float().cpu().numpy(), np.float32))
    every = np.concatenate(rows)
    asked = zip(every.argmax(axis=1).tolist(), prompt.questions, strict=True)
    return Answers([token == question.answer for token, question in asked], log_softmax(every))


@torch.no_grad()
def _forward(
    model: Any, cache: Any, suffixes: Sequence[Sequence[int]], kept: Kept | None
) -> torch.Tensor:
    """Return logits (B, S, vocabulary) of equally long suffixes after one prefix."""
    if kept is None:
        return forward_suffix(model, cache, suffixes)
    ids = torch.tensor(suffixes, device=model.device)
    rows, length = ids.shape
    mask = torch.ones((rows, len(kept) + length), dtype=torch.long, device=model.device)
    mask[:, : len(kept)] = torch.from_numpy(kept.astype(np.int64)).to(model.device)
    positions = torch.arange(len(kept), len(kept) + length, device=model.device)
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions.expand(rows, -1),
        past_key_values=clone(cache, batch=rows),
        use_cache=True,
    ).logits
    return logits


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = share + z * z / (2 * total)
    margin = z * float(np.sqrt(share * (1 - share) / total + z * z / (4 * total * total)))
    scale = 1 + z * z / total
    # The ends are exact at 0 and 1, which rounding may miss.
    low = 0.0 if right == 0 else max(0.0, (centre - margin) / scale)
    high = 1.0 if right == total else min(1.0, (centre + margin) / scale)
    return low, high
