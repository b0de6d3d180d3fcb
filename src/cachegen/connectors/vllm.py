"""``CacheGenConnector``: vLLM loads prompts' KV from a store and saves what it computes.

A thin face: the scheduler side feeds a ``Tracker``, the worker side a ``Loader`` and a ``Saver``.
Loads are asynchronous. Saves copy blocks out in a thread, which a step waits for only where it was
given one of them, and do the rest in another, so that no block has to be held but at the end of a
request whose last chunk became known late.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from cachegen.connectors import vllm_model
from cachegen.connectors.exporter import Publisher
from cachegen.connectors.metrics import Counters
from cachegen.connectors.tracker import Plan, Step
from cachegen.connectors.vllm_scheduler import SchedulerSide
from cachegen.connectors.vllm_stats import CacheGenPromMetrics, CacheGenStats
from cachegen.connectors.vllm_worker import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class CacheGenMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers of a step. computes: whether the model runs in it."""

    plan: Plan = field(default_factory=Plan)
    computes: bool = True


class CacheGenConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's connector to the stores of this library; see docs/vllm.md for its settings."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = vllm_model.settings_of(transfer.kv_connector_extra_config)
        self._counters = Counters()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        ranks = vllm_model.all_ranks(vllm_config, chunk_tokens=settings.chunk_tokens)
        vllm_model.check_groups(kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, settings, ranks, self._counters)
        else:
            rank = ranks[vllm_model.rank_index(vllm_config)]
            self._worker = WorkerSide(vllm_config, settings, rank, self._counters)
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
        return CacheGenMetadata(plan, scheduler_output.total_num_scheduled_tokens > 0)

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

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Wait until blocks that were given to others are copied."""
        metadata = kv_connector_metadata
        known = isinstance(metadata, CacheGenMetadata)
        self._at_worker().finish_copies(metadata.plan.given_blocks if known else None)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take the plan of a step that begins."""
        super().bind_connector_metadata(connector_metadata)
        metadata = self._metadata()
        self._at_worker().begin_step(metadata.plan, computes=metadata.computes)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the loads of this step, in threads."""
        self._at_worker().start_loads(self._metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: requests that load do not run."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: chunks are saved when they are whole, see ``wait_for_save``."""

    def wait_for_save(self) -> None:
        """Begin to copy the blocks of chunks that this step completed."""
        self._at_worker().stage_saves(self._metadata().plan)

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

    def _at_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    def _at_worker(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    def _metadata(self) -> CacheGenMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, CacheGenMetadata)
        return metadata


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
