"""What settled the choices in ``progressive``: operating points of its variants, every byte billed.

One stored object per chunk, cut at equal slopes. Held-out texts give KL divergence, retrieval
prompts the accuracy of answers and the KL divergence at them, which depends on single tokens of the
prefix. Calibration text and prompts are others than these.

    python benchmarks/progressive_choices.py [--second FOLDER]

The second model, of ``wide_model.py train``, judges what is a prior of the codec and no choice of a
profile; it has learnt prefixes of 256 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from cachegen.bench.baselines.codec import SlopeCuts
from cachegen.bench.calibrate import PREFIX_SHARE, before_rope
from cachegen.bench.curves import Curve, CurveError, bd_rate
from cachegen.bench.quality import compare, continuation
from cachegen.bench.report import environment, write_json
from cachegen.bench.retrieval import RetrievalPrompt
from cachegen.bench.workload import Sizes, Workload, load_workload
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec import basis, progressive
from cachegen.codec.container import read_header
from cachegen.codec.fit import BasisFit, choose_groups
from cachegen.codec.levels import relative_distortions
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.metric import Metric, MetricFit
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.hf.capture import capture
from cachegen.hf.inject import forward_suffix, inject
from cachegen.hf.load import begin_and_text, load_model
from cachegen.hf.sensitivity import cache_gradients
from cachegen.profile import Profile
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
CONTEXT = 1024
CUTS = 9
QUESTIONS = 24
SECOND = "plain, second model"
SIZES = Sizes(
    texts=8,
    retrieval_prompts=2,
    needle_prompts=3,
    tracking_prompts=0,
    calibration_contexts=0,
    calibration_prompts=0,
)
console = Console()


@dataclass(frozen=True)
class Fitted:
    """Calibration data: KV of contexts, and gradients of the model's predictions by it."""

    prose: list[KVChunk]
    prompts: list[KVChunk]
    prose_metric: Metric
    metric: Metric

    def profile(
        self,
        *,
        layers: int | None = None,
        joint: bool = True,
        components: float = 1.0,
        measured: bool = True,
        with_prompts: bool = True,
    ) -> Profile:
        """Fit a profile of one kind."""
        geometry = self.prose[0].geometry
        fit = BasisFit(geometry, groups=choose_groups(geometry, layers=layers, joint=joint))
        for chunk in self.prose + (self.prompts if with_prompts else []):
            fit.add(chunk)
        metric = self.metric if with_prompts else self.prose_metric
        return fit.finish(metric=metric if measured else None, components=components)


def fitted(model: Any, tokenizer: Any) -> Fitted:
    """Capture the calibration contexts and gather gradients, as ``cachegen calibrate`` does."""
    kinds: list[list[KVChunk]] = []
    metrics: list[Metric] = []
    metric: MetricFit | None = None
    number = 0
    for name in ("calibration_text.txt", "calibration_prompts.txt"):
        begin, ids = begin_and_text(tokenizer, (MODEL / name).read_text(encoding="utf-8"))
        span = CONTEXT - len(begin)
        chunks = []
        for start in range(0, len(ids) - span + 1, span):
            context = [*begin, *ids[start : start + span]]
            chunks.append(capture(model, [context])[0].kv)
            metric = metric or MetricFit(chunks[0].geometry)
            kv, draws = cache_gradients(model, context, round(CONTEXT * PREFIX_SHARE), seed=number)
            for keys, values in draws:
                turned = keys if kv.rope is None else before_rope(keys, kv.rope)
                metric.add(turned[:, 1:], values[:, 1:])
            number += 1
        kinds.append(chunks)
        assert metric is not None
        finished = metric.finish()
        assert finished is not None
        metrics.append(finished)
    prose, prompts = kinds
    prose_metric, metric_of_all = metrics
    return Fitted(prose, prompts, prose_metric, metric_of_all)


