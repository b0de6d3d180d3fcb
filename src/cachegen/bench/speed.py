"""How fast coding is on this machine, against copying the same bytes in the same run.

Every figure is a median of runs that take turns with the copy it is compared with; see
``speed_timing`` for the clocks, ``speed_summary`` for the ratios that are wanted.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cachegen import native
from cachegen.bench.report import environment
from cachegen.bench.speed_data import GEOMETRIES, SpeedGeometry, geometry_of, synthetic_chunk
from cachegen.bench.speed_lmcache import lmcache_python
from cachegen.bench.speed_peers import lmcache_rows, zstd_rows
from cachegen.bench.speed_profile import known_case, matrix_product
from cachegen.bench.speed_rows import Row, coding_row
from cachegen.bench.speed_summary import summarise
from cachegen.bench.speed_symbols import prototype_rounds, symbol_rows
from cachegen.bench.speed_timing import (
    Call,
    Copier,
    cache_share,
    clock_of,
    cycle,
    destination_bytes,
    in_turn,
    limited,
)
from cachegen.chunk import KVChunk, aligned_empty
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.levels import prefix_bytes
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.profile import Profile

# An object of two passes, both read.
TWO_PASS_STEP = 1.0


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured.

    seconds: of each figure, at least. prototype: a C++ source of symbol kernels to compare.
    lmcache_python: an interpreter that has LMCache, if this one has not.
    """

    geometries: tuple[str, ...] = tuple(GEOMETRIES)
    isas: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 0.25
    prototype: Path | None = None
    lmcache_python: Path | None = None
    lmcache_rounds: int = 3

    def seconds_of(self, isa: str) -> float:
        """Return how long a figure takes at least: less for plain C++, whose calls are long."""
        return self.seconds / (4 if isa == "scalar" else 1)

    def quick(self) -> SpeedSettings:
        """Return settings for a first look: one geometry, the fastest instruction set."""
        fastest = self.isas or tuple(native.available_isas()[-1:])
        return replace(
            self, geometries=self.geometries[:1], isas=fastest, seconds=0.05, lmcache_rounds=1
        )


