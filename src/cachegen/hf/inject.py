"""Inject: hand stored KV back to a model and continue from it.

``inject`` makes a cache of one prefix that owns its memory. The layers of a DynamicCache never
write in place, they concatenate into new tensors; so ``clone`` may share tensors between any number
of questions asked after one prefix, and none of them changes the others or the chunk.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from cachegen.chunk import KVChunk, aligned_empty, as_torch
from cachegen.errors import ConfigError, GeometryError, UnsupportedModelError
from cachegen.hf.capture import token_rows
from cachegen.hf.models import (
    attention_windows,
    check_cache,
    first_held,
    geometry_of,
    layer_devices,
)
from cachegen.hf.rope import depends_on_length, rotary_tables

Prefix = KVChunk | Sequence[KVChunk]

# Arguments of model.generate() that do not go with an injected cache or with lists of new tokens.
_REFUSED = (
    *("past_key_values", "position_ids", "inputs", "inputs_embeds", "streamer"),
    *("assistant_model", "cache_implementation", "return_dict_in_generate"),
)


def inject(model: Any, kv: Prefix) -> DynamicCache:
    """Build the cache a model would have after prefilling a prefix.

    kv: the prefix from position 0, one chunk or consecutive chunks, in any KV dtype: values are
        converted to the model's. Copied, so that the cache owns its memory.
    Returns: a DynamicCache of batch 1, layers (1, H, T, D) on the devices of the model's layers.
        Sliding-window layers hold the last window - 1 tokens, as the model's own do.
    Raises: GeometryError if shape or positions do not fit the model, or a layer lacks tokens;
        UnsupportedModelError if the model is refused or applies another RoPE.
    """
    chunks = [kv] if isinstance(kv, KVChunk) else list(kv)
    _check_chunks(model, chunks)
    total = sum(chunk.tokens for chunk in chunks)
    cache = DynamicCache(config=model.config)
    devices = layer_devices(model, len(cache.layers))
    for index, window in enumerate(attention_windows(model)):
        begin = first_held(window, total)
        planes = [
            _gather(chunks, index, begin, total, is_value=is_value).to(
                device=devices[index], dtype=model.dtype
            )
            for is_value in (False, True)
        ]
        _fill(cache.layers[index], planes[0], planes[1], total)
    return cache


def reserve(
    model: Any, tokens: int
) -> tuple[DynamicCache, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Make the cache of a prefix for a decoder to fill in, on the devices of the model's layers.

    tokens: of the prefix.
    Returns: a cache as from ``inject``, and for each layer its K and V as views (T, H, D): pass
        their rows ``[begin:end]`` as ``out`` of ``cachegen.decode``, so that a chunk goes from its
        bytes to the cache of a GPU without a copy on the way.
    Raises: UnsupportedModelError for sliding windows, whose layers hold fewer tokens.
    """
    if any(window is not None for window in attention_windows(model)):
        raise UnsupportedModelError(
            "layers with sliding windows", got="some", expected="none", remedy="use inject"
        )
    geometry = geometry_of(model)
    cache = DynamicCache(config=model.config)
    devices = layer_devices(model, len(cache.layers))
    views = []
    for layer, device in zip(cache.layers, devices, strict=True):
        keys, values = (
            torch.empty((1, geometry.kv_heads, tokens, dim), device=device, dtype=model.dtype)
            for dim in (geometry.key_dim, geometry.value_dim)
        )
        _fill(layer, keys, values, tokens)
        views.append((keys[0].transpose(0, 1), values[0].transpose(0, 1)))
    return cache, views


