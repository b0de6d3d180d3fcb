"""Requests with LoRA adapters: each hits what it saved itself, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from engines import CHUNK, REFERENCE, check_same, engine, text_tokens
from safetensors.numpy import save_file
from vllm.lora.request import LoRARequest

PROMPT = text_tokens()[:600]
HIT = len(PROMPT) // CHUNK * CHUNK
RANK = 8


def write_adapter(folder: Path, seed: int) -> str:
    """Write an adapter of random weights, as PEFT does, strong enough to change every answer."""
    folder.mkdir()
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    hidden, values = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in (("q_proj", hidden), ("v_proj", values)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            a, b = rng.standard_normal((RANK, hidden)), rng.standard_normal((width, RANK))
            tensors[f"{base}.lora_A.weight"] = (a / 16).astype(np.float32)
            tensors[f"{base}.lora_B.weight"] = (b / 4).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    described |= {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    return str(folder)


def names_in(store: Path) -> set[str]:
    return {path.name for path in (store / "objects").rglob("*") if path.is_file()}


def test_adapters_share_no_key_and_hit_their_own(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = LoRARequest("one", 1, write_adapter(tmp_path / "one", 1))
    second = LoRARequest("other", 2, write_adapter(tmp_path / "other", 2))
    # The same adapter under another name is the same adapter.
    renamed = LoRARequest("renamed", 3, first.lora_path)
    with engine(str(store), enable_lora=True, max_loras=2, max_lora_rank=RANK) as live:
        computed, names = [], set()
        for lora in (first, second, None):
            (answer,) = live.ask([PROMPT], lora=lora)
            live.settle()
            assert answer.cached_tokens == 0
            new = names_in(store) - names
            assert len(new) == HIT // CHUNK
            computed.append(answer)
            names |= new
        assert len({answer.tokens for answer in computed}) == 3
        for lora, want in zip((second, None, first), (*computed[1:], computed[0]), strict=True):
            (answer,) = live.ask([PROMPT], lora=lora)
            assert answer.cached_tokens == HIT
            check_same([answer], [want])
        (answer,) = live.ask([PROMPT], lora=renamed)
        assert answer.cached_tokens == HIT
        check_same([answer], computed[:1])
        live.settle()
        assert names_in(store) == names