def answers(model: Any, kv: KVChunk, prompt: RetrievalPrompt) -> np.ndarray:
    """Return log-probabilities of the answer to each question, (n, vocabulary)."""
    cache = inject(model, kv)
    rest = prompt.prefix_ids[kv.tokens :]
    rows = []
    for begin in range(0, min(QUESTIONS, len(prompt.questions)), 8):
        batch = prompt.questions[:QUESTIONS][begin : begin + 8]
        ids = torch.tensor([[*rest, *question.ids] for question in batch])
        rows.append(forward_suffix(model, cache, ids)[:, -1].double().log_softmax(-1).numpy())
    return np.concatenate(rows)


class Judge:
    """Measures operating points on texts and prompts."""

    def __init__(self, model: Any, work: Workload) -> None:
        self.model, self.work = model, work
        cases = work.tasks["retrieval"]
        self.references = [answers(model, case.prefix.kv, case.prompt) for case in cases]
        needles = work.tasks["needle"]
        self.needle_references = [answers(model, c.prefix.kv, c.prompt) for c in needles]

    def points(self, codec: ProgressiveCodec) -> list[dict[str, Any]]:
        """Return the operating points of a codec, coarse to fine."""
        rows: list[dict[str, Any]] = []
        for case in self.work.texts:
            for index, (size, distortion, kv) in enumerate(cut(codec, case.prefix.kv)):
                if index == len(rows):
                    rows.append({"bytes": [], "relative_distortion": [], "kl": [], "answer_kl": []})
                    rows[-1] |= {"right": {"retrieval": [], "needle": []}}
                kl = compare(case.reference, continuation(self.model, kv, case.token_ids)).kl_nats
                rows[index]["bytes"].append(size)
                rows[index]["relative_distortion"].append(distortion)
                rows[index]["kl"].append(kl)
        for task, references in (
            ("retrieval", self.references),
            ("needle", self.needle_references),
        ):
            for asked, reference in zip(self.work.tasks[task], references, strict=True):
                expected = [question.answer for question in asked.prompt.questions[:QUESTIONS]]
                for index, (_, _, kv) in enumerate(cut(codec, asked.prefix.kv)):
                    got = answers(self.model, kv, asked.prompt)
                    rows[index]["right"][task] += (got.argmax(1) == expected).tolist()
                    if task == "retrieval":
                        kl = (np.exp(reference) * (reference - got)).sum(axis=1).mean()
                        rows[index]["answer_kl"].append(float(kl))
        values = sum(case.prefix.kv.value_count for case in self.work.texts)
        return [summary(row, values) for row in rows]


def second_judge(folder: Path) -> Judge:
    """Return a judge that asks the second model."""
    model, tokenizer = load_model(str(folder))
    sizes = dataclasses.replace(SIZES, texts=24, prefix_tokens=256, continuation_tokens=192)
    work = load_workload(
        model, tokenizer, folder, text=folder / "eval_text.txt", calibration=None, sizes=sizes
    )
    return Judge(model, work)


def cut(codec: ProgressiveCodec, kv: KVChunk) -> list[tuple[int, float, KVChunk]]:
    """Encode a prefix in chunks; return bytes, relative distortion and KV of every cut."""
    objects = [codec.encode(chunk) for chunk in kv.split(DEFAULT_CHUNK_TOKENS)]
    tables = [dict(relative_distortions(read_header(data))) for data in objects]
    results = []
    for _, lengths in SlopeCuts(CUTS)(objects):
        chunks = [
            decode(data[:length], allow_partial=True, profile=codec.profile)
            for data, length in zip(objects, lengths, strict=True)
        ]
        pairs = zip(tables, lengths, strict=True)
        distortion = float(np.mean([table[length] for table, length in pairs]))
        results.append((sum(lengths), distortion, KVChunk.concat(chunks)))
    return results


def summary(row: dict[str, Any], values: int) -> dict[str, Any]:
    """Return the means of an operating point."""
    bits = 8 * sum(row["bytes"]) / values
    return {
        "billed_bits_per_value": bits,
        "ratio_vs_16bit": 16 / bits,
        "relative_distortion": float(np.mean(row["relative_distortion"])),
        "kl_nats": float(np.mean(row["kl"])),
        "answer_kl_nats": float(np.mean(row["answer_kl"])),
        **{f"{task}_accuracy": float(np.mean(right)) for task, right in row["right"].items()},
        "bytes_by_text": row["bytes"],
        "kl_by_text": row["kl"],
    }


