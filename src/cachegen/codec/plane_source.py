"""What the native decoder of the ``int8`` and ``cachegen`` codecs is given, checked.

``reference_planes`` decodes the same in NumPy, one matrix at a time.
"""

from __future__ import annotations

import numpy as np

from cachegen import native
from cachegen.codec.base import read_scales
from cachegen.codec.container import BYTES, PACKED, RANS
from cachegen.codec.entropy import (
    Freqs,
    ParametricModels,
    TableMode,
    alphabet_size,
    check_kind,
    checked_profile,
    digit_shift,
)
from cachegen.codec.reader import ObjectReader
from cachegen.errors import CorruptError
from cachegen.native import fused
from cachegen.native.planes import NOTHING

KINDS = {RANS: fused.RANS, BYTES: fused.BYTES, PACKED: fused.PACKED}
SEGMENT_KINDS = {number: kind for kind, number in KINDS.items()}


def matrix_source(
    reader: ObjectReader,
    group: int,
    index: int,
    shape: tuple[int, int],
    levels: int,
    mode: TableMode,
    profile_freqs: Freqs | None,
) -> native.MatrixSource:
    """Return the bytes of one pass that ``entropy.encode_matrix`` made, with a scale for each row.

    shape: rows and channels. profile_freqs: (C, A) for TableMode.PROFILE.
    Raises: CorruptError, ChecksumError, ProfileError.
    """
    rows, channels = shape
    side = reader.side(group, index)
    scales = read_scales(side, (rows, 1), reader.header.geometry.dtype.numpy)
    tables = side[scales.nbytes :]
    segment, body = reader.segment(group, index)
    check_kind(segment.kind, (RANS, BYTES))
    freqs, models = NOTHING, None
    if segment.kind == BYTES:
        if len(tables):
            raise CorruptError("tables of a byte segment", got=f"{len(tables)} bytes", expected=0)
    elif mode is TableMode.PARAMETRIC:
        models = ParametricModels.from_bytes(tables, channels)
    elif mode is TableMode.CHUNK:
        expected = 2 * channels * alphabet_size(levels)
        if len(tables) != expected:
            raise CorruptError("tables", got=f"{len(tables)} bytes", expected=expected)
        freqs = np.frombuffer(tables, np.uint8)
    elif len(tables):
        raise CorruptError("tables in the object", got=f"{len(tables)} bytes", expected="a profile")
    else:
        known = checked_profile(profile_freqs, channels, levels)
        freqs = np.ascontiguousarray(known, "<u2").view(np.uint8).ravel()
    return native.MatrixSource(
        rows=rows,
        kind=KINDS[segment.kind],
        bits=segment.bits,
        body=np.frombuffer(body, np.uint8),
        freqs=freqs,
        alphabet=alphabet_size(levels),
        classes=models.classes if models else NOTHING,
        rotations=models.rotations if models else NOTHING,
        shift=digit_shift(levels),
        low_bits=0,
        low=NOTHING,
        levels=levels,
        scales=np.frombuffer(side[: scales.nbytes], np.uint8),
        per_head=False,
    )
