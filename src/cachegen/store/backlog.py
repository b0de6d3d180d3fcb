"""Work that a store does later, in a thread of its own, within a bound on the memory it holds."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cachegen.errors import ConfigError, StoreError
from cachegen.store.clock import check_deadline, remaining_s

_EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Item:
    data: bytes | None
    size_bytes: int
    work: Callable[[], None]


class Backlog:
    """Runs work by name, one at a time, in order; new work replaces waiting work of its name.

    limit_bytes: of the data that waits. A thread starts with the first work and ends with close.
    A process that forks begins with an empty one: the parent does the parent's work.
    Raises: ConfigError unless limit_bytes is positive.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ConfigError("backlog in bytes", got=limit_bytes, expected="at least 1")
        self.limit_bytes = limit_bytes
        self._counts: Counter[str] = Counter()
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._held_bytes = 0
        self._running: _Item | None = None
        self._running_name: str | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def offer(
        self, name: str, data: bytes | None, size_bytes: int, work: Callable[[], None]
    ) -> bool:
        """Take on work for name. data: what ``waiting`` shows of it meanwhile.

        Returns: False if there is no room, or it is closed; then nothing was taken.
        """
        with self._changed:
            self._adopt()
            old = self._items.get(name)
            freed_bytes = 0 if old is None else old.size_bytes
            held_bytes = self._held_bytes - freed_bytes + size_bytes
            if self._closed or held_bytes > self.limit_bytes:
                self._counts["dropped" if data is None else "full"] += 1
                return False
            self._items.pop(name, None)
            self._items[name] = _Item(data, size_bytes, work)
            self._held_bytes = held_bytes
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="cachegen-backlog", daemon=True
                )
                self._thread.start()
                # A daemon, so that a store that hangs cannot keep a process from ending; but what
                # can be written before it ends is.
                atexit.register(self.flush, _EXIT_TIMEOUT_S)
            self._changed.notify_all()
            return True

    def waiting(self, name: str) -> bytes | None:
        """Return the data of work for name that is not done, if there is any."""
        with self._changed:
            self._adopt()
            item = self._items.get(name) or (self._running if name == self._running_name else None)
            return None if item is None else item.data

    def names(self) -> list[str]:
        """Return the names with data that waits."""
        with self._changed:
            self._adopt()
            return [name for name, item in self._items.items() if item.data is not None]

    def drop(self, name: str) -> None:
        """Forget work for name; waits until work on it that is under way is over.

        Raises: StoreTimeoutError at the deadline.
        """
        with self._changed:
            self._adopt()
            item = self._items.pop(name, None)
            if item is not None:
                self._held_bytes -= item.size_bytes
            while self._running_name == name:
                check_deadline(f"work on {name} that is under way")
                self._changed.wait(remaining_s())

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left. Returns: False if that took longer than timeout_s."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._adopt()
            while self._items or self._running_name is not None:
                left_s = None if give_up is None else give_up - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                self._changed.wait(left_s)
            return True

    def close(self, timeout_s: float | None = None) -> bool:
        """Do what is left, then end. Returns: False if work was left at the timeout."""
        done = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._counts["abandoned"] += len(self._items)
            self._items.clear()
            self._held_bytes = 0
            self._changed.notify_all()
        atexit.unregister(self.flush)
        return done

    def stats(self) -> dict[str, int]:
        """Return work done, failed by reason, and turned away."""
        with self._changed:
            return dict(self._counts) | {"waiting": len(self._items)}

    def _adopt(self) -> None:
        """In a forked child: begin anew, since the thread stayed in the parent."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._items.clear()
            self._held_bytes = 0
            self._running = None
            self._running_name = None
            self._thread = None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait()
                if not self._items:
                    return
                self._running_name, self._running = self._items.popitem(last=False)
                item = self._running
            reason = None
            try:
                item.work()
            except StoreError as error:
                reason = error.reason
            except Exception as error:  # whatever it is, the next work must get its turn
                reason = type(error).__name__
            with self._changed:
                self._held_bytes -= item.size_bytes
                self._running = None
                self._running_name = None
                self._counts["done" if reason is None else "failed"] += 1
                if reason is not None:
                    self._counts[f"failed.{reason}"] += 1
                self._changed.notify_all()
