"""A real network link of a given bandwidth: two network namespaces, a veth pair, ``tc tbf``.

Servers run on the far side, clients on the near side; what the far side sends is shaped. All of it
is local, and gone when the link is closed. Needs root, iproute2 and Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from cachegen.errors import ConfigError

FAR_ADDRESS, NEAR_ADDRESS = "10.213.7.1", "10.213.7.2"
_PREFIX_BITS = 30
# How long a packet may wait at the bottleneck; with the rate this is the length of its queue.
QUEUE_MS = 20
# What leaves at once: a few of the segments that the sender's network stack hands over.
LEAST_BURST_BYTES = 16 << 10
BURST_S = 0.002
START_TIMEOUT_S = 10.0


def missing() -> str | None:
    """Return why there can be no shaped link here, or None if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} of iproute2 is not installed"
    probe = f"cgprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None


class ShapedLink:
    """A link between two namespaces of this machine. Build one with ``shaped_link``.

    far, near: names of the namespaces, for ``ip netns exec``.
    """

    def __init__(self, name: str) -> None:
        self.far, self.near = f"{name}f", f"{name}n"
        self._device = f"{name}f0"
        self._running: list[subprocess.Popen[Any]] = []

    @classmethod
    def existing(cls, name: str) -> ShapedLink:
        """Return the link that another process has set up, to shape it from here."""
        return cls(name)

    @property
    def name(self) -> str:
        """What ``existing`` takes."""
        return self.far[:-1]

    def set_up(self) -> None:
        """Make namespaces and devices. Raises: ConfigError with what the kernel said."""
        peer = f"{self.near}0"
        for namespace in (self.far, self.near):
            _run("ip", "netns", "add", namespace)
        _run(
            *("ip", "link", "add", self._device, "netns", self.far, "type", "veth"),
            *("peer", "name", peer, "netns", self.near),
        )
        for namespace, device, address in (
            (self.far, self._device, FAR_ADDRESS),
            (self.near, peer, NEAR_ADDRESS),
        ):
            inside = ("ip", "-n", namespace)
            _run(*inside, "address", "add", f"{address}/{_PREFIX_BITS}", "dev", device)
            _run(*inside, "link", "set", device, "up")
            _run(*inside, "link", "set", "lo", "up")

    def shape(self, rate_bytes_per_s: float) -> None:
        """Set the rate at which the far side sends, now, also while it does.

        The rate counts Ethernet, IP and TCP headers as well. Raises: ConfigError.
        """
        burst = max(LEAST_BURST_BYTES, int(rate_bytes_per_s * BURST_S))
        _run(
            *("tc", "-n", self.far, "qdisc", "replace", "dev", self._device, "root", "tbf"),
            *("rate", f"{int(rate_bytes_per_s * 8)}bit", "burst", str(burst)),
            *("latency", f"{QUEUE_MS}ms"),
        )

    def start(
        self, namespace: str, command: Sequence[str], *, output: IO[Any] | None = None
    ) -> subprocess.Popen[Any]:
        """Start a process in a namespace; it is ended with the link."""
        process: subprocess.Popen[Any] = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdout=output or subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._running.append(process)
        return process

    def wait_for_port(self, port: int) -> None:
        """Wait until something on the far side listens. Raises: ConfigError after 10 s."""
        script = (
            "import socket, sys; "
            f"socket.create_connection(('{FAR_ADDRESS}', {port}), timeout=1).close()"
        )
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            command = ["ip", "netns", "exec", self.near, sys.executable, "-c", script]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        raise ConfigError("server on the far side", got="nothing", expected=f"port {port} open")

    def close(self) -> None:
        """End what was started and delete the namespaces, and with them the devices."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        self._running.clear()
        for namespace in (self.far, self.near):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


@contextmanager
def shaped_link(rate_bytes_per_s: float) -> Iterator[ShapedLink]:
    """Set up a link of a rate; all of it is gone behind the block.

    Raises: ConfigError where that is not possible; ask ``missing`` first.
    """
    # Names of devices have at most 15 characters; processes at the same time get other ones.
    link = ShapedLink(f"cg{os.getpid() % 1_000_000}x")
    try:
        link.set_up()
        link.shape(rate_bytes_per_s)
        yield link
    finally:
        link.close()


def start_redis(link: ShapedLink, port: int = 6379) -> str:
    """Start a Redis server that keeps nothing on disk on the far side.

    Returns: the URL of a store in it, for the near side. Raises: ConfigError if it does not start.
    """
    settings = ("--save", "", "--appendonly", "no", "--protected-mode", "no")
    address = ("--bind", FAR_ADDRESS, "--port", str(port), "--dir", "/tmp")
    link.start(link.far, ["redis-server", *settings, *address])
    link.wait_for_port(port)
    return f"redis://{FAR_ADDRESS}:{port}/0"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            " ".join(command[:4]), got=done.stderr.strip() or done.returncode, expected="success"
        )
