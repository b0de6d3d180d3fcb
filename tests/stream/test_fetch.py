"""The fetcher with its threads: overlap, deadlines that hold, faults of the store, callbacks, ends.

Times are asserted only as ratios within a run, or as the bound that nothing hangs.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from fakes import FakeStore, Paced, encode_all, keys_of

from cachegen.codec.int8 import Int8Codec
from cachegen.codec.registry import decode
from cachegen.errors import ConfigError, StoreError, StoreTimeoutError
from cachegen.store.memory import MemoryStore
from cachegen.stream.bandwidth import BandwidthEstimator
from cachegen.stream.fetch import Fetcher
from cachegen.stream.outcome import Reason
from cachegen.stream.policies import DeadlinePolicy, FixedPolicy

# What a request may take beyond its deadline, the machine being busy with other things as well.
SLACK_S = 0.1
LONG_S = 30.0


@pytest.fixture
def fetcher_of():
    """Fetchers that are closed at the end, and after which no thread is left."""
    before = set(threading.enumerate())
    opened: list[Fetcher] = []
    releases: list[threading.Event] = []

    def build(store, *, release: threading.Event | None = None, **settings) -> Fetcher:
        opened.append(Fetcher(store, **settings))
        releases.extend([release] if release else [])
        return opened[-1]

    yield build
    for release in releases:
        release.set()
    for fetcher in opened:
        fetcher.close()
    until = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.005)
    assert not {thread.name for thread in set(threading.enumerate()) - before}


def same(chunk, other) -> bool:
    return all(
        np.array_equal(a.keys, b.keys) and np.array_equal(a.values, b.values)
        for a, b in zip(chunk.layers, other.layers, strict=True)
    )


def test_chunks_come_decoded_and_in_order(progressive, fetcher_of) -> None:
    fetcher = fetcher_of(FakeStore(progressive))
    handle = fetcher.request(keys_of(4))
    items = list(handle)
    for item, data in zip(items, progressive.values(), strict=True):
        assert item.reason is Reason.LOADED
        assert same(item.chunk, decode(data))
        assert item.read_bytes == item.object_bytes == len(data)
        assert item.data == b""
    report = handle.wait(LONG_S)
    assert report is not None and report.chunks == tuple(items)
    assert handle.is_over
    assert fetcher.stats()["chunks.loaded"] == 4
    assert list(handle) == items


def test_every_codec_and_store(chunks, fetcher_of) -> None:
    store, keys = MemoryStore(), keys_of(4)
    for name, data in encode_all(Int8Codec(), chunks, keys).items():
        store.put(name, data)
    items = list(fetcher_of(store).request(keys))
    assert [item.distortion for item in items] == [0.0] * 4
    assert same(items[3].chunk, decode(store.get(keys[3].name)))


def test_delivery_is_in_order_and_one_at_a_time(progressive, fetcher_of) -> None:
    seen, busy = [], threading.Lock()

    def deliver(item) -> None:
        assert busy.acquire(blocking=False)
        seen.append((item.index, item.chunk.first_position))
        time.sleep(0.002)
        busy.release()

    fetcher = fetcher_of(FakeStore(progressive), decoders=4)
    report = fetcher.request(keys_of(4), deliver=deliver).wait(LONG_S)
    assert seen == [(0, 0), (1, 64), (2, 128), (3, 192)]
    assert report.reasons == {"loaded": 4}


def test_network_and_decoding_overlap(progressive, fetcher_of) -> None:
    def slow(data, item):
        time.sleep(0.05)
        return decode(data, key=item.key)

    ratios = []
    for _ in range(3):  # a busy machine may hold up one of them
        store = Paced(progressive, 110_000 / 0.2)
        fetcher = fetcher_of(store, decoders=1)
        begin = time.perf_counter()
        items = list(fetcher.request(keys_of(4), decode=slow))
        wall = time.perf_counter() - begin
        decoding = sum(item.decode_s for item in items)
        assert decoding >= 4 * 0.05
        ratios.append(wall / (store.busy_s + decoding))
        if ratios[-1] < 0.95:
            break
    assert min(ratios) < 0.95


def test_a_stalled_store_does_not_hold_up_the_deadline(progressive, fetcher_of) -> None:
    release = threading.Event()
    good = [10**9]

    def stall(number, *_):
        if number >= good[0]:
            release.wait(LONG_S)

    store = FakeStore(progressive, stall)
    # Readers of other tests may still hang in stores of theirs.
    others = set(threading.enumerate())
    fetcher = fetcher_of(store, release=release)
    assert fetcher.request(keys_of(4)).wait(LONG_S).reasons == {"loaded": 4}
    good[0] = len(store.reads) + 6
    outcomes = []
    for _ in range(2):
        begin = time.monotonic()
        handle = fetcher.request(keys_of(4), deadline_s=0.4, policy=DeadlinePolicy())
        report = handle.wait(LONG_S)
        assert time.monotonic() - begin <= 0.4 + SLACK_S
        assert report is not None and len(report.chunks) == 4
        outcomes.append(report)
    # What came before the stall is used as far as this machine decodes it in time.
    assert set(outcomes[0].reasons) <= {"loaded", "late"}
    assert outcomes[0].wire_bytes >= 4 * 8192
    assert outcomes[1].reasons == {"late": 4}
    mine = set(threading.enumerate()) - others
    assert sum(thread.name == "cachegen-read" for thread in mine) <= 16


def test_readers_that_hang_are_replaced(progressive, fetcher_of) -> None:
    release, broken = threading.Event(), threading.Event()
    broken.set()

    def stall(*_):
        if broken.is_set():
            release.wait(LONG_S)

    fetcher = fetcher_of(FakeStore(progressive, stall), release=release)
    assert fetcher.request(keys_of(4), deadline_s=0.05).wait(LONG_S).reasons == {"late": 4}
    broken.clear()
    assert fetcher.request(keys_of(4)).wait(LONG_S).reasons == {"loaded": 4}
    assert not release.is_set()


class Trickle(FakeStore):
    """Streams: a first slice at once, then nothing until it is told to go on."""

    def __init__(self, objects, go_on: threading.Event) -> None:
        super().__init__(objects)
        self.go_on = go_on
        self.closed = 0

    def get_stream(self, name, *, slice_bytes, begin=0, end=None):
        data = super().get_range(name, begin, end)
        return None if data is None else self._slices(data)

    def _slices(self, data):
        try:
            yield memoryview(data)[:6000]
            self.go_on.wait(LONG_S)
            yield memoryview(data)[6000:]
        finally:
            self.closed += 1


def test_what_a_stream_has_brought_counts(progressive, fetcher_of) -> None:
    """At the deadline no read has ended, but the first slices hold the first pass of a chunk."""
    go_on = threading.Event()
    store = Trickle(progressive, go_on)
    fetcher = fetcher_of(store, release=go_on)
    report = fetcher.request(keys_of(4), deadline_s=0.3, policy=DeadlinePolicy()).wait(LONG_S)
    assert report.seconds <= 0.3 + SLACK_S
    assert report.wire_bytes == 4 * 6000
    go_on.set()
    report = fetcher.request(keys_of(4)).wait(LONG_S)
    assert report.reasons == {"loaded": 4}
    del store.objects[keys_of(4)[0].name]
    assert fetcher.request(keys_of(4)).wait(LONG_S).chunks[0].reason is Reason.MISSING
    fetcher.close()
    assert store.closed >= 4


def test_a_store_that_hangs_at_once(progressive, fetcher_of) -> None:
    release = threading.Event()
    fetcher = fetcher_of(
        FakeStore(progressive, lambda *_: release.wait(LONG_S) and None), release=release
    )
    begin = time.monotonic()
    report = fetcher.request(keys_of(4), deadline_s=0.1).wait(LONG_S)
    assert time.monotonic() - begin <= 0.1 + SLACK_S
    assert report.reasons == {"late": 4}


class Breaking(FakeStore):
    """Streams one object only up to a place, and then fails."""

    def get_stream(self, name, *, slice_bytes, begin=0, end=None):
        data = super().get_range(name, begin, end)
        return None if data is None else self._slices(name, data, begin)

    def _slices(self, name, data, begin):
        for at in range(0, len(data), 2000):
            if name == keys_of(4)[1].name and begin + at >= 22_000:
                raise StoreError("link", got="a reset")
            yield memoryview(data)[at : at + 2000]


def test_an_error_midway_keeps_what_is_whole(progressive, fetcher_of) -> None:
    # One reader: what fails comes after what is kept.
    report = fetcher_of(Breaking(progressive), readers=1).request(keys_of(4)).wait(LONG_S)
    assert report.reasons == {"loaded": 4}
    assert 0 < report.chunks[1].read_bytes < 24_000 < report.chunks[1].object_bytes
    assert isinstance(report.chunks[1].error, StoreError)
    assert report.error is report.chunks[1].error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreTimeoutError("store", got="nothing"), Reason.STORE_TIMEOUT),
        (ConnectionResetError("gone"), Reason.STORE_ERROR),
        (ValueError("a bug of the store"), Reason.STORE_ERROR),
    ],
)
def test_an_error_at_once(progressive, fetcher_of, error, reason) -> None:
    def fail(number, name, begin, end):
        if name == keys_of(4)[2].name:
            raise error

    report = fetcher_of(FakeStore(progressive, fail)).request(keys_of(4)).wait(LONG_S)
    assert [item.reason for item in report.chunks[2:]] == [reason, Reason.AFTER_MISS]
    assert report.prefix_chunks == 2
    assert report.error is error


def test_wrong_bytes_are_never_delivered(progressive, fetcher_of) -> None:
    """Any one flipped bit: either it is never read, or the chunk does not come."""
    victim = keys_of(4)[0].name
    rng = np.random.default_rng(3)
    fetcher = fetcher_of(FakeStore({}))
    store = fetcher._pool._source
    truth = decode(progressive[victim])
    for place in rng.integers(0, len(progressive[victim]), 25):
        data = bytearray(progressive[victim])
        data[place] ^= 1 << int(rng.integers(8))
        store.objects = {victim: bytes(data)}
        seen = []
        report = fetcher.request([keys_of(1)[0]], deliver=seen.append).wait(LONG_S)
        (item,) = report.chunks
        if item.came:
            assert same(seen[0].chunk, truth)
        else:
            assert item.reason in (Reason.DAMAGED, Reason.OTHER_KEY)
            assert not seen
    assert fetcher.stats()["chunks.damaged"] >= 20


def test_cancelling_in_the_middle(progressive, fetcher_of) -> None:
    release, reached = threading.Event(), threading.Event()

    def stall(number, *_):
        if number == 5:
            reached.set()
            release.wait(LONG_S)

    seen = []
    fetcher = fetcher_of(FakeStore(progressive, stall), release=release, readers=1)
    with fetcher.request(keys_of(4), deliver=seen.append) as handle:
        assert reached.wait(LONG_S)
    report = handle.wait(LONG_S)
    assert report.chunks[-1].reason is Reason.CANCELLED
    count = len(seen)
    release.set()
    time.sleep(0.02)
    assert len(seen) == count == report.prefix_chunks


def test_nothing_is_delivered_behind_the_fence(progressive, fetcher_of) -> None:
    seen = []
    fetcher = fetcher_of(FakeStore(progressive))
    report = fetcher.request(keys_of(4), deliver=seen.append, fence=lambda: len(seen) < 2).wait(
        LONG_S
    )
    assert [item.index for item in seen] == [0, 1]
    assert report.reasons == {"loaded": 2, "fenced": 2}


def test_a_delivery_under_way_ends_before_the_request(progressive, fetcher_of) -> None:
    began, go_on = threading.Event(), threading.Event()
    ended = []

    def deliver(item) -> None:
        began.set()
        go_on.wait(LONG_S)
        ended.append(item.index)

    handle = fetcher_of(FakeStore(progressive)).request(keys_of(4), deliver=deliver)
    assert began.wait(LONG_S)
    handle.cancel()
    assert handle.wait(0.02) is None
    assert not ended
    go_on.set()
    report = handle.wait(LONG_S)
    assert ended == [0]
    assert report.reasons == {"loaded": 1, "cancelled": 3}


def test_callbacks_that_raise(progressive, fetcher_of) -> None:
    def bad(*_):
        raise RuntimeError("not my day")

    fetcher = fetcher_of(FakeStore(progressive))
    report = fetcher.request(keys_of(4), deliver=bad).wait(LONG_S)
    assert report.chunks[0].reason is Reason.CALLBACK_ERROR
    assert "not my day" in str(report.error)
    assert fetcher.request(keys_of(4), progress=bad).wait(LONG_S).reasons["callback_error"] > 0
    report = fetcher.request(keys_of(4), decode=bad).wait(LONG_S)
    assert report.chunks[0].reason is Reason.DECODE_ERROR
    # The threads have outlived all of it.
    assert fetcher.request(keys_of(4)).wait(LONG_S).reasons == {"loaded": 4}


def test_direct_delivery_decodes_by_itself(progressive, fetcher_of) -> None:
    sizes = []

    def direct(item) -> None:
        assert item.chunk is None
        decode(item.data, key=item.key, allow_partial=True)
        sizes.append(len(item.data))

    fetcher = fetcher_of(FakeStore(progressive))
    report = fetcher.request(keys_of(4), direct=direct, quality="small").wait(LONG_S)
    assert report.reasons == {"loaded": 4}
    assert sizes == [item.read_bytes for item in report.chunks]
    with pytest.raises(ConfigError, match="one of them"):
        fetcher.request(keys_of(4), direct=direct, deliver=direct)


def test_recomputing_what_is_missing(progressive, chunks, fetcher_of) -> None:
    objects = dict(progressive)
    del objects[keys_of(4)[1].name]
    order = []

    def recompute(item):
        order.append(("recompute", item.index))
        return chunks[item.index]

    fetcher = fetcher_of(FakeStore(objects))
    report = fetcher.request(
        keys_of(4), recompute=recompute, deliver=lambda item: order.append(("load", item.index))
    ).wait(LONG_S)
    assert order == [("load", 0), ("recompute", 1), ("load", 2), ("load", 3)]
    assert report.chunks[1].chunk is chunks[1]
    assert report.reasons == {"loaded": 3, "recomputed": 1}


def test_recomputing_begins_when_the_policy_says_so(progressive, chunks, fetcher_of) -> None:
    """With all the time in the world the policy recomputes chunk by chunk, and nobody waits."""
    times = []

    def recompute(item):
        times.append(time.monotonic())
        time.sleep(0.01)
        return chunks[item.index]

    fetcher = fetcher_of(FakeStore(progressive))
    report = fetcher.request(
        keys_of(4), policy=DeadlinePolicy(), deadline_s=LONG_S, recompute=recompute
    ).wait(LONG_S)
    assert report.prefix_chunks == 4
    assert report.seconds < LONG_S / 3


def test_progress_says_how_far_it_is(progressive, fetcher_of) -> None:
    seen = []
    report = (
        fetcher_of(FakeStore(progressive))
        .request(
            keys_of(4), progress=lambda report: seen.append((report.wire_bytes, len(report.chunks)))
        )
        .wait(LONG_S)
    )
    assert max(seen) == (report.wire_bytes, 4)


def test_the_urgent_request_comes_first_and_the_other_does_not_starve(
    progressive, fetcher_of
) -> None:
    store = Paced(progressive, 400e3)
    other = {f"x{name[1:]}": data for name, data in progressive.items()}
    store.objects.update(other)
    fetcher = fetcher_of(store, readers=2)
    patient = fetcher.request(keys_of(4), policy=FixedPolicy())
    urgent = fetcher.request(keys_of(4), policy=FixedPolicy(), deadline_s=LONG_S)
    report = urgent.wait(LONG_S)
    got = patient.report().wire_bytes
    assert report.reasons == {"loaded": 4}
    assert 0.1 * report.wire_bytes < got < 0.9 * report.wire_bytes
    assert patient.wait(LONG_S).reasons == {"loaded": 4}


def test_a_straggler_is_read_again(progressive, fetcher_of) -> None:
    """One read hangs; those after it go on, and a second one for its bytes gets through."""
    release, hung = threading.Event(), []
    ready = threading.Event()

    def stall(number, name, begin, end):
        if ready.is_set() and name == keys_of(1)[0].name and begin > 0 and not hung:
            hung.append((name, begin, end))
            release.wait(LONG_S)
        else:
            time.sleep(0.001)

    fetcher = fetcher_of(FakeStore(progressive, stall), release=release)
    hedged = 0
    for _ in range(3):
        report = fetcher.request(keys_of(4)).wait(LONG_S)
        assert report is not None and report.reasons == {"loaded": 4}
        hedged += report.hedged_reads
        ready.set()
    assert hung
    assert hedged >= 1


def test_memory_is_bounded(progressive, fetcher_of) -> None:
    held = []
    fetcher = fetcher_of(FakeStore(progressive), held_bytes=40_000, decoders=1)

    def progress(_report) -> None:
        pool = fetcher._pool
        with pool.lock:
            held.append(sum(state.held_bytes for state in pool._active))

    report = fetcher.request(keys_of(4), progress=progress).wait(LONG_S)
    assert report.reasons == {"loaded": 4}
    # The bound, and what the reads under way had been promised.
    assert max(held) <= 40_000 + 4 * 16_384
    report = fetcher_of(FakeStore(progressive), held_bytes=1).request(keys_of(4)).wait(LONG_S)
    assert report.reasons == {"loaded": 4}


def test_it_learns_the_link_and_the_decoder(progressive, fetcher_of) -> None:
    bandwidth = BandwidthEstimator()
    fetcher = fetcher_of(Paced(progressive, 1e6), bandwidth=bandwidth)
    guess = fetcher.speeds.speeds().decode_bytes_per_s
    for _ in range(2):
        fetcher.request(keys_of(4)).wait(LONG_S)
    rate = bandwidth.estimate(time.monotonic()).rate_bytes_per_s()
    assert 0.2e6 < rate < 2e6
    assert fetcher.speeds.speeds().decode_bytes_per_s != guess


def test_closing(progressive, fetcher_of) -> None:
    release = threading.Event()
    store = FakeStore(progressive, lambda *_: release.wait(LONG_S) and None)
    fetcher = fetcher_of(store, release=release)
    handle = fetcher.request(keys_of(4))
    fetcher.close()
    assert handle.wait(LONG_S).reasons == {"cancelled": 4}
    with pytest.raises(ConfigError, match="closed"):
        fetcher.request(keys_of(4))
    assert not Fetcher(store).stats()  # and nothing was started


def test_settings() -> None:
    for name in ("readers", "decoders", "held_bytes"):
        with pytest.raises(ConfigError):
            Fetcher(MemoryStore(), **{name: 0})
    with Fetcher(MemoryStore()) as fetcher:
        assert fetcher.request([]).wait(LONG_S).chunks == ()
        with pytest.raises(ConfigError, match="deadline"):
            fetcher.request([], deadline_s=float("nan"))
