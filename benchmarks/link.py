"""Time to first token over a real link, and storage: the reference model, Redis, ``tc tbf``.

Two network namespaces with a shaped link between them; Redis keeps the objects on the far side, the
model runs on the near side. The bandwidth is set so that sending plain int8 (16-bit scales, no
entropy coding) takes at least four times the prefill of the whole prompt and the decoding.
Modes take turns, round after round, so that whatever else the machine does meets all of them.
Needs root, iproute2 and redis-server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cachegen.bench.coding import at_quality, encode_all, find_profile, round_trip
from cachegen.bench.prompts import Workload, load_workload, measure_quality
from cachegen.bench.report import environment, format_cell, load_pyplot, save_figure, write_json
from cachegen.bench.shaped_link import ShapedLink, missing, shaped_link, start_redis
from cachegen.bench.ttft import Loading, Timing, time_load, time_recompute
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.registry import decode
from cachegen.errors import ConfigError
from cachegen.hf.load import load_model
from cachegen.profile import Profile
from cachegen.store.base import Store
from cachegen.store.open import open_store
from cachegen.stream.fetch import Fetcher
from cachegen.types import ChunkKey, KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
ROUNDS = 7
# Sending plain int8 takes so many times the prefill and the decoding.
NETWORK_FACTOR = 5.0
WIDE_OPEN = 125e6  # bytes/s, while nothing is timed
LEVELS = (1, 2, 3)
QUALITY = "balanced"
QUALITIES = ("lossless-in-practice", QUALITY)
PLAIN = "int8 plain"
COLUMNS = (
    ("mode", ""),
    ("bytes", ",d"),
    ("billed_bits_per_value", ".2f"),
    ("network_s", ".3f"),
    ("decode_s", ".3f"),
    ("ttft_s", ".3f"),
    ("kl_nats", ".2e"),
    ("retrieval_accuracy", ".3f"),
)
HEADINGS = ("mode", "bytes", "bits/value", "network s", "decode s", "TTFT s", "KL", "retrieval")


@dataclass(frozen=True)
class Mode:
    """One way to store the prompt's KV. quality: of ``progressive``, what is read."""

    name: str
    codec: Codec
    quality: str = ""


def modes_of(profile: Profile | None) -> list[Mode]:
    modes = [
        Mode("raw", RawCodec()),
        Mode(PLAIN, Int8Codec(entropy=False)),
        Mode("int8", Int8Codec()),
        Mode("cachegen", CacheGenCodec()),
        Mode(f"progressive {QUALITY}", ProgressiveCodec(), QUALITY),
    ]
    if profile is not None:
        codec = ProgressiveCodec(profile=profile)
        for quality in QUALITIES:
            modes.append(Mode(f"progressive+profile {quality}", codec, quality))
    return modes


def stored_keys(mode: Mode, number: int, chunks: int) -> list[ChunkKey]:
    return [
        ChunkKey(bytes([number]) * 32, bytes([index]) * 32, b"c" * 32) for index in range(chunks)
    ]


def median_of(runs: Sequence[Timing]) -> Timing:
    return Timing(
        *(statistics.median([getattr(run, field.name) for run in runs]) for field in fields(Timing))
    )


def decode_seconds(objects: Sequence[bytes], mode: Mode) -> float:
    """Time decoding alone, best of five: a busy machine is not to make the link look fast."""
    profile = getattr(mode.codec, "profile", None)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for data in objects:
            decode(at_quality(data, mode.quality), allow_partial=True, profile=profile)
        best = min(best, time.perf_counter() - begin)
    return best