@contextmanager
def constants(**changes: Any) -> Iterator[None]:
    """Change constants of ``codec.basis`` for a while."""
    weight = changes.get("PLAIN_VALUE_WEIGHT", basis.PLAIN_VALUE_WEIGHT)

    def weighted(chunk: KVChunk) -> basis.ModelBasis:
        return dataclasses.replace(basis.plain_basis(chunk), value_weight=weight)

    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(basis, name, value))
        # The name that the codec has imported.
        stack.enter_context(mock.patch.object(progressive, "plain_basis", weighted))
        yield


def float_bases(profile: Profile) -> Profile:
    """Return a profile whose vectors are the ones before rounding to 8 bits, as nearly as known."""
    arrays = dict(profile.arrays)
    for name, levels in profile.arrays.items():
        if name.endswith(".basis"):
            scale = profile.arrays[name.replace("basis", "scale")]
            # The nearest orthonormal matrix: what rounding has moved the vectors away from.
            left, _, right = np.linalg.svd(levels * scale)
            arrays[name] = (left @ right).astype(np.float32)
            arrays[name.replace("basis", "scale")] = np.ones_like(scale)
    return dataclasses.replace(profile, arrays=arrays)


def variants(fit: Fitted) -> Iterator[tuple[str, str, ProgressiveCodec, dict[str, Any]]]:
    """Yield (section, name, codec, constants), the default of each section first."""
    shipped = Profile.load(MODEL / "cachegen.profile")
    yield "profile", "gradients, text and prompts", ProgressiveCodec(profile=shipped), {}
    prose = fit.profile(with_prompts=False)
    yield "profile", "gradients, text alone", ProgressiveCodec(profile=prose), {}
    yield "profile", "plain weights", ProgressiveCodec(profile=fit.profile(measured=False)), {}
    for layers, joint in ((1, True), (4, True), (1, False), (2, False), (4, False)):
        name = f"{layers} layers, K and V {'together' if joint else 'apart'}"
        codec = ProgressiveCodec(profile=fit.profile(layers=layers, joint=joint))
        yield "grouping", name, codec, {}
    yield "basis", "before rounding to 8 bits", ProgressiveCodec(profile=float_bases(shipped)), {}
    for share in (0.5, 0.25):
        codec = ProgressiveCodec(profile=fit.profile(components=share))
        yield "basis", f"{share:.0%} of the components", codec, {}
    for sinks in (0, 4):
        codec = ProgressiveCodec(profile=shipped, sink_tokens=sinks)
        yield "sinks", f"{sinks} sink tokens", codec, {}
    yield from priors("plain")


def priors(section: str) -> Iterator[tuple[str, str, ProgressiveCodec, dict[str, Any]]]:
    """Yield what the codec supposes where it has no profile, the default first."""
    plain = ProgressiveCodec()
    yield section, "default", plain, {}
    for weight in (1.0, 4.0, 64.0):
        yield section, f"early weight {weight:g}", plain, {"EARLY_WEIGHT": weight}
    for weight in (0.7, 1.5, 2.0):
        yield section, f"V weighted {weight:g}", plain, {"PLAIN_VALUE_WEIGHT": weight}
    before = {"EARLY_WEIGHT": 4.0, "PLAIN_VALUE_WEIGHT": 1.5}
    yield section, "early weight 4, V weighted 1.5", plain, before
    yield section, "single planes", plain, {"MIN_SEGMENT_CHANNELS": 128}
    old = {"MIN_SEGMENT_CHANNELS": 1024, "EARLY_WEIGHT": 1.0}
    yield section, "K and V of all layers, no early weight", plain, old


