"""The connector's counters in vLLM's own logs and on its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from cachegen.connectors.metrics import FAMILIES, PREFIX, merge, split, summary


class CacheGenStats(KVConnectorStats):  # type: ignore[misc]
    """What was counted in an interval; data is a snapshot of ``metrics.Counters``."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval or another rank."""
        self.data = merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the few figures that vLLM logs."""
        return dict(summary(self.data))

    def is_empty(self) -> bool:
        """True if nothing was counted."""
        return not self.data


class CacheGenPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same counters for Prometheus, one per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._families = {
            name: self._counter_cls(
                name=f"vllm:{PREFIX}{name.removesuffix('_total')}",
                documentation=text,
                labelnames=[*labelnames, *([label] if label else [])],
            )
            for name, (label, text) in FAMILIES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counts of one engine."""
        values = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.items():
            name, reason = split(key)
            labels = [*values, *([reason] if reason else [])]
            self._families[name].labels(*labels).inc(amount)
