"""Fitting a profile for the ``progressive`` codec: groups, means, bases, deviations, families."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec.basis import (
    FITTED_VALUE_WEIGHT,
    KIND,
    MEASURED_VALUE_WEIGHT,
    GroupBasis,
    group_matrix,
    make_group_basis,
    outlier_tokens,
    planes_of_group,
)
from cachegen.codec.header import Group, plane_groups
from cachegen.codec.metric import Metric, weigh
from cachegen.errors import ConfigError, GeometryError
from cachegen.profile import Profile
from cachegen.types import Array, Geometry

Floats = NDArray[np.float32]

MAX_GROUP_CHANNELS = 2048
GROUP_LAYERS = (1, 2, 4, 8)
BASIS_LEVELS = 127
# Larger values, infinities and NaN would spoil a profile: squares of these fit a float32.
MAX_CALIBRATED = 1e6


def choose_groups(
    geometry: Geometry,
    max_channels: int = MAX_GROUP_CHANNELS,
    *,
    layers: int | None = None,
    joint: bool = True,
) -> list[Group]:
    """Choose which planes one transform joins.

    max_channels: of a group; decoding costs as many multiplications for each value.
    layers: how many to join; None takes as many of 1, 2, 4 and 8 as fit and leave two groups, for
        an object is cut between groups; single planes where not even a layer fits.
    joint: K and V together, else apart.
    Raises: ConfigError for other numbers of layers.
    """
    if layers is not None and layers not in GROUP_LAYERS:
        raise ConfigError("layers of a group", got=layers, expected="1, 2, 4 or 8")
    dims = geometry.key_dim + geometry.value_dim
    width = geometry.kv_heads * (dims if joint else max(geometry.key_dim, geometry.value_dim))
    if layers is None:
        fitting = [
            count
            for count in GROUP_LAYERS
            if count * width <= max_channels and 2 * count <= max(geometry.layers, 2)
        ]
        if not fitting:
            return list(plane_groups(geometry.layers))
        layers = fitting[-1]
    return [
        Group(layer, min(layers, geometry.layers - layer), planes)
        for layer in range(0, geometry.layers, layers)
        for planes in ((3,) if joint else (1, 2))
    ]


def _ordinary(rows: Floats) -> Floats:
    """Return the rows that are not outliers: the others are stored exactly anyway."""
    return np.delete(rows, outlier_tokens(rows), axis=0)


class BasisFit:
    """Accumulates chunks into a profile: sums and products, and a few chunks as a sample.

    geometry, groups: as in ``fit_basis``. Memory: N * N float32 for each group of N channels, and
    the sample.
    """

    SAMPLE_CHUNKS = 8

    def __init__(self, geometry: Geometry, *, groups: Sequence[Group] | None = None) -> None:
        self.geometry = geometry
        self.groups = list(groups) if groups is not None else choose_groups(geometry)
        self.tokens = 0
        self._before_rope: bool | None = None
        self._counts: list[int] = []
        self._sums: list[NDArray[np.float64]] = []
        self._products: list[Floats] = []
        self._sample: list[KVChunk] = []

    def accepts(self, chunk: KVChunk) -> bool:
        """Return whether a chunk is of the kind of the others: geometry, uniform, RoPE, finite."""
        same = _shape(chunk.geometry) == _shape(self.geometry) and chunk.is_uniform
        if not same or self._before_rope not in (None, chunk.rope is not None):
            return False
        return all(
            bool((np.abs(plane.astype(np.float32)) <= MAX_CALIBRATED).all())
            for layer in chunk.layers
            for plane in (layer.keys, layer.values)
        )

    def add(self, chunk: KVChunk) -> None:
        """Take in a chunk. Raises: GeometryError for one that ``accepts`` refuses."""
        if not self.accepts(chunk):
            raise GeometryError(
                "calibration chunk",
                got=f"{chunk.geometry}, or fewer tokens in a layer, other RoPE or extreme values",
                expected=f"{self.geometry}, and chunks of one kind",
            )
        self._before_rope = chunk.rope is not None
        for index, group in enumerate(self.groups):
            rows = _ordinary(group_matrix(chunk, group, 1.0))
            if index == len(self._sums):
                self._counts.append(0)
                self._sums.append(np.zeros(rows.shape[1]))
                self._products.append(np.zeros((rows.shape[1], rows.shape[1]), np.float32))
            self._counts[index] += len(rows)
            self._sums[index] += rows.sum(axis=0, dtype=np.float64)
            self._products[index] += rows.T @ rows
        self.tokens += chunk.tokens
        if len(self._sample) < self.SAMPLE_CHUNKS:
            self._sample.append(chunk)

    def finish(
        self,
        *,
        model_name: str = "",
        metric: Metric | None = None,
        components: float = 1.0,
    ) -> Profile:
        """Return the profile of all chunks so far.

        metric: what errors cost; None weighs V by 1.5 and K by 1. components: share of each group's
        components to keep. Raises: GeometryError if there are no chunks; ConfigError.
        """
        if not self.tokens:
            raise GeometryError("calibration chunks", got=0, expected="at least one")
        if not 0 < components <= 1:
            raise ConfigError("components", got=components, expected="above 0, at most 1")
        arrays: dict[str, Array] = {}
        if metric is not None:
            # Encoder and decoder use the weights as they are stored.
            halves = (metric.keys.astype(np.float16), metric.values.astype(np.float16))
            arrays |= dict(zip(("metric.keys", "metric.values"), halves, strict=True))
            weights = Metric.from_arrays(*halves, self.geometry)
            value_weight = MEASURED_VALUE_WEIGHT
        else:
            weights, value_weight = Metric.plain(self.geometry), FITTED_VALUE_WEIGHT
        for index, group in enumerate(self.groups):
            blocks = weights.blocks(planes_of_group(group))
            for name, array in self._fit_group(index, blocks, value_weight, components).items():
                arrays[f"group{index}.{name}"] = array
        meta = {
            "kind": KIND,
            "geometry": _shape(self.geometry),
            "groups": [[group.layer, group.layers, group.planes] for group in self.groups],
            "metric": "plain" if metric is None else "gradients",
            "calibration_tokens": self.tokens,
            "before_rope": bool(self._before_rope),
        }
        return Profile(model_name, arrays, meta)

    def _fit_group(
        self, index: int, blocks: Sequence[Floats], value_weight: float, components: float
    ) -> dict[str, Array]:
        group = self.groups[index]
        scales = np.concatenate(
            [
                np.full(block.shape[0] * block.shape[1], value_weight if is_value else 1.0)
                for (_, is_value), block in zip(planes_of_group(group), blocks, strict=True)
            ]
        )
        count = max(self._counts[index], 1)
        mean = self._sums[index] / count
        covariance = self._products[index].astype(np.float64) / count
        covariance = (covariance - np.outer(mean, mean)) * np.outer(scales, scales)
        mean = mean * scales
        # Blocks are symmetric: weighing rows, then columns, is B C B.
        weighted = weigh(weigh(covariance, blocks).T, blocks)
        _, vectors = np.linalg.eigh((weighted + weighted.T) / 2)
        kept = max(1, round(components * len(mean)))
        levels, scale = _rounded(vectors[:, ::-1][:, :kept])
        basis = make_group_basis(
            mean.astype(np.float32),
            levels * scale,
            np.ones(len(mean), np.float32),
            np.zeros(len(mean), np.uint8),
            blocks,
        )
        rows = [_ordinary(group_matrix(chunk, group, value_weight)) for chunk in self._sample]
        sample = basis.analyse(np.concatenate(rows))
        return {
            "mean": basis.mean,
            "basis": levels,
            "scale": scale,
            "deviation": _deviations(basis, covariance),
            "families": _families(sample),
        }


def _deviations(basis: GroupBasis, covariance: NDArray[np.float64]) -> Floats:
    """Return the standard deviation of each component, (N,)."""
    forward = basis.analyse(np.eye(len(covariance), dtype=np.float32) + basis.mean)
    variance = np.einsum("ij,ij->j", forward, covariance.astype(np.float32) @ forward)
    deviation: Floats = np.sqrt(np.maximum(variance, 1e-24)).astype(np.float32)
    return deviation


def _rounded(vectors: NDArray[np.float64]) -> tuple[NDArray[np.int8], Floats]:
    """Round columns to 8 bits, each with a scale of its own."""
    scale = (np.abs(vectors).max(axis=0) / BASIS_LEVELS).astype(np.float32)
    return np.rint(vectors / scale).astype(np.int8), scale


def _shape(geometry: Geometry) -> list[int]:
    return [geometry.layers, geometry.kv_heads, geometry.key_dim, geometry.value_dim]


def fit_basis(
    chunks: Iterable[KVChunk],
    *,
    model_name: str = "",
    groups: Sequence[Group] | None = None,
    metric: Metric | None = None,
) -> Profile:
    """Fit a profile of means, bases and deviations to calibration chunks.

    chunks: uniform, of one geometry, with RoPE known if the model has it; 16K tokens or more
        altogether for a good one. groups: None joins as ``choose_groups``. metric: what errors
        cost, see ``BasisFit.finish``.
    Returns: a profile; bases in 8 bits. Raises: GeometryError.
    """
    fit: BasisFit | None = None
    for chunk in chunks:
        if fit is None:
            fit = BasisFit(chunk.geometry, groups=groups)
        fit.add(chunk)
    if fit is None:
        raise GeometryError("calibration chunks", got=0, expected="at least one")
    return fit.finish(model_name=model_name, metric=metric)


def _families(components: Floats) -> NDArray[np.uint8]:
    """Choose the shape of each component's distribution by E|x| / sigma of the three families."""
    spread = np.sqrt(np.mean(np.square(components, dtype=np.float64), axis=0))
    ratio = np.abs(components).mean(axis=0) / np.maximum(spread, 1e-12)
    # E|x| / sigma: 0.634 for shape 0.7, 0.707 for Laplace, 0.798 for Gauss.
    return np.where(ratio < 0.671, 0, np.where(ratio < 0.753, 1, 2)).astype(np.uint8)
