"""How much what a model says depends on its cached K and V: gradients of its own predictions.

The model reads a prefix; what follows is predicted from the cached K and V of the prefix, as after
a cache hit. Tokens are drawn from those predictions, and the gradient of their log-probability by
every cached vector is returned. The second moment of such gradients is the Fisher information: the
KL divergence that small errors of the cache cause. Any model that can be injected and has gradients
will do; nothing depends on its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.hf.capture import capture
from cachegen.hf.inject import inject

Floats = NDArray[np.float32]

DEFAULT_DRAWS = 4


def cache_gradients(
    model: Any,
    token_ids: Sequence[int],
    prefix_tokens: int,
    *,
    draws: int = DEFAULT_DRAWS,
    seed: int = 0,
) -> tuple[KVChunk, Iterator[tuple[Floats, Floats]]]:
    """Differentiate predictions of the tokens after a prefix by the K and V of the prefix.

    token_ids: prefix and what follows it. prefix_tokens: how many of them are the prefix.
    draws: how often targets are drawn anew. seed: of the draws.
    Returns: the KV of the prefix, in the model's dtype, and for each draw the gradients by keys and
        by values, (L, T, H, D) float32 each; keys as they are cached, after RoPE.
    Raises: GeometryError unless there are tokens before and after the prefix's end;
        UnsupportedModelError for a model without gradients, or with layers that keep part of it.
    """
    if not 0 < prefix_tokens < len(token_ids):
        raise GeometryError(
            "prefix", got=f"{prefix_tokens} of {len(token_ids)} tokens", expected="fewer than all"
        )
    kv = capture(model, [list(token_ids[:prefix_tokens])])[0].kv
    if not kv.is_uniform:
        raise UnsupportedModelError(
            "layers", got="sliding windows shorter than the prefix", expected="all tokens"
        )
    return kv, _draw(model, kv, list(token_ids[prefix_tokens:]), draws, seed)


def _draw(
    model: Any, kv: KVChunk, following: list[int], draws: int, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    cache: Any = inject(model, kv)
    leaves: list[torch.Tensor] = [
        tensor for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.enable_grad():
            ids = torch.tensor([following], device=model.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            predicted = torch.log_softmax(output.logits[0].float(), dim=-1)
        chances = predicted.detach().exp().cpu()
        for draw in range(draws):
            targets = torch.multinomial(chances, 1, generator=generator)
            with torch.enable_grad():
                score = predicted.gather(1, targets.to(predicted.device)).sum()
            gradients = torch.autograd.grad(score, leaves, retain_graph=draw < draws - 1)
            yield _stack(gradients[::2]), _stack(gradients[1::2])
    except RuntimeError as error:
        raise UnsupportedModelError(
            "model",
            got=f"no gradients ({str(error).splitlines()[0]})",
            expected="gradients by cached K and V",
            remedy="load it in float32 or bfloat16, or calibrate without sensitivity",
        ) from error
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _stack(gradients: Sequence[torch.Tensor]) -> Floats:
    """Join the (1, H, T, D) of every layer to (L, T, H, D) float32."""
    planes = [g[0].transpose(0, 1).to("cpu", torch.float32) for g in gradients]
    joined: Floats = torch.stack(planes).numpy()
    return joined
