"""Look-ups: how many chunks of a prompt are stored, and never waiting too long for the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from paged_world import RAW, Gate, wait_for

from cachegen.connectors import lookup
from cachegen.connectors.adapter import names_of
from cachegen.connectors.lookup import Lookup, Seed
from cachegen.connectors.metrics import Counters
from cachegen.errors import StoreError
from cachegen.settings import Settings
from cachegen.store.memory import MemoryStore

CHUNK = 8
RANKS = [b"a" * 32, b"b" * 32]
TOKENS = list(range(30))
PLAIN = Seed()
CHAINS = PLAIN.chains(TOKENS, CHUNK)


class Desk:
    def __init__(self, slo_s: float = 30.0) -> None:
        self.store = MemoryStore()
        self.counters = Counters()
        self.lookup = Lookup(
            self.store,
            RAW,
            namespaces=RANKS,
            settings=Settings(chunk_tokens=CHUNK, slo_s=slo_s),
            counters=self.counters,
        )

    def put(self, index: int, *ranks: int) -> None:
        names = names_of(RANKS, CHAINS[index], RAW.label)
        for rank in ranks:
            self.store.put(names[rank], b"x")

    def answer(self, tokens: Sequence[int] = TOKENS, seed: Seed = PLAIN) -> int:
        question = self.lookup.ask(tokens, seed)
        wait_for(lambda: self.lookup.answer(question) is not None)
        return self.lookup.answer(question) or 0

    def misses(self, reason: str) -> float:
        return self.counters.get("request_misses_total", reason=reason)


def test_only_chunks_that_every_rank_has_count() -> None:
    desk = Desk()
    desk.put(0, 0, 1)
    desk.put(1, 0)
    assert desk.answer() == 1
    desk.put(1, 1)
    assert desk.answer() == 2


def test_a_gap_ends_the_prefix() -> None:
    desk = Desk()
    desk.put(1, 0, 1)
    assert desk.answer() == 0
    assert desk.misses("missing") == 1


@pytest.mark.parametrize("seed", [Seed(lora=b"l"), Seed(tenant=b"t"), Seed(multimodal=(b"m",))])
def test_other_seeds_do_not_hit(seed: Seed) -> None:
    desk = Desk()
    desk.put(0, 0, 1)
    assert desk.answer(seed=seed) == 0
    assert desk.answer() == 1


def test_a_prompt_shorter_than_a_chunk_is_answered_at_once() -> None:
    desk = Desk()
    assert desk.lookup.ask(TOKENS[:7], Seed()).chunks == 0
    assert desk.misses("short") == 1


def test_a_late_store_is_a_miss_and_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(slo_s=0.05)
    desk.put(0, 0, 1)
    gate, exists = Gate(), desk.store.exists

    def slow(names: Sequence[str]) -> list[bool]:
        gate.pass_through()
        return exists(names)

    monkeypatch.setattr(desk.store, "exists", slow)
    question = desk.lookup.ask(TOKENS, Seed())
    assert gate.entered.wait(20)
    assert desk.lookup.answer(question) is None
    wait_for(lambda: desk.lookup.answer(question) == 0)
    assert desk.misses("late") == 1
    gate.opened.set()
    desk.lookup._threads.shutdown(wait=True)
    assert desk.lookup.answer(question) == 0
    assert desk.counters.get("request_hits_total") == 0


def test_a_store_that_fails_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(names: Sequence[str]) -> list[bool]:
        raise StoreError("store", got="nothing")

    desk = Desk()
    monkeypatch.setattr(desk.store, "exists", fail)
    assert desk.answer() == 0
    assert desk.misses("store_error") == 1
    desk.lookup.close()


def test_an_answer_that_comes_at_once_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "FIRST_WAIT_S", 20.0)
    desk = Desk()
    desk.put(0, 0, 1)
    assert desk.lookup.answer(desk.lookup.ask(TOKENS, PLAIN)) == 1


def test_a_slow_answer_is_waited_for_once_and_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "FIRST_WAIT_S", 0.1)
    desk, gate = Desk(), Gate()
    monkeypatch.setattr(desk.store, "exists", lambda names: gate.pass_through() or [False] * 6)
    question = desk.lookup.ask(TOKENS, PLAIN)
    assert desk.lookup.answer(question) is None
    begin = time.monotonic()
    for _ in range(20):
        assert desk.lookup.answer(question) is None
    assert time.monotonic() - begin < 1.0  # twenty waits would take two seconds
    gate.opened.set()
    wait_for(lambda: desk.lookup.answer(question) == 0)
