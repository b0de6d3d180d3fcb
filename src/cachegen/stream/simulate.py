"""The simulator: policies against made-up or recorded links, beside the best possible.

Source: CacheGen (SIGCOMM'24), section 7 (SLO violations); regret as in the design.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cachegen.codec.levels import NAMED
from cachegen.errors import ConfigError
from cachegen.stream.engine import Job, Knowledge, Outcome, run_jobs
from cachegen.stream.oracle import BestCase, Demand, best_cases
from cachegen.stream.plan import Policy
from cachegen.stream.policies import FixedPolicy, get_policy
from cachegen.stream.rules import CachegenPolicy
from cachegen.stream.scenario import (
    CHUNK_TOKENS,
    WORST_DISTORTION,
    ModelClass,
    Request,
    Scene,
    Workload,
    curves,
    draw_scene,
    level_points,
    nested_points,
)
from cachegen.stream.speeds import Speeds
from cachegen.stream.traces import Trace

PAPER_RULE = "cachegen"
# CacheGen's rule over our own codec's steps, each stored as an object of its own: what is left of
# the difference once the codec is the same.
SAME_CODEC = "cachegen-rule"
DEFAULT_POLICIES = (PAPER_RULE, SAME_CODEC, "fixed", "hybrid", "deadline")
DEFAULT_TABLE = "progressive"
# Below this difference between the paper's rule and the best case, a trace says nothing.
LEAST_ROOM = 1e-4


@dataclass(frozen=True)
class Contender:
    """A policy and what it loads: nested objects, or one object for each level."""

    name: str
    policy: Policy
    points: tuple[tuple[float, float], ...]
    separate: bool


def contender(
    name: str,
    *,
    table: str = DEFAULT_TABLE,
    worst_distortion: float = WORST_DISTORTION,
    policy: Policy | None = None,
) -> Contender:
    """Return a policy of that name with the objects it is meant for.

    policy: one with settings of its own instead of the default one. Raises: ConfigError.
    """
    nested = tuple(nested_points(table, worst_distortion))
    if name == PAPER_RULE:
        levels = tuple(level_points("cachegen", worst_distortion))
        return Contender(name, policy or CachegenPolicy(), levels, True)
    if name == SAME_CODEC:
        return Contender(name, policy or CachegenPolicy(), nested, True)
    if name == "fixed":
        wanted = NAMED_DISTORTION["balanced"]
        step = next((i for i, point in enumerate(nested) if point[1] <= wanted), len(nested) - 1)
        return Contender(name, policy or FixedPolicy(step), nested, False)
    return Contender(name, policy or get_policy(name), nested, False)


# Distortions of the named qualities, from the curve of decision 0007.
NAMED_DISTORTION = {name: math.sqrt(kl / 30.3) for name, kl in NAMED.items()}


@dataclass(frozen=True)
class Sample:
    """One request under one policy, beside the best case."""

    trace: int
    model: str
    request: Request
    outcome: Outcome
    best: BestCase

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.outcome.ready_s - self.request.arrival_s + self.request.question_s

    @property
    def is_late(self) -> bool:
        """Whether the SLO is violated."""
        return self.ttft_s > self.request.slo_s + 1e-6

    @property
    def distortion(self) -> float:
        """Of what was handed over in time; if late, of what was usable at the deadline."""
        if self.is_late:
            return self.outcome.distortion_at_deadline
        return self.outcome.distortion


@dataclass
class Results:
    """All samples by policy. traces: how many there were, over all models."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    traces: int = 0

    def of(self, name: str, keep: Callable[[Sample], bool] = lambda sample: True) -> list[Sample]:
        """Return the samples of a policy that are kept."""
        return [sample for sample in self.samples[name] if keep(sample)]


