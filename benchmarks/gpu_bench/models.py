"""Prefill and token times of models with random weights, and time to first token made of them."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from gpu_bench.machine import Bench

# Heads and widths of the feed-forward layers, from the public configurations.
PREFILL_MODELS = {"mistral-7b": (32, 14336), "llama-3.1-70b": (64, 28672)}
PROMPTS = (2048, 9400, 32768)
MEASURED_LAYERS = (2, 6)


def time_models(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    """Time prefill and one token of models with random weights; layers reduced, extrapolated.

    Time is linear in the layers: two numbers of layers give the time of a layer and the rest.
    Returns: rows, and why some are missing.
    """
    if importlib.util.find_spec("transformers") is None:
        return [], "transformers is not installed"
    from cachegen.bench.advise import MODELS

    rows: list[dict[str, Any]] = []
    for name, (heads, wide) in PREFILL_MODELS.items():
        model = MODELS[name]
        for tokens in PROMPTS if not bench.dry else (64,):
            if bench.out_of_time():
                return rows, "no time was left for all prompts"
            layers = MEASURED_LAYERS if not bench.dry else (1, 2)
            times = [_time_model(bench, model, heads, wide, tokens, count) for count in layers]
            prefill_s, token_s = (
                _extrapolated(few, more, layers, model.layers)
                for few, more in zip(*times, strict=True)
            )
            rows.append(
                {
                    "model": name,
                    "prompt_tokens": tokens,
                    "prefill_s": prefill_s,
                    "token_s": token_s,
                    "prefill_flops": model.prefill_flops(tokens) / prefill_s,
                    "layers_measured": list(layers),
                    "layers": model.layers,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    # The advisor takes the row of a model that comes last.
    return sorted(rows, key=lambda row: row["prompt_tokens"] == PROMPTS[1]), ""


def _extrapolated(few_s: float, more_s: float, layers: tuple[int, int], all_layers: int) -> float:
    layer_s = max(more_s - few_s, 0.0) / (layers[1] - layers[0])
    return max(few_s, 1e-9) + layer_s * (all_layers - layers[0])


def _time_model(
    bench: Bench, model: Any, heads: int, wide: int, tokens: int, layers: int
) -> tuple[float, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shrink = 32 if bench.dry else 1
    config = LlamaConfig(
        hidden_size=model.hidden // shrink,
        intermediate_size=wide // shrink,
        num_hidden_layers=layers,
        num_attention_heads=max(heads // shrink, 1),
        num_key_value_heads=max(model.kv_heads // shrink, 1),
        vocab_size=32000 // shrink,
        max_position_embeddings=1 << 17,
    )
    device = "cpu" if bench.dry else "cuda"
    with torch.device(device), torch.no_grad():
        network = LlamaForCausalLM(config).eval()
        torch.nn.Module.to(network, torch.bfloat16)
        ids = torch.randint(0, config.vocab_size, (1, tokens))
        prefill_s = bench.seconds(
            lambda: network(input_ids=ids, use_cache=True, logits_to_keep=1), repeats=5
        )
        cache = network(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        token_s = bench.seconds(
            lambda: network(input_ids=ids[:, :1], past_key_values=cache, use_cache=True), repeats=5
        )
    return prefill_s, token_s


def ttft_table(models: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return time to first token by model, prompt, link and way, from what was measured here."""
    from cachegen.bench import advise

    rates = [
        row["output_gb_per_s"]
        for row in rows
        if (row["kernel"], row["codec"]) == ("decode", "progressive")
    ]
    decode = advise.Figure(min(rates, default=1.0) * 1e9, "this run", False)
    table = []
    for row in models:
        model = advise.MODELS[row["model"]]
        speeds = advise.Machine(
            advise.Figure(row["prefill_flops"], "this run", False),
            advise.Figure(row["token_s"], "this run", False),
            decode,
        )
        for link in advise.DEFAULT_LINKS_GBPS:
            advice = advise.advise(
                model, speeds, advise.sizes(), link_gbps=link, prompt_tokens=row["prompt_tokens"]
            )
            table.append(
                {
                    "model": row["model"],
                    "prompt_tokens": row["prompt_tokens"],
                    "link_gbps": link,
                    "ttft_s": advice.ttft_s,
                    "break_even_gbps": advice.break_even_gbps,
                    "verdict": advise.verdict(advice),
                }
            )
    return table