def measure(link: ShapedLink, store: Store, rounds: int) -> dict[str, Any]:
    """Run everything on the near side."""
    profile = find_profile(MODEL)
    model, tokenizer = load_model(str(MODEL))
    torch.set_num_threads(1)
    work = load_workload(model, tokenizer, MODEL)
    kv = work.kv[work.prompt_ids].astype(KVDtype.BFLOAT16)
    chunks = kv.split(DEFAULT_CHUNK_TOKENS)
    modes = modes_of(profile)
    objects, loadings = {}, {}
    for number, mode in enumerate(modes):
        keys = stored_keys(mode, number, len(chunks))
        objects[mode.name] = encode_all(mode.codec, chunks, keys)
        loadings[mode.name] = Loading(keys, quality=mode.quality or None)
        for key, data in zip(keys, objects[mode.name], strict=True):
            store.put(key.name, data)
    prefills = [
        time_recompute(model, work.prompt_ids, output_tokens=1).ttft_s for _ in range(rounds + 1)
    ]
    decodings = {mode.name: decode_seconds(objects[mode.name], mode) for mode in modes}
    compute_s = statistics.median(prefills[1:]) + max(decodings.values())
    plain_bytes = sum(len(data) for data in objects[PLAIN])
    link.shape(plain_bytes / (NETWORK_FACTOR * compute_s))
    runs: dict[str, list[Timing]] = {"recompute": [], **{mode.name: [] for mode in modes}}
    profiles = {profile.digest: profile} if profile else {}
    with Fetcher(store, find_profile=profiles.__getitem__) as fetcher:
        for turn in range(rounds + 1):
            again = {"recompute": time_recompute(model, work.prompt_ids, output_tokens=1)}
            for mode in modes:
                again[mode.name], _ = time_load(
                    model, work.prompt_ids, fetcher, loadings[mode.name], output_tokens=1
                )
            for name, timing in again.items():
                if turn:  # the first round warms up
                    runs[name].append(timing)
    link.shape(WIDE_OPEN)
    rows = [row("recompute", None, [], runs["recompute"], work, model, kv)]
    for mode in modes:
        rows.append(row(mode.name, mode, objects[mode.name], runs[mode.name], work, model, kv))
    plain = next(row for row in rows if row["mode"] == PLAIN)
    recompute = rows[0]["ttft_s"]
    return {
        "prompt_tokens": len(work.prompt_ids),
        "prefix_tokens": kv.tokens // DEFAULT_CHUNK_TOKENS * DEFAULT_CHUNK_TOKENS,
        "rounds": rounds,
        "bandwidth_bytes_per_s": plain_bytes / (NETWORK_FACTOR * compute_s),
        "prefill_s": recompute,
        "decode_s": max(decodings.values()),
        "plain_int8_network_over_prefill_and_decode": plain["network_s"]
        / (recompute + max(decodings.values())),
        "rows": rows,
        "ratios": ratios(runs),
        "storage": storage(work, model, kv, profile),
    }


def row(
    name: str,
    mode: Mode | None,
    objects: Sequence[bytes],
    runs: Sequence[Timing],
    work: Workload,
    model: Any,
    kv: KVChunk,
) -> dict[str, Any]:
    timing = median_of(runs)
    size = sum(len(at_quality(data, mode.quality)) for data in objects) if mode else None
    codec, quality = (mode.codec, mode.quality) if mode else (None, "")
    measured = measure_quality(
        model, work, lambda captured: round_trip(codec, captured, quality) if codec else captured
    )
    return {
        "mode": name,
        "bytes": size,
        "billed_bits_per_value": 8 * size / kv.value_count if size else None,
        "network_s": timing.network_s if mode else None,
        "decode_s": timing.decode_s if mode else None,
        "loaded_s": timing.loaded_s if mode else None,
        "ttft_s": timing.ttft_s,
        "ttft_s_all": [run.ttft_s for run in runs],
        **measured,
    }


def ratios(runs: dict[str, list[Timing]]) -> dict[str, dict[str, float]]:
    """Return for each progressive mode its TTFT over the others', pair by pair of one round."""
    result: dict[str, dict[str, float]] = {}
    for name in [name for name in runs if name.startswith("progressive")]:
        result[name] = {
            other: statistics.median(
                mine.ttft_s / theirs.ttft_s
                for mine, theirs in zip(runs[name], runs[other], strict=True)
            )
            for other in ("recompute", "raw", PLAIN, "int8", "cachegen")
        }
    return result


