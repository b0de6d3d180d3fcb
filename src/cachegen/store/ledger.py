"""The marker file of a local store: what says that a folder is one, its lock and its total.

Contents: a line with the layout version, then the bytes held in objects/ as 20 digits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachegen.errors import ConfigError, StoreTimeoutError
from cachegen.store.clock import remaining_s

MARKER = "cachegen-store"
_HEADER = b"cachegen store 1\n"
_TOTAL_DIGITS = 20
_LOCK_TIMEOUT_S = 30.0
# Not ours, but no reason to refuse a folder: the root of a fresh ext4 disk has it.
_HARMLESS = frozenset({"lost+found"})


class Ledger:
    """The running total of a local store; valid while the lock of its marker is held."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        text = os.pread(fd, len(_HEADER) + _TOTAL_DIGITS, 0)
        digits = text[len(_HEADER) :]
        self.is_sound = (
            text.startswith(_HEADER) and len(digits) == _TOTAL_DIGITS and digits.isdigit()
        )
        self.total_bytes = int(digits) if self.is_sound else 0

    def add(self, size_bytes: int) -> None:
        """Change the total by size_bytes, which may be negative."""
        if size_bytes:
            self.set(self.total_bytes + size_bytes)

    def set(self, total_bytes: int) -> None:
        """Record a total."""
        self.total_bytes = max(0, total_bytes)
        os.pwrite(self._fd, _HEADER + b"%0*d" % (_TOTAL_DIGITS, self.total_bytes), 0)

    def sync(self) -> None:
        """Bring the marker to the disk: without it a store is refused after a power cut."""
        os.fsync(self._fd)


@contextmanager
def lock_ledger(folder: str) -> Iterator[Ledger]:
    """Hold the lock of the store in folder against all other threads and processes.

    Raises: StoreTimeoutError if it stays taken for 30 s or until the deadline, OSError.
    """
    # Opened anew each time: then the lock excludes other threads, and a fork shares none.
    marker = os.path.join(folder, MARKER)
    fd = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_lock(fd, marker)
        try:
            yield Ledger(fd)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def check_layout(folder: str) -> bool:
    """Return True if folder is a store, False if it is empty; refuse everything else.

    Sweeping and evicting in a folder of other things, say a git repository with its own
    objects/, would destroy them.
    Raises: ConfigError, OSError.
    """
    try:
        with open(os.path.join(folder, MARKER), "rb") as file:
            header = file.read(len(_HEADER))
    except FileNotFoundError:
        found = set(os.listdir(folder))
        if MARKER in found:  # another process has created the store meanwhile
            return check_layout(folder)
        others = sorted(found - _HARMLESS)
        if others:
            raise ConfigError(
                "store path",
                got=f"{folder}, which holds {others[0]!r}",
                expected="an empty folder or a store",
                remedy="name a new folder",
            ) from None
        return False
    if header and header != _HEADER:  # empty: another process is just creating it
        raise ConfigError(
            "layout of the store",
            got=f"{header!r} in {folder}/{MARKER}",
            expected=repr(_HEADER),
            remedy="use the version of this library that wrote it, or a new folder",
        )
    return True


def _wait_lock(fd: int, marker: str) -> None:
    allowed_s = remaining_s()
    allowed_s = _LOCK_TIMEOUT_S if allowed_s is None else min(allowed_s, _LOCK_TIMEOUT_S)
    give_up = time.monotonic() + allowed_s
    pause_s = 0.0002
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise StoreTimeoutError(
                    "lock of the store",
                    got=f"{marker} held by another process for {allowed_s:g} s",
                    expected="milliseconds",
                    remedy="look for a stopped process that uses this store",
                ) from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.005)
