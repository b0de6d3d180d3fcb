"""Threads that work while an engine serves requests."""

from __future__ import annotations

import os
import sys
import threading

from cachegen import native

# About a tenth of what an engine's threads get of a core that both want. Not the least there is: an
# engine may wait for Python's lock, which a thread that never runs does not give back.
NICENESS = 10


def step_back() -> None:
    """Make the calling thread leave the cores to others: one thread, at a low priority.

    Only Linux has priorities of threads; elsewhere it is one thread.
    """
    native.use_one_thread()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
