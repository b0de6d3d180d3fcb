"""What the ``progressive`` codec quantises, outside of it: for benchmarks that try other ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import passes
from cachegen.codec.basis import (
    GroupBasis,
    ModelBasis,
    group_matrix,
    load_basis,
    plain_basis,
    planes_of_group,
)
from cachegen.codec.ladder import CLASSES, descend
from cachegen.codec.progressive import ProgressiveCodec, spread_of, unpack_params
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference import profile_classes
from cachegen.codec.rotary import rotate
from cachegen.codec.side import GroupSide
from cachegen.profile import Profile

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Coefficients:
    """What a chunk's object quantises.

    groups: (T, N) float32 of each group, any unit, zero in exempt rows. exempt: those rows.
    means: (N,) of the groups; zeros with a profile. spread: what steps are relative to.
    chunk, basis: where they come from.
    """

    groups: list[Floats]
    exempt: list[NDArray[np.int64]]
    means: list[Floats]
    spread: float
    chunk: KVChunk
    basis: ModelBasis

    @classmethod
    def of(cls, chunk: KVChunk, profile: Profile | None, data: bytes | None = None) -> Coefficients:
        """Transform a chunk as its object does, with that one's exempt tokens and means.

        data: the object; None encodes one.
        """
        basis = load_basis(profile, chunk.geometry) if profile else plain_basis(chunk)
        if data is None:
            data = ProgressiveCodec(profile=profile).encode(chunk)
        reader = ObjectReader(data)
        groups, exempt, means = [], [], []
        for index, (group, statistics) in enumerate(zip(basis.groups, basis.bases, strict=True)):
            rows = group_matrix(chunk, group, basis.value_weight)
            side = _side(reader, index, rows.shape, statistics)
            values = rows - side.mean if statistics is None else statistics.analyse(rows)
            values[side.exempt_tokens] = 0
            groups.append(values)
            exempt.append(side.exempt_tokens)
            means.append(side.mean)
        return cls(groups, exempt, means, spread_of(reader.header), chunk, basis)

    def errors_left(self, data: bytes) -> list[float]:
        """Return the squared error of each group once all passes of an object's prefix are read.

        The object has the exempt tokens and means of these coefficients.
        """
        reader = ObjectReader(data, allow_partial=True)
        step = unpack_params(reader.header)[0]
        result = []
        for index, (values, statistics) in enumerate(
            zip(self.groups, self.basis.bases, strict=True)
        ):
            side = _side(reader, index, values.shape, statistics)
            classes = side.classes
            if statistics is not None:
                classes = profile_classes(statistics, step, side.class_offset)
            digits = passes.read(reader, index, values.shape, classes)
            scale, decay = classes % CLASSES, side.decay / 64
            found = descend(digits, reader.header.passes, scale, decay) * np.float32(step)
            result.append(float(np.square(found - values, dtype=np.float64).sum()))
        return result

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


def _side(
    reader: ObjectReader, group: int, shape: tuple[int, ...], statistics: GroupBasis | None
) -> GroupSide:
    """Return the side information of a group of (T, N) values."""
    tokens, channels = shape
    dtype = reader.header.geometry.dtype
    plain = statistics is None
    return GroupSide.from_bytes(reader.side(group, 0), tokens, channels, dtype, plain=plain)
