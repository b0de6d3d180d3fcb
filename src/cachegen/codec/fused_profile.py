"""Decoding ``progressive`` groups with a profile: components, one matrix product, planes.

Where the extension has a kernel for the product (``native.can_transform``), one call does it all;
elsewhere NumPy multiplies. Components that are zero throughout a chunk are left out of the product;
with one head per block of the basis (a per-head transform) it is one small product for each head.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec import passes
from cachegen.codec.basis import GroupBasis, ModelBasis, planes_of_group
from cachegen.codec.fused import bodies, channels_of, constants, plane_targets
from cachegen.codec.header import Group, Header
from cachegen.codec.ladder import CLASSES, class_edges
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
# Components decoded at a time, 2 MiB; a larger group goes alone.
BATCH_FLOATS = 1 << 19


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


@dataclass(frozen=True)
class _Group:
    """A group on its way: where its components are decoded to, and what follows them.

    values: (N, P * 32) float32. used: (N,) uint8.
    """

    group: Group
    statistics: GroupBasis
    side: GroupSide
    values: Floats
    used: NDArray[np.uint8]
    source: native.GroupSource


class _Memory:
    """Memory for components and products that groups take turns in: fresh pages are slow."""

    def __init__(self) -> None:
        self._floats: dict[str, Floats] = {}

    def matrix(self, name: str, begin: int, rows: int, columns: int) -> Floats:
        """Return (rows, columns) float32 from a place on, values undefined."""
        end = begin + rows * columns
        if name not in self._floats or len(self._floats[name]) < end:
            # What was handed out before stays alive with those who hold it.
            self._floats[name] = np.empty(max(end, BATCH_FLOATS), np.float32)
        return self._floats[name][begin:end].reshape(rows, columns)


class _Classes:
    """Classes of the components of all groups, found by one search for any step.

    ``profile_classes`` says the same for one group.
    """

    def __init__(self, bases: Sequence[GroupBasis]) -> None:
        deviations = np.concatenate([statistics.deviation for statistics in bases])
        families = np.concatenate([statistics.families for statistics in bases])
        sizes = [len(statistics.deviation) for statistics in bases]
        self._ends = np.cumsum(sizes).tolist()
        self._begins = [0, *self._ends[:-1]]
        self._order = np.argsort(deviations, kind="stable")
        self._deviations = deviations[self._order].astype(np.float64)
        self._families = families * np.uint8(CLASSES)

    def of(self, step: float, offsets: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return (N,) uint8 for each group. offsets: of each, what its classes are shifted by."""
        # Dividing keeps the order, so that the few edges can be looked up among the components.
        steps = self._deviations / np.float64(np.float32(step))
        bounds = steps.searchsorted(class_edges(), side="left")
        counts = np.empty(CLASSES, np.int64)
        counts[0], counts[-1] = bounds[0], len(steps) - bounds[-1]
        np.subtract(bounds[1:], bounds[:-1], out=counts[1:-1])
        classes = np.empty(len(steps), np.uint8)
        classes[self._order] = _CLASS_NUMBERS.repeat(counts)
        parts = []
        for begin, end, offset in zip(self._begins, self._ends, offsets, strict=True):
            part = classes[begin:end]
            if offset:
                part = _SHIFTED[128 + offset].take(part)
            parts.append(part + self._families[begin:end])
        return parts


_CLASS_NUMBERS = np.arange(CLASSES, dtype=np.uint8)
# Row 128 + offset: what every class becomes.
_SHIFTED = np.clip(np.arange(-128, 128)[:, None] + np.arange(CLASSES), 0, CLASSES - 1).astype(
    np.uint8
)


@dataclass(frozen=True, eq=False)
class _Ready:
    """What decoding needs of a model's bases, made once."""

    classes: _Classes
    packed: tuple[native.PackedBasis, ...]


_READY: WeakKeyDictionary[GroupBasis, _Ready] = WeakKeyDictionary()


def _ready(header: Header, basis: ModelBasis) -> _Ready:
    bases = [statistics for statistics in basis.bases if statistics is not None]
    # A ModelBasis has its groups to itself, so that the first one stands for it.
    if bases[0] not in _READY:
        packed = []
        for group, statistics in zip(basis.groups, bases, strict=True):
            dims = [
                header.geometry.plane_dim(is_value=is_value)
                for _, is_value in planes_of_group(group)
                for _ in range(header.geometry.kv_heads)
            ]
            packed.append(native.PackedBasis(statistics.basis, statistics.mean, dims=dims))
        _READY[bases[0]] = _Ready(_Classes(bases), tuple(packed))
    return _READY[bases[0]]


def decode_with_profile(
    reader: ObjectReader, target: Target, basis: ModelBasis, *, step: float
) -> None:
    """Decode an object with a profile.

    step: the finest one. Raises: TruncatedError, CorruptError, ChecksumError.
    """
    if native.can_transform(target.dtype):
        _decode_at_once(reader, target, basis, step)
    else:
        _decode_with_products(reader, target, basis, step)


