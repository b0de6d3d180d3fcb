"""Connections to Redis servers that keep deadlines, and what their failures are called."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from cachegen.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)
from cachegen.store.clock import deadline, late
from cachegen.store.sockets import TimedSocket, connect

# Two round trips less for each connection; the option has another name before redis-py 8.
_NO_INTRODUCTION: dict[str, None] = (
    {"driver_info": None}
    if "driver_info" in signature(AbstractConnection.__init__).parameters
    else {"lib_name": None, "lib_version": None}
)
# Reasons after which the server has certainly not done what was asked.
NOT_SENT = frozenset({"refused", "unresolved", "unreachable", "loading"})
_DENIED = (AuthenticationError, AuthorizationError, NoPermissionError)
_LINE_CAP_BYTES = 1024


class TimedConnection(Connection):
    """A connection of redis-py over a socket that keeps the deadline."""

    def _connect(self) -> Any:
        return TimedSocket(connect(self.host, self.port))


class TimedSSLConnection(SSLConnection):
    """The same over TLS; the handshake ends at the deadline too."""

    def _connect(self) -> Any:
        plain = connect(self.host, self.port)
        try:
            return TimedSocket(self._wrap_socket_with_ssl(plain))  # type: ignore[no-untyped-call]
        except BaseException:
            plain.close()
            raise


@dataclass(frozen=True)
class RedisTarget:
    """Where a Redis server is and how to log in.

    tls: True for ``rediss://``. verify: False to accept any certificate. ca_file, cert_file,
    key_file: PEM files; None for the system's authorities and no client certificate.
    cluster: True if host is one node of a cluster; then db is 0.
    Raises: ConfigError for values that cannot work.
    """

    host: str = "localhost"
    port: int = 6379
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    verify: bool = True
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    cluster: bool = False

    def __post_init__(self) -> None:
        if not self.host or not 0 < self.port < 65536 or self.db < 0:
            raise ConfigError("Redis server", got=self, expected="a host, a port, a database")
        if self.cluster and self.db:
            raise ConfigError("database of a Redis cluster", got=self.db, expected="0")

    @property
    def where(self) -> str:
        """The server as messages name it, without a password."""
        return f"redis{'s' if self.tls else ''}://{self.host}:{self.port}"

    def options(self) -> dict[str, Any]:
        """Return the arguments of a connection of redis-py."""
        options: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "username": self.username,
            "password": self.password,
            "socket_timeout": None,
            "socket_connect_timeout": None,
            "socket_read_size": 1 << 18,
            "protocol": 2,
            **_NO_INTRODUCTION,
            "retry": Retry(NoBackoff(), 0),
            "connection_class": TimedSSLConnection if self.tls else TimedConnection,
        }
        if not self.cluster:
            options["db"] = self.db
        if self.tls:
            options |= {
                "ssl_cert_reqs": "required" if self.verify else "none",
                "ssl_check_hostname": self.verify,
                "ssl_ca_certs": self.ca_file,
                "ssl_certfile": self.cert_file,
                "ssl_keyfile": self.key_file,
            }
        return options


@contextmanager
def named_errors(where: str, timeout_s: float) -> Iterator[None]:
    """Bound a block by timeout_s and turn what redis-py raises into named errors.

    where: the server as messages name it, without a password.
    Raises: StoreTimeoutError, StoreUnavailableError, StoreFullError, StoreReadOnlyError,
        StoreError.
    """
    with deadline(timeout_s):
        try:
            yield
        except StoreError:
            raise
        except (redis.TimeoutError, TimeoutError) as error:
            raise late(f"answer of {where}") from error
        except (RedisError, RedisClusterException, OSError) as error:
            raise _named(error, where) from error
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            # What redis-py's parser makes of bytes that are not the protocol.
            raise StoreUnavailableError(
                f"answer of {where}", got=f"bytes that are no reply ({error})", reason="protocol"
            ) from error


def _named(error: Exception, where: str) -> StoreError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    code = text.partition(" ")[0]  # where redis-py has no class for it, or we read the reply
    if isinstance(error, _DENIED) or code in ("NOAUTH", "NOPERM", "WRONGPASS"):
        return StoreError(
            f"login at {where}",
            got=text,
            remedy="check user and password in the URL and the rights of the user",
            reason="denied",
        )
    if isinstance(error, ReadOnlyError) or code in ("READONLY", "MISCONF"):
        return StoreReadOnlyError(f"writing to {where}", got=text)
    if isinstance(error, OutOfMemoryError) or code == "OOM":
        return StoreFullError(
            f"memory of {where}",
            got=text,
            remedy="raise maxmemory or set maxmemory-policy allkeys-lru",
        )
    if isinstance(error, BusyLoadingError) or code == "LOADING":
        return StoreUnavailableError(f"state of {where}", got=text, reason="loading")
    if isinstance(error, RedisClusterException):
        return StoreUnavailableError(f"cluster at {where}", got=text, reason="cluster")
    if isinstance(error, ResponseError):
        return StoreError(f"command at {where}", got=text, reason="rejected")
    cause: BaseException | None = error
    for _ in range(4):
        if isinstance(cause, TimeoutError):
            return late(f"answer of {where}")
        reason = _reason_of(cause)
        if reason:
            return StoreUnavailableError(f"connection to {where}", got=text, reason=reason)
        cause = cause.__cause__ or cause.__context__ if cause is not None else None
    reason = "reset" if "closed" in text.lower() else "unavailable"
    return StoreUnavailableError(f"connection to {where}", got=text, reason=reason)


def _reason_of(error: BaseException | None) -> str | None:
    match error:
        case ConnectionRefusedError():
            return "refused"
        case ConnectionResetError() | BrokenPipeError() | ConnectionAbortedError():
            return "reset"
        case ssl.SSLCertVerificationError():
            return "certificate"
        case ssl.SSLError():
            return "tls"
        case OSError() if type(error).__name__ == "gaierror":
            return "unresolved"
        case OSError() if error.errno in (101, 113):  # ENETUNREACH, EHOSTUNREACH
            return "unreachable"
        case _:
            return None


class BulkReader:
    """Reads one reply of bytes from a connection, as the bytes come.

    redis-py hands a reply over when it is whole; the start of a chunk is worth decoding before.
    The connection must have nothing unread and is of no more use unless the reply was read up.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._pending = b""
        self.size_bytes = 0

    def begin(self, *command: object) -> None:
        """Send a command; then size_bytes is that of its reply. Raises: ResponseError, OSError."""
        self._connection.send_command(*command)
        line = b""
        while b"\r\n" not in line:
            if len(line) > _LINE_CAP_BYTES:
                raise ValueError("a reply without an end of line")
            line += self._receive(1 << 16)
        line, _, self._pending = line.partition(b"\r\n")
        if line.startswith(b"-"):
            raise ResponseError(line[1:].decode(errors="replace"))
        if not line.startswith(b"$") or not line[1:].isdigit():
            raise ValueError(f"a reply that begins with {line[:16]!r}")
        self.size_bytes = int(line[1:])

    def read_into(self, view: memoryview) -> None:
        """Fill view with the next bytes of the reply. Raises: OSError."""
        kept = min(len(view), len(self._pending))
        view[:kept] = self._pending[:kept]
        self._pending = self._pending[kept:]
        filled = kept
        while filled < len(view):
            count = self._connection._sock.recv_into(view[filled:])
            if not count:
                raise ConnectionResetError("closed in the middle of a reply")
            filled += count

    def finish(self) -> None:
        """Read the end of the reply, so that the connection may be used again. Raises: OSError."""
        while len(self._pending) < 2:
            self._pending += self._receive(2 - len(self._pending))
        if self._pending != b"\r\n":
            raise ValueError(f"a reply that ends with {self._pending[:16]!r}")

    def _receive(self, size: int) -> bytes:
        data: bytes = self._connection._sock.recv(size)
        if not data:
            raise ConnectionResetError("closed in the middle of a reply")
        return data
