"""How fast coding is on this machine, against copying the same bytes in the same run.

Every figure is a median of runs that take turns with the copy it is compared with. One thread is
timed by its own processor time, so that other processes of a shared machine do not count; several
threads by the wall clock.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cachegen import native
from cachegen.bench.report import environment
from cachegen.bench.speed_data import GEOMETRIES, SpeedGeometry, geometry_of, synthetic_chunk
from cachegen.bench.speed_peers import lmcache_note, prototype_rates, zstd_rows
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import SIDE, read_header
from cachegen.codec.entropy import TOTAL
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.levels import prefix_bytes
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode

# Destinations in turn, so that none is still in a cache: together this many bytes at least.
DESTINATION_BYTES = 256 << 20
# With this finest step the whole object of two passes is what "balanced" reads.
TWO_PASS_STEP = 0.6
SYMBOL_CHANNELS = 1024


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured. seconds: of each figure, at least. prototype: a C++ source to compare."""

    geometries: tuple[str, ...] = tuple(GEOMETRIES)
    isas: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.0
    prototype: Path | None = None


def run_speed(
    settings: SpeedSettings, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure everything. Returns: a result with ``rows``, environment, and comparisons."""
    isas = settings.isas or tuple(native.available_isas())
    before = native.isa()
    rows: list[dict[str, Any]] = []
    # A result says what was run, not where its files lay.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    result: dict[str, Any] = {**environment(["cachegen", *words]), "rows": rows}
    try:
        for isa in isas:
            native.select_isa(isa)
            progress(f"symbols, {isa}")
            rows += symbol_rows(isa, settings)
        if settings.prototype is not None:
            progress("prototype")
            result["prototype_gsym_per_s"] = prototype_rates(settings.prototype)
        for name in settings.geometries:
            for isa in isas:
                native.select_isa(isa)
                rows += geometry_rows(geometry_of(name), isa, settings, progress)
            native.select_isa(isas[-1])
            progress(f"{name}: zstd")
            rows += zstd_rows(_chunk(geometry_of(name)), name, settings.seconds)
    finally:
        native.select_isa(before)
    result["lmcache"] = lmcache_note()
    return result


def _row(kernel: str, isa: str, **values: Any) -> dict[str, Any]:
    row = {
        "kernel": kernel,
        "isa": isa,
        "codec": None,
        "quality": None,
        "geometry": None,
        "passes": None,
        "threads": 1,
        "billed_bits_per_value": None,
        "gsym_per_s": None,
        "output_bytes_per_s": None,
        "ratio_to_memcpy": None,
    }
    return row | values


def clock_of(threads: int) -> Callable[[], float]:
    """Return the clock that times so many threads."""
    return time.thread_time if threads == 1 else time.perf_counter


def in_turn(
    first: Callable[[], object],
    second: Callable[[], object],
    clock: Callable[[], float],
    least: float,
) -> tuple[float, float]:
    """Return the median seconds of two calls that take turns, for some seconds of the first."""
    times: tuple[list[float], list[float]] = ([], [])
    while sum(times[0]) < least or len(times[0]) < 5:
        for call, seconds in zip((first, second), times, strict=True):
            begin = clock()
            call()
            seconds.append(clock() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def symbol_rows(isa: str, settings: SpeedSettings) -> list[dict[str, Any]]:
    """Measure the entropy decoder alone: 16 and 32 symbols, 32 models, about 2.5 bits each."""
    rows = []
    rng = np.random.default_rng(0)
    for alphabet in (16, 32):
        spreads = np.geomspace(0.6, 3.0, 32)
        places = np.arange(alphabet) - (alphabet - 1) / 2
        density = np.exp(-0.5 * np.square(places / spreads[:, None])) + 1e-6
        freqs = np.maximum(np.floor(density / density.sum(axis=1, keepdims=True) * TOTAL), 1)
        freqs[np.arange(32), freqs.argmax(axis=1)] += TOTAL - freqs.sum(axis=1)
        tables = native.Tables(freqs.astype(np.uint16))
        models = rng.integers(0, 32, SYMBOL_CHANNELS).astype(np.uint16)
        edges = np.cumsum(freqs, axis=1)[models]
        draws = rng.integers(0, TOTAL, (1024, SYMBOL_CHANNELS, 1))
        symbols = (draws >= edges[None]).sum(axis=2).astype(np.uint8)
        body = native.encode_segment(symbols, models, tables, stream_steps=1024)
        seconds, _ = in_turn(
            functools.partial(
                native.verify_segment, body, symbols.shape[0], symbols.shape[1], models, tables
            ),
            lambda: None,
            clock_of(1),
            settings.seconds / (10 if isa == "scalar" else 1),
        )
        rows.append(
            _row(
                "symbols",
                isa,
                codec=f"rans-{alphabet}",
                billed_bits_per_value=8 * len(body) / symbols.size,
                gsym_per_s=symbols.size / seconds / 1e9,
                output_bytes_per_s=symbols.size / seconds,
            )
        )
    return rows


_CHUNKS: dict[str, KVChunk] = {}


def _chunk(geometry: SpeedGeometry) -> KVChunk:
    if geometry.name not in _CHUNKS:
        _CHUNKS.clear()
        _CHUNKS[geometry.name] = synthetic_chunk(geometry)
    return _CHUNKS[geometry.name]


def codecs() -> list[tuple[str, Codec, str | None]]:
    """Return name, codec and quality of what is measured whole."""
    return [
        ("progressive-2", ProgressiveCodec(passes=2, step=TWO_PASS_STEP), "balanced"),
        ("progressive", ProgressiveCodec(), "balanced"),
        ("progressive", ProgressiveCodec(), None),
        ("int8", Int8Codec(), None),
        ("cachegen", CacheGenCodec(), None),
    ]


def geometry_rows(
    geometry: SpeedGeometry, isa: str, settings: SpeedSettings, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure whole decoding and encoding of one geometry, bytes to bfloat16 KV and back."""
    chunk = _chunk(geometry)
    least = settings.seconds / (4 if isa == "scalar" else 1)
    copies = max(2, -(-DESTINATION_BYTES // chunk.size_bytes))
    outs = [np.ones_like(chunk.to_array()) for _ in range(copies)]
    targets = [KVChunk.from_array(out) for out in outs]
    source = np.ones_like(outs[0])
    rows = []
    encoded: dict[tuple[str, int], bytes] = {}
    for name, codec, quality in codecs():
        progress(f"{geometry.name}: {name}, {isa}")
        known = (name, 1)
        if known not in encoded:
            begin = time.thread_time()
            encoded[known] = codec.encode(chunk)
            encode_s = time.thread_time() - begin
            _, copy_s = in_turn(
                lambda: None, _cycle(outs, lambda out: np.copyto(out, source)), clock_of(1), 0.0
            )
            rows.append(_measured("encode", isa, geometry, name, None, 1, encoded[known], chunk,
                                  encode_s, copy_s))  # fmt: skip
        data = encoded[known]
        if quality is not None:
            data = data[: prefix_bytes(read_header(data), quality)]
        for count in settings.threads:
            with limited(count):
                seconds, copy_s = in_turn(
                    _cycle(
                        targets,
                        functools.partial(_decode_to, data),
                    ),
                    _cycle(outs, lambda out: np.copyto(out, source)),
                    clock_of(count),
                    least,
                )
            rows.append(_measured("decode", isa, geometry, name, quality, count, data, chunk,
                                  seconds, copy_s))  # fmt: skip
    return rows


def _decode_to(data: bytes, out: KVChunk) -> None:
    decode(data, allow_partial=True, out=out)


def _measured(
    kernel: str,
    isa: str,
    geometry: SpeedGeometry,
    codec: str,
    quality: str | None,
    threads: int,
    data: bytes,
    chunk: KVChunk,
    seconds: float,
    copy_s: float,
) -> dict[str, Any]:
    header = read_header(data)
    present = [s for s in header.segments if s.kind != SIDE and s.offset + s.length <= len(data)]
    symbols = sum(_symbols_of(header, segment.group) for segment in present)
    return _row(
        kernel,
        isa,
        codec=codec,
        quality=quality,
        geometry=geometry.name,
        passes=round(len(present) / len(header.groups), 2),
        threads=threads,
        billed_bits_per_value=8 * len(data) / chunk.value_count,
        gsym_per_s=symbols / seconds / 1e9,
        output_bytes_per_s=chunk.size_bytes / seconds,
        ratio_to_memcpy=copy_s / seconds,
    )


def _symbols_of(header: Any, group: int) -> int:
    entry = header.groups[group]
    begin, end = header.ranges[entry.layer]
    planes = entry.layers * (entry.planes.bit_count())
    return int((end - begin) * planes * header.geometry.kv_heads * header.geometry.key_dim)


def _cycle(items: Sequence[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    state = iter(_forever(items))
    return lambda: call(next(state))


def _forever(items: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from items


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Let coding use so many threads."""
    name = "CACHEGEN_THREADS"
    before = os.environ.get(name)
    os.environ[name] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


__all__ = ["SpeedSettings", "run_speed"]
