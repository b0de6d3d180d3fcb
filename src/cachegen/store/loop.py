"""One event loop in a thread, for clients that can only be cancelled when asynchronous.

A synchronous call of obstore cannot be ended from outside; its asynchronous twin can, at once,
and many of them wait in parallel without a thread each (docs/decisions/0020).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cachegen.errors import StoreError
from cachegen.store.clock import remaining_s

_Result = TypeVar("_Result")
_lock = threading.Lock()
_started: tuple[int, asyncio.AbstractEventLoop] | None = None


def run(make: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
    """Run what make returns and wait for it until the deadline, then cancel it.

    Raises: TimeoutError at the deadline; StoreError in a process that was forked after its
        parent had used this; what the coroutine raises.
    """
    left_s = remaining_s()
    if left_s == 0.0:
        raise TimeoutError("the deadline has passed")

    async def bounded() -> _Result:
        # The loop's own timer, too: it ends the transfer even if this thread is held up.
        return await asyncio.wait_for(make(), left_s)

    future = asyncio.run_coroutine_threadsafe(bounded(), _loop())
    try:
        return future.result(left_s)
    except BaseException:
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    global _started
    with _lock:
        if _started is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="cachegen-store", daemon=True)
            thread.start()
            _started = os.getpid(), loop
        elif _started[0] != os.getpid():
            # The threads of the client's runtime stayed in the parent: every call would hang.
            raise StoreError(
                "object store in a forked process",
                got=f"process {os.getpid()}, used before in {_started[0]}",
                expected="a store that is first used after the fork",
                remedy="start processes with 'spawn' or use the store only in the child",
                reason="forked",
            )
        return _started[1]
