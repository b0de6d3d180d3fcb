"""Runs vLLM as a server does, scheduler and workers in processes of their own, and ends.

Usage: serve_once.py JOB.json. The job names a store (a folder), how many objects a
round leaves there, prompts, and where to write the answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# What takes longer than this hangs.
HANG_S = 400.0


def wait_for_objects(store: Path, count: int) -> None:
    """Wait until so many chunks are stored; what is missing then the answers will show."""
    end = time.monotonic() + HANG_S
    while time.monotonic() < end:
        if sum(path.is_file() for path in (store / "objects").rglob("*")) >= count:
            return
        time.sleep(0.1)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import LLM, SamplingParams

    # No module path: the entry point has made the name known.
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        tensor_parallel_size=job.get("tensor_parallel_size", 1),
        kv_transfer_config={
            "kv_connector": "CacheGenConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "store": job["store"],
                "quality": "lossless",
                "slo_s": HANG_S,
            },
        },
    )
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=2, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    answers = []
    for _ in range(job.get("rounds", 1)):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append(
            [
                {"tokens": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens or 0}
                for out in outputs
            ]
        )
        wait_for_objects(Path(job["store"]), job["objects"])
    metrics = {
        metric.name + json.dumps(metric.labels.get("reason", "")): metric.value
        for metric in llm.get_metrics()
        if "cachegen" in metric.name
    }
    result = {"answers": answers, "metrics": metrics}
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