def planes(cache: DynamicCache, begin: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V of every layer for the tokens [begin, end), where they lie.

    cache: of batch 1, every layer with all tokens. Returns: views (T, H, D), as the chunk of
        ``cachegen.codec.gpu.encode`` and the out of ``cachegen.decode`` take them.
    Raises: UnsupportedModelError for other caches, GeometryError for tokens it does not hold.
    """
    check_cache(cache)
    views = []
    layer: Any
    for layer in cache.layers:
        if not 0 <= begin < end <= layer.keys.shape[2] or layer.is_sliding:
            raise GeometryError("tokens", got=(begin, end), expected="tokens of every layer")
        keys, values = (
            plane[0, :, begin:end].transpose(0, 1) for plane in (layer.keys, layer.values)
        )
        views.append((keys, values))
    return views


def clone(cache: DynamicCache, *, batch: int = 1) -> DynamicCache:
    """Return an independent cache for another question, at no cost: tensors are shared.

    cache: what ``inject`` returned, batch 1 unless ``batch`` is 1. batch: rows of the clone.
    Raises: UnsupportedModelError for caches that write in place; GeometryError for the batch.
    """
    check_cache(cache)
    if batch > 1 and _rows(cache) != 1:
        raise GeometryError("batch of the cache to clone", got=_rows(cache), expected=1)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    layer: Any
    for layer in twin.layers if batch > 1 else []:
        layer.keys = layer.keys.expand(batch, -1, -1, -1)
        layer.values = layer.values.expand(batch, -1, -1, -1)
    return twin


@torch.no_grad()
def forward_suffix(model: Any, cache: DynamicCache, suffix_ids: Any) -> torch.Tensor:
    """Return the logits of tokens that follow an injected prefix, teacher-forced.

    cache: what ``inject`` returned; it is not changed and can be used again.
    suffix_ids: (S) or (B, S) ids; rows may be padded on the right, logits of padding are noise.
    Returns: (B, S, vocabulary) in the model's dtype on its device.
    Raises: GeometryError; UnsupportedModelError for other caches.
    """
    ids = torch.as_tensor(suffix_ids, device=model.device)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise GeometryError("suffix ids", got=tuple(ids.shape), expected="(S) or (B, S), S >= 1")
    rows = _rows(cache)
    if rows not in (1, ids.shape[0]):
        raise GeometryError("suffixes", got=ids.shape[0], expected=f"{rows}, as the cache")
    twin = clone(cache, batch=ids.shape[0] if rows == 1 else 1)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=twin, use_cache=True).logits
    return logits


def generate(
    model: Any,
    input_ids: Any,
    kv: Prefix | DynamicCache | Sequence[DynamicCache],
    *,
    attention_mask: Any = None,
    **generate_kwargs: Any,
) -> list[list[int]]:
    """Continue prompts from injected prefixes with ``model.generate``.

    input_ids: whole prompts, prefix included: lists of ids or a tensor (B, T) with attention_mask.
    kv: the prefix of every prompt: a chunk, consecutive chunks or what ``inject`` returned; or, for
        prompts with prefixes of their own, a list of caches from ``inject``, one per prompt.
        A prefix covers the first n tokens of its prompt, n < T; the model prefills the rest.
    generate_kwargs: for ``model.generate``, such as max_new_tokens or do_sample.

    Prompts run as one batch. Where prefixes or rests have different lengths, rows are padded and
    masked before the prefix and between prefix and rest, positions stay exact. Models with
    sliding windows run one batch per length of the rest, since such a window counts padding.

    Returns: the new tokens of each prompt, up to and with the end-of-sequence token.
    Raises: GeometryError, UnsupportedModelError as ``inject``; ConfigError for arguments that do
        not go with it (beams, several sequences per prompt, an own cache or mask).
    """
    _check_arguments(generate_kwargs)
    prompts = token_rows(input_ids, attention_mask)
    caches = _caches(model, kv, len(prompts))
    for prompt, cache in zip(prompts, caches, strict=True):
        if cache.get_seq_length() >= len(prompt):
            raise GeometryError(
                "tokens of the prefix",
                got=cache.get_seq_length(),
                expected=f"fewer than the {len(prompt)} of the prompt",
                remedy="leave at least one token: kv.slice_tokens(0, n - 1) before inject",
            )
    sliding = any(window is not None for window in attention_windows(model))
    groups: dict[int, list[int]] = defaultdict(list)
    for row, (prompt, cache) in enumerate(zip(prompts, caches, strict=True)):
        rest = len(prompt) - cache.get_seq_length()
        groups[rest if sliding or depends_on_length(model) else 0].append(row)
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in groups.values():
        batch = [prompts[row] for row in rows], [caches[row] for row in rows]
        for row, tokens in zip(rows, _generate_batch(model, *batch, generate_kwargs), strict=True):
            answers[row] = tokens
    return answers


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    caches: list[DynamicCache],
    generate_kwargs: dict[str, Any],
) -> list[list[int]]:
    """Lay rows out as [padding, prefix, padding, rest], masked, and generate."""
    config = generate_kwargs.get("generation_config") or model.generation_config
    pad = generate_kwargs.get("pad_token_id", config.pad_token_id)
    pad = 0 if pad is None else int(pad)
    lengths = [cache.get_seq_length() for cache in caches]
    prefix = max(lengths)
    rest = max(len(prompt) - length for prompt, length in zip(prompts, lengths, strict=True))
    ids = torch.full((len(prompts), prefix + rest), pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens: Any = torch.tensor(prompt, device=model.device)
        end = prefix + rest
        spans = slice(prefix - length, prefix), slice(end - (len(prompt) - length), end)
        for span, part in zip(spans, tokens.split([length, len(prompt) - length]), strict=True):
            ids[row, span] = part
            mask[row, span] = 1
    output = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=_stack(model, caches),
        **{"pad_token_id": pad, **generate_kwargs},
    )
    ends = generate_kwargs.get("eos_token_id", config.eos_token_id)
    stops = set(ends if isinstance(ends, (list, tuple)) else [ends])
    answers = []
    for tokens in output[:, prefix + rest :].tolist():
        stop = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        answers.append(tokens[:stop])
    return answers


def _stack(model: Any, caches: list[DynamicCache]) -> DynamicCache:
    """Join caches of batch 1 into one, shorter prefixes padded with zeros on the left."""
    first = caches[0]
    if all(cache is first for cache in caches):
        return clone(first, batch=len(caches))
    total = max(cache.get_seq_length() for cache in caches)
    joined = DynamicCache(config=model.config)
    for index, layer in enumerate(joined.layers):
        planes = []
        for name in ("keys", "values"):
            parts = [getattr(cache.layers[index], name) for cache in caches]
            tokens = max(part.shape[2] for part in parts)
            padded = parts[0].new_zeros((len(parts), parts[0].shape[1], tokens, parts[0].shape[3]))
            for row, part in enumerate(parts):
                padded[row, :, tokens - part.shape[2] :] = part[0]
            planes.append(padded)
        _fill(layer, planes[0], planes[1], total)
    return joined


def _caches(model: Any, kv: Any, prompts: int) -> list[DynamicCache]:
    if isinstance(kv, DynamicCache):
        caches = [kv] * prompts
    elif isinstance(kv, KVChunk) or all(isinstance(part, KVChunk) for part in kv):
        caches = [inject(model, kv)] * prompts
    else:
        caches = list(kv)
    for cache in caches:
        check_cache(cache)
    if len(caches) != prompts or any(_rows(cache) != 1 for cache in caches):
        raise GeometryError(
            "prefixes", got=len(caches), expected=f"one, or {prompts} caches of batch 1"
        )
    return caches


def _rows(cache: Any) -> int:
    return int(cache.layers[0].keys.shape[0])


def _fill(layer: Any, keys: torch.Tensor, values: torch.Tensor, total: int) -> None:
    """Set the state of a fresh cache layer as after ``total`` tokens."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if layer.is_sliding:
        layer.cumulative_length = total


def _gather(
    chunks: list[KVChunk], index: int, begin: int, end: int, *, is_value: bool
) -> torch.Tensor:
    """Copy the tokens [begin, end) of one layer into a new (1, H, end - begin, D)."""
    geometry = chunks[0].geometry
    dim = geometry.plane_dim(is_value=is_value)
    out = aligned_empty((geometry.kv_heads, end - begin, dim), geometry.dtype.numpy)
    covered, offset = begin, 0
    for chunk in chunks:
        layer = chunk.layers[index]
        low, high = max(begin, offset + layer.begin), offset + layer.end
        if high > low:
            if low > covered:
                break
            rows = layer.plane(is_value=is_value)[low - offset - layer.begin :]
            out[:, low - begin : high - begin] = rows.transpose(1, 0, 2)
            covered = high
        offset += chunk.tokens
    if covered != end:
        raise GeometryError(
            f"tokens held by layer {index}",
            got=f"none at {covered}",
            expected=f"{begin} to {end}",
            remedy="capture with keep_all=True, or inject the whole run that was captured",
        )
    copied: torch.Tensor = as_torch(out)[None]
    return copied


def _check_chunks(model: Any, chunks: list[KVChunk]) -> None:
    geometry = geometry_of(model)
    offset = 0
    if not chunks:
        raise GeometryError("chunks", got=0, expected="at least one")
    for chunk in chunks:
        got = chunk.geometry
        for name in ("layers", "kv_heads", "key_dim", "value_dim"):
            if getattr(got, name) != getattr(geometry, name):
                raise GeometryError(
                    name,
                    got=getattr(got, name),
                    expected=f"{getattr(geometry, name)} of {model.config.model_type}",
                    remedy="inject into the model that was captured",
                )
        if got.dtype != chunks[0].geometry.dtype:
            raise GeometryError("dtype of chunks", got="several", expected="the same in all")
        if chunk.first_position != offset:
            raise GeometryError(
                "first position of a chunk",
                got=chunk.first_position,
                expected=offset,
                remedy="pass all chunks of the prefix in order, from position 0",
            )
        _check_rope(model, chunk)
        offset += chunk.tokens


def _check_rope(model: Any, chunk: KVChunk) -> None:
    """Refuse keys that were rotated with frequencies the model does not use."""
    if chunk.rope is None or depends_on_length(model):
        return
    tables = rotary_tables(model)
    for frequencies, scale in zip(chunk.rope.frequencies, chunk.rope.attention_scale, strict=True):
        if not any(
            len(table.frequencies) == len(frequencies)
            and np.allclose((*table.frequencies, table.attention_scale), (*frequencies, scale))
            for table in tables
        ):
            raise UnsupportedModelError(
                "RoPE of the model",
                got="other frequencies or attention scale",
                expected="those the keys were rotated with",
                remedy="inject into the model and RoPE scaling that were captured",
            )


def _check_arguments(arguments: dict[str, Any]) -> None:
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise ConfigError(
                f"generate argument {name}",
                got="a value",
                expected="none",
                remedy="pass inject(model, kv) to model.generate yourself",
            )
    for name in ("num_beams", "num_return_sequences"):
        if arguments.get(name, 1) not in (None, 1):
            raise ConfigError(f"generate argument {name}", got=arguments[name], expected=1)