def _decode_at_once(reader: ObjectReader, target: Target, basis: ModelBasis, step: float) -> None:
    header = reader.header
    ready = _ready(header, basis)
    sides = [reader.side(index, 0) for index in range(len(basis.groups))]
    # Decay and shift; the extension checks all of it.
    heads = [struct.unpack_from("<Bb", side) if len(side) >= 2 else (0, 0) for side in sides]
    classes = ready.classes.of(step, [offset for _, offset in heads])
    sources = []
    for index, (group, statistics) in enumerate(zip(basis.groups, basis.bases, strict=True)):
        assert statistics is not None
        begin, end = header.ranges[group.layer]
        present = bodies(reader, index)
        decay, _ = heads[index]
        sources.append(
            native.TransformSource(
                end - begin,
                present,
                np.frombuffer(sides[index], np.uint8),
                ready.packed[index],
                classes[index],
                constants(header.passes, len(present), decay, step, basis.value_weight),
                plane_targets(header, group, target),
            )
        )
    native.decode_transformed(
        sources,
        dtype=target.dtype,
        stored=header.geometry.dtype,
        passes=header.passes,
        coarse=passes.coarse_tables(),
        refine=passes.refine_tables(),
        rope=header.rope,
    )


def _decode_with_products(
    reader: ObjectReader, target: Target, basis: ModelBasis, step: float
) -> None:
    """Multiply by NumPy.

    Groups are decoded several at a time, as far as their components fit ``BATCH_FLOATS``: a small
    one alone has too few streams to decode side by side.
    """
    turns: dict[tuple[int, int, int], Floats] = {}
    memory = _Memory()
    batch: list[_Group] = []
    floats = 0
    for index, (group, statistics) in enumerate(zip(basis.groups, basis.bases, strict=True)):
        assert statistics is not None
        begin, end = reader.header.ranges[group.layer]
        size = channels_of(reader.header, group) * _padded(end - begin)
        if batch and floats + size > BATCH_FLOATS:
            _finish_batch(reader, target, batch, memory, turns, basis.value_weight)
            batch, floats = [], 0
        batch.append(_open_group(reader, index, group, statistics, memory, floats, step))
        floats += size
    _finish_batch(reader, target, batch, memory, turns, basis.value_weight)


def _padded(tokens: int) -> int:
    return -(-tokens // LANES) * LANES


def _open_group(
    reader: ObjectReader,
    index: int,
    group: Group,
    statistics: GroupBasis,
    memory: _Memory,
    place: int,
    step: float,
) -> _Group:
    """Read what precedes the components of a group. place: of its components in the memory."""
    header = reader.header
    begin, end = header.ranges[group.layer]
    tokens, channels = end - begin, channels_of(header, group)
    side = GroupSide.from_bytes(
        reader.side(index, 0), tokens, channels, header.geometry.dtype, plain=False
    )
    values = memory.matrix("components", place, channels, _padded(tokens))
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
    return _Group(group, statistics, side, values, used, source)


def _finish_batch(
    reader: ObjectReader,
    target: Target,
    batch: list[_Group],
    memory: _Memory,
    turns: dict[tuple[int, int, int], Floats],
    value_weight: float,
) -> None:
    header = reader.header
    native.decode_groups(
        [entry.source for entry in batch],
        dtype=target.dtype,
        stored=header.geometry.dtype,
        passes=header.passes,
        coarse=passes.coarse_tables(),
        refine=passes.refine_tables(),
        rope=None,
    )
    for entry in batch:
        _store_group(header, target, entry, memory, turns, value_weight)


def _store_group(
    header: Header,
    target: Target,
    entry: _Group,
    memory: _Memory,
    turns: dict[tuple[int, int, int], Floats],
    value_weight: float,
) -> None:
    """Turn the components of a group into planes and store them."""
    statistics, side, values = entry.statistics, entry.side, entry.values
    tokens = entry.source.tokens
    dims = {header.geometry.key_dim, header.geometry.value_dim}
    heads = _heads_of(statistics, dims.pop()) if len(dims) == 1 else None
    picked = np.flatnonzero(entry.used)
    count = int(picked[-1]) + 1 if len(picked) else 0
    dense = len(picked) >= DENSE_SHARE * count
    left = values[:count] if dense else values[picked]
    exempt = np.zeros(tokens, np.uint8)
    exempt[side.exempt_tokens] = 1
    offset = 0
    for (layer, is_value), plane in zip(
        planes_of_group(entry.group), plane_targets(header, entry.group, target), strict=True
    ):
        width = plane.heads * plane.dim
        block = memory.matrix("product", 0, values.shape[1], width)
        if heads is not None:
            _per_head(values, entry.used, heads, offset // plane.dim, block)
        else:
            which = statistics.basis[offset : offset + width]
            right = which[:, :count] if dense else which[:, picked]
            np.matmul(left.T, right.T, out=block)
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
        if len(side.exempt_tokens):
            target.store_tokens(
                layer,
                side.exempt_tokens,
                side.exempt_rows[:, offset : offset + width],
                is_value=is_value,
            )
        offset += width


def _per_head(
    values: Floats, used: NDArray[np.uint8], heads: _Heads, first: int, block: Floats
) -> None:
    """Fill in the channels of some heads, (P * 32, heads * D)."""
    dim = heads.rows[0].shape[0]
    for head in range(block.shape[1] // dim):
        components, rows = heads.components[first + head], heads.rows[first + head]
        kept = np.flatnonzero(used[components])
        out = block[:, head * dim : (head + 1) * dim]
        np.matmul(values[components[kept]].T, rows[:, kept].T, out=out)


def _turns(
    known: dict[tuple[int, int, int], Floats], spec: RopeSpec, kind: int, position: int, tokens: int
) -> Floats:
    key = (kind, position, tokens)
    if key not in known:
        known[key] = angles(spec, kind, position, tokens, back=False)
    return known[key]
