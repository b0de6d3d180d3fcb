"""Which layout vLLM's caches have on this worker: asked of vLLM, never guessed."""

from __future__ import annotations

import re
from typing import Any

from cachegen.connectors.cpu_blocks import Packing, packing_of
from cachegen.connectors.layout import recognize
from cachegen.connectors.paged import PagedCache
from cachegen.errors import UnsupportedModelError
from cachegen.types import Geometry


def paged_cache(kv_caches: dict[str, Any], vllm_config: Any, *, geometry: Geometry) -> PagedCache:
    """Recognise the caches that vLLM registers.

    kv_caches: layer name to tensor. geometry: what this rank should hold.
    Raises: UnsupportedModelError for another number of layers or an unknown layout.
    """
    names = sorted(kv_caches, key=_depth)
    tensors = [kv_caches[name] for name in names]
    if len({_depth(name) for name in names}) != geometry.layers or len(names) != geometry.layers:
        raise UnsupportedModelError(
            "layers with a KV cache",
            got=f"{len(names)} on this rank",
            expected=f"{geometry.layers}, one per layer of the model",
            remedy="layers that share a cache, and draft models, are not stored",
        )
    block_tokens = int(vllm_config.cache_config.block_size)
    layouts = [
        recognize(
            tensor.shape,
            block_tokens=block_tokens,
            heads=geometry.kv_heads,
            key_dim=geometry.key_dim,
            value_dim=geometry.value_dim,
            packing=_packing(tensor, vllm_config, geometry),
        )
        for tensor in tensors
    ]
    cache = PagedCache(tensors, layouts, block_tokens=block_tokens)
    if cache.geometry != geometry:
        raise UnsupportedModelError("paged cache", got=cache.geometry, expected=geometry)
    return cache


def _packing(tensor: Any, vllm_config: Any, geometry: Geometry) -> Packing:
    """Ask the function that the CPU backend itself decides with."""
    if tensor.device.type != "cpu":
        return Packing.ROWS
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache = vllm_config.cache_config
    isa = _get_attn_isa(tensor.dtype, cache.block_size, geometry.key_dim, cache.cache_dtype)
    return packing_of(isa, head_dim=geometry.key_dim)


def _depth(name: str) -> int:
    """Return the layer number in a name such as ``model.layers.3.self_attn.attn``."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", f".{name}")
    if not numbers:
        raise UnsupportedModelError(
            "name of a layer", got=name, expected="a number, as in model.layers.3.self_attn"
        )
    return int(numbers[0])
