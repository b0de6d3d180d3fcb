"""How many threads a call may use."""

from __future__ import annotations

import os

from cachegen.errors import ConfigError

VARIABLES = ("CACHEGEN_THREADS", "OMP_NUM_THREADS")


def threads() -> int:
    """Return the most threads that a call starts, itself included.

    ``CACHEGEN_THREADS`` if set, else ``OMP_NUM_THREADS``, but no more than the cores this thread
    may run on. Read on every call; threads end with the call that starts them.
    Raises: ConfigError for a value that is no positive number.
    """
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
