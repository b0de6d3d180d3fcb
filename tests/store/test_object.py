"""What is special about object stores; the rest is in test_contract.py and test_faults.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import servers
from proxy import Fault, Proxy

from cachegen.errors import ConfigError, StoreError, StoreUnavailableError
from cachegen.store import BreakerStore, Store, open_store
from cachegen.store import object as object_store
from cachegen.store.object import ObjectStore


def inner(store: Store) -> ObjectStore:
    assert isinstance(store, BreakerStore) and isinstance(store.inner, ObjectStore)
    return store.inner


def test_prefixes_keep_stores_apart(s3_port: int) -> None:
    one, two = (open_store(servers.s3_url(s3_port, "bucket", part)) for part in ("px/1", "px/2"))
    outer = open_store(servers.s3_url(s3_port, "bucket", "px"))
    one.put("a", b"1")
    two.put("a", b"2")
    assert (one.get("a"), two.get("a")) == (b"1", b"2")
    assert list(one.names()) == ["a"]  # type: ignore[attr-defined]
    assert sorted(outer.names()) == ["1/a", "2/a"]  # type: ignore[attr-defined]


def test_a_bucket_that_is_not_there_is_no_miss(s3_port: int) -> None:
    store = open_store(servers.s3_url(s3_port, "nobucket"))
    for call in (lambda: store.get("a"), lambda: store.put("a", b"x")):
        with pytest.raises(StoreError, match="no such bucket") as caught:
            call()
        assert caught.value.reason == "no_bucket"


def test_large_values_go_in_parts(
    remote: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_MULTIPART_BYTES", 6 << 20)
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 << 20)
    store = inner(remote("s3"))
    data = os.urandom(1 << 20) * 13
    store.put("a", memoryview(data))
    assert store.get("a") == data

    def parts() -> Iterator[bytes]:
        for begin in range(0, len(data), 3 << 20):
            yield data[begin : begin + (3 << 20)]

    assert store.put_stream("b", parts()) == len(data)
    assert store.get("b") == data
    assert store.get_ranges("b", [(5, 9), (len(data) - 3, len(data) + 9)]) == [data[5:9], data[-3:]]


def test_many_names_and_listings_over_several_pages(
    remote: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_LIST_BATCH", 7)
    store = inner(remote("s3"))
    names = [f"ns{number % 3}/{number}" for number in range(40)]
    for name in names[::2]:
        store.put(name, name.encode())
    assert store.exists(names) == [number % 2 == 0 for number in range(40)]
    assert sorted(store.names()) == sorted(names[::2])
    for prefix in ("ns1/", "ns1", "ns", "ns1/1", "none/"):
        expected = sorted(name for name in names[::2] if name.startswith(prefix))
        assert sorted(entry.name for entry in store.entries(prefix)) == expected


def test_a_stream_that_breaks_goes_on_where_it_broke(s3_port: int) -> None:
    with Proxy(s3_port) as proxy:
        store = inner(open_store(servers.s3_url(proxy.port, "bucket", "resume", attempts=3)))
        data = os.urandom(300_000)
        store.put("a", data)
        proxy.fault = Fault("reset", after_bytes=100_000)
        proxy.drop_connections()
        stream = store.get_stream("a", slice_bytes=10_000)
        assert stream is not None
        assert b"".join(stream) == data
        assert store.stats()["retries"] >= 2


def test_a_stream_never_goes_on_with_another_version(s3_port: int) -> None:
    with Proxy(s3_port) as proxy:
        direct = inner(open_store(servers.s3_url(s3_port, "bucket", "versions")))
        store = inner(open_store(servers.s3_url(proxy.port, "bucket", "versions")))
        direct.put("a", bytes(3_000_000))
        proxy.fault = Fault("reset", after_bytes=1_000_000)
        stream = store.get_stream("a", slice_bytes=10_000)
        assert stream is not None
        received = bytes(next(stream))
        direct.put("a", b"x" * 3_000_000)
        with pytest.raises(StoreError) as caught:
            for part in stream:
                received += part
        assert caught.value.reason == "changed"
        assert received == bytes(len(received))


def test_wrong_credentials_are_named(s3_port: int) -> None:
    answer = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    with Proxy(s3_port) as proxy:
        proxy.fault = Fault("storm", storm=answer)
        store = open_store(servers.s3_url(proxy.port, "bucket"))
        with pytest.raises(StoreError, match="credentials") as caught:
            store.get("a")
        assert caught.value.reason == "denied"
        assert not isinstance(caught.value, StoreUnavailableError)


def test_credentials_from_the_environment(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    store = open_store("s3://bucket/fromenv?http=1")
    store.put("a", b"x")
    assert store.get("a") == b"x"


def test_a_forked_child_is_told_rather_than_hung(remote: Callable[..., Store]) -> None:
    store = inner(remote("s3"))
    store.put("a", b"x")
    pid = os.fork()
    if pid == 0:
        begin = time.monotonic()
        try:
            store.get("a")
        except StoreError as error:
            os._exit(0 if error.reason == "forked" and time.monotonic() - begin < 5 else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.get("a") == b"x"


def test_timeouts_and_buckets_that_cannot_work(s3_port: int) -> None:
    for url in ("s3://bucket?timeout=0s", "gs://bucket?service_account=/no/such/file"):
        with pytest.raises(ConfigError):
            open_store(url)
