"""The interface of every store, its optional capabilities, and the checks that all share.

A store maps names to immutable byte strings. What holds for each of them, and is tested for
each of them by ``tests/store/test_contract.py``:

- a missing name is no error: reads return ``None``, ``delete`` does nothing;
- a reader sees a value whole, the old or the new one, never a part or a mixture;
- a failed ``put`` leaves the old or the new value, whole;
- every method may be called from many threads at once;
- a store may drop a value whenever it likes (quota, expiry): it is a cache;
- a failure of the store is a ``StoreError``, a wrong argument a ``ConfigError``.

Calls are synchronous and overlap through threads (docs/decisions/0001). A store that reaches
over a network takes ``timeout_s`` when it is built and bounds every call by it, and by the
``deadline`` of the caller if that is earlier; it raises ``StoreTimeoutError`` when the time is
up. A call that is late is never reported as a miss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from cachegen.errors import ConfigError
from cachegen.store.clock import carry_deadline, check_deadline, deadline, remaining_s

__all__ = [
    "MAX_NAME_LENGTH",
    "BytesLike",
    "CatalogStore",
    "CountingStore",
    "CreatingStore",
    "Entry",
    "ListingStore",
    "PartsStore",
    "RangesStore",
    "Store",
    "StreamingStore",
    "carry_deadline",
    "check_deadline",
    "check_name",
    "check_names",
    "check_quota",
    "check_range",
    "check_stream",
    "deadline",
    "lacks",
    "remaining_s",
    "view_bytes",
]

BytesLike: TypeAlias = "bytes | bytearray | memoryview"

# Short enough for one file name of 255 bytes with the separators kept.
MAX_NAME_LENGTH = 240
_NAME = re.compile(r"[0-9a-zA-Z._/-]+")


@runtime_checkable
class Store(Protocol):
    """Puts and gets byte strings by name; see the module's docstring for what holds for all."""

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name, in place of what was there.

        data: any contiguous bytes-like object; it is not kept after the call.
        Raises: ConfigError for a bad name, StoreFullError, StoreReadOnlyError, StoreError.
        """
        ...

    def get(self, name: str) -> bytes | None:
        """Read a value whole.

        Returns: the bytes, or None if there is no such name.
        Raises: ConfigError for a bad name, StoreError.
        """
        ...

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end) of a value without reading the rest.

        Returns: those of the bytes that exist, as ``data[begin:end]`` does: fewer than asked
            for when end lies beyond the value, ``b""`` when begin does; None if there is no
            such name, even for an empty range.
        Raises: ConfigError for a bad name or unless 0 <= begin <= end, StoreError.
        """
        ...

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names at once; does not count as a use.

        Returns: one bool per name, in order. A value may be gone by the time it is read.
        Raises: ConfigError for a bad name, StoreError.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete a value; a missing name is no error.

        Raises: ConfigError for a bad name, StoreReadOnlyError, StoreError.
        """
        ...


@runtime_checkable
class ListingStore(Store, Protocol):
    """A store that can say what it holds."""

    def names(self) -> Iterator[str]:
        """List the names held, in no order; names put or deleted meanwhile may be missed.

        Raises: StoreError.
        """
        ...

    def used_bytes(self) -> int:
        """Return the bytes of all values held. Raises: StoreError."""
        ...


@dataclass(frozen=True)
class Entry:
    """What a listing says of one value.

    used_s: Unix time of the last use if the store keeps it, else of the last change.
    """

    name: str
    size_bytes: int
    used_s: float


@runtime_checkable
class CatalogStore(ListingStore, Protocol):
    """A store that can say how large and how old its values are."""

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values whose names begin with prefix, in no order, as names does.

        Raises: StoreError.
        """
        ...


