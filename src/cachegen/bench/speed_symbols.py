"""The entropy decoder alone, and a prototype of it to compare with."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cachegen import native
from cachegen.bench.speed_rows import Row, row_of
from cachegen.bench.speed_timing import Call, clock_of, in_turn
from cachegen.codec.entropy import TOTAL
from cachegen.errors import ConfigError

TOKENS, CHANNELS = 1024, 1024
MODELS = 32
PROTOTYPE_ROUNDS = 5
# Decoding once takes 0.2 ms, about as long as two threads need to find each other.
IN_A_ROW = 16
_RATE = re.compile(r"^\s*(avx512 alias|avx2 pshufb-alias) x\d\s+ok\s+([\d.]+) Gsym/s", re.M)


class SymbolStream:
    """A segment of 1,024 x 1,024 symbols: 32 models, about 2.5 bits each."""

    def __init__(self, alphabet: int) -> None:
        rng = np.random.default_rng(0)
        spreads = np.geomspace(0.6, 3.0, MODELS)
        places = np.arange(alphabet) - (alphabet - 1) / 2
        density = np.exp(-0.5 * np.square(places / spreads[:, None])) + 1e-6
        freqs = np.maximum(np.floor(density / density.sum(axis=1, keepdims=True) * TOTAL), 1)
        freqs[np.arange(MODELS), freqs.argmax(axis=1)] += TOTAL - freqs.sum(axis=1)
        self._tables = native.Tables(freqs.astype(np.uint16))
        self._models = rng.integers(0, MODELS, CHANNELS).astype(np.uint16)
        edges = np.cumsum(freqs, axis=1)[self._models]
        draws = rng.integers(0, TOTAL, (TOKENS, CHANNELS, 1))
        symbols = (draws >= edges[None]).sum(axis=2).astype(np.uint8)
        self.size = symbols.size
        self.body = native.encode_segment(symbols, self._models, self._tables, stream_steps=1024)

    def decode(self) -> None:
        """Decode it all and keep nothing."""
        native.verify_segment(self.body, TOKENS, CHANNELS, self._models, self._tables)

    def shared(self, threads: int, pool: ThreadPoolExecutor) -> Call:
        """Return a call that decodes it ``IN_A_ROW`` times in each thread."""

        def decode_often() -> None:
            for _ in range(IN_A_ROW):
                self.decode()

        def decode_all() -> None:
            waiting = [pool.submit(decode_often) for _ in range(threads - 1)]
            decode_often()
            for done in waiting:
                done.result()

        return decode_all


def symbol_rows(isa: str, seconds: float, threads: Sequence[int]) -> list[Row]:
    """Measure the entropy decoder alone with alphabets of 16 and 32 symbols."""
    rows = []
    with ThreadPoolExecutor(max_workers=max(threads)) as pool:
        for alphabet in (16, 32):
            stream = SymbolStream(alphabet)
            for count in threads:
                calls = [stream.shared(count, pool), stream.shared(1, pool)]
                samples = in_turn(calls, clock_of(count), seconds)
                symbols = count * IN_A_ROW * stream.size
                gain = {"speedup": count * samples.ratio(1, 0)} if count > 1 else {}
                rows.append(
                    row_of(
                        "symbols",
                        isa,
                        codec=f"rans-{alphabet}",
                        threads=count,
                        billed_bits_per_value=8 * len(stream.body) / stream.size,
                        gsym_per_s=symbols / samples.median(0) / 1e9,
                        output_bytes_per_s=symbols / samples.median(0),
                        **gain,
                    )
                )
    return rows


def prototype_rounds(source: Path, isas: Sequence[str]) -> dict[str, Any]:
    """Compile a prototype of the symbol kernels and run it in turn with those of this package.

    Returns: for each instruction set that both have the best rates in Gsym/s and the median ratio
    of a round. Raises: ConfigError if there is no compiler or it prints no rate.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise ConfigError("C++ compiler", got=None, expected="c++", remedy="install one")
    stream = SymbolStream(16)
    pairs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "prototype"
        command = [compiler, "-O3", "-march=native", "-w", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        for _ in range(PROTOTYPE_ROUNDS):
            text = subprocess.run(
                [program, "16"], check=True, capture_output=True, text=True
            ).stdout
            best: dict[str, float] = {}
            for name, rate in _RATE.findall(text):
                isa = name.split()[0]
                best[isa] = max(best.get(isa, 0.0), float(rate))
            for isa in best.keys() & set(isas):
                native.select_isa(isa)
                seconds = min(in_turn([stream.decode], clock_of(1), 0.05).seconds[0])
                pairs.setdefault(isa, []).append((stream.size / seconds / 1e9, best[isa]))
    if not pairs:
        raise ConfigError("output of the prototype", got="no rates", expected="lines of rates")
    return {
        isa: {
            "gsym_per_s": max(own for own, _ in rounds),
            "prototype_gsym_per_s": max(other for _, other in rounds),
            "ratio": float(np.median([own / other for own, other in rounds])),
        }
        for isa, rounds in sorted(pairs.items())
    }
