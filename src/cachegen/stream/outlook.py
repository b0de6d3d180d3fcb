"""What a policy intends: its whole schedule, and what is expected to come of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cachegen.stream.bandwidth import LinkEstimate
from cachegen.stream.engine import play_out
from cachegen.stream.plan import Fetch, PlanState, Policy, Recompute

# Halvings of the search for the slowest link that is still in time: 1/128 of probability.
_HALVINGS = 7
# A link so unlikely to be slower stands for a bad case.
BAD_CASE = 0.1


@dataclass(frozen=True)
class PlannedAction:
    """Something the policy means to begin at a time, if the estimates hold."""

    begin_s: float
    action: Fetch | Recompute


@dataclass(frozen=True)
class Plan:
    """The intended schedule and what is expected of it.

    ready_s: when the prefix is handed over; infinite if the link is too slow to ever end it.
    distortion: mean relative distortion then, at the median rate. distortion_bad_case: at a rate
        that the link falls short of once in ten times. probability_late: of missing the deadline.
    """

    actions: tuple[PlannedAction, ...]
    ready_s: float
    distortion: float
    distortion_bad_case: float
    probability_late: float


def plan(policy: Policy, state: PlanState) -> Plan:
    """Play a policy out from a state: at the median rate, and at worse ones for the risk."""
    outcome, started = play_out(policy, state)
    bad, _ = play_out(policy, at_quantile(state, BAD_CASE))
    return Plan(
        tuple(PlannedAction(*entry) for entry in started),
        outcome.ready_s,
        outcome.distortion,
        bad.distortion,
        _probability_late(policy, state),
    )


def at_quantile(state: PlanState, quantile: float) -> PlanState:
    """Return the state with its link known to have the rate of a quantile."""
    rate = state.link.rate_bytes_per_s(quantile)
    return replace(state, link=LinkEstimate.known(rate, latency_s=state.link.latency_s))


def _probability_late(policy: Policy, state: PlanState) -> float:
    """Search the quantile of the rate from which on the plan is in time."""
    if state.link.deviation <= 0:
        return float(play_out(policy, state)[0].ready_s > state.deadline_s + 1e-6)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        outcome, _ = play_out(policy, at_quantile(state, middle))
        if outcome.ready_s > state.deadline_s + 1e-6:
            low = middle
        else:
            high = middle
    return (low + high) / 2 if low > 0 and high < 1 else float(high == 1)
