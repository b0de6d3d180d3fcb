"""A store that dies, lies or dawdles: every request ends, with the right tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from engines import (
    BASELINE,
    CHUNK,
    HANG_S,
    Answer,
    Baseline,
    Engine,
    check_same,
    engine,
    text_tokens,
    wait_until,
)

from cachegen.errors import StoreUnavailableError
from cachegen.store.local import LocalStore
from vllm import SamplingParams

TEXT = text_tokens()
PROMPTS = [TEXT[900 * i : 900 * i + 600 + 60 * i] for i in range(6)]
HITS = [len(prompt) // CHUNK * CHUNK for prompt in PROMPTS]
# A byte of an object that every load reads, behind what the header's own checksum covers.
DAMAGED_BYTE = 15_000

BASELINE.plan(PROMPTS)


class TroubledStore:
    """A folder behind a store that does to every read what the test says.

    reads, reading: reads so far, and those that are under way.
    """

    def __init__(self, path: Path) -> None:
        self._folder = LocalStore(path)
        self.on_read: Callable[[str, int, bytes | None], bytes | None] | None = None
        self.is_dead = False
        self.reads = self.reading = 0
        self._lock = threading.Lock()

    def _check(self) -> None:
        if self.is_dead:
            raise StoreUnavailableError("store", got="connection refused")

    def put(self, name: str, data: bytes) -> None:
        self._check()
        self._folder.put(name, data)

    def get(self, name: str) -> bytes | None:
        self._check()
        return self._folder.get(name)

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        self._check()
        on_read = self.on_read
        with self._lock:
            self.reads += 1
            self.reading += 1
        try:
            data = self._folder.get_range(name, begin, end)
            data = data if on_read is None else on_read(name, begin, data)
        finally:
            with self._lock:
                self.reading -= 1
        self._check()
        return data

    def exists(self, names: Sequence[str]) -> list[bool]:
        self._check()
        return self._folder.exists(names)

    def delete(self, name: str) -> None:
        self._check()
        self._folder.delete(name)


@pytest.fixture(scope="module")
def want(baseline: Baseline) -> list[Answer]:
    return baseline(PROMPTS)


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TroubledStore]:
    store = TroubledStore(tmp_path_factory.mktemp("trouble") / "store")
    patch = pytest.MonkeyPatch()
    for side in ("scheduler", "worker"):
        patch.setattr(f"cachegen.connectors.vllm_{side}.open_store", lambda url: store)
    yield store
    patch.undo()


@pytest.fixture(scope="module")
def live(trouble: TroubledStore, want: list[Answer]) -> Iterator[Engine]:
    # The baseline's engine has ended before this one starts.
    with engine("file:///unused", max_num_seqs=4) as made:
        made.ask(PROMPTS)
        made.settle()
        yield made


@pytest.fixture(autouse=True)
def well_again(trouble: TroubledStore) -> Iterator[None]:
    yield
    trouble.on_read, trouble.is_dead = None, False


def failures(live: Engine, *reasons: str) -> float:
    return sum(live.counted("failed_loads_total", reason) for reason in reasons)


def test_all_is_well_without_trouble(live: Engine, want: list[Answer]) -> None:
    answers = live.ask(PROMPTS)
    check_same(answers, want)
    assert [a.cached_tokens for a in answers] == HITS


def test_damaged_chunks_are_computed_and_replaced(
    live: Engine, trouble: TroubledStore, want: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachegen.connectors.tracker.RETRY_S", 0.0)
    damaged: set[str] = set()

    def flip(name: str, begin: int, data: bytes | None) -> bytes | None:
        place = DAMAGED_BYTE - begin
        if data is None or not 0 <= place < len(data):
            return data
        if len(damaged) < 8:
            damaged.add(name)
        if name not in damaged:
            return data
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    trouble.on_read = flip
    before = failures(live, "damaged")
    check_same(live.ask(PROMPTS), want)
    # Behind the first damaged chunk of a request nothing is loaded.
    assert damaged
    assert failures(live, "damaged") > before
    trouble.on_read = None

    def all_hit() -> bool:
        live.settle()
        answers = live.ask(PROMPTS)
        check_same(answers, want)
        return [a.cached_tokens for a in answers] == HITS

    # What was computed has taken the place of the damaged entries.
    wait_until(all_hit)


def test_a_store_that_dies_in_the_middle_of_loads(
    live: Engine, trouble: TroubledStore, want: list[Answer]
) -> None:
    reads = trouble.reads

    def die(name: str, begin: int, data: bytes | None) -> bytes | None:
        trouble.is_dead = trouble.reads > reads + 5
        return data

    trouble.on_read = die
    check_same(live.ask(PROMPTS), want)
    assert trouble.is_dead
    assert failures(live, "store_error") > 0
    # From now on look-ups fail, too.
    missed = live.counted("request_misses_total", "store_error")
    check_same(live.ask(PROMPTS), want)
    assert live.counted("request_misses_total", "store_error") > missed


def test_a_store_slower_than_the_deadline(
    live: Engine, trouble: TroubledStore, want: list[Answer]
) -> None:
    gate = threading.Event()

    def dawdle(name: str, begin: int, data: bytes | None) -> bytes | None:
        gate.wait(HANG_S)
        return data

    trouble.on_read = dawdle
    before = failures(live, "late")
    with live.load_deadline(0.5):
        answers = live.ask(PROMPTS[:3])
    check_same(answers, want[:3])
    # They have ended without one byte of what they asked for.
    assert [a.cached_tokens for a in answers] == [0] * 3
    assert failures(live, "late") == before + 3
    assert trouble.reading > 0
    gate.set()
    # Whatever was still being read has come by now, and changes nothing.
    wait_until(lambda: not trouble.reading)
    trouble.on_read = None
    check_same(live.ask(PROMPTS), want)


def test_an_abort_in_the_middle_of_a_load(
    live: Engine, trouble: TroubledStore, want: list[Answer]
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def stop(name: str, begin: int, data: bytes | None) -> bytes | None:
        entered.set()
        gate.wait(HANG_S)
        return data

    trouble.on_read = stop
    vllm = live.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=4)
    (name,) = [vllm.add_request("to abort", {"prompt_token_ids": PROMPTS[5]}, params)]
    wait_until(lambda: vllm.step() is not None and entered.is_set())
    before = failures(live, "cancelled")
    vllm.abort_request([name or "to abort"], internal=True)

    def has_ended() -> bool:
        vllm.step()
        live.core.step()
        return not live.core.scheduler.requests

    wait_until(has_ended)
    assert failures(live, "cancelled") == before + 1
    # Its blocks belong to others now; the read that comes back late must not touch them.
    trouble.on_read = None
    gate.set()
    check_same(live.ask(PROMPTS), want)
