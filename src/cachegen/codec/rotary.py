"""Undoing and redoing RoPE on keys, so that they are coded as the model made them.

Before RoPE a key channel keeps its mean over tokens; after it the mean turns with the position.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cachegen.types import Array, RopeSpec

Floats = NDArray[np.float32]


def rotate(keys: Array, spec: RopeSpec, layer: int, first_position: int, *, back: bool) -> Floats:
    """Apply a layer's RoPE to keys, or with ``back`` undo it.

    keys: (T, H, D) of consecutive tokens from first_position. Channels beyond the rotary dimension
    (partial RoPE) and layers without RoPE stay as they are.
    Returns: (T, H, D) float32, new memory.
    """
    out = np.array(keys, np.float32)
    kind = spec.layer_kinds[layer]
    if kind < 0:
        return out
    cos, sin = angles(spec, kind, first_position, len(out), back=back)[:, :, None, :]
    half = cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if spec.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def angles(spec: RopeSpec, kind: int, first_position: int, tokens: int, *, back: bool) -> Floats:
    """Return cos and sin of every token times the attention scale, (2, T, D_rot / 2) float32.

    kind: of layers, an index of the spec's. back: to undo the rotation.
    """
    frequencies = np.asarray(spec.frequencies[kind], np.float32)
    scale = np.float32(spec.attention_scale[kind])
    positions = np.arange(first_position, first_position + tokens, dtype=np.float32)
    # Angles are float32 products, as models compute them; cos and sin of them are exact enough.
    turns = (positions[:, None] * frequencies).astype(np.float64)
    factor = 1 / scale if back else scale
    return np.stack([np.cos(turns) * factor, np.sin(turns) * (-factor if back else factor)]).astype(
        np.float32
    )
