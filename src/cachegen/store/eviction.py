"""The values of a store in a folder: which there are, how large, and which go first."""

from __future__ import annotations

import heapq
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from cachegen.errors import StoreFullError
from cachegen.store.files import modified_ns, size_of
from cachegen.store.ledger import Ledger

# A scan remembers this many of the oldest values: memory stays bounded in a store of millions.
_QUEUE_LENGTH = 4096


class Values:
    """The files under a folder, sorted into folders of their own, oldest use first to go.

    All but ``scan`` needs the lock of the store, which excludes threads as well.
    """

    def __init__(self, objects: str) -> None:
        self._objects = objects
        # (modification time in ns, file) of the oldest values at the last scan, oldest first.
        self._queue: deque[tuple[int, str]] = deque()

    def scan(self) -> Iterator[tuple[int, int, str]]:
        """Walk all values: modification time in ns, size in bytes, file. Raises: OSError."""
        try:
            shards = [entry.path for entry in os.scandir(self._objects)]
        except FileNotFoundError:
            return
        for shard in shards:
            for entry in list(os.scandir(shard)):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield status.st_mtime_ns, status.st_size, entry.path

    def rescan(self, ledger: Ledger, *, keep: str | None = None) -> None:
        """Set the total of the ledger right, and remember the oldest values but for keep."""
        total_bytes = 0
        entries = []
        for used_ns, size_bytes, file in self.scan():
            total_bytes += size_bytes
            if file != keep:
                entries.append((used_ns, file))
        ledger.set(total_bytes)
        self._queue = deque(heapq.nsmallest(_QUEUE_LENGTH, entries))

    def make_room(
        self, ledger: Ledger, growth_bytes: int, quota_bytes: int, *, keep: str | None = None
    ) -> None:
        """Evict the least recently used values, but for keep, until growth_bytes fit.

        The queue gives the exact order although it may be old: what is not in it is newer than
        all that is, and what was used since has another time and is skipped.
        Raises: StoreFullError, OSError.
        """
        is_fresh = False
        while ledger.total_bytes + growth_bytes > quota_bytes:
            if not self._queue:
                self.rescan(ledger, keep=keep)
                is_fresh = True
                if self._queue:
                    continue  # the scan may have found the total lower than it was recorded
                if ledger.total_bytes + growth_bytes > quota_bytes:
                    raise StoreFullError(
                        "room in the store in bytes",
                        got=f"{ledger.total_bytes} used with nothing left to evict",
                        expected=f"{growth_bytes} more within the quota of {quota_bytes}",
                    )
                return
            used_ns, file = self._queue.popleft()
            # Just scanned, it goes even if read since: readers must not stop an eviction.
            if file != keep and (is_fresh or modified_ns(file) == used_ns):
                remove(ledger, file)

    def forget(self) -> None:
        """Make the next ``make_room`` scan."""
        self._queue.clear()


def remove(ledger: Ledger, file: str) -> None:
    """Remove a value, if it is there, and take its size off the total. Raises: OSError."""
    size_bytes = size_of(file)
    with suppress(FileNotFoundError):
        os.unlink(file)
        ledger.add(-(size_bytes or 0))
