"""Loading chunks into an engine's paged cache, whatever the engine; ``saver`` goes the other way.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachegen.chunk import KVChunk
from cachegen.connectors.coding import ChunkCoder, Coding
from cachegen.connectors.device_blocks import DeviceBlocks
from cachegen.connectors.metrics import Counters
from cachegen.errors import DtypeError, GeometryError, NonFiniteError, StoreError
from cachegen.settings import Settings
from cachegen.store.base import Store
from cachegen.store.keys import chunk_keys
from cachegen.stream.fetch import Fetcher, FetchHandle
from cachegen.stream.outcome import FetchedChunk, FetchReport, Reason
from cachegen.stream.outcome import reason_of as fetch_reason
from cachegen.stream.plan import Policy
from cachegen.stream.policies import DeadlinePolicy, FixedPolicy, get_policy

logger = logging.getLogger("vllm.cachegen")

# Entries that are of no use to anybody: they make room for a good one.
_USELESS = ("damaged", "other_key", "geometry")


def reason_of(error: Exception) -> str:
    """Return the reason that counters give for an error: here a bad entry becomes a miss."""
    if isinstance(error, (GeometryError, DtypeError)):
        return "geometry"
    if isinstance(error, NonFiniteError):
        return "not_finite"
    return fetch_reason(error, Reason.CALLBACK_ERROR).value


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


class BlockCache(Protocol):
    """The paged cache of an engine, see ``paged.PagedCache``."""

    def room(self, tokens: int) -> DeviceBlocks | None:
        """Return memory on the GPU to decode a chunk to, or None to decode on the host."""

    def to_blocks(self, chunk: KVChunk | DeviceBlocks) -> list[Any]:
        """Turn a chunk into the blocks of every layer. Raises: GeometryError."""

    def write_layer(
        self, layer: int, blocks: Any, block_ids: Sequence[int], *, skip_blocks: int = 0
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
    handle: FetchHandle | None = None
    # Pieces that are whole in the cache.
    written: int = 0
    is_cancelled: bool = False


class Loader:
    """Loads chunks into a paged cache, in threads of a ``Fetcher``.

    namespace: 32 bytes of this rank. Every load that is started is reported exactly once.
    """

    def __init__(
        self,
        store: Store,
        cache: BlockCache,
        coder: ChunkCoder,
        *,
        namespace: bytes,
        settings: Settings,
        counters: Counters,
    ) -> None:
        self._store = store
        self._cache = cache
        self._coder = coder
        self._namespace = namespace
        self._settings = settings
        self._counters = counters
        self._loads: dict[str, _Load] = {}
        self._fetcher = Fetcher(store, readers=settings.load_threads)
        self._policy = policy_of(settings, coder.coding)
        self._mender = ThreadPoolExecutor(1, "cachegen-mend")

    def start(self, job: LoadJob) -> None:
        """Begin a load; its request must not have another one under way."""
        assert job.request_id not in self._loads, job.request_id
        load = _Load(job, time.monotonic())
        self._loads[job.request_id] = load
        chains = [piece.chain for piece in job.pieces]
        load.handle = self._fetcher.request(
            chunk_keys(self._namespace, chains, self._coder.coding.label),
            policy=self._policy,
            deadline_s=job.budget_s,
            quality=self._coder.coding.quality,
            decode=self._decode,
            deliver=lambda item: self._write(load, item),
            fence=lambda: load.fence.is_open,
        )

    def cancel(self, request_id: str) -> None:
        """Stop a load, if there is one; ``poll`` still reports it."""
        load = self._loads.get(request_id)
        if load is not None:
            load.is_cancelled = True

    def poll(self) -> list[LoadReport]:
        """Return the loads that have ended since the last call.

        A load that is late or cancelled ends here, whatever its threads are waiting for. After a
        load is returned nothing writes to its blocks any more.
        """
        now = time.monotonic()
        reports = []
        for load in list(self._loads.values()):
            assert load.handle is not None
            late = now - load.begin_s > load.job.budget_s
            if not (load.handle.is_over or late or load.is_cancelled):
                continue
            load.fence.close()
            fetched = load.handle.report()
            load.handle.cancel()
            reports.append(self._report(load, fetched, now - load.begin_s))
            del self._loads[load.job.request_id]
        return reports

    def close(self) -> None:
        """Stop all loads; waits for no store."""
        for load in self._loads.values():
            load.fence.close()
        self._fetcher.close()
        self._mender.shutdown(wait=False, cancel_futures=True)

    def _decode(self, data: bytes, item: FetchedChunk) -> Any:
        room = self._cache.room(self._settings.chunk_tokens)
        return self._coder.decode(data, item.key, profile=item.profile, room=room)

    def _write(self, load: _Load, item: FetchedChunk) -> None:
        """Write a chunk layer by layer, as long as the fence is open."""
        chunk, piece = item.chunk, load.job.pieces[item.index]
        assert chunk is not None and item.index == load.written
        if chunk.tokens != self._settings.chunk_tokens:
            raise GeometryError(
                "tokens of a stored chunk", got=chunk.tokens, expected=self._settings.chunk_tokens
            )
        for layer, blocks in enumerate(self._cache.to_blocks(chunk)):
            with load.fence.writing() as allowed:
                if not allowed:
                    return
                self._cache.write_layer(
                    layer, blocks, piece.block_ids, skip_blocks=piece.skip_blocks
                )
        self._cache.finish_writes()
        load.written += 1

    def _report(self, load: _Load, fetched: FetchReport, seconds: float) -> LoadReport:
        pieces = load.job.pieces
        count = self._counters.add
        count("loads_total")
        count("load_seconds_total", seconds)
        count("loaded_bytes_total", fetched.wire_bytes)
        count("loaded_tokens_total", load.written * self._settings.chunk_tokens)
        for item in fetched.chunks:
            count("network_seconds_total", item.network_s)
            count("decode_seconds_total", item.decode_s)
        failed = {block for piece in pieces[load.written :] for block in piece.block_ids}
        reason = self._reason(load, fetched) if failed else None
        if reason is not None:
            count("failed_loads_total", reason=reason)
            logger.info(
                "request %s: %d of %d chunks loaded: %s: %s",
                load.job.request_id,
                load.written,
                len(pieces),
                reason,
                fetched.error or "no error",
            )
        return LoadReport(load.job.request_id, frozenset(failed), reason)

    def _reason(self, load: _Load, fetched: FetchReport) -> str:
        """Say why a load stopped where it did."""
        if load.is_cancelled:
            return Reason.CANCELLED.value
        if len(fetched.chunks) <= load.written:
            return Reason.LATE.value
        item = fetched.chunks[load.written]
        reason = item.reason.value if item.error is None else reason_of(item.error)
        if reason in _USELESS:
            self._mender.submit(self._delete, item.key.name)
        # A fence that closed first is ours: the load was late.
        return Reason.LATE.value if item.reason in (Reason.LOADED, Reason.FENCED) else reason

    def _delete(self, name: str) -> None:
        try:
            self._store.delete(name)
        except StoreError as error:
            logger.warning("chunk %s cannot be deleted: %s", name, error)


def policy_of(settings: Settings, coding: Coding) -> Policy:
    """Return the planner of loads: an engine recomputes what does not come, after the load."""
    if coding.quality is None:
        return FixedPolicy()
    if settings.policy == DeadlinePolicy().name:
        return DeadlinePolicy(recompute="never")
    return get_policy(settings.policy)


def names_of(
    namespaces: Sequence[bytes], chain: bytes, coder_label: dict[str, object]
) -> list[str]:
    """Return the names of a chunk's objects, one per rank's namespace; a hit needs all of them."""
    keys = (chunk_keys(namespace, [chain], coder_label)[0] for namespace in namespaces)
    return [key.name for key in keys]
