"""A TCP proxy that does to a connection what networks and servers do on bad days."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

# What a server that is overloaded says, in the language of each protocol.
STORM = {
    "s3": b"HTTP/1.1 503 Slow Down\r\ncontent-length: 4\r\nconnection: close\r\n\r\nslow",
    "redis": b"-LOADING Redis is loading the dataset in memory\r\n",
    "cluster": b"-LOADING Redis is loading the dataset in memory\r\n",
}


@dataclass(frozen=True)
class Fault:
    """What happens to replies.

    after_bytes: of a connection's replies pass untouched before it happens.
    kind: ``refuse`` connections, ``stall`` for ever, ``reset``, ``close`` in the middle,
        ``delay`` each reply by delay_s, ``dribble`` a byte every delay_s, ``corrupt`` a byte in
        every 500, or answer with ``storm`` instead of the server.
    """

    kind: str
    after_bytes: int = 0
    delay_s: float = 0.0
    storm: bytes = b""


class Proxy:
    """Listens on a free port of the loopback and passes bytes on to target_port.

    ``fault`` may be set at any time; connections that are open see it with their next bytes.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._fault: Fault | None = None
        self._listener: socket.socket | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self.reply_bytes = 0
        self._listen()

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._fault = fault
        if fault is not None and fault.kind == "refuse":
            self._close_all()
        elif self._listener is None:
            self._listen()

    def drop_connections(self) -> None:
        """Close what is open, so that the next call meets the fault from its first byte."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        self._close_all()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept, listener)

    def _close_all(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.drop_connections()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        self._open |= {client, server}
        try:
            server.connect(("127.0.0.1", self.target_port))
            self._pass_on(client, server)
        except OSError:
            pass
        finally:
            self._open -= {client, server}
            client.close()
            server.close()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        while not self._stop.is_set():
            ready, _, _ = select.select([client, server], [], [], 0.05)
            for source in ready:
                data = source.recv(65536)
                if not data:
                    return
                fault = self._fault
                if source is client:
                    if fault is not None and fault.kind == "storm":
                        client.sendall(fault.storm)
                        if fault.storm.startswith(b"HTTP"):
                            return
                    elif fault is None or fault.kind != "stall" or fault.after_bytes:
                        server.sendall(data)
                elif not self._reply(client, data, sent, fault):
                    return
                else:
                    sent += len(data)
                    self.reply_bytes += len(data)

    def _reply(self, client: socket.socket, data: bytes, sent: int, fault: Fault | None) -> bool:
        """Hand a reply on as the fault has it. Returns: False to end the connection."""
        if fault is None or sent + len(data) <= fault.after_bytes:
            client.sendall(data)
            return True
        passed = max(0, fault.after_bytes - sent)
        client.sendall(data[:passed])
        rest = data[passed:]
        match fault.kind:
            case "stall":
                self._stop.wait(10)
                return False
            case "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "close":
                return False
            case "delay":
                time.sleep(fault.delay_s)
                client.sendall(rest)
            case "dribble":
                for place in range(len(rest)):
                    client.sendall(rest[place : place + 1])
                    if self._stop.wait(fault.delay_s):
                        return False
            case "corrupt":
                damaged = bytearray(rest)
                for place in range(0, len(damaged), 500):
                    damaged[place] ^= 0x55
                client.sendall(damaged)
            case _:
                client.sendall(rest)
        return True
