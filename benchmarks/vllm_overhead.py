"""What saving costs a vLLM whose requests all miss: paired runs with saving on and off.

One engine with the connector, random weights with OPT-125M's geometry, prompts that nobody asked
before. A run is a few requests in a row; runs with saving on and off alternate in pairs, in both
orders, and what is still to be encoded is finished between runs, outside the clock. In a venv
with vLLM (``make test-vllm`` makes one):

    .venv-vllm/bin/python benchmarks/vllm_overhead.py --json benchmarks/results/vllm_overhead.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
)

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

from cachegen.bench.report import environment, write_json

PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 513, 16, 2
VOCABULARY = 50_272
RESAMPLES = 10_000


def make_model(folder: Path) -> None:
    """Write a model of OPT-125M's geometry with random weights."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        ffn_dim=3072,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        word_embed_proj_dim=768,
    )
    OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Server:
    """A vLLM engine in this process, and its connector."""

    def __init__(self, model: Path, store: Path, quality: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=1024,
            enable_prefix_caching=False,
            seed=0,
            kv_transfer_config={
                "kv_connector": "CacheGenConnector",
                "kv_connector_module_path": "cachegen.connectors.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"store": str(store), "quality": quality},
            },
        )
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        core: Any = self.llm.llm_engine.engine_core
        self.tracker = core.engine_core.scheduler.connector._scheduler.tracker
        self.worker = get_kv_transfer_group()
        self._rng = np.random.default_rng(5)
        self._count = 0

    def run(self, *, saves: bool) -> dict[str, float]:
        """Time a few requests in a row; returns mean TTFT and tokens per second."""
        from vllm import SamplingParams

        self.tracker.saves = saves
        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
        )
        firsts = []
        begin = time.perf_counter()
        for _ in range(REQUESTS):
            prompt = self._rng.integers(4, VOCABULARY, PROMPT_TOKENS).tolist()
            asked = time.perf_counter()
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
            first = None
            while engine.has_unfinished_requests():
                if engine.step() and first is None:
                    first = time.perf_counter() - asked
            firsts.append(first)
        seconds = time.perf_counter() - begin
        while self.worker._worker._saver._backlog_bytes:
            time.sleep(0.01)
        tokens = REQUESTS * (PROMPT_TOKENS + OUTPUT_TOKENS)
        return {"ttft_s": float(np.mean(firsts)), "tokens_per_s": tokens / seconds}

    def close(self) -> None:
        """End the engine, so that another one can start."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def loss(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return the median of (with saving / without) - 1 over pairs, and its 95 % interval."""
    ratios = np.array([on / off for on, off in pairs]) - 1
    rng = np.random.default_rng(1)
    picks = rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(model: Path, quality: str, seconds: float, most_pairs: int) -> dict[str, Any]:
    """Alternate runs until the time is up."""
    with tempfile.TemporaryDirectory() as store:
        server = Server(model, Path(store), quality)
        for saves in (True, False):
            server.run(saves=saves)
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        end = time.monotonic() + seconds
        while len(runs[True]) < most_pairs and (time.monotonic() < end or len(runs[True]) < 4):
            order = (True, False) if len(runs[True]) % 2 else (False, True)
            for saves in order:
                runs[saves].append(server.run(saves=saves))
        counted = server.worker._counters.snapshot()
        server.close()
    pairs = list(zip(runs[True], runs[False], strict=True))
    chunks = counted["saved_chunks_total"]
    return {
        "quality": quality,
        "pairs": len(pairs),
        "ttft_s": {str(k).lower(): [r["ttft_s"] for r in v] for k, v in runs.items()},
        "ttft_loss": loss([(a["ttft_s"], b["ttft_s"]) for a, b in pairs]),
        "throughput_loss": loss([(b["tokens_per_s"], a["tokens_per_s"]) for a, b in pairs]),
        "saved_chunks": chunks,
        "skipped_chunks": sum(v for k, v in counted.items() if k.startswith("skipped")),
        "staging_s_per_chunk": counted["stage_seconds_total"] / chunks,
        "saving_s_per_chunk": counted["save_seconds_total"] / chunks,
        "bytes_per_chunk": counted["saved_bytes_total"] / chunks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quality", action="append", default=None)
    parser.add_argument("--seconds", type=float, default=120.0, help="per quality")
    parser.add_argument("--pairs", type=int, default=60, help="at most, per quality")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        rows = [
            measure(Path(folder), quality, chosen.seconds, chosen.pairs)
            for quality in chosen.quality or ["lossless", "balanced"]
        ]
    described = environment()
    described["versions"]["vllm"] = version("vllm-cpu")
    write_json(
        chosen.json,
        {
            **described,
            "load_average": list(os.getloadavg()),
            "geometry": "OPT-125M: 12 layers, 12 KV heads of 64, bfloat16; random weights",
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "requests_per_run": REQUESTS,
            "engine_threads": 1,
            "rows": rows,
        },
    )
    for row in rows:
        for name in ("ttft_loss", "throughput_loss"):
            value = row[name]
            print(
                f"{row['quality']}: {name} {value['median']:+.2%} "
                f"({value['low']:+.2%} to {value['high']:+.2%}), {row['pairs']} pairs"
            )


if __name__ == "__main__":
    main()
