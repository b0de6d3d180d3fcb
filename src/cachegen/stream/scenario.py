"""What the simulator is fed with: models, measured segment tables, requests.

Sizes and distortions were measured on the reference model (``segment_tables.json``, made by
``scripts/make_segment_tables.py``): bits per value and relative distortion carry over to another
geometry by its number of values. A wide model has many more groups than the reference model, so
passes are cut into steps between the measured points. Prefill speeds are assumptions.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cachegen.errors import ConfigError
from cachegen.stream.plan import ChunkCurve, Step
from cachegen.stream.speeds import PrefillSpeed

CHUNK_TOKENS = 1024
# Steps between two measured points of a nested object.
STEPS_BETWEEN = 3
# Coarser than this nothing is handed over: about the coarsest level that LMCache ships.
WORST_DISTORTION = 0.1


@dataclass(frozen=True)
class ModelClass:
    """A model's geometry, and how fast a machine of its class prefills it.

    prefill: of the whole machine. text: where the numbers come from.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    prefill: PrefillSpeed
    longest_tokens: int
    text: str

    @property
    def values_per_token(self) -> int:
        """K and V values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _model(
    name: str,
    layers: int,
    kv_heads: int,
    hidden: int,
    *,
    billions: float,
    machines: int,
    longest_tokens: int = 65_536,
) -> ModelClass:
    """Derive prefill speed from arithmetic: 2 FLOP per weight and 4 * L * hidden per token pair.

    A machine of the H100 or H200 class is taken to reach 450 TFLOP/s in bfloat16, a good half of
    its peak.
    """
    flops = 450e12 * machines
    prefill = PrefillSpeed(2e9 * billions / flops, 4.0 * layers * hidden / flops)
    text = (
        f"{layers} layers, {kv_heads} KV heads of 128; prefill assumed at 450 TFLOP/s on each of "
        f"{machines} H100-class GPU{'s' if machines > 1 else ''}: "
        f"{1 / prefill.token_s:,.0f} tokens/s at the begin of a context"
    )
    return ModelClass(name, layers, kv_heads, 128, prefill, longest_tokens, text)


MODELS = {
    model.name: model
    for model in (
        _model("mistral-7b", 32, 8, 4096, billions=7.2, machines=1),
        _model("llama-3.1-8b", 32, 8, 4096, billions=8.0, machines=1),
        _model("llama-2-7b", 32, 32, 4096, billions=6.7, machines=1),
        _model("qwen2.5-72b", 80, 8, 8192, billions=72.7, machines=4),
        _model("llama-3.1-70b", 80, 8, 8192, billions=70.6, machines=4),
    )
}
DEFAULT_MODELS = ("mistral-7b", "llama-3.1-70b")


def find_model(name: str) -> ModelClass:
    """Return a model of the table. Raises: ConfigError."""
    if name not in MODELS:
        raise ConfigError("model", got=name, expected=f"one of {', '.join(MODELS)}")
    return MODELS[name]


@cache
def segment_tables() -> dict[str, Any]:
    """Return the measured tables, with where and when they were measured."""
    path = files("cachegen.stream").joinpath("segment_tables.json")
    tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tables


def measured_points(table: str) -> list[tuple[float, float]]:
    """Return (bits per value, relative distortion) of a table, sizes rising.

    ``cachegen`` is the best of the paper's levels and of LMCache's: those that no other beats.
    Raises: ConfigError for an unknown table.
    """
    tables = segment_tables()["tables"]
    names = ("cachegen-lmcache", "cachegen-paper") if table == "cachegen" else (table,)
    if any(name not in tables for name in names):
        raise ConfigError("segment table", got=table, expected=f"cachegen, {', '.join(tables)}")
    points = sorted(
        (float(point["bits_per_value"]), float(point["distortion"]))
        for name in names
        for point in tables[name]["points"]
    )
    kept: list[tuple[float, float]] = []
    for size, distortion in points:
        if not kept or distortion < kept[-1][1]:
            kept.append((size, distortion))
    return kept


def nested_points(table: str, worst_distortion: float) -> list[tuple[float, float]]:
    """Return the steps of one nested object, from the first that is good enough on.

    Between measured points bytes and distortion are taken as linear: they are sums over groups.
    """
    points = _hull(measured_points(table))
    fine = [points[0]]
    for left, right in itertools.pairwise(points):
        for part in range(1, STEPS_BETWEEN + 1):
            share = part / STEPS_BETWEEN
            fine.append(
                (
                    left[0] + share * (right[0] - left[0]),
                    left[1] + share * (right[1] - left[1]),
                )
            )
    good = [point for point in fine if point[1] <= worst_distortion]
    if not good:
        raise ConfigError(
            "worst distortion", got=worst_distortion, expected=f"at least {fine[-1][1]:g}"
        )
    return good


def level_points(table: str, worst_distortion: float) -> list[tuple[float, float]]:
    """Return the levels of separate objects that are good enough."""
    good = [point for point in measured_points(table) if point[1] <= worst_distortion]
    if not good:
        raise ConfigError("worst distortion", got=worst_distortion, expected="a coarser one")
    return good


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of a falling curve; the first point stays."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y0 - y1) * (point[0] - x1) > (y1 - point[1]) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return hull


def curves(
    points: Sequence[tuple[float, float]],
    model: ModelClass,
    chunks: int,
    *,
    separate: bool,
) -> tuple[ChunkCurve, ...]:
    """Return the curves of a context: points scaled to a model's values."""
    values = CHUNK_TOKENS * model.values_per_token
    steps = tuple(Step(math.ceil(bits * values / 8), distortion) for bits, distortion in points)
    return tuple(
        ChunkCurve(CHUNK_TOKENS, CHUNK_TOKENS * index, steps, separate) for index in range(chunks)
    )


