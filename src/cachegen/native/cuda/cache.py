"""Compiled kernels on disk, so that only the first use on a machine compiles."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of compiled kernels: ``CACHEGEN_KERNEL_CACHE`` or in the user's cache."""
    chosen = os.environ.get("CACHEGEN_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "cachegen" / "kernels"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file of this name; if there is none, ``make`` writes it at the path it is given.

    Temp then rename, so that processes that compile at the same time do not meet half a file.
    A folder that cannot be written costs a compilation each time, never the use of the kernels.
    """
    folder = cache_folder()
    target = folder / name
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    except OSError:
        handle, temp = tempfile.mkstemp(prefix=f"cachegen-{name}.")
        target = Path(temp)
    os.close(handle)
    try:
        make(Path(temp))
        os.replace(temp, target)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise
    return target
