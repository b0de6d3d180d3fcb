from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from tests.stream.planning import curve_of, state_of, states

from cachegen.errors import ConfigError
from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.engine import play_out
from cachegen.stream.outlook import at_quantile, plan
from cachegen.stream.plan import (
    Action,
    ChunkState,
    Fetch,
    HandOver,
    PlanState,
    Policy,
    Recompute,
    Step,
    Wait,
)
from cachegen.stream.policies import (
    POLICIES,
    CachegenPolicy,
    DeadlinePolicy,
    FixedPolicy,
    HybridPolicy,
    get_policy,
)
from cachegen.stream.speeds import PrefillSpeed, Speeds

EVERY = [make() for make in POLICIES.values()]
EVERY += [DeadlinePolicy(recompute="needed"), DeadlinePolicy(recompute="never")]
named = pytest.mark.parametrize("policy", EVERY, ids=lambda policy: repr(policy)[:40])


def started(policy: Policy, state: PlanState) -> list[Action]:
    """Everything a policy starts at once, and the wait or hand-over that ends it."""
    actions: list[Action] = []
    while not actions or not isinstance(actions[-1], Wait | HandOver):
        action = policy.next(state)
        actions.append(action)
        if isinstance(action, Fetch | Recompute):
            state = state.started(action)
    return actions


def whole(state: PlanState, index: int, size: int) -> PlanState:
    """The state once so many bytes of a chunk are decoded."""
    chunk = replace(state.chunks[index], fetched_bytes=size, decoded_bytes=size)
    return replace(state, chunks=(*state.chunks[:index], chunk, *state.chunks[index + 1 :]))


def test_names() -> None:
    assert {name: get_policy(name).name for name in POLICIES} == {name: name for name in POLICIES}
    with pytest.raises(ConfigError, match="hybrid"):
        get_policy("best")
    with pytest.raises(ConfigError):
        DeadlinePolicy(late_target=0)
    with pytest.raises(ConfigError):
        HybridPolicy(late_target=1.0)


@named
def test_a_loaded_prefix_is_handed_over(policy: Policy) -> None:
    state = state_of(2)
    for index in range(2):
        state = whole(state, index, 4000)
    assert started(policy, state) == [HandOver()]


@named
@given(state=states())
@settings(max_examples=60, deadline=None)
def test_every_plan_is_carried_out_in_order(policy: Policy, state: PlanState) -> None:
    """Ranges of a chunk join up, are asked for once, and nothing is recomputed out of turn."""
    asked = [0] * len(state.chunks)
    outcome, actions = play_out(policy, state)
    recomputed = []
    for begin_s, action in actions:
        assert begin_s >= state.now_s
        if isinstance(action, Fetch):
            assert action.begin == asked[action.chunk] < action.end
            assert action.end in {step.end_bytes for step in STEPS_OF(state)}
            asked[action.chunk] = action.end
        else:
            recomputed.append(action.chunk)
    assert recomputed == sorted(set(recomputed))
    # What comes before a recomputed chunk was loaded or recomputed.
    for index in recomputed:
        assert all(asked[before] or before in recomputed for before in range(index))
    assert math.isfinite(outcome.ready_s) and 0 <= outcome.distortion < 1


def STEPS_OF(state: PlanState) -> tuple[Step, ...]:
    return state.chunks[0].curve.steps


@given(state=states())
@settings(max_examples=150, deadline=None)
def test_deadline_is_met_wherever_first_steps_fit(state: PlanState) -> None:
    """Loading every first step in time is enough, whatever else the policy does meanwhile."""
    size = sum(chunk.curve.steps[0].end_bytes for chunk in state.chunks)
    # The last fetch may wait for a latency of its own, and for decoding.
    needs_s = size / state.link.rate_bytes_per_s() + 2 * state.link.latency_s + 1e-4
    outcome, _ = play_out(DeadlinePolicy(), state)
    if needs_s <= state.left_s:
        assert outcome.ready_s <= state.deadline_s + 1e-6


