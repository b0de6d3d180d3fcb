"""CacheGen's codec on the reference model: levels, tables and anchor delta, every byte billed.

Quality is measured after decoded prefixes of 1,024 held-out tokens in chunks of 256; profiles are
fitted on calibration text that the evaluation never sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cachegen.bench.calibrate import captured_contexts
from cachegen.bench.coding import round_trip
from cachegen.bench.prompts import Workload, load_workload, measure_quality
from cachegen.bench.report import environment, format_cell, write_json
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.raw import RawCodec
from cachegen.codec.summary import summarize
from cachegen.hf.load import begin_and_text, load_model
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
CALIBRATION_CHUNKS = 32
CHUNK_TOKENS = 256
LEVELS = (1, 2, 3)
TABLES = ("chunk", "parametric", "profile")
COLUMNS = (
    ("codec", ""),
    ("level", ""),
    ("tables", ""),
    ("delta", ""),
    ("billed_bits_per_value", ".3f"),
    ("side_bits_per_value", ".3f"),
    ("states_bits_per_value", ".3f"),
    ("profile_bytes", ",d"),
    ("kl_nats", ".2e"),
    ("top1_agreement", ".4f"),
    ("retrieval_accuracy", ".3f"),
)


def calibration(model: Any, tokenizer: Any) -> list[KVChunk]:
    """Capture calibration text in contexts of four chunks."""
    text = (MODEL / "calibration_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    tokens = CALIBRATION_CHUNKS * CHUNK_TOKENS
    captured = captured_contexts(model, ids, tokens=tokens, context=4 * CHUNK_TOKENS, begin=begin)
    return [chunk for kv in captured for chunk in kv.astype(KVDtype.BFLOAT16).split(CHUNK_TOKENS)]


def variants(fitted: Callable[[CacheGenCodec], Any]) -> list[Codec]:
    codecs: list[Codec] = [RawCodec(), Int8Codec(entropy=False), Int8Codec()]
    for delta in ("none", "anchor"):
        for level in LEVELS:
            for tables in TABLES:
                profile = None
                if tables == "profile":
                    profile = fitted(CacheGenCodec(level=level, delta=delta))
                codecs.append(
                    CacheGenCodec(level=level, delta=delta, tables=tables, profile=profile)
                )
    return codecs


def measure(model: Any, work: Workload, codec: Codec) -> dict[str, Any]:
    total = side = states = values = 0
    for ids in work.texts:
        for chunk in work.kv[ids].astype(KVDtype.BFLOAT16).split(CHUNK_TOKENS):
            summary = summarize(codec.encode(chunk))
            total += summary.total_bytes
            side += summary.side_bytes
            states += summary.states_bytes
            values += chunk.value_count
    config = codec.config()
    profile = getattr(codec, "profile", None)
    row = {
        "codec": codec.name,
        "level": config.get("level"),
        "tables": config.get("tables", "parametric" if config.get("entropy") else None),
        "delta": config.get("delta"),
        "billed_bits_per_value": 8 * total / values,
        "side_bits_per_value": 8 * side / values,
        "states_bits_per_value": 8 * states / values,
        "profile_bytes": sum(a.nbytes for a in profile.arrays.values()) if profile else None,
    }
    return {**row, **measure_quality(model, work, lambda kv: round_trip(codec, kv))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console()
    model, tokenizer = load_model(str(MODEL))
    work = load_workload(model, tokenizer, MODEL)
    chunks = calibration(model, tokenizer)
    rows = []
    for codec in variants(lambda c: c.fit_profile(chunks, model_name="reference")):
        rows.append(measure(model, work, codec))
        console.print(" ".join(format_cell(rows[-1][key], spec) for key, spec in COLUMNS))
    result = {
        "model": "reference",
        "chunk_tokens": CHUNK_TOKENS,
        "calibration_tokens": CALIBRATION_CHUNKS * CHUNK_TOKENS,
        "rows": rows,
        **environment(["python", "benchmarks/cachegen_variants.py", "--json", arguments.json.name]),
    }
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