def run_speed(
    settings: SpeedSettings, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure everything. Returns: a result with ``rows``, environment, and comparisons."""
    isas = settings.isas or tuple(native.available_isas())
    before = native.isa()
    rows: list[Row] = []
    # A result says what was run, not where its files lay.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    share = cache_share()
    result: dict[str, Any] = {
        **environment(["cachegen", *words]),
        "cache_share_bytes": share,
        "destination_bytes": destination_bytes(),
    }
    python, result["lmcache"] = lmcache_python(settings.lmcache_python)
    try:
        for isa in isas:
            native.select_isa(isa)
            progress(f"symbols, {isa}")
            rows += symbol_rows(isa, settings.seconds_of(isa), settings.threads)
        if settings.prototype is not None:
            progress("prototype")
            result["prototype"] = prototype_rounds(settings.prototype, isas)
        for name in settings.geometries:
            gc.collect()  # the destinations of the geometry before
            bench = _Geometry(geometry_of(name), settings, progress)
            for isa in isas:
                native.select_isa(isa)
                rows += bench.rows(isa)
                if name == settings.geometries[0]:
                    rows += profile_rows(bench.geometry, isa, settings, progress)
            native.select_isa(isas[-1])
            progress(f"{name}: zstd")
            rows += zstd_rows(bench.chunk, name, settings.seconds)
            if python is not None:
                progress(f"{name}: LMCache")
                own = {codec: bench.timed(codec, data) for codec, data in bench.encoded.items()}
                whole = bench.encoded["progressive"]
                part = whole[: prefix_bytes(read_header(whole), "balanced")]
                own["progressive, balanced"] = bench.timed("progressive", part)
                rows += lmcache_rows(python, bench.chunk, name, own, settings.lmcache_rounds)
            bench.close()
    finally:
        native.select_isa(before)
    result["rows"] = rows
    result["comparisons"] = summarise(result)
    return result


@dataclass(frozen=True)
class _Case:
    """A codec and how much of its objects is read."""

    name: str
    codec: Codec
    quality: str | None = None


def codecs() -> list[_Case]:
    """Return what is measured whole."""
    return [
        _Case("progressive", ProgressiveCodec(), "balanced"),
        _Case("progressive", ProgressiveCodec()),
        _Case("progressive-2", ProgressiveCodec(passes=2, step=TWO_PASS_STEP)),
        _Case("int8", Int8Codec()),
        _Case("cachegen", CacheGenCodec()),
    ]


class _Buffers:
    """Destinations and sources of one chunk's shape, touched, enough to leave no cache warm."""

    def __init__(self, chunk: KVChunk) -> None:
        copies = max(4, -(-destination_bytes() // chunk.size_bytes))
        array = chunk.to_array()
        self.outs = [aligned_empty(array.shape, array.dtype) for _ in range(copies)]
        self.refill(chunk)
        self.chunks = [KVChunk.from_array(out, rope=chunk.rope) for out in self.outs]
        self.copier = Copier(self.outs)

    def refill(self, chunk: KVChunk) -> None:
        """Undo what decoding left in them."""
        for out in self.outs:
            np.copyto(out, chunk.to_array())


def _threaded(threads: int, call: Call) -> Call:
    def limited_call() -> None:
        with limited(threads):
            call()

    return limited_call


def measure(
    call: Call, copier: Copier, threads: int, seconds: float
) -> tuple[float, float, dict[str, float]]:
    """Time coding beside copying.

    Returns: seconds; the ratio of copying to it, both with so many threads; with more than one
    thread how much faster than one both are.
    """
    calls = [_threaded(threads, call), copier.call(threads)]
    if threads == 1:
        samples = in_turn(calls, clock_of(1), seconds)
        return samples.median(0), samples.ratio(1, 0), {}
    calls += [_threaded(1, call), copier.call(1)]
    samples = in_turn(calls, clock_of(threads), seconds)
    gains = {"speedup": samples.ratio(2, 0), "memcpy_speedup": samples.ratio(3, 1)}
    return samples.median(0), samples.ratio(1, 0), gains


class _Geometry:
    """Measures whole encoding and decoding of one geometry, bytes to bfloat16 KV and back."""

    def __init__(
        self, geometry: SpeedGeometry, settings: SpeedSettings, progress: Callable[[str], None]
    ) -> None:
        self.geometry = geometry
        self.chunk = synthetic_chunk(geometry)
        self.encoded: dict[str, bytes] = {}
        self._settings = settings
        self._progress = progress
        self._buffers = _Buffers(self.chunk)

    def close(self) -> None:
        """End the threads that copy."""
        self._buffers.copier.close()

    def rows(self, isa: str) -> list[Row]:
        """Measure every codec with one instruction set."""
        rows = []
        done: set[str] = set()
        for case in codecs():
            self._progress(f"{self.geometry.name}: {case.name}, {isa}")
            if case.name not in done:
                done.add(case.name)
                rows += self._encode(case, isa)
            rows += self._decode(case, isa, self.encoded[case.name])
        if self.geometry.rope is not None:
            self._progress(f"{self.geometry.name}: without RoPE, {isa}")
            case = codecs()[0]
            plain = self.chunk.to_array()
            data = case.codec.encode(KVChunk.from_array(plain))
            rows += self._decode(case, isa, data, rope=False)
        return rows

    def timed(self, name: str, data: bytes) -> tuple[Callable[[], float], Callable[[], float]]:
        """Return calls that encode and decode once with one thread and return the seconds."""
        codec = {case.name: case.codec for case in codecs()}[name]
        clock = clock_of(1)

        def encode() -> float:
            with limited(1):
                begin = clock()
                codec.encode(self.chunk)
                return clock() - begin

        targets = cycle(self._buffers.chunks, functools.partial(_decode_to, data))

        def decode_once() -> float:
            with limited(1):
                begin = clock()
                targets()
                return clock() - begin

        return encode, decode_once

    def _encode(self, case: _Case, isa: str) -> list[Row]:
        self._buffers.refill(self.chunk)
        self.encoded[case.name] = data = case.codec.encode(self.chunk)
        call = cycle(self._buffers.chunks, case.codec.encode)
        return [
            coding_row(
                "encode",
                isa,
                data,
                measure(call, self._buffers.copier, threads, self._settings.seconds_of(isa)),
                geometry=self.geometry.name,
                codec=case.name,
                threads=threads,
            )
            for threads in self._settings.threads
        ]

    def _decode(self, case: _Case, isa: str, data: bytes, *, rope: bool = True) -> list[Row]:
        if case.quality is not None:
            data = data[: prefix_bytes(read_header(data), case.quality)]
        call = cycle(self._buffers.chunks, functools.partial(_decode_to, data))
        return [
            coding_row(
                "decode",
                isa,
                data,
                measure(call, self._buffers.copier, threads, self._settings.seconds_of(isa)),
                geometry=self.geometry.name,
                codec=case.name,
                quality=case.quality,
                threads=threads,
                rope=rope if self.geometry.rope is not None else None,
            )
            for threads in self._settings.threads
        ]


def profile_rows(
    geometry: SpeedGeometry, isa: str, settings: SpeedSettings, progress: Callable[[str], None]
) -> list[Row]:
    """Measure decoding with a KLT of each head and a joint one, "balanced", two passes or more.

    ``ratio_to_product``: total time over that of the matrix products alone, in turn.
    """
    rows = []
    for transform in ("head", "joint"):
        progress(f"{geometry.name}: KLT, {transform}, {isa}")
        case = known_case(geometry, transform)
        codec = ProgressiveCodec(profile=case.profile)
        data = codec.encode(case.chunk)
        data = data[: prefix_bytes(read_header(data), "balanced")]
        buffers = _Buffers(case.chunk)
        decode_to = functools.partial(_decode_to, data, profile=case.profile)
        call = cycle(buffers.chunks, decode_to)
        product = _threaded(1, matrix_product(data, case))
        for threads in settings.threads:
            figures = measure(call, buffers.copier, threads, settings.seconds_of(isa))
            row = coding_row(
                "decode",
                isa,
                data,
                figures,
                geometry=f"{geometry.name}, {case.geometry.layers} layers",
                codec="progressive",
                quality="balanced",
                threads=threads,
                transform=transform,
                rope=True if geometry.rope is not None else None,
            )
            if threads == 1:
                pair = in_turn([_threaded(1, call), product], clock_of(1), settings.seconds_of(isa))
                row["ratio_to_product"] = pair.ratio(0, 1)
            rows.append(row)
        buffers.copier.close()
    return rows


def _decode_to(data: bytes, out: KVChunk, profile: Profile | None = None) -> None:
    decode(data, allow_partial=True, out=out, profile=profile)


__all__ = ["SpeedSettings", "run_speed"]
