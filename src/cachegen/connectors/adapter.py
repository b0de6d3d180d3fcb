"""Loading chunks into an engine's paged cache and saving them from it, whatever the engine.

Three rules hold here for every engine:

- A write first checks a *fence*. A request's fence is closed before anybody is told that its load
  has ended, whether done, failed, late or aborted, so nothing touches a block after that.
- Whatever goes wrong with an entry of the store becomes a counted miss, in ``reason_of`` and
  nowhere else; the engine computes those tokens.
- A call never waits for the store: loads and saves run in threads of their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.connectors.coding import ChunkCoder
from cachegen.connectors.metrics import Counters
from cachegen.errors import (
    DtypeError,
    FormatError,
    GeometryError,
    InputError,
    KeyMismatchError,
    NonFiniteError,
    ProfileError,
    StoreError,
)
from cachegen.store.base import Store
from cachegen.store.keys import chunk_keys
from cachegen.stream.fetch import fetch_chunks
from cachegen.types import Array, ChunkKey

logger = logging.getLogger("vllm.cachegen")

DEFAULT_SLO_S = 2.0
DEFAULT_BACKLOG_BYTES = 1 << 30

# Which errors mean what; the first that fits counts.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (KeyMismatchError, "other key"),
    (ProfileError, "profile"),
    (FormatError, "damaged"),
    (GeometryError, "geometry"),
    (DtypeError, "geometry"),
    (NonFiniteError, "not finite"),
    (InputError, "damaged"),
    (StoreError, "store"),
    (TimeoutError, "store"),
    (OSError, "store"),
)


def reason_of(error: BaseException) -> str:
    """Return the reason that counters give for an error: here a bad entry becomes a miss."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return "error"


@dataclass(frozen=True)
class AdapterSettings:
    """What every engine's connector can be told.

    slo_s: a load that is not complete so many seconds after it was first wanted is given up.
    load_threads: requests that load at once. save_threads: chunks that are encoded at once.
    backlog_bytes: copies of blocks that may wait to be saved; what would go beyond is not saved.
    """

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    slo_s: float = DEFAULT_SLO_S
    load_threads: int = 4
    save_threads: int = 1
    backlog_bytes: int = DEFAULT_BACKLOG_BYTES


@dataclass(frozen=True)
class Piece:
    """The part of a request's cache that one chunk fills.

    index: of the chunk in the request. chain: its 32 bytes of ``chain_digests``.
    block_ids: blocks of the chunk, but for its first skip_blocks, which stay as they are.
    """

    index: int
    chain: bytes
    block_ids: tuple[int, ...]
    skip_blocks: int = 0


@dataclass(frozen=True)
class LoadJob:
    """Chunks to load for a request, in order. budget_s: time until its deadline."""

    request_id: str
    pieces: tuple[Piece, ...]
    budget_s: float


@dataclass(frozen=True)
class SaveJob:
    """Chunks of a request to save."""

    request_id: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LoadReport:
    """How a load ended. failed_block_ids: blocks that do not hold what was asked for."""

    request_id: str
    failed_block_ids: frozenset[int]
    reason: str | None


class BlockCopy(Protocol):
    """Blocks that were copied out of an engine's cache."""

    @property
    def size_bytes(self) -> int:
        """Memory that the copy takes."""

    @property
    def ready(self) -> Callable[[], list[Array]]:
        """Waits for the copy and returns the blocks of every layer."""


class BlockCache(Protocol):
    """The paged cache of an engine, see ``paged.PagedCache``."""

    def to_blocks(self, chunk: KVChunk) -> list[Array]:
        """Turn a chunk into the blocks of every layer. Raises: GeometryError."""

    def write_layer(
        self, layer: int, blocks: Array, block_ids: Sequence[int], *, skip_blocks: int = 0
    ) -> None:
        """Write one layer's blocks."""

    def finish_writes(self) -> None:
        """Wait until what this thread wrote is in the cache."""


