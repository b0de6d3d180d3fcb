"""The main job in one call: capture, encode, store, stream back, decode, inject, generate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from cachegen.bench.coding import STORED_DTYPE, Coder, at_quality, at_rate, encode_all
from cachegen.bench.prompts import (
    CONTINUATION_TOKENS,
    OUTPUT_TOKENS,
    Progress,
    Workload,
    load_workload,
    measure_quality,
    whole_tokens,
)
from cachegen.bench.report import environment
from cachegen.bench.ttft import Loading, Timing, median_timing, time_load, time_recompute
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec.container import VERSION
from cachegen.codec.registry import get_codec
from cachegen.errors import InputError
from cachegen.hf.fingerprint import weights_fingerprint
from cachegen.hf.load import load_model
from cachegen.profile import Profile
from cachegen.store.base import Store
from cachegen.store.keys import chain_digests, chunk_keys, namespace_digest
from cachegen.store.limit import RateLimitedStore
from cachegen.store.local import LocalStore
from cachegen.stream.fetch import Fetcher
from cachegen.stream.outcome import FetchReport, Reason
from cachegen.stream.policies import DEFAULT_POLICY, get_policy
from cachegen.stream.traces import Trace
from cachegen.types import ChunkKey

# Codec and quality; with "+profile" the codec has the statistics of the model.
MODES = (
    "recompute",
    "raw",
    "int8",
    "cachegen",
    "progressive lossless-in-practice",
    "progressive balanced",
    "progressive small",
    "progressive+profile balanced",
    "progressive+profile small",
)
# What a policy makes of a deadline; run if there is one.
ADAPTIVE = "adaptive"
# Calls of a progress callback: loading, capturing, then one for recompute and two for others.
STEPS = 2 * len(MODES) + 3
CACHEGEN_LEVELS = (1, 2, 3)
REPEATS = 5
# Below this many parameters threads wait for each other longer than they compute.
SMALL_MODEL = 50_000_000
BUDGET_S = 2.0


@dataclass(frozen=True)
class Setup:
    """Where the demo's objects are, and how they come back.

    store: None for a folder that is deleted afterwards. rate_bytes_per_s: of a link that is
    simulated in front of the store; None takes the store as fast as it is. trace: a rate that
    changes with the time since each request began, instead. profile: of the model, if there is one.
    slo_s: adds a row in which ``policy`` has to bring the first token within it.
    """

    store: Store | None = None
    rate_bytes_per_s: float | None = None
    trace: Trace | None = None
    profile: Profile | None = None
    slo_s: float | None = None
    policy: str = DEFAULT_POLICY

    def link(self, scratch: Store) -> Store:
        """Return the store as the demo reads it."""
        store = self.store or scratch
        if self.trace is not None:
            typical = self.rate_bytes_per_s or self.trace.mean_bytes_per_s
            schedule = self.trace.rate_at
            return RateLimitedStore(store, typical, burst_bytes=0, schedule=schedule)
        if self.rate_bytes_per_s is not None:
            return RateLimitedStore(store, self.rate_bytes_per_s, burst_bytes=0)
        return store

    def describe(self) -> dict[str, Any]:
        """Return JSON-able values for a report."""
        rate = self.trace.mean_bytes_per_s if self.trace else self.rate_bytes_per_s
        return {
            "bandwidth_bytes_per_s": rate,
            "trace": self.trace.name if self.trace else None,
            "slo_s": self.slo_s,
            "policy": self.policy if self.slo_s is not None else None,
            "profile": self.profile.digest.hex() if self.profile else None,
        }


def run_demo(
    model_path: str,
    setup: Setup | None = None,
    *,
    prompt_file: Path | None = None,
    modes: Sequence[str] | None = None,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Run the demo and return its result as JSON-able values.

    model_path: a folder with a model, tokenizer and ``retrieval.json`` such as models/reference.
    modes: some of MODES; None for all that the setup allows.
    prompt_file: text of at least 1,000 tokens; None for the one that ships with the model.
    progress: called with a line for every step. Raises: InputError, UnsupportedModelError.
    """
    setup = setup or Setup()
    unknown = sorted(set(modes or ()) - set(MODES))
    if unknown:
        raise InputError("modes", got=unknown, expected=f"some of {', '.join(MODES)}")
    chosen = [mode for mode in modes or MODES if setup.profile or "+profile" not in mode]
    folder = Path(model_path)
    progress("loading the model")
    model, tokenizer = load_model(model_path)
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    work = load_workload(model, tokenizer, folder, prompt_file, progress=progress)
    namespace = _namespace(model, model_path, work.kv[work.prompt_ids])
    rows = []
    with tempfile.TemporaryDirectory(prefix="cachegen-demo-") as scratch:
        bench = _Bench(model, work, setup, setup.link(LocalStore(scratch)), namespace, progress)
        for mode in chosen:
            rows.append(bench.recompute() if mode == "recompute" else bench.load(mode))
        if setup.slo_s is not None:
            rows.append(bench.adapt(setup.slo_s, setup.policy))
    geometry = work.kv[work.prompt_ids].geometry
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": {
            "name": folder.name,
            "parameters": int(parameters),
            "layers": geometry.layers,
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.key_dim,
            "compute_dtype": geometry.dtype.label,
            "stored_dtype": STORED_DTYPE.label,
        },
        "prompt_tokens": len(work.prompt_ids),
        "prefix_tokens": whole_tokens(len(work.prompt_ids)),
        "chunk_tokens": DEFAULT_CHUNK_TOKENS,
        **setup.describe(),
        "continuation_tokens": CONTINUATION_TOKENS * len(work.texts),
        "questions": sum(len(prompt.questions) for prompt in work.prompts),
        "output_tokens": OUTPUT_TOKENS,
        "rows": rows,
        **environment(),
    }


