"""Measure bits per value against distortion on the reference model, for the simulator.

Held-out prefixes are encoded in chunks of 1,024 tokens, prefixes of the objects are decoded, and
the error is measured in one unit for all codecs: squared, before RoPE, every head weighted by what
its errors do to the model's predictions (docs/decisions/0010-measured-weights.md), over the same of
the chunk's centred values. Writes src/cachegen/stream/segment_tables.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cachegen.bench.baselines.families import PAPER_BINS
from cachegen.bench.calibrate import captured_contexts
from cachegen.bench.coding import PROFILE_FILE
from cachegen.bench.prompts import load_workload
from cachegen.bench.report import environment, write_json
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.basis import group_matrix
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.grading import CacheGenConfig
from cachegen.codec.header import Group
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.levels import relative_distortions
from cachegen.codec.metric import Metric, weigh
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.hf.load import begin_and_text, load_model
from cachegen.profile import Profile
from cachegen.types import KVDtype

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/reference"
TABLES = ROOT / "src/cachegen/stream/segment_tables.json"
CHUNK_TOKENS = 1024
CALIBRATION_TOKENS = 16_384
LEVELS = (1, 2, 3)


class Ruler:
    """Measures errors in one unit. metric: what an error of each head costs."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def relative_error(self, chunk: KVChunk, decoded: KVChunk) -> float:
        """Return the weighted squared error over that of the channel means."""
        # What codecs return says nothing of RoPE.
        position, rope = chunk.first_position, chunk.rope
        decoded = KVChunk.from_layers(decoded.layers, first_position=position, rope=rope)
        error = spread = 0.0
        for layer in range(chunk.geometry.layers):
            for planes, is_value in ((1, False), (2, True)):
                group, blocks = Group(layer, 1, planes), self._metric.blocks([(layer, is_value)])
                left, right = (group_matrix(kv, group, 1.0) for kv in (chunk, decoded))
                centred = left - left.mean(axis=0, dtype=np.float64)
                error += float(np.square(weigh(left - right, blocks), dtype=np.float64).sum())
                spread += float(np.square(weigh(centred, blocks), dtype=np.float64).sum())
        return error / spread


def nested_points(
    chunks: Sequence[KVChunk], codec: ProgressiveCodec, ruler: Ruler
) -> list[dict[str, float]]:
    """Measure prefixes of nested objects: mean over the chunks of the n-th prefix that decodes."""
    measured = []
    for chunk in chunks:
        data = codec.encode(chunk)
        ends = [size for size, _ in relative_distortions(read_header(data))]
        measured.append(
            [
                (8 * end / chunk.value_count, ruler.relative_error(chunk, decoded))
                for end in ends
                for decoded in [decode(data[:end], allow_partial=True, profile=codec.profile)]
            ]
        )
    return _mean(measured)


def whole_points(
    chunks: Sequence[KVChunk], codecs: Sequence[Codec], ruler: Ruler
) -> list[dict[str, float]]:
    """Measure codecs that have one object for each level."""
    measured = []
    for chunk in chunks:
        row = []
        for codec in codecs:
            data = codec.encode(chunk)
            decoded = decode(data, profile=getattr(codec, "profile", None))
            row.append((8 * len(data) / chunk.value_count, ruler.relative_error(chunk, decoded)))
        measured.append(row)
    return _mean(measured)


def _mean(measured: list[list[tuple[float, float]]]) -> list[dict[str, float]]:
    bits, errors = np.moveaxis(np.array(measured).mean(axis=0), -1, 0)
    pairs = sorted(zip(bits.tolist(), errors.tolist(), strict=True))
    return [
        {"bits_per_value": round(size, 5), "distortion": float(f"{error:.5g}")}
        for size, error in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=TABLES)
    arguments = parser.parse_args()
    model, tokenizer = load_model(str(MODEL))
    work = load_workload(model, tokenizer, MODEL)
    held_out = [*work.texts, *(prompt.prefix_ids for prompt in work.prompts)]
    chunks = [work.kv[ids].astype(KVDtype.BFLOAT16) for ids in held_out]
    begin, ids = begin_and_text(tokenizer, (MODEL / "calibration_text.txt").read_text("utf-8"))
    contexts = [
        kv.astype(KVDtype.BFLOAT16)
        for kv in captured_contexts(
            model, ids, tokens=CALIBRATION_TOKENS, context=CHUNK_TOKENS, begin=begin
        )
    ]
    profile = Profile.load(MODEL / PROFILE_FILE)
    ruler = Ruler(
        Metric.from_arrays(
            profile.arrays["metric.keys"], profile.arrays["metric.values"], chunks[0].geometry
        )
    )
    layers = chunks[0].geometry.layers
    paper: list[Codec] = []
    for bins in PAPER_BINS:
        grading = CacheGenConfig.from_bins([bins] * layers, [bins] * layers)
        fitted = CacheGenCodec(grading=grading, delta="anchor").fit_profile(contexts)
        paper.append(
            CacheGenCodec(grading=grading, delta="anchor", tables="profile", profile=fitted)
        )
    tables: dict[str, Any] = {
        "progressive": {
            "text": "one progressive object, no profile; points are prefixes of it",
            "points": nested_points(chunks, ProgressiveCodec(), ruler),
        },
        "progressive-profile": {
            "text": "one progressive object with a profile; points are prefixes of it",
            "points": nested_points(chunks, ProgressiveCodec(profile=profile), ruler),
        },
        "cachegen-lmcache": {
            "text": "levels 1 to 3 as LMCache codes them, tables sent with every chunk",
            "points": whole_points(
                chunks, [CacheGenCodec(level=level, tables="chunk") for level in LEVELS], ruler
            ),
        },
        "cachegen-paper": {
            "text": "levels as the paper codes them: anchor deltas, tables from calibration; "
            f"bins {', '.join(map(str, PAPER_BINS))}",
            "points": whole_points(chunks, paper, ruler),
        },
        "int8": {
            "text": "plain int8, no entropy coding",
            "points": whole_points(chunks, [Int8Codec(entropy=False)], ruler),
        },
    }
    console = Console()
    for name, table in tables.items():
        shown = (f"{p['bits_per_value']:.3f}/{p['distortion']:.2g}" for p in table["points"])
        console.print(name, *shown, highlight=False)
    result = {
        "model": "reference",
        "chunk_tokens": CHUNK_TOKENS,
        "chunks": len(chunks),
        "calibration_tokens": CALIBRATION_TOKENS,
        "unit": "squared error, weighted by gradients, over that of the channel means",
        "tables": tables,
        **environment(["python", "scripts/make_segment_tables.py"]),
    }
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
