"""What a user can tell the vLLM connector through ``kv_connector_extra_config``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cachegen.connectors.adapter import AdapterSettings
from cachegen.connectors.coding import Coding
from cachegen.errors import ConfigError


@dataclass(frozen=True)
class ConnectorSettings:
    """Settings of the connector.

    store: URL of ``open_store``. quality: a named level or ``"lossless"``; codec: another codec
    than the quality's. profile: False to code without profiles. slo_s, chunk_tokens and the rest:
    see ``AdapterSettings``.
    """

    store: str
    quality: str = "balanced"
    codec: str | None = None
    profile: bool = True
    chunk_tokens: int = AdapterSettings.chunk_tokens
    slo_s: float = AdapterSettings.slo_s
    load_threads: int = AdapterSettings.load_threads
    save_threads: int = AdapterSettings.save_threads
    backlog_bytes: int = AdapterSettings.backlog_bytes

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ConnectorSettings:
        """Read the mapping a user gave. Raises: ConfigError."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                raise ConfigError(
                    "setting of kv_connector_extra_config",
                    got=name,
                    expected=", ".join(names),
                    remedy=f"did you mean {close[0]}?" if close else None,
                )
        if not values.get("store"):
            raise ConfigError(
                "store in kv_connector_extra_config",
                got=values.get("store"),
                expected="a URL such as redis://host:6379",
            )
        settings = cls(**values)
        if settings.store.startswith("memory:"):
            raise ConfigError(
                "store",
                got=settings.store,
                expected="one that several processes can reach",
                remedy="vLLM's scheduler and workers are processes of their own: use file:///folder",
            )
        for name in ("chunk_tokens", "load_threads", "save_threads", "backlog_bytes"):
            if int(getattr(settings, name)) < 1:
                raise ConfigError(name, got=getattr(settings, name), expected="at least 1")
        if not settings.slo_s > 0:
            raise ConfigError("slo_s", got=settings.slo_s, expected="more than 0 seconds")
        return settings

    @property
    def coding(self) -> Coding:
        """How chunks are coded. Raises: ConfigError, UnknownCodecError."""
        return Coding.choose(self.quality, codec=self.codec)

    @property
    def adapter(self) -> AdapterSettings:
        """The part that is the same for every engine."""
        return AdapterSettings(
            chunk_tokens=int(self.chunk_tokens),
            slo_s=float(self.slo_s),
            load_threads=int(self.load_threads),
            save_threads=int(self.save_threads),
            backlog_bytes=int(self.backlog_bytes),
        )
