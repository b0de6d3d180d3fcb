import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachegen.errors import ConfigError
from cachegen.store import MemoryStore, RateLimitedStore, limit, parse_bandwidth

MB = 1_000_000


def limited(sizes: dict[str, int], rate: float, **options: float) -> RateLimitedStore:
    inner = MemoryStore()
    for name, size in sizes.items():
        inner.put(name, bytes(size))
    return RateLimitedStore(inner, rate, **options)  # type: ignore[arg-type]


def seconds(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def assert_takes(expected_s: float, call: Callable[[], object], *, tolerance: float = 0.03) -> None:
    """Never faster than expected; once in four tries not slower (other work may delay one)."""
    times = []
    for _ in range(4):
        times.append(seconds(call))
        assert times[-1] >= expected_s * (1 - tolerance)
        if times[-1] <= expected_s * (1 + tolerance):
            return
    pytest.fail(f"expected {expected_s} s, took {times}")


@pytest.mark.parametrize("rate", [2 * MB, 200 * MB])
def test_one_object_takes_size_over_rate(rate: int) -> None:
    store = limited({"a": int(rate * 0.3)}, rate, burst_bytes=0)
    assert_takes(0.3, lambda: store.get("a"))


def test_many_objects_keep_the_long_run_rate() -> None:
    # The burst covers what each sleep overshoots by, so nothing is lost between objects.
    store = limited({"a": 300_000}, 20 * MB, burst_bytes=200_000)
    store.get("a")  # takes the burst
    assert_takes(0.45, lambda: [store.get("a") for _ in range(30)])


def test_slow_small_slices_do_not_lose_time() -> None:
    store = limited({"a": 4 * MB}, 10 * MB, burst_bytes=0)

    def consume() -> None:
        stream = store.get_stream("a", slice_bytes=2_000)  # 0.2 ms each
        assert stream is not None
        assert sum(len(part) for part in stream) == 4 * MB

    assert_takes(0.4, consume)


class LateClock:
    """A clock whose sleeps all take 4 ms too long."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, wait_s: float) -> None:
        self.now += wait_s + 0.004


def test_late_wakes_are_repaid(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock()
    monkeypatch.setattr(limit, "time", clock)
    store = limited({"a": 10 * MB}, 10 * MB, burst_bytes=0)
    store.get("a")
    assert 1.0 <= clock.now <= 1.005
    clock.now = 0.0
    store = limited({"a": 10 * MB}, 10 * MB, burst_bytes=0)
    assert len(list(store.get_stream("a", slice_bytes=20_000) or ())) == 500
    assert 1.0 <= clock.now <= 1.005


def test_callers_share_the_link() -> None:
    store = limited({"a": 2 * MB}, 20 * MB, burst_bytes=0)
    ends = []

    def read(_: int) -> None:
        store.get("a")
        ends.append(time.monotonic())

    def both() -> None:
        ends.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))

    assert_takes(0.4, both)
    assert max(ends) - min(ends) < 0.2  # side by side, not one after the other


def test_burst_comes_at_once_and_refills() -> None:
    store = limited({"a": 100_000}, MB, burst_bytes=100_000)
    assert seconds(lambda: store.get("a")) < 0.05
    assert seconds(lambda: store.get("a")) > 0.06
    time.sleep(0.12)
    assert seconds(lambda: store.get("a")) < 0.05


def test_idle_time_earns_no_more_than_the_burst() -> None:
    store = limited({"a": 200_000}, 2 * MB, burst_bytes=20_000)
    store.get("a")
    time.sleep(0.1)
    assert_takes(0.09, lambda: store.get("a"), tolerance=0.1)


def test_range_pays_for_the_range() -> None:
    store = limited({"a": 2 * MB}, 5 * MB, burst_bytes=0)
    assert_takes(0.2, lambda: store.get_range("a", 0, MB), tolerance=0.05)
    assert seconds(lambda: store.get_range("a", 0, 10)) < 0.05


def test_latency_is_paid_by_each_call_and_in_parallel() -> None:
    store = limited({"a": 10}, MB, latency_s=0.05)
    for call in (
        lambda: store.get("a"),
        lambda: store.get("missing"),
        lambda: store.get_range("a", 0, 1),
        lambda: store.exists(["a", "b", "c"]),
        lambda: store.get_stream("a", slice_bytes=1),
    ):
        assert 0.05 <= seconds(call) < 0.15
    with ThreadPoolExecutor(5) as pool:
        assert seconds(lambda: list(pool.map(store.get, ["a"] * 5))) < 0.2


def test_writes_pass_unless_limited() -> None:
    store = limited({}, MB, burst_bytes=0)
    assert seconds(lambda: store.put("a", bytes(200_000))) < 0.1
    store = limited({}, MB, burst_bytes=0, limit_writes=True)
    assert_takes(0.2, lambda: store.put("a", bytes(200_000)), tolerance=0.05)
    assert store.get("a") == bytes(200_000)


def test_stream_delivers_progressively() -> None:
    store = limited({"a": 400_000}, MB, burst_bytes=0)
    begin = time.monotonic()
    stream = store.get_stream("a", slice_bytes=50_000)
    assert stream is not None
    for i, _ in enumerate(stream, start=1):
        assert time.monotonic() - begin >= 0.05 * i - 0.002


def test_stream_waits_for_a_slow_consumer() -> None:
    # 0.2 s asleep would be the whole value; the link runs ahead by 50 ms only.
    store = limited({"a": 200_000}, MB, burst_bytes=0)
    stream = store.get_stream("a", slice_bytes=10_000)
    assert stream is not None
    next(stream)
    time.sleep(0.2)
    assert seconds(lambda: list(stream)) > 0.1


def test_closing_a_stream_frees_the_link() -> None:
    store = limited({"a": 5 * MB, "b": 10_000}, MB, burst_bytes=0)
    stream = store.get_stream("a", slice_bytes=10_000)
    assert stream is not None
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert seconds(lambda: store.get("b")) < 0.1


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        RateLimitedStore(MemoryStore(), rate)


def test_bad_burst_and_latency() -> None:
    with pytest.raises(ConfigError, match="burst"):
        RateLimitedStore(MemoryStore(), 1, burst_bytes=-1)
    with pytest.raises(ConfigError, match="latency"):
        RateLimitedStore(MemoryStore(), 1, latency_s=-0.1)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8bps", 1),
        ("8kbps", 1000.0),
        ("100Mbps", 12500000.0),
        ("2.5 Gbps", 312500000.0),
        ("3B/s", 3),
        ("1KB/s", 1000.0),
        ("10MB/s", 10000000.0),
        ("1GB/s", 1000000000.0),
        (" 1KiB/s ", 1024),
        ("2MiB/s", 2 << 20),
        ("1GiB/s", 1 << 30),
    ],
)
def test_parse_bandwidth(text: str, rate: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "100", "Mbps", "100MBps", "100mbps", "100 M", "-1Mbps", "0Mbps", "1e3bps", "1 mb/s"],
)
def test_bad_bandwidth_names_the_units(text: str) -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        parse_bandwidth(text)


def test_a_rate_that_changes() -> None:
    """Half of the bytes at the first rate, half at a third of it."""
    inner = MemoryStore()
    inner.put("a", bytes(MB))

    def schedule(time_s: float) -> tuple[float, float]:
        return (10 * MB, 0.05) if time_s < 0.05 else (10 * MB / 3, math.inf)

    store = RateLimitedStore(inner, 10 * MB, burst_bytes=0, schedule=schedule)
    for _ in range(2):
        store.restart()
        begin = time.perf_counter()
        store.get("a")
        assert time.perf_counter() - begin >= 0.05 + 0.15 - 0.001
    link = RateLimitedStore(inner, 10 * MB, burst_bytes=0, schedule=schedule)._link
    due = link.reserve(MB, None)
    assert due - link._began == pytest.approx(0.2, abs=0.005)