class Fence:
    """Says whether a request's blocks may be written.

    ``close`` returns only when no write is under way, and none begins after it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Enter a write. Yields: False if the fence is closed: do not write then."""
        with self._lock:
            yield self._open

    def close(self) -> None:
        """Forbid all further writes."""
        with self._lock:
            self._open = False

    @property
    def is_open(self) -> bool:
        """False for good once closed."""
        return self._open


@dataclass
class _Load:
    job: LoadJob
    begin_s: float
    fence: Fence = field(default_factory=Fence)
    # Set by the thread: pieces that are whole in the cache, and how it ended.
    written: int = 0
    ended: bool = False
    reason: str | None = None


class Loader:
    """Loads chunks into a paged cache, in threads.

    namespace: 32 bytes of this rank. Every load that is started is reported exactly once.
    """

    def __init__(
        self,
        store: Store,
        cache: BlockCache,
        coder: ChunkCoder,
        *,
        namespace: bytes,
        settings: AdapterSettings,
        counters: Counters,
    ) -> None:
        self._store = store
        self._cache = cache
        self._coder = coder
        self._namespace = namespace
        self._settings = settings
        self._counters = counters
        self._loads: dict[str, _Load] = {}
        self._threads = ThreadPoolExecutor(settings.load_threads, "cachegen-load")

    def start(self, job: LoadJob) -> None:
        """Begin a load; its request must not have another one under way."""
        assert job.request_id not in self._loads, job.request_id
        load = _Load(job, time.monotonic())
        self._loads[job.request_id] = load
        self._threads.submit(self._run, load)

    def cancel(self, request_id: str) -> None:
        """Stop a load, if there is one; ``poll`` still reports it."""
        load = self._loads.get(request_id)
        if load is not None:
            load.reason = load.reason or "aborted"
            load.fence.close()

    def poll(self) -> list[LoadReport]:
        """Return the loads that have ended since the last call.

        A load that is late or cancelled ends here, whatever its thread is waiting for. After a
        load is returned nothing writes to its blocks any more.
        """
        now = time.monotonic()
        reports = []
        for load in list(self._loads.values()):
            late = now - load.begin_s > load.job.budget_s
            if not (load.ended or late or not load.fence.is_open):
                continue
            load.fence.close()
            if load.written < len(load.job.pieces):
                load.reason = load.reason or "late"
            reports.append(self._report(load, now))
            del self._loads[load.job.request_id]
        return reports

    def close(self) -> None:
        """Stop all loads; waits for no store."""
        for load in self._loads.values():
            load.fence.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _report(self, load: _Load, now: float) -> LoadReport:
        pieces = load.job.pieces
        count = self._counters.add
        count("loads_total")
        count("load_seconds_total", now - load.begin_s)
        reason = load.reason if load.written < len(pieces) else None
        if reason is not None:
            count("failed_loads_total", reason=reason)
            logger.info(
                "request %s: loaded %d of %d chunks: %s",
                load.job.request_id,
                load.written,
                len(pieces),
                reason,
            )
        failed = {block for piece in pieces[load.written :] for block in piece.block_ids}
        return LoadReport(load.job.request_id, frozenset(failed), reason)

    def _run(self, load: _Load) -> None:
        try:
            reason = self._load_pieces(load)
        except Exception as error:
            reason = reason_of(error)
            self._log_failure(load, error, reason)
        load.reason = load.reason or reason
        load.ended = True

    def _load_pieces(self, load: _Load) -> str | None:
        pieces = load.job.pieces
        chains = [piece.chain for piece in pieces]
        keys = chunk_keys(self._namespace, chains, self._coder.coding.label)
        if not load.fence.is_open:
            return "aborted"
        fetched = fetch_chunks(
            self._store, keys, self._coder.decode, quality=self._coder.coding.quality
        )
        for piece, item in zip(pieces, fetched, strict=False):
            self._counters.add("network_seconds_total", item.network_s)
            self._counters.add("decode_seconds_total", item.decode_s)
            self._counters.add("loaded_bytes_total", item.size_bytes)
            if item.chunk is None:
                return "absent"
            if item.chunk.tokens != self._settings.chunk_tokens:
                return "geometry"
            if not self._write(load, piece, item.chunk):
                return "aborted"
        return None

    def _write(self, load: _Load, piece: Piece, chunk: KVChunk) -> bool:
        """Write a chunk layer by layer; returns False when the fence was closed."""
        for layer, blocks in enumerate(self._cache.to_blocks(chunk)):
            with load.fence.writing() as allowed:
                if not allowed:
                    return False
                self._cache.write_layer(
                    layer, blocks, piece.block_ids, skip_blocks=piece.skip_blocks
                )
        self._cache.finish_writes()
        load.written += 1
        self._counters.add("loaded_tokens_total", chunk.tokens)
        return True

    def _log_failure(self, load: _Load, error: Exception, reason: str) -> None:
        index = min(load.written, len(load.job.pieces) - 1)
        name = self._name(load.job.pieces[index])
        logger.warning("request %s: chunk %s: %s", load.job.request_id, name, error)
        if reason in ("damaged", "other key", "geometry"):
            # So that the chunk that is computed instead can take its place.
            try:
                self._store.delete(name)
            except StoreError as failed:
                logger.warning("chunk %s cannot be deleted: %s", name, failed)

    def _name(self, piece: Piece) -> str:
        return chunk_keys(self._namespace, [piece.chain], self._coder.coding.label)[0].name


