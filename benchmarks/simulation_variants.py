"""The streaming simulation under other assumptions: one line for each, fewer traces.

The main figures (benchmarks/results/simulation.json) rest on one workload; this shows how far they
depend on its choices, and what each part of the ``deadline`` policy is worth.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cachegen.bench.report import environment, write_json
from cachegen.stream.policies import DeadlinePolicy
from cachegen.stream.scenario import (
    DEFAULT_MODELS,
    WORST_DISTORTION,
    Workload,
    find_model,
    nested_points,
)
from cachegen.stream.simulate import (
    DEFAULT_TABLE,
    PAPER_RULE,
    SAME_CODEC,
    Contender,
    contender,
    regrets,
    simulate,
    summary,
)
from cachegen.stream.traces import cloud_traces

TRACES = 40


@dataclass(frozen=True)
class Variant:
    name: str
    workload: Workload = field(default_factory=Workload)
    table: str = DEFAULT_TABLE
    worst_distortion: float = WORST_DISTORTION
    models: tuple[str, ...] = DEFAULT_MODELS


VARIANTS = (
    Variant("as in the main figures"),
    *(Variant(f"SLO {slo:g} s", Workload(slo_s=slo)) for slo in (0.5, 1.0, 2.0, 4.0)),
    Variant("contexts of 0.5 to 3 x SLO", Workload(prefill_over_slo=(0.5, 3.0))),
    Variant("contexts of 1 to 3 x SLO", Workload(prefill_over_slo=(1.0, 3.0))),
    Variant("a tenth of the machine for prefill", Workload(prefill_share=0.1)),
    Variant("all of the machine for prefill", Workload(prefill_share=1.0)),
    Variant("one request on each trace", Workload(requests=1)),
    Variant("first byte after 30 ms", Workload(latency_s=0.03)),
    Variant("progressive with a profile", table="progressive-profile"),
    Variant("any pass 0 is good enough", worst_distortion=1.0),
    Variant("no coarser than 0.05", worst_distortion=0.05),
    Variant("llama-2-7b: 32 KV heads", models=("llama-2-7b",)),
)


def contenders(variant: Variant) -> list[Contender]:
    chosen: dict[str, Any] = {
        "table": variant.table,
        "worst_distortion": variant.worst_distortion,
    }
    entrants = [
        contender(name, **chosen) for name in (PAPER_RULE, SAME_CODEC, "hybrid", "deadline")
    ]
    if variant.name == VARIANTS[0].name:
        for mode in ("needed", "never"):
            policy = DeadlinePolicy(recompute=mode)
            entrants.append(
                replace(contender("deadline", policy=policy, **chosen), name=f"deadline, {mode}")
            )
        # The same decisions over CacheGen's levels and over our steps as separate objects.
        for name, source in (("its levels", PAPER_RULE), ("separate steps", SAME_CODEC)):
            levels = contender(source, policy=DeadlinePolicy(), **chosen)
            entrants.append(replace(levels, name=f"deadline, {name}"))
    return entrants


def measure(variant: Variant, traces: int, seed: int) -> dict[str, Any]:
    results = simulate(
        [find_model(name) for name in variant.models],
        cloud_traces(traces, seed),
        contenders(variant),
        workload=variant.workload,
        seed=seed,
        oracle_points=nested_points(variant.table, variant.worst_distortion),
    )
    rows = []
    for name, samples in results.samples.items():
        ratios = regrets(results, name)
        figures = summary(samples)
        kept = ("slo_violation_rate", "slo_violation_rate_where_possible", "distortion_mean")
        rows.append(
            {
                "policy": name,
                **{key: figures[key] for key in (*kept, "ttft_mean_s", "recomputed_share")},
                "regret": statistics.median(ratios) if ratios else None,
            }
        )
    first = results.samples[PAPER_RULE]
    return {
        "variant": variant.name,
        "models": variant.models,
        "impossible_rate": statistics.fmean(not sample.best.in_time for sample in first),
        "policies": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--traces", type=int, default=TRACES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(width=140)
    rows = []
    for variant in VARIANTS:
        rows.append(measure(variant, arguments.traces, arguments.seed))
        shown = ", ".join(
            f"{row['policy']} {row['slo_violation_rate']:.1%}/{row['distortion_mean']:.4f}"
            for row in rows[-1]["policies"]
        )
        console.print(f"{variant.name}: {shown}", highlight=False)
    result = {
        "traces": arguments.traces,
        "seed": arguments.seed,
        "variants": rows,
        **environment(
            ["python", "benchmarks/simulation_variants.py", "--json", arguments.json.name]
        ),
    }
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
