"""A store in a bucket: S3 and what speaks its protocol, Google Cloud Storage, Azure Blobs.

Bytes move through obstore. Retries are ours, because its own know nothing of a deadline. A value
is one object; its name follows the prefix. Buckets have no quota and no eviction: use a lifecycle
rule, which should also remove incomplete multipart uploads, or ``cachegen gc``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, NotFoundError

from cachegen.errors import ConfigError, StoreError, StoreUnavailableError
from cachegen.store import loop
from cachegen.store.base import (
    BytesLike,
    Entry,
    check_name,
    check_names,
    check_range,
    check_stream,
    view_bytes,
)
from cachegen.store.bucket import (
    NOT_DONE,
    Bucket,
    MissingError,
    TakenError,
    named_errors,
    status_of,
)
from cachegen.store.clock import deadline_at, expires_at_s
from cachegen.store.retry import Retrier, RetryPolicy

_Result = TypeVar("_Result")

# Above this an upload goes in parts, several at once; below, one request is faster.
_MULTIPART_BYTES = 16 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
_HEADS_AT_ONCE = 64
_LIST_BATCH = 1000


class ObjectStore:
    """Keeps values as objects of a bucket; nothing is connected before the first call.

    bucket: where. timeout_s: bound on every call, retries included; on a stream, on the wait for
        each slice. An earlier deadline of the caller wins.
    A process must not fork after it has used one: the client's threads stay behind.
    Raises: ConfigError for values that cannot work.
    """

    def __init__(
        self, bucket: Bucket, *, timeout_s: float = 10.0, retry: RetryPolicy | None = None
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError("timeout in seconds", got=timeout_s, expected="above 0")
        self.bucket = bucket
        self.timeout_s = timeout_s
        self._retrier = Retrier(retry or RetryPolicy())
        self._inner = bucket.open(timeout_s)

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name. Raises: ConfigError, StoreError."""
        check_name(name)
        view = view_bytes(data)
        self._run(
            lambda: obstore.put_async(
                self._inner,
                name,
                view,
                use_multipart=view.nbytes > _MULTIPART_BYTES,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        )

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken, by a conditional request.

        Returns: True if it was not. Raises: as put; StoreError if the server knows no conditions.
        """
        check_name(name)
        view = view_bytes(data)
        try:
            self._run(
                lambda: obstore.put_async(self._inner, name, view, mode="create"),
                # Done twice, the second would find the object of the first and report False.
                is_safe=lambda error: error.reason in NOT_DONE,
            )
        except TakenError:
            return False
        return True

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts as a multipart upload; readers see nothing before its end.

        Returns: the bytes stored. Raises: as put, and what parts raise.
        """
        check_name(name)
        writer = obstore.open_writer_async(
            self._inner, name, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
        )
        size_bytes = 0
        try:
            for part in parts:
                view = view_bytes(part)
                self._once(partial(writer.write, view))
                size_bytes += view.nbytes
            self._once(writer.close)
        except BaseException as error:
            with suppress(StoreError):
                self._once(partial(writer.__aexit__, type(error), error, None))
            raise
        return size_bytes

    def get(self, name: str) -> bytes | None:
        """Read a value whole. Returns: None if there is no such name. Raises: StoreError."""
        found = self._read(check_name(name), [None])
        return None if found is None else found[0]

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end), or those of them that exist.

        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        found = self.get_ranges(name, [(begin, end)])
        return None if found is None else found[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges of one version of a value, with requests at the same time.

        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        check_name(name)
        for begin, end in ranges:
            check_range(begin, end)
        asked = [(begin, end) for begin, end in ranges if begin < end]
        if not asked:
            return [b"" for _ in ranges] if self.exists([name])[0] else None
        found = self._read(name, list(asked))
        if found is None:
            return None
        parts = iter(found)
        return [next(parts) if begin < end else b"" for begin, end in ranges]

    def get_stream(
        self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
    ) -> Iterator[memoryview] | None:
        """Read the bytes [begin, end) in slices, each as soon as it has come.

        A connection that breaks is taken up again where it broke, if the object is still the
        same. Closing the iterator ends the transfer.
        Returns: None if there is no such name. Raises: ConfigError, StoreError.
        """
        check_name(name)
        check_stream(slice_bytes, begin, end)
        if begin == end:
            return iter(()) if self.exists([name])[0] else None
        try:
            opened = self._run(lambda: self._open_stream(name, slice_bytes, begin, end, None))
        except MissingError:
            return None
        if opened is None:
            return iter(())
        return self._slices(name, slice_bytes, begin, end, opened)

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names with requests at the same time. Raises: ConfigError, StoreError."""
        check_names(names)

        async def head(name: str, gate: asyncio.Semaphore) -> bool:
            async with gate:
                try:
                    await obstore.head_async(self._inner, name)
                    return True
                except (NotFoundError, FileNotFoundError):
                    return False

        async def all_of_them() -> list[bool]:
            gate = asyncio.Semaphore(_HEADS_AT_ONCE)
            return list(await asyncio.gather(*(head(name, gate) for name in names)))

        return self._run(all_of_them) if names else []

    def delete(self, name: str) -> None:
        """Delete a value; a missing name is no error. Raises: ConfigError, StoreError."""
        check_name(name)
        with suppress(MissingError):
            self._run(lambda: obstore.delete_async(self._inner, name))

    def names(self) -> Iterator[str]:
        """List the names under the prefix, in no order. Raises: StoreError."""
        return (entry.name for entry in self.entries())

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values whose names begin with prefix; used_s is that of the last change.

        Raises: StoreError.
        """
        folder = prefix.rpartition("/")[0] or None
        listing = obstore.list(self._inner, folder, chunk_size=_LIST_BATCH)

        async def following() -> Any:
            # The end of an asynchronous iterator cannot cross a future as it is.
            return await anext(listing, None)

        while (batch := self._once(following)) is not None:
            for meta in batch:
                if meta["path"].startswith(prefix):
                    yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def used_bytes(self) -> int:
        """Return the bytes of all values under the prefix, by a listing. Raises: StoreError."""
        return sum(entry.size_bytes for entry in self.entries())

    def stats(self) -> dict[str, int]:
        """Return how often calls were tried again, in all and by reason."""
        return self._retrier.stats()

    # -- calls --------------------------------------------------------------------------------

    def _run(
        self,
        make: Callable[[], Coroutine[Any, Any, _Result]],
        *,
        is_safe: Callable[[StoreUnavailableError], bool] = lambda error: True,
    ) -> _Result:
        with self._named():
            return self._retrier.run(lambda: self._once(make), is_safe=is_safe)

    def _once(self, make: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        async def call() -> _Result:
            return await make()  # obstore gives futures, which need a loop that runs

        with self._named():
            return loop.run(call)

    def _read(self, name: str, ranges: Sequence[tuple[int, int] | None]) -> list[bytes] | None:
        async def one(wanted: tuple[int, int] | None) -> tuple[str | None, bytes | None]:
            options: Any = {"range": wanted} if wanted else None
            try:
                result = await obstore.get_async(self._inner, name, options=options)
                return result.meta["e_tag"], (await result.bytes_async()).to_bytes()
            except BaseError as error:
                if status_of(error) == 416:  # all of the range is beyond the end
                    return None, b""
                raise

        async def all_of_them() -> list[bytes]:
            found = await asyncio.gather(*(one(wanted) for wanted in ranges))
            if len({tag for tag, _ in found if tag is not None}) > 1:
                raise StoreUnavailableError(
                    f"ranges of {name}", got="two versions of the object", reason="changed"
                )
            return [data for _, data in found if data is not None]

        try:
            return self._run(all_of_them)
        except MissingError:
            return None

    async def _open_stream(
        self, name: str, slice_bytes: int, begin: int, end: int | None, tag: str | None
    ) -> tuple[str | None, int, Any] | None:
        """Return e-tag, bytes to come and the stream, or None if begin is beyond the end."""
        options: Any = {}
        if end is not None:
            options["range"] = (begin, end)
        elif begin:
            options["range"] = {"offset": begin}
        if tag is not None:
            options["if_match"] = tag
        try:
            result = await obstore.get_async(self._inner, name, options=options or None)
        except BaseError as error:
            if status_of(error) == 416:
                return None
            raise
        first, last = result.range
        return result.meta["e_tag"], last - first, result.stream(min_chunk_size=slice_bytes)

    def _slices(
        self,
        name: str,
        slice_bytes: int,
        begin: int,
        end: int | None,
        opened: tuple[str | None, int, Any],
    ) -> Iterator[memoryview]:
        at_s = expires_at_s()
        tag, left_bytes, stream = opened
        pending = bytearray()

        def following() -> bytes:
            """Return what comes next, from a new connection if the one there is has broken."""
            nonlocal stream

            async def take() -> bytes:
                nonlocal stream
                if stream is None:
                    again = await self._open_stream(name, slice_bytes, begin, end, tag)
                    stream = None if again is None else again[2]
                taken, stream = stream, None  # a failure leaves none, to be opened again
                part = None if taken is None else await anext(taken, None)
                stream = taken
                if part is None:
                    raise StoreUnavailableError(
                        f"object {name}", got="its end too early", reason="short"
                    )
                return bytes(part)

            return self._run(take, is_safe=lambda _: tag is not None)

        while left_bytes:
            with deadline_at(at_s):
                part = following()
            begin += len(part)
            left_bytes -= len(part)
            pending += part
            whole = len(pending) - (len(pending) % slice_bytes if left_bytes else 0)
            ready, pending = memoryview(bytes(pending[:whole])), pending[whole:]
            for first in range(0, whole, slice_bytes):
                yield ready[first : first + slice_bytes]

    def _named(self) -> AbstractContextManager[None]:
        return named_errors(self.bucket.where, self.timeout_s)
