"""Stores by URL.

=====================================  =========================================================
``memory://?quota=1GiB``               the memory of this process
``file:///folder?quota=50GiB``         a folder; also as a plain path, without options
``redis://user:pass@host:6379/0``      a Redis server; ``rediss://`` for TLS
``redis+cluster://host:7000``          a Redis cluster; also ``redis://host?cluster=1``
``s3://bucket/prefix?region=...``      a bucket; ``gs://`` and ``az://`` alike
``tiered:memory://...,redis://...``    several, from near to far; a comma in one is ``%2C``
=====================================  =========================================================

Options of every remote: ``timeout=5s`` (a bound on each call), ``attempts=4`` (of which all but
one are retries), ``breaker=5`` (failures in a row that open the circuit) or ``breaker=off``.
Redis: ``prefix=cachegen:``, ``ttl=7d``, ``cluster=1``, ``verify=no``, ``ca=FILE``, ``cert=FILE``,
``key=FILE``, ``password_env=VARIABLE``. Buckets: ``http=1`` for plain HTTP (an ``endpoint`` of
``http://`` implies it); all others are obstore's, such as ``endpoint``, ``region``,
``access_key_id``, ``secret_access_key``. ``tiered:`` takes its own before the first URL:
``tiered:?write=back&promote=no&queue=256MiB,memory://...``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cachegen.errors import ConfigError
from cachegen.store.base import Store
from cachegen.store.breaker import BreakerPolicy, BreakerStore
from cachegen.store.local import LocalStore
from cachegen.store.memory import MemoryStore
from cachegen.store.retry import RetryPolicy
from cachegen.store.tiered import TieredStore
from cachegen.units import parse_seconds, parse_size

__all__ = ["open_store", "parse_size", "redact"]

_Value = TypeVar("_Value")

# Two characters at least, so that "C:" stays a path; a path such as "a:b" is written "./a:b".
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_SECRET = re.compile(r"(?i)((?:secret|password|token|account_key|access_key)[a-z_]*=)[^&,]*")
_LOGIN = re.compile(r"(?<=://)[^/@,]*@")


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store that a URL or a path names; the module's docstring lists the URLs.

    Returns: the store; a folder that does not exist is created, a remote is not connected yet.
        A remote comes with a circuit breaker around it.
    Raises: ConfigError for an unknown scheme or option, or a client that is not installed;
        StoreError as the store raises.
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
    if url.startswith("tiered:"):
        return _open_tiered(url.removeprefix("tiered:"))
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError("store URL", got=redact(url), expected=f"a URL ({error})") from None
    opener = _OPENERS.get(parts.scheme)
    if opener is None:
        raise ConfigError(
            "scheme of the store URL",
            got=f"{parts.scheme}://",
            expected=" or ".join(f"{scheme}://" for scheme in _OPENERS)
            + " or tiered: or a plain path",
        )
    options = _Options(parts)
    store = opener(parts, options)
    options.finish()
    return store


def redact(url: str) -> str:
    """Return a store URL without passwords and keys, for messages and logs."""
    return _SECRET.sub(r"\1***", _LOGIN.sub("***@", url))


class _Options:
    """The query of a URL; what is not taken is an error."""

    def __init__(self, url: SplitResult) -> None:
        self._shown = redact(url.geturl())
        self._known: list[str] = []
        pairs = parse_qsl(url.query, keep_blank_values=True)
        self._left = dict(pairs)
        if len(self._left) < len(pairs) or url.fragment:
            raise ConfigError("options of the store URL", got=self._shown, expected="each once")

    def take(
        self, name: str, read: Callable[[str], _Value], default: _Value | None = None
    ) -> _Value | None:
        """Return what read makes of an option, or default. Raises: ConfigError."""
        self._known.append(name)
        text = self._left.pop(name, None)
        if text is None:
            return default
        try:
            return read(text)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"option {name} of the store URL", got=repr(text), expected=str(error)
            ) from None

    def rest(self) -> dict[str, str]:
        """Take all that is left."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        """Raise ConfigError if something is left."""
        if self._left:
            known = " or ".join(f"{name}=" for name in self._known) or "none"
            raise ConfigError(
                f"option {next(iter(self._left))} of the store URL",
                got=self._shown,
                expected=known,
            )


def _open_memory(url: SplitResult, options: _Options) -> Store:
    if url.netloc or url.path not in ("", "/"):
        raise ConfigError("store URL", got=url.geturl(), expected="memory:// with nothing after it")
    return MemoryStore(options.take("quota", parse_size))


def _open_file(url: SplitResult, options: _Options) -> Store:
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise ConfigError(
            "store URL",
            got=url.geturl(),
            expected="file:/// and an absolute path",
            remedy="write a relative path without file:",
        )
    quota_bytes = options.take("quota", parse_size)
    options.finish()  # before a folder is made
    return LocalStore(unquote(url.path), quota_bytes)


def _open_redis(url: SplitResult, options: _Options) -> Store:
    try:
        from cachegen.store.redis import RedisStore
        from cachegen.store.resp import RedisTarget
    except ImportError as error:
        raise _not_installed("redis", error) from None
    scheme, _, kind = url.scheme.partition("+")
    variable = options.take("password_env", str)
    if variable is not None and variable not in os.environ:
        raise ConfigError("password of the store", got=f"no variable {variable}", expected="one")
    database = url.path.strip("/") or "0"
    if not database.isdigit():
        raise ConfigError("database of the store URL", got=repr(database), expected="a number")
    target = RedisTarget(
        host=url.hostname or "localhost",
        port=_port(url, 6379),
        db=int(database),
        username=unquote(url.username) if url.username else None,
        password=os.environ[variable] if variable else unquote(url.password or "") or None,
        tls=scheme == "rediss",
        verify=bool(options.take("verify", _switch, True)),
        ca_file=options.take("ca", str),
        cert_file=options.take("cert", str),
        key_file=options.take("key", str),
        cluster=bool(options.take("cluster", _switch, False)) or kind == "cluster",
    )
    return _guarded(
        options,
        target.where,
        lambda retry, **more: RedisStore(
            target,
            retry=retry,
            **more,
            **_given(prefix=options.take("prefix", str), ttl_s=options.take("ttl", parse_seconds)),
        ),
    )


def _open_bucket(url: SplitResult, options: _Options) -> Store:
    try:
        from cachegen.store.bucket import Bucket
        from cachegen.store.object import ObjectStore
    except ImportError as error:
        raise _not_installed("s3", error) from None
    if url.username or url.password:
        raise ConfigError(
            "store URL",
            got=redact(url.geturl()),
            expected="no login",
            remedy="use ?access_key_id=...&secret_access_key=... or the environment",
        )
    allow_http = options.take("http", _switch)

    def make(retry: RetryPolicy, **more: Any) -> Store:
        rest = options.rest()
        is_plain = rest.get("endpoint", "").startswith("http://")
        bucket = Bucket(
            url.scheme,
            url.netloc,
            unquote(url.path).strip("/"),
            rest,
            allow_http=is_plain if allow_http is None else allow_http,
        )
        return ObjectStore(bucket, retry=retry, **more)

    return _guarded(options, f"{url.scheme}://{url.netloc}", make)


def _open_tiered(text: str) -> Store:
    first, *others = text.split(",")
    if first.startswith("?"):
        options = _Options(urlsplit(first))
    else:
        options, others = _Options(urlsplit("")), [first, *others]
    given = _given(
        write=options.take("write", _one_of("through", "back")),
        promote=options.take("promote", _switch),
        queue_bytes=options.take("queue", parse_size),
    )
    options.finish()
    if any(url.startswith("tiered:") for url in others):
        raise ConfigError("tiers", got="tiers within tiers", expected="one list")
    return TieredStore([open_store(url.replace("%2C", ",")) for url in others], **given)


def _guarded(options: _Options, where: str, make: Callable[..., Store]) -> Store:
    """Make a remote with its timeout and retries, and put a breaker around it."""
    timeout_s = options.take("timeout", parse_seconds)
    attempts = options.take("attempts", _number)
    failures = options.take("breaker", lambda text: 0 if text == "off" else _number(text))
    retry = RetryPolicy(**_given(attempts=attempts))
    store = make(retry, **_given(timeout_s=timeout_s))
    if failures == 0:
        return store
    return BreakerStore(store, BreakerPolicy(**_given(failures=failures)), where=where)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _switch(text: str) -> bool:
    if text.lower() not in ("1", "0", "yes", "no", "true", "false"):
        raise ValueError("yes or no")
    return text.lower() in ("1", "yes", "true")


def _number(text: str) -> int:
    if not text.isdigit():
        raise ValueError("a whole number")
    return int(text)


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(" or ".join(known))
        return text

    return read


def _port(url: SplitResult, default: int) -> int:
    try:
        return url.port or default
    except ValueError as error:
        raise ConfigError(
            "port of the store URL", got=redact(url.geturl()), expected=str(error)
        ) from None


def _not_installed(extra: str, error: ImportError) -> ConfigError:
    return ConfigError(
        "client of the store",
        got=str(error),
        expected="an installed package",
        remedy=f"pip install 'cachegen[{extra}]'",
    )


_OPENERS: dict[str, Callable[[SplitResult, _Options], Store]] = {
    "memory": _open_memory,
    "file": _open_file,
    "redis": _open_redis,
    "rediss": _open_redis,
    "redis+cluster": _open_redis,
    "rediss+cluster": _open_redis,
    "s3": _open_bucket,
    "gs": _open_bucket,
    "az": _open_bucket,
}