class Saver:
    """Encodes and stores copies of blocks, in threads, and drops what it cannot keep up with."""

    def __init__(
        self,
        store: Store,
        to_chunk: ToChunk,
        coder: ChunkCoder,
        *,
        namespace: bytes,
        settings: AdapterSettings,
        counters: Counters,
    ) -> None:
        self._store = store
        self._to_chunk = to_chunk
        self._coder = coder
        self._namespace = namespace
        self._settings = settings
        self._counters = counters
        self._lock = threading.Lock()
        self._backlog_bytes = 0
        self._threads = ThreadPoolExecutor(settings.save_threads, "cachegen-save", _yield_the_cpu)

    @property
    def has_room(self) -> bool:
        """False while so much waits that nothing more should be copied."""
        return self._backlog_bytes < self._settings.backlog_bytes

    def skip(self, reason: str) -> None:
        """Count a chunk that is not saved."""
        self._counters.add("skipped_saves_total", reason=reason)

    def submit(self, piece: Piece, copy: BlockCopy) -> None:
        """Take a copy of a whole chunk's blocks; returns at once."""
        with self._lock:
            self._backlog_bytes += copy.size_bytes
        self._threads.submit(self._run, piece, copy)

    def close(self, *, wait_s: float) -> None:
        """Finish what waits for at most wait_s seconds, then drop the rest."""
        end = time.monotonic() + wait_s
        while self._backlog_bytes and time.monotonic() < end:
            time.sleep(0.01)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, piece: Piece, copy: BlockCopy) -> None:
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

    def _save(self, piece: Piece, copy: BlockCopy) -> None:
        (key,) = chunk_keys(self._namespace, [piece.chain], self._coder.coding.label)
        if self._store.exists([key.name])[0]:
            self.skip("stored already")
            return
        tokens = self._settings.chunk_tokens
        chunk = self._to_chunk(copy.ready(), first_position=piece.index * tokens)
        data = self._coder.encode(chunk, key)
        self._store.put(key.name, data)
        self._counters.add("saved_chunks_total")
        self._counters.add("saved_tokens_total", chunk.tokens)
        self._counters.add("saved_bytes_total", len(data))


class ToChunk(Protocol):
    """Turns the blocks of every layer into a chunk."""

    def __call__(self, blocks: list[Array], *, first_position: int) -> KVChunk:
        """Return the chunk. Raises: GeometryError."""


def names_of(
    namespaces: Sequence[bytes], chain: bytes, coder_label: dict[str, object]
) -> list[str]:
    """Return the names of a chunk's objects, one per rank's namespace; a hit needs all of them."""
    keys: list[ChunkKey] = [
        chunk_keys(namespace, [chain], coder_label)[0] for namespace in namespaces
    ]
    return [key.name for key in keys]


def _yield_the_cpu() -> None:
    """Let the engine's threads go first: saving is never urgent."""
    import os

    if hasattr(os, "setpriority"):
        # Linux gives every thread a niceness of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
