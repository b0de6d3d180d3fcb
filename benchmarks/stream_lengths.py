"""What restart points of ``progressive`` cost in bytes: one encoding for each length of streams.

Shorter streams are decoded by more threads and warps; each stores the states of 32 lanes. The
reference model's KV is that of held-out text, wide planes are drawn as in ``benchmarks/gpu.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpu_bench.kv import draw_chunk
from rich.console import Console

from cachegen.bench.calibrate import captured_contexts
from cachegen.bench.report import environment, format_cell, write_json
from cachegen.chunk import KVChunk
from cachegen.codec import passes
from cachegen.codec.container import read_header
from cachegen.codec.levels import NAMED, prefix_bytes
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.hf.load import begin_and_text, load_model
from cachegen.profile import Profile
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
STEPS = (512, 1024, 2048, 4096, 8192)
CHUNK_TOKENS = 256
# Layers, KV heads, head dimension: planes as wide as a served model's, few of them.
WIDE = {"llama-3.1-8b, 2 layers": (2, 8, 128), "qwen2.5-0.5b, 4 layers": (4, 2, 64)}
COLUMNS = (
    ("kv", ""),
    ("profile", ""),
    ("quality", ""),
    ("stream_steps", "d"),
    ("billed_bits_per_value", ".4f"),
    ("bytes_over_4096", "+.4f"),
)


def chunks_of_reference(tokens: int) -> list[KVChunk]:
    """Capture held-out text in chunks of 256 tokens, bfloat16."""
    model, tokenizer = load_model(str(MODEL))
    text = (MODEL / "eval_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    captured = captured_contexts(model, ids, tokens=tokens, context=1024, begin=begin)
    return [part for kv in captured for part in kv.astype(KVDtype.BFLOAT16).split(CHUNK_TOKENS)]


def measure(name: str, chunks: list[KVChunk], profile: Profile | None) -> list[dict[str, Any]]:
    """Encode the same chunks at every length of streams."""
    codec = ProgressiveCodec(profile=profile)
    values = sum(chunk.value_count for chunk in chunks)
    sizes: dict[tuple[str, int], int] = {}
    for steps in STEPS:
        passes.STREAM_STEPS = steps
        for chunk in chunks:
            data = codec.encode(chunk)
            header = read_header(data)
            for quality in ("whole", *NAMED):
                size = len(data) if quality == "whole" else prefix_bytes(header, quality)
                sizes[quality, steps] = sizes.get((quality, steps), 0) + size
    return [
        {
            "kv": name,
            "profile": profile is not None,
            "quality": quality,
            "stream_steps": steps,
            "chunks": len(chunks),
            "billed_bits_per_value": 8 * size / values,
            "bytes_over_4096": size / sizes[quality, 4096] - 1,
        }
        for (quality, steps), size in sizes.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    reference = chunks_of_reference(options.tokens)
    rows = measure("reference", reference, None)
    rows += measure("reference", reference, Profile.load(MODEL / "cachegen.profile"))
    for name, geometry in WIDE.items():
        rows += measure(name, [draw_chunk(geometry, CHUNK_TOKENS, seed=1)], None)
    console = Console(width=120)
    for row in sorted(rows, key=lambda row: (row["kv"], row["profile"], row["quality"])):
        line = "  ".join(f"{name} {format_cell(row[name], form)}" for name, form in COLUMNS)
        console.print(line, soft_wrap=True)
    if options.json:
        write_json(options.json, {"rows": rows, **environment()})


if __name__ == "__main__":
    main()
