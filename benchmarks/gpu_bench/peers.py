"""What others offer on a GPU, on the same values in the same run; what is missing is named."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bench.machine import Bench
from gpu_bench.rows import Drawn

# LMCache's arithmetic coder takes at most so many tokens at a time.
LMCACHE_TOKENS = 256
LMCACHE_CHUNKS = (1, 4, 16)


def time_peers(
    bench: Bench, geometries: dict[str, Any], drawn: Drawn
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time LMCache's kernels and nvCOMP's ANS. Returns: rows, and what is there or why not."""
    if bench.dry:
        return [], {"lmcache": "no device", "nvcomp_ans": "no device"}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    try:
        kernels, where = load_lmcache()
    except (ImportError, OSError) as error:
        found["lmcache"] = f"not importable: {error}"
    else:
        found["lmcache"] = where
        for name, geometry in geometries.items():
            for count in LMCACHE_CHUNKS:
                if not bench.out_of_time():
                    rows += time_lmcache(bench, kernels, name, drawn.chunk(geometry), count)
    found["nvcomp_ans"] = time_nvcomp(bench)
    return rows, found


def load_lmcache() -> tuple[Any, str]:
    """Load LMCache's CUDA extension: from the package, or the file LMCACHE_CUDA_OPS names.

    The extension alone will do, where the package's other dependencies are missing.
    Raises: ImportError, OSError.
    """
    import torch  # noqa: F401  (its libraries are what the extension links to)

    path = os.environ.get("LMCACHE_CUDA_OPS")
    if path is None:
        found = importlib.util.find_spec("lmcache")
        folders = found.submodule_search_locations if found else None
        files = [file for folder in folders or () for file in Path(folder).glob("cuda_ops*.so")]
        if not files:
            raise ImportError("no package lmcache with cuda_ops; LMCACHE_CUDA_OPS is not set")
        path = str(files[0])
    spec = importlib.util.spec_from_file_location("cuda_ops", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Path(path).name


def time_lmcache(
    bench: Bench, kernels: Any, name: str, chunk: Any, count: int
) -> list[dict[str, Any]]:
    """Time LMCache's way to code: its kernels, and the tensor operations that it puts around them.

    Bins as it grades a model of 32 layers; every chunk alone, as it stores them; decoding ends with
    values in bfloat16, before they go to pages.
    """
    import torch

    whole = bench.put(chunk.to_array())
    layers, _, tokens, heads, dim = whole.shape
    channels = heads * dim
    planes = whole.reshape(layers, 2, tokens, channels).transpose(0, 1)
    bins = torch.full((2, layers), 16.0, device="cuda")
    bins[0, : round(layers * 10 / 32)] = 32
    bins[1, : max(1, round(layers * 2 / 32))] = 32
    levels = bins // 2 - 1

    def encode_one() -> tuple[Any, Any, Any, Any]:
        symbols, widest = [], []
        for side in range(2):
            largest = planes[side].abs().amax(dim=-1, keepdim=True)
            middle = levels[side][:, None, None]
            symbols.append(torch.round(planes[side] * (middle / largest) + middle).to(torch.int8))
            widest.append(largest)
        cdfs = [
            kernels.calculate_cdf(part, int(bins[side].max())) for side, part in enumerate(symbols)
        ]
        cdf = torch.cat(cdfs)
        joined = torch.cat(symbols).reshape(2 * layers, tokens, channels)
        room = torch.zeros((2 * layers, channels, LMCACHE_TOKENS), dtype=torch.uint8, device="cuda")
        lengths = torch.zeros((2 * layers, channels), dtype=torch.int32, device="cuda")
        kernels.encode_fast_new(cdf, joined, room, lengths)
        kept = torch.arange(LMCACHE_TOKENS, device="cuda") < lengths[:, :, None]
        return cdf, room[kept], lengths, torch.stack(widest)

    cdf, stream, lengths, widest = encode_one()
    out = torch.empty((2 * layers, tokens, channels), dtype=torch.uint8, device="cuda")

    def decode_one() -> Any:
        ends = lengths.flatten().cumsum(0).reshape(lengths.shape)
        kernels.decode_fast_prefsum(cdf, stream, ends, out)
        values = out.reshape(2, layers, tokens, channels).float()
        middle = levels[:, :, None, None]
        return ((values - middle) / middle * widest).to(torch.bfloat16)

    decoded = decode_one()
    error = (decoded.float() - planes.float()).abs().amax(dim=-1, keepdim=True)
    sound = bool((error <= widest.float() / levels[:, :, None, None] * 0.51).all())
    stored = stream.numel() + 2 * cdf.numel() + 4 * lengths.numel() + 2 * widest.numel()
    values = 2 * layers * channels * tokens * count
    copy_s = bench.copy_seconds(whole) * count
    rows = []
    for kernel, work in (("decode", decode_one), ("encode", encode_one)):

        def repeated(work: Any = work) -> None:
            for _ in range(count):
                work()

        taken_s = bench.seconds(repeated, repeats=5)
        rows.append(
            {
                "kernel": kernel,
                "codec": "LMCache CacheGen",
                "geometry": name,
                "chunks": count,
                "passes": 1,
                "billed_bits_per_value": 8 * stored * count / values,
                "output_gb_per_s" if kernel == "decode" else "input_gb_per_s": 2
                * values
                / taken_s
                / 1e9,
                "ratio_to_copy": copy_s / taken_s,
                "microseconds": taken_s * 1e6,
                "sound": sound,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def time_nvcomp(bench: Bench) -> Any:
    """Time nvCOMP's ANS on bytes of int8 symbols. Returns: figures, or why there are none."""
    try:
        from nvidia import nvcomp
    except ImportError as error:
        return f"not importable: {error}"
    import torch

    symbols = np.clip(np.rint(np.random.default_rng(0).normal(0, 6, 1 << 27)), -127, 127)
    source = torch.from_numpy(symbols.astype(np.int8)).cuda()
    codec = nvcomp.Codec(algorithm="ANS")
    packed = codec.encode(nvcomp.as_array(source))
    taken_s = bench.seconds(lambda: codec.decode(packed))
    return {
        "symbols_gb_per_s": source.numel() / taken_s / 1e9,
        "bits_per_symbol": 8 * packed.buffer_size / source.numel(),
    }
