"""Rows of the result: every codec decoded and encoded, by geometry and number of chunks."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from gpu_bench.kv import draw_chunk
from gpu_bench.machine import Bench

CHUNKS = (1, 4, 16, 64)


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


class Drawn:
    """Chunks and their objects by geometry, drawn and encoded once. tokens: of a chunk."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._chunks: dict[tuple[int, int, int], Any] = {}
        self._objects: dict[tuple[int, int, int], list[tuple[str, int, bytes, bool]]] = {}

    def chunk(self, geometry: tuple[int, int, int]) -> Any:
        """Return the chunk of a geometry."""
        if geometry not in self._chunks:
            self._chunks[geometry] = draw_chunk(geometry, self.tokens, seed=1)
        return self._chunks[geometry]

    def objects(self, geometry: tuple[int, int, int]) -> list[tuple[str, int, bytes, bool]]:
        """Return what ``objects_of`` makes of its chunk."""
        if geometry not in self._objects:
            self._objects[geometry] = objects_of(self.chunk(geometry))
        return self._objects[geometry]


def time_decode(bench: Bench, geometries: dict[str, Any], drawn: Drawn) -> list[dict[str, Any]]:
    """Time every codec on every geometry and number of chunks, for as long as there is time."""
    from cachegen.codec import gpu

    rows: list[dict[str, Any]] = []
    for name, geometry in geometries.items():
        layers, heads, dim = geometry
        for count in CHUNKS if not bench.dry else (1, 2):
            if bench.out_of_time():
                return rows
            slots = np.random.default_rng(2).permutation(count * drawn.tokens)
            out = bench.empty((layers, 2, -(-count * drawn.tokens // 16), 16, heads, dim))
            copy_s = bench.copy_seconds(out)
            for codec, passes, data, is_prefix in drawn.objects(geometry):
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
                values = 2 * layers * heads * dim * drawn.tokens * count
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


def time_encode(bench: Bench, geometries: dict[str, Any], drawn: Drawn) -> list[dict[str, Any]]:
    """Time the kernels of every encoder, and the way of what they coded to the host.

    ``equal_to_cpu`` says whether the object has the bytes of the CPU's.
    """
    from cachegen.codec import gpu
    from cachegen.codec.cachegen import CacheGenCodec
    from cachegen.codec.int8 import Int8Codec
    from cachegen.codec.progressive import ProgressiveCodec

    codecs = (
        ("progressive", 4, ProgressiveCodec()),
        ("int8", 2, Int8Codec()),
        ("int8 plain", 1, Int8Codec(entropy=False)),
        ("cachegen", 1, CacheGenCodec()),
        ("cachegen parametric", 1, CacheGenCodec(tables="parametric")),
    )
    rows: list[dict[str, Any]] = []
    for name, geometry in geometries.items():
        layers, heads, dim = geometry
        chunk = drawn.chunk(geometry)
        stored = {
            codec: data for codec, _, data, is_prefix in drawn.objects(geometry) if not is_prefix
        }
        whole = chunk.to_array()
        for count in CHUNKS[:3] if not bench.dry else (1, 2):
            if bench.out_of_time():
                return rows
            tokens = count * drawn.tokens
            padded = np.zeros((layers, 2, -(-tokens // 16) * 16, heads, dim), whole.dtype)
            slots = np.random.default_rng(2).permutation(padded.shape[2])[:tokens]
            padded[:, :, slots] = np.concatenate([whole] * count, axis=2)
            cache = bench.put(padded.reshape(layers, 2, -1, 16, heads, dim))
            copy_s = bench.copy_seconds(cache)
            parts = [
                gpu.DeviceChunk(cache, part, chunk.first_position, chunk.rope)
                for part in np.split(slots, count)
            ]
            for codec_name, passes, codec in codecs:
                begin = time.perf_counter()
                job = gpu.prepare_encode(codec, parts, device=bench.device)
                prepare_s = time.perf_counter() - begin
                taken_s = bench.seconds(job.launch)
                begin = time.perf_counter()
                objects = job.finish()
                finish_s = time.perf_counter() - begin
                values = 2 * layers * heads * dim * tokens
                rows.append(
                    {
                        "kernel": "encode",
                        "codec": codec_name,
                        "geometry": name,
                        "chunks": count,
                        "passes": passes,
                        "billed_bits_per_value": 8 * sum(map(len, objects)) / values,
                        "input_gb_per_s": 2 * values / taken_s / 1e9,
                        "ratio_to_copy": copy_s / taken_s,
                        "microseconds": taken_s * 1e6,
                        "prepare_ms": prepare_s * 1e3,
                        "finish_ms": finish_s * 1e3,
                        "workspace_bytes": job.workspace_bytes,
                        "fallbacks": job.fallbacks,
                        "equal_to_cpu": objects[0] == stored[codec_name],
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
                del job
            del cache, parts
    return rows
