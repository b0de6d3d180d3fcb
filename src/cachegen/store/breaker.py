"""A circuit breaker: leaves a remote alone for a while once it fails again and again.

While the circuit is *closed* calls pass. After ``failures`` in a row it *opens*: calls fail at
once, so that an engine loses no time on a store that is down. After a pause it is *half open*:
one call passes as a probe; if that works the circuit closes, if not it opens for twice as long.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cachegen.errors import (
    ConfigError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from cachegen.store.base import (
    BytesLike,
    CatalogStore,
    CountingStore,
    CreatingStore,
    Entry,
    ListingStore,
    PartsStore,
    RangesStore,
    Store,
    StreamingStore,
    check_stream,
    lacks,
)

_Result = TypeVar("_Result")

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"


@dataclass(frozen=True)
class BreakerPolicy:
    """When a circuit opens and for how long.

    failures: in a row that open it. pause_s: the first time it stays open; each probe that
        fails doubles the time, to cap_s at most; a random fifth less, so that clients spread.
    patience_s: a call that was given less time than this and was late says nothing about the
        store and does not count.
    Raises: ConfigError for values that cannot work.
    """

    failures: int = 5
    pause_s: float = 1.0
    cap_s: float = 30.0
    patience_s: float = 0.1

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.pause_s <= self.cap_s or self.patience_s < 0:
            raise ConfigError("breaker policy", got=self, expected="failures >= 1, pause_s > 0")


class Breaker:
    """The circuit of one remote; all threads share it."""

    def __init__(self, policy: BreakerPolicy, *, clock: Callable[[], float] = time.monotonic):
        self.policy = policy
        self._clock = clock
        self._random = random.Random()
        self._lock = threading.Lock()
        self._failures = 0
        self._opened = 0  # times in a row
        self._open_until: float | None = None
        self._probing = False
        self._counts: Counter[str] = Counter()

    @property
    def state(self) -> str:
        """``"closed"``, ``"open"`` or ``"half_open"``."""
        with self._lock:
            return self._state()

    def run(self, call: Callable[[], _Result], where: str) -> _Result:
        """Return what call returns, if the circuit lets it pass.

        Raises: StoreUnavailableError with the reason ``"circuit_open"`` if it does not; what
            call raises.
        """
        return self._watch(call, is_probe=self._admit(where))

    def watch(self, call: Callable[[], _Result]) -> _Result:
        """Return what call returns and count how it ended; for the rest of an admitted call."""
        return self._watch(call, is_probe=False)

    def _watch(self, call: Callable[[], _Result], *, is_probe: bool) -> _Result:
        begin = self._clock()
        try:
            result = call()
        except StoreError as error:
            allowed_s = self._clock() - begin
            self._failed(error, is_probe=is_probe, allowed_s=allowed_s)
            raise
        except BaseException:
            # The caller's mistake or an interruption: it says nothing about the store.
            with self._lock:
                self._probing = self._probing and not is_probe
            raise
        self._succeeded(is_probe=is_probe)
        return result

    def stats(self) -> dict[str, int]:
        """Return calls, failures by reason, calls refused and times opened."""
        with self._lock:
            state = self._state()
            return dict(self._counts) | {f"state.{name}": int(name == state) for name in _STATES}

    def _state(self) -> str:
        if self._open_until is None:
            return CLOSED
        return OPEN if self._clock() < self._open_until else HALF_OPEN

    def _admit(self, where: str) -> bool:
        with self._lock:
            self._counts["calls"] += 1
            if self._open_until is None:
                return False
            wait_s = self._open_until - self._clock()
            if wait_s <= 0 and not self._probing:
                self._probing = True
                return True
            self._counts["refused"] += 1
        raise StoreUnavailableError(
            f"calls to {where}",
            got="too many failures in a row",
            remedy=f"the next one passes in {max(wait_s, 0):.1f} s",
            reason="circuit_open",
        )

    def _succeeded(self, *, is_probe: bool) -> None:
        with self._lock:
            self._failures = 0
            if is_probe:
                self._probing = False
                self._open_until = None
                self._opened = 0

    def _failed(self, error: StoreError, *, is_probe: bool, allowed_s: float) -> None:
        with self._lock:
            self._counts["failures"] += 1
            self._counts[f"failures.{error.reason}"] += 1
            if is_probe:
                self._probing = False
            counts = isinstance(error, (StoreTimeoutError, StoreUnavailableError))
            if isinstance(error, StoreTimeoutError) and allowed_s < self.policy.patience_s:
                counts = False
            if not counts:
                return
            self._failures += 1
            # A late failure of a call from before must not prolong a pause under way.
            if is_probe or (self._open_until is None and self._failures >= self.policy.failures):
                pause_s = min(self.policy.pause_s * 2**self._opened, self.policy.cap_s)
                self._open_until = self._clock() + pause_s * self._random.uniform(0.8, 1.0)
                self._opened += 1
                self._counts["opened"] += 1


_STATES = (CLOSED, OPEN, HALF_OPEN)


class BreakerStore:
    """Passes calls on to a store, unless its circuit is open.

    inner: the store; abilities it lacks raise ConfigError here. where: its name in messages.
    """

    def __init__(
        self, inner: Store, policy: BreakerPolicy | None = None, *, where: str = "the store"
    ) -> None:
        self.inner = inner
        self.where = where
        self.breaker = Breaker(policy or BreakerPolicy())

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name. Raises: as inner; StoreUnavailableError."""
        self._run(lambda: self.inner.put(name, data))

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken. Returns: True if it was not. Raises: as put."""
        inner = self.inner
        if not isinstance(inner, CreatingStore):
            raise lacks(inner, "create without replacing")
        return self._run(lambda: inner.put_if_absent(name, data))

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts. Returns: the bytes stored. Raises: as put."""
        inner = self.inner
        if not isinstance(inner, PartsStore):
            raise lacks(inner, "take a value in parts")
        return self._run(lambda: inner.put_stream(name, parts))

    def get(self, name: str) -> bytes | None:
        """Read a value whole. Raises: as inner; StoreUnavailableError."""
        return self._run(lambda: self.inner.get(name))

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end). Raises: as inner; StoreUnavailableError."""
        return self._run(lambda: self.inner.get_range(name, begin, end))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges of one version. Raises: as inner; StoreUnavailableError."""
        inner = self.inner
        if not isinstance(inner, RangesStore):
            raise lacks(inner, "read several ranges")
        return self._run(lambda: inner.get_ranges(name, ranges))

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) in slices; from a store without streams, in one.

        Raises: as inner; StoreUnavailableError.
        """
        check_stream(slice_bytes, begin, end)
        inner = self.inner
        if not isinstance(inner, StreamingStore):
            raise lacks(inner, "stream")
        slices = self._run(
            lambda: inner.get_stream(name, slice_bytes=slice_bytes, begin=begin, end=end)
        )
        return None if slices is None else self._watched(slices)

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names at once. Raises: as inner; StoreUnavailableError."""
        return self._run(lambda: self.inner.exists(names))

    def delete(self, name: str) -> None:
        """Delete a value. Raises: as inner; StoreUnavailableError."""
        self._run(lambda: self.inner.delete(name))

    def names(self) -> Iterator[str]:
        """List the names held. Raises: as inner; StoreUnavailableError."""
        if not isinstance(self.inner, ListingStore):
            raise lacks(self.inner, "list")
        return self._watched(self._run(self.inner.names))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List values with sizes and ages. Raises: as inner; StoreUnavailableError."""
        inner = self.inner
        if not isinstance(inner, CatalogStore):
            raise lacks(inner, "list")
        return self._watched(self._run(lambda: inner.entries(prefix)))

    def used_bytes(self) -> int:
        """Return the bytes of all values held. Raises: as inner; StoreUnavailableError."""
        if not isinstance(self.inner, ListingStore):
            raise lacks(self.inner, "list")
        return self._run(self.inner.used_bytes)

    def stats(self) -> dict[str, int]:
        """Return the counters of the circuit and of the store inside."""
        counts = self.breaker.stats()
        return counts | (self.inner.stats() if isinstance(self.inner, CountingStore) else {})

    def close(self) -> None:
        """Close the store inside, if it can be closed."""
        close = getattr(self.inner, "close", None)
        if close is not None:
            close()

    def _run(self, call: Callable[[], _Result]) -> _Result:
        return self.breaker.run(call, self.where)

    def _watched(self, items: Iterator[_Result]) -> Iterator[_Result]:
        """Let failures in the middle count as well, and close what is inside with this."""
        return _Watched(items, self.breaker)


class _Watched(Iterator[_Result]):
    def __init__(self, items: Iterator[_Result], breaker: Breaker) -> None:
        self._items = items
        self._breaker = breaker

    def __next__(self) -> _Result:
        taken = self._breaker.watch(lambda: next(self._items, _END))
        if isinstance(taken, _End):
            raise StopIteration
        return taken

    def close(self) -> None:
        """End the transfer."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def __del__(self) -> None:
        self.close()


class _End:
    pass


_END = _End()
