"""Calibration: a profile of a model from text, for the ``progressive`` codec; token redundancy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec.fit import BasisFit
from cachegen.codec.header import Group
from cachegen.codec.metric import MetricFit
from cachegen.codec.rotary import rotate
from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.hf.capture import capture
from cachegen.hf.sensitivity import cache_gradients
from cachegen.profile import Profile
from cachegen.types import RopeSpec

Floats = NDArray[np.float32]

DEFAULT_TOKENS = 16_384
DEFAULT_CONTEXT = 1024
# Of a context whose cache the rest of it is predicted from.
PREFIX_SHARE = 0.75


def captured_contexts(
    model: Any,
    token_ids: Sequence[int],
    *,
    tokens: int,
    context: int,
    begin: Sequence[int] = (),
) -> Iterator[KVChunk]:
    """Yield the KV of consecutive contexts of a text, in the model's dtype.

    begin: ids that every context starts with, as in use; part of its length.
    """
    for ids in _contexts([token_ids], tokens=tokens, context=context, begin=begin):
        yield capture(model, [ids])[0].kv


def calibrate(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    model_name: str = "",
    tokens: int = DEFAULT_TOKENS,
    context: int = DEFAULT_CONTEXT,
    begin: Sequence[int] = (),
    groups: Sequence[Group] | None = None,
    sensitivity: bool = True,
    components: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Fit a profile to texts that the model reads.

    texts: token ids of each, cut into contexts of ``context``. tokens: how many to use at most.
    begin: ids that every context starts with (see ``hf.load.begin_and_text``). groups: None chooses
        as ``codec.fit.choose_groups``. sensitivity: weigh errors by what they do to the model's
        predictions, from gradients; a model without gradients gets the plain weights, and the
        profile's meta says so. components: share of each group's components to keep.
    Raises: GeometryError if no text has a whole context, or layers hold different tokens.
    """
    fit: BasisFit | None = None
    metric: MetricFit | None = None
    refusal: str | None = None if sensitivity else "not asked for"
    for number, ids in enumerate(_contexts(texts, tokens=tokens, context=context, begin=begin)):
        chunk = capture(model, [ids])[0].kv
        if not chunk.is_uniform:
            raise GeometryError(
                "layers of the model",
                got="sliding windows shorter than the context",
                expected="layers that hold all tokens",
                remedy=f"use a context within the window instead of {context}",
            )
        fit = fit or BasisFit(chunk.geometry, groups=groups)
        fit.add(chunk)
        progress(f"captured {fit.tokens} tokens")
        if refusal is None:
            metric = metric or MetricFit(chunk.geometry)
            try:
                _add_gradients(metric, model, ids, seed=number)
            except UnsupportedModelError as error:
                metric, refusal = None, str(error)
    if fit is None:
        longest = max((len(ids) for ids in texts), default=0)
        raise GeometryError(
            "calibration text",
            got=f"{longest} tokens in the longest text, {tokens} of all to be used",
            expected=f"at least {context} of both, one context",
            remedy="give more text, use more tokens or a smaller context",
        )
    progress("fitting bases")
    profile = fit.finish(
        model_name=model_name,
        metric=metric.finish() if metric else None,
        components=components,
    )
    if refusal is not None:
        profile = replace(profile, meta=profile.meta | {"no_sensitivity": refusal})
    return profile


def _contexts(
    texts: Sequence[Sequence[int]], *, tokens: int, context: int, begin: Sequence[int]
) -> Iterator[list[int]]:
    """Yield the ids of whole contexts of all texts, ``tokens`` of text at most."""
    span = context - len(begin)
    left = tokens
    for ids in texts:
        for start in range(0, len(ids) - span + 1, span):
            if left < span:
                return
            left -= span
            yield [*begin, *ids[start : start + span]]


def _add_gradients(fit: MetricFit, model: Any, ids: Sequence[int], *, seed: int) -> None:
    """Take in how predictions of the last part of a context depend on what is before it."""
    prefix = round(len(ids) * PREFIX_SHARE)
    kv, gradients = cache_gradients(model, ids, prefix, seed=seed)
    # A token that begins the context is stored exactly; its gradients are those of no other.
    ordinary = slice(1, None)
    for keys, values in gradients:
        if kv.rope is not None:
            keys = before_rope(keys, kv.rope)
        fit.add(keys[:, ordinary], values[:, ordinary])


def before_rope(gradients: Floats, rope: RopeSpec) -> Floats:
    """Turn gradients by cached keys into those by keys before RoPE.

    gradients: (L, T, H, D) of the tokens from position 0. RoPE is linear, so they go through its
    transpose: back by the same angles, times the attention scale.
    """
    turned = np.empty_like(gradients)
    for layer, plane in enumerate(gradients):
        kind = rope.layer_kinds[layer]
        scale = np.float32(rope.attention_scale[kind] ** 2 if kind >= 0 else 1.0)
        turned[layer] = rotate(plane, rope, layer, 0, back=True)
        turned[layer][..., : _rotary_width(rope, kind)] *= scale
    return turned


def _rotary_width(rope: RopeSpec, kind: int) -> int:
    return 2 * len(rope.frequencies[kind]) if kind >= 0 else 0


def token_redundancy(chunks: Sequence[KVChunk]) -> list[dict[str, float]]:
    """Measure how alike neighbouring tokens are, per layer.

    Returns: for each layer the lag-1 correlation of centred keys before and after RoPE and of
        values, and the share of their energy that the mean of a channel holds.
    """
    rows = []
    for layer in range(chunks[0].geometry.layers):
        measured: dict[str, list[tuple[float, float]]] = {"key_before_rope": [], "key": []}
        measured["value"] = []
        for chunk in chunks:
            held = chunk.layers[layer]
            keys = held.keys.astype(np.float32)
            measured["key"].append(_lag_one(keys))
            if chunk.rope is not None:
                position = chunk.first_position + held.begin
                before = rotate(keys, chunk.rope, layer, position, back=True)
                measured["key_before_rope"].append(_lag_one(before))
            measured["value"].append(_lag_one(held.values.astype(np.float32)))
        row: dict[str, float] = {"layer": layer}
        for name, pairs in measured.items():
            if pairs:
                lag, share = np.mean(pairs, axis=0)
                row[f"{name}_lag1"], row[f"{name}_mean_share"] = float(lag), float(share)
        rows.append(row)
    return rows


def _lag_one(plane: np.ndarray) -> tuple[float, float]:
    """Return the lag-1 correlation of centred channels, and the mean's share of the energy."""
    flat = plane.reshape(len(plane), -1).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    energy = float(np.square(centred).sum())
    lag = float((centred[1:] * centred[:-1]).sum()) / max(energy, 1e-30)
    return lag, 1 - energy / max(float(np.square(flat).sum()), 1e-30)
