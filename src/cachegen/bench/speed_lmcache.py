"""LMCache's own CacheGen codec on the CPU, in a process of its own, for comparison.

Where ``lmcache`` cannot be installed beside this package, its own environment does:

    python -m venv /path/to/venv
    /path/to/venv/bin/pip install --no-deps lmcache
    /path/to/venv/bin/pip install numpy torch transformers numba nvtx cachetools py-cpuinfo \\
        psutil aiohttp aiofile msgspec pyzmq pyyaml
    cachegen bench speed --lmcache-python /path/to/venv/bin/python
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from cachegen.bench import lmcache_process
from cachegen.chunk import KVChunk
from cachegen.errors import ConfigError

CODEC = "lmcache-cachegen"
ISA = "lmcache's own"
# LMCache knows the layers of this model by its name; the others are read from a config.json.
NAMES = {"llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct"}


def lmcache_python(path: Path | None) -> tuple[Path | None, str]:
    """Return an interpreter that can import LMCache, or None, and a sentence about it.

    path: one to use instead of this one. Raises: ConfigError if that one cannot.
    """
    if path is None:
        if importlib.util.find_spec("lmcache") is None:
            return None, "not importable here: install it, or pass --lmcache-python"
        path = Path(sys.executable)
    probe = [str(path), "-c", "import lmcache.v1.storage_backend.naive_serde"]
    done = subprocess.run(probe, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise ConfigError(
            "lmcache in another interpreter",
            got=done.stderr.strip().rpartition("\n")[2] or done.returncode,
            expected=f"{path.name} can import lmcache.v1.storage_backend.naive_serde",
            remedy="install what is missing there (see cachegen.bench.speed_lmcache)",
        )
    return path, "measured in a process of its own"


def _environment() -> dict[str, str]:
    """One thread, no telemetry, no network."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "ERROR",
    }


class LMCachePeer:
    """Encodes and decodes one chunk in a process pinned to one core; a context manager.

    python: an interpreter with LMCache. name: of the geometry. Raises: ConfigError.
    """

    def __init__(self, python: Path, chunk: KVChunk, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        kv = chunk.to_array()
        layers, _, tokens, heads, dim = kv.shape
        # LMCache's order: K and V, layers, tokens, channels.
        kv.view(np.uint16).transpose(1, 0, 2, 3, 4).tofile(folder / "kv.bin")
        config = {"model_type": "llama", "num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
        shape = [layers, tokens, heads, dim]
        words = [str(folder), NAMES.get(name, str(folder)), json.dumps(shape)]
        self._process = subprocess.Popen(
            [str(python), lmcache_process.__file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            text=True,
        )
        self.versions: dict[str, str] = self._ask("versions")

    def _ask(self, word: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(
                f"LMCache's process, asked for {word}",
                got=f"exit status {self._process.wait()}",
                expected="an answer",
                remedy="see what it wrote above",
            )
        return json.loads(line)

    def encode(self) -> tuple[float, int]:
        """Encode the chunk. Returns: seconds of processor time, bytes."""
        answer = self._ask("encode")
        return float(answer["seconds"]), int(answer["bytes"])

    def decode(self) -> tuple[float, float]:
        """Decode it. Returns: seconds of processor time, the largest error over the largest value.

        It says that what was timed is the whole codec.
        """
        answer = self._ask("decode")
        return float(answer["seconds"]), float(answer["error"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()


def measured(
    ask: Callable[[], tuple[float, float]], rounds: int, own: dict[str, Callable[[], float]]
) -> tuple[float, float, dict[str, float]]:
    """Time LMCache and codecs of ours in turn.

    ask: seconds and another figure. own: calls that return their seconds.
    Returns: the median seconds of LMCache, the figure, the median ratio to each of ours.
    """
    theirs: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in own}
    figure = 0.0
    for _ in range(rounds):
        seconds, figure = ask()
        theirs.append(seconds)
        for name, call in own.items():
            ratios[name].append(seconds / call())
    medians = {name: float(np.median(values)) for name, values in ratios.items()}
    return float(np.median(theirs)), figure, medians
