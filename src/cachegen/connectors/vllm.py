"""``CacheGenConnector``: vLLM loads prompts' KV from a store and saves what it computes.

A thin face: the scheduler side feeds a ``Tracker``, the worker side a ``Loader`` and a ``Saver``.
Loads are asynchronous, saves copy blocks out within the step and do the rest in a thread, so that
no block has to be held but at the end of a request whose last chunk became known late.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from cachegen.connectors import vllm_model
from cachegen.connectors.adapter import Loader, Saver, logger
from cachegen.connectors.coding import ChunkCoder, Coding, profiles_of
from cachegen.connectors.exporter import Publisher
from cachegen.connectors.lookup import Lookup, Seed
from cachegen.connectors.metrics import Counters
from cachegen.connectors.paged import PagedCache
from cachegen.connectors.tracker import Plan, Step, Tracker
from cachegen.connectors.vllm_blocks import paged_cache
from cachegen.connectors.vllm_stats import CacheGenPromMetrics, CacheGenStats
from cachegen.settings import Settings
from cachegen.store.open import open_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# A server that stops does not wait longer than this for chunks that are still to be stored.
CLOSE_WAIT_S = 5.0


@dataclass
class CacheGenMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers of a step."""

    plan: Plan = field(default_factory=Plan)


class CacheGenConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's connector to the stores of this library; see docs/vllm.md for its settings."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = vllm_model.settings_of(transfer.kv_connector_extra_config)
        self._counters = Counters()
        self._scheduler: _SchedulerSide | None = None
        self._worker: _WorkerSide | None = None
        ranks = vllm_model.all_ranks(vllm_config, chunk_tokens=settings.chunk_tokens)
        vllm_model.check_groups(kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = _SchedulerSide(vllm_config, settings, ranks, self._counters)
        else:
            rank = ranks[vllm_model.rank_index(vllm_config)]
            self._worker = _WorkerSide(vllm_config, settings, rank, self._counters)
        folder = settings.metrics_folder
        self._publisher = Publisher(self._counters, folder) if folder else None

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a chunk that is not saved is only a later miss."""
        return False

    # What vLLM calls in the scheduler.

    def on_new_request(self, request: Request) -> None:
        """Begin to look a request up."""
        self._at_scheduler().add(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how many tokens can be loaded: (None, False) while unknown, (0, False) for a miss."""
        return self._at_scheduler().matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        """Take note of a request's blocks; plans the load of num_external_tokens tokens."""
        ids = blocks.get_block_ids()[0] if blocks.blocks else []
        self._at_scheduler().tracker.allocated(request.request_id, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Plan the workers' loads and saves of a step."""
        plan = self._at_scheduler().tracker.plan(_steps(scheduler_output))
        return CacheGenMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of blocks that workers could not fill."""
        self._at_scheduler().tracker.failed_blocks(connector_output.invalid_block_ids or ())

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """End a request; True if its blocks must stay until workers have copied them."""
        return self._at_scheduler().finished(request, block_ids), None

    # What vLLM calls in the workers.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the paged cache of this rank."""
        self._at_worker().register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take the plan of a step that begins."""
        super().bind_connector_metadata(connector_metadata)
        self._at_worker().begin_step()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads of this step, in threads."""
        self._at_worker().start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: requests that load do not run."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: chunks are saved when they are whole, see ``wait_for_save``."""

    def wait_for_save(self) -> None:
        """Copy the blocks of chunks that this step completed."""
        self._at_worker().stage_saves(self._plan())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report requests whose held blocks are free, and requests whose loads have ended."""
        return self._at_worker().finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report the blocks that the loads which were just reported left unfilled."""
        return self._at_worker().take_failed_blocks()

    # Both sides.

    def get_kv_connector_stats(self) -> CacheGenStats | None:
        """Return what was counted since the last call."""
        counted = self._counters.drain()
        return CacheGenStats(data=counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheGenStats:
        """Rebuild statistics that came from another process."""
        return CacheGenStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> CacheGenPromMetrics:
        """Register the counters with vLLM's Prometheus endpoint."""
        return CacheGenPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Finish what is being saved, for a few seconds at most, and stop all threads."""
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
        if self._publisher is not None:
            self._publisher.close()

    def _at_scheduler(self) -> _SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def _at_worker(self) -> _WorkerSide:
        assert self._worker is not None
        return self._worker

    def _plan(self) -> Plan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, CacheGenMetadata)
        return metadata.plan


class _SchedulerSide:
    def __init__(
        self,
        vllm_config: VllmConfig,
        settings: Settings,
        ranks: list[vllm_model.Rank],
        counters: Counters,
    ) -> None:
        transfer = vllm_config.kv_transfer_config
        coding = Coding.choose(settings.quality, codec=settings.codec)
        lookup = Lookup(
            open_store(settings.store or ""),
            coding,
            namespaces=[rank.namespace for rank in ranks],
            settings=settings,
            counters=counters,
        )
        self.tracker = Tracker(
            lookup,
            block_tokens=vllm_config.cache_config.block_size,
            settings=settings,
            counters=counters,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer and settings.save,
            is_exact=coding.is_exact,
        )
        self._lookup = lookup
        self._settings = settings
        self._loras: dict[tuple[str, str], bytes] = {}
        if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "recompute":
            logger.warning(
                "kv_load_failure_policy=%s: a chunk that cannot be loaded fails its request; "
                "set it to recompute",
                transfer.kv_load_failure_policy,
            )

    def add(self, request: Request) -> None:
        """Follow a request, if its KV depends on tokens alone."""
        if self.tracker.knows(request.request_id):
            return
        if request.prompt_embeds is not None:
            logger.info("request %s: not stored: prompt embeddings", request.request_id)
            return
        try:
            seed = Seed(
                lora=self._lora(request.lora_request),
                tenant=self._tenant(request.cache_salt),
                multimodal=tuple(item.identifier.encode() for item in request.mm_features),
            )
        except OSError as error:
            logger.warning("request %s: not stored: %s", request.request_id, error)
            return
        self.tracker.add(request.request_id, request.all_token_ids, seed)

    def matched(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Answer vLLM's question for tokens beyond local_tokens."""
        # Before 0.32 there is no on_new_request.
        self.add(request)
        tokens = self.tracker.matched(request.request_id, local_tokens)
        return tokens, bool(tokens)

    def finished(self, request: Request, block_ids: list[int]) -> bool:
        """End a request; see ``Tracker.finish``."""
        from vllm.v1.request import RequestStatus

        complete = request.status in (
            RequestStatus.FINISHED_STOPPED,
            RequestStatus.FINISHED_LENGTH_CAPPED,
        )
        # The last sampled token was never run through the model.
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        computed = min(request.num_computed_tokens - in_flight, request.num_tokens - 1)
        return self.tracker.finish(
            request.request_id, block_ids, computed=computed, is_complete=complete
        )

    def close(self) -> None:
        """Stop looking up."""
        self._lookup.close()

    def _tenant(self, salt: str | None) -> bytes:
        """Join the tenant of the settings and the salt of the request, unambiguously."""
        parts = (self._settings.tenant, salt or "")
        return json.dumps(parts).encode() if any(parts) else b""

    def _lora(self, lora_request: Any) -> bytes:
        if lora_request is None:
            return b""
        key = (lora_request.lora_name, lora_request.lora_path)
        if key not in self._loras or getattr(lora_request, "load_inplace", False):
            self._loras[key] = vllm_model.lora_digest(lora_request)
        return self._loras[key]


class _WorkerSide:
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

    def begin_step(self) -> None:
        """Take note that a step begins."""
        if self._saver is not None:
            self._saver.note_step(begins=True)

    def start_loads(self, plan: Plan) -> None:
        """Stop the loads of requests that ended and begin new ones."""
        if self._loader is None:
            return
        for request_id in plan.cancelled:
            self._loader.cancel(request_id)
        for job in plan.loads:
            self._loader.start(job)

    def stage_saves(self, plan: Plan) -> None:
        """Copy blocks that are to be saved; nothing else happens within the step."""
        self._released.update(plan.released)
        if self._saver is not None:
            self._saver.note_step(begins=False)
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


def _steps(output: SchedulerOutput) -> Iterator[Step]:
    """Read the shares of requests off a step of vLLM."""
    scheduled = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        count = scheduled.get(new.req_id, 0)
        yield Step(new.req_id, new.block_ids[0], new.num_computed_tokens, count)
    cached = output.scheduled_cached_reqs
    for index, request_id in enumerate(cached.req_ids):
        added = cached.new_block_ids[index]
        yield Step(
            request_id,
            added[0] if added else (),
            cached.num_computed_tokens[index],
            scheduled.get(request_id, 0),
            is_more=request_id not in cached.resumed_req_ids,
        )
