"""Requests on a virtual clock: what is read, what is decoded when, what becomes of each chunk."""

from __future__ import annotations

import math

import pytest
from fakes import VirtualRun, encode_all, keys_of

from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.levels import prefix_bytes
from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.outcome import Reason
from cachegen.stream.policies import CachegenPolicy, DeadlinePolicy, FixedPolicy, HybridPolicy
from cachegen.stream.request import RequestState
from cachegen.stream.speeds import Speeds

WHOLE = 110_000  # bytes of the four objects, about


def request(policy=None, *, deadline=math.inf, decode_s: float = 0.01, keys=None, **settings):
    return RequestState(
        keys_of(4) if keys is None else keys,
        policy or FixedPolicy(),
        now_s=0.0,
        deadline_s=deadline,
        decode_cost=lambda size: decode_s,
        **settings,
    )


def run(objects, state, rate=1e6, **settings):
    pace = rate if callable(rate) else lambda now: rate
    return VirtualRun(state, objects, rate=pace, **settings).run()


def test_everything_in_order(progressive) -> None:
    report = run(progressive, request())
    assert [item.index for item in report.chunks] == [0, 1, 2, 3]
    assert report.reasons == {"loaded": 4}
    assert report.prefix_chunks == 4
    sizes = [len(data) for data in progressive.values()]
    assert [item.read_bytes for item in report.chunks] == sizes
    assert report.wire_bytes == sum(sizes)
    # Decoding hides behind the network, but for that of the last chunk.
    assert report.seconds == pytest.approx(sum(sizes) / 1e6 + 0.01, rel=0.02)


def test_a_quality_is_the_end(progressive) -> None:
    report = run(progressive, request(quality="small"))
    for item, data in zip(report.chunks, progressive.values(), strict=True):
        wanted = prefix_bytes(read_header(data), "small")
        assert item.read_bytes == wanted < item.object_bytes
        assert 0 < item.distortion < 0.4


def test_nothing_behind_a_miss_is_read(progressive) -> None:
    objects = dict(progressive)
    del objects[keys_of(4)[1].name]
    report = run(objects, request())
    assert [item.reason for item in report.chunks] == [
        Reason.LOADED,
        Reason.MISSING,
        Reason.AFTER_MISS,
        Reason.AFTER_MISS,
    ]
    assert report.prefix_chunks == 1
    # The headers of all were asked for at once, the rest of the later chunks never.
    assert report.wire_bytes <= len(objects[keys_of(4)[0].name]) + 2 * 8192


def test_a_miss_is_recomputed_where_that_is_possible(progressive) -> None:
    objects = dict(progressive)
    del objects[keys_of(4)[1].name]
    state = request(can_recompute=True, delivers=True)
    report = run(objects, state, prefill_s=0.02)
    assert [item.reason for item in report.chunks] == [
        Reason.LOADED,
        Reason.RECOMPUTED,
        Reason.LOADED,
        Reason.LOADED,
    ]


def test_damage_is_a_miss(progressive) -> None:
    keys = keys_of(4)
    for position, reason in ((40, Reason.DAMAGED), (0, Reason.DAMAGED)):
        objects = dict(progressive)
        data = bytearray(objects[keys[2].name])
        data[position] ^= 1
        objects[keys[2].name] = bytes(data)
        assert run(objects, request()).chunks[2].reason is reason
    objects = dict(progressive)
    objects[keys[2].name] = objects[keys[0].name]
    assert run(objects, request()).chunks[2].reason is Reason.OTHER_KEY
    objects[keys[2].name] = progressive[keys[2].name][:12_000]
    report = run(objects, request())
    assert report.chunks[2].reason is Reason.DAMAGED
    assert "cut short" in str(report.error)
    objects[keys[2].name] = b""
    assert run(objects, request()).chunks[2].reason is Reason.DAMAGED


@pytest.mark.parametrize("failure", [OSError("reset"), None])
def test_a_failed_read_does_not_discard_the_ones_before_it(progressive, failure) -> None:
    (data,) = list(progressive.values())[:1]
    state = request(keys=keys_of(1))
    link, speeds = LinkEstimate.known(1e6), Speeds(None, 1e9)

    def take(read) -> None:
        part = data[read.begin : read.end]
        state.receive(read, read.begin, part, 0.0)
        state.end_read(read, 0.0, got_bytes=len(part))

    reads = []
    for _ in range(4):
        reads.append(state.next_read(0.0, link=link, speeds=speeds, slice_bytes=6000))
        if len(reads) == 1:
            take(reads[0])
    state.end_read(reads[3], 0.0, is_missing=failure is None, error=failure)
    assert state.next_read(0.0, link=link, speeds=speeds, slice_bytes=6000) is None
    assert state.next_task() is None
    take(reads[1])
    assert state.next_task() is None
    take(reads[2])
    task = state.next_task()
    assert task is not None and task.item.error is failure
    assert reads[2].begin < task.item.read_bytes <= reads[3].begin


@pytest.mark.parametrize("rate", [300e3, 600e3, 1e6, 3e6])
def test_a_deadline_is_met_with_what_has_come(progressive, rate) -> None:
    state = request(DeadlinePolicy(), deadline=0.2)
    report = run(progressive, state, rate)
    assert report.reasons == {"loaded": 4}
    assert report.seconds <= 0.2
    carried = rate * (0.2 - 0.01)
    assert sum(item.read_bytes for item in report.chunks) > min(0.5 * carried, 0.9 * WHOLE)


def test_more_bandwidth_is_more_quality(progressive) -> None:
    left = []
    for rate in (300e3, 500e3, 700e3, 2e6):
        report = run(progressive, request(DeadlinePolicy(), deadline=0.2), rate)
        left.append(sum(item.distortion for item in report.chunks))
    assert left == sorted(left, reverse=True)
    assert left[0] > 4 * left[-1]


