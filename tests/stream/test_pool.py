"""Who is woken when: a change wakes those that have something to do, not everybody."""

from __future__ import annotations

import threading
import time
from collections import Counter

from fakes import FakeStore, keys_of

from cachegen.codec.registry import decode
from cachegen.stream.fetch import Fetcher
from cachegen.stream.plan import Action, PlanState
from cachegen.stream.policies import FixedPolicy

LONG_S = 30.0
CHUNKS = 4
SLICE = 500


class Slices(FakeStore):
    """Streams in slices so small that a chunk takes many."""

    def get_stream(self, name, *, slice_bytes, begin=0, end=None):
        data = self.get_range(name, begin, end)
        for at in range(0, len(data), SLICE):
            time.sleep(0.001)  # long enough for whoever is woken to wait once more
            yield data[at : at + SLICE]


class Asked(FixedPolicy):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def next(self, state: PlanState) -> Action:
        self.times += 1
        return super().next(state)


def count_wake_ups(fetcher: Fetcher) -> Counter[str]:
    """Count from now on how often threads wake, by what they waited for."""
    counted: Counter[str] = Counter()
    for name in ("_readable", "_workable", "_sooner"):
        condition = getattr(fetcher._pool, name)

        def wait(timeout=None, *, name=name, wait=condition.wait) -> bool:
            notified = wait(timeout)
            counted[name] += 1
            return notified

        condition.wait = wait
    return counted


def test_workers_wake_for_tasks_and_readers_one_at_a_time(progressive) -> None:
    store = Slices(progressive)
    # The first reads wait for each other, so that there is a thread for each of them.
    together = threading.Barrier(CHUNKS)

    def meet(number, *_):
        if number < CHUNKS:
            together.wait(LONG_S)

    store.act = meet
    with Fetcher(store, readers=CHUNKS, decoders=4) as fetcher:
        assert fetcher.request(keys_of(CHUNKS)).wait(LONG_S).reasons == {"loaded": CHUNKS}
        store.reads.clear()
        store.act = None
        woken = count_wake_ups(fetcher)
        # One object: a reader or two are busy with it, the others and the workers idle.
        seen = []
        handle = fetcher.request(keys_of(1), deliver=seen.append)
        assert handle.wait(LONG_S).reasons == {"loaded": 1}
        reads = len(store.reads)
        slices = sum(-(-(end - begin) // SLICE) for _, begin, end in store.reads)
    assert slices > 40
    # A chunk is decoded and delivered, perhaps by two of them; closing wakes all.
    assert woken["_workable"] <= 2 + 4
    # Slices, ends of reads and tasks wake one reader each, and one that reads wakes the next.
    assert woken["_readable"] <= slices + 2 * reads + 4 + CHUNKS
    # Without a deadline the clock has only stragglers to look for; and the end.
    assert woken["_sooner"] <= 2 * reads + 1


def test_who_waits_for_one_request_does_not_hear_of_another(progressive) -> None:
    release, begun = threading.Event(), threading.Event()

    def hold(data, item):
        begun.set()
        release.wait(LONG_S)
        return decode(data, key=item.key)

    with Fetcher(FakeStore(progressive), decoders=2) as fetcher:
        held = fetcher.request(keys_of(1), decode=hold)
        assert begun.wait(LONG_S)
        heard = []
        notify = held._heard.notify_all
        held._heard.notify_all = lambda: (heard.append(1), notify())
        assert fetcher.request(keys_of(CHUNKS)).wait(LONG_S).reasons == {"loaded": CHUNKS}
        assert not heard
        release.set()
        assert held.wait(LONG_S).reasons == {"loaded": 1}
        assert heard


def test_a_policy_is_not_asked_while_there_is_only_decoding_to_do(progressive) -> None:
    release = threading.Event()
    begun = threading.Semaphore(0)

    def hold(data, item):
        begun.release()
        release.wait(LONG_S)
        return decode(data, key=item.key)

    policy = Asked()
    with Fetcher(FakeStore(progressive), decoders=CHUNKS) as fetcher:
        handle = fetcher.request(keys_of(CHUNKS), policy=policy, decode=hold)
        for _ in range(CHUNKS):
            assert begun.acquire(timeout=LONG_S)
        # Whatever ends besides, nothing of this request is left to decide.
        asked = policy.times
        fetcher.request(keys_of(CHUNKS), decode=lambda data, item: None)
        assert handle.wait(0.02) is None
        assert policy.times == asked
        release.set()
        assert handle.wait(LONG_S).reasons == {"loaded": CHUNKS}
        assert policy.times <= fetcher.stats()["reads"] + CHUNKS
