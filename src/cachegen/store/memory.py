"""A store in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from cachegen.errors import StoreFullError
from cachegen.store.base import (
    BytesLike,
    Entry,
    check_name,
    check_names,
    check_quota,
    check_range,
    view_bytes,
)


class MemoryStore:
    """Keeps values in a dictionary and drops the least recently used beyond a quota.

    quota_bytes: bound on the bytes of all values together; None for no bound.
    Raises: ConfigError unless quota_bytes is positive.
    """

    def __init__(self, quota_bytes: int | None = None) -> None:
        self.quota_bytes = check_quota(quota_bytes)
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[bytes, float]] = (
            OrderedDict()
        )  # the least recently used first
        self._used_bytes = 0

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name. Raises: ConfigError, StoreFullError if beyond the quota."""
        self._put(name, data, replace=True)

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken. Returns: True if it was not. Raises: as put."""
        return self._put(name, data, replace=False)

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts. Returns: the bytes stored. Raises: as put."""
        check_name(name)
        value = b"".join(view_bytes(part) for part in parts)
        self.put(name, value)
        return len(value)

    def get(self, name: str) -> bytes | None:
        """Read a value whole. Returns: None if there is no such name. Raises: ConfigError."""
        check_name(name)
        with self._lock:
            kept = self._values.get(name)
            if kept is None:
                return None
            # The order of the dictionary is that of the last use, the time beside it says when.
            self._values[name] = (kept[0], time.time())
            self._values.move_to_end(name)
            return kept[0]

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end), or those of them that exist. Raises: ConfigError."""
        check_range(begin, end)
        value = self.get(name)
        return None if value is None else value[begin:end]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges. Returns: None if there is no such name. Raises: ConfigError."""
        for begin, end in ranges:
            check_range(begin, end)
        value = self.get(name)
        return None if value is None else [value[begin:end] for begin, end in ranges]

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names at once. Returns: one bool per name. Raises: ConfigError."""
        check_names(names)
        with self._lock:
            return [name in self._values for name in names]

    def delete(self, name: str) -> None:
        """Delete a value; a missing name is no error. Raises: ConfigError."""
        check_name(name)
        with self._lock:
            self._drop(name)

    def names(self) -> Iterator[str]:
        """List the names held when this is called."""
        with self._lock:
            return iter(list(self._values))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values whose names begin with prefix when this is called."""
        with self._lock:
            kept = list(self._values.items())
        for name, (value, used_s) in kept:
            if name.startswith(prefix):
                yield Entry(name, len(value), used_s)

    def used_bytes(self) -> int:
        """Return the bytes of all values held."""
        with self._lock:
            return self._used_bytes

    def _put(self, name: str, data: BytesLike, *, replace: bool) -> bool:
        check_name(name)
        value = bytes(view_bytes(data))
        if self.quota_bytes is not None and len(value) > self.quota_bytes:
            raise StoreFullError(
                "size of an object in bytes",
                got=len(value),
                expected=f"at most the quota of {self.quota_bytes}",
                remedy="raise quota_bytes or store smaller chunks",
            )
        with self._lock:
            if not replace and name in self._values:
                return False
            self._drop(name)
            while self.quota_bytes is not None and self._used_bytes + len(value) > self.quota_bytes:
                self._drop(next(iter(self._values)))
            self._values[name] = (value, time.time())
            self._used_bytes += len(value)
            return True

    def _drop(self, name: str) -> None:
        kept = self._values.pop(name, None)
        if kept is not None:
            self._used_bytes -= len(kept[0])
