"""The ``int8`` codec: 8-bit symbols with a max-abs scale per (layer, token, head). The baseline."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.base import (
    Codec,
    check_one_plane_per_group,
    payload_order,
    planes_of,
    quantization_error,
    read_scales,
)
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE, write_object
from cachegen.codec.entropy import (
    ParametricModels,
    Symbols,
    check_kind,
    fit_parametric,
    pack,
    parametric_tables,
    rotate,
    stream_steps,
    unpack,
    unpack_bytes,
)
from cachegen.codec.header import SegmentBody
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import Array, ChunkKey

LEVELS = 127
LOW_BITS = 3
HIGH_BITS = 5
LOW_CENTRE = 4
_PARAMS = struct.Struct("<B3x")


@dataclass(frozen=True)
class Int8Codec(Codec):
    """int8 per (layer, token, head); with entropy the high digit is coded, the low one refines it.

    entropy: False stores one byte per value.
    """

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 1
    entropy: bool = True

    def config(self) -> dict[str, Any]:
        return {"codec": self.name, "entropy": self.entropy}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(entropy=bool(config.get("entropy", True)))

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        coarse: list[SegmentBody] = []
        fine: list[SegmentBody] = []
        for group, plane in enumerate(planes_of(chunk)):
            symbols, scales = native.quantize(plane, LEVELS, per_head=True)
            error = quantization_error(scales, LEVELS, plane.shape[2])
            side = scales.tobytes()
            if not self.entropy:
                coarse.append(SegmentBody(group, 0, SIDE, side, error))
                coarse.append(SegmentBody(group, 0, BYTES, symbols.tobytes(), error))
                continue
            kind, bits, body, tables, low = _split_digits(symbols)
            coarse_error = error * 4**LOW_BITS
            coarse.append(SegmentBody(group, 0, SIDE, side + tables, coarse_error))
            coarse.append(SegmentBody(group, 0, kind, body, coarse_error, bits))
            fine.append(SegmentBody(group, 1, PACKED, pack(low, LOW_BITS), error, LOW_BITS))
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=1 + self.entropy,
            params=pack_params(entropy=self.entropy),
            segments=payload_order([coarse, fine]),
            key=key,
        )

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_one_plane_per_group(header)
        if header.params not in (b"\0\0\0\0", b"\1\0\0\0"):
            raise CorruptError("int8 parameters", got=header.params, expected="a flag of 0 or 1")
        entropy = header.params[0] == 1
        if header.passes != 1 + entropy:
            raise CorruptError("passes", got=header.passes, expected=1 + entropy)
        for group in range(len(header.groups)):
            with target.writing(group // 2, is_value=group % 2 == 1) as plane:
                tokens, heads, dim = plane.shape
                side = reader.side(group, 0)
                scales = read_scales(side, (tokens, heads), header.geometry.dtype.numpy)
                shape = (tokens, heads * dim)
                tables = side[scales.nbytes :]
                if entropy:
                    symbols = _join_digits(reader, group, shape, tables)
                else:
                    segment, body = reader.segment(group, 0)
                    check_kind(segment.kind, (BYTES,))
                    if len(tables):
                        raise CorruptError(
                            "side information", got=len(side), expected=scales.nbytes
                        )
                    symbols = unpack_bytes(body, shape)
                _check_range(symbols)
                native.dequantize(symbols, scales, LEVELS, plane)


def pack_params(*, entropy: bool) -> bytes:
    """Return the parameters of an object."""
    return _PARAMS.pack(entropy)


def _split_digits(symbols: Symbols) -> tuple[int, int, bytes, bytes, Symbols]:
    """Return kind, bits and body of the high digits, their tables, and the low digits."""
    tokens, channels = symbols.shape
    models = fit_parametric(symbols >> np.uint8(LOW_BITS))
    rotated = rotate(symbols, models.rotations, LOW_BITS, back=False)
    body = native.encode_segment(
        rotated >> np.uint8(LOW_BITS),
        models.classes.astype(np.uint16),
        parametric_tables()[0],
        stream_steps=stream_steps(channels),
    )
    side = models.to_bytes()
    packed = HIGH_BITS * ((tokens * channels + 7) // 8)
    if len(body) + len(side) >= packed:
        return (
            PACKED,
            HIGH_BITS,
            pack(symbols >> np.uint8(LOW_BITS), HIGH_BITS),
            b"",
            symbols & np.uint8(7),
        )
    return RANS, 0, body, side, rotated & np.uint8(7)


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
    elif segment.bits != HIGH_BITS or len(tables):
        raise CorruptError("packed high digits", got=segment.bits, expected=HIGH_BITS)
    else:
        high = unpack(body, HIGH_BITS, shape)
    low: Array | int = LOW_CENTRE
    if reader.passes_of(group) > 1:
        segment, body = reader.segment(group, 1)
        if segment.kind != PACKED or segment.bits != LOW_BITS:
            raise CorruptError("low digits", got=(segment.kind, segment.bits), expected="3 bits")
        low = unpack(body, LOW_BITS, shape)
    symbols = (high << np.uint8(LOW_BITS)) | np.asarray(low, np.uint8)
    if reader.segment(group, 0)[0].kind == RANS:
        return rotate(symbols, models.rotations, LOW_BITS, back=True)
    return symbols


def _check_range(symbols: Symbols) -> None:
    if symbols.size and int(symbols.max()) > 2 * LEVELS:
        raise CorruptError("int8 symbol", got=int(symbols.max()), expected=f"0 to {2 * LEVELS}")
