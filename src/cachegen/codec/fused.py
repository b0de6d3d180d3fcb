"""Decoding ``progressive`` groups through the fused kernels, straight into their destination.

``ladder.descend`` and ``rotary.rotate`` say the same in NumPy, one matrix at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec import ladder, passes
from cachegen.codec.basis import planes_of_group
from cachegen.codec.container import BYTES, PACKED, RANS
from cachegen.codec.header import Group, Header
from cachegen.codec.reader import ObjectReader
from cachegen.codec.side import GroupSide
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.native import fused
from cachegen.types import Array, KVDtype

Floats = NDArray[np.float32]

_KINDS = {RANS: fused.RANS, BYTES: fused.BYTES, PACKED: fused.PACKED}


@functools.lru_cache(maxsize=1024)
def class_offsets(total: int, present: int, decay: int) -> tuple[Floats, Floats]:
    """Return what the values of each class are moved by, in steps of the last pass present.

    total, present: passes of the object and those at hand. decay: in 1/64.
    Returns: (64,) float32 for values significant since pass 0, and for those since a later pass.
    """
    step = np.float32(3.0 ** (total - present))
    deviation = ladder.deviation_of(np.arange(ladder.CLASSES))
    slope = (np.sqrt(2.0) * (decay / 64) / deviation).astype(np.float32)
    wide = np.float32(2 * ladder.DEAD_ZONE)
    early = ladder.centroid(step * slope) - np.float32((1 - ladder.DEAD_ZONE) * 3 ** (present - 1))
    late = wide * ladder.centroid(wide * step * slope)
    return early.astype(np.float32), late.astype(np.float32)


def channels_of(header: Header, group: Group) -> int:
    """Return the number of channels of a group."""
    heads, geometry = header.geometry.kv_heads, header.geometry
    return sum(heads * geometry.plane_dim(is_value=side) for _, side in planes_of_group(group))


def bodies(reader: ObjectReader, group: int) -> list[tuple[int, memoryview]]:
    """Return the verified bodies of the passes at hand. Raises: CorruptError, ChecksumError."""
    result = []
    for index in range(reader.passes_of(group)):
        segment, body = reader.segment(group, index)
        allowed = (RANS, PACKED) if index else (RANS, BYTES)
        if segment.kind not in allowed or (
            segment.kind == PACKED and segment.bits != passes.DIGIT_BITS
        ):
            expected = f"rANS or {'2 bits' if index else 'bytes'}"
            raise CorruptError(f"kind of pass {index}", got=segment.kind, expected=expected)
        result.append((_KINDS[segment.kind], body))
    return result


def decode_plain(
    reader: ObjectReader, target: Target, *, step: float, value_weight: float
) -> None:
    """Decode an object without a profile.

    step: the finest one. value_weight: what V is divided by.
    Raises: TruncatedError, CorruptError, ChecksumError.
    """
    header = reader.header
    groups = []
    for index, group in enumerate(header.groups):
        begin, end = header.ranges[group.layer]
        tokens, channels = end - begin, channels_of(header, group)
        side = GroupSide.from_bytes(
            reader.side(index, 0), tokens, channels, header.geometry.dtype, True
        )
        groups.append(_source(reader, target, index, side, (tokens, channels), step, value_weight))
    native.decode_groups(
        groups,
        dtype=target.dtype,
        passes=header.passes,
        coarse=passes.coarse_tables(),
        refine=passes.refine_tables(),
        rope=header.rope,
    )


def _source(
    reader: ObjectReader,
    target: Target,
    index: int,
    side: GroupSide,
    shape: tuple[int, int],
    step: float,
    value_weight: float,
) -> native.GroupSource:
    header = reader.header
    present = bodies(reader, index)
    scale = np.float32(3.0 ** (header.passes - len(present)) * step)
    early, late = class_offsets(header.passes, len(present), side.decay)
    late_scale = np.float32(ladder.DEAD_ZONE) * scale
    factor = np.float32(1 / value_weight)
    scaling = np.array([scale, late_scale, scale * factor, late_scale * factor, factor], np.float32)
    return native.GroupSource(
        tokens=shape[0],
        channels=shape[1],
        passes=present,
        classes=side.classes,
        late_below=3 ** (len(present) - 1),
        scaling=scaling,
        early_offset=early * scale,
        late_offset=late * scale,
        mean=side.mean if side.mean_scale else np.zeros(0, np.float32),
        exempt_tokens=side.exempt_tokens.astype(np.uint32),
        exempt_rows=convert(side.exempt_rows, target.dtype),
        planes=plane_targets(header, header.groups[index], target),
    )


def plane_targets(header: Header, group: Group, target: Target) -> Sequence[native.PlaneTarget]:
    """Return where the planes of a group go, in channel order."""
    result = []
    for layer, is_value in planes_of_group(group):
        rope = -1 if header.rope is None or is_value else header.rope.layer_kinds[layer]
        position = header.first_position + header.ranges[layer][0]
        result.append(
            target.plane(layer, is_value=is_value, rope=rope, first_position=position)
        )
    return result


def convert(rows: Array, dtype: KVDtype) -> Array:
    """Round to a dtype, to its finite range where float16 ends earlier than the source."""
    if rows.dtype == dtype.numpy:
        return rows
    if dtype is KVDtype.FLOAT16:
        limit = np.float32(np.finfo(np.float16).max)
        rows = np.clip(rows.astype(np.float32), -limit, limit)
    with np.errstate(over="ignore"):
        result: Array = rows.astype(dtype.numpy)
    return result
