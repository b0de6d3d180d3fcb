import os
from pathlib import Path

import pytest

from cachegen.errors import ConfigError
from cachegen.store import (
    BreakerStore,
    LocalStore,
    MemoryStore,
    TieredStore,
    open_store,
    parse_size,
)
from cachegen.store.object import ObjectStore
from cachegen.store.open import redact
from cachegen.store.redis import RedisStore


def test_memory() -> None:
    store = open_store("memory://")
    assert isinstance(store, MemoryStore)
    assert store.quota_bytes is None
    store = open_store("memory://?quota=1.5KiB")
    assert isinstance(store, MemoryStore)
    assert store.quota_bytes == 1536


def test_file_url(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20store?quota=50GiB")
    assert isinstance(store, LocalStore)
    assert store.path == str(tmp_path / "a store")
    assert store.quota_bytes == 50 << 30
    store = open_store(f"file:{tmp_path}/other")
    assert isinstance(store, LocalStore)
    assert store.quota_bytes is None


def test_plain_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "one", str(tmp_path / "two"), "three", "./a:b", "~/four"):
        store = open_store(path)
        assert isinstance(store, LocalStore)
        store.put("a", b"x")
    assert sorted(os.listdir(tmp_path)) == ["a:b", "four", "one", "three", "two"]


@pytest.mark.parametrize("url", ["gopher://host/x", "s4://bucket", "abc:def", "MEM://"])
def test_unknown_scheme_names_those_there_are(url: str) -> None:
    with pytest.raises(ConfigError, match=r"memory:// or file:// or redis://.* or tiered:"):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "file://host/path",
        "file:relative",
        "memory://host",
        "memory:///path",
        "memory://?size=3",
        "file:///x?quota=1GB&quota=2GB",
        "file:///x?quota=",
        "file:///x?quota=many",
        "file:///x#y",
        "/path?quota=3GB",
        "",
        "redis://host/zero",
        "redis://host:99999",
        "redis://host:0x1",
        "redis://host?tl=1h",
        "redis://host?ttl=soon",
        "redis://host?cluster=perhaps",
        "redis://host/3?cluster=1",
        "redis://host?prefix=a b",
        "redis://host?password_env=NO_SUCH_VARIABLE",
        "redis://host?timeout=0",
        "redis://host?attempts=0",
        "redis://host?breaker=often",
        "redis://[::1",
        "s3://",
        "s3://bucket?no_such_option=1",
        "s3://bucket/a//b",
        "s3://user:pw@bucket",
        "tiered:memory://",
        "tiered:",
        "tiered:?write=sideways,memory://,memory://",
        "tiered:?size=1,memory://,memory://",
        "tiered:memory://,gopher://x",
        "tiered:memory://,tiered:memory://",
    ],
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", None),
        ("1", 1),
        ("4096", 4096),
        ("10B", 10),
        ("2 KB", 2000),
        ("2KiB", 2048),
        ("1.5MB", 1500000),
        ("1MiB", 1 << 20),
        ("3GB", 3 * 10**9),
        ("50GiB", 50 << 30),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        ("0.1B", None),
        ("", None),
        ("GiB", None),
        ("-1", None),
        ("1gib", None),
        ("1 G", None),
        ("1e3", None),
        ("nan", None),
        ("1,5MB", None),
    ],
)
def test_parse_size(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ConfigError, match="size"):
            parse_size(text)
    else:
        assert parse_size(text) == size


def test_remotes_come_with_a_breaker_and_connect_to_nothing() -> None:
    store = open_store("rediss://us%40er:p%2Fw@h.example:7000/3?prefix=a:&ttl=2h&timeout=250ms")
    assert isinstance(store, BreakerStore)
    inner = store.inner
    assert isinstance(inner, RedisStore)
    assert (inner.target.host, inner.target.port, inner.target.db) == ("h.example", 7000, 3)
    assert (inner.target.username, inner.target.password) == ("us@er", "p/w")
    assert (inner.target.tls, inner.target.cluster) == (True, False)
    assert (inner.prefix, inner.ttl_s, inner.timeout_s) == ("a:", 7200, 0.25)
    assert "p/w" not in repr(inner.target)
    bare = open_store("redis://host?breaker=off")
    assert isinstance(bare, RedisStore)


def test_cluster_urls() -> None:
    for url in ("redis+cluster://h:1", "redis://h:1?cluster=1"):
        store = open_store(url)
        assert isinstance(store, BreakerStore) and isinstance(store.inner, RedisStore)
        assert store.inner.target.cluster


def test_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "s3cret")
    store = open_store("redis://host?password_env=MY_SECRET&breaker=off")
    assert isinstance(store, RedisStore)
    assert store.target.password == "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/pre/fix?endpoint=http://127.0.0.1:1&access_key_id=a&secret_access_key=b",
        "gs://bucket/pre?skip_signature=true",
        "az://container?account_name=me&account_key=c2VjcmV0",
    ],
)
def test_buckets(url: str) -> None:
    store = open_store(url)
    assert isinstance(store, BreakerStore)
    assert isinstance(store.inner, ObjectStore)
    assert url.startswith(store.inner.bucket.where)
    assert store.inner.bucket.allow_http == ("http://" in url)


def test_tiers(tmp_path: Path) -> None:
    store = open_store(
        f"tiered:?write=back&promote=no&queue=1MiB,memory://?quota=1KiB,file://{tmp_path}/a%2Cb,"
        "redis://host"
    )
    assert isinstance(store, TieredStore)
    memory, local, remote = store.tiers
    assert isinstance(memory, MemoryStore) and memory.quota_bytes == 1024
    assert isinstance(local, LocalStore) and local.path == str(tmp_path / "a,b")
    assert isinstance(remote, BreakerStore)
    assert (store.write, store.promote) == ("back", False)


def test_a_bad_option_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="option quot"):
        open_store(f"file://{tmp_path}/new?quot=3")
    assert not (tmp_path / "new").exists()


def test_secrets_are_not_shown() -> None:
    url = "redis://user:pass@h,s3://b?secret_access_key=abc&access_key_id=def&region=eu"
    shown = redact(url)
    assert shown == "redis://***@h,s3://b?secret_access_key=***&access_key_id=***&region=eu"
    with pytest.raises(ConfigError) as caught:
        open_store("redis://user:pass@h?colour=red")
    assert "pass@" not in str(caught.value)