def simulate(
    models: Sequence[ModelClass],
    traces: Sequence[Trace],
    contenders: Sequence[Contender],
    *,
    workload: Workload | None = None,
    seed: int = 0,
    oracle_points: Sequence[tuple[float, float]] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Results:
    """Run every contender on every trace, for every model.

    oracle_points: the objects that the best case may load; by default those of the first contender
        with nested objects. Raises: ConfigError without contenders.
    """
    if not contenders or not models:
        raise ConfigError("policies and models", got=0, expected="at least one of each")
    work = workload or Workload()
    if oracle_points is None:
        nested = [contender for contender in contenders if not contender.separate]
        oracle_points = (nested or list(contenders))[0].points
    results = Results({contender.name: [] for contender in contenders})
    for model in models:
        for index, trace in enumerate(traces):
            scene = draw_scene(model, work, f"{seed} {index}")
            best = _best(model, scene, trace, oracle_points)
            for contender in contenders:
                outcomes = _outcomes(model, scene, trace, contender, work)
                results.samples[contender.name] += [
                    Sample(results.traces, model.name, request, outcome, case)
                    for request, outcome, case in zip(scene.requests, outcomes, best, strict=True)
                ]
            results.traces += 1
            progress()
    return results


def _outcomes(
    model: ModelClass, scene: Scene, trace: Trace, contender: Contender, work: Workload
) -> list[Outcome]:
    jobs = [
        Job(
            request.arrival_s,
            request.deadline_s,
            curves(contender.points, model, request.chunks, separate=contender.separate),
            request.recompute_s,
            work.decode_bytes_per_s,
        )
        for request in scene.requests
    ]
    # Half the true decode speed is believed at first; like prefill it is learned.
    knowledge = Knowledge(Speeds(scene.guess, work.decode_bytes_per_s / 2))
    return run_jobs(jobs, contender.policy, trace, latency_s=work.latency_s, knowledge=knowledge)


def _best(
    model: ModelClass, scene: Scene, trace: Trace, points: Sequence[tuple[float, float]]
) -> list[BestCase]:
    demands = [
        Demand(
            request.arrival_s,
            request.deadline_s,
            curves(points, model, request.chunks, separate=False),
            request.recompute_s,
        )
        for request in scene.requests
    ]
    return best_cases(demands, trace)


def regrets(
    results: Results, name: str, against: str = PAPER_RULE, *, model: str | None = None
) -> list[float]:
    """Return for every trace (D - D_best) / (D_against - D_best), D the mean over its requests.

    Traces on which the two references do not differ are left out.
    """
    means: dict[int, list[list[float]]] = {}
    for own, other in zip(results.samples[name], results.samples[against], strict=True):
        if model in (None, own.model):
            rows = means.setdefault(own.trace, [])
            rows.append([own.distortion, other.distortion, own.best.distortion])
    ratios = []
    for rows in means.values():
        own_mean, other_mean, best = (
            statistics.fmean(column) for column in zip(*rows, strict=True)
        )
        if other_mean - best > LEAST_ROOM:
            ratios.append((own_mean - best) / (other_mean - best))
    return ratios


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the figures of some samples of one policy."""
    ttft = sorted(sample.ttft_s for sample in samples)
    ended = [seconds for seconds in ttft if math.isfinite(seconds)]
    in_time = [sample.distortion for sample in samples if not sample.is_late]
    possible = [sample for sample in samples if sample.best.in_time]
    return {
        "requests": len(samples),
        "slo_violation_rate": statistics.fmean(sample.is_late for sample in samples),
        "slo_violation_rate_where_possible": (
            statistics.fmean(sample.is_late for sample in possible) if possible else None
        ),
        "ttft_mean_s": statistics.fmean(ended) if ended else None,
        "ttft_p95_s": _percentile(ttft, 0.95),
        "never_ended": len(ttft) - len(ended),
        "distortion_mean": statistics.fmean(sample.distortion for sample in samples),
        "distortion_mean_in_time": statistics.fmean(in_time) if in_time else None,
        "fetched_mean_bytes": statistics.fmean(s.outcome.fetched_bytes for s in samples),
        "recomputed_share": sum(sample.outcome.recomputed_tokens for sample in samples)
        / sum(CHUNK_TOKENS * sample.request.chunks for sample in samples),
    }


def _percentile(rising: Sequence[float], share: float) -> float | None:
    value = rising[min(len(rising) - 1, math.ceil(share * len(rising)) - 1)]
    return value if math.isfinite(value) else None


def policy_rows(results: Results, keep: Callable[[Sample], bool] = lambda sample: True) -> Any:
    """Return one row of figures for each policy."""
    rows = []
    for name in results.samples:
        row = {"policy": name, **summary(results.of(name, keep))}
        ratios = regrets(results, name) if PAPER_RULE in results.samples else []
        row["regret"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows
