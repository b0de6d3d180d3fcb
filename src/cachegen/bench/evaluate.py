"""Operating points of codecs and peers: billed bytes against quality through the model.

Every byte is billed, on the held-out texts and on the prompts of tasks. All intervals are 95 %:
bootstrap over prompts for means, Wilson for accuracies, over all questions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.bench.baselines.base import Bill, Peer, Point, Prefix
from cachegen.bench.baselines.families import Calibration, build, check_names
from cachegen.bench.calibrate import calibrate
from cachegen.bench.claims import claims
from cachegen.bench.comparisons import bd_rates
from cachegen.bench.quality import (
    Agreement,
    answers,
    compare,
    continuation,
    mean_kl,
    wilson_interval,
)
from cachegen.bench.report import environment
from cachegen.bench.workload import STORED_DTYPE, Sizes, Workload, load_workload
from cachegen.chunk import DEFAULT_CHUNK_TOKENS
from cachegen.errors import ConfigError
from cachegen.hf.load import load_model
from cachegen.profile import Profile

RESAMPLES = 2000
SEED = 0
# An operating point is lossless in practice up to this KL, nats/token, and within noise on tasks.
LOSSLESS_KL = 0.01

Progress = Callable[[str], None]
Interval = tuple[float, float]


@dataclass
class Measurement:
    """What one operating point did on every prompt.

    named: a level chosen by its name, beside the family's curve. chunk_tokens: None where the
    whole prefix is coded at once. bills, agreements, distortions: one per text, the last where
    objects state one. right: for each task, the questions of each prompt. task_bills, answer_kl:
    one per prompt of all tasks; KL in nats at the answers, where the model needs single tokens.
    """

    family: str
    label: str
    calibration_bytes: int
    named: bool = False
    chunk_tokens: int | None = None
    bills: list[Bill] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    distortions: list[float] = field(default_factory=list)
    right: dict[str, list[list[bool]]] = field(default_factory=dict)
    task_bills: list[Bill] = field(default_factory=list)
    answer_kl: list[float] = field(default_factory=list)


def run_evaluation(
    model_path: str,
    names: Sequence[str],
    *,
    text: Path | None = None,
    calibration_text: Path | None = None,
    profile: Profile | None = None,
    chunk_tokens: Sequence[int] = (DEFAULT_CHUNK_TOKENS,),
    sizes: Sizes | None = None,
    reuse: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measure families of operating points on a model; return JSON-able values.

    model_path: folder or name of a model. names: families, see ``baselines.families``; the first
    one, at each of its settings, is compared with the others by BD-rate. text, calibration_text:
    default to ``eval_text.txt`` and ``calibration_text.txt`` in the folder of the model.
    reuse: earlier results of the same workload, whose families are not measured again.
    Raises: ConfigError for unknown names or unsuitable texts; whatever a peer raises.
    """
    check_names(names)
    sizes = sizes or Sizes()
    folder = Path(model_path).expanduser()
    bundled = folder / "calibration_text.txt"
    fit_text = calibration_text or (bundled if bundled.is_file() else None)
    needs_importance = any(name.startswith("h2o") for name in names)
    begin = time.process_time()
    progress("loading the model")
    model, tokenizer = load_model(model_path)
    work = load_workload(
        model,
        tokenizer,
        folder,
        text=text or folder / "eval_text.txt",
        calibration=fit_text,
        sizes=sizes,
        needs_importance=needs_importance,
        progress=progress,
    )
    progress("fitting to calibration text")

    def fit() -> Profile:
        context, count = sizes.prefix_tokens, len(work.fit_ids)
        return calibrate(
            model, work.fit_ids, model_name=folder.name, context=context, tokens=context * count
        )

    calibration = Calibration(work.contexts, profile, fit)
    peers = build(names, calibration, chunk_tokens=chunk_tokens)
    identity = workload_digest(work)
    known: dict[str, list[dict[str, Any]]] = {}
    for earlier in reuse:
        known |= reusable_rows(earlier, identity)
    fresh = [peer for peer in peers if peer.family not in known]
    measurements = measure(model, work, fresh, progress=progress)
    measured = summarize_rows(measurements, work)
    by_family = {**known}
    for row in measured["rows"]:
        by_family.setdefault(row["family"], []).append(row)
    families = dict.fromkeys(peer.family for peer in peers)
    rows = [row for family in families for row in by_family[family]]
    kv = work.texts[0].prefix.kv
    result = {
        "model": {
            "name": folder.name,
            "parameters": int(sum(parameter.numel() for parameter in model.parameters())),
            "layers": kv.geometry.layers,
            "kv_heads": kv.geometry.kv_heads,
            "head_dim": kv.geometry.key_dim,
            "compute_dtype": str(model.dtype).removeprefix("torch."),
            "stored_dtype": STORED_DTYPE.label,
        },
        "prefix_tokens": kv.tokens,
        "continuation_tokens": sizes.continuation_tokens,
        "texts": len(work.texts),
        "calibration_prompts": sizes.calibration_prompts,
        "calibration_tokens": sum(context.tokens for context in work.contexts),
        "chunk_tokens": list(chunk_tokens),
        "lossless_kl_nats": LOSSLESS_KL,
        "workload": identity,
        "reused_families": [family for family in families if family in known],
        **measured,
        "rows": rows,
        "bd_rates": bd_rates(rows),
    }
    cpu_s = round(time.process_time() - begin + sum(earlier["cpu_seconds"] for earlier in reuse))
    return {**result, "claims": claims(result), "cpu_seconds": cpu_s, **environment()}


