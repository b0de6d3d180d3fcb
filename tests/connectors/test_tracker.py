"""What a scheduler plans: loads, saves, holds, and what it must never do again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cachegen.connectors import tracker as tracker_module
from cachegen.connectors.adapter import Piece
from cachegen.connectors.lookup import Question, Seed
from cachegen.connectors.metrics import Counters
from cachegen.connectors.tracker import Plan, Step, Tracker
from cachegen.errors import ConfigError
from cachegen.settings import Settings

BLOCK, CHUNK = 16, 64
SETTINGS = Settings(chunk_tokens=CHUNK, slo_s=10.0)
SEED = Seed()


class Answers:
    """A look-up whose answers the test sets."""

    def __init__(self, chunks: int | None = 0) -> None:
        self.chunks = chunks
        self.waited_s = 0.0

    def ask(self, tokens: Sequence[int], seed: Seed) -> Question:
        chains = seed.chains(tokens, CHUNK)
        return Question(tokens, seed, chains=chains, chunks=self.chunks)

    def answer(self, question: Question) -> int | None:
        if question.chunks is None:
            question.chunks = self.chunks
        return question.chunks


class Scene:
    """A tracker, and requests with blocks numbered from 100, 200, ... on."""

    def __init__(
        self, chunks: int | None = 0, *, exact: bool = True, loads: bool = True, saves: bool = True
    ) -> None:
        self.answers = Answers(chunks)
        self.counters = Counters()
        self.tracker = Tracker(
            self.answers,
            block_tokens=BLOCK,
            settings=SETTINGS,
            counters=self.counters,
            loads=loads,
            saves=saves,
            is_exact=exact,
        )
        self.tokens: dict[str, list[int]] = {}

    def arrive(self, name: str, tokens: int, seed: Seed = SEED) -> list[int]:
        self.tokens[name] = list(range(tokens))
        self.tracker.add(name, self.tokens[name], seed)
        return self.tokens[name]

    def admit(self, name: str, first_block: int, local: int = 0) -> int | None:
        """What vLLM does with a waiting request that fits; returns the tokens to load."""
        found = self.tracker.matched(name, local)
        if found is not None:
            self.tracker.allocated(name, blocks(first_block, len(self.tokens[name])), found)
        return found

    def step(self, name: str, first_block: int, computed: int, scheduled: int) -> Plan:
        ids = blocks(first_block, len(self.tokens[name]))
        return self.tracker.plan([Step(name, ids, computed, scheduled)])


def blocks(first: int, tokens: int) -> list[int]:
    return list(range(first, first + -(-tokens // BLOCK)))


def indices(plan: Plan) -> list[int]:
    return [piece.index for job in plan.saves for piece in job.pieces]


def test_an_unknown_answer_keeps_the_request_waiting() -> None:
    scene = Scene(None)
    scene.arrive("r", 200)
    assert scene.admit("r", 100) is None
    scene.answers.chunks = 2
    assert scene.admit("r", 100) == 2 * CHUNK


def test_a_load_covers_whole_chunks_of_whole_blocks() -> None:
    scene = Scene(2)
    scene.arrive("r", 200)
    assert scene.admit("r", 100) == 128
    (job,) = scene.tracker.plan([]).loads
    chains = SEED.chains(range(200), CHUNK)
    assert job.pieces == (
        Piece(0, chains[0], (100, 101, 102, 103)),
        Piece(1, chains[1], (104, 105, 106, 107)),
    )
    assert 0 < job.budget_s <= 10
    assert scene.tracker.plan([]).loads == ()


def test_a_plan_names_the_blocks_that_were_given() -> None:
    scene = Scene(1)
    scene.arrive("loads", 200)
    scene.admit("loads", 100)
    # Also those of requests that nothing is known of.
    steps = [Step("stranger", [7, 8], 0, 20), Step("other", [9], 64, 1, is_more=True)]
    assert scene.tracker.plan(steps).given_blocks == {7, 8, 9, 100, 101, 102, 103}
    assert scene.tracker.plan([]).given_blocks == frozenset()
    # A request that is taken up again names all of its blocks anew.
    assert scene.step("loads", 100, 64, 136).given_blocks >= set(blocks(100, 200))


def test_a_token_is_left_to_compute() -> None:
    scene = Scene(2)
    scene.arrive("r", 128)
    assert scene.admit("r", 100) == 127
    (job,) = scene.tracker.plan([]).loads
    assert job.pieces[1].block_ids == (104, 105, 106, 107)


def test_the_engines_own_blocks_are_not_loaded_again() -> None:
    scene = Scene(3)
    scene.arrive("r", 200)
    assert scene.admit("r", 100, local=96) == 96
    (job,) = scene.tracker.plan([]).loads
    assert [(p.index, p.block_ids, p.skip_blocks) for p in job.pieces] == [
        (1, (106, 107), 2),
        (2, (108, 109, 110, 111), 0),
    ]
    scene.arrive("s", 200)
    assert scene.admit("s", 200, local=192) == 0


def test_roles() -> None:
    producer = Scene(3, loads=False)
    producer.arrive("r", 200)
    assert producer.admit("r", 100) == 0
    assert indices(producer.step("r", 100, 0, 200)) == []  # stored already, as the look-up says
    consumer = Scene(0, saves=False)
    consumer.arrive("r", 200)
    assert consumer.admit("r", 100) == 0
    assert indices(consumer.step("r", 100, 0, 200)) == []


def test_a_request_may_ask_for_less() -> None:
    scene = Scene(chunks=2)
    for name, loads, saves in (("load", True, False), ("save", False, True), ("no", False, False)):
        scene.tokens[name] = list(range(4 * CHUNK))
        scene.tracker.add(name, scene.tokens[name], SEED, loads=loads, saves=saves)
    assert scene.admit("load", 100) == 2 * CHUNK
    assert scene.step("load", 100, 2 * CHUNK, 2 * CHUNK).saves == ()
    assert scene.admit("save", 200) == 0
    (job,) = scene.step("save", 200, 0, 4 * CHUNK).saves
    assert [piece.index for piece in job.pieces] == [0, 1, 2, 3]
    assert not scene.tracker.knows("no")
    assert scene.admit("no", 300) == 0
    assert scene.step("no", 300, 0, 4 * CHUNK).saves == ()


def test_chunks_are_saved_as_they_become_whole() -> None:
    scene = Scene()
    scene.arrive("r", 200)
    scene.admit("r", 100)
    assert indices(scene.step("r", 100, 0, 60)) == []
    plan = scene.step("r", 100, 60, 100)
    assert indices(plan) == [0, 1]
    assert plan.saves[0].pieces[1].block_ids == (104, 105, 106, 107)
    assert indices(scene.step("r", 100, 160, 40)) == [2]
    assert indices(scene.step("r", 100, 160, 40)) == []


def test_generated_tokens_are_saved_once_their_ids_are_known() -> None:
    scene = Scene()
    tokens = scene.arrive("r", 60)
    scene.admit("r", 100)
    assert indices(scene.step("r", 100, 0, 60)) == []
    tokens += [7, 8, 9]
    # An asynchronous scheduler runs ahead of the ids it knows.
    assert indices(scene.tracker.plan([Step("r", (), 63, 1, is_more=True)])) == []
    tokens.append(10)
    plan = scene.tracker.plan([Step("r", (), 64, 1, is_more=True)])
    assert indices(plan) == [0]
    assert plan.saves[0].pieces[0].chain == SEED.chains(tokens, CHUNK)[0]


def test_what_the_store_has_is_not_saved() -> None:
    scene = Scene(2)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    assert indices(scene.step("r", 100, 127, 73)) == [2]


def test_the_same_chunk_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    for name, first in (("r", 100), ("s", 200)):
        scene.arrive(name, 200)
        scene.admit(name, first)
    assert indices(scene.step("r", 100, 0, 200)) == [0, 1, 2]
    assert indices(scene.step("s", 200, 0, 200)) == []
    monkeypatch.setattr(tracker_module, "RETRY_S", 0.0)
    scene.arrive("t", 200)
    scene.admit("t", 300)
    assert indices(scene.step("t", 300, 0, 200)) == [0, 1, 2]


def test_blocks_loaded_with_loss_are_never_saved() -> None:
    scene = Scene(1, exact=False)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.tracker.plan([])
    scene.tracker.allocated("r", blocks(100, 200), 0)  # the load has ended
    assert indices(scene.step("r", 100, 64, 136)) == [1, 2]
    # Another request shares the first half of the loaded chunk through the engine's own cache.
    scene.answers.chunks = 0
    other = [*range(32), *range(1000, 1168)]
    scene.tokens["s"] = other
    scene.tracker.add("s", other, SEED)
    assert scene.tracker.matched("s", 32) == 0
    shared = [100, 101, *range(200, 211)]
    scene.tracker.allocated("s", shared, 0)
    plan = scene.tracker.plan([Step("s", shared, 32, 168)])
    assert indices(plan) == [1, 2]
    assert scene.counters.get("skipped_saves_total", reason="lossy") == 1


def test_blocks_that_are_computed_anew_may_be_saved() -> None:
    scene = Scene(1, exact=False)
    scene.arrive("r", 100)
    scene.admit("r", 100)
    scene.tracker.plan([])
    scene.tracker.allocated("r", blocks(100, 100), 0)
    scene.tracker.finish("r", blocks(100, 100), computed=99, is_complete=True)
    scene.answers.chunks = 0
    scene.tokens["s"] = [9] * 100
    scene.tracker.add("s", scene.tokens["s"], SEED)
    scene.admit("s", 100)  # the same blocks, given to another request
    assert indices(scene.step("s", 100, 0, 100)) == [0]


def test_exact_loads_do_not_taint() -> None:
    scene = Scene(1)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    assert not scene.tracker._inexact_blocks


def test_a_failed_chunk_is_not_tried_again_but_saved() -> None:
    scene = Scene(2, exact=False)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.tracker.plan([])
    scene.tracker.failed_blocks({104, 105, 106, 107})
    assert scene.tracker.matched("r", 0) == CHUNK
    scene.tracker.allocated("r", blocks(100, 200), 0)
    # Chunk 0 holds lossy KV; chunk 1 is computed after all and replaces the bad entry.
    assert indices(scene.step("r", 100, 64, 136)) == [1, 2]


def test_a_first_chunk_that_fails_leaves_nothing_to_load() -> None:
    scene = Scene(2, exact=False)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.tracker.plan([])
    scene.tracker.failed_blocks(set(range(100, 108)))
    # vLLM frees the blocks and admits the request anew.
    assert scene.admit("r", 300) == 0
    assert indices(scene.step("r", 300, 0, 200)) == [0, 1, 2]


def test_failures_of_others_change_nothing() -> None:
    scene = Scene(2)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.tracker.failed_blocks({50, 51})
    scene.tracker.failed_blocks(())
    assert scene.tracker.matched("r", 0) == 128


def test_an_aborted_load_is_cancelled() -> None:
    scene = Scene(2)
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.tracker.plan([])
    held = scene.tracker.finish("r", blocks(100, 200), computed=0, is_complete=False)
    assert not held
    assert scene.tracker.plan([]).cancelled == ("r",)
    assert scene.tracker.plan([]).cancelled == ()
    assert not scene.tracker.knows("r")


def test_blocks_are_held_for_a_chunk_that_became_known_late() -> None:
    scene = Scene()
    tokens = scene.arrive("r", 60)
    scene.admit("r", 100)
    scene.step("r", 100, 0, 60)
    tokens += [7, 8, 9, 10, 11]
    assert scene.tracker.finish("r", blocks(100, 65), computed=64, is_complete=True)
    plan = scene.tracker.plan([])
    assert indices(plan) == [0]
    assert plan.released == ("r",)
    assert scene.tracker.plan([]) == Plan()


def test_nothing_is_held_without_need() -> None:
    scene = Scene()
    scene.arrive("r", 200)
    scene.admit("r", 100)
    scene.step("r", 100, 0, 200)
    assert not scene.tracker.finish("r", blocks(100, 200), computed=200, is_complete=True)
    scene.arrive("s", 300)
    scene.admit("s", 200)
    assert not scene.tracker.finish("s", blocks(200, 300), computed=300, is_complete=False)
    assert not scene.tracker.finish("nobody", [], computed=0, is_complete=True)


def test_a_preempted_request_starts_over_without_saving_twice() -> None:
    scene = Scene()
    scene.arrive("r", 200)
    scene.admit("r", 100)
    assert indices(scene.step("r", 100, 0, 200)) == [0, 1, 2]
    scene.admit("r", 400)
    assert indices(scene.step("r", 400, 0, 200)) == []


def test_requests_that_are_not_followed_are_left_alone() -> None:
    scene = Scene(2)
    assert scene.tracker.matched("unknown", 0) == 0
    scene.tracker.allocated("unknown", [1, 2], 0)
    assert scene.tracker.plan([Step("unknown", [1], 0, 100)]) == Plan(given_blocks=frozenset({1}))


def test_seeds_keep_requests_apart() -> None:
    seeds = [
        Seed(),
        Seed(lora=b"a"),
        Seed(lora=b"b"),
        Seed(tenant=b"a"),
        Seed(tenant=b"b"),
        Seed(multimodal=(b"a",)),
        Seed(multimodal=(b"a", b"b")),
    ]
    chains = [seed.chains(range(CHUNK), CHUNK)[0] for seed in seeds]
    assert len(set(chains)) == len(seeds)


def test_chunks_consist_of_blocks() -> None:
    with pytest.raises(ConfigError, match="multiple of the engine's block size, 48"):
        Tracker(
            Answers(),
            block_tokens=48,
            settings=SETTINGS,
            counters=Counters(),
            loads=True,
            saves=True,
            is_exact=True,
        )
