"""What an error costs: for every KV head a matrix that weighs the error of its K and of its V.

The KL divergence that a small error ``e`` of a cached vector causes is ``e^T M e / 2``, ``M`` being
the Fisher information: the second moment of the gradients of log-probabilities by that vector. In
the coordinates ``M^(1/2) x`` all errors cost the same, so that one step size there is right for
every head and layer. Queries, attention weights and the output projection are all in ``M``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import GeometryError, ProfileError
from cachegen.types import Array, Geometry

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Gradients are clipped at this percentile of their norms: a few tokens have most of the energy.
CLIP_PERCENTILE = 97.0
# Added to each matrix, relative to its mean eigenvalue: directions that the calibration text did
# not use may matter for another one.
RIDGE = 0.3
# No head weighs less than this share of the heaviest one.
FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Metric:
    """Square roots of the weights of a model's heads, symmetric and positive definite.

    keys: (L, H, key_dim, key_dim) float32, of keys before RoPE. values: (L, H, value_dim,
    value_dim) float32.
    """

    keys: Floats
    values: Floats

    @classmethod
    def plain(cls, geometry: Geometry) -> Metric:
        """Weigh every channel by 1, after V has been multiplied by its own weight."""
        planes = []
        for dim in (geometry.key_dim, geometry.value_dim):
            eye = np.eye(dim, dtype=np.float32)
            shape = (geometry.layers, geometry.kv_heads, dim, dim)
            planes.append(np.broadcast_to(eye, shape))
        return cls(*planes)

    @classmethod
    def from_arrays(cls, keys: Array | None, values: Array | None, geometry: Geometry) -> Metric:
        """Check what a profile holds. Raises: ProfileError."""
        checked = []
        dims = ("keys", keys, geometry.key_dim), ("values", values, geometry.value_dim)
        for name, array, dim in dims:
            shape = (geometry.layers, geometry.kv_heads, dim, dim)
            if array is None or array.shape != shape:
                raise ProfileError(
                    f"metric of {name}",
                    got=None if array is None else array.shape,
                    expected=shape,
                    remedy="the profile is damaged: calibrate again",
                )
            wide = np.asarray(array, np.float32)
            if not np.isfinite(wide).all() or np.linalg.eigvalsh(wide).min() <= 0:
                raise ProfileError(f"metric of {name}", got="out of range", expected="positive")
            checked.append(wide)
        return cls(*checked)

    def blocks(self, planes: Sequence[tuple[int, bool]]) -> list[Floats]:
        """Return the (H, D, D) matrices of planes, given as (layer, is_value)."""
        return [(self.values if is_value else self.keys)[layer] for layer, is_value in planes]


def weigh(rows: Array, blocks: Sequence[Array]) -> Array:
    """Multiply rows (..., N) by a block-diagonal matrix, given as blocks (H, D, D) of its planes.

    Returns: (..., N) in the wider dtype of both.
    """
    parts = []
    offset = 0
    for block in blocks:
        heads, dim, _ = block.shape
        part = rows[..., offset : offset + heads * dim]
        split = part.reshape(*part.shape[:-1], heads, 1, dim)
        parts.append((split @ block).reshape(part.shape))
        offset += heads * dim
    return np.concatenate(parts, axis=-1)


class MetricFit:
    """Accumulates gradients into a metric. geometry: of the model."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.count = 0
        heads = (geometry.layers, geometry.kv_heads)
        self._moments: list[Doubles] = [
            np.zeros((*heads, dim, dim)) for dim in (geometry.key_dim, geometry.value_dim)
        ]

    def add(self, keys: Floats, values: Floats) -> None:
        """Take in the gradients of a context.

        keys: (L, T, H, key_dim), by keys before RoPE; values: (L, T, H, value_dim). Gradients of a
        token beyond ``CLIP_PERCENTILE`` of the context are scaled down to it.
        Raises: GeometryError for another shape or values that are not finite.
        """
        layers, heads = self.geometry.layers, self.geometry.kv_heads
        for plane, dim in ((keys, self.geometry.key_dim), (values, self.geometry.value_dim)):
            if plane.ndim != 4 or plane.shape[::2] != (layers, heads) or plane.shape[3] != dim:
                raise GeometryError(
                    "gradients", got=plane.shape, expected=(layers, "T", heads, dim)
                )
            if not np.isfinite(plane).all():
                raise GeometryError("gradients", got="NaN or Inf", expected="finite numbers")
        energy = sum(np.square(p, dtype=np.float64).sum(axis=(0, 2, 3)) for p in (keys, values))
        norms = np.sqrt(energy)
        limit = float(np.percentile(norms, CLIP_PERCENTILE))
        shrink = (limit / np.maximum(norms, max(limit, 1e-30))).astype(np.float32)
        for moment, plane in zip(self._moments, (keys, values), strict=True):
            clipped = (plane * shrink[:, None, None]).transpose(0, 2, 3, 1)
            moment += clipped @ clipped.swapaxes(-1, -2)
        self.count += len(norms)

    def finish(self) -> Metric | None:
        """Return the metric of all gradients so far, or None if they are all zero."""
        moments = [moment / max(self.count, 1) for moment in self._moments]
        scales = [np.trace(m, axis1=-2, axis2=-1) / m.shape[-1] for m in moments]
        heaviest = max(float(scale.max()) for scale in scales)
        if not heaviest > 0:
            return None
        roots = []
        for moment, scale in zip(moments, scales, strict=True):
            floored = np.maximum(scale, FLOOR * heaviest)[..., None, None]
            whole = (moment + RIDGE * floored * np.eye(moment.shape[-1])) / heaviest
            weights, vectors = np.linalg.eigh(whole)
            root = (vectors * np.sqrt(weights)[..., None, :]) @ vectors.swapaxes(-1, -2)
            roots.append(root.astype(np.float32))
        return Metric(*roots)
