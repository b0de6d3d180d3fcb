"""What the ``progressive`` codec quantises, outside of it: for benchmarks that try other ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec.basis import (
    ModelBasis,
    group_matrix,
    load_basis,
    outlier_tokens,
    plain_basis,
    planes_of_group,
)
from cachegen.codec.rotary import rotate
from cachegen.profile import Profile

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coefficients:
    """What a chunk's object quantises.

    groups: (T, N) float32 of each group, any unit, zero in exempt rows. exempt: those rows.
    means: (N,) of the groups; zeros with a profile. chunk, basis: where they come from.
    """

    groups: list[Floats]
    exempt: list[NDArray[np.int64]]
    means: list[Floats]
    chunk: KVChunk
    basis: ModelBasis

    @classmethod
    def of(cls, chunk: KVChunk, profile: Profile | None, *, sinks: int = 1) -> Coefficients:
        """Transform a chunk; the same tokens are exempt as in an object of it."""
        basis = load_basis(profile, chunk.geometry) if profile else plain_basis(chunk)
        first = np.arange(max(0, sinks - chunk.first_position))
        groups, exempt, means = [], [], []
        for group, statistics in zip(basis.groups, basis.bases, strict=True):
            rows = group_matrix(chunk, group, basis.value_weight)
            tokens = np.union1d(outlier_tokens(rows), first).astype(np.int64)
            mean = np.zeros(rows.shape[1], np.float32)
            if statistics is None:
                mean = np.delete(rows, tokens, axis=0).mean(axis=0)
                values = rows - mean
            else:
                values = statistics.analyse(rows)
            values[tokens] = 0
            groups.append(values.astype(np.float32))
            exempt.append(tokens)
            means.append(mean)
        return cls(groups, exempt, means, chunk, basis)

    @property
    def spread(self) -> float:
        """Root mean square of all coefficients; steps are relative to it."""
        energy = sum(float(np.square(g, dtype=np.float64).sum()) for g in self.groups)
        return float(np.sqrt(energy / sum(g.size for g in self.groups)))

    def rebuild(self, groups: list[Floats]) -> KVChunk:
        """Return the chunk that other values of the coefficients stand for."""
        planes: dict[tuple[int, bool], NDArray[np.generic]] = {}
        pairs = zip(self.basis.groups, self.basis.bases, strict=True)
        for index, (group, statistics) in enumerate(pairs):
            values = groups[index] + self.means[index]
            if statistics is not None:
                values = values @ statistics.basis.T + statistics.mean
            offset = 0
            for layer, is_value in planes_of_group(group):
                held = self.chunk.layers[layer].plane(is_value=is_value)
                width = held.shape[1] * held.shape[2]
                part = values[:, offset : offset + width].reshape(held.shape)
                if is_value:
                    part = part / np.float32(self.basis.value_weight)
                elif self.chunk.rope is not None:
                    start = self.chunk.first_position
                    part = rotate(part, self.chunk.rope, layer, start, back=False)
                plane = part.astype(held.dtype)
                plane[self.exempt[index]] = held[self.exempt[index]]
                planes[layer, is_value] = plane
                offset += width
        layers = [
            LayerKV(planes[layer, False], planes[layer, True])
            for layer in range(self.chunk.geometry.layers)
        ]
        return KVChunk.from_layers(
            layers, first_position=self.chunk.first_position, rope=self.chunk.rope
        )
