"""Decoding ``int8`` and ``cachegen`` planes matrix by matrix: the twin of ``native.decode_planes``.

Values are equal to the last bit.
"""

from __future__ import annotations

import numpy as np

from cachegen import native
from cachegen.codec.base import read_scales
from cachegen.codec.cachegen import (
    ANCHOR_LEVELS,
    CacheGenCodec,
    delta_levels,
    delta_rows,
    profile_freqs,
    unpack_params,
)
from cachegen.codec.container import BYTES, PACKED, RANS
from cachegen.codec.entropy import (
    ParametricModels,
    Symbols,
    TableMode,
    check_kind,
    decode_matrix,
    parametric_tables,
    rotate,
    unpack,
    unpack_bytes,
)
from cachegen.codec.int8 import HIGH_BITS, LEVELS, LOW_BITS, LOW_CENTRE
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import Array


def decode_planes(reader: ObjectReader, target: Target, *, profile: Profile | None = None) -> None:
    """Decode an object of one of the two codecs into its target. Raises: CorruptError."""
    header = reader.header
    for group in range(len(header.groups)):
        with target.writing(group // 2, is_value=group % 2 == 1) as plane:
            if header.codec_id == CacheGenCodec.codec_id:
                _decode_cachegen(reader, group, plane, profile)
            else:
                _decode_int8(reader, group, plane)


def _decode_int8(reader: ObjectReader, group: int, plane: Array) -> None:
    tokens, heads, dim = plane.shape
    side = reader.side(group, 0)
    scales = read_scales(side, (tokens, heads), plane.dtype)
    shape, tables = (tokens, heads * dim), side[scales.nbytes :]
    segment, body = reader.segment(group, 0)
    if segment.kind == BYTES:
        symbols = unpack_bytes(body, shape)
    else:
        symbols = _join_digits(reader, group, shape, tables)
    _check_range(symbols, LEVELS)
    native.dequantize(symbols, scales, LEVELS, plane)


def _join_digits(
    reader: ObjectReader, group: int, shape: tuple[int, int], tables: memoryview
) -> Symbols:
    segment, body = reader.segment(group, 0)
    check_kind(segment.kind, (RANS, PACKED))
    if segment.kind == RANS:
        models = ParametricModels.from_bytes(tables, shape[1])
        high = native.decode_segment(
            body, *shape, models.classes.astype(np.uint16), parametric_tables()[0]
        )
    else:
        high = unpack(body, HIGH_BITS, shape)
    low: Array | int = LOW_CENTRE
    if reader.passes_of(group) > 1:
        low = unpack(reader.segment(group, 1)[1], LOW_BITS, shape)
    symbols = (high << np.uint8(LOW_BITS)) | np.asarray(low, np.uint8)
    if segment.kind == RANS:
        return rotate(symbols, models.rotations, LOW_BITS, back=True)
    return symbols


def _decode_cachegen(
    reader: ObjectReader, group: int, plane: Array, profile: Profile | None
) -> None:
    layers = reader.header.geometry.layers
    mode, group_tokens, bins = unpack_params(reader.header.params, layers)
    if not group_tokens:
        _decode_pass(reader, group, 0, plane, bins[group] // 2 - 1, mode, profile)
        return
    tokens, heads, dim = plane.shape
    anchors = np.empty(((tokens + group_tokens - 1) // group_tokens, heads, dim), plane.dtype)
    _decode_pass(reader, group, 0, anchors, ANCHOR_LEVELS, mode, profile)
    plane[:] = anchors[np.arange(tokens) // group_tokens]
    if reader.passes_of(group) < 2:
        return
    rows = delta_rows(tokens, group_tokens)
    difference = np.empty((len(rows), heads, dim), plane.dtype)
    levels = delta_levels(bins[group], group // 2, layers)
    _decode_pass(reader, group, 1, difference, levels, mode, profile)
    with np.errstate(over="ignore"):
        plane[rows] = plane[rows].astype(np.float32) + difference.astype(np.float32)


def _decode_pass(
    reader: ObjectReader,
    group: int,
    index: int,
    out: Array,
    levels: int,
    mode: TableMode,
    profile: Profile | None,
) -> None:
    """Decode one pass of a plane into out, (rows, H, D)."""
    rows, heads, dim = out.shape
    side = reader.side(group, index)
    scales = read_scales(side, (rows, 1), out.dtype)
    segment, body = reader.segment(group, index)
    freqs = profile_freqs(profile, group, index) if mode is TableMode.PROFILE and profile else None
    shape, tables = (rows, heads * dim), side[scales.nbytes :]
    symbols = decode_matrix(segment.kind, body, tables, shape, levels, mode, freqs)
    _check_range(symbols, levels)
    native.dequantize(symbols, scales, levels, out)


def _check_range(symbols: Symbols, levels: int) -> None:
    if symbols.size and int(symbols.max()) > 2 * levels:
        raise CorruptError("symbol", got=int(symbols.max()), expected=f"0 to {2 * levels}")
