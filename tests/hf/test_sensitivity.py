"""Gradients of predictions by the cache: against finite differences, and what they leave behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import build

from cachegen.bench.calibrate import before_rope
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec.rotary import rotate
from cachegen.errors import GeometryError
from cachegen.hf.inject import forward_suffix, inject
from cachegen.hf.sensitivity import cache_gradients
from cachegen.types import RopeSpec

IDS = list(range(3, 43))
PREFIX = 30


def score(model, kv: KVChunk, targets: torch.Tensor) -> float:
    """Return the summed log-probability of targets after a prefix."""
    with torch.no_grad():
        logits = forward_suffix(model, inject(model, kv), [IDS[PREFIX:]])[0]
        return float(logits.double().log_softmax(-1).gather(1, targets).sum())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_against_finite_differences(kind: str) -> None:
    model = build(kind)
    kv, draws = cache_gradients(model, IDS, PREFIX, draws=1, seed=5)
    keys, values = next(iter(draws))
    assert keys.shape[1] == values.shape[1] == kv.tokens == PREFIX
    with torch.no_grad():
        logits = forward_suffix(model, inject(model, kv), [IDS[PREFIX:]])[0]
        chances = logits.float().softmax(-1)
        targets = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(5))
    rng = np.random.default_rng(0)
    for plane, gradient in enumerate((keys, values)):
        moved, step = [], rng.normal(0, 2e-3, gradient.shape).astype(np.float32)
        for sign in (1, -1):
            layers = [
                LayerKV(
                    layer.keys + (sign * step[index] if plane == 0 else 0),
                    layer.values + (sign * step[index] if plane == 1 else 0),
                )
                for index, layer in enumerate(kv.layers)
            ]
            chunk = KVChunk.from_layers(layers, rope=kv.rope)
            moved.append(score(model, chunk, targets))
        expected = float((gradient * step).sum())
        assert (moved[0] - moved[1]) / 2 == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_draws_differ_and_the_model_is_as_before() -> None:
    model = build("llama")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    first = [keys for keys, _ in cache_gradients(model, IDS, PREFIX, draws=2)[1]]
    again = [keys for keys, _ in cache_gradients(model, IDS, PREFIX, draws=2)[1]]
    assert not np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], again[0])
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("prefix", [0, len(IDS)])
def test_there_are_tokens_on_both_sides(prefix: int) -> None:
    with pytest.raises(GeometryError, match="prefix"):
        cache_gradients(build("llama"), IDS, prefix)


def test_gradients_before_rope_are_those_of_unrotated_keys() -> None:
    """For any change e of keys before RoPE, g . RoPE(e) = before_rope(g) . e."""
    rng = np.random.default_rng(0)
    spec = RopeSpec(((0.5, 0.1),), (1.5,), (0, -1))
    change = rng.normal(0, 1, (2, 6, 1, 6)).astype(np.float32)
    gradient = rng.normal(0, 1, change.shape).astype(np.float32)
    turned = np.stack([rotate(plane, spec, i, 0, back=False) for i, plane in enumerate(change)])
    assert (gradient * turned).sum() == pytest.approx(
        float((before_rope(gradient, spec) * change).sum()), rel=1e-4
    )
