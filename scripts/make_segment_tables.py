"""Measure bits per value against distortion on the reference model, for the simulator.

Held-out prefixes are encoded in chunks of 1,024 tokens, prefixes of the objects are decoded, and
the error is measured in one unit for all codecs: before RoPE, V weighted, squared, over the
squared spread of the chunk's centred values. Writes src/cachegen/stream/segment_tables.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cachegen.bench.baselines.families import PAPER_BINS
from cachegen.bench.calibrate import calibrate, captured_contexts
from cachegen.bench.prompts import load_workload
from cachegen.bench.report import environment, write_json
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.basis import group_matrix, plain_basis, planes_of_group
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.grading import CacheGenConfig
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.levels import relative_distortions
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.hf.load import begin_and_text, load_model
from cachegen.types import KVDtype

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/reference"
TABLES = ROOT / "src/cachegen/stream/segment_tables.json"
CHUNK_TOKENS = 1024
CALIBRATION_TOKENS = 16_384
LEVELS = (1, 2, 3)


def relative_error(chunk: KVChunk, decoded: KVChunk) -> float:
    """Return the weighted squared error over the squared spread of the centred values.

    RoPE turns keys without changing their length, so the error is the same before and after it.
    """
    basis = plain_basis(chunk)
    error = spread = 0.0
    for group in basis.groups:
        rows = group_matrix(chunk, group, basis.value_weight).astype(np.float64)
        spread += float(np.square(rows - rows.mean(axis=0)).sum())
        for layer, is_value in planes_of_group(group):
            left = chunk.layers[layer].plane(is_value=is_value).astype(np.float64)
            right = decoded.layers[layer].plane(is_value=is_value).astype(np.float64)
            weight = basis.value_weight if is_value else 1.0
            error += float(np.square(weight * (left - right)).sum())
    return error / spread


def nested_points(chunks: Sequence[KVChunk], codec: ProgressiveCodec) -> list[dict[str, float]]:
    """Measure prefixes of nested objects: mean over the chunks of the n-th prefix that decodes."""
    measured = []
    for chunk in chunks:
        data = codec.encode(chunk)
        ends = [size for size, _ in relative_distortions(read_header(data))]
        measured.append(
            [
                (8 * end / chunk.value_count, relative_error(chunk, decoded))
                for end in ends
                for decoded in [decode(data[:end], allow_partial=True, profile=codec.profile)]
            ]
        )
    return _mean(measured)


def whole_points(chunks: Sequence[KVChunk], codecs: Sequence[Codec]) -> list[dict[str, float]]:
    """Measure codecs that have one object for each level."""
    measured = []
    for chunk in chunks:
        row = []
        for codec in codecs:
            data = codec.encode(chunk)
            decoded = decode(data, profile=getattr(codec, "profile", None))
            row.append((8 * len(data) / chunk.value_count, relative_error(chunk, decoded)))
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
    profile = calibrate(model, ids, tokens=CALIBRATION_TOKENS, context=CHUNK_TOKENS, begin=begin)
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
            "points": nested_points(chunks, ProgressiveCodec()),
        },
        "progressive-profile": {
            "text": "one progressive object with a profile; points are prefixes of it",
            "points": nested_points(chunks, ProgressiveCodec(profile=profile)),
        },
        "cachegen-lmcache": {
            "text": "levels 1 to 3 as LMCache codes them, tables sent with every chunk",
            "points": whole_points(
                chunks, [CacheGenCodec(level=level, tables="chunk") for level in LEVELS]
            ),
        },
        "cachegen-paper": {
            "text": "levels as the paper codes them: anchor deltas, tables from calibration; "
            f"bins {', '.join(map(str, PAPER_BINS))}",
            "points": whole_points(chunks, paper),
        },
        "int8": {
            "text": "plain int8, no entropy coding",
            "points": whole_points(chunks, [Int8Codec(entropy=False)]),
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
        "unit": "weighted squared error over the squared spread of the centred values",
        "tables": tables,
        **environment(["python", "scripts/make_segment_tables.py"]),
    }
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
