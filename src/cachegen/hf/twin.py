"""A small random twin of a model: what its configuration alone decides, without its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cachegen.hf.rope import depends_on_length, rope_spec
from cachegen.types import RopeSpec

# Sizes that neither the rotation nor the kinds of layers depend on.
_SMALL = {
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts": 2,
    "num_local_experts": 2,
    "vocab_size": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope_of_config(config: Any) -> RopeSpec | None:
    """Measure the RoPE that a model of this transformers configuration applies to its keys.

    Returns: None if there is none, or if it depends on the length of the prompt.
    Raises: UnsupportedModelError, and what transformers raises for a model that it cannot make.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config
        twin = make(_shrunk(config)).float().eval()
    return None if depends_on_length(twin) else rope_spec(twin)


def _shrunk(config: Any) -> Any:
    """Return the configuration of a narrow model with the same rotation and number of layers."""
    small = copy.deepcopy(config)
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    for name, value in _SMALL.items():
        if hasattr(small, name):
            setattr(small, name, value)
    if hasattr(small, "hidden_size"):
        small.hidden_size = head_dim
    small.head_dim = head_dim
    return small
