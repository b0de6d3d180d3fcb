"""Several stores as one: near and small before far and large, such as memory, disk, remote.

The last tier is *home*: what is there is what the store holds, the others keep copies of what was
used. Reads go from near to far. A tier that fails is passed over, but a name that no other tier
has is then a failure, not a miss.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, TypeVar

from cachegen.errors import ConfigError, StoreError
from cachegen.store.backlog import Backlog
from cachegen.store.base import (
    BytesLike,
    CatalogStore,
    CountingStore,
    CreatingStore,
    Entry,
    RangesStore,
    Store,
    StreamingStore,
    check_name,
    check_names,
    check_range,
    check_stream,
    lacks,
    view_bytes,
)
from cachegen.store.memory import MemoryStore

_Result = TypeVar("_Result")

DEFAULT_QUEUE_BYTES = 256 << 20
CLOSE_TIMEOUT_S = 30.0
# Values whose beginnings were read from far away; the least recent are forgotten beyond this.
_REMEMBERED = 4096


class TieredStore:
    """Keeps values in several stores; tiers are given from near to far.

    write: ``"through"``: put returns when all tiers have the value, home first. ``"back"``: put
        returns when the nearest has it and the others get it from a queue; what is in the queue
        is lost if the process is killed, so close the store.
    promote: True to copy what was found far away into the tiers before. A value read whole is
        copied at once; one read in ranges when its beginning is read the second time, since a
        prefix read once is not worth the rest of the value.
    queue_bytes: bound on what waits to be written; when it is full, put waits for all tiers and
        promotions are dropped.
    Raises: ConfigError for fewer than two tiers.
    """

    def __init__(
        self,
        tiers: Sequence[Store],
        *,
        write: Literal["through", "back"] = "through",
        promote: bool = True,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
    ) -> None:
        if len(tiers) < 2 or write not in ("through", "back"):
            raise ConfigError(
                "tiers", got=(len(tiers), write), expected="two at least, through or back"
            )
        self.tiers = tuple(tiers)
        self.write = write
        self.promote = promote
        self._backlog = Backlog(queue_bytes)
        self._lock = threading.Lock()
        self._begun: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name. Raises: ConfigError; StoreError of home, or of the nearest."""
        check_name(name)
        value = bytes(view_bytes(data))
        if self.write == "back":
            self.tiers[0].put(name, value)
            far = self.tiers[1:]
            if self._backlog.offer(name, value, len(value), lambda: _put_all(far, name, value)):
                return
        self._backlog.drop(name)
        try:
            self.tiers[-1].put(name, value)
        except StoreError as error:
            self._failed(len(self.tiers) - 1, error)
            raise
        self._copy(name, value, self.tiers[:-1])

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless home has the name, at once whatever ``write`` says.

        Returns: True if this call created it. Raises: ConfigError, StoreError of home.
        """
        home = self.tiers[-1]
        if not isinstance(home, CreatingStore):
            raise lacks(home, "create without replacing")
        value = bytes(view_bytes(data))
        check_name(name)
        if self._backlog.waiting(name) is not None:
            return False
        created = home.put_if_absent(name, value)
        if created:
            self._copy(name, value, self.tiers[:-1])
        return created

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts, which are held here, as all tiers need them. Raises: as put."""
        value = b"".join(view_bytes(part) for part in parts)
        self.put(name, value)
        return len(value)

    def get(self, name: str) -> bytes | None:
        """Read a value whole. Raises: ConfigError, StoreError if no tier has it and one failed."""
        check_name(name)
        found, tier = self._search(name, lambda store: store.get(name))
        if found is not None:
            self._promote(name, found, tier)
        return found

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end). Raises: ConfigError, StoreError."""
        parts = self.get_ranges(name, [(begin, end)])
        return None if parts is None else parts[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges from the nearest tier that has the value. Raises: as get."""
        check_name(name)
        for begin, end in ranges:
            check_range(begin, end)
        found, tier = self._search(name, lambda store: _ranges_of(store, name, ranges))
        if found is not None and any(begin == 0 < end for begin, end in ranges):
            self._promote_later(name, tier)
        return found

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) in slices from the nearest tier that has the value.

        Raises: as get.
        """
        check_name(name)
        check_stream(slice_bytes, begin, end)
        slices, tier = self._search(
            name, lambda store: _stream_of(store, name, slice_bytes, begin, end)
        )
        if slices is not None and begin == 0 and end != 0:
            self._promote_later(name, tier)
        return slices

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names, each in one tier after the other until one has it.

        Raises: ConfigError; StoreError if a tier failed and no other has all of the names.
        """
        found = [self._backlog.waiting(name) is not None for name in check_names(names)]
        failure: StoreError | None = None
        for index, store in enumerate(self.tiers):
            missing = [place for place, there in enumerate(found) if not there]
            if not missing:
                return found
            try:
                answers = store.exists([names[place] for place in missing])
            except StoreError as error:
                failure = self._failed(index, error)
                continue
            for place, there in zip(missing, answers, strict=True):
                found[place] = there
        if failure is not None and not all(found):
            raise failure
        return found

    def delete(self, name: str) -> None:
        """Delete a value everywhere. Raises: ConfigError; the first StoreError after all tiers."""
        check_name(name)
        self._backlog.drop(name)
        failure: StoreError | None = None
        for index, store in enumerate(self.tiers):
            try:
                store.delete(name)
            except StoreError as error:
                failure = failure or self._failed(index, error)
        if failure is not None:
            raise failure

    def names(self) -> Iterator[str]:
        """List the names that any tier has. Raises: ConfigError, StoreError."""
        return (entry.name for entry in self.entries())

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values that any tier has, with what the nearest says. Raises: as names."""
        seen: set[str] = set()
        for store in self.tiers:
            if not isinstance(store, CatalogStore):
                raise lacks(store, "list")
            for entry in store.entries(prefix):
                if entry.name not in seen:
                    seen.add(entry.name)
                    yield entry

    def used_bytes(self) -> int:
        """Return the bytes of all values, each counted once. Raises: as names."""
        return sum(entry.size_bytes for entry in self.entries())

    def stats(self) -> dict[str, int]:
        """Return hits by tier, misses, failures by tier, the queue's and the tiers' counters."""
        with self._lock:
            counts = dict(self._counts)
        counts |= {f"queue.{name}": count for name, count in self._backlog.stats().items()}
        for index, store in enumerate(self.tiers):
            if isinstance(store, CountingStore):
                counts |= {f"tier{index}.{name}": n for name, n in store.stats().items()}
        return counts

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all is written. Returns: False if it took longer than timeout_s."""
        return self._backlog.flush(timeout_s)

    def close(self, timeout_s: float | None = CLOSE_TIMEOUT_S) -> bool:
        """Write what waits and close the tiers. Returns: False if something was left."""
        done = self._backlog.close(timeout_s)
        for store in self.tiers:
            close = getattr(store, "close", None)
            if close is not None:
                close()
        return done

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- tiers --------------------------------------------------------------------------------

    def _search(
        self, name: str, read: Callable[[Store], _Result | None]
    ) -> tuple[_Result | None, int]:
        """Return what the nearest tier with the name gives, and which one that is."""
        failure: StoreError | None = None
        for index, store in enumerate(self.tiers):
            found = None
            try:
                found = read(store)
            except StoreError as error:
                failure = self._failed(index, error)
            if found is not None:
                self._count(f"tier{index}.hits")
                return found, index
            value = self._backlog.waiting(name) if index == 0 else None
            if value is not None:  # dropped by the nearest before the next one had it
                waiting = MemoryStore()
                waiting.put(name, value)
                return read(waiting), 0
        if failure is not None:
            raise failure
        self._count("misses")
        return None, len(self.tiers)

    def _promote(self, name: str, value: bytes, tier: int) -> None:
        nearer = self.tiers[:tier]
        if self.promote and nearer and self._backlog.waiting(name) is None:
            self._backlog.offer(name, None, len(value), lambda: self._copy(name, value, nearer))

    def _promote_later(self, name: str, tier: int) -> None:
        if not self.promote or tier == 0:
            return
        with self._lock:
            is_first = name not in self._begun
            self._begun[name] = None
            self._begun.move_to_end(name)
            if len(self._begun) > _REMEMBERED:
                self._begun.popitem(last=False)
        if is_first or self._backlog.waiting(name) is not None:
            return

        def fetch() -> None:
            value = self.tiers[tier].get(name)
            if value is not None:
                self._copy(name, value, self.tiers[:tier])
            with self._lock:
                self._begun.pop(name, None)

        self._backlog.offer(name, None, 1, fetch)

    def _copy(self, name: str, value: bytes, tiers: Sequence[Store]) -> None:
        """Put a copy into nearer tiers; one that cannot take it must not keep an older one."""
        for store in tiers:
            try:
                store.put(name, value)
                self._count("copies")
            except StoreError as error:
                self._failed(self.tiers.index(store), error)
                with suppress(StoreError):
                    store.delete(name)

    def _failed(self, index: int, error: StoreError) -> StoreError:
        self._count(f"tier{index}.failures.{error.reason}")
        return error

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


def _put_all(tiers: Sequence[Store], name: str, value: bytes) -> None:
    for store in reversed(tiers):
        store.put(name, value)


def _ranges_of(store: Store, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
    if isinstance(store, RangesStore):
        return store.get_ranges(name, ranges)
    if not ranges:
        return [] if store.exists([name])[0] else None
    parts = [store.get_range(name, begin, end) for begin, end in ranges]
    whole = [part for part in parts if part is not None]
    return whole if len(whole) == len(parts) else None


def _stream_of(
    store: Store, name: str, slice_bytes: int, begin: int, end: int | None
) -> Iterator[memoryview] | None:
    if isinstance(store, StreamingStore):
        return store.get_stream(name, slice_bytes=slice_bytes, begin=begin, end=end)
    value = store.get(name) if end is None else store.get_range(name, begin, end)
    if value is None:
        return None
    view = memoryview(value)[begin:] if end is None else memoryview(value)
    return (view[first : first + slice_bytes] for first in range(0, len(view), slice_bytes))
