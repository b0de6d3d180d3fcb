"""Synthetic KV for speed measurements: channels spread and shaped like those of a trained model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec.rotary import rotate
from cachegen.errors import ConfigError
from cachegen.types import RopeSpec


@dataclass(frozen=True)
class SpeedGeometry:
    """A model's KV. theta: RoPE base, or None for a model without RoPE."""

    name: str
    layers: int
    kv_heads: int
    dim: int
    theta: float | None

    @property
    def rope(self) -> RopeSpec | None:
        """The RoPE of all layers."""
        if self.theta is None:
            return None
        half = self.dim // 2
        frequencies = tuple(float(self.theta ** (-i / half)) for i in range(half))
        return RopeSpec((frequencies,), (1.0,), (0,) * self.layers)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        SpeedGeometry("llama-3.1-8b", 32, 8, 128, 500_000.0),
        SpeedGeometry("qwen2.5-0.5b", 24, 2, 64, 1_000_000.0),
        SpeedGeometry("opt-125m", 12, 12, 64, None),
        SpeedGeometry("reference", 4, 2, 64, 10_000.0),
    )
}


def geometry_of(name: str) -> SpeedGeometry:
    """Return a geometry by name. Raises: ConfigError."""
    if name not in GEOMETRIES:
        raise ConfigError("geometry", got=name, expected=f"one of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


def synthetic_chunk(geometry: SpeedGeometry, *, tokens: int = 256, seed: int = 0) -> KVChunk:
    """Draw a bfloat16 chunk whose channels have the measured spreads, means and shapes.

    Each channel takes the statistics of a random channel of the reference model; its values are
    independent draws of a generalised normal density with the measured mean magnitude.
    """
    file = resources.files("cachegen.bench") / "speed_statistics.json"
    statistics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    heads, dim = geometry.kv_heads, geometry.dim
    kv = np.empty((geometry.layers, 2, tokens, heads, dim), ml_dtypes.bfloat16)
    spec = geometry.rope
    for layer in range(geometry.layers):
        for side, name in enumerate("KV"):
            table = np.asarray(statistics[name])
            chosen = table[rng.integers(0, len(table), heads * dim)]
            rows = _draw(rng, tokens, chosen[:, 2]) * chosen[:, 0] + chosen[:, 1]
            plane = rows.reshape(tokens, heads, dim).astype(np.float32)
            if side == 0 and spec is not None:
                plane = rotate(plane, spec, layer, 0, back=False)
            kv[layer, side] = plane.astype(ml_dtypes.bfloat16)
    return KVChunk.from_array(kv, rope=spec)


def _draw(
    rng: np.random.Generator, tokens: int, ratios: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Draw (T, C) of unit variance, the mean magnitude of each channel being its ratio."""
    # E|x| / sigma of a Gauss is 0.798 and of a Laplace density 0.707: mix their magnitudes.
    share = np.clip((ratios - 0.7071) / (0.7979 - 0.7071), 0, 1)
    gauss = rng.standard_normal((tokens, len(ratios)))
    laplace = rng.laplace(scale=np.sqrt(0.5), size=(tokens, len(ratios)))
    return np.where(rng.random((tokens, len(ratios))) < share, gauss, laplace)
