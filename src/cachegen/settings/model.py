"""The settings themselves: names, meanings, defaults, and how each value is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cachegen.chunk import DEFAULT_CHUNK_TOKENS
from cachegen.errors import ConfigError
from cachegen.units import parse_seconds, parse_size

DEFAULT = "default"


@dataclass(frozen=True)
class Settings:
    """What a connector can be told; survives JSON through ``config`` and ``from_config``.

    store: URL of a store (``cachegen.open_store``), None for a connector that does nothing.
    quality: how much of a stored chunk is read: ``"balanced"``, ``"lossless"`` and the like.
    codec: name of the codec that writes, None for the one that fits the quality.
    profile: ``"auto"`` to learn one and keep it in the store, ``"none"``, or a file.
    policy: which planner decides what to load. slo_s: seconds by which a request's KV must be
        there; what is not is computed.
    chunk_tokens: tokens of a chunk; with another number all keys are others.
    save: False to only load. save_decode: also save tokens that were generated.
    save_tail: also save the last chunk of a prompt although it is not whole.
    min_hit_tokens: hits of fewer tokens are not loaded.
    tenant: salt that keeps the keys of tenants apart.
    load_threads, save_threads: calls at once. backlog_bytes: copies that may wait to be saved.
    metrics_folder: where a connector leaves its counters for ``cachegen exporter``; None: nowhere.
    sources: for each field that was set, where; see ``source``.
    notes: what was said and has no effect, with the reason.
    Raises: ConfigError for a value that cannot work.
    """

    store: str | None = None
    quality: str = "balanced"
    codec: str | None = None
    profile: str = "auto"
    policy: str = "deadline"
    slo_s: float = 2.0
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    save: bool = True
    save_decode: bool = True
    save_tail: bool = False
    min_hit_tokens: int = 0
    tenant: str = ""
    load_threads: int = 4
    save_threads: int = 1
    backlog_bytes: int = 1 << 30
    metrics_folder: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise self._bad(name, f"at least {least}")
        if not (math.isfinite(self.slo_s) and self.slo_s > 0):
            raise self._bad("slo_s", "seconds above 0")

    def source(self, name: str) -> str:
        """Say where the value of a field is from, such as ``"environment: CACHEGEN_STORE"``."""
        return self.sources.get(name, DEFAULT)

    def config(self) -> dict[str, Any]:
        """Return the values as plain JSON, without their sources."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Build from what ``config`` returned. Raises: ConfigError."""
        for name in config:
            if name not in NAMES:
                raise ConfigError("setting", got=name, expected=", ".join(NAMES))
        return cls(**{name: read(name, value, "config") for name, value in config.items()})

    def _bad(self, name: str, expected: str) -> ConfigError:
        return ConfigError(
            f"setting {name} ({self.source(name)})", got=getattr(self, name), expected=expected
        )


NAMES = tuple(entry.name for entry in fields(Settings) if entry.compare)
_LEAST = {
    "chunk_tokens": 1,
    "min_hit_tokens": 0,
    "load_threads": 1,
    "save_threads": 1,
    "backlog_bytes": 1,
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NONE = ("", "none", "null")


def read(name: str, value: object, source: str) -> Any:
    """Read the value of a setting, typed or as text: ``1.5`` or ``"1500ms"``, ``"2GiB"``.

    Raises: ConfigError that names the setting and the source.
    """
    reader = _READERS[name]
    try:
        return reader(value)
    except (ValueError, TypeError, OverflowError) as error:
        expected = _EXPECTED[reader]
        if isinstance(error, ConfigError) and error.expected is not None:
            expected = str(error.expected)
        raise ConfigError(
            f"setting {name} ({source})", got=repr(value), expected=expected
        ) from None


def read_bool(value: object) -> bool:
    """Read true or false, also as yes, no, on, off, 1 or 0. Raises: ValueError."""
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(text)
    return text in _TRUE


def read_float(value: object) -> float:
    """Read a number. Raises: ValueError, TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TypeError
    return str(value).strip()


def _optional_text(value: object) -> str | None:
    text = "" if value is None else _text(value)
    return None if text.lower() in _NONE else text


def _named(value: object) -> str:
    text = _text(value)
    if not text:
        raise ValueError
    return text


def _count(value: object) -> int:
    number = read_float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _seconds(value: object) -> float:
    return parse_seconds(value) if isinstance(value, str) else read_float(value)


def _size(value: object) -> int:
    return parse_size(value) if isinstance(value, str) else _count(value)


_EXPECTED: dict[Callable[[object], Any], str] = {
    _optional_text: "text",
    _text: "text",
    _named: "text",
    _count: "a whole number",
    _seconds: "seconds",
    _size: "bytes",
    read_bool: "true or false",
}
_READERS: dict[str, Callable[[object], Any]] = {
    "store": _optional_text,
    "quality": _named,
    "codec": _optional_text,
    "profile": _named,
    "policy": _named,
    "slo_s": _seconds,
    "chunk_tokens": _count,
    "save": read_bool,
    "save_decode": read_bool,
    "save_tail": read_bool,
    "min_hit_tokens": _count,
    "tenant": _text,
    "load_threads": _count,
    "save_threads": _count,
    "backlog_bytes": _size,
    "metrics_folder": _optional_text,
}
