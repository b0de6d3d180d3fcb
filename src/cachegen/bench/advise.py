"""Is loading worth it? Time to first token by way and link, from constants that name their source.

Everything here is arithmetic on stated numbers: sizes are measured through a model (or come from
the definition of a format), speeds are measured on a GPU where a result file has them, else
estimated from public specifications and labelled so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cachegen.bench.report import load_pyplot, save_figure
from cachegen.chunk import DEFAULT_CHUNK_TOKENS
from cachegen.errors import ConfigError

# The largest KL to the uncompressed model, in nats/token of text, that a size may stand for.
DEFAULT_MAX_KL_NATS = 0.01
DEFAULT_LINKS_GBPS = (1.0, 3.0, 10.0, 25.0, 100.0)
# Round trips and requests before the first byte arrives.
DEFAULT_LATENCY_S = 0.002
CHUNK_TOKENS = 256
WAYS = ("raw", "int8", "cachegen", "progressive")


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from. is_estimate: from a specification, not from a run."""

    value: float
    source: str
    is_estimate: bool


@dataclass(frozen=True)
class Model:
    """What a prefill and a KV cache cost. parameters: weights. hidden: width of the residual."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    parameters: float

    @property
    def values_per_token(self) -> int:
        """K and V values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def prefill_flops(self, tokens: int) -> float:
        """Arithmetic of a causal prefill: 2 per weight and token, 2 * L * hidden per pair."""
        return 2 * self.parameters * tokens + 2.0 * self.layers * self.hidden * tokens**2


# Geometries are those of the public configuration files of the models.
MODELS = {
    model.name: model
    for model in (
        Model("mistral-7b", 32, 8, 128, 4096, 7.2e9),
        Model("llama-3.1-8b", 32, 8, 128, 4096, 8.0e9),
        Model("llama-3.1-70b", 80, 8, 128, 8192, 70.6e9),
        Model("qwen2.5-0.5b", 24, 2, 64, 896, 0.49e9),
        Model("qwen2.5-7b", 28, 4, 128, 3584, 7.6e9),
    )
}


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU by its data sheet: dense bfloat16 arithmetic and memory bandwidth."""

    name: str
    flops: float
    memory_bytes_per_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250e12, 8.0e12),
        Gpu("h200", 989e12, 4.8e12),
        Gpu("h100", 989e12, 3.35e12),
        Gpu("a100", 312e12, 2.04e12),
        Gpu("l40s", 362e12, 0.864e12),
        Gpu("l4", 121e12, 0.3e12),
        Gpu("rtx4090", 165e12, 1.008e12),
    )
}
# Shares of a peak that serving reaches: assumed where nothing was measured.
PREFILL_SHARE = 0.5
WEIGHTS_SHARE = 0.7
DECODE_SHARE = 0.1

# Billed bits/value on the reference model at a KL of at most 0.01 nats/token; used where the result
# file of the evaluation is not at hand. int8 has a scale of 16 bits for each head of 128.
_SHIPPED_SOURCE = "reference model, evaluation of 2026-11-21"
_SHIPPED_BITS = {"cachegen": 2.88, "progressive": 1.90}


def results_folder() -> Path:
    """Return the folder of result files of a checkout; it need not exist."""
    return Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def find(kind: str, table: dict[str, Any], name: str) -> Any:
    """Return an entry by its name, whatever the case. Raises: ConfigError."""
    if name.lower() not in table:
        raise ConfigError(kind, got=name, expected=f"one of {', '.join(table)}")
    return table[name.lower()]


def sizes(max_kl_nats: float = DEFAULT_MAX_KL_NATS, *, profile: bool = False) -> dict[str, Figure]:
    """Return bits/value of every way to store KV, KL at most ``max_kl_nats`` on text.

    profile: whether ``progressive`` has one of the model.
    Raises: ConfigError if no point of a codec is that good.
    """
    found = {
        "raw": Figure(16.0, "bfloat16", False),
        "int8": Figure(8.0 + 16 / 128, "8 bits, and 16 of scale for each head of 128", False),
    }
    path = results_folder() / "evaluation.json"
    if not path.is_file():
        for way, bits in _SHIPPED_BITS.items():
            found[way] = Figure(bits, _SHIPPED_SOURCE, False)
        return found
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    wanted = f"progressive:profile={'true' if profile else 'false'}"
    for way in ("cachegen", "progressive"):
        fitting = [
            (row["billed_bits_per_value"], row["family"])
            for row in rows
            if row["kl_nats"] <= max_kl_nats
            and _is_of(row["family"], wanted if way == "progressive" else way)
        ]
        if not fitting:
            raise ConfigError(
                f"KL of {way}", got=f"none up to {max_kl_nats}", expected="a larger --max-kl"
            )
        bits, family = min(fitting)
        source = f"{family} on the reference model, {path.name}"
        found[way] = Figure(bits, source, False)
    return found


def _is_of(family: str, wanted: str) -> bool:
    """Whether a family of rows is a codec's, at the default chunk size."""
    codec, _, tokens = family.partition("@")
    same = codec == wanted or (wanted == "cachegen" and codec.startswith("cachegen"))
    return same and tokens in ("", str(DEFAULT_CHUNK_TOKENS))