def test_bandwidth_that_falls_tenfold(progressive) -> None:
    def rate(now: float) -> float:
        return 1e6 if now < 0.05 else 1e5

    report = run(progressive, request(DeadlinePolicy(), deadline=0.3), rate)
    assert report.reasons == {"loaded": 4}
    assert report.seconds <= 0.3
    kept = sum(item.distortion for item in report.chunks)
    steady = run(progressive, request(DeadlinePolicy(), deadline=0.3), 1e6)
    assert kept > sum(item.distortion for item in steady.chunks)


def test_a_deadline_that_nothing_can_meet(progressive) -> None:
    report = run(progressive, request(DeadlinePolicy(), deadline=0.05), 20e3)
    assert report.seconds == pytest.approx(0.05)
    assert set(report.reasons) <= {"late", "left_out", "after_miss"}
    assert report.prefix_chunks == 0


def test_a_deadline_during_decoding(progressive) -> None:
    # Decoding takes three times as long as anyone could know.
    state = request(FixedPolicy(), deadline=0.16, decode_s=0.01)
    report = run(progressive, state, 1e6, decode_s=0.05)
    assert report.seconds == pytest.approx(0.16)
    assert [item.reason for item in report.chunks][:2] == [Reason.LOADED, Reason.LOADED]
    assert report.chunks[3].reason is Reason.LATE
    assert report.chunks[3].chunk is None


def test_decoding_begins_just_in_time(progressive) -> None:
    """The fixed rule would read on past the deadline; what is whole is decoded before it."""
    state = request(FixedPolicy(), deadline=0.1, decode_s=0.02)
    report = run(progressive, state, 700e3, decode_s=0.02)
    came = [item for item in report.chunks if item.came]
    assert len(came) >= 2
    assert came[-1].read_bytes < came[-1].object_bytes
    assert report.seconds <= 0.1


def test_cancelling(progressive) -> None:
    state = request()
    runner = VirtualRun(state, progressive, rate=lambda now: 1e6)
    runner._at(0.05, lambda: state.cancel(0.05))
    report = runner.run()
    assert report.seconds == pytest.approx(0.05)
    assert [item.reason for item in report.chunks][-1] is Reason.CANCELLED
    assert state.held_bytes == 0


def test_the_paper_rule_takes_separate_objects(chunks) -> None:
    versions = [CacheGenCodec(level=level) for level in (1, 2, 3)]
    names = [keys_of(4, bytes([level])) for level in (1, 2, 3)]
    objects: dict[str, bytes] = {}
    for codec, keys in zip(versions, names, strict=True):
        objects.update(encode_all(codec, chunks, keys))
    keys = list(zip(*names, strict=True))
    fast = run(objects, request(CachegenPolicy(), keys=keys, deadline=1.0), 2e6)
    slow = run(objects, request(CachegenPolicy(), keys=keys, deadline=0.25), 1.0e6)
    assert fast.reasons == slow.reasons == {"loaded": 4}
    assert [item.version for item in fast.chunks][1:] == [2, 2, 2]
    assert sum(item.version for item in slow.chunks) < sum(item.version for item in fast.chunks)
    for item in (*fast.chunks, *slow.chunks):
        assert item.read_bytes == item.object_bytes == len(objects[item.key.name])


def test_both_ends_meet(progressive) -> None:
    state = request(HybridPolicy(), deadline=0.2, can_recompute=True, delivers=True)
    report = run(progressive, state, 1e6, prefill_s=0.05)
    reasons = [item.reason for item in report.chunks]
    assert reasons[0] is Reason.RECOMPUTED
    assert reasons[-1] is Reason.LOADED
    assert report.prefix_chunks == 4


def test_a_policy_that_would_recompute_for_ever_does_not_wait(progressive) -> None:
    """Chunks that are delivered stay as they are, however much time is left."""
    state = request(DeadlinePolicy(), deadline=60.0, can_recompute=True, delivers=True)
    report = run(progressive, state, 1e6, prefill_s=0.5)
    assert report.prefix_chunks == 4
    assert report.seconds < 3.0


def test_no_keys() -> None:
    state = request(keys=[])
    assert state.is_over
    assert state.report().chunks == ()


def test_a_fence_ends_it(progressive) -> None:
    state = request(delivers=True)
    runner = VirtualRun(state, progressive, rate=lambda now: 1e6)
    tasks = []
    end_task = state.end_task

    def fenced(task, now, **kw):
        tasks.append(task)
        if task.item.chunk is None and task.stage.name == "DECODED" and task.item.index == 1:
            state.fence(now)
        else:
            end_task(task, now, **kw)

    state.end_task = fenced
    report = runner.run()
    assert [item.reason for item in report.chunks] == [Reason.LOADED, *[Reason.FENCED] * 3]


def test_memory_is_freed_as_chunks_are_decoded(progressive) -> None:
    state = request()
    most = 0
    runner = VirtualRun(state, progressive, rate=lambda now: 1e6)
    arrive = runner._arrive

    def watched(read, data):
        nonlocal most
        arrive(read, data)
        most = max(most, state.held_bytes)

    runner._arrive = watched
    runner.run()
    assert most < WHOLE * 0.75
    assert state.held_bytes == 0
    # Under pressure a chunk is decoded with what there is of it.
    state = request(DeadlinePolicy())
    runner = VirtualRun(state, progressive, rate=lambda now: 1e6)
    runner._at(0.06, lambda: state.squeeze())
    report = runner.run()
    assert report.chunks[0].read_bytes < report.chunks[0].object_bytes
    assert report.prefix_chunks == 4
