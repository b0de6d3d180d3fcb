"""Sockets that never wait beyond the deadline of the caller."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any

from cachegen.store.clock import remaining_s


class TimedSocket:
    """A connected socket whose every wait ends at the deadline of the thread that waits.

    A plain timeout bounds one ``recv``: a server that sends a byte a second never trips it.
    Raises: TimeoutError from what waits.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._cap_s = inner.gettimeout()

    def settimeout(self, timeout_s: float | None) -> None:
        """Bound each wait, beside the deadline; 0.0 for none at all."""
        self._cap_s = timeout_s

    def gettimeout(self) -> float | None:
        """Return what settimeout set."""
        return self._cap_s

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive at most size bytes, b"" at the end."""
        self._arm()
        return self._inner.recv(size, flags)

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """Receive into a buffer. Returns: the number of bytes, 0 at the end."""
        self._arm()
        return self._inner.recv_into(buffer, size, flags)

    def sendall(self, data: Any) -> None:
        """Send everything; the time counts for all of it together."""
        self._arm()
        self._inner.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _arm(self) -> None:
        left_s = remaining_s()
        if left_s is None or self._cap_s == 0.0:
            self._inner.settimeout(self._cap_s)
        elif left_s == 0.0:
            raise TimeoutError("the deadline has passed")
        else:
            self._inner.settimeout(left_s if self._cap_s is None else min(left_s, self._cap_s))


def connect(host: str, port: int) -> socket.socket:
    """Open a TCP connection, trying all addresses of host until the deadline.

    Returns: the socket, with the time that is left as its timeout.
    Raises: OSError of the last address; TimeoutError at the deadline.
    """
    failure: OSError = OSError(f"no address of {host}")
    for family, kind, protocol, _, address in _resolve(host, port):
        left_s = remaining_s()
        if left_s == 0.0:
            raise TimeoutError("the deadline has passed")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(left_s)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _resolve(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    """Look a name up. A resolver has no timeout to set, so a thread waits for a slow one."""
    answers: list[Sequence[tuple[Any, ...]]] = []
    failures: list[OSError] = []

    def look_up(flags: int) -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags))
        except OSError as error:
            failures.append(error)

    look_up(socket.AI_NUMERICHOST)
    if answers:
        return answers[0]
    failures.clear()
    thread = threading.Thread(target=look_up, args=(0,), name="cachegen-resolve", daemon=True)
    thread.start()
    thread.join(remaining_s())
    if failures:
        raise failures[0]
    if not answers:
        raise TimeoutError(f"no address of {host} before the deadline")
    return answers[0]
