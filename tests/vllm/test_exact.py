"""With an exact codec in float32, vLLM's greedy output is that of vLLM without a connector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import (
    BASELINE,
    CHUNK,
    Answer,
    Baseline,
    Engine,
    check_same,
    engine,
    hits_expected,
    mixed_prompts,
    text_tokens,
)

TEXT = text_tokens()
PROMPTS = mixed_prompts()
# They begin in text that no other prompt holds.
TURN = TEXT[15_000:15_200]
SHORT = [TEXT[1000 * i : 1000 * i + 250] for i in range(1, 9)]
HANDED_OVER = [TEXT[300 * i : 300 * i + 600] for i in range(6)]
SALTED = TEXT[16_000:16_300]

BASELINE.plan(PROMPTS)
BASELINE.plan([TURN], 100)
BASELINE.plan(SHORT, 80)
BASELINE.plan(HANDED_OVER)


@pytest.fixture(scope="module")
def want(baseline: Baseline) -> list[Answer]:
    return baseline(PROMPTS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("exact") / "store")


@pytest.fixture(scope="class")
def live(store: str, want: list[Answer]) -> Iterator[Engine]:
    # The baseline's engine has ended before this one starts.
    with engine(store) as made:
        yield made


class TestOneEngine:
    def test_saving_and_loading_change_nothing(self, live: Engine, want: list[Answer]) -> None:
        ties = check_same(live.ask(PROMPTS), want)
        live.settle()
        assert live.counted("saved_chunks_total") > 0
        assert live.counted("skipped_saves_total", "error") == 0
        before = live.counted("loaded_tokens_total")
        answers = live.ask(PROMPTS)
        ties += check_same(answers, want)
        assert sum(a.cached_tokens for a in answers) == hits_expected(PROMPTS)
        # A chunk is written whole, also where its last token is computed once more.
        assert live.counted("loaded_tokens_total") - before >= hits_expected(PROMPTS)
        assert live.counted("failed_loads_total", "late") == 0
        print(f"ties within rounding: {ties} of {2 * len(PROMPTS)}")
        assert ties <= 2

    def test_the_next_turn_of_a_conversation_hits(self, live: Engine, baseline: Baseline) -> None:
        before = live.counted("saved_tokens_total")
        (answer,) = live.ask([TURN], 100)
        check_same([answer], baseline([TURN], 100))
        live.settle()
        # Prompt and answer together fill a chunk; the last token was never run.
        assert live.counted("saved_tokens_total") - before == CHUNK
        second = [*TURN, *answer.tokens, *TEXT[5000:5040]]
        (again,) = live.ask([second])
        assert again.cached_tokens == CHUNK
        (computed,) = live.ask([second], loads=False)
        assert computed.cached_tokens == 0
        check_same([again], [computed])

    def test_salts_keep_tenants_apart(self, live: Engine) -> None:
        def salted(salt: str) -> dict[str, object]:
            return {"prompt_token_ids": SALTED, "cache_salt": salt}

        live.ask([salted("alice")])
        live.settle()
        assert live.ask([salted("bob")])[0].cached_tokens == 0
        live.settle()
        assert live.ask([salted("alice")])[0].cached_tokens == CHUNK
        assert live.ask([SALTED])[0].cached_tokens == 0


def test_prefix_caching_preemption_and_a_small_cache(store: str, want: list[Answer]) -> None:
    # 20 blocks of 128 tokens for eight requests at once: some have to go and come back.
    options = {"enable_prefix_caching": True, "num_gpu_blocks_override": 20}
    with engine(store, **options) as live:
        ties = check_same(live.ask(PROMPTS), want)
        ties += check_same(live.ask(PROMPTS[::-1]), want[::-1])
        assert live.counted("loaded_tokens_total") > 0
    print(f"ties within rounding: {ties} of {2 * len(PROMPTS)}")
    assert ties <= 2


def test_preempted_requests(tmp_path: Path, baseline: Baseline) -> None:
    want = baseline(SHORT, 80)
    with engine(str(tmp_path), num_gpu_blocks_override=16, max_model_len=512) as live:
        for _ in range(2):
            check_same(live.ask(SHORT, 80), want)
            live.settle()
        assert live.preemptions() > 0
        assert live.counted("saved_chunks_total") >= 8  # 250 + 80 tokens hold one chunk each
        assert live.counted("failed_loads_total", "error") == 0


def test_a_producer_fills_the_store_and_a_consumer_reads_it(
    tmp_path: Path, baseline: Baseline
) -> None:
    want = baseline(HANDED_OVER)
    with engine(str(tmp_path), role="kv_producer") as prefill:
        check_same(prefill.ask(HANDED_OVER), want)
        prefill.settle()
        check_same(prefill.ask(HANDED_OVER[:1]), want[:1])
        prefill.settle()
        assert prefill.counted("saved_chunks_total") == 2 * len(HANDED_OVER)
        assert prefill.counted("loads_total") == 0
    with engine(str(tmp_path), role="kv_consumer") as decode:
        answers = decode.ask(HANDED_OVER)
        check_same(answers, want)
        assert [a.cached_tokens for a in answers] == [2 * CHUNK] * len(HANDED_OVER)
        decode.ask([TEXT[9000:9600]])
        assert decode.counted("saved_chunks_total") == 0
