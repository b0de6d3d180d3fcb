"""A reply of a Redis server that is read in slices, on a connection taken out of its pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from cachegen.store.clock import deadline_at, expires_at_s
from cachegen.store.resp import BulkReader

_MOVED = ("MOVED ", "ASK ")


@dataclass(frozen=True, eq=False)
class Reply:
    """A value that has begun to come. Exactly one of ``slices`` and ``finish`` is to be called."""

    pool: Any
    connection: Any
    reader: BulkReader

    @property
    def size_bytes(self) -> int:
        """Bytes of the value that are still to come."""
        return self.reader.size_bytes

    def finish(self) -> None:
        """Read the end of an empty reply and give the connection back."""
        self.reader.finish()
        self.pool.release(self.connection)

    def slices(
        self, slice_bytes: int, named: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[memoryview]:
        """Yield nothing once, then slices; closing it early drops the connection.

        named: turns what the client raises into errors of the store.
        """
        at_s = expires_at_s()
        is_whole = False
        try:
            yield memoryview(b"")
            left_bytes = self.size_bytes
            while left_bytes:
                view = memoryview(bytearray(min(slice_bytes, left_bytes)))
                with deadline_at(at_s), named():
                    self.reader.read_into(view)
                left_bytes -= len(view)
                yield view.toreadonly()
            with deadline_at(at_s), named():
                self.reader.finish()
            is_whole = True
        finally:
            if not is_whole:
                self.connection.disconnect()
            self.pool.release(self.connection)


def begin_reply(client: Any, key: str, begin: int, last: int, *, is_cluster: bool) -> Reply:
    """Ask for the bytes [begin, last] of a value; -1 is its last byte.

    Raises: what the client raises; then the connection is back in its pool.
    """
    for is_last_try in (False, True):
        pool = None if is_cluster else client.connection_pool
        if pool is None:
            pool = client.get_node_from_key(key).redis_connection.connection_pool
        connection = pool.get_connection()
        reader = BulkReader(connection)
        try:
            reader.begin("GETRANGE", key, begin, last)
            return Reply(pool, connection, reader)
        except BaseException as error:
            connection.disconnect()
            pool.release(connection)
            moved = isinstance(error, ResponseError) and str(error).startswith(_MOVED)
            if not moved or is_last_try:
                raise
        client.strlen(key)  # redis-py follows the redirection and learns from it
    raise AssertionError("unreachable")
