"""Would ``progressive`` gain from what neighbouring tokens share: an anchor delta, or a DCT?

    python benchmarks/token_redundancy.py --json benchmarks/results/token_redundancy.json

The same coefficients, steps and frozen tables as the codec's, code lengths under the tables to the
last digit, classes chosen by the codec's own search, and KL through the reference model.

anchor: the first of every 10 tokens as it is, the others as differences to the decoded anchor; a
closed loop at each level by itself, which is more than nested passes could have (they would
predict from the anchor of a coarser pass). Anchors and differences have classes of their own.
anchor, fine: the same with anchors at a third of the step, as CacheGen gives them 8 bits.
dct: an orthonormal DCT over each lane's run of 8 tokens; one class offset for each frequency.
dct where it pays: for each group and level whichever of both has fewer bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from coefficients import Coefficients, Floats
from numpy.typing import NDArray
from rich.console import Console

from cachegen.bench.calibrate import calibrate
from cachegen.bench.curves import Curve, CurveError, bd_rate
from cachegen.bench.quality import answers, compare, continuation, mean_kl
from cachegen.bench.report import environment, write_json
from cachegen.bench.workload import Sizes, Workload, load_workload
from cachegen.chunk import KVChunk
from cachegen.codec import encode_reference, passes
from cachegen.codec.ladder import CLASSES, Ladder, climb, descend
from cachegen.hf.load import load_model
from cachegen.profile import Profile

MODEL = Path(__file__).parents[1] / "models/reference"
CHUNK_TOKENS, LANES, ANCHOR_EVERY = 256, 32, 10
STEPS = {False: (0.3, 0.6, 1.2, 2.4), True: (0.12, 0.36, 0.9, 2.2)}
CLASS_BYTE, OFFSET_BITS = 8, 8

Array = NDArray[np.float64]


def code_lengths(ladder: Ladder) -> Array:
    """Return the bits of each channel in each class, (ways, N)."""
    return encode_reference.code_lengths(ladder) / passes.COST_UNIT


def coded(values: Floats) -> tuple[Floats, float]:
    """Code a matrix in steps, a class for each channel; return the decoded values and the bits."""
    ladder = climb(values, 1)
    lengths = code_lengths(ladder)
    return decoded(values, ladder, lengths.argmin(axis=0)), float(lengths.min(axis=0).sum())


def decoded(values: Floats, ladder: Ladder, classes: NDArray[Any]) -> Floats:
    """Reconstruct with the decay the codec would choose. classes: (N,) or (T, N)."""
    scale = classes % CLASSES
    best = min(
        (descend(ladder, 1, scale, decay / 64) for decay in (0, 32, 64, 96)),
        key=lambda guess: float(np.square(guess - values).sum()),
    )
    return best


def plain(values: Floats) -> tuple[Floats, float]:
    return coded(values)


def anchored(values: Floats, *, finer: float = 1.0) -> tuple[Floats, float]:
    """Code the first of every 10 tokens, and the others less the decoded first one."""
    rows = np.arange(len(values))
    anchors = rows % ANCHOR_EVERY == 0
    result = np.empty_like(values)
    kept, bits = coded(values[anchors] * np.float32(finer))
    result[anchors] = kept / np.float32(finer)
    reference = result[anchors][rows[~anchors] // ANCHOR_EVERY]
    rest, more = coded(values[~anchors] - reference)
    result[~anchors] = rest + reference
    # A second class for every channel.
    return result, bits + more + CLASS_BYTE * values.shape[1]


def transformed(values: Floats) -> tuple[Floats, float]:
    """Code the DCT of each lane's run, one class offset for each frequency."""
    run = len(values) // LANES
    matrix = dct_matrix(run)
    lanes = values.reshape(LANES, run, -1)
    frequencies = np.einsum("fp,lpc->flc", matrix, lanes).astype(np.float32)
    overall = np.sqrt(np.square(frequencies).mean() + 1e-12)
    ladders = [climb(plane, 1) for plane in frequencies]
    lengths = [code_lengths(ladder) for ladder in ladders]
    offsets = []
    total = np.zeros_like(lengths[0])
    for plane, length in zip(frequencies, lengths, strict=True):
        deviation = np.sqrt(np.square(plane).mean() + 1e-12)
        guess = round(6 * float(np.log(deviation / overall)) / np.log(3))
        # Around what the deviations say, the offset with the shortest code.
        best = min(
            range(guess - 2, guess + 3),
            key=lambda o, length=length: shifted(length, o).min(axis=0).sum(),
        )
        offsets.append(best)
        total += shifted(length, best)
    classes = total.argmin(axis=0)
    guesses = []
    for plane, ladder, offset in zip(frequencies, ladders, offsets, strict=True):
        scale = np.clip(classes % CLASSES + offset, 0, CLASSES - 1)
        guesses.append(decoded(plane, ladder, scale))
    back = np.einsum("fp,flc->lpc", matrix, np.array(guesses)).reshape(values.shape)
    bits = float(total.min(axis=0).sum()) + OFFSET_BITS * run
    return back.astype(np.float32), bits


def shifted(lengths: Array, offset: int) -> Array:
    """Return code lengths by class, with every class ``offset`` classes further."""
    families = lengths.reshape(-1, CLASSES, lengths.shape[1])
    place = np.clip(np.arange(CLASSES) + offset, 0, CLASSES - 1)
    result: Array = families[:, place].reshape(lengths.shape)
    return result


