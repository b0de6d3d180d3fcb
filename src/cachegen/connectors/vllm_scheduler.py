"""What the connector does in vLLM's scheduler."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cachegen.connectors import vllm_model
from cachegen.connectors.adapter import logger
from cachegen.connectors.coding import Coding
from cachegen.connectors.lookup import Lookup, Seed
from cachegen.connectors.metrics import Counters
from cachegen.connectors.tracker import Tracker
from cachegen.settings import Settings
from cachegen.store.open import open_store

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


# In the ``kv_transfer_params`` of a request: false to load or to save nothing of it.
LOAD, SAVE = "cachegen.load", "cachegen.save"


class SchedulerSide:
    """Looks requests up, follows them and plans the workers' loads and saves."""

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
        self.tracker.add(
            request.request_id,
            request.all_token_ids,
            seed,
            loads=self._wants(request, LOAD),
            saves=self._wants(request, SAVE),
        )

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

    @staticmethod
    def _wants(request: Request, name: str) -> bool:
        """Read one of a request's own switches; whatever is not false is true."""
        return (request.kv_transfer_params or {}).get(name) is not False

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
