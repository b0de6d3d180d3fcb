"""The streaming simulation as a result: figures for each policy, frontiers, and what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cachegen.bench.report import environment, format_cell
from cachegen.stream.policies import DeadlinePolicy
from cachegen.stream.rules import CachegenPolicy
from cachegen.stream.scenario import (
    CHUNK_TOKENS,
    DEFAULT_MODELS,
    SHARE_RANGE,
    SLO_RANGE_S,
    WORST_DISTORTION,
    ModelClass,
    Workload,
    find_model,
    level_points,
    measured_points,
    nested_points,
    segment_tables,
)
from cachegen.stream.simulate import (
    DEFAULT_POLICIES,
    DEFAULT_TABLE,
    PAPER_RULE,
    SAME_CODEC,
    Contender,
    Results,
    Sample,
    contender,
    policy_rows,
    regrets,
    simulate,
    summary,
)
from cachegen.stream.traces import Trace, cloud_traces

DEFAULT_TRACES = 200
# Shares of the time left that CacheGen's rule may plan for, to trace its trade-off.
MARGINS = (1.0, 0.75, 0.5, 0.25)
LATE_TARGETS = (0.05, 0.3)
QUANTILES = 41
EXAMPLE_S, EXAMPLE_POINTS = 30.0, 150
SLO_BINS_S = ((0.5, 1.0), (1.0, 2.0), (2.0, 4.0))

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("policy", "policy", ""),
    ("slo_violation_rate", "SLO violations", ".1%"),
    ("slo_violation_rate_where_possible", "where avoidable", ".1%"),
    ("ttft_mean_s", "TTFT mean s", ".2f"),
    ("ttft_p95_s", "TTFT p95 s", ".2f"),
    ("distortion_mean", "distortion", ".4f"),
    ("regret", "regret", ".3f"),
    ("recomputed_share", "recomputed", ".0%"),
)


@dataclass(frozen=True)
class Settings:
    """What a simulation is made of.

    models: names of ``stream.scenario.MODELS``. table: segment table of nested objects.
    worst_distortion: coarser than this nothing is handed over. frontiers: also vary the margin of
    CacheGen's rule and the risk of ``deadline``.
    """

    models: tuple[str, ...] = DEFAULT_MODELS
    policies: tuple[str, ...] = DEFAULT_POLICIES
    seed: int = 0
    table: str = DEFAULT_TABLE
    worst_distortion: float = WORST_DISTORTION
    workload: Workload = Workload()  # noqa: RUF009 - frozen
    frontiers: bool = True


def run_simulation(
    settings: Settings,
    traces: Sequence[Trace] | None = None,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Simulate and describe. traces: None makes seeded cloud traces.

    Regret needs CacheGen's rule, so it always runs. Raises: ConfigError.
    """
    if traces is None:
        traces = cloud_traces(DEFAULT_TRACES, settings.seed)
    models = [find_model(name) for name in settings.models]
    names = dict.fromkeys((PAPER_RULE, *settings.policies))
    contenders = [_contender(settings, name) for name in names]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(f"{done} of {len(models) * len(traces)} traces")

    results = _simulate(settings, models, traces, contenders, step)
    frontiers = _frontiers(settings, models, traces, progress) if settings.frontiers else {}
    return {
        "policies": policy_rows(results),
        "by_model": [
            {"model": model.name, "policies": _rows_of_model(results, model.name)}
            for model in models
        ],
        "by_slo": _by_slo(settings, results),
        "best_possible": _best_possible(results),
        "frontiers": frontiers,
        "shows": _shows(results, frontiers),
        "distributions": _distributions(results),
        **_setup(settings, models, traces),
        **environment(),
    }


def _contender(settings: Settings, name: str, **changes: Any) -> Contender:
    return contender(
        name, table=settings.table, worst_distortion=settings.worst_distortion, **changes
    )


def _simulate(
    settings: Settings,
    models: Sequence[ModelClass],
    traces: Sequence[Trace],
    contenders: Sequence[Contender],
    progress: Callable[[], None],
) -> Results:
    return simulate(
        models,
        traces,
        contenders,
        workload=settings.workload,
        seed=settings.seed,
        oracle_points=nested_points(settings.table, settings.worst_distortion),
        progress=progress,
    )