def _namespace(model: Any, model_path: str, kv: KVChunk) -> bytes:
    geometry = kv.geometry
    return namespace_digest(
        weights_fingerprint=weights_fingerprint(model_path if Path(model_path).is_dir() else model),
        dtype=STORED_DTYPE,
        rope=kv.rope,
        geometry=geometry,
        layer_range=(0, geometry.layers),
        head_range=(0, geometry.kv_heads),
        chunk_tokens=DEFAULT_CHUNK_TOKENS,
        format_version=VERSION,
    )


def _timing_columns(timing: Timing) -> dict[str, Any]:
    return {
        "network_s": timing.network_s,
        "decode_s": timing.decode_s,
        "ttft_s": timing.ttft_s,
        "e2e_s": timing.e2e_s,
        "tokens_per_s": timing.tokens_per_s,
        "stages": timing.stages,
    }


_Stored: TypeAlias = tuple[list[ChunkKey], list[bytes], float]


@dataclass(frozen=True)
class _Bench:
    """Measures one row of the table after the other."""

    model: Any
    work: Workload
    setup: Setup
    link: Store
    namespace: bytes
    progress: Progress
    coders: dict[str, Coder] = field(default_factory=dict)
    stored: dict[ChunkKey, _Stored] = field(default_factory=dict)

    def recompute(self) -> dict[str, Any]:
        """Measure prefilling the prompt."""
        self.progress("recompute: prefill and generate")
        ids = self.work.prompt_ids
        time_recompute(self.model, ids, output_tokens=2)  # warm-up: allocators, first-use set-up
        timing = median_timing(
            lambda: time_recompute(self.model, ids, output_tokens=OUTPUT_TOKENS),
            repeats=REPEATS,
            budget_s=BUDGET_S,
        )
        columns = {**_timing_columns(timing), "network_s": None, "decode_s": None}
        empty = dict.fromkeys(("bytes", "billed_bits_per_value", "ratio_vs_16bit", "encode_s"))
        quality = measure_quality(self.model, self.work, lambda kv: kv)
        return {"mode": "recompute", **empty, **columns, **quality}

    def load(self, mode: str) -> dict[str, Any]:
        """Measure loading at a quality."""
        self.progress(f"{mode}: stream and generate")
        name, _, quality = mode.partition(" ")
        coder = self._coder(name)
        keys, objects, encode_s = self._store(coder)
        timing, _ = self._time(Loading(keys, quality=quality or None))
        self.progress(f"{mode}: quality through the model")
        measured = measure_quality(
            self.model, self.work, lambda captured: coder.round_trip(captured, quality)
        )
        size = sum(len(at_quality(data, quality)) for data in objects)
        stored = sum(len(data) for data in objects)
        return self._row(mode, size, stored, encode_s, timing, measured)

    def adapt(self, slo_s: float, policy: str) -> dict[str, Any]:
        """Measure what a policy makes of a deadline: it may end with another quality each time."""
        mode = f"{ADAPTIVE} {policy}"
        self.progress(f"{mode}: stream and generate")
        if policy == "cachegen":
            levels = [Coder(get_codec("cachegen", level=level)) for level in CACHEGEN_LEVELS]
        else:
            levels = [self._coder("progressive+profile" if self.setup.profile else "progressive")]
        stored = [self._store(coder) for coder in levels]
        keys = list(zip(*(keys for keys, _, _ in stored), strict=True))
        # What follows loading has to fit into the objective too; measured without any hurry.
        calm, _ = self._time(Loading(keys, policy=get_policy("fixed")))
        loading = Loading(
            keys,
            policy=get_policy(policy),
            slo_s=slo_s,
            rest_s=1.2 * (calm.ttft_s - calm.loaded_s),
            recomputes=policy != "fixed",
        )
        timing, report = self._time(loading)
        self.progress(f"{mode}: quality through the model")
        size = sum(item.read_bytes for item in report.chunks)

        def decoded(captured: KVChunk) -> KVChunk:
            # What was recomputed, or did not come and was prefilled with the rest, is exact.
            chunks = captured.astype(STORED_DTYPE).split()
            for index, item in enumerate(report.chunks[: len(chunks)]):
                if item.reason is Reason.LOADED:
                    bits = 8 * item.read_bytes / chunks[index].value_count
                    coder = levels[item.version]
                    data = coder.objects(captured)[index]
                    chunks[index] = coder.decode(at_rate(data, bits))
            return KVChunk.concat(chunks)

        measured = measure_quality(self.model, self.work, decoded)
        row = self._row(
            mode,
            size,
            sum(len(data) for _, objects, _ in stored for data in objects),
            sum(encode_s for _, _, encode_s in stored),
            timing,
            measured,
        )
        outcome = {
            "slo_s": slo_s,
            "slo_met": timing.ttft_s <= slo_s,
            "reasons": dict(report.reasons),
            "chunk_bytes": [item.read_bytes for item in report.chunks],
        }
        return {**row, **outcome}

    def _coder(self, name: str) -> Coder:
        if name not in self.coders:
            codec, _, profile = name.partition("+")
            settings = {"profile": self.setup.profile} if profile else {}
            self.coders[name] = Coder(get_codec(codec, **settings))
        return self.coders[name]

    def _store(self, coder: Coder) -> _Stored:
        """Encode the prompt and put it into the store. Returns: keys, objects, encode seconds."""
        kv = self.work.kv[self.work.prompt_ids].astype(STORED_DTYPE)
        chains = chain_digests(self.work.prompt_ids)
        count = kv.tokens // DEFAULT_CHUNK_TOKENS
        keys = chunk_keys(self.namespace, chains, coder.codec.config())[:count]
        if keys[0] in self.stored:
            return self.stored[keys[0]]
        chunks = kv.split()
        encode_s = []
        for _ in range(3):
            begin = time.perf_counter()
            objects = encode_all(coder.codec, chunks, keys)
            encode_s.append(time.perf_counter() - begin)
        store = self.link.inner if isinstance(self.link, RateLimitedStore) else self.link
        for key, data in zip(keys, objects, strict=True):
            store.put(key.name, data)
        self.stored[keys[0]] = keys, objects, sorted(encode_s)[1]
        return self.stored[keys[0]]

    def _time(self, loading: Loading) -> tuple[Timing, FetchReport]:
        """Load and generate several times. Returns: medians, and the report of the last time."""
        reports: list[FetchReport] = []

        def once() -> Timing:
            if isinstance(self.link, RateLimitedStore):
                self.link.restart()
            timing, report = time_load(
                self.model,
                self.work.prompt_ids,
                fetcher,
                loading,
                output_tokens=OUTPUT_TOKENS,
            )
            reports.append(report)
            return timing

        profiles = {self.setup.profile.digest: self.setup.profile} if self.setup.profile else {}
        with Fetcher(self.link, find_profile=profiles.__getitem__) as fetcher:
            once()  # warm-up: threads, tables, what the link carries
            timing = median_timing(once, repeats=REPEATS, budget_s=BUDGET_S)
        return timing, reports[-1]

    def _row(
        self,
        mode: str,
        size: int,
        stored: int,
        encode_s: float,
        timing: Timing,
        measured: dict[str, float | list[float]],
    ) -> dict[str, Any]:
        values = self.work.kv[self.work.prompt_ids].value_count
        return {
            "mode": mode,
            "bytes": size,
            "billed_bits_per_value": 8 * size / values,
            "ratio_vs_16bit": 2 * values / size if size else None,
            "stored_bytes": stored,
            "encode_s": encode_s,
            **_timing_columns(timing),
            **measured,
        }