@given(state=states())
@settings(max_examples=100, deadline=None)
def test_a_faster_link_never_makes_it_worse(state: PlanState) -> None:
    slow, _ = play_out(DeadlinePolicy(), state)
    link = LinkEstimate.known(state.link.rate_bytes_per_s() * 1.7, latency_s=state.link.latency_s)
    fast, _ = play_out(DeadlinePolicy(), replace(state, link=link))
    if slow.ready_s <= state.deadline_s + 1e-9:
        assert fast.ready_s <= state.deadline_s + 1e-9
        assert fast.distortion <= slow.distortion + 1e-9


@pytest.mark.parametrize(("prefill_token_s", "order"), [(1.0, [2, 1, 0]), (None, [0, 1, 2])])
def test_first_steps_come_first(prefill_token_s: float | None, order: list[int]) -> None:
    """From the back, where recomputing may come from the front; else in order."""
    state = state_of(3, rate=1e6, latency_s=0.01, deadline_s=9.0, prefill_token_s=prefill_token_s)
    actions = started(DeadlinePolicy(), state)
    fetches = [action for action in actions if isinstance(action, Fetch)]
    assert [(fetch.chunk, fetch.begin) for fetch in fetches[:3]] == [(i, 0) for i in order]
    # Then whatever removes most distortion per byte: the second step of any chunk, the last first.
    assert fetches[3] == Fetch(2, 1000, 2000)


def test_the_front_is_recomputed_and_not_loaded() -> None:
    # 0.3 s for each chunk: three of four are ready by the deadline, for certain.
    state = state_of(4, prefill_token_s=0.003)
    outcome, actions = play_out(DeadlinePolicy(), state)
    loaded = {action.chunk for _, action in actions if isinstance(action, Fetch)}
    recomputed = [action.chunk for _, action in actions if isinstance(action, Recompute)]
    assert loaded == {3} and recomputed == [0, 1, 2]
    assert outcome.distortion == pytest.approx(0.05 / 4)


def test_separate_levels_are_chosen_by_risk() -> None:
    state = state_of(4, separate=True)  # 10,000 bytes/s for 1 s
    _, actions = play_out(DeadlinePolicy(), state)
    # All four fit at the second level; what is left over then goes to the last ones.
    assert [action.level for _, action in actions if isinstance(action, Fetch)][:2] == [1, 1]
    unsure = replace(state, link=LinkEstimate(math.log(10_000), 0.5))
    assert DeadlinePolicy().next(unsure) == Fetch(0, 0, 1000, level=0)
    assert DeadlinePolicy(late_target=0.4).next(unsure) == Fetch(0, 0, 2000, level=1)
    # Nothing is asked for twice: bytes of another level are lost.
    assert len({action.chunk for _, action in actions}) == len(actions) == 4


def test_recomputing_can_be_left_alone() -> None:
    state = state_of(4, prefill_token_s=0.003)
    for mode in ("needed", "never"):
        outcome, actions = play_out(DeadlinePolicy(recompute=mode), state)
        assert all(isinstance(action, Fetch) for _, action in actions), mode
        assert outcome.ready_s <= 1.0
    # A link that carries two first steps in time: needed recomputes as many chunks as it takes.
    slow = replace(state, link=LinkEstimate.known(2500.0))
    outcome, actions = play_out(DeadlinePolicy(recompute="needed"), slow)
    recomputed = [action.chunk for _, action in actions if isinstance(action, Recompute)]
    assert recomputed == [0, 1] and outcome.ready_s <= 1.0
    outcome, _ = play_out(DeadlinePolicy(recompute="never"), slow)
    assert outcome.ready_s > 1.0


def test_a_doubtful_prefill_is_insured_by_a_first_step() -> None:
    state = state_of(2, prefill_token_s=0.0048)  # both chunks take 0.96 of 1 s
    sure, _ = play_out(DeadlinePolicy(), state)
    assert sure.distortion == 0.0 and sure.fetched_bytes == 0
    doubtful = Speeds(PrefillSpeed(0.0048, deviation=0.3), 1e9)
    _, actions = play_out(DeadlinePolicy(), replace(state, speeds=doubtful))
    first_steps = {action.chunk for _, action in actions if isinstance(action, Fetch)}
    assert 1 in first_steps


