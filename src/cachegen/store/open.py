"""Stores by URL."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cachegen.errors import ConfigError
from cachegen.store.base import Store
from cachegen.store.local import LocalStore
from cachegen.store.memory import MemoryStore
from cachegen.units import parse_size

__all__ = ["open_store", "parse_size"]

# Two characters at least, so that "C:" stays a path; a path such as "a:b" is written "./a:b".
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store that a URL or a path names.

    url: ``memory://``, ``file:///folder`` or a plain path. ``?quota=50GiB`` bounds the bytes
        held; a plain path takes no options. In a file URL ``%20`` and the like are decoded.
    Returns: the store; a folder that does not exist is created.
    Raises: ConfigError for an unknown scheme or option; StoreError as the store raises.
    """
    if not isinstance(url, str):
        return LocalStore(url)
    if not _SCHEME.match(url):
        if not url or "?" in url:
            raise ConfigError(
                "store path",
                got=repr(url),
                expected="a path without '?'",
                remedy="write options as file:///path?quota=50GiB",
            )
        return LocalStore(os.path.expanduser(url))
    parts = urlsplit(url)
    opener = _OPENERS.get(parts.scheme)
    if opener is None:
        raise ConfigError(
            "scheme of the store URL",
            got=f"{parts.scheme}://",
            expected=" or ".join(f"{scheme}://" for scheme in _OPENERS) + " or a plain path",
        )
    return opener(parts)


def _open_memory(url: SplitResult) -> Store:
    if url.netloc or url.path not in ("", "/"):
        raise ConfigError("store URL", got=url.geturl(), expected="memory:// with nothing after it")
    return MemoryStore(_quota_of(url))


def _open_file(url: SplitResult) -> Store:
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise ConfigError(
            "store URL",
            got=url.geturl(),
            expected="file:/// and an absolute path",
            remedy="write a relative path without file:",
        )
    return LocalStore(unquote(url.path), _quota_of(url))


def _quota_of(url: SplitResult) -> int | None:
    options = parse_qsl(url.query, keep_blank_values=True)
    unknown = [key for key, _ in options if key != "quota"]
    if unknown or len(options) > 1 or url.fragment:
        raise ConfigError(
            "options of the store URL", got=url.geturl(), expected="at most ?quota=SIZE"
        )
    return parse_size(options[0][1]) if options else None


_OPENERS: dict[str, Callable[[SplitResult], Store]] = {"memory": _open_memory, "file": _open_file}