@dataclass(frozen=True)
class Machine:
    """Speeds of a model on some GPUs: FLOP/s of a prefill, seconds of a token, decoded bytes/s."""

    prefill_flops: Figure
    token_s: Figure
    decode_bytes_per_s: Figure


def machine(model: Model, gpu: Gpu, *, gpus: int = 1) -> Machine:
    """Return speeds: measured ones from ``gpu.json`` for the device it was made on, else estimates.

    gpus: so many share the model's work evenly.
    """
    measured = _measured(model, gpu)
    flops = measured.get("prefill_flops") or Figure(
        gpu.flops * PREFILL_SHARE,
        f"{PREFILL_SHARE:.0%} of the data sheet's {gpu.flops / 1e12:.0f} TFLOP/s",
        True,
    )
    token_s = measured.get("token_s") or Figure(
        2 * model.parameters / (gpu.memory_bytes_per_s * WEIGHTS_SHARE),
        f"weights once at {WEIGHTS_SHARE:.0%} of the data sheet's bandwidth",
        True,
    )
    decode = measured.get("decode_bytes_per_s") or Figure(
        gpu.memory_bytes_per_s * DECODE_SHARE,
        f"{DECODE_SHARE:.0%} of the data sheet's bandwidth",
        True,
    )
    scaled = [
        Figure(flops.value * gpus, flops.source, flops.is_estimate),
        Figure(token_s.value / gpus, token_s.source, token_s.is_estimate),
        Figure(decode.value * gpus, decode.source, decode.is_estimate),
    ]
    return Machine(*scaled)


def _measured(model: Model, gpu: Gpu) -> dict[str, Figure]:
    """Read what ``benchmarks/gpu.py`` measured, if it ran on this GPU."""
    path = results_folder() / "gpu.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if gpu.name not in str(content.get("device", "")).lower().replace(" ", ""):
        return {}
    found = {}
    for row in content.get("models", []):
        if row["model"] == model.name:
            found["prefill_flops"] = Figure(row["prefill_flops"], path.name, False)
            found["token_s"] = Figure(row["token_s"], path.name, False)
    rates = [
        row["output_gb_per_s"]
        for row in content.get("rows", [])
        if row["kernel"] == "decode" and row["codec"] == "progressive" and row["chunks"] >= 16
    ]
    if rates:
        found["decode_bytes_per_s"] = Figure(min(rates) * 1e9, path.name, False)
    return found


