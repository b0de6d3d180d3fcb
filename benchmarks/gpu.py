"""Build, check and time the CUDA kernels on one GPU, in one run of under eight minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Rows: decode and encode rates by codec, geometry and number of chunks, beside a device-to-device
copy in the same run; the latency of one chunk; LMCache's kernels and nvCOMP on the same values
where they are installed; prefill and token times of models with random weights, layers reduced and
extrapolated; and, from these, time to first token by link. KV is drawn per channel with spread and
shape as measured on the reference model (``--measure-shape``). ``--dry-run`` takes the emulation on
the host and tiny sizes: it exercises everything but a device, and its times mean nothing.

Needs torch with CUDA, cuda-core, numpy, ml_dtypes, xxhash, safetensors and rich, and CMake, Ninja
and nanobind if the extension is not built. pytest, transformers, lmcache (or its ``cuda_ops``
alone, named by LMCACHE_CUDA_OPS), nvidia-nvcomp and compute-sanitizer are used where they are
there; the result says what was not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
CHUNK_TOKENS = 256
# Layers, KV heads, head dimension.
GEOMETRIES = {
    "llama-3.1-8b": (32, 8, 128),
    "mistral-7b": (32, 8, 128),
    "llama-3.1-70b": (80, 8, 128),
    "qwen2.5-0.5b": (24, 2, 64),
}
TINY = {"tiny": (2, 2, 16)}
TINY_TOKENS = 40
# Shares of the time at which parts have to be done.
PARTS = {"checks": 0.35, "decode": 0.6, "encode": 0.75, "peers": 0.82, "models": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--measure-shape", action="store_true")
    options = parser.parse_args()
    begin = time.perf_counter()
    from gpu_bench import checks

    result: dict[str, Any] = {"dry_run": options.dry_run, "build": checks.build()}
    from gpu_bench import kv, models, peers, rows
    from gpu_bench.machine import Bench, emulated, real

    from cachegen.bench.report import environment, write_json

    if options.measure_shape:
        write_json(kv.SHAPE_FILE, kv.measure_shape())
        return
    deadlines = {name: begin + 60 * options.minutes * share for name, share in PARTS.items()}
    bench: Bench = emulated() if options.dry_run else real()
    result["device"], result["compile_s"] = bench.name, bench.compile_s

    def save() -> None:
        # After every part, so that a run that is cut short leaves what it has.
        result["seconds"] = time.perf_counter() - begin
        if options.json:
            write_json(options.json, {**result, **environment()})

    if not options.dry_run:
        left_s = deadlines["checks"] - time.perf_counter()
        result["checks"] = checks.run_tests(sanitize=not options.no_sanitizer, limit_s=left_s)
        print(json.dumps(result["checks"], indent=1), flush=True)
        save()
    geometries = TINY if options.dry_run else GEOMETRIES
    tokens = TINY_TOKENS if options.dry_run else CHUNK_TOKENS
    drawn = rows.Drawn(tokens)
    bench.deadline = deadlines["decode"]
    result["rows"] = rows.time_decode(bench, geometries, drawn)
    save()
    bench.deadline = deadlines["encode"]
    result["rows"] += rows.time_encode(bench, geometries, drawn)
    save()
    bench.deadline = deadlines["peers"]
    found, result["peers"] = peers.time_peers(bench, geometries, drawn)
    result["rows"] += found
    save()
    bench.deadline = deadlines["models"]
    result["models"], result["models_note"] = models.time_models(bench)
    result["ttft"] = models.ttft_table(result["models"], result["rows"])
    result["complete"] = not bench.cut_short
    save()
    for row in result["ttft"]:
        print(row["model"], row["prompt_tokens"], f"{row['link_gbps']:g} Gbit/s:", row["verdict"])


if __name__ == "__main__":
    main()