def test_a_chunk_the_store_lacks_is_recomputed() -> None:
    for policy in (*EVERY,):
        state = state_of(3, prefill_token_s=0.001, deadline_s=0.05, rate=1e6)
        missing = ChunkState(curve_of(1, ()))
        state = replace(state, chunks=(state.chunks[0], missing, state.chunks[2]))
        outcome, actions = play_out(policy, state)
        assert Recompute(1) in [action for _, action in actions], policy
        assert math.isfinite(outcome.ready_s)


def test_enough_is_enough() -> None:
    state = state_of(2, deadline_s=10.0)
    outcome, _ = play_out(DeadlinePolicy(enough_distortion=0.3), state)
    assert outcome.distortion == pytest.approx(0.2) and outcome.ready_s < 1.0


def test_cachegen_takes_the_best_level_that_fits() -> None:
    state = state_of(4, separate=True)  # 10,000 bytes in time, after the last chunk's throughput
    assert CachegenPolicy().next(state) == Fetch(0, 0, 2000, level=1)
    assert CachegenPolicy(margin=0.4).next(state) == Fetch(0, 0, 1000, level=0)
    unknown = replace(state.link, last_rate_bytes_per_s=None)
    assert CachegenPolicy().next(replace(state, link=unknown)) == Fetch(0, 0, 2000, level=1)
    rushed = replace(state, deadline_s=0.01)
    assert CachegenPolicy().next(rushed) == Fetch(0, 0, 1000, level=0)


def test_cachegen_prefers_text_where_it_fits() -> None:
    state = state_of(4, separate=True, prefill_token_s=0.002)  # 0.8 s in all
    outcome, actions = play_out(CachegenPolicy(), state)
    assert [action for _, action in actions] == [Recompute(index) for index in range(4)]
    assert outcome.distortion == 0 and outcome.ready_s == pytest.approx(0.8)


def test_cachegen_adapts_to_the_last_chunk() -> None:
    state = whole(state_of(3, separate=True), 0, 4000)
    chunk = replace(state.chunks[0], level=2)
    state = replace(state, now_s=0.5, chunks=(chunk, *state.chunks[1:]))
    slow = replace(state.link, last_rate_bytes_per_s=5000.0)
    assert CachegenPolicy().next(state) == Fetch(1, 0, 2000, level=1)
    assert CachegenPolicy().next(replace(state, link=slow)) == Fetch(1, 0, 1000, level=0)


def test_fixed_loads_one_quality_in_order() -> None:
    _, actions = play_out(FixedPolicy(1), state_of(3))
    assert [action for _, action in actions] == [Fetch(index, 0, 2000) for index in range(3)]


def test_hybrid_meets_in_the_middle() -> None:
    state = state_of(6, prefill_token_s=0.003, deadline_s=1.0)
    outcome, actions = play_out(HybridPolicy(), state)
    recomputed = [action.chunk for _, action in actions if isinstance(action, Recompute)]
    loaded = [action.chunk for _, action in actions if isinstance(action, Fetch)]
    assert recomputed == list(range(len(recomputed))) and recomputed
    assert loaded == sorted(loaded, reverse=True)
    assert set(recomputed) | set(loaded) == set(range(6))
    assert outcome.ready_s <= 1.0


def test_a_plan_says_what_is_expected() -> None:
    state = replace(state_of(4), link=LinkEstimate(math.log(10_000), 0.5))
    outlook = plan(DeadlinePolicy(), state)
    assert outlook.ready_s == pytest.approx(1.0) and outlook.actions[0].action == Fetch(0, 0, 1000)
    assert outlook.distortion < outlook.distortion_bad_case
    # Four first steps are 4,000 bytes: late below 4,000 bytes/s, ln(0.4) = -1.83 deviations.
    assert outlook.probability_late == pytest.approx(0.033, abs=0.02)
    assert plan(DeadlinePolicy(), state_of(4)).probability_late == 0.0
    assert plan(DeadlinePolicy(), state_of(4, rate=100.0)).probability_late == 1.0
    assert at_quantile(state, 0.1).link.rate_bytes_per_s() < 10_000


@named
def test_the_same_state_gives_the_same_action(policy: Policy) -> None:
    state = state_of(5, prefill_token_s=0.004)
    assert started(policy, state) == started(policy, state)
