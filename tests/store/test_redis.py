"""What is special about the Redis store; the rest is in test_contract.py and test_faults.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import servers

from cachegen.errors import ConfigError, StoreError, StoreFullError, StoreUnavailableError
from cachegen.store import BreakerStore, Store, open_store
from cachegen.store import redis as redis_store
from cachegen.store.redis import RedisStore


def inner(store: Store) -> RedisStore:
    assert isinstance(store, BreakerStore) and isinstance(store.inner, RedisStore)
    return store.inner


def test_prefixes_keep_stores_apart(redis_port: int) -> None:
    url = f"redis://127.0.0.1:{redis_port}?prefix="
    one, two, everything = (open_store(url + prefix) for prefix in ("px1:", "px2:", "px"))
    one.put("a", b"1")
    two.put("a", b"2")
    assert (one.get("a"), two.get("a")) == (b"1", b"2")
    assert list(one.names()) == ["a"]  # type: ignore[attr-defined]
    assert sorted(everything.names()) == ["1:a", "2:a"]  # type: ignore[attr-defined]


def test_values_expire(remote: Callable[..., Store]) -> None:
    store = inner(remote("redis", options="&ttl=1500ms"))
    store.put("a", b"x")
    assert store.put_if_absent("b", b"x")
    store.put_stream("c", [b"x"])
    names = ["a", "b", "c"]
    for name in names:
        left_ms = store._once(lambda client, name=name: client.pttl(store.prefix + name))
        assert left_ms <= 1500 and left_ms != -1
    give_up = time.monotonic() + 20
    while any(store.exists(names)):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert store.get("a") is None


def test_without_a_ttl_parts_leave_none_behind(remote: Callable[..., Store]) -> None:
    store = inner(remote("redis"))
    store.put_stream("a", [b"x", b"y"])
    assert store._once(lambda client: client.pttl(store.prefix + "a")) == -1
    with pytest.raises(KeyError):
        store.put_stream("b", (b"x" if i < 1 else {}["no"] for i in range(2)))
    keys = store._once(lambda client: client.keys(f"*{store.prefix}*"))
    assert keys == [(store.prefix + "a").encode()]


def test_many_names_in_few_round_trips(
    remote: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "_BATCH", 100)
    store = inner(remote("redis"))
    names = [f"ns/{number}" for number in range(250)]
    for name in names[::2]:
        store.put(name, name.encode())
    before = store._once(lambda client: client.info("stats")["total_net_output_bytes"])
    assert store.exists(names) == [number % 2 == 0 for number in range(250)]
    after = store._once(lambda client: client.info("stats")["total_net_output_bytes"])
    assert 0 < after - before < 20_000
    assert sorted(store.names()) == sorted(names[::2])
    entries = list(store.entries("ns/1"))
    assert {entry.name for entry in entries} == {n for n in names[::2] if n.startswith("ns/1")}
    assert all(entry.size_bytes == len(entry.name) for entry in entries)


def test_other_types_under_the_prefix_are_errors_to_read_and_not_listed(
    remote: Callable[..., Store],
) -> None:
    store = inner(remote("redis"))
    store._once(lambda client: client.rpush(store.prefix + "list", "x"))
    with pytest.raises(StoreError, match=r"WRONGTYPE|wrong kind"):
        store.get("list")
    assert list(store.names()) == []


def test_values_beyond_what_redis_takes(
    remote: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "MAX_VALUE_BYTES", 1000)
    store = remote("redis")
    store.put("a", bytes(1000))
    with pytest.raises(StoreFullError, match="smaller chunks"):
        store.put("b", bytes(1001))
    with pytest.raises(StoreFullError, match="smaller chunks"):
        store.put_stream("b", [bytes(600), bytes(600)])  # type: ignore[attr-defined]
    assert store.exists(["a", "b"]) == [True, False]


def test_large_values_survive(remote: Callable[..., Store]) -> None:
    store = remote("redis")
    data = os.urandom(1 << 20) * 24
    store.put("a", memoryview(data))
    assert store.get("a") == data
    stream = store.get_stream("a", slice_bytes=1 << 20)  # type: ignore[attr-defined]
    assert b"".join(stream) == data


def test_streams_leave_their_connection_to_others(remote: Callable[..., Store]) -> None:
    store = inner(remote("redis"))
    data = bytes(100_000)
    store.put("a", data)
    for _ in range(20):
        stream = store.get_stream("a", slice_bytes=7000)
        assert stream is not None
        assert b"".join(stream) == data
        assert store.get_stream("none", slice_bytes=7) is None
    pool = store._client().connection_pool
    assert len(pool._available_connections) == 1 and not pool._in_use_connections
    never_begun = store.get_stream("a", slice_bytes=7000)
    assert never_begun is not None
    del never_begun
    assert not pool._in_use_connections


def test_many_threads_share_a_store(remote: Callable[..., Store]) -> None:
    store = remote("redis")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: store.put(f"n/{n}", str(n).encode() * 999), range(64)))
        found = list(pool.map(lambda n: store.get(f"n/{n}"), range(64)))
    assert found == [str(n).encode() * 999 for n in range(64)]


def test_a_forked_child_has_connections_of_its_own(remote: Callable[..., Store]) -> None:
    store = remote("redis")
    store.put("a", b"parent")
    pids = []
    for number in range(3):
        pid = os.fork()
        if pid == 0:
            fine = all(store.get("a") == b"parent" for _ in range(50))
            store.put(f"child{number}", b"x")
            os._exit(0 if fine else 1)
        pids.append(pid)
    for _ in range(50):
        assert store.get("a") == b"parent"
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert store.exists([f"child{number}" for number in range(3)]) == [True] * 3


def test_login_and_database() -> None:
    with servers.redis_server("--requirepass", "pa/ss") as port:
        right = open_store(f"redis://:pa%2Fss@127.0.0.1:{port}/2")
        right.put("a", b"x")
        assert open_store(f"redis://default:pa%2Fss@127.0.0.1:{port}/2").get("a") == b"x"
        assert open_store(f"redis://:pa%2Fss@127.0.0.1:{port}/1").get("a") is None
        for login in ("", ":wrong@", "nobody:pa%2Fss@"):
            with pytest.raises(StoreError, match="login") as caught:
                open_store(f"redis://{login}127.0.0.1:{port}/2").get("a")
            assert caught.value.reason == "denied"
            assert "wrong" not in str(caught.value)


def make_certificates(folder: Path) -> None:
    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new = "-newkey rsa:2048 -nodes"
    openssl(f"req -x509 {new} -days 2 -subj /CN=ca -keyout ca.key -out ca.crt")
    openssl(f"req {new} -subj /CN=localhost -keyout s.key -out s.csr")
    signed = "-CA ca.crt -CAkey ca.key -CAcreateserial -days 2"
    openssl(f"x509 -req -in s.csr {signed} -extfile names -out s.crt")


# CI installs it; without certificates there is no TLS server to test against.
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    files = ["--tls-cert-file", "s.crt", "--tls-key-file", "s.key"]
    files += ["--tls-ca-cert-file", "ca.crt", "--tls-auth-clients", "no"]
    try:
        running = servers.redis_server(
            *files, "--tls-auth-clients", "no", folder=tmp_path, tls=True
        )
        with running as port:
            url = f"rediss://127.0.0.1:{port}"
            store = open_store(f"{url}?ca={tmp_path}/ca.crt")
            store.put("a", bytes(300_000))
            assert b"".join(store.get_stream("a", slice_bytes=9999)) == bytes(300_000)  # type: ignore[attr-defined]
            assert open_store(f"{url}?verify=no").get("a") == bytes(300_000)
            with pytest.raises(StoreUnavailableError) as caught:
                open_store(url).get("a")
            assert caught.value.reason == "certificate"
            with pytest.raises(StoreError):
                open_store(f"redis://127.0.0.1:{port}?timeout=500ms").get("a")
    except RuntimeError:
        pytest.skip("this redis-server is built without TLS")


def test_a_cluster_spreads_and_finds_values(cluster_port: int) -> None:
    import redis

    store = open_store(f"redis+cluster://127.0.0.1:{cluster_port}?prefix=spread:")
    names = [f"ns/{number}" for number in range(40)]
    for name in names:
        store.put(name, name.encode() * 100)
    assert store.exists([*names, "none"]) == [True] * 40 + [False]
    client = redis.RedisCluster(host="127.0.0.1", port=cluster_port)
    on_node = [client.dbsize(target_nodes=node) for node in client.get_primaries()]
    assert len(on_node) == 2 and min(on_node) > 5
    client.close()
    for name in names[:10]:
        stream = store.get_stream(name, slice_bytes=64)  # type: ignore[attr-defined]
        assert b"".join(stream) == name.encode() * 100
    with pytest.raises(ConfigError):
        open_store(f"redis+cluster://127.0.0.1:{cluster_port}/1")


def test_a_server_that_is_no_cluster_is_named(redis_port: int) -> None:
    store = open_store(f"redis+cluster://127.0.0.1:{redis_port}?attempts=1")
    with pytest.raises(StoreUnavailableError, match="cluster") as caught:
        store.get("a")
    assert caught.value.reason == "cluster"


def test_waiting_for_a_name_server_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    release = threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *arguments: object, **options: object) -> object:
        if host == "slow.example" and not options.get("flags"):
            release.wait(10)
        return real(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    begin = time.monotonic()
    try:
        with pytest.raises(StoreError) as caught:
            open_store("redis://slow.example?timeout=100ms").get("a")
        assert caught.value.reason == "timeout"
        assert time.monotonic() - begin < 1.0
    finally:
        release.set()
