"""The ``lossless`` codec: how long it takes next to a copy, and how much smaller KV becomes.

Three take turns in every round: a copy of the chunk, the codec, and its twin in NumPy. Times are
those of the fastest round. Wide planes are drawn, with a mean and a spread for each channel; ratios
are also those of the reference model's KV of held-out text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cachegen import native
from cachegen.bench.calibrate import captured_contexts
from cachegen.bench.report import environment, write_json
from cachegen.chunk import KVChunk
from cachegen.codec.base import empty_chunk, planes_of
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference_lossless import decode_planes, encode_plane
from cachegen.codec.target import Target
from cachegen.hf.load import begin_and_text, load_model
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
CHUNK_TOKENS = 256
# Layers, KV heads, head dimension: the geometry of Llama-3.1-8B.
WIDE = (32, 8, 128)
# What is stored, and the smaller type that its values had before.
KINDS = (
    (KVDtype.BFLOAT16, None),
    (KVDtype.FLOAT16, None),
    (KVDtype.FLOAT32, None),
    (KVDtype.FLOAT32, KVDtype.BFLOAT16),
    (KVDtype.FLOAT32, KVDtype.FLOAT16),
)


def draw_wide() -> KVChunk:
    """Draw one chunk, float32, whose channels have means and spreads of their own."""
    layers, heads, dim = WIDE
    rng = np.random.default_rng(0)
    channel = (layers, 2, 1, heads, dim)
    mean, spread = rng.normal(0, 1, channel), np.exp(rng.normal(0, 0.5, channel))
    noise = rng.standard_normal((layers, 2, CHUNK_TOKENS, heads, dim), np.float32)
    return KVChunk.from_array((mean + spread * noise).astype(np.float32))


def reference_chunks(tokens: int) -> list[KVChunk]:
    """Capture held-out text in chunks of 256 tokens, float32."""
    model, tokenizer = load_model(str(MODEL))
    text = (MODEL / "eval_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    captured = captured_contexts(model, ids, tokens=tokens, context=1024, begin=begin)
    return [part for kv in captured for part in kv.split(CHUNK_TOKENS)]


def fastest(rounds: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Run all in turn and return the shortest time of each, in seconds."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def timed(chunk: KVChunk, rounds: int) -> dict[str, Any]:
    """Return times as multiples of a copy of the chunk."""
    data = LosslessCodec().encode(chunk)
    planes, dtype = planes_of(chunk), chunk.geometry.dtype
    reader = ObjectReader(data)
    out = empty_chunk(reader.header)
    target = Target(reader.header, out)
    copies = planes_of(empty_chunk(reader.header))

    def copy() -> None:
        for plane, to in zip(planes, copies, strict=True):
            np.copyto(to, plane)

    took = fastest(
        rounds,
        {
            "copy": copy,
            "encode": lambda: LosslessCodec().encode(chunk),
            "decode": lambda: LosslessCodec.decode_into(reader, target, profile=None),
            "encode_in_numpy": lambda: [encode_plane(plane, dtype) for plane in planes],
            "decode_in_numpy": lambda: decode_planes(reader, target),
        },
    )
    times = {f"{name}_in_copies": took[name] / took["copy"] for name in took if name != "copy"}
    return {**times, "copy_s": took["copy"], "bytes": chunk.size_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    reference, wide = reference_chunks(options.tokens), draw_wide()
    console = Console(width=120)
    rows = []
    for dtype, source in KINDS:
        row: dict[str, Any] = {
            "dtype": dtype.label,
            "was": source.label if source else None,
        }
        for name, chunks in (("reference", reference), ("wide", [wide])):
            typed = [(kv.astype(source) if source else kv).astype(dtype) for kv in chunks]
            coded = sum(len(LosslessCodec().encode(chunk)) for chunk in typed)
            row[f"ratio_{name}"] = sum(chunk.size_bytes for chunk in typed) / coded
        row |= timed(typed[0], options.rounds)
        rows.append(row)
        console.print(row, soft_wrap=True)
    if options.json:
        found = {"isa": native.isa(), "threads": native.threads(), "geometry": WIDE, "rows": rows}
        write_json(options.json, {**found, **environment()})


if __name__ == "__main__":
    main()
