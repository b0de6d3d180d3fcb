"""Decoding ``progressive`` groups with a profile: components, one matrix product, planes.

Components that are zero throughout a chunk are left out of the product; with one head per block of
the basis (a per-head transform) it is one small product for each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec import passes
from cachegen.codec.basis import GroupBasis, ModelBasis, planes_of_group
from cachegen.codec.fused import bodies, channels_of, constants, plane_targets
from cachegen.codec.header import Group
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference import profile_classes
from cachegen.codec.rotary import angles
from cachegen.codec.side import GroupSide
from cachegen.codec.target import Target
from cachegen.types import RopeSpec

Floats = NDArray[np.float32]

LANES = 32
# Components are picked one by one if fewer than this share of the first ones is used.
DENSE_SHARE = 0.7


@dataclass(frozen=True, eq=False)
class _Heads:
    """A basis of one block for each head: its components and the rows that they make.

    components: (K_h,) indices for each head. rows: (D, K_h) float32 for each head.
    """

    components: tuple[NDArray[np.int64], ...]
    rows: tuple[Floats, ...]


_HEADS: WeakKeyDictionary[GroupBasis, _Heads | None] = WeakKeyDictionary()


def _heads_of(statistics: GroupBasis, dim: int) -> _Heads | None:
    """Return the blocks of a basis that joins no heads, or None."""
    if statistics not in _HEADS:
        basis = statistics.basis
        touches = (basis.reshape(-1, dim, basis.shape[1]) != 0).any(axis=1)
        found = None
        if len(touches) > 1 and touches.sum(axis=0).max() <= 1:
            components = tuple(np.flatnonzero(row) for row in touches)
            rows = tuple(
                np.ascontiguousarray(basis[head * dim : (head + 1) * dim, which])
                for head, which in enumerate(components)
            )
            found = _Heads(components, rows)
        _HEADS[statistics] = found
    return _HEADS[statistics]


def decode_with_profile(
    reader: ObjectReader, target: Target, basis: ModelBasis, *, step: float
) -> None:
    """Decode an object with a profile.

    step: the finest one. Raises: TruncatedError, CorruptError, ChecksumError.
    """
    turns: dict[tuple[int, int, int], Floats] = {}
    for index, (group, statistics) in enumerate(zip(basis.groups, basis.bases, strict=True)):
        assert statistics is not None
        _decode_group(reader, target, index, group, statistics, turns, step, basis.value_weight)


def _decode_group(
    reader: ObjectReader,
    target: Target,
    index: int,
    group: Group,
    statistics: GroupBasis,
    turns: dict[tuple[int, int, int], Floats],
    step: float,
    value_weight: float,
) -> None:
    header = reader.header
    begin, end = header.ranges[group.layer]
    tokens, channels = end - begin, channels_of(header, group)
    side = GroupSide.from_bytes(
        reader.side(index, 0), tokens, channels, header.geometry.dtype, plain=False
    )
    rows = -(-tokens // LANES) * LANES
    values = np.empty((channels, rows), np.float32)
    used = np.zeros(channels, np.uint8)
    classes = profile_classes(statistics, step, side.class_offset)
    present = bodies(reader, index)
    source = native.GroupSource(
        tokens,
        channels,
        present,
        native.Coefficients(classes, values, used),
        constants(header.passes, len(present), side.decay, step, 1.0),
        (),
    )
    native.decode_groups(
        [source],
        dtype=target.dtype,
        stored=header.geometry.dtype,
        passes=header.passes,
        coarse=passes.coarse_tables(),
        refine=passes.refine_tables(),
        rope=None,
    )
    dims = {header.geometry.key_dim, header.geometry.value_dim}
    heads = _heads_of(statistics, dims.pop()) if len(dims) == 1 else None
    picked = np.flatnonzero(used)
    count = int(picked[-1]) + 1 if len(picked) else 0
    dense = len(picked) >= DENSE_SHARE * count
    left = values[:count] if dense else values[picked]
    exempt = np.zeros(tokens, np.uint8)
    exempt[side.exempt_tokens] = 1
    offset = 0
    for (layer, is_value), plane in zip(
        planes_of_group(group), plane_targets(header, group, target), strict=True
    ):
        width = plane.heads * plane.dim
        if heads is not None:
            block = _per_head(values, used, heads, offset // plane.dim, plane.heads)
        else:
            which = statistics.basis[offset : offset + width]
            right = which[:, :count] if dense else which[:, picked]
            block = left.T @ right.T
        turn = None
        if header.rope is not None and plane.rope >= 0:
            turn = _turns(turns, header.rope, plane.rope, plane.first_position, tokens)
        native.finish_plane(
            plane,
            block,
            dtype=target.dtype,
            mean=statistics.mean[offset : offset + width],
            factor=1 / value_weight if is_value else 1.0,
            angles=turn,
            interleaved=header.rope is not None and header.rope.interleaved,
            exempt=exempt,
        )
        target.store_tokens(
            layer,
            side.exempt_tokens,
            side.exempt_rows[:, offset : offset + width],
            is_value=is_value,
        )
        offset += width


def _per_head(
    values: Floats, used: NDArray[np.uint8], heads: _Heads, first: int, count: int
) -> Floats:
    """Return the channels of some heads, (P * 32, count * D)."""
    dim = heads.rows[0].shape[0]
    block = np.empty((values.shape[1], count * dim), np.float32)
    for head in range(count):
        components, rows = heads.components[first + head], heads.rows[first + head]
        kept = np.flatnonzero(used[components])
        out = block[:, head * dim : (head + 1) * dim]
        np.matmul(values[components[kept]].T, rows[:, kept].T, out=out)
    return block


def _turns(
    known: dict[tuple[int, int, int], Floats], spec: RopeSpec, kind: int, position: int, tokens: int
) -> Floats:
    key = (kind, position, tokens)
    if key not in known:
        known[key] = angles(spec, kind, position, tokens, back=False)
    return known[key]
