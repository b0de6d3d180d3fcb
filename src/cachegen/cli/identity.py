"""The namespaces that an engine's ranks would use for a model, without running the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cachegen.types import KVDtype

# What servers are commonly run with; looked through when a store knows other namespaces.
_DTYPES = ("bfloat16", "float16", "float32")
_CHUNK_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
_TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Serving:
    """How a model is served, as far as its keys depend on it.

    dtype: of the model, which the cache has too. tensor_parallel, pipeline_parallel: ranks.
    """

    model: str
    dtype: str
    chunk_tokens: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def differs(self, other: Serving) -> str:
        """Say how another way of serving the same model differs from this one."""
        names = ("dtype", "chunk_tokens", "tensor_parallel", "pipeline_parallel")
        return ", ".join(
            f"{name} {getattr(other, name)} instead of {getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        )


def namespaces_of(serving: Serving) -> list[bytes]:
    """Return the namespace of every rank, from the same code as the connector's.

    Raises: UnsupportedModelError, FileNotFoundError.
    """
    from cachegen.connectors import vllm_model

    config = _engine_config(serving)
    ranks = vllm_model.all_ranks(config, chunk_tokens=serving.chunk_tokens)
    return [rank.namespace for rank in ranks]


def likely_variants(serving: Serving) -> Iterator[Serving]:
    """List other ways to serve the model, those that differ in one respect before those in two."""
    variants = [
        replace(serving, dtype=dtype, chunk_tokens=chunk_tokens, tensor_parallel=ranks)
        for dtype in _DTYPES
        for chunk_tokens in _CHUNK_TOKENS
        for ranks in _TENSOR_PARALLEL
    ]
    changes = [serving.differs(variant).count(" instead of ") for variant in variants]
    for wanted in (1, 2):
        yield from (v for v, count in zip(variants, changes, strict=True) if count == wanted)


def model_dtype(model: str) -> str:
    """Return the element type that a model's configuration names. Raises: FileNotFoundError."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return KVDtype.of(name).label


def read_tokens(model: str, text: str) -> list[int]:
    """Turn a prompt into the token ids that a server without a chat template computes.

    Raises: UnsupportedModelError without a tokenizer.
    """
    from cachegen.hf.load import load_tokenizer

    return list(load_tokenizer(model)(text)["input_ids"])


def _engine_config(serving: Serving) -> Any:
    """Describe a server with the names of vLLM's configuration that the connector reads."""
    import torch

    from cachegen.hf.load import load_config

    config = load_config(serving.model)
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size, stages = serving.tensor_parallel, serving.pipeline_parallel

    def layers_of(parallel: Any) -> tuple[int, int]:
        return _stage(int(text.num_hidden_layers), parallel.rank // size, stages)

    model = SimpleNamespace(
        model=serving.model,
        revision=None,
        hf_text_config=text,
        dtype=getattr(torch, serving.dtype),
        quantization=None,
        use_mla=hasattr(text, "kv_lora_rank"),
        get_total_num_kv_heads=lambda: heads,
        get_head_size=lambda: int(head_dim),
        get_layers_start_end_indices=layers_of,
    )
    parallel = SimpleNamespace(tensor_parallel_size=size, pipeline_parallel_size=stages, rank=0)
    cache = SimpleNamespace(cache_dtype="auto")
    return SimpleNamespace(model_config=model, parallel_config=parallel, cache_config=cache)


def _stage(layers: int, stage: int, stages: int) -> tuple[int, int]:
    """Return the layers of a pipeline stage: what is left over goes to the last but one ones."""
    counts = [layers // stages] * stages
    for index in range(2, layers % stages + 2):
        counts[-index] += 1
    begin = sum(counts[:stage])
    return begin, begin + counts[stage]