def dct_matrix(size: int) -> Array:
    """Return the orthonormal DCT-II, (frequency, place)."""
    k, n = np.mgrid[:size, :size]
    matrix: Array = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def where_it_pays(values: Floats) -> tuple[Floats, float]:
    """Code with the DCT or without, whichever has fewer bits; one bit says which."""
    best = min(plain(values), transformed(values), key=lambda pair: pair[1])
    return best[0], best[1] + 1


Method = Callable[[Floats], tuple[Floats, float]]
METHODS: dict[str, Method] = {
    "none": plain,
    "anchor": anchored,
    "anchor, fine": lambda values: anchored(values, finer=3.0),
    "dct": transformed,
    "dct where it pays": where_it_pays,
}


def recode(
    parts: Sequence[Coefficients], step: float, method: Method
) -> tuple[KVChunk, float, list[float]]:
    """Code the chunks of a context; return the KV, the bits, and the bits of each group."""
    chunks, by_group = [], np.zeros(len(parts[0].groups))
    for part in parts:
        unit = np.float32(step * part.spread)
        groups = []
        for index, values in enumerate(part.groups):
            guess, bits = method(values / unit)
            groups.append(guess * unit)
            by_group[index] += bits
        chunks.append(part.rebuild(groups))
    return KVChunk.concat(chunks), float(by_group.sum()), by_group.tolist()


def measure(model: Any, work: Workload, profile: Profile | None) -> list[dict[str, Any]]:
    """Measure every method at every step: bits, KL on text and KL at answers."""
    texts = [(case.prefix.kv, case) for case in work.texts]
    asked = [(case.prefix.kv, case) for case in work.tasks["retrieval"]]
    parts = {
        id(kv): [Coefficients.of(chunk, profile) for chunk in kv.split(CHUNK_TOKENS)]
        for kv, _ in [*texts, *asked]
    }
    # Mean, classes and exempt tokens are the same for all methods: not in these figures.
    rows = []
    for name, method in METHODS.items():
        for step in STEPS[profile is not None]:
            row: dict[str, Any] = {"method": name, "profile": profile is not None, "step": step}
            values = texts[0][0].value_count
            bits, kl, groups = [], [], []
            for kv, case in texts:
                coded_kv, total, by_group = recode(parts[id(kv)], step, method)
                other = continuation(model, coded_kv, case.token_ids)
                kl.append(compare(case.reference, other).kl_nats)
                bits.append(total / values)
                groups.append(by_group)
            row |= {"bits_by_text": bits, "kl_by_text": kl}
            row["bits_by_group"] = np.mean(groups, axis=0).tolist()
            bits, kl = [], []
            for kv, case in asked:
                coded_kv, total, _ = recode(parts[id(kv)], step, method)
                other = answers(model, coded_kv, case.prompt)
                kl.append(mean_kl(case.reference.log_probs, other.log_probs))
                bits.append(total / values)
            row |= {"bits_by_prompt": bits, "answer_kl_by_prompt": kl}
            rows.append(row)
    return rows


def rates(rows: Sequence[dict[str, Any]], profile: bool) -> list[dict[str, Any]]:
    """Return each method's BD-rate against none, on text and at answers."""
    results = []
    for quality, fields in (
        ("text", ("bits_by_text", "kl_by_text")),
        ("answers", ("bits_by_prompt", "answer_kl_by_prompt")),
    ):
        curves = {
            name: Curve(
                name,
                *(
                    np.array([row[field] for row in rows if row["method"] == name])
                    for field in fields
                ),
            )
            for name in METHODS
        }
        for name in list(METHODS)[1:]:
            entry: dict[str, Any] = {"method": name, "profile": profile, "quality": quality}
            try:
                rate = bd_rate(curves[name], curves["none"])
                entry |= {"percent": rate.percent, "interval": [rate.low, rate.high]}
            except CurveError as error:
                entry |= {"percent": None, "reason": str(error)}
            same_step = [
                100 * (np.sum(a) / np.sum(b) - 1)
                for a, b in zip(curves[name].size, curves["none"].size, strict=True)
            ]
            results.append(entry | {"percent_bits_at_equal_steps": same_step})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = load_model(str(MODEL))
    sizes = Sizes(texts=arguments.texts, retrieval_prompts=2, needle_prompts=0, tracking_prompts=0)
    work = load_workload(
        model,
        tokenizer,
        MODEL,
        text=MODEL / "eval_text.txt",
        calibration=MODEL / "calibration_text.txt",
        sizes=sizes,
    )
    profile = calibrate(model, work.fit_ids, context=1024, tokens=1024 * len(work.fit_ids))
    console = Console()
    rows, differences = [], []
    for fitted in (None, profile):
        measured = measure(model, work, fitted)
        rows += measured
        differences += rates(measured, fitted is not None)
    for entry in differences:
        shown = "-" if entry["percent"] is None else f"{entry['percent']:+.1f} %"
        steps = ", ".join(f"{x:+.1f}" for x in entry["percent_bits_at_equal_steps"])
        console.print(
            f"{entry['method']}, profile {entry['profile']}, {entry['quality']}: {shown} "
            f"({steps} % bits at equal steps)"
        )
    words = ["python", "benchmarks/token_redundancy.py", "--json", arguments.json.name]
    write_json(arguments.json, {"rates": differences, "rows": rows, **environment(words)})


if __name__ == "__main__":
    main()
