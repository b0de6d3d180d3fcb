"""What saving costs a vLLM whose requests all miss: paired runs with the connector and without.

One engine, random weights with OPT-125M's geometry, prompts that nobody asked before. Pairs of
short runs alternate in both orders: in one the requests are looked up and saved, in the other they
switch the connector off for themselves (``kv_transfer_params``). Three scenes:

- ``alone``: one request at a time; saving waits for the engine to be idle, as it does by default.
- ``together``: several requests at once, likewise.
- ``beside``: the same, but chunks are encoded and stored at once, beside the steps: what an engine
  that is never idle pays, and one that is a ``kv_producer``.

What is still to be encoded is finished between runs, outside the clock. In a venv with vLLM
(``make test-vllm`` makes one):

    .venv-vllm/bin/python benchmarks/vllm_overhead.py --json benchmarks/results/vllm_overhead.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
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

PROMPT_TOKENS, OUTPUT_TOKENS = 513, 8
TOGETHER = 4
SCENES = {"alone": 1, "together": TOGETHER, "beside": TOGETHER}
VOCABULARY = 50_272
RESAMPLES = 10_000
# What vLLM calls in a step, on its own thread.
CALLS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "request_finished",
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
)


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

        self.worker = get_kv_transfer_group()
        self.inside_s = 0.0
        core: Any = self.llm.llm_engine.engine_core
        for connector in (core.engine_core.scheduler.connector, self.worker):
            for name in CALLS:
                setattr(connector, name, self._timed(getattr(connector, name)))
        self._rng = np.random.default_rng(5)
        self._count = 0

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count the time that the engine spends in a call of the connector."""

        def timed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                self.inside_s += time.perf_counter() - begin

        return timed

    def run(self, requests: int, *, connected: bool) -> dict[str, float]:
        """Time requests that arrive together: mean TTFT, tokens per second, CPU time of the engine.

        ``inside_s`` is the time in calls of the connector until the last first token.
        connected: whether they are looked up and saved, or leave the connector alone.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        wishes = {"cachegen.load": connected, "cachegen.save": connected}
        params = SamplingParams(
            temperature=0,
            max_tokens=OUTPUT_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": wishes},
        )
        prompts = self._rng.integers(4, VOCABULARY, (requests, PROMPT_TOKENS)).tolist()
        firsts: dict[str, float] = {}
        steps, inside, inside_s = 0, self.inside_s, 0.0
        begin, cpu = time.perf_counter(), time.thread_time()
        for prompt in prompts:
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            for output in outputs:
                firsts.setdefault(output.request_id, time.perf_counter() - begin)
            if inside_s == 0:
                steps += 1
                if len(firsts) == requests:
                    inside_s = self.inside_s - inside
        seconds, cpu = time.perf_counter() - begin, time.thread_time() - cpu
        engine.step()  # the step in which workers hear of the last requests that ended
        while self.worker._worker._saver._backlog_bytes:
            time.sleep(0.01)
        return {
            "ttft_s": float(np.mean(list(firsts.values()))),
            "tokens_per_s": requests * (PROMPT_TOKENS + OUTPUT_TOKENS) / seconds,
            "cpu_s": cpu,
            "inside_s": inside_s,
            "steps": steps,
        }

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


def measure(server: Server, scene: str, seconds: float, most_pairs: int) -> dict[str, Any]:
    """Alternate runs until the time is up."""
    requests = SCENES[scene]
    server.worker._worker._saver._waits = scene != "beside"
    before = server.worker._counters.snapshot()
    for connected in (True, False):
        server.run(requests, connected=connected)
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    end = time.monotonic() + seconds
    while len(runs[True]) < most_pairs and (time.monotonic() < end or len(runs[True]) < 4):
        order = (True, False) if len(runs[True]) % 2 else (False, True)
        for connected in order:
            runs[connected].append(server.run(requests, connected=connected))
    after = server.worker._counters.snapshot()
    counted = {name: value - before.get(name, 0) for name, value in after.items()}
    chunks = counted["saved_chunks_total"]

    def compared(name: str, *, more_is_better: bool = False) -> dict[str, float]:
        pairs = [(a[name], b[name]) for a, b in zip(runs[True], runs[False], strict=True)]
        return loss([(b, a) for a, b in pairs] if more_is_better else pairs)

    return {
        "scene": scene,
        "requests_per_run": requests,
        "pairs": len(runs[True]),
        "ttft_s": {
            "connected": float(np.median([run["ttft_s"] for run in runs[True]])),
            "not_connected": float(np.median([run["ttft_s"] for run in runs[False]])),
        },
        "ttft_loss": compared("ttft_s"),
        "throughput_loss": compared("tokens_per_s", more_is_better=True),
        # Of the thread that runs the model: what other work on the machine disturbs least.
        "engine_cpu_loss": compared("cpu_s"),
        # What the engine's thread does for the connector until the last first token, and how many
        # steps it takes until then: one more while a look-up is under way.
        "inside_s": {
            "connected": float(np.median([run["inside_s"] for run in runs[True]])),
            "not_connected": float(np.median([run["inside_s"] for run in runs[False]])),
        },
        "inside_share_of_ttft": float(
            np.median([run["inside_s"] for run in runs[True]])
            / np.median([run["ttft_s"] for run in runs[False]])
        ),
        "steps_to_first_tokens": {
            "connected": float(np.mean([run["steps"] for run in runs[True]])),
            "not_connected": float(np.mean([run["steps"] for run in runs[False]])),
        },
        "saved_chunks": chunks,
        "skipped_chunks": sum(v for k, v in counted.items() if k.startswith("skipped")),
        "staging_s_per_chunk": counted["stage_seconds_total"] / chunks,
        "saving_s_per_chunk": counted["save_seconds_total"] / chunks,
        "bytes_per_chunk": counted["saved_bytes_total"] / chunks,
    }


def measure_all(model: Path, quality: str, seconds: float, most_pairs: int) -> list[dict[str, Any]]:
    """Measure every scene with one engine."""
    rows = []
    with tempfile.TemporaryDirectory() as store:
        server = Server(model, Path(store), quality)
        for scene in SCENES:
            row = {"quality": quality, **measure(server, scene, seconds, most_pairs)}
            rows.append(row)
            inside = row["inside_s"]["connected"]
            print(
                f"{quality}, {scene}: {1000 * inside:.2f} ms in the connector, "
                f"{row['inside_share_of_ttft']:.2%} of TTFT",
                flush=True,
            )
            for name in ("ttft_loss", "throughput_loss", "engine_cpu_loss"):
                value = row[name]
                print(
                    f"{quality}, {scene}: {name} {value['median']:+.2%} "
                    f"({value['low']:+.2%} to {value['high']:+.2%}), {row['pairs']} pairs",
                    flush=True,
                )
        server.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quality", action="append", default=None)
    parser.add_argument("--seconds", type=float, default=120.0, help="per quality and scene")
    parser.add_argument("--pairs", type=int, default=400, help="at most, per quality and scene")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for quality in chosen.quality or ["lossless", "balanced"]:
            rows += measure_all(Path(folder), quality, chosen.seconds, chosen.pairs)
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
            "engine_threads": 1,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