@dataclass(frozen=True)
class Advice:
    """One prompt over one link. ttft_s, sizes_bytes and break_even_gbps by way.

    break_even_gbps: below it recomputing is faster; None where loading is never faster.
    best: the fastest way, "recompute" among them.
    """

    link_gbps: float
    prompt_tokens: int
    ttft_s: dict[str, float]
    sizes_bytes: dict[str, int]
    break_even_gbps: dict[str, float | None]
    best: str


def advise(
    model: Model,
    speeds: Machine,
    bits: dict[str, Figure],
    *,
    link_gbps: float,
    prompt_tokens: int,
    latency_s: float = DEFAULT_LATENCY_S,
) -> Advice:
    """Compare recomputing a prompt with loading its KV over a link, every way.

    Transfer and decoding overlap, so that the slower one counts, and beside it the last chunk of
    the other. After loading the model still computes one token, after a prefill it has it already.
    Raises: ConfigError.
    """
    if link_gbps <= 0 or prompt_tokens < 1:
        raise ConfigError(
            "link and prompt", got=(link_gbps, prompt_tokens), expected="above 0, 1 or more"
        )
    recompute = model.prefill_flops(prompt_tokens) / speeds.prefill_flops.value
    values = model.values_per_token * prompt_tokens
    share = min(1.0, CHUNK_TOKENS / prompt_tokens)
    ttft, total, even = {"recompute": recompute}, {}, {}
    for way in WAYS:
        total[way] = round(values * bits[way].value / 8)
        transfer = 8 * total[way] / (link_gbps * 1e9)
        decode = 2 * values / speeds.decode_bytes_per_s.value
        fixed = latency_s + speeds.token_s.value
        ttft[way] = fixed + max(transfer, decode) + share * min(transfer, decode)
        # Solved for the link where transfer is the slower one; below decoding's own time, never.
        room = recompute - fixed - share * decode
        even[way] = 8 * total[way] / room / 1e9 if room > decode else None
    best = min(ttft, key=lambda way: ttft[way])
    return Advice(link_gbps, prompt_tokens, ttft, total, even, best)


def verdict(advice: Advice) -> str:
    """Say in a sentence whether loading pays."""
    recompute = advice.ttft_s["recompute"]
    if advice.best == "recompute":
        way = min(WAYS, key=lambda name: advice.ttft_s[name])
        return (
            f"loading loses: recomputing takes {recompute:.3f} s, {way} "
            f"{advice.ttft_s[way]:.3f} s at {advice.link_gbps:g} Gbit/s"
        )
    return (
        f"load with {advice.best}: {advice.ttft_s[advice.best]:.3f} s, "
        f"{recompute / advice.ttft_s[advice.best]:.1f} times faster than recomputing"
    )


def to_json(
    model: Model, gpu: Gpu, speeds: Machine, bits: dict[str, Figure], rows: Sequence[Advice]
) -> dict[str, Any]:
    """Return everything that went into the advice, and the advice."""
    return {
        "model": asdict(model),
        "gpu": asdict(gpu),
        "speeds": asdict(speeds),
        "bits_per_value": {way: asdict(figure) for way, figure in bits.items()},
        "rows": [{**asdict(row), "verdict": verdict(row)} for row in rows],
    }


def plot(
    model: Model, speeds: Machine, bits: dict[str, Figure], *, prompt_tokens: int, path: Path
) -> None:
    """Draw TTFT against the link, each way and recomputing. Needs matplotlib."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    links = [10 ** (exponent / 20) for exponent in range(-20, 45)]
    rows = [
        advise(model, speeds, bits, link_gbps=link, prompt_tokens=prompt_tokens) for link in links
    ]
    for way in WAYS:
        axes.plot(links, [row.ttft_s[way] for row in rows], label=way)
    axes.axhline(rows[0].ttft_s["recompute"], color="black", linestyle="--", label="recompute")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link, Gbit/s")
    axes.set_ylabel("time to first token, s")
    axes.set_title(f"{model.name}, {prompt_tokens} tokens")
    axes.legend()
    save_figure(figure, path)
