"""Servers that the tests of stores share; each starts when a test first asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import servers

from cachegen.store import Store, open_store

_COUNT = itertools.count()


@pytest.fixture(scope="session")
def redis_port() -> Iterator[int]:
    with servers.redis_server() as port:
        yield port


@pytest.fixture(scope="session")
def cluster_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with servers.redis_cluster(tmp_path_factory.mktemp("cluster")) as port:
        yield port


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with servers.s3_server() as port:
        servers.create_bucket(port, "bucket")
        yield port


@pytest.fixture
def remote_url(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """The URL of an empty part of a real server: ``redis``, ``cluster`` or ``s3``."""

    def make(kind: str) -> str:
        part = f"test{next(_COUNT)}"
        if kind == "s3":
            return servers.s3_url(request.getfixturevalue("s3_port"), "bucket", part)
        if kind == "cluster":
            port = request.getfixturevalue("cluster_port")
            return f"redis+cluster://127.0.0.1:{port}?prefix={part}:"
        port = request.getfixturevalue("redis_port")
        return f"redis://127.0.0.1:{port}?prefix={part}:"

    return make


@pytest.fixture
def remote(remote_url: Callable[[str], str]) -> Iterator[Callable[..., Store]]:
    opened = []

    def make(kind: str, *, options: str = "") -> Store:
        opened.append(open_store(remote_url(kind) + options))
        return opened[-1]

    yield make
    for store in opened:
        close = getattr(store, "close", None)
        if close is not None:
            close()
