"""Remotes that fail: no call outlives its deadline, no wrong bytes pass, each reason counts.

A deadline may be overrun by 100 ms, the one bound on time here. A machine that is busy may be late
for reasons of its own, so a call counts as hanging only if it is late three times in a row.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import servers
from proxy import STORM, Fault, Proxy

import cachegen
from cachegen.errors import (
    FormatError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from cachegen.store import BreakerPolicy, BreakerStore, deadline, open_store

DEADLINE_S = 0.1
SLACK_S = 0.1
KINDS = ["redis", "s3"]
NAME = "ns/chunk"


@pytest.fixture(scope="module")
def value(make_kv: Callable[..., cachegen.KVChunk]) -> bytes:
    """An object of our own, which knows whether it is whole: some 100 kB."""
    return cachegen.get_codec("raw").encode(make_kv(layers=4, heads=4, tokens=96, dim=32))


@pytest.fixture
def broken(
    request: pytest.FixtureRequest, value: bytes
) -> Iterator[Callable[..., tuple[BreakerStore, Proxy]]]:
    """A store behind a proxy, with a value in it and a circuit that never opens."""
    proxies = []

    def make(kind: str, options: str = "") -> tuple[BreakerStore, Proxy]:
        port = request.getfixturevalue(f"{kind}_port")
        proxies.append(Proxy(port))
        proxy = proxies[-1]
        if kind == "s3":
            url = servers.s3_url(proxy.port, "bucket", "faults", breaker=10**9)
        else:
            url = f"redis://127.0.0.1:{proxy.port}?prefix=faults:&breaker={10**9}"
        store = open_store(url + options)
        assert isinstance(store, BreakerStore)
        store.put(NAME, value)
        return store, proxy

    yield make
    for proxy in proxies:
        proxy.close()


def calls(store: BreakerStore, value: bytes) -> dict[str, Callable[[], object]]:
    """Every kind of call, each with a result that can be compared."""
    size = len(value)
    return {
        "get": lambda: store.get(NAME),
        "get_range": lambda: store.get_range(NAME, 0, size),
        "get_ranges": lambda: store.get_ranges(NAME, [(0, size), (5, 50)]),
        "get_stream": lambda: b"".join(store.get_stream(NAME, slice_bytes=4096) or ()),
        "exists": lambda: store.exists([NAME, "missing"]),
        "put": lambda: store.put(NAME, value),
        "put_if_absent": lambda: store.put_if_absent(NAME, b"other"),
        "put_stream": lambda: store.put_stream(NAME, [value]),
        "delete": lambda: store.delete("missing"),
        "entries": lambda: sorted(entry.size_bytes for entry in store.entries("ns/")),
    }


READS = ("get", "get_range", "get_ranges", "get_stream")


def right(value: bytes) -> dict[str, object]:
    return {
        "get": value,
        "get_range": value,
        "get_ranges": [value, value[5:50]],
        "get_stream": value,
        "exists": [True, False],
        "put": None,
        "put_if_absent": False,
        "put_stream": len(value),
        "delete": None,
        "entries": [len(value)],
    }


def within_deadline(call: Callable[[], object], timeout_s: float = DEADLINE_S) -> object:
    """Make a call under a deadline. Returns: its result or its StoreError."""
    for _ in range(3):
        begin = time.monotonic()
        try:
            with deadline(timeout_s):
                outcome = call()
        except StoreError as error:
            outcome = error
        elapsed_s = time.monotonic() - begin
        if elapsed_s <= timeout_s + SLACK_S:
            return outcome
    raise AssertionError(f"{elapsed_s:.3f} s for a deadline of {timeout_s} s")


# What each fault may be called; a call that succeeds all the same must be right.
FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "refused": (Fault("refuse"), {"refused"}),
    "stall": (Fault("stall"), {"timeout"}),
    "stall in the middle": (Fault("stall", after_bytes=3000), {"timeout"}),
    "reset": (Fault("reset"), {"reset", "short", "unavailable"}),
    "reset in the middle": (Fault("reset", after_bytes=3000), {"reset", "short", "unavailable"}),
    "short body": (Fault("close", after_bytes=3000), {"reset", "short", "unavailable"}),
    "closed at once": (Fault("close"), {"reset", "short", "unavailable"}),
    "slow first byte": (Fault("delay", delay_s=1.0), {"timeout"}),
    "dribble": (Fault("dribble", delay_s=0.02), {"timeout"}),
    "storm": (Fault("storm"), {"slow_down", "loading"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", FAULTS)
def test_no_call_outlives_its_deadline(
    broken: Callable[..., tuple[BreakerStore, Proxy]], value: bytes, kind: str, label: str
) -> None:
    store, proxy = broken(kind)
    fault, reasons = FAULTS[label]
    if fault.kind == "storm":
        fault = Fault("storm", storm=STORM[kind])
    failed = set()
    for name, call in calls(store, value).items():
        proxy.fault = fault
        proxy.drop_connections()
        before = store.stats()
        outcome = within_deadline(call)
        after = store.stats()
        if isinstance(outcome, StoreError):
            # The client of S3 does not say why a part of an upload was not sent.
            known = reasons | ({"unavailable"} if name == "put_stream" else set())
            assert outcome.reason in known, (name, outcome)
            key = f"failures.{outcome.reason}"
            assert after[key] > before.get(key, 0), name
            failed.add(name)
        else:
            assert outcome == right(value)[name], name
    # Faults in the middle leave short replies alone; all others hit every call.
    spares_short = fault.after_bytes or fault.kind == "dribble"
    assert failed >= (set(READS) if spares_short else set(right(value)))
    proxy.fault = None
    proxy.drop_connections()
    for name, call in calls(store, value).items():
        assert within_deadline(call, 10.0) == right(value)[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_are_never_decoded(
    broken: Callable[..., tuple[BreakerStore, Proxy]], value: bytes, kind: str
) -> None:
    store, proxy = broken(kind)
    damaged = 0
    for after_bytes in (0, 700, 3000, 40_000):
        proxy.fault = Fault("corrupt", after_bytes=after_bytes)
        for name in READS:
            proxy.drop_connections()
            outcome = within_deadline(calls(store, value)[name])
            data = outcome[0] if isinstance(outcome, list) else outcome
            if isinstance(data, bytes) and data != value:
                damaged += 1
                with pytest.raises(FormatError):
                    cachegen.decode(data)
    assert damaged >= 4
    proxy.fault = None
    proxy.drop_connections()
    assert store.get(NAME) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_is_never_a_miss(
    broken: Callable[..., tuple[BreakerStore, Proxy]], kind: str
) -> None:
    store, proxy = broken(kind)
    for fault in (Fault("refuse"), Fault("stall"), Fault("close"), Fault("reset")):
        proxy.fault = fault
        with pytest.raises(StoreError), deadline(0.05):
            store.get("missing")
        with pytest.raises(StoreError), deadline(0.05):
            store.exists(["missing"])


@pytest.mark.parametrize("kind", KINDS)
def test_short_trouble_is_survived_by_trying_again(
    broken: Callable[..., tuple[BreakerStore, Proxy]], value: bytes, kind: str
) -> None:
    store, proxy = broken(kind)
    for name in ("get", "get_ranges", "put", "exists"):
        proxy.fault = Fault("close")
        proxy.drop_connections()

        def heal() -> None:
            # The first try meets the fault, a later one does not.
            while not any(key.startswith("retries") for key in store.stats()):
                time.sleep(0.001)
            proxy.fault = None

        healer = threading.Thread(target=heal)
        healer.start()
        with deadline(10):
            assert calls(store, value)[name]() == right(value)[name]
        healer.join()
    assert store.stats()["retries"] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_timeout_holds_without_a_deadline(
    broken: Callable[..., tuple[BreakerStore, Proxy]], kind: str
) -> None:
    store, proxy = broken(kind, "&timeout=200ms")
    proxy.fault = Fault("stall")
    proxy.drop_connections()
    begin = time.monotonic()
    with pytest.raises(StoreTimeoutError):
        store.get(NAME)
    assert 0.15 < time.monotonic() - begin < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_hands_over_what_came_before_the_stall(
    broken: Callable[..., tuple[BreakerStore, Proxy]], value: bytes, kind: str
) -> None:
    store, proxy = broken(kind)
    proxy.fault = Fault("stall", after_bytes=50_000)
    proxy.drop_connections()
    received = b""
    begin = time.monotonic()
    with deadline(1.0):
        stream = store.get_stream(NAME, slice_bytes=4096)
        assert stream is not None
        with pytest.raises(StoreTimeoutError):
            for part in stream:
                received += part
    assert time.monotonic() - begin < 3.0
    assert 40_000 <= len(received) <= 50_000
    assert value.startswith(received)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_closed_early_stops_the_transfer(
    broken: Callable[..., tuple[BreakerStore, Proxy]], kind: str
) -> None:
    store, proxy = broken(kind)
    large = bytes(32 << 20)
    store.put("large", large)
    proxy.reply_bytes = 0
    stream = store.get_stream("large", slice_bytes=1 << 16)
    assert stream is not None
    assert next(stream) == large[: 1 << 16]
    stream.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    assert proxy.reply_bytes < len(large) // 2
    assert store.get_range("large", 5, 9) == bytes(4)
    store.delete("large")


@pytest.mark.parametrize("kind", KINDS)
def test_a_circuit_spares_a_store_that_is_down(
    broken: Callable[..., tuple[BreakerStore, Proxy]], value: bytes, kind: str
) -> None:
    store, proxy = broken(kind)
    quick = BreakerStore(store.inner, cachegen_policy(), where="the remote")
    proxy.fault = Fault("refuse")
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            quick.get(NAME)
    begin = time.monotonic()
    for _ in range(100):
        with pytest.raises(StoreUnavailableError, match="failures in a row") as caught:
            quick.get(NAME)
        assert caught.value.reason == "circuit_open"
    assert time.monotonic() - begin < 1.5
    proxy.fault = None
    time.sleep(2.0)
    assert quick.get(NAME) == value
    assert quick.stats()["refused"] == 100


def cachegen_policy() -> BreakerPolicy:

    return BreakerPolicy(failures=3, pause_s=2.0)


def test_a_server_that_is_killed_and_comes_back(value: bytes, tmp_path: Path) -> None:
    port = servers.free_port()
    command = servers.redis_command(port)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        servers.wait_for_port(port, process)
        store = open_store(f"redis://127.0.0.1:{port}?breaker=off")
        store.put(NAME, value)
        stream = store.get_stream(NAME, slice_bytes=1000)  # type: ignore[attr-defined]
        next(stream)
        process.kill()
        process.wait()
        outcome = within_deadline(lambda: store.get(NAME))
        assert isinstance(outcome, StoreError) and outcome.reason in ("refused", "reset")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        servers.wait_for_port(port, process)
        assert store.get(NAME) is None
        store.put(NAME, value)
        assert store.get(NAME) == value
    finally:
        process.kill()
        process.wait()


def test_a_full_server_says_so(value: bytes) -> None:
    with servers.redis_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as port:
        store = open_store(f"redis://127.0.0.1:{port}")
        with pytest.raises(StoreFullError, match="maxmemory"):
            for number in range(100):
                store.put(f"n/{number}", value)
        assert store.get("n/0") == value
    with servers.redis_server("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru") as port:
        store = open_store(f"redis://127.0.0.1:{port}")
        for number in range(100):
            store.put(f"n/{number}", value)
        assert store.get("n/0") is None
