"""Real servers for the tests, on free ports of the loopback: redis-server and an S3 server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

START_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"no server on port {port}, exit {process.poll()}") from None
            time.sleep(0.02)


@contextlib.contextmanager
def server(*command: str, port: int, folder: Path | None = None) -> Iterator[int]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


def redis_command(port: int, *options: str, tls: bool = False) -> list[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    listen = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    base = [binary, *listen, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return [*base, *options]


@contextlib.contextmanager
def redis_server(*options: str, folder: Path | None = None, tls: bool = False) -> Iterator[int]:
    port = free_port()
    with server(*redis_command(port, *options, tls=tls), port=port, folder=folder):
        yield port


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    if find_spec("moto") is None:
        pytest.skip("moto is not installed (pip install 'moto[server]')")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(*command, port=port):
        yield port


def create_bucket(port: int, name: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket=name)


def s3_url(port: int, bucket: str, prefix: str = "", **options: object) -> str:
    query = {
        "endpoint": f"http://127.0.0.1:{port}",
        "access_key_id": "key",
        "secret_access_key": "secret",
        "region": "us-east-1",
    } | {name: str(value) for name, value in options.items()}
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"s3://{bucket}/{prefix}?{text}"


@contextlib.contextmanager
def redis_cluster(folder: Path, nodes: int = 2) -> Iterator[int]:
    """Run a cluster of primaries without replicas; yields the port of one."""
    import redis

    with contextlib.ExitStack() as stack:
        ports = []
        for index in range(nodes):
            home = folder / f"node{index}"
            home.mkdir()
            # The bus listens on port + 10000 unless told otherwise, which may be out of range.
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            ports.append(stack.enter_context(redis_server(*options, folder=home)))
        clients = [redis.Redis(port=port) for port in ports]
        step = 16384 // nodes
        for index, client in enumerate(clients):
            end = 16383 if index == nodes - 1 else (index + 1) * step - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", index * step, end)
        buses = [int(client.config_get("cluster-port")["cluster-port"]) for client in clients]
        for port, bus in zip(ports[1:], buses[1:], strict=True):
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        give_up = time.monotonic() + START_S
        while not all(
            client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"
            and int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"]) == nodes
            for client in clients
        ):
            assert time.monotonic() < give_up, "the cluster did not come up"
            time.sleep(0.05)
        for client in clients:
            client.close()
        yield ports[0]