def storage(work: Workload, model: Any, kv: KVChunk, profile: Profile | None) -> dict[str, Any]:
    """Compare one object with the levels of CacheGen that cover the same range of quality."""
    chunks = kv.split(DEFAULT_CHUNK_TOKENS)

    def entry(name: str, codec: Codec) -> dict[str, Any]:
        size = sum(len(codec.encode(chunk)) for chunk in chunks)
        quality = measure_quality(model, work, lambda captured: round_trip(codec, captured))
        return {"codec": name, "bytes": size, "kl_nats": quality["kl_nats"]}

    levels = [entry(f"cachegen level {level}", CacheGenCodec(level=level)) for level in LEVELS]
    ours = [entry("progressive", ProgressiveCodec())]
    if profile is not None:
        ours.append(entry("progressive+profile", ProgressiveCodec(profile=profile)))
    total = sum(level["bytes"] for level in levels)
    best = min(level["kl_nats"] for level in levels)
    return {
        "cachegen_levels": levels,
        "cachegen_bytes": total,
        "objects": [
            {**one, "over_cachegen": one["bytes"] / total, "covers": one["kl_nats"] <= best}
            for one in ours
        ],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw TTFT by stage, and the storage."""
    figure, (left, right) = load_pyplot().subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    rows = result["rows"]
    names = [row["mode"].replace("progressive", "progr.") for row in rows]
    loaded = [row["loaded_s"] or 0.0 for row in rows]
    rest = [row["ttft_s"] - begin for row, begin in zip(rows, loaded, strict=True)]
    left.barh(names, loaded, label="network, decoding with it", color="#4477aa")
    left.barh(names, rest, left=loaded, label="inject and prefill", color="#ccbb44")
    for place, row in enumerate(rows):
        left.annotate(f" {row['ttft_s']:.2f} s, KL {row['kl_nats']:.0e}", (row["ttft_s"], place))
    left.invert_yaxis()
    left.margins(x=0.3)
    left.set_xlabel("time to first token, s")
    rate = result["bandwidth_bytes_per_s"] * 8e-6
    left.set_title(f"{result['prompt_tokens']} tokens from Redis over {rate:.1f} Mbit/s")
    left.legend(loc="lower right")
    kept = result["storage"]
    begin = 0
    for level in kept["cachegen_levels"]:
        right.bar("cachegen\n3 levels", level["bytes"] / 1e3, bottom=begin / 1e3, edgecolor="white")
        begin += level["bytes"]
    for one in kept["objects"]:
        label = one["codec"].replace("+", "\n+") + "\none object"
        right.bar(label, one["bytes"] / 1e3, color="#228833")
    right.set_ylabel("stored, kB")
    right.set_title("storage for the same range of quality")
    save_figure(figure, path)


def print_rows(result: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    rate = result["bandwidth_bytes_per_s"] * 8e-6
    table = Table(title=f"{result['prompt_tokens']} tokens over {rate:.1f} Mbit/s")
    for (_, spec), heading in zip(COLUMNS, HEADINGS, strict=True):
        table.add_column(heading, justify="right" if spec else "left", no_wrap=True)
    for entry in result["rows"]:
        table.add_row(*(format_cell(entry[key], spec) for key, spec in COLUMNS))
    console.print(table)
    factor = result["plain_int8_network_over_prefill_and_decode"]
    console.print(f"plain int8 takes {factor:.1f} times prefill and decoding on the link")
    for name, others in result["ratios"].items():
        console.print(f"{name}: TTFT over " + ", ".join(f"{k} {v:.2f}" for k, v in others.items()))
    for one in result["storage"]["objects"]:
        console.print(f"{one['codec']}: {one['over_cachegen']:.2f} of the bytes of three levels")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--inside", nargs=2, metavar=("LINK", "URL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        name, url = arguments.inside
        result = measure(ShapedLink.existing(name), open_store(url), arguments.rounds)
        arguments.json.write_text(json.dumps(result))
        return
    reason = missing()
    if reason is not None:
        raise ConfigError("shaped link", got=reason, expected="root, iproute2 and namespaces")
    with shaped_link(WIDE_OPEN) as link, tempfile.TemporaryDirectory() as folder:
        url, path = start_redis(link), Path(folder) / "result.json"
        inside = ["ip", "netns", "exec", link.near, sys.executable, __file__, "--inside"]
        options = ["--json", str(path), "--rounds", str(arguments.rounds)]
        subprocess.run([*inside, link.name, url, *options], check=True)
        result = {**json.loads(path.read_text()), **environment()}
    print_rows(result, Console(width=140))
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
