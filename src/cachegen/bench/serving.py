"""Serving with and without a store: modes side by side, on real prompts, turn by turn.

Every mode serves the same requests in the same repeat, in an order that is drawn anew each time, so
that what slows the machine down slows all of them. Times are wall times of the thing itself.
Source: CacheGen (SIGCOMM'24), section 7.1, "time to first token".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cachegen.errors import ConfigError

RESAMPLES = 1000
SEED = 0
WARM_UP_TOKENS = 2

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """What one request did.

    ttft_s, e2e_s: from the request to the first and the last token. network_s, decode_s: of the
    load, summed over chunks; they overlap. hit_tokens: of the prompt, taken from the store.
    read_bytes: of the objects read. output_ids: the tokens generated.
    """

    prompt_tokens: int
    hit_tokens: int
    read_bytes: int
    network_s: float
    decode_s: float
    ttft_s: float
    e2e_s: float
    output_ids: tuple[int, ...]


class Engine(Protocol):
    """An inference engine with a store beneath it."""

    def serve(self, mode: str, token_ids: Sequence[int], *, output_tokens: int) -> Served:
        """Answer one request greedily; what it computed is in the store when this returns."""

    def forget(self, mode: str) -> None:
        """Delete what the mode has stored, so that the next request misses."""

    def quality(self, mode: str, token_ids: Sequence[int]) -> dict[str, float]:
        """Return figures of a continuation after the decoded prefix, none if it cannot be read.

        ``kl_nats``, ``top1_agreement``, and ``bits_per_value`` of the prefix.
        """


@dataclass(frozen=True)
class Load:
    """What is served.

    prompts: token ids of single requests, each longer than a chunk. conversations: token ids of
    what the user adds at each turn, the first one long. output_tokens: of every answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    conversations: tuple[tuple[tuple[int, ...], ...], ...]
    output_tokens: int
    repeats: int


@dataclass
class _Samples:
    """Requests of one mode, in the order of repeats and prompts, warm-up left out."""

    single: list[Served] = field(default_factory=list)
    turns: dict[int, list[Served]] = field(default_factory=dict)
    first: list[Served] = field(default_factory=list)


def run_serving(
    engine: Engine, modes: Sequence[str], load: Load, *, progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Serve a load in every mode and return figures with intervals, JSON-able.

    Each mode first serves every prompt once: this fills the store and warms everything up, and its
    times are kept apart as those of misses. Then come the repeats, modes interleaved.
    Raises: ConfigError for an empty load or unknown modes, as the engine.
    """
    if not modes or not load.prompts or load.repeats < 1:
        raise ConfigError(
            "load", got=f"{len(modes)} modes, {len(load.prompts)} prompts", expected="some"
        )
    samples = {mode: _Samples() for mode in modes}
    for mode in modes:
        progress(f"{mode}: filling the store")
        engine.serve(mode, load.prompts[0], output_tokens=WARM_UP_TOKENS)
        engine.forget(mode)
        for prompt in load.prompts:
            first = engine.serve(mode, prompt, output_tokens=load.output_tokens)
            samples[mode].first.append(first)
    rng = np.random.default_rng(SEED)
    for repeat in range(load.repeats):
        progress(f"single requests, repeat {repeat + 1} of {load.repeats}")
        for prompt in load.prompts:
            for index in rng.permutation(len(modes)):
                served = engine.serve(modes[index], prompt, output_tokens=load.output_tokens)
                samples[modes[index]].single.append(served)
    for mode in modes:
        engine.forget(mode)  # a conversation begins with a document that nobody has read
    for number, conversation in enumerate(load.conversations):
        progress(f"conversation {number + 1} of {len(load.conversations)}")
        for index in rng.permutation(len(modes)):
            _converse(engine, modes[index], conversation, load.output_tokens, samples)
    rows = []
    for mode in modes:
        progress(f"{mode}: quality through the model")
        rows.append(_row(mode, samples[mode], samples[modes[0]], engine, load.prompts))
    return {
        "baseline": modes[0],
        "prompts": len(load.prompts),
        "prompt_tokens": [len(prompt) for prompt in load.prompts],
        "repeats": load.repeats,
        "conversations": len(load.conversations),
        "output_tokens": load.output_tokens,
        "rows": rows,
    }


def _converse(
    engine: Engine,
    mode: str,
    conversation: Sequence[Sequence[int]],
    output_tokens: int,
    samples: dict[str, _Samples],
) -> None:
    """Play a conversation: each turn's prompt is all before it, answers included."""
    history: list[int] = []
    for turn, added in enumerate(conversation):
        history += added
        served = engine.serve(mode, history, output_tokens=output_tokens)
        samples[mode].turns.setdefault(turn, []).append(served)
        history += served.output_ids


def median_interval(values: Sequence[float], *, seed: int = SEED) -> dict[str, float]:
    """Return the median and its 95 % bootstrap interval."""
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    medians = np.median(array[rng.integers(len(array), size=(RESAMPLES, len(array)))], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return {"median": float(np.median(array)), "low": float(low), "high": float(high)}


def _row(
    mode: str,
    samples: _Samples,
    baseline: _Samples,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    single = samples.single
    read = sum(served.read_bytes for served in single)
    hits = sum(served.hit_tokens for served in single)
    tokens = sum(served.prompt_tokens for served in single)
    busy_s = sum(served.e2e_s for served in single)
    qualities = [engine.quality(mode, prompt) for prompt in prompts]
    return {
        "mode": mode,
        "ttft_s": median_interval([served.ttft_s for served in single]),
        # Pairs of the same prompt and repeat: what slowed one down slowed the other.
        "ttft_ratio": median_interval(
            [a.ttft_s / b.ttft_s for a, b in zip(single, baseline.single, strict=True)]
        ),
        "miss_ttft_s": median_interval([served.ttft_s for served in samples.first]),
        "e2e_s": median_interval([served.e2e_s for served in single]),
        "network_s": median_interval([served.network_s for served in single]),
        "decode_s": median_interval([served.decode_s for served in single]),
        "output_tokens_per_s": sum(len(served.output_ids) for served in single) / busy_s,
        "requests_per_s": len(single) / busy_s,
        "hit_rate": hits / tokens,
        "bytes_per_request": read / len(single),
        "bytes_per_hit_token": read / hits if hits else None,
        **{name: float(np.mean([quality[name] for quality in qualities])) for name in qualities[0]},
        "turns": [
            {
                "turn": turn + 1,
                "ttft_s": median_interval([served.ttft_s for served in turns]),
                "hit_rate": sum(s.hit_tokens for s in turns) / sum(s.prompt_tokens for s in turns),
                "prompt_tokens": float(np.mean([s.prompt_tokens for s in turns])),
            }
            for turn, turns in sorted(samples.turns.items())
        ],
    }


class Clock:
    """Wall time since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds since then."""
        return time.perf_counter() - self._begin
