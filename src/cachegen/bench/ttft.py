"""Time to first token: from a stored prefix over a network, or by recomputing it.

All times are wall time of the thing itself; nothing is derived from sizes and rates.
Source: CacheGen (SIGCOMM'24), section 7.1, "time to first token".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from cachegen.chunk import KVChunk
from cachegen.errors import StoreError
from cachegen.hf.capture import chunk_of
from cachegen.hf.inject import inject
from cachegen.stream.fetch import Fetcher
from cachegen.stream.outcome import FetchedChunk, FetchReport
from cachegen.stream.plan import Policy
from cachegen.stream.reading import Keys


@dataclass(frozen=True)
class Timing:
    """Wall times of one request, seconds.

    network_s: from the request until the last byte came. decode_s: summed over chunks; the two
    overlap. loaded_s: from the request until the last chunk is decoded. ttft_s: until the first
    token. e2e_s: until the last of ``output_tokens``.
    """

    network_s: float
    decode_s: float
    loaded_s: float
    ttft_s: float
    e2e_s: float
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second after the first one."""
        return (self.output_tokens - 1) / max(self.e2e_s - self.ttft_s, 1e-9)

    @property
    def stages(self) -> dict[str, float]:
        """TTFT cut into what it waited for: network, decoding not hidden by it, computation."""
        return {
            "wait_network_s": min(self.network_s, self.loaded_s),
            "wait_decode_s": max(0.0, self.loaded_s - self.network_s),
            "wait_compute_s": self.ttft_s - self.loaded_s,
        }


def median_timing(measure: Callable[[], Timing], *, repeats: int, budget_s: float) -> Timing:
    """Repeat a measurement up to repeats times, fewer if budget_s is used up; field-wise median."""
    begin, runs = time.perf_counter(), [measure()]
    while len(runs) < repeats and time.perf_counter() - begin < budget_s:
        runs.append(measure())
    medians = {
        field.name: statistics.median_low([getattr(run, field.name) for run in runs])
        for field in fields(Timing)
    }
    return Timing(**medians)


def time_recompute(model: Any, token_ids: Sequence[int], *, output_tokens: int) -> Timing:
    """Prefill the whole prompt and generate greedily."""
    begin = time.perf_counter()
    ttft_s, e2e_s = _generate(model, None, token_ids, output_tokens, begin)
    return Timing(0.0, 0.0, 0.0, ttft_s, e2e_s, output_tokens)


@dataclass(frozen=True)
class Loading:
    """How a stored prefix is loaded.

    keys: of its chunks, or of the objects that may serve each. quality: nothing beyond it is read.
    policy: None reads everything in order. slo_s: the first token should come within it; None for
        no such wish. rest_s: of that, what injecting and prefilling the rest of the prompt take.
    recomputes: let the policy leave chunks to the model.
    """

    keys: Keys
    quality: str | None = None
    policy: Policy | None = None
    slo_s: float | None = None
    rest_s: float = 0.0
    recomputes: bool = False

    @property
    def deadline_s(self) -> float | None:
        """When the prefix has to be there, from the request on."""
        return None if self.slo_s is None else max(0.0, self.slo_s - self.rest_s)


def time_load(
    model: Any,
    token_ids: Sequence[int],
    fetcher: Fetcher,
    loading: Loading,
    *,
    output_tokens: int,
) -> tuple[Timing, FetchReport]:
    """Stream the prefix from a store, inject it, prefill the rest and generate greedily.

    What does not come by the deadline is prefilled with the rest.
    Returns: the times, and what became of each chunk. Raises: StoreError if a chunk does not come
        although there is no deadline.
    """
    begin = time.perf_counter()
    prefix = _Prefix(model, token_ids)
    report = fetcher.request(
        loading.keys,
        policy=loading.policy,
        deadline_s=loading.deadline_s,
        quality=loading.quality,
        deliver=prefix.deliver,
        recompute=prefix.recompute if loading.recomputes else None,
    ).wait()
    assert report is not None
    loaded_s = time.perf_counter() - begin
    if loading.slo_s is None and report.prefix_chunks < len(report.chunks):
        item = report.chunks[report.prefix_chunks]
        raise StoreError("chunk", got=f"{item.reason}: {item.error}", expected=item.key.name)
    ttft_s, e2e_s = _generate(
        model, prefix.cache(), token_ids[prefix.tokens :], output_tokens, begin
    )
    network_s = max((item.arrived_s for item in report.chunks), default=0.0)
    decode_s = sum(item.decode_s for item in report.chunks)
    return Timing(network_s, decode_s, loaded_s, ttft_s, e2e_s, output_tokens), report


class _Prefix:
    """The prefix as it comes: chunks in order, decoded or prefilled after those before them."""

    def __init__(self, model: Any, token_ids: Sequence[int]) -> None:
        self._model = model
        self._token_ids = token_ids
        self._chunks: list[KVChunk] = []

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self._chunks)

    def deliver(self, item: FetchedChunk) -> None:
        assert item.chunk is not None
        self._add(item.chunk)

    def _add(self, chunk: KVChunk) -> None:
        # What is injected together has one type: loaded KV has 16 bits, the model's may have more.
        if self._chunks:
            chunk = chunk.astype(self._chunks[0].geometry.dtype)
        self._chunks.append(chunk)

    @torch.no_grad()
    def recompute(self, item: FetchedChunk) -> KVChunk:
        begin, end = self.tokens, self.tokens + item.tokens
        ids = torch.tensor([list(self._token_ids[begin:end])], device=self._model.device)
        cache = self.cache()
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        whole = chunk_of(self._model, output.past_key_values)
        chunk = replace(whole.slice_tokens(begin, end), first_position=begin)
        self._add(chunk)
        return chunk

    def cache(self) -> Any:
        return inject(self._model, self._chunks) if self._chunks else None


@torch.no_grad()
def _generate(
    model: Any, cache: Any, token_ids: Sequence[int], output_tokens: int, begin: float
) -> tuple[float, float]:
    """Generate greedily after a cache, or from nothing; return TTFT and end-to-end time."""
    ids, ttft_s = list(token_ids), 0.0
    for index in range(output_tokens):
        inputs = torch.tensor([ids], device=model.device)
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = [int(output.logits[0, -1].argmax())]
        if index == 0:
            ttft_s = time.perf_counter() - begin
    return ttft_s, time.perf_counter() - begin
