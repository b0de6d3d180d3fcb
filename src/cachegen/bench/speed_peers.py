"""What speed is compared with: zstd and LMCache's CPU path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cachegen import native
from cachegen.bench.speed_lmcache import CODEC, ISA, LMCachePeer, measured
from cachegen.bench.speed_rows import Row, row_of
from cachegen.bench.speed_timing import clock_of, in_turn
from cachegen.chunk import KVChunk
from cachegen.codec.base import planes_of
from cachegen.codec.int8 import LEVELS

ZSTD = "int8+zstd-{level}"


def zstd_rows(chunk: KVChunk, geometry: str, seconds: float) -> list[Row]:
    """Measure zstd levels 1 and 3 on the int8 symbols of the chunk; none if it is not installed.

    Output bytes are these symbols: one for each value.
    """
    try:
        import zstandard
    except ImportError:
        return []
    symbols = b"".join(
        native.quantize(plane, LEVELS, per_head=True)[0].tobytes() for plane in planes_of(chunk)
    )
    rows = []
    for level in (1, 3):
        compressor = zstandard.ZstdCompressor(level=level)
        data = compressor.compress(symbols)
        expand = zstandard.ZstdDecompressor()

        def decompress(body: bytes = data, tool: zstandard.ZstdDecompressor = expand) -> None:
            tool.decompress(body, max_output_size=len(symbols))

        def compress(tool: zstandard.ZstdCompressor = compressor) -> None:
            tool.compress(symbols)

        samples = in_turn([decompress, compress], clock_of(1), seconds)
        for kernel, took in (("decode", samples.median(0)), ("encode", samples.median(1))):
            rows.append(
                row_of(
                    kernel,
                    "zstd's own",
                    codec=ZSTD.format(level=level),
                    geometry=geometry,
                    passes=1,
                    billed_bits_per_value=8 * len(data) / chunk.value_count,
                    gsym_per_s=len(symbols) / took / 1e9,
                    output_bytes_per_s=len(symbols) / took,
                )
            )
    return rows


def lmcache_rows(
    python: Path,
    chunk: KVChunk,
    geometry: str,
    own: Mapping[str, tuple[Callable[[], float], Callable[[], float]]],
    rounds: int,
) -> list[Row]:
    """Measure LMCache's CacheGen codec on the CPU in turn with codecs of ours, one thread each.

    own: by name calls that encode and decode the same chunk and return their seconds.
    Returns: rows whose ``ratio_to_own`` says by name how many times faster ours is.
    """
    rows = []
    with LMCachePeer(python, chunk, geometry) as peer:
        encoders = {name: calls[0] for name, calls in own.items()}
        decoders = {name: calls[1] for name, calls in own.items()}
        encode_s, size, encode_ratios = measured(peer.encode, rounds, encoders)
        decode_s, _, decode_ratios = measured(peer.decode, rounds, decoders)
        for kernel, took, ratios in (
            ("decode", decode_s, decode_ratios),
            ("encode", encode_s, encode_ratios),
        ):
            row = row_of(
                kernel,
                ISA,
                codec=CODEC,
                geometry=geometry,
                passes=1,
                billed_bits_per_value=8 * size / chunk.value_count,
                gsym_per_s=chunk.value_count / took / 1e9,
                output_bytes_per_s=chunk.size_bytes / took,
            )
            rows.append(row | {"ratio_to_own": ratios, "versions": peer.versions})
    return rows
