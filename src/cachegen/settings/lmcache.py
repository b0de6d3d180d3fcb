"""LMCache's names for settings, and what they mean here.

Source: LMCache's documentation, "Configuring LMCache" (names, units and defaults).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from cachegen.errors import ConfigError
from cachegen.settings.model import read_bool, read_float

ENV_PREFIX = "LMCACHE_"
CONFIG_FILE = "LMCACHE_CONFIG_FILE"


@dataclass(frozen=True)
class Said:
    """A value as it was said. source: where. rank: 0 flag, 1 environment, 2 file."""

    value: Any
    source: str
    rank: int


# The same thing under another name.
_RENAMED = {
    "chunk_size": "chunk_tokens",
    "save_decode_cache": "save_decode",
    "save_unfull_chunk": "save_tail",
    "min_retrieve_tokens": "min_hit_tokens",
}
# Together these make the URL of a store.
_STORE = ("local_cpu", "max_local_cpu_size", "local_disk", "max_local_disk_size", "remote_url")
_SERDES = {"naive": "raw", "cachegen": "cachegen"}
# Switches for what a connector here does not do: fine when off, an error when on.
_SWITCHES = (
    "enable_blending",
    "enable_controller",
    "enable_p2p",
    "enable_pd",
    "use_layerwise",
)
# How LMCache manages its own memory, threads and servers; nothing here depends on it.
_WITHOUT_EFFECT = (
    "blend_check_layers",
    "blend_min_tokens",
    "blend_recompute_ratios",
    "blend_special_str",
    "blocking_timeout_secs",
    "cache_policy",
    "enable_async_loading",
    "enable_lazy_memory_allocator",
    "external_lookup_client",
    "extra_config",
    "internal_api_server_enabled",
    "internal_api_server_host",
    "internal_api_server_port_start",
    "lmcache_instance_id",
    "local_cpu_use_hugepages",
    "lookup_timeout_ms",
    "numa_mode",
    "pre_caching_hash_algorithm",
    "priority_limit",
    "py_enable_gc",
    "reserve_local_cpu_size",
)
NAMES = (*_RENAMED, *_STORE, "remote_serde", *_SWITCHES, *_WITHOUT_EFFECT)

# What LMCache takes where only the switch is given, in GiB.
_DEFAULT_CPU_GIB = 5.0
_DIRECT_SCHEMES = frozenset(
    {"redis", "rediss", "redis+cluster", "rediss+cluster", "s3", "gs", "az", "file", "memory"}
)


def translate(said: Mapping[str, Said], notes: MutableSequence[str]) -> dict[str, Said]:
    """Turn what was said in LMCache's names into settings of ours.

    notes: gets a line for everything that has no effect here.
    Returns: by our names, each with the strongest rank that had a part in it.
    Raises: ConfigError for what cannot be done here.
    """
    values: dict[str, Said] = {}
    for name, entry in said.items():
        if name in _RENAMED:
            values[_RENAMED[name]] = entry
        elif name in _SWITCHES:
            if _typed(name, entry, read_bool):
                raise ConfigError(
                    f"{name} ({entry.source})",
                    got=entry.value,
                    expected="false",
                    remedy="this connector cannot do that; use LMCache for it",
                )
        elif name in _WITHOUT_EFFECT:
            notes.append(f"{entry.source} has no effect here")
    if "remote_serde" in said:
        entry = said["remote_serde"]
        serde = str(entry.value).strip()
        values["codec"] = Said(_SERDES.get(serde, serde), entry.source, entry.rank)
    parts = {name: said[name] for name in _STORE if name in said}
    urls = [url for url in (_memory(parts), _disk(parts), _remote(parts)) if url]
    if urls:
        joined = urls[0] if len(urls) == 1 else "tiered:" + ",".join(urls)
        source = ", ".join(entry.source for entry in parts.values())
        values["store"] = Said(joined, source, min(entry.rank for entry in parts.values()))
    return values


def _memory(parts: Mapping[str, Said]) -> str | None:
    # On by default in LMCache; here a tier is there only when something was said about it.
    switch, size = parts.get("local_cpu"), parts.get("max_local_cpu_size")
    if switch is None and size is None:
        return None
    if switch is not None and not _typed("local_cpu", switch, read_bool):
        return None
    size_gib = _DEFAULT_CPU_GIB
    if size is not None:
        size_gib = _typed("max_local_cpu_size", size, read_float)
    return f"memory://?quota={round(size_gib * 2**30)}B" if size_gib > 0 else None


def _disk(parts: Mapping[str, Said]) -> str | None:
    entry, size = parts.get("local_disk"), parts.get("max_local_disk_size")
    path = "" if entry is None or entry.value in (None, False) else str(entry.value).strip()
    if path.lower() in ("", "false", "none", "null"):
        return None
    path = path.removeprefix("file://")
    if not path.startswith("/") or "?" in path:
        assert entry is not None
        raise ConfigError(
            f"local_disk ({entry.source})", got=path, expected="file:/// and an absolute path"
        )
    size_gib = 0.0 if size is None else _typed("max_local_disk_size", size, read_float)
    quota = f"?quota={round(size_gib * 2**30)}B" if size_gib > 0 else ""
    return f"file://{quote(path)}{quota}"


def _remote(parts: Mapping[str, Said]) -> str | None:
    entry = parts.get("remote_url")
    url = "" if entry is None or entry.value is None else str(entry.value).strip()
    if entry is None or url.lower() in ("", "none", "null"):
        return None
    split = urlsplit(url)
    if split.scheme == "fs":
        return f"file://{quote(split.path)}"
    if split.scheme not in _DIRECT_SCHEMES:
        raise ConfigError(
            f"remote_url ({entry.source})",
            got=f"{split.scheme}://",
            expected="redis://, rediss://, s3://, gs://, az://, file:// or fs://",
            remedy="LMCache's own servers speak a protocol of their own; use one of these",
        )
    return url.replace(",", "%2C")


def _typed(name: str, entry: Said, reader: Callable[[object], Any]) -> Any:
    try:
        return reader(entry.value)
    except (ValueError, TypeError):
        expected = "true or false" if reader is read_bool else "a number"
        raise ConfigError(
            f"{name} ({entry.source})", got=repr(entry.value), expected=expected
        ) from None
