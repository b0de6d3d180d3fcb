"""Saving chunks: copies of an engine's blocks are encoded and stored, in threads of their own.

An engine is never kept waiting for a store. What cannot be kept up with is dropped and counted, and
threads leave the cores to an engine that is busy, as far as the backlog allows; they are of a low
priority at all times.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from cachegen.chunk import KVChunk
from cachegen.connectors.adapter import Piece, logger, reason_of
from cachegen.connectors.background import step_back
from cachegen.connectors.coding import ChunkCoder
from cachegen.connectors.device_blocks import DeviceBlocks
from cachegen.connectors.metrics import Counters
from cachegen.settings import Settings
from cachegen.store.base import Store
from cachegen.store.keys import chunk_keys

# Saving waits for the engine to be idle, but not for ever. An engine is idle a moment after a step
# that computed nothing; where none comes, after a time in which a slow step would have ended.
QUIET_S = 0.02
SILENT_S = 0.25
MOST_WAIT_S = 10.0


class BlockCopy(Protocol):
    """Blocks that were copied out of an engine's cache."""

    @property
    def size_bytes(self) -> int:
        """Memory that the copy takes."""

    @property
    def ready(self) -> Callable[[], list[Any]]:
        """Waits for the copy and returns the blocks of every layer."""


class ToChunk(Protocol):
    """Turns the blocks of every layer into a chunk."""

    def __call__(self, blocks: list[Any], *, first_position: int) -> KVChunk | DeviceBlocks:
        """Return the chunk. Raises: GeometryError."""


class Saver:
    """Encodes and stores copies of blocks, in threads, and drops what it cannot keep up with.

    waits: True to leave the cores and Python's lock to an engine that is busy, see ``note_step``.
    """

    def __init__(
        self,
        store: Store,
        to_chunk: ToChunk,
        coder: ChunkCoder,
        *,
        namespace: bytes,
        settings: Settings,
        counters: Counters,
        waits: bool = False,
    ) -> None:
        self._waits = waits
        self._is_busy, self._quiet_s = False, 0.0
        self._store = store
        self._to_chunk = to_chunk
        self._coder = coder
        self._namespace = namespace
        self._settings = settings
        self._counters = counters
        self._lock = threading.Lock()
        self._backlog_bytes = 0
        self._threads = ThreadPoolExecutor(
            settings.save_threads, "cachegen-save", initializer=step_back
        )

    @property
    def has_room(self) -> bool:
        """False while so much waits that nothing more should be copied."""
        return self._backlog_bytes < self._settings.backlog_bytes

    def note_step(self, *, begins: bool, computes: bool) -> None:
        """Take note that a step of the engine begins or has ended.

        computes: False for a step without tokens, as between requests.
        """
        self._is_busy = begins and computes
        self._quiet_s = time.monotonic() + (SILENT_S if computes else QUIET_S)

    def skip(self, reason: str) -> None:
        """Count a chunk that is not saved."""
        self._counters.add("skipped_saves_total", reason=reason)

    def submit(self, piece: Piece, copy: BlockCopy) -> None:
        """Take a copy of a whole chunk's blocks; returns at once."""
        with self._lock:
            self._backlog_bytes += copy.size_bytes
        self._counters.add("staged_chunks_total")
        self._threads.submit(self._run, piece, copy, time.monotonic())

    def close(self, *, wait_s: float) -> None:
        """Finish what waits for at most wait_s seconds, then drop the rest."""
        end = time.monotonic() + wait_s
        while self._backlog_bytes and time.monotonic() < end:
            time.sleep(0.01)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _wait_for_quiet(self, end_s: float) -> None:
        """Wait until the engine is idle, the backlog is half full or the time is up."""
        while self._waits and 2 * self._backlog_bytes < self._settings.backlog_bytes:
            now = time.monotonic()
            if now > end_s or (not self._is_busy and now > self._quiet_s):
                return
            time.sleep(QUIET_S)

    def _run(self, piece: Piece, copy: BlockCopy, submitted_s: float) -> None:
        self._wait_for_quiet(submitted_s + MOST_WAIT_S)
        begin = time.monotonic()
        try:
            self._save(piece, copy)
        except Exception as error:
            reason = reason_of(error)
            self.skip(reason)
            logger.warning("chunk %d is not saved: %s", piece.index, error)
        finally:
            with self._lock:
                self._backlog_bytes -= copy.size_bytes
            self._counters.add("save_seconds_total", time.monotonic() - begin)
            self._counters.add("settled_chunks_total")

    def _save(self, piece: Piece, copy: BlockCopy) -> None:
        (key,) = chunk_keys(self._namespace, [piece.chain], self._coder.coding.label)
        if self._store.exists([key.name])[0]:
            self.skip("stored")
            return
        tokens = self._settings.chunk_tokens
        chunk = self._to_chunk(copy.ready(), first_position=piece.index * tokens)
        data = self._coder.encode(chunk, key)
        self._store.put(key.name, data)
        self._counters.add("saved_chunks_total")
        self._counters.add("saved_tokens_total", chunk.tokens)
        self._counters.add("saved_bytes_total", len(data))