def _rows_of_model(results: Results, model: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = policy_rows(results, lambda sample: sample.model == model)
    for row in rows:
        ratios = regrets(results, row["policy"], model=model)
        row["regret"] = statistics.median(ratios) if ratios else None
    return rows


def _by_slo(settings: Settings, results: Results) -> list[dict[str, Any]]:
    if settings.workload.slo_s is not None:
        return []
    bins = []
    for low, high in SLO_BINS_S:

        def keep(sample: Sample, low: float = low, high: float = high) -> bool:
            return low <= sample.request.slo_s < high

        rows = [
            {"policy": name, **summary(results.of(name, keep))}
            for name in results.samples
            if results.of(name, keep)
        ]
        if rows:
            bins.append({"slo_s": [low, high], "policies": rows})
    return bins


def _best_possible(results: Results) -> dict[str, float]:
    samples = next(iter(results.samples.values()))
    return {
        "distortion_mean": statistics.fmean(sample.best.distortion for sample in samples),
        "slo_violation_rate": statistics.fmean(not sample.best.in_time for sample in samples),
    }


def _frontiers(
    settings: Settings,
    models: Sequence[ModelClass],
    traces: Sequence[Trace],
    progress: Callable[[str], None],
) -> dict[str, list[dict[str, float]]]:
    """Vary what each policy risks; every point is (setting, violations, distortion)."""
    variants: list[tuple[str, float, Contender]] = []
    for name in (PAPER_RULE, SAME_CODEC):
        for margin in MARGINS:
            policy = CachegenPolicy(margin=margin)
            variants.append((name, margin, _contender(settings, name, policy=policy)))
    for target in LATE_TARGETS:
        risky = DeadlinePolicy(late_target=target)
        variants.append(("deadline", target, _contender(settings, "deadline", policy=risky)))
    frontiers: dict[str, list[dict[str, float]]] = {}
    for index, (name, setting, variant) in enumerate(variants, 1):
        progress(f"frontier: {index} of {len(variants)}")
        results = _simulate(settings, models, traces, [variant], lambda: None)
        figures = summary(results.samples[variant.name])
        frontiers.setdefault(name, []).append(
            {
                "setting": setting,
                "slo_violation_rate": figures["slo_violation_rate"],
                "distortion_mean": figures["distortion_mean"],
            }
        )
    return frontiers


def _shows(results: Results, frontiers: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return what the figures come to, for ``deadline`` against both forms of CacheGen's rule."""
    if "deadline" not in results.samples:
        return {}
    shown: dict[str, Any] = {}
    own = summary(results.samples["deadline"])
    for rule in (PAPER_RULE, SAME_CODEC):
        if rule not in results.samples:
            continue
        other = summary(results.samples[rule])
        ratios = regrets(results, "deadline", rule)
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(results.samples["deadline"], results.samples[rule], strict=True)
            if not theirs.is_late
        ]
        shown[rule] = {
            "violation_ratio": own["slo_violation_rate"] / max(other["slo_violation_rate"], 1e-9),
            "distortion_ratio": own["distortion_mean"] / max(other["distortion_mean"], 1e-9),
            "median_regret": statistics.median(ratios) if ratios else None,
            "mean_regret": statistics.fmean(ratios) if ratios else None,
            "at_equal_violations": _at_equal_violations(frontiers, rule),
            "where_rule_is_in_time": {
                "requests": len(pairs),
                "deadline_late": statistics.fmean(mine.is_late for mine, _ in pairs),
                "deadline_distortion": statistics.fmean(mine.distortion for mine, _ in pairs),
                "rule_distortion": statistics.fmean(theirs.distortion for _, theirs in pairs),
            }
            if pairs
            else None,
        }
    return shown


def _at_equal_violations(
    frontiers: dict[str, list[dict[str, float]]], rule: str
) -> dict[str, Any] | None:
    """Compare ``deadline`` as it is with a rule's point of as many violations.

    If the rule never gets that low, its fewest: a policy with fewer violations can always be made
    worse, so fewer counts as equal.
    """
    points = frontiers.get(rule, [])
    usual = DeadlinePolicy().late_target
    mine = [p for p in frontiers.get("deadline", []) if p["setting"] == usual]
    if not points or not mine:
        return None
    wanted = mine[0]["slo_violation_rate"]
    fewest = min(points, key=lambda point: point["slo_violation_rate"])
    enough = [point for point in points if point["slo_violation_rate"] <= wanted]
    other = min(enough, key=lambda point: point["distortion_mean"]) if enough else fewest
    return {
        "deadline_violation_rate": wanted,
        "deadline_distortion": mine[0]["distortion_mean"],
        "rule_violation_rate": other["slo_violation_rate"],
        "rule_distortion": other["distortion_mean"],
        "least_rule_distortion": min(point["distortion_mean"] for point in points),
    }


def _distributions(results: Results) -> dict[str, dict[str, list[float | None]]]:
    """Return quantiles of what the plots show, so that they can be drawn from the file."""
    shown: dict[str, dict[str, list[float | None]]] = {}
    for name, samples in results.samples.items():
        shown[name] = {
            "ttft_over_slo": _quantiles([s.ttft_s / s.request.slo_s for s in samples]),
            "distortion": _quantiles([s.distortion for s in samples]),
            "regret": _quantiles(regrets(results, name)) if PAPER_RULE in results.samples else [],
        }
    return shown


def _quantiles(values: Sequence[float]) -> list[float | None]:
    rising = sorted(values)
    if not rising:
        return []
    picked = [rising[round(i * (len(rising) - 1) / (QUANTILES - 1))] for i in range(QUANTILES)]
    return [round(value, 6) if math.isfinite(value) else None for value in picked]


def _setup(
    settings: Settings, models: Sequence[ModelClass], traces: Sequence[Trace]
) -> dict[str, Any]:
    tables = segment_tables()
    measured = {key: tables[key] for key in ("model", "chunk_tokens", "chunks", "date", "command")}
    return {
        "traces": len(traces),
        "trace_examples": [_example(trace) for trace in traces[:4]],
        "trace_mean_mbit_per_s": _spread([trace.mean_bytes_per_s * 8e-6 for trace in traces]),
        "seed": settings.seed,
        "slo_s": settings.workload.slo_s or list(SLO_RANGE_S),
        "workload": asdict(settings.workload),
        "chunk_tokens": CHUNK_TOKENS,
        "worst_distortion": settings.worst_distortion,
        "models": [
            {
                "name": model.name,
                "text": model.text,
                "values_per_token": model.values_per_token,
                "prefill_tokens_per_s": 1 / model.prefill.token_s,
                "prefill_pairs_per_s": 1 / model.prefill.pair_s,
                "prefill_share": settings.workload.prefill_share or list(SHARE_RANGE),
            }
            for model in models
        ],
        "segments": {
            "measured": measured,
            "unit": tables["unit"],
            "table": settings.table,
            "text": tables["tables"][settings.table]["text"],
            "measured_points": measured_points(settings.table),
            "steps": nested_points(settings.table, settings.worst_distortion),
            "cachegen_levels": level_points("cachegen", settings.worst_distortion),
        },
    }


def _spread(values: Sequence[float]) -> list[float]:
    """Return least, quarters and most."""
    rising = sorted(values)
    return [round(rising[round(share * (len(rising) - 1) / 4)], 1) for share in range(5)]


def _example(trace: Trace) -> dict[str, Any]:
    """Return the first seconds of a trace."""
    times = [EXAMPLE_S * index / EXAMPLE_POINTS for index in range(EXAMPLE_POINTS + 1)]
    rates = [round(trace.rate_at(time_s)[0] * 8e-6, 1) for time_s in times]
    return {"name": trace.name, "times_s": times, "mbit_per_s": rates}


def print_simulation(result: dict[str, Any], console: Console) -> None:
    """Print the policies, and what the best possible schedule would reach."""
    models = ", ".join(model["name"] for model in result["models"])
    table = Table(title=f"{models}: {result['traces']} traces, seed {result['seed']}")
    for index, (_, heading, _) in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if index else "left")
    for row in result["policies"]:
        table.add_row(*(format_cell(row[key], spec) for key, _, spec in COLUMNS))
    best = result["best_possible"]
    table.add_row(
        "best possible",
        format(best["slo_violation_rate"], ".1%"),
        "-",
        "-",
        "-",
        format(best["distortion_mean"], ".4f"),
        format(0.0, ".3f"),
        "-",
    )
    width = None if console.is_terminal else 120
    (Console(file=console.file, width=width) if width else console).print(table)
