"""Threads that save leave the cores to the engine."""

from __future__ import annotations

import os
import sys
import threading

from paged_world import World, piece, wait_for

from cachegen import native
from cachegen.connectors.background import NICENESS, step_back


def state() -> tuple[int, int | None]:
    """Return how many threads a call may use here, and the priority of this thread."""
    if sys.platform != "linux":
        return native.threads(), None
    return native.threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_steps_back_alone() -> None:
    before, seen = state(), []

    def work() -> None:
        step_back()
        seen.append(state())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, None if sys.platform != "linux" else NICENESS)]
    assert state() == before


def test_saves_run_in_such_threads(world: World, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(world.coder, "encode", lambda chunk, key: seen.append(state()) or b"x")
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    wait_for(lambda: not world.saver._backlog_bytes)
    assert seen == [(1, None if sys.platform != "linux" else NICENESS)]
