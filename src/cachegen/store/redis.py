"""A store in a Redis server or cluster, or in anything that speaks its protocol.

A value is one string, so it has at most 512 MiB (``proto-max-bulk-len``); a chunk has a few. The
quota is the server's: set ``maxmemory`` and ``maxmemory-policy allkeys-lru``, and values go by
themselves. Only old commands are used (SET, GET, GETRANGE, APPEND, RENAME, EXISTS, STRLEN, SCAN,
DEL, MULTI), so that Valkey, KeyDB and managed servers work as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import redis
from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from cachegen.errors import ConfigError, StoreError, StoreFullError, StoreUnavailableError
from cachegen.store.base import (
    BytesLike,
    Entry,
    check_name,
    check_names,
    check_range,
    check_stream,
    view_bytes,
)
from cachegen.store.redis_stream import begin_reply
from cachegen.store.resp import (
    NOT_SENT,
    RedisTarget,
    named_errors,
)
from cachegen.store.retry import Retrier, RetryPolicy

MAX_VALUE_BYTES = 512 << 20
_Result = TypeVar("_Result")

# How many keys one round trip asks about: a reply to a million would hold the server up.
_BATCH = 1000
# A part that a writer left behind when it died goes after this time.
_PART_TTL_MS = 3_600_000


class RedisStore:
    """Keeps values in a Redis server or cluster; nothing is connected before the first call.

    target: the server. prefix: put before every name; stores with other prefixes do not see
        each other. ttl_s: values go after this time; None for never.
    timeout_s: bound on every call, connecting and retries included; on a stream, on the wait
        for each slice. An earlier deadline of the caller wins.
    A process that forks gets connections of its own.
    Raises: ConfigError for values that cannot work.
    """

    def __init__(
        self,
        target: RedisTarget,
        *,
        prefix: str = "cachegen:",
        timeout_s: float = 5.0,
        ttl_s: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        if not timeout_s > 0 or (ttl_s is not None and not ttl_s >= 0.001):
            raise ConfigError(
                "timeout and time to live in seconds", got=(timeout_s, ttl_s), expected="above 0"
            )
        if prefix:
            check_name(prefix.replace(":", "-").strip("/") or "/")
        self.target = target
        self.timeout_s = timeout_s
        self.ttl_s = ttl_s
        self.prefix = prefix
        self._retrier = Retrier(retry or RetryPolicy())
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None  # the process id and the client

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name. Raises: ConfigError; StoreFullError above 512 MiB; StoreError."""
        key, view = self._key(name), self._checked(data)
        self._run(lambda client: client.set(key, view, px=self._ttl_ms))

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken. Returns: True if it was not. Raises: as put."""
        key, view = self._key(name), self._checked(data)
        done = self._run(
            lambda client: client.set(key, view, px=self._ttl_ms, nx=True),
            # Sent twice, the second would find the value of the first and report False.
            is_safe=lambda error: error.reason in NOT_SENT,
        )
        return bool(done)

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts under name without holding them all here.

        Readers see the old value until the last part is there.
        Returns: the bytes stored. Raises: as put, and what parts raise.
        """
        key = self._key(name)
        # The braces let a cluster keep it beside key, so that it can be renamed.
        part_key = f"{{{key}}}.part-{os.urandom(8).hex()}"
        size_bytes = 0
        try:
            self._once(lambda client: client.set(part_key, b"", px=_PART_TTL_MS))
            for part in parts:
                view = self._checked(part, before_bytes=size_bytes)
                length = self._append(part_key, view)
                size_bytes += view.nbytes
                if length != size_bytes:
                    raise StoreUnavailableError(
                        f"part of a value at {self.target.where}",
                        got=f"{length} bytes",
                        expected=size_bytes,
                        reason="short",
                    )
            self._transaction(lambda pipe: self._finish_part(pipe, part_key, key), retry=False)
        except BaseException:
            with suppress(StoreError):
                self._once(lambda client: client.delete(part_key))
            raise
        return size_bytes

    def get(self, name: str) -> bytes | None:
        """Read a value whole. Returns: None if there is no such name. Raises: StoreError."""
        key = self._key(name)
        value = self._run(lambda client: client.get(key))
        return None if value is None else _bytes(value)

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end), or those of them that exist, in one round trip.

        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        key = self._key(name)
        check_range(begin, end)
        if begin < end:
            value = _bytes(self._run(lambda client: client.getrange(key, begin, end - 1)))
            if value:
                return value
        # Redis answers "" for a missing name as well; both questions in one transaction.
        parts = self.get_ranges(name, [(begin, end)])
        return None if parts is None else parts[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges of one version of a value in one round trip.

        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        key = self._key(name)
        for begin, end in ranges:
            check_range(begin, end)
        asked = [(begin, end) for begin, end in ranges if begin < end]

        def ask(pipe: Any) -> None:
            pipe.exists(key)
            for begin, end in asked:
                pipe.getrange(key, begin, end - 1)

        exists, *found = self._transaction(ask)
        if not exists:
            return None
        values = iter(found)
        return [_bytes(next(values)) if begin < end else b"" for begin, end in ranges]

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) in slices, each as soon as it has come.

        The reply is one version of the value. Closing the iterator early drops the connection,
        and with it what was still to come.
        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        key = self._key(name)
        check_stream(slice_bytes, begin, end)
        if end is None or begin < end:
            last = -1 if end is None else end - 1
            reply = self._run(
                lambda client: begin_reply(client, key, begin, last, is_cluster=self.target.cluster)
            )
            if reply.size_bytes:
                slices = reply.slices(slice_bytes, self._named)
                next(slices)  # from here on closing or dropping it frees the connection
                return slices
            with self._named():
                reply.finish()
        rest = self.get_range(name, begin, begin)
        return None if rest is None else iter(())

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names in one round trip per thousand. Raises: ConfigError, StoreError."""
        keys = [self.prefix + name for name in check_names(names)]
        found: list[bool] = []
        for first in range(0, len(keys), _BATCH):
            batch = keys[first : first + _BATCH]
            found += map(bool, self._pipeline(batch, lambda pipe, key: pipe.exists(key)))
        return found

    def delete(self, name: str) -> None:
        """Delete a value; a missing name is no error. Raises: ConfigError, StoreError."""
        key = self._key(name)
        self._run(lambda client: client.delete(key))

    def names(self) -> Iterator[str]:
        """List the names under the prefix, in no order. Raises: StoreError."""
        for batch in self._scan():
            for key in batch:
                yield key[len(self.prefix) :]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values whose names begin with prefix, with sizes and last uses.

        Under an LFU eviction policy the server does not keep the last use; then it is now.
        Raises: StoreError.
        """
        for batch in self._scan(prefix):
            sizes = self._pipeline(batch, lambda pipe, key: pipe.strlen(key))
            idle = self._pipeline(batch, lambda pipe, key: pipe.object("IDLETIME", key))
            now_s = time.time()
            for key, size_bytes, idle_s in zip(batch, sizes, idle, strict=True):
                if isinstance(size_bytes, int):
                    used_s = now_s - idle_s if isinstance(idle_s, int) else now_s
                    yield Entry(key[len(self.prefix) :], size_bytes, used_s)

    def used_bytes(self) -> int:
        """Return the bytes of all values under the prefix, by a scan. Raises: StoreError."""
        return sum(entry.size_bytes for entry in self.entries())

    def stats(self) -> dict[str, int]:
        """Return how often calls were tried again, in all and by reason."""
        return self._retrier.stats()

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            made[1].close()

    # -- calls --------------------------------------------------------------------------------

    def _run(
        self,
        call: Callable[[Any], _Result],
        *,
        is_safe: Callable[[StoreUnavailableError], bool] = lambda error: True,
    ) -> _Result:
        with self._named():
            return self._retrier.run(lambda: self._once(call), is_safe=is_safe)

    def _once(self, call: Callable[[Any], _Result]) -> _Result:
        with self._named():
            return call(self._client())

    def _finish_part(self, pipe: Any, part_key: str, key: str) -> None:
        if self._ttl_ms is None:
            pipe.persist(part_key)
        else:
            pipe.pexpire(part_key, self._ttl_ms)
        # Not pipe.rename, which redis-py refuses for a cluster even where both keys are together.
        pipe.execute_command("RENAME", part_key, key)

    def _append(self, key: str, view: memoryview) -> int:
        # Not tried again: the server may have it already.
        return int(self._once(lambda client: client.append(key, view)))

    def _transaction(self, fill: Callable[[Any], object], *, retry: bool = True) -> list[Any]:
        def call(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=True)
            fill(pipe)
            return list(pipe.execute())

        return self._run(call) if retry else self._once(call)

    def _pipeline(self, keys: Sequence[str], ask: Callable[[Any, str], object]) -> list[Any]:
        def call(client: Any) -> list[Any]:
            pipe = client.pipeline(transaction=False)
            for key in keys:
                ask(pipe, key)
            return list(pipe.execute(raise_on_error=False))

        answers = self._run(call)
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, ResponseError):
                with self._named():
                    raise answer
        return answers

    def _scan(self, prefix: str = "") -> Iterator[list[str]]:
        pattern = self.prefix + prefix + "*"
        seen: set[str] = set()  # a scan may name a key twice
        batch: list[str] = []
        keys = self._run(lambda client: client.scan_iter(pattern, count=_BATCH, _type="string"))
        while (key := self._once(lambda _: next(keys, None))) is not None:
            text = key.decode(errors="replace")
            if text in seen:
                continue
            seen.add(text)
            batch.append(text)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _client(self) -> Any:
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        # Not under the lock: a cluster is asked for its nodes here, which may take long.
        client = self._connect()
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), client
            return self._made[1]

    def _connect(self) -> Any:
        options = self.target.options()
        if not self.target.cluster:
            return redis.Redis(connection_pool=redis.ConnectionPool(**options))
        host, port = options.pop("host"), options.pop("port")
        return RedisCluster.from_url(f"redis://{host}:{port}", **options)

    def _named(self) -> Any:
        return named_errors(self.target.where, self.timeout_s)

    @property
    def _ttl_ms(self) -> int | None:
        return None if self.ttl_s is None else round(1000 * self.ttl_s)

    def _key(self, name: str) -> str:
        return self.prefix + check_name(name)

    def _checked(self, data: BytesLike, *, before_bytes: int = 0) -> memoryview:
        view = view_bytes(data)
        if before_bytes + view.nbytes > MAX_VALUE_BYTES:
            raise StoreFullError(
                "size of a value in Redis in bytes",
                got=before_bytes + view.nbytes,
                expected=f"at most {MAX_VALUE_BYTES}",
                remedy="store smaller chunks",
            )
        return view


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise StoreUnavailableError(
            "answer of a Redis server",
            got=type(value).__name__,
            expected="bytes",
            reason="protocol",
        )
    return value
