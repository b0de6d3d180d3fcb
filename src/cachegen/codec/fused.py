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

# As the extension numbers them: kinds of pass 0 and of the passes behind it.
_FIRST_KINDS = {RANS: fused.RANS, BYTES: fused.BYTES, SPARSE: fused.SPARSE}
_LATER_KINDS = {RANS: fused.RANS, PACKED: fused.PACKED}


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
    geometry = header.geometry
    keys, values = group.planes & 1, group.planes >> 1
    each = keys * geometry.key_dim + values * geometry.value_dim
    return group.layers * geometry.kv_heads * each


def bodies(reader: ObjectReader, group: int) -> list[tuple[int, memoryview]]:
    """Return the verified bodies of the passes at hand. Raises: CorruptError, ChecksumError."""
    result = []
    for index, (kind, bits, body) in enumerate(reader.coded(group)):
        allowed = _LATER_KINDS if index else _FIRST_KINDS
        if kind not in allowed or (kind == PACKED and bits != passes.DIGIT_BITS):
            expected = f"rANS or {'2 bits' if index else 'bytes or sparse'}"
            raise CorruptError(f"kind of pass {index}", got=kind, expected=expected)
        result.append((allowed[kind], body))
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
    kinds = header.rope.layer_kinds if header.rope is not None else None
    return [
        target.plane(
            layer,
            is_value=is_value,
            rope=-1 if kinds is None or is_value else kinds[layer],
            first_position=header.first_position + header.ranges[layer][0],
        )
        for layer, is_value in planes_of_group(group)
    ]
