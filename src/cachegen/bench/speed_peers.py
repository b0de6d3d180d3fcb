"""What speed is compared with: zstd, LMCache's CPU path, a prototype of the kernels."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.base import planes_of
from cachegen.codec.int8 import LEVELS
from cachegen.errors import ConfigError


def zstd_rows(chunk: KVChunk, geometry: str, seconds: float) -> list[dict[str, Any]]:
    """Measure zstd levels 1 and 3 on the int8 symbols of the chunk; none if it is not installed."""
    try:
        import zstandard
    except ImportError:
        return []
    symbols = b"".join(
        native.quantize(plane, LEVELS, per_head=True)[0].tobytes() for plane in planes_of(chunk)
    )
    rows = []
    for level in (1, 3):
        begin = time.thread_time()
        data = zstandard.ZstdCompressor(level=level).compress(symbols)
        encode_s = time.thread_time() - begin
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            begin = time.thread_time()
            zstandard.ZstdDecompressor().decompress(data, max_output_size=len(symbols))
            times.append(time.thread_time() - begin)
        for kernel, took in (("decode", sorted(times)[len(times) // 2]), ("encode", encode_s)):
            rows.append(
                {
                    "kernel": kernel,
                    "isa": "zstd's own",
                    "codec": f"int8+zstd-{level}",
                    "quality": None,
                    "geometry": geometry,
                    "passes": 1,
                    "threads": 1,
                    "billed_bits_per_value": 8 * len(data) / chunk.value_count,
                    "gsym_per_s": len(symbols) / took / 1e9,
                    "output_bytes_per_s": len(symbols) / took,
                    "ratio_to_memcpy": None,
                }
            )
    return rows


def lmcache_note() -> str:
    """Say whether LMCache can be imported here; its CPU path needs it."""
    if importlib.util.find_spec("lmcache") is None:
        return "not importable: not measured"
    return "importable"


_RATE = re.compile(r"^\s*(avx512 alias|avx2 pshufb-alias) x\d\s+ok\s+([\d.]+) Gsym/s", re.M)


def prototype_rates(source: Path) -> dict[str, float]:
    """Compile a prototype of the symbol kernels and return its best rates by instruction set.

    Raises: ConfigError if there is no compiler or it prints no rate.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError("C++ compiler", got=None, expected="c++", remedy="install one")
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "prototype"
        command = [compiler, "-O3", "-march=native", "-w", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        for _ in range(3):
            text = subprocess.run(
                [program, "16"], check=True, capture_output=True, text=True
            ).stdout
            for name, rate in _RATE.findall(text):
                isa = name.split()[0]
                best[isa] = max(best.get(isa, 0.0), float(rate))
    if not best:
        raise ConfigError("output of the prototype", got="no rates", expected="lines of rates")
    return best
