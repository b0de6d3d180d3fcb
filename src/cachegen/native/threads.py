"""How many threads a call may use."""

from __future__ import annotations

import os
import threading

from cachegen.errors import ConfigError

VARIABLES = ("CACHEGEN_THREADS", "OMP_NUM_THREADS")

_own = threading.local()


def use_one_thread() -> None:
    """Let calls of the calling thread start no threads from now on."""
    _own.is_alone = True


def threads() -> int:
    """Return the most threads that a call starts, itself included.

    ``CACHEGEN_THREADS`` if set, else ``OMP_NUM_THREADS``, but no more than the cores this thread
    may run on; 1 after ``use_one_thread``. Read on every call; threads end with the call that
    starts them.
    Raises: ConfigError for a value that is no positive number.
    """
    if getattr(_own, "is_alone", False):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name in VARIABLES:
        # OpenMP allows a list, one number for each level of nesting.
        text = os.environ.get(name, "").partition(",")[0].strip()
        if not text:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(
                name, got=text, expected="a positive number", remedy=f"unset or correct {name}"
            )
        return min(int(text), cores or 1)
    return cores or 1