def workload_digest(work: Workload) -> str:
    """Return a digest of what is measured: prompts, calibration, and what the model makes of them.

    The uncompressed model's answers and the KV of the first text stand for its weights.
    """
    sha = hashlib.sha256()
    for case in work.texts:
        sha.update(repr((case.token_ids, case.prefix.kv.tokens)).encode())
    for name, cases in work.tasks.items():
        for task in cases:
            sha.update(repr((name, task.prompt.prefix_ids, task.reference.right)).encode())
    sha.update(repr(work.fit_ids).encode())
    sha.update(np.ascontiguousarray(work.texts[0].prefix.kv.layers[-1].values).tobytes())
    return sha.hexdigest()[:32]


def reusable_rows(earlier: dict[str, Any], identity: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of an earlier result by family. Raises: ConfigError for another workload."""
    if earlier.get("workload") != identity:
        raise ConfigError(
            "workload of the earlier result",
            got=earlier.get("workload"),
            expected=identity,
            remedy="the same model, texts, sizes and calibration, or measure everything",
        )
    families: dict[str, list[dict[str, Any]]] = {}
    for row in earlier["rows"]:
        families.setdefault(row["family"], []).append(row)
    return families


def measure(
    model: Any, work: Workload, peers: Sequence[Peer], *, progress: Progress = lambda line: None
) -> list[Measurement]:
    """Encode, decode and judge every prompt with every peer.

    Returns: a measurement per operating point, in order. Raises: ConfigError if a peer gives other
    operating points for one prompt than for another.
    """
    results: list[Measurement] = []
    for number, peer in enumerate(peers):
        progress(f"{peer.family} ({number + 1} of {len(peers)})")
        points: list[Measurement] = []
        for case in work.texts:
            for result, point in _each(peer, case.prefix, points):
                other = continuation(model, point.decoded, case.token_ids, kept=point.kept)
                result.bills.append(point.bill)
                result.agreements.append(compare(case.reference, other))
                result.distortions += [point.distortion] if point.distortion is not None else []
        for task, cases in work.measured_tasks.items():
            for task_case in cases:
                for result, point in _each(peer, task_case.prefix, points):
                    other_answers = answers(model, point.decoded, task_case.prompt, kept=point.kept)
                    result.right.setdefault(task, []).append(other_answers.right)
                    result.task_bills.append(point.bill)
                    result.answer_kl.append(
                        mean_kl(task_case.reference.log_probs, other_answers.log_probs)
                    )
        results += points
    return results


def _each(
    peer: Peer, prefix: Prefix, results: list[Measurement]
) -> list[tuple[Measurement, Point]]:
    """Pair the points of a prefix with their measurements, which the first prefix creates."""
    points = peer.points(prefix)
    if not results:
        size, chunk = peer.calibration_bytes, getattr(peer, "chunk_tokens", None)
        results += [
            Measurement(peer.family, point.label, size, named=point.named, chunk_tokens=chunk)
            for point in points
        ]
    if [point.label for point in points] != [result.label for result in results]:
        raise ConfigError(
            f"operating points of {peer.family}",
            got=[point.label for point in points],
            expected=[result.label for result in results],
        )
    return list(zip(results, points, strict=True))


def summarize_rows(measurements: Sequence[Measurement], work: Workload) -> dict[str, Any]:
    """Return the uncompressed model's scores and every operating point, as JSON-able values.

    Tasks that the uncompressed model cannot do have a score there, and none at the points.
    """
    uncompressed = {
        task: accuracy([case.reference.right for case in cases])
        for task, cases in work.tasks.items()
    }
    return {
        "uncompressed": uncompressed,
        "unmeasured_tasks": sorted(set(work.tasks) - set(work.measured_tasks)),
        "rows": [_row(measurement, work, uncompressed) for measurement in measurements],
    }


def _row(
    measurement: Measurement, work: Workload, uncompressed: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return one operating point: means, intervals and every text's figures."""
    values = [case.prefix.kv.value_count for case in work.texts]
    raw = [case.prefix.kv.size_bytes for case in work.texts]
    bills = sum(measurement.bills, Bill())
    total = np.array([bill.total_bytes for bill in measurement.bills])
    kl = np.array([agreement.kl_nats for agreement in measurement.agreements])
    top1 = np.array([agreement.top1 for agreement in measurement.agreements])
    right = np.array([agreement.accuracy_ratio for agreement in measurement.agreements])
    log_ratio = np.log([agreement.perplexity_ratio for agreement in measurement.agreements])
    answer_kl = np.array(measurement.answer_kl)
    per_value = 8 / sum(values)
    prompt_bytes = sum(bill.total_bytes for bill in measurement.task_bills)
    tasks = {task: accuracy(asked) for task, asked in measurement.right.items()}
    prompt_values = sum(
        case.prefix.kv.value_count for cases in work.measured_tasks.values() for case in cases
    )
    covered = all(_within_noise(result, uncompressed[task]) for task, result in tasks.items())
    return {
        "family": measurement.family,
        "label": measurement.label,
        "named": measurement.named,
        "chunk_tokens": measurement.chunk_tokens,
        "billed_bits_per_value": per_value * bills.total_bytes,
        "payload_bits_per_value": per_value * bills.payload_bytes,
        "side_bits_per_value": per_value * bills.side_bytes,
        "framing_bits_per_value": per_value * bills.framing_bytes,
        "exempt_bits_per_value": per_value * bills.exempt_bytes,
        "prompt_bits_per_value": 8 * prompt_bytes / prompt_values if prompt_values else None,
        "ratio_vs_16bit": sum(raw) / bills.total_bytes,
        "calibration_bytes": measurement.calibration_bytes,
        # What it would add if this one context had to carry it.
        "calibration_bits_per_value": 8 * measurement.calibration_bytes / values[0],
        "kl_nats": float(kl.mean()),
        "kl_interval": list(bootstrap_interval(kl)),
        "answer_kl_nats": float(answer_kl.mean()) if len(answer_kl) else None,
        "answer_kl_interval": list(bootstrap_interval(answer_kl)) if len(answer_kl) else None,
        "top1_agreement": float(top1.mean()),
        "top1_interval": list(bootstrap_interval(top1)),
        "accuracy_ratio": float(right.mean()),
        "accuracy_interval": list(bootstrap_interval(right)),
        "perplexity_ratio": float(np.exp(log_ratio.mean())),
        "perplexity_interval": [float(np.exp(edge)) for edge in bootstrap_interval(log_ratio)],
        "tasks": tasks,
        "distortion": float(np.mean(measurement.distortions)) if measurement.distortions else None,
        "lossless_in_practice": bool(kl.mean() <= LOSSLESS_KL and covered),
        "bytes_by_text": total.tolist(),
        "framing_by_text": [bill.framing_bytes for bill in measurement.bills],
        "kl_by_text": kl.tolist(),
        "bytes_by_prompt": [bill.total_bytes for bill in measurement.task_bills],
        "framing_by_prompt": [bill.framing_bytes for bill in measurement.task_bills],
        "answer_kl_by_prompt": measurement.answer_kl,
    }


def bootstrap_interval(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Return the 95 % percentile bootstrap interval of the mean of (N,) values."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _within_noise(score: dict[str, Any], uncompressed: dict[str, Any]) -> bool:
    """True if the interval of one score covers the other one.

    Either way round: the interval of a score with a single wrong answer never reaches 1, though
    that of a perfect one reaches down to it.
    """
    pairs = (score, uncompressed), (uncompressed, score)
    return any(a["interval"][0] <= b["accuracy"] <= a["interval"][1] for a, b in pairs)


def accuracy(prompts: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Score the questions of prompts, with the Wilson interval and one bootstrapped over prompts.

    Questions of one prompt share its cache, so that the first takes them for more independent than
    they are; the second has no width where all prompts score the same.
    """
    right = [answer for prompt in prompts for answer in prompt]
    by_prompt = np.array([np.mean(prompt) for prompt in prompts if len(prompt)])
    return {
        "accuracy": sum(right) / len(right) if right else 0.0,
        "interval": list(wilson_interval(sum(right), len(right))),
        "prompt_interval": list(bootstrap_interval(by_prompt)) if len(by_prompt) else [0.0, 1.0],
        "questions": len(right),
        "prompts": len(prompts),
    }