@dataclass(frozen=True)
class Workload:
    """How requests are drawn.

    requests: on each trace. gap_s: mean time between arrivals (Poisson). slo_s: of every request;
    None draws it from 0.5 to 4 s for each. prefill_share: of the machine, for one request; None
    draws it for each trace, from a fifth (busy) to all of it (idle).
    prefill_over_slo: contexts are drawn so that prefilling them would take between so many times
    the SLO (log-uniform). latency_s: first byte of a read. decode_bytes_per_s: of coded bytes.
    question_tokens: what is not stored, and prefilled once the rest is there.
    """

    requests: int = 6
    gap_s: float = 2.0
    slo_s: float | None = None
    prefill_share: float | None = None
    prefill_over_slo: tuple[float, float] = (0.5, 2.0)
    latency_s: float = 0.005
    decode_bytes_per_s: float = 4e9
    question_tokens: int = 64

    def __post_init__(self) -> None:
        if self.slo_s is not None and not 0.05 <= self.slo_s <= 30:
            raise ConfigError("SLO", got=self.slo_s, expected="0.05 to 30 seconds")
        if self.requests < 1 or not 0 < (self.prefill_share or 1.0) <= 1:
            raise ConfigError(
                "workload",
                got=(self.requests, self.prefill_share),
                expected="at least one request, a share above 0 and up to 1",
            )


SLO_RANGE_S = (0.5, 4.0)
SHARE_RANGE = (0.2, 1.0)


@dataclass(frozen=True)
class Request:
    """One request of a workload.

    recompute_s: true time of prefilling each chunk. question_s: of the rest of the prompt.
    """

    arrival_s: float
    slo_s: float
    chunks: int
    recompute_s: tuple[float, ...]
    question_s: float

    @property
    def deadline_s(self) -> float:
        """When the stored prefix has to be ready."""
        return self.arrival_s + self.slo_s - self.question_s


@dataclass(frozen=True)
class Scene:
    """The requests on one trace, and what is believed of prefill beforehand (never quite true)."""

    requests: tuple[Request, ...]
    guess: PrefillSpeed


def draw_scene(model: ModelClass, workload: Workload, seed: str) -> Scene:
    """Draw the requests of one trace."""
    random_ = random.Random(f"{seed} {model.name}")
    share = workload.prefill_share or _log_uniform(random_, *SHARE_RANGE)
    true = PrefillSpeed(model.prefill.token_s / share, model.prefill.pair_s / share)
    requests, now_s = [], random_.uniform(0.0, 10.0)
    for _ in range(workload.requests):
        now_s += random_.expovariate(1.0 / workload.gap_s)
        slo_s = workload.slo_s or _log_uniform(random_, *SLO_RANGE_S)
        wanted_s = slo_s * _log_uniform(random_, *workload.prefill_over_slo)
        chunks = 1
        while (
            true.seconds(0, (chunks + 1) * CHUNK_TOKENS) <= wanted_s
            and (chunks + 1) * CHUNK_TOKENS <= model.longest_tokens
        ):
            chunks += 1
        recompute_s = tuple(
            true.seconds(index * CHUNK_TOKENS, CHUNK_TOKENS) * math.exp(random_.gauss(0.0, 0.05))
            for index in range(chunks)
        )
        question_s = true.seconds(chunks * CHUNK_TOKENS, workload.question_tokens)
        requests.append(Request(now_s, slo_s, chunks, recompute_s, question_s))
    factor = math.exp(random_.gauss(0.0, 0.15))
    return Scene(
        tuple(requests), PrefillSpeed(true.token_s * factor, true.pair_s * factor, deviation=0.15)
    )


def _log_uniform(random_: random.Random, low: float, high: float) -> float:
    return math.exp(random_.uniform(math.log(low), math.log(high)))
