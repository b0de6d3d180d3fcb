"""What a fetcher calls: the store that it reads from, and its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachegen.chunk import KVChunk
from cachegen.stream.outcome import FetchedChunk, FetchReport

Decode = Callable[[bytes, FetchedChunk], KVChunk]
Progress = Callable[[FetchReport], None]


class Source(Protocol):
    """The part of a store that fetching needs; ``get_stream`` is used where there is one."""

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Return the bytes [begin, end) of the object, or None."""


@dataclass(frozen=True, eq=False)
class Callbacks:
    """What a caller wants to be called; see ``Fetcher.request``."""

    decode: Decode
    deliver: Callable[[FetchedChunk], None] | None
    direct: Callable[[FetchedChunk], None] | None
    recompute: Callable[[FetchedChunk], KVChunk | None] | None
    fence: Callable[[], bool] | None
    progress: Progress | None
