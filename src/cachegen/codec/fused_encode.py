"""Encoding ``progressive`` groups: what the fused encoder needs to know, and what it found.

The NumPy twin is ``codec.encode_reference``: equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec import passes
from cachegen.codec.basis import (
    GroupBasis,
    ModelBasis,
    group_matrix,
    outlier_tokens,
    planes_of_group,
)
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE, SPARSE
from cachegen.codec.header import Group, SegmentBody
from cachegen.codec.magnitude import (
    balancing_exponent,
    has_plain_squares,
    representable,
    scaled,
)
from cachegen.codec.reference import profile_base
from cachegen.codec.rotary import angles
from cachegen.codec.side import GroupSide
from cachegen.errors import NonFiniteError
from cachegen.native import fused_encode as coded
from cachegen.native.fused_encode import PlaneSource, plane_source, token_order
from cachegen.types import Array

Floats = NDArray[np.float32]

MAX_MAGNITUDE = 2.0**100
_KINDS = {
    coded.RANS: RANS,
    coded.BYTES: BYTES,
    coded.PACKED: PACKED,
    coded.SPARSE: SPARSE,
}


class Encoder(Protocol):
    """Encodes the groups of one chunk."""

    def survey(self) -> tuple[int | None, list[float]]:
        """Return the first group with a value that cannot be coded, or None, and all energies."""

    def encode(self, step: float, passes_: int) -> list[native.EncodedGroup]:
        """Encode all groups; step: the finest one."""


# Of a chunk, its basis and the tokens of every group that are to be stored exactly.
MakeEncoder = Callable[[KVChunk, ModelBasis, Sequence[list[int]]], Encoder]


def encode_chunk(
    chunk: KVChunk,
    basis: ModelBasis,
    *,
    sinks: NDArray[np.int64],
    passes_: int,
    relative_step: float,
    make_encoder: MakeEncoder,
) -> tuple[list[SegmentBody], float, float]:
    """Encode all groups.

    sinks: tokens of the chunk to store exactly. relative_step: the finest step, relative to the
    root mean square of centred values.
    Returns: segments, the finest step, and that root mean square in the unit of distortions: times
        the power of two that the chunk was encoded as. Raises: NonFiniteError.
    """
    exempt = [_held(sinks, chunk, group) for group in basis.groups]
    encoder = make_encoder(chunk, basis, exempt)
    refused, energies = encoder.survey()
    if refused is not None:
        refuse_non_finite(chunk, basis.groups[refused])
    spread, exponent = _spread(chunk, energies), 0
    # A profile's means are of one scale, so there is nothing to gain.
    if not has_plain_squares(spread) and all(known is None for known in basis.bases):
        exponent = balancing_exponent(chunk)
    if exponent:
        encoder = make_encoder(scaled(chunk, exponent), basis, exempt)
        spread = _spread(chunk, encoder.survey()[1])
    step = representable(relative_step * spread if spread > 0 else 1.0, exponent)
    found = encoder.encode(step, passes_)
    if exponent:
        found = [
            group._replace(mean_scale=float(np.float32(np.ldexp(group.mean_scale, -exponent))))
            for group in found
        ]
    segments: list[SegmentBody] = []
    for index, (group, weight) in enumerate(zip(found, basis.error_weights(), strict=True)):
        unit = step * step * weight
        segments += _segments(chunk, basis, index, group, passes_, unit)
    return segments, float(np.ldexp(step, -exponent)), spread


def _spread(chunk: KVChunk, energies: Sequence[float]) -> float:
    """Return the root mean square of centred values."""
    return float(np.sqrt(sum(energies) / max(chunk.value_count, 1)))


def _held(tokens: NDArray[np.int64], chunk: KVChunk, group: Group) -> list[int]:
    """Return the rows of a group that hold some tokens of the chunk."""
    layer = chunk.layers[group.layer]
    return [int(t) - layer.begin for t in tokens if layer.begin <= t < layer.end]


def _segments(
    chunk: KVChunk,
    basis: ModelBasis,
    index: int,
    found: native.EncodedGroup,
    passes_: int,
    unit: float,
) -> list[SegmentBody]:
    group, plain = basis.groups[index], basis.bases[index] is None
    tokens = np.array(found.exempt, np.int64)
    errors = np.array(found.errors).reshape(len(passes.DECAYS), passes_)
    # Relative errors of all passes count the same.
    best = int(np.log(np.maximum(errors, 1e-30)).sum(axis=1).argmin())
    distortions = (errors[best] * unit).tolist()
    exempt = np.concatenate(
        [
            _flat(chunk.layers[layer].plane(is_value=side)[tokens])
            for layer, side in planes_of_group(group)
        ],
        axis=1,
    )
    classes = np.frombuffer(found.classes, np.uint8)
    side = GroupSide(
        tokens,
        exempt,
        np.zeros(0, np.float32),
        np.frombuffer(found.mean_levels, np.int8),
        found.mean_scale,
        classes,
        found.class_offset,
        passes.DECAYS[best],
    )
    body = side.to_bytes(plain=plain)
    segments = [SegmentBody(index, 0, SIDE, body, distortions[0])]
    for number, (kind, coded_body) in enumerate(found.passes):
        bits = passes.DIGIT_BITS if _KINDS[kind] == PACKED else 0
        segments.append(
            SegmentBody(index, number, _KINDS[kind], coded_body.data, distortions[number], bits)
        )
    return segments


def _flat(plane: Array) -> Array:
    """Join heads and dimensions: (T, H, D) to (T, H*D), also for no tokens."""
    return plane.reshape(plane.shape[0], plane.shape[1] * plane.shape[2])


def refuse_non_finite(chunk: KVChunk, group: Group) -> None:
    """Raise NonFiniteError if a plane of the group has a value beyond 2**100, or none at all."""
    for layer, side in planes_of_group(group):
        plane = chunk.layers[layer].plane(is_value=side).astype(np.float32)
        bad = np.argwhere(~(np.abs(plane) <= MAX_MAGNITUDE))
        if len(bad):
            token, head, dim = (int(i) for i in bad[0])
            raise NonFiniteError(
                f"{'V' if side else 'K'} of layer {layer}, token {token}, head {head}, "
                f"dimension {dim}",
                got=plane[token, head, dim],
                expected="a finite magnitude up to 2^100",
                remedy="use the raw codec, which keeps such values, or drop the prompt",
            )


class FusedEncoder:
    """The native encoder of a chunk.

    exempt: tokens of every group to store exactly.
    """

    def __init__(self, chunk: KVChunk, basis: ModelBasis, exempt: Sequence[list[int]]) -> None:
        self._basis = basis
        turns: dict[tuple[int, int, int], Floats] = {}
        self._planes: list[Array] = []  # what sources point at
        sources = []
        self._energies: list[float] = []
        for group, statistics, tokens in zip(basis.groups, basis.bases, exempt, strict=True):
            held = chunk.layers[group.layer].tokens
            if statistics is None:
                planes = [
                    self._plane(chunk, layer, basis.value_weight, turns, is_value=side)
                    for layer, side in planes_of_group(group)
                ]
                channels = sum(plane.heads * plane.dim for plane in planes)
                sources.append(native.EncodeSource(held, channels, planes, None, None, tokens))
                continue
            components, energy = analyse(chunk, group, basis, statistics, tokens)
            order = token_order(held)
            rows = np.zeros((components.shape[1], len(order)), np.float32)
            rows[:, order < held] = components.T[:, order[order < held]]
            families = statistics.families
            sources.append(native.EncodeSource(held, len(rows), (), rows, families, tokens))
            self._energies.append(energy)
        self._encoder = native.ChunkEncoder(sources)

    def survey(self) -> tuple[int | None, list[float]]:
        """Find means, exempt tokens and energies."""
        refused, energies = self._encoder.survey()
        return refused, self._energies or energies

    def encode(self, step: float, passes_: int) -> list[native.EncodedGroup]:
        """Encode all groups; step: the finest one."""
        bases = [
            None if statistics is None else profile_base(statistics, step)
            for statistics in self._basis.bases
        ]
        return self._encoder.encode(
            step,
            passes_,
            base_classes=bases,
            tables=passes.encode_tables(),
            costs=passes.code_costs(passes_),
            centroids=passes.centroid_shares(passes_),
        )

    def _plane(
        self,
        chunk: KVChunk,
        layer: int,
        value_weight: float,
        turns: dict[tuple[int, int, int], Floats],
        *,
        is_value: bool,
    ) -> PlaneSource:
        """Describe a plane. turns: angles by kind, position and tokens, which layers share."""
        held = chunk.layers[layer]
        plane = held.plane(is_value=is_value)
        if plane.shape[2] > 1 and plane.strides[2] != plane.itemsize:
            plane = np.ascontiguousarray(plane)
        self._planes.append(plane)
        kind = -1 if is_value or chunk.rope is None else chunk.rope.layer_kinds[layer]
        turn = None
        if chunk.rope is not None and kind >= 0:
            known = kind, chunk.first_position + held.begin, held.tokens
            if known not in turns:
                order = token_order(held.tokens)
                rows = angles(chunk.rope, *known, back=True)
                turns[known] = np.ascontiguousarray(
                    rows[:, np.where(order < held.tokens, order, 0)].transpose(0, 2, 1)
                )
            turn = turns[known]
        return plane_source(
            plane,
            chunk.geometry.dtype,
            weight=value_weight if is_value else 1.0,
            angles=turn,
            interleaved=chunk.rope is not None and chunk.rope.interleaved,
        )


def analyse(
    chunk: KVChunk, group: Group, basis: ModelBasis, statistics: GroupBasis, exempt: list[int]
) -> tuple[Floats, float]:
    """Return the components of a group, (T, N), and the energy that sets the step.

    A profile's classes are not spoilt by a few wide tokens: coding those costs less than storing
    them. They do not set the step of the others. Raises: NonFiniteError.
    """
    rows = group_matrix(chunk, group, basis.value_weight)
    if rows.size and not float(np.abs(rows).max()) <= MAX_MAGNITUDE:
        refuse_non_finite(chunk, group)
    components = statistics.analyse(rows)
    odd = outlier_tokens(components)
    ordinary = np.ones(len(rows), bool)
    ordinary[odd] = False
    ordinary[exempt] = False
    return components, float(np.square(components[ordinary], dtype=np.float64).sum())
