"""What the connector does in a worker of vLLM."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from cachegen.connectors import vllm_model
from cachegen.connectors.adapter import Loader
from cachegen.connectors.coding import ChunkCoder, Coding, profiles_of
from cachegen.connectors.metrics import Counters
from cachegen.connectors.paged import PagedCache
from cachegen.connectors.saver import Saver
from cachegen.connectors.tracker import Plan
from cachegen.connectors.vllm_blocks import paged_cache
from cachegen.settings import Settings
from cachegen.store.open import open_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A server that stops does not wait longer than this for chunks that are still to be stored.
CLOSE_WAIT_S = 5.0


class WorkerSide:
    """Loads and saves the blocks of one rank."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: Settings,
        rank: vllm_model.Rank,
        counters: Counters,
    ) -> None:
        self._vllm_config = vllm_config
        self._settings = settings
        self._rank = rank
        self._counters = counters
        self._cache: PagedCache | None = None
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._released: set[str] = set()
        self._computes = False
        self._failed_blocks: set[int] = set()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Recognise the cache's layout and get ready. Raises: UnsupportedModelError."""
        rank, settings = self._rank, self._settings
        cache = paged_cache(kv_caches, self._vllm_config, geometry=rank.geometry)
        store = open_store(settings.store or "")
        coding = Coding.choose(settings.quality, codec=settings.codec)
        coder = ChunkCoder(coding, profiles_of(settings.profile, store, rank.namespace))

        def to_chunk(blocks: list[Any], *, first_position: int) -> Any:
            return cache.to_chunk(blocks, first_position=first_position, rope=rank.rope)

        self._cache = cache
        self._loader = Loader(
            store,
            cache,
            coder,
            namespace=rank.namespace,
            settings=settings,
            counters=self._counters,
        )
        self._saver = Saver(
            store,
            to_chunk,
            coder,
            namespace=rank.namespace,
            settings=settings,
            counters=self._counters,
            # A decode engine waits for what a producer saves.
            waits=self._vllm_config.kv_transfer_config.is_kv_consumer,
        )

    def begin_step(self, plan: Plan, *, computes: bool) -> None:
        """Take note that a step begins; it may have got blocks that earlier ones staged."""
        self._computes = computes
        if self._saver is not None:
            self._saver.note_step(begins=True, computes=computes)
        self.finish_copies(plan.given_blocks)

    def finish_copies(self, block_ids: Collection[int] | None = None) -> None:
        """Wait until staged blocks, all or these, may be overwritten."""
        if self._cache is not None and self._cache.is_copying:
            begin = time.monotonic()
            self._cache.finish_copies(block_ids)
            self._counters.add("stage_seconds_total", time.monotonic() - begin)

    def start_loads(self, plan: Plan) -> None:
        """Stop the loads of requests that ended and begin new ones."""
        if self._loader is None:
            return
        for request_id in plan.cancelled:
            self._loader.cancel(request_id)
        for job in plan.loads:
            self._loader.start(job)

    def stage_saves(self, plan: Plan) -> None:
        """Begin to copy blocks that are to be saved; nothing else happens within the step."""
        self._released.update(plan.released)
        if self._saver is not None:
            self._saver.note_step(begins=False, computes=self._computes)
        if self._saver is None or self._cache is None or not plan.saves:
            return
        begin = time.monotonic()
        for job in plan.saves:
            for piece in job.pieces:
                if not self._saver.has_room:
                    self._saver.skip("backlog")
                    continue
                copy = self._cache.stage(piece.block_ids)
                self._counters.add("staged_bytes_total", copy.size_bytes)
                self._saver.submit(piece, copy)
        self._counters.add("stage_seconds_total", time.monotonic() - begin)

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Return requests whose blocks are copied, and requests whose loads have ended."""
        released, self._released = self._released, set()
        loaded = set()
        for report in self._loader.poll() if self._loader is not None else ():
            loaded.add(report.request_id)
            self._failed_blocks |= report.failed_block_ids
        return released or None, loaded or None

    def take_failed_blocks(self) -> set[int]:
        """Return blocks that loads left unfilled, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        """Stop loading at once and saving soon."""
        if self._loader is not None:
            self._loader.close()
        if self._saver is not None:
            self._saver.close(wait_s=CLOSE_WAIT_S)
        if self._cache is not None:
            self._cache.close()
