"""What holds for every store. A new kind of store is one more entry in STORES."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from cachegen.errors import ConfigError
from cachegen.store import (
    CatalogStore,
    CreatingStore,
    ListingStore,
    LocalStore,
    MemoryStore,
    PartsStore,
    RangesStore,
    RateLimitedStore,
    Store,
    StreamingStore,
    TieredStore,
)

STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: MemoryStore(),
    "memory-quota": lambda folder: MemoryStore(1 << 30),
    "local": lambda folder: LocalStore(folder / "store"),
    "local-quota": lambda folder: LocalStore(folder / "store", 1 << 30),
    "limited": lambda folder: RateLimitedStore(MemoryStore(), 1e12),
}
REMOTES = ["redis", "cluster", "s3"]
TIERED = ["tiered", "tiered-back", "tiered-redis", "tiered-s3"]
ALL = [*STORES, *REMOTES, *TIERED]
STREAMING = ["limited", *REMOTES, *TIERED]
LISTING = sorted({*ALL} - {"limited"})

NAME = "/".join(["0a" * 32, "1b" * 32, "2c" * 8])
DATA = bytes(range(256)) * 4


@pytest.fixture(params=ALL)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, remote: Callable[..., Store]
) -> Iterator[Store]:
    kind = request.param
    if kind in STORES:
        yield STORES[kind](tmp_path)
    elif kind in REMOTES:
        yield remote(kind)
    else:
        _, _, home = kind.partition("-")
        write: Literal["through", "back"] = "back" if home == "back" else "through"
        near, far = MemoryStore(5000), LocalStore(tmp_path / "store")
        tiers = [near, far] if home in ("", "back") else [near, far, remote(home)]
        with TieredStore(tiers, write=write) as tiered:
            yield tiered


def test_is_a_store(store: Store) -> None:
    assert isinstance(store, Store)


def test_get_returns_what_was_put(store: Store) -> None:
    store.put(NAME, DATA)
    assert store.get(NAME) == DATA
    assert type(store.get(NAME)) is bytes


def test_empty_value_is_not_a_missing_one(store: Store) -> None:
    store.put(NAME, b"")
    assert store.get(NAME) == b""
    assert store.get_range(NAME, 0, 10) == b""
    assert store.exists([NAME]) == [True]


def test_put_replaces(store: Store) -> None:
    for data in (DATA, b"short", DATA * 3):
        store.put(NAME, data)
        assert store.get(NAME) == data


def test_missing_name(store: Store) -> None:
    assert store.get(NAME) is None
    assert store.get_range(NAME, 0, 1) is None
    assert store.get_range(NAME, 0, 0) is None
    assert store.exists([NAME]) == [False]
    store.delete(NAME)


def test_delete(store: Store) -> None:
    store.put(NAME, DATA)
    store.delete(NAME)
    assert store.get(NAME) is None
    assert store.exists([NAME]) == [False]


RANGES = [(0, 1024), (0, 1), (1023, 1024), (100, 200), (0, 0), (7, 7), (1000, 5000), (1024, 1024)]
RANGES += [(1024, 2000), (5000, 6000), (0, 1 << 40)]


def test_range_returns_the_bytes_that_exist(store: Store) -> None:
    store.put(NAME, DATA)
    for begin, end in RANGES:
        assert store.get_range(NAME, begin, end) == DATA[begin:end]


def test_bad_range(store: Store) -> None:
    store.put(NAME, DATA)
    for begin, end in [(-1, 5), (5, 4), (-3, -1)]:
        with pytest.raises(ConfigError, match="0 <= begin <= end"):
            store.get_range(NAME, begin, end)


def test_exists_answers_in_order(store: Store) -> None:
    names = [f"n/{i}" for i in range(20)]
    for name in names[::3]:
        store.put(name, b"x")
    assert store.exists(names) == [i % 3 == 0 for i in range(20)]
    assert store.exists([]) == []


def test_put_accepts_any_contiguous_buffer(store: Store) -> None:
    words = memoryview(DATA).cast("I")
    for data in (DATA, bytearray(DATA), memoryview(DATA), words, memoryview(words)[3:9]):
        store.put(NAME, data)
        assert store.get(NAME) == bytes(data)


def test_put_keeps_no_reference(store: Store) -> None:
    data = bytearray(DATA)
    store.put(NAME, data)
    data[:] = bytes(len(data))
    assert store.get(NAME) == DATA


def test_put_refuses_other_objects(store: Store) -> None:
    others: list[object] = ["text", 7, None, [1, 2], memoryview(DATA)[::2]]
    for data in others:
        with pytest.raises(ConfigError, match="data to store"):
            store.put(NAME, data)  # type: ignore[arg-type]
    assert store.get(NAME) is None


def test_names_that_look_alike_stay_apart(store: Store) -> None:
    names = ["a", "a/b", "a/b/c", "a.b", "a-b", "a_b", ".a", "ab", "A.b", "..a", "a..", "-"]
    for name in names:
        store.put(name, name.encode())
    assert [store.get(name) for name in names] == [name.encode() for name in names]


def test_longest_name(store: Store) -> None:
    store.put("n" * 240, DATA)
    assert store.get("n" * 240) == DATA


BAD_NAMES: list[object] = ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", "a b"]
BAD_NAMES += [
    "a\n",
    "a\0",
    "\u00e9",
    "a\\b",
    "a+b",
    "a:b",
    "a%2Fb",
    "~",
    "n" * 241,
    b"bytes",
    None,
    3,
]


def refused_by(store: Store, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put(name, DATA),
        lambda: store.get(name),
        lambda: store.get_range(name, 0, 1),
        lambda: store.exists(["a", name]),
        lambda: store.delete(name),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="object name"):
            call()


def test_bad_names_are_refused_by_every_method(store: Store) -> None:
    for name in BAD_NAMES:
        refused_by(store, name)  # type: ignore[arg-type]


def test_exists_refuses_one_string(store: Store) -> None:
    with pytest.raises(ConfigError, match="one string"):
        store.exists("abc")


def test_agrees_with_a_dictionary(store: Store) -> None:
    rng = random.Random(5)
    model: dict[str, bytes] = {}
    names = [f"ns/{i}" for i in range(8)]
    for _ in range(120):
        name = rng.choice(names)
        match rng.randrange(5):
            case 0:
                model[name] = rng.randbytes(rng.randrange(2000))
                store.put(name, model[name])
            case 1:
                model.pop(name, None)
                store.delete(name)
            case 2:
                assert store.get(name) == model.get(name)
            case 3:
                begin, end = sorted((rng.randrange(2500), rng.randrange(2500)))
                expected = model[name][begin:end] if name in model else None
                assert store.get_range(name, begin, end) == expected
            case 4:
                assert store.exists(names) == [name in model for name in names]


def test_many_threads_see_whole_values(store: Store) -> None:
    values = [bytes([i]) * (3000 + 500 * i) for i in range(4)]
    store.put(NAME, values[0])
    start = threading.Barrier(8)

    def write(value: bytes) -> None:
        start.wait()
        for _ in range(12):
            store.put(NAME, value)

    def read(_: int) -> None:
        start.wait()
        for _ in range(60):
            assert store.get(NAME) in values
            assert store.get_range(NAME, 0, 100000) in values

    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(write, value) for value in values]
        runs += [pool.submit(read, i) for i in range(4)]
    for run in runs:
        run.result()


def test_put_if_absent_creates_once(store: Store) -> None:
    assert isinstance(store, CreatingStore)
    assert store.put_if_absent(NAME, DATA) is True
    assert store.put_if_absent(NAME, b"other") is False
    assert store.get(NAME) == DATA
    store.delete(NAME)
    assert store.put_if_absent(NAME, b"") is True
    assert store.put_if_absent(NAME, b"other") is False
    assert store.get(NAME) == b""
    refused: list[tuple[str, object]] = [("a//b", DATA), ("fresh", "text"), (NAME, "text")]
    for name, data in refused:
        with pytest.raises(ConfigError):
            store.put_if_absent(name, data)  # type: ignore[arg-type]


def test_one_of_many_creators_wins(store: Store) -> None:
    assert isinstance(store, CreatingStore)
    start = threading.Barrier(8)

    def create(i: int) -> list[bool]:
        start.wait()
        return [store.put_if_absent(f"n/{j}", bytes([i]) * 5000) for j in range(10)]

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    for j in range(10):
        (winner,) = [i for i in range(8) if created[i][j]]
        assert store.get(f"n/{j}") == bytes([winner]) * 5000


@pytest.mark.parametrize("store", LISTING, indirect=True)
def test_put_in_parts(store: Store) -> None:
    assert isinstance(store, PartsStore)
    store.put(NAME, b"old")

    def parts() -> Iterator[bytes | memoryview]:
        yield DATA
        assert store.get(NAME) == b"old"
        yield b""
        yield memoryview(DATA)[:100]

    assert store.put_stream(NAME, parts()) == len(DATA) + 100
    assert store.get(NAME) == DATA + DATA[:100]
    assert store.put_stream("empty", []) == 0
    assert store.get("empty") == b""

    def broken() -> Iterator[bytes]:
        yield DATA
        raise KeyError("the maker of parts")

    with pytest.raises(KeyError):
        store.put_stream(NAME, broken())
    with pytest.raises(ConfigError, match="data to store"):
        store.put_stream(NAME, [b"x", "text"])  # type: ignore[list-item]
    assert store.get(NAME) == DATA + DATA[:100]
    assert set(store.names()) == {NAME, "empty"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("store", LISTING, indirect=True)
def test_many_ranges(store: Store) -> None:
    assert isinstance(store, RangesStore)
    assert store.get_ranges(NAME, RANGES) is None
    assert store.get_ranges(NAME, []) is None
    store.put(NAME, DATA)
    assert store.get_ranges(NAME, RANGES) == [DATA[begin:end] for begin, end in RANGES]
    assert store.get_ranges(NAME, []) == []
    store.put(NAME, b"")
    assert store.get_ranges(NAME, [(0, 0), (0, 5), (3, 9)]) == [b"", b"", b""]
    with pytest.raises(ConfigError, match="0 <= begin <= end"):
        store.get_ranges(NAME, [(0, 1), (5, 4)])


@pytest.mark.parametrize("store", LISTING, indirect=True)
def test_catalog(store: Store) -> None:
    assert isinstance(store, CatalogStore)
    begin_s = time.time()
    for name in ("a/b", "a/c", "b"):
        store.put(name, b"12345")
    found = {entry.name: entry for entry in store.entries("a/")}
    assert found.keys() == {"a/b", "a/c"}
    assert len(list(store.entries())) == 3
    for entry in found.values():
        assert entry.size_bytes == 5
        # Some stores keep whole seconds, and their clock may be another machine's.
        assert abs(entry.used_s - begin_s) < 60


@pytest.mark.parametrize("store", LISTING, indirect=True)
def test_listing(store: Store) -> None:
    assert isinstance(store, ListingStore)
    names = {"a", "a/b", NAME}
    for name in names:
        store.put(name, b"12345")
    assert set(store.names()) == names
    assert store.used_bytes() == 15
    store.delete("a")
    assert set(store.names()) == names - {"a"}
    assert store.used_bytes() == 10


@pytest.mark.parametrize("store", STREAMING, indirect=True)
@pytest.mark.parametrize("slice_bytes", [1, 100, 1024, 4096])
def test_stream_joins_to_the_range(store: Store, slice_bytes: int) -> None:
    assert isinstance(store, StreamingStore)
    store.put(NAME, DATA)
    for begin, end in [(0, None), (10, None), (100, 300), (0, 0), (5000, None), (1000, 5000)]:
        stream = store.get_stream(NAME, slice_bytes=slice_bytes, begin=begin, end=end)
        assert stream is not None
        slices = list(stream)
        assert b"".join(slices) == DATA[begin:end]
        assert all(len(part) == slice_bytes for part in slices[:-1])
    assert store.get_stream("missing", slice_bytes=slice_bytes) is None


@pytest.mark.parametrize("store", STREAMING, indirect=True)
def test_stream_refuses_bad_options(store: Store) -> None:
    assert isinstance(store, StreamingStore)
    store.put(NAME, DATA)
    for begin, end, slice_bytes in [(0, None, 0), (-1, None, 1), (0, -1, 1), (5, 4, 1)]:
        with pytest.raises(ConfigError):
            store.get_stream(NAME, slice_bytes=slice_bytes, begin=begin, end=end)
