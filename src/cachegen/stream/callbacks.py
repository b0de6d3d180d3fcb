"""What a fetcher calls: the store that it reads from, and its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachegen.chunk import KVChunk
from cachegen.stream.outcome import FetchedChunk, FetchReport
from cachegen.stream.progress import Stage

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

    def answer(self, item: FetchedChunk, stage: Stage) -> tuple[bool, KVChunk | None]:
        """Decode, deliver or recompute a chunk, as its stage says.

        Returns: whether the fence stood in the way, and the chunk if there is one now.
        Raises: what the caller's functions raise.
        """
        if stage is Stage.READY:
            return False, self.decode(item.data, item)
        if self.fence is not None and not self.fence():
            return True, None
        if stage is Stage.RECOMPUTING and self.recompute is not None:
            return False, self.recompute(item)
        if self.direct is not None:
            self.direct(item)
        elif self.deliver is not None:
            self.deliver(item)
        return False, None
