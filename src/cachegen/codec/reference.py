"""Decoding ``progressive`` groups in plain NumPy: the twin of the fused kernels.

Matrices as large as a group, one step after the other. Integers are equal to those of the kernels;
floats agree to within rounding of sums (FORMAT.md, "Reconstruction").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import ladder, passes
from cachegen.codec.basis import GroupBasis, planes_of_group
from cachegen.codec.fused import channels_of
from cachegen.codec.header import Group, Header
from cachegen.codec.reader import ObjectReader
from cachegen.codec.rotary import rotate
from cachegen.codec.side import GroupSide
from cachegen.codec.target import Target
from cachegen.types import Array, KVDtype

Floats = NDArray[np.float32]


def decode_group(
    reader: ObjectReader,
    target: Target,
    index: int,
    group: Group,
    statistics: GroupBasis | None,
    *,
    step: float,
    value_weight: float,
) -> None:
    """Decode a group into its target.

    index: of the group. statistics: of a profile, or None. step: the finest one.
    value_weight: what V is divided by. Raises: CorruptError, ChecksumError.
    """
    header = reader.header
    begin, end = header.ranges[group.layer]
    shape = (end - begin, channels_of(header, group))
    side = GroupSide.from_bytes(
        reader.side(index, 0), *shape, header.geometry.dtype, plain=statistics is None
    )
    classes = side.classes
    if statistics is not None:
        classes = profile_classes(statistics, step, side.class_offset)
    digits = passes.read(reader, index, shape, classes)
    values = ladder.descend(digits, header.passes, classes % ladder.CLASSES, side.decay / 64)
    values *= np.float32(step)
    _write_group(header, target, group, statistics, side, values, value_weight)


def profile_base(statistics: GroupBasis, step: float) -> NDArray[np.uint8]:
    """Return the class of every component before the shift, from its deviation in the profile."""
    return ladder.class_of(statistics.deviation / np.float64(np.float32(step)))


def profile_classes(statistics: GroupBasis | None, step: float, offset: int) -> NDArray[np.uint8]:
    """Return family * 64 + class of every component."""
    assert statistics is not None
    base = profile_base(statistics, step).astype(np.int64)
    shifted = np.clip(base + offset, 0, ladder.CLASSES - 1)
    return (statistics.families * ladder.CLASSES + shifted).astype(np.uint8)


def _write_group(
    header: Header,
    target: Target,
    group: Group,
    statistics: GroupBasis | None,
    side: GroupSide,
    values: Floats,
    value_weight: float,
) -> None:
    """Undo transform, mean, weight and RoPE, and store the planes of a group."""
    if statistics is None:
        values += side.mean
    else:
        values = values @ statistics.basis.T + statistics.mean
    offset = 0
    for layer, is_value in planes_of_group(group):
        with target.writing(layer, is_value=is_value) as plane:
            width = plane.shape[1] * plane.shape[2]
            part = values[:, offset : offset + width].reshape(plane.shape)
            if is_value:
                part = part / np.float32(value_weight)
            elif header.rope is not None:
                position = header.first_position + header.ranges[layer][0]
                part = rotate(part, header.rope, layer, position, back=False)
            with np.errstate(over="ignore"):
                plane[:] = _clamped(part, plane.dtype)
            plane[side.exempt_tokens] = side.exempt_rows[:, offset : offset + width].reshape(
                -1, *plane.shape[1:]
            )
        offset += width


def _clamped(values: Floats, dtype: np.dtype[Any]) -> Array:
    """Round to the dtype; float16 to its finite range, for a value near the end may overshoot."""
    if KVDtype.of(dtype) is KVDtype.FLOAT16:
        limit = np.float32(np.finfo(np.float16).max)
        values = np.clip(values, -limit, limit)
    result: Array = values.astype(dtype)
    return result
