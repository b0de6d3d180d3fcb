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
from cachegen.codec.container import BYTES, PACKED, RANS, SPARSE
from cachegen.codec.header import Group, Header
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.native import fused

Floats = NDArray[np.float32]

_KINDS = {RANS: fused.RANS, BYTES: fused.BYTES, PACKED: fused.PACKED, SPARSE: fused.SPARSE}


@functools.lru_cache(maxsize=1024)
def constants(
    total: int, present: int, decay: int, step: float, value_weight: float
) -> fused.Constants:
    """Return what turns values into floats.

    total, present: passes of the object and those at hand. decay: in 1/64. step: the finest one.
    value_weight: what V is divided by.
    """
    early, late = ladder.class_offsets(total, present, decay)
    scale = np.float32(np.float32(3.0 ** (total - present)) * step)
    late_scale = np.float32(ladder.DEAD_ZONE) * scale
    factor = np.float32(1 / value_weight)
    scaling = np.array([scale, late_scale, scale * factor, late_scale * factor, factor], np.float32)
    return fused.Constants(3 ** (present - 1), scaling, early * scale, late * scale)


def channels_of(header: Header, group: Group) -> int:
    """Return the number of channels of a group."""
    heads, geometry = header.geometry.kv_heads, header.geometry
    return sum(heads * geometry.plane_dim(is_value=side) for _, side in planes_of_group(group))


def bodies(reader: ObjectReader, group: int) -> list[tuple[int, memoryview]]:
    """Return the verified bodies of the passes at hand. Raises: CorruptError, ChecksumError."""
    result = []
    for index in range(reader.passes_of(group)):
        segment, body = reader.segment(group, index)
        allowed = (RANS, PACKED) if index else (RANS, BYTES, SPARSE)
        if segment.kind not in allowed or (
            segment.kind == PACKED and segment.bits != passes.DIGIT_BITS
        ):
            expected = f"rANS or {'2 bits' if index else 'bytes or sparse'}"
            raise CorruptError(f"kind of pass {index}", got=segment.kind, expected=expected)
        result.append((_KINDS[segment.kind], body))
    return result


def decode_plain(reader: ObjectReader, target: Target, *, step: float, value_weight: float) -> None:
    """Decode an object without a profile.

    step: the finest one. value_weight: what V is divided by.
    Raises: TruncatedError, CorruptError, ChecksumError.
    """
    header = reader.header
    groups = []
    for index, group in enumerate(header.groups):
        begin, end = header.ranges[group.layer]
        side, present = reader.side(index, 0), bodies(reader, index)
        decay = side[0] if len(side) else 0
        groups.append(
            native.GroupSource(
                end - begin,
                channels_of(header, group),
                present,
                side,
                constants(header.passes, len(present), decay, step, value_weight),
                plane_targets(header, group, target),
            )
        )
    native.decode_groups(
        groups,
        dtype=target.dtype,
        stored=header.geometry.dtype,
        passes=header.passes,
        coarse=passes.coarse_tables(),
        refine=passes.refine_tables(),
        rope=header.rope,
    )


def plane_targets(header: Header, group: Group, target: Target) -> Sequence[native.PlaneTarget]:
    """Return where the planes of a group go, in channel order."""
    result = []
    for layer, is_value in planes_of_group(group):
        rope = -1 if header.rope is None or is_value else header.rope.layer_kinds[layer]
        position = header.first_position + header.ranges[layer][0]
        result.append(target.plane(layer, is_value=is_value, rope=rope, first_position=position))
    return result