@runtime_checkable
class StreamingStore(Store, Protocol):
    """A store that delivers a value progressively, as the bytes arrive."""

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) of a value in slices, each as soon as it is there.

        slice_bytes: length of a slice, but for the last. end: None for the end of the value.
        Returns: an iterator whose slices join to what get_range returns, and whose closing
            ends the transfer; None if there is no such name.
        Raises: ConfigError as get_range does and unless slice_bytes >= 1; StoreError, here
            or from the iterator.
        """
        ...


@runtime_checkable
class CreatingStore(Store, Protocol):
    """A store that can create a value without ever replacing one."""

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data under name unless there is a value already; atomic among all writers.

        Returns: True if this call created the value, False if there was one.
        Raises: as put; after a StoreError it is not known who created the value, if anyone.
        """
        ...


@runtime_checkable
class RangesStore(Store, Protocol):
    """A store that reads several ranges of a value for the price of about one."""

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read ranges [begin, end) of one version of a value.

        Returns: for each range what get_range returns; None if there is no such name.
        Raises: ConfigError as get_range does, StoreError.
        """
        ...


@runtime_checkable
class PartsStore(Store, Protocol):
    """A store that takes a value in parts, while the rest is still being made."""

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts under name; readers see nothing of them before the last.

        Returns: the bytes stored.
        Raises: as put; what iterating over parts raises, and then the old value is there.
        """
        ...


@runtime_checkable
class CountingStore(Store, Protocol):
    """A store that counts what happened to it."""

    def stats(self) -> dict[str, int]:
        """Return counters since it was built, such as ``{"calls": 3, "failures.timeout": 1}``."""
        ...


def check_name(name: str) -> str:
    """Return name if every store can hold it.

    Raises: ConfigError unless it consists of parts of [0-9a-zA-Z._-] joined by "/", none of
        them empty, "." or "..", and has at most 240 characters.
    """
    if not isinstance(name, str):
        raise ConfigError("object name", got=type(name).__name__, expected="a string")
    if len(name) > MAX_NAME_LENGTH:
        raise ConfigError(
            "length of an object name", got=len(name), expected=f"at most {MAX_NAME_LENGTH}"
        )
    if not _NAME.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(
            "object name",
            got=repr(name),
            expected="parts of [0-9a-zA-Z._-] joined by '/', none of them empty, '.' or '..'",
            remedy="use ChunkKey.name",
        )
    return name


def check_names(names: Sequence[str]) -> Sequence[str]:
    """Return names if all are sound. Raises: ConfigError as check_name, or for one string."""
    if isinstance(names, str):
        raise ConfigError("object names", got="one string", expected="a list of names")
    for name in names:
        check_name(name)
    return names


def check_range(begin: int, end: int) -> None:
    """Check a half-open range. Raises: ConfigError unless 0 <= begin <= end."""
    if not 0 <= begin <= end:
        raise ConfigError("byte range", got=(begin, end), expected="0 <= begin <= end")


def check_stream(slice_bytes: int, begin: int, end: int | None) -> None:
    """Check the options of get_stream. Raises: ConfigError."""
    if slice_bytes < 1:
        raise ConfigError("slice size in bytes", got=slice_bytes, expected="1 or more")
    check_range(begin, begin if end is None else end)


def check_quota(quota_bytes: int | None) -> int | None:
    """Return a quota in bytes, or None for none. Raises: ConfigError unless it is positive."""
    if quota_bytes is not None and quota_bytes < 1:
        raise ConfigError(
            "quota in bytes", got=quota_bytes, expected="at least 1, or None for no quota"
        )
    return quota_bytes


def lacks(store: object, ability: str) -> ConfigError:
    """Make the error of a wrapper around a store that cannot do what is asked."""
    return ConfigError("store", got=f"{type(store).__name__}", expected=f"one that can {ability}")


def view_bytes(data: BytesLike) -> memoryview:
    """View a bytes-like object as flat unsigned bytes, without a copy.

    Raises: ConfigError if it is not bytes-like or not contiguous.
    """
    try:
        view = memoryview(data)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except TypeError as error:
        raise ConfigError(
            "data to store",
            got=f"{type(data).__name__} ({error})",
            expected="a contiguous bytes-like object",
        ) from None
