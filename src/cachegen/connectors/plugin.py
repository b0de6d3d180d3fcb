"""The entry point that makes ``CacheGenConnector`` known to vLLM by name."""

from __future__ import annotations

NAME = "CacheGenConnector"


def register() -> None:
    """Register the connector; vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "cachegen.connectors.vllm", NAME)