def rate(points: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> Any:
    """Return the BD-rate of points against others, or why there is none."""
    curves = [
        Curve(
            name,
            np.array([row["bytes_by_text"] for row in rows], np.float64),
            np.array([row["kl_by_text"] for row in rows]),
        )
        for name, rows in (("variant", points), ("default", other))
    ]
    try:
        result = bd_rate(*curves, resamples=200)
    except CurveError as error:
        return {"percent": None, "reason": str(error)}
    return {"percent": result.percent, "interval": [result.low, result.high]}


def escapes_of_wide_channels() -> dict[str, float]:
    """Code noise with one channel in 16 that is 64 times wider; compare escapes with raw digits.

    Ideal: low digits of wide channels raw, so that their coarse index is as wide as the others'.
    """
    rng = np.random.default_rng(0)
    planes = rng.normal(0, 1, (2, 2, 256, 4, 64)).astype(np.float32)
    ordinary = len(ProgressiveCodec(step=0.3).encode(KVChunk.from_array(planes)))
    wide = planes.copy()
    wide[..., ::16] *= 64
    share = 1 / 16
    spread = float(np.sqrt(np.mean(np.square(wide))))
    data = ProgressiveCodec(step=0.3 / spread).encode(KVChunk.from_array(wide))
    values = planes.size
    return {
        "ordinary_bits_per_value": 8 * ordinary / values,
        "wide_bits_per_value": 8 * len(data) / values,
        "ideal_bits_per_value": 8 * ordinary / values + share * np.log2(64),
    }


def lossless_ratio(work: Workload) -> dict[str, float]:
    """Return the ratio of the lossless codec on the held-out texts, by dtype."""
    result = {}
    for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT16):
        chunks = [
            chunk
            for case in work.texts
            for chunk in case.prefix.kv.astype(dtype).split(DEFAULT_CHUNK_TOKENS)
        ]
        coded = sum(len(LosslessCodec().encode(chunk)) for chunk in chunks)
        result[dtype.label] = sum(chunk.size_bytes for chunk in chunks) / coded
    return result


def main(report: Callable[[str], None] = console.print) -> None:
    """Measure everything and write the result file."""
    parser = argparse.ArgumentParser()
    default = Path(__file__).parent / "results/progressive_choices.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--second", type=Path, help="folder of the second model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(MODEL))
    work = load_workload(
        model, tokenizer, MODEL, text=MODEL / "eval_text.txt", calibration=None, sizes=SIZES
    )
    judge = Judge(model, work)
    wide, lossless = escapes_of_wide_channels(), lossless_ratio(work)
    report(f"wide channels {wide}, lossless {lossless}")
    entries: list[dict[str, Any]] = []
    firsts: dict[str, list[dict[str, Any]]] = {}
    tried = [(judge, variants(fitted(model, tokenizer)))]
    if arguments.second:
        tried.append((second_judge(arguments.second), priors(SECOND)))
    for judge, section, name, codec, changes in (
        (judge, *variant) for judge, several in tried for variant in several
    ):
        with constants(**changes):
            points = judge.points(codec)
        kind = section if codec.profile is None else "profile"
        first = firsts.setdefault(kind, points)
        entry: dict[str, Any] = {"section": section, "name": name}
        if codec.profile is not None:
            sizes = [len(codec.profile.to_bytes())]
            groups = codec.profile.meta["groups"]
            entry |= {"profile_bytes": sizes[0], "groups": len(groups)}
        if points is not first:
            entry["bd_rate_to_default"] = rate(points, first)
        entries.append(entry | {"points": points})
        percent = entry.get("bd_rate_to_default", {}).get("percent")
        report(f"{section}: {name}: BD-rate {percent}")
        for row in points:
            shown = ("billed_bits_per_value", "relative_distortion", "kl_nats", "answer_kl_nats")
            tasks = row["retrieval_accuracy"], row["needle_accuracy"]
            report("   " + " ".join(f"{row[key]:.4g}" for key in shown) + f" {tasks}")
    content = {
        "model": "reference",
        "prefix_tokens": SIZES.prefix_tokens,
        "texts": SIZES.texts,
        "chunk_tokens": DEFAULT_CHUNK_TOKENS,
        "questions": len(work.tasks["retrieval"]) * QUESTIONS,
        "wide_channels": wide,
        "lossless_ratio": lossless,
        "variants": entries,
        **environment(),
    }
    write_json(arguments.json, content)


if __name__ == "__main__":
    main()
