"""The kernels on the host, one lane after the other: for tests and dry runs, and very slow.

Compiles ``csrc/cuda/emulation.cpp`` with the machine's C++ compiler at first use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import ConfigError
from cachegen.native.cuda import cache, source
from cachegen.native.cuda.device import THREADS

_FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-DCACHEGEN_EMULATION",
)


def compiler() -> str | None:
    """Return the C++ compiler, or None if there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@functools.cache
def library(*, sanitize: bool = False) -> ctypes.CDLL:
    """Build and load the emulation. sanitize: with AddressSanitizer, which must be preloaded.

    Raises: ConfigError if there is no compiler or it fails.
    """
    found = compiler()
    if found is None:
        raise ConfigError("C++ compiler", got="none", expected="c++ or CXX")
    flags = (*_FLAGS, *(("-fsanitize=address", "-g") if sanitize else ()))
    folder = source.source_folder() / "cuda"
    extra = [
        (folder / name).read_text(encoding="utf-8") for name in ("emulation.cpp", "emulation.h")
    ]

    def make(path: Path) -> None:
        command = [found, *flags, str(folder / "emulation.cpp"), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                "emulation of the kernels", got=done.stderr[-2000:], expected="a build"
            )

    loaded = ctypes.CDLL(str(cache.cached(f"{source.digest(found, *flags, *extra)}.so", make)))
    loaded.cachegen_emulate.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_uint64,
    ]
    return loaded


class EmulatedMemory:
    """Host memory that plays device memory; of any content, like the device's."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        # As exact as alignment allows, so that a sanitizer sees what is beyond.
        self._bytes = np.full(size_bytes + 256, 0xA5, np.uint8)
        begin = -self._bytes.ctypes.data % 256
        self.array = self._bytes[begin : begin + size_bytes]
        self.address = self.array.ctypes.data


class EmulatedDevice:
    """A device whose memory is the host's; streams mean nothing to it."""

    def __init__(self, *, sanitize: bool = False) -> None:
        self.name = "emulation on the host"
        self.max_shared_bytes = 99 << 10
        self.tables: dict[str, Any] = {}
        self.launches: list[str] = []
        self._library = library(sanitize=sanitize)

    def allocate(self, size_bytes: int, stream: Any) -> EmulatedMemory:
        return EmulatedMemory(size_bytes)

    def upload(self, address: int, data: NDArray[np.uint8], stream: Any) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, address: int, size_bytes: int, stream: Any) -> NDArray[np.uint8]:
        out = np.empty(size_bytes, np.uint8)
        ctypes.memmove(out.ctypes.data, address, size_bytes)
        return out

    def zero(self, address: int, size_bytes: int, stream: Any) -> None:
        ctypes.memset(address, 0, size_bytes)

    def launch(self, kernel: str, grid: int, shared_bytes: int, argument: int, stream: Any) -> None:
        self.launches.append(kernel)
        status = self._library.cachegen_emulate(
            kernel.encode(), grid, THREADS, shared_bytes, argument
        )
        assert status == 0, kernel
