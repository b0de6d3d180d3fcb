"""Build, check and time the CUDA kernels on one GPU, in one run of under eight minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Rows: decode rate by codec, geometry and number of chunks, beside a device-to-device copy of the
output in the same run; the latency of one chunk; prefill and token times of models with random
weights, layers reduced and extrapolated; and, from these, time to first token by link. KV is drawn
per channel with spread and shape as measured on the reference model (``--measure-shape``).
``--dry-run`` takes the emulation on the host and tiny sizes: it exercises everything but a device,
and its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
SHAPE_FILE = ROOT / "benchmarks/results/kv_shape.json"
CHUNK_TOKENS = 256
NEEDED = ("numpy", "ml_dtypes", "xxhash", "safetensors", "typer", "rich", "torch")
REPEATS = 15
QUANTILES = 33
# Layers, KV heads, head dimension.
GEOMETRIES = {
    "llama-3.1-8b": (32, 8, 128),
    "mistral-7b": (32, 8, 128),
    "llama-3.1-70b": (80, 8, 128),
    "qwen2.5-0.5b": (24, 2, 64),
}
TINY = {"tiny": (2, 2, 16)}
CHUNKS = (1, 4, 16, 64)
# Heads and widths of the feed-forward layers, from the public configurations.
PREFILL_MODELS = {"mistral-7b": (32, 14336), "llama-3.1-70b": (64, 28672)}
PROMPTS = (2048, 9400, 32768)
MEASURED_LAYERS = (2, 6)


def build() -> dict[str, Any]:
    """Build the C++ extension in place if this Python has none. Returns: how long it took."""
    begin = time.perf_counter()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    if importlib.util.find_spec("cachegen.native._core") is None:
        folder = ROOT / "build" / f"gpu-{sys.version_info[0]}{sys.version_info[1]}"
        cmake = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        python = f"-DPython_EXECUTABLE={sys.executable}"
        subprocess.run([*cmake, "-DCMAKE_BUILD_TYPE=Release", python], check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)
        for library in folder.glob("_core*.so"):
            shutil.copy(library, ROOT / "src/cachegen/native")
        importlib.invalidate_caches()
    return {"seconds": time.perf_counter() - begin}


def run_tests(*, sanitize: bool, limit_s: float) -> dict[str, Any]:
    """Run the tests that need a device, and the hostile ones under compute-sanitizer."""
    environment = {**os.environ, "CACHEGEN_REQUIRE_CUDA": "1", "PYTHONPATH": str(ROOT / "src")}
    tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/cuda/test_device.py")]
    results = {"tests": _run([*tests, "-p", "no:cacheprovider"], environment, limit_s)}
    tool = shutil.which("compute-sanitizer")
    if sanitize and tool is None:
        results["sanitizer"] = {"passed": None, "output": "compute-sanitizer is not on the path"}
    elif sanitize and tool is not None:
        for check in ("memcheck", "racecheck", "initcheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9", *tests, "-k", "hostile"]
            results[f"sanitizer {check}"] = _run(command, environment, limit_s / 3)
    return results


def _run(command: list[str], environment: dict[str, str], limit_s: float) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
        passed, output = done.returncode == 0, done.stdout[-1500:] + done.stderr[-500:]
    except subprocess.TimeoutExpired:
        passed, output = None, f"stopped after {limit_s:.0f} s"
    return {"passed": passed, "output": output, "seconds": time.perf_counter() - begin}


# ---- Timing --------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A device to measure on: torch and CUDA, or in a dry run the emulation and the clock."""

    dry: bool
    device: Any
    deadline: float

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline

    def empty(self, shape: tuple[int, ...]) -> Any:
        if self.dry:
            import ml_dtypes
            import numpy as np

            return np.zeros(shape, ml_dtypes.bfloat16)
        import torch

        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    def seconds(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        """Return the median time of some work on the device."""
        if self.dry:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        import torch

        for _ in range(2):
            work()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def copy_seconds(self, tensor: Any) -> float:
        other = tensor.copy() if self.dry else tensor.clone()
        copy = (lambda: other.__setitem__(..., tensor)) if self.dry else lambda: other.copy_(tensor)
        return self.seconds(copy)


def objects_of(chunk: Any) -> list[tuple[str, int, bytes, bool]]:
    """Return (codec, most passes of a group, object or prefix, is a prefix) to decode."""
    from cachegen.codec.cachegen import CacheGenCodec
    from cachegen.codec.container import read_header
    from cachegen.codec.int8 import Int8Codec
    from cachegen.codec.levels import prefix_bytes
    from cachegen.codec.progressive import ProgressiveCodec
    from cachegen.codec.reader import ObjectReader

    whole = ProgressiveCodec().encode(chunk)
    cut = whole[: prefix_bytes(read_header(whole), "balanced")]
    reader = ObjectReader(cut, allow_partial=True)
    most = max(reader.passes_of(group) for group in range(len(reader.header.groups)))
    return [
        ("progressive", reader.header.passes, whole, False),
        ("progressive", most, cut, True),
        ("int8", 2, Int8Codec().encode(chunk), False),
        ("int8 plain", 1, Int8Codec(entropy=False).encode(chunk), False),
        ("cachegen", 1, CacheGenCodec().encode(chunk), False),
        ("cachegen parametric", 1, CacheGenCodec(tables="parametric").encode(chunk), False),
    ]


def time_decode(bench: Bench, geometries: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Time every codec on every geometry and number of chunks, for as long as there is time."""
    import numpy as np

    from cachegen.codec import gpu

    rows: list[dict[str, Any]] = []
    drawn: dict[tuple[int, int, int], Any] = {}
    for name, geometry in geometries.items():
        layers, heads, dim = geometry
        if geometry not in drawn:
            drawn[geometry] = objects_of(draw_chunk(geometry, tokens, seed=1))
        for count in CHUNKS if not bench.dry else (1, 2):
            if bench.out_of_time():
                return rows
            slots = np.random.default_rng(2).permutation(count * tokens)
            out = bench.empty((layers, 2, -(-count * tokens // 16), 16, heads, dim))
            copy_s = bench.copy_seconds(out)
            for codec, passes, data, is_prefix in drawn[geometry]:
                begin = time.perf_counter()
                prepared = gpu.prepare(
                    [data] * count,
                    out=out,
                    slot_mapping=slots,
                    allow_partial=is_prefix,
                    device=bench.device,
                )
                prepare_s = time.perf_counter() - begin
                taken_s = bench.seconds(prepared.launch)
                prepared.check()
                values = 2 * layers * heads * dim * tokens * count
                rows.append(
                    {
                        "kernel": "decode",
                        "codec": codec,
                        "geometry": name,
                        "chunks": count,
                        "passes": passes,
                        "billed_bits_per_value": 8 * len(data) * count / values,
                        "output_gb_per_s": 2 * values / taken_s / 1e9,
                        "ratio_to_copy": copy_s / taken_s,
                        "microseconds": taken_s * 1e6,
                        "prepare_ms": prepare_s * 1e3,
                        "workspace_bytes": prepared.workspace_bytes,
                        "fallbacks": prepared.fallbacks,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
                del prepared
            del out
    return rows


def time_peers(bench: Bench) -> dict[str, Any]:
    """Time nvCOMP's ANS on bytes of int8 symbols, and say whether LMCache's kernels are there."""
    peers: dict[str, Any] = {
        "lmcache": "importable, not timed here"
        if _importable("lmcache.c_ops")
        else "not importable"
    }
    if bench.dry or not _importable("nvidia.nvcomp"):
        peers["nvcomp_ans"] = "not importable"
        return peers
    import numpy as np
    import torch
    from nvidia import nvcomp

    symbols = np.clip(np.rint(np.random.default_rng(0).normal(0, 6, 1 << 27)), -127, 127)
    source = torch.from_numpy(symbols.astype(np.int8)).cuda()
    codec = nvcomp.Codec(algorithm="ANS")
    packed = codec.encode(nvcomp.as_array(source))
    taken_s = bench.seconds(lambda: codec.decode(packed))
    peers["nvcomp_ans"] = {
        "symbols_gb_per_s": source.numel() / taken_s / 1e9,
        "bits_per_symbol": 8 * packed.buffer_size / source.numel(),
    }
    return peers


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ---- Models --------------------------------------------------------------------------------------


def time_models(bench: Bench) -> list[dict[str, Any]]:
    """Time prefill and one token of models with random weights; layers reduced, extrapolated.

    Time is linear in the layers: two numbers of layers give the time of a layer and the rest.
    """
    from cachegen.bench.advise import MODELS

    rows = []
    for name, (heads, wide) in PREFILL_MODELS.items():
        model = MODELS[name]
        for tokens in PROMPTS if not bench.dry else (64,):
            if bench.out_of_time():
                return rows
            layers = MEASURED_LAYERS if not bench.dry else (1, 2)
            times = [_time_model(bench, model, heads, wide, tokens, count) for count in layers]
            prefill_s, token_s = (
                _extrapolated(few, more, layers, model.layers)
                for few, more in zip(*times, strict=True)
            )
            rows.append(
                {
                    "model": name,
                    "prompt_tokens": tokens,
                    "prefill_s": prefill_s,
                    "token_s": token_s,
                    "prefill_flops": model.prefill_flops(tokens) / prefill_s,
                    "layers_measured": list(layers),
                    "layers": model.layers,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    # The advisor takes the row of a model that comes last.
    return sorted(rows, key=lambda row: row["prompt_tokens"] == PROMPTS[1])


def _extrapolated(few_s: float, more_s: float, layers: tuple[int, int], all_layers: int) -> float:
    layer_s = max(more_s - few_s, 0.0) / (layers[1] - layers[0])
    return max(few_s, 1e-9) + layer_s * (all_layers - layers[0])


def _time_model(
    bench: Bench, model: Any, heads: int, wide: int, tokens: int, layers: int
) -> tuple[float, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shrink = 32 if bench.dry else 1
    config = LlamaConfig(
        hidden_size=model.hidden // shrink,
        intermediate_size=wide // shrink,
        num_hidden_layers=layers,
        num_attention_heads=max(heads // shrink, 1),
        num_key_value_heads=max(model.kv_heads // shrink, 1),
        vocab_size=32000 // shrink,
        max_position_embeddings=1 << 17,
    )
    device = "cpu" if bench.dry else "cuda"
    with torch.device(device), torch.no_grad():
        network = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.randint(0, config.vocab_size, (1, tokens))
        prefill_s = bench.seconds(
            lambda: network(input_ids=ids, use_cache=True, logits_to_keep=1), repeats=5
        )
        cache = network(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        token_s = bench.seconds(
            lambda: network(input_ids=ids[:, :1], past_key_values=cache, use_cache=True), repeats=5
        )
    return prefill_s, token_s


def ttft_table(models: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return time to first token by model, prompt, link and way, from what was measured here."""
    from cachegen.bench import advise

    rates = [row["output_gb_per_s"] for row in rows if row["codec"] == "progressive"]
    decode = advise.Figure(min(rates, default=1.0) * 1e9, "this run", False)
    table = []
    for row in models:
        model = advise.MODELS[row["model"]]
        speeds = advise.Machine(
            advise.Figure(row["prefill_flops"], "this run", False),
            advise.Figure(row["token_s"], "this run", False),
            decode,
        )
        for link in advise.DEFAULT_LINKS_GBPS:
            advice = advise.advise(
                model, speeds, advise.sizes(), link_gbps=link, prompt_tokens=row["prompt_tokens"]
            )
            table.append(
                {
                    "model": row["model"],
                    "prompt_tokens": row["prompt_tokens"],
                    "link_gbps": link,
                    "ttft_s": advice.ttft_s,
                    "break_even_gbps": advice.break_even_gbps,
                    "verdict": advise.verdict(advice),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--measure-shape", action="store_true")
    options = parser.parse_args()
    begin = time.perf_counter()
    result: dict[str, Any] = {"dry_run": options.dry_run, "build": build()}
    from cachegen.bench.report import environment, write_json

    if options.measure_shape:
        write_json(SHAPE_FILE, measure_shape())
        return
    deadline = begin + 60 * options.minutes
    if options.dry_run:
        from cachegen.native.cuda.emulation import EmulatedDevice

        bench = Bench(True, EmulatedDevice(), deadline)
        result["device"] = "none: emulation, times mean nothing"
    else:
        import torch

        from cachegen.native.cuda.device import cuda_device

        started = time.perf_counter()
        bench = Bench(False, cuda_device(0), deadline)
        result["compile_s"] = time.perf_counter() - started
        result["device"] = torch.cuda.get_device_name(0)
        result["checks"] = run_tests(sanitize=not options.no_sanitizer, limit_s=120)
        print(json.dumps(result["checks"], indent=1), flush=True)
    result["rows"] = time_decode(
        bench, TINY if options.dry_run else GEOMETRIES, 40 if options.dry_run else CHUNK_TOKENS
    )
    result["peers"] = time_peers(bench)
    result["models"] = time_models(bench)
    result["ttft"] = ttft_table(result["models"], result["rows"])
    result["seconds"] = time.perf_counter() - begin
    result["complete"] = not bench.out_of_time()
    if options.json:
        write_json(options.json, {**result, **environment()})
    for row in result["ttft"]:
        print(row["model"], row["prompt_tokens"], f"{row['link_gbps']:g} Gbit/s:", row["verdict"])


if __name__ == "__main__":
    main()
