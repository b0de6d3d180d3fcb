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
    each_plane,
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
    stream_steps,
)
from cachegen.codec.header import SegmentBody
from cachegen.codec.plane_source import KINDS
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.native.planes import NOTHING
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
        planes = planes_of(chunk)
        pairs = each_plane(lambda group: self._encode_plane(group, planes[group]), len(planes))
        coarse = [segment for pair in pairs for segment in pair[0]]
        fine = [segment for pair in pairs for segment in pair[1]]
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=1 + self.entropy,
            params=pack_params(entropy=self.entropy),
            segments=payload_order([coarse, fine]),
            key=key,
        )

    def _encode_plane(
        self, group: int, plane: Array
    ) -> tuple[list[SegmentBody], list[SegmentBody]]:
        """Return the segments of pass 0 and of pass 1."""
        symbols, scales = native.quantize(plane, LEVELS, per_head=True)
        error = quantization_error(scales, LEVELS, plane.shape[2])
        side = scales.tobytes()
        if not self.entropy:
            return [
                SegmentBody(group, 0, SIDE, side, error),
                SegmentBody(group, 0, BYTES, symbols.tobytes(), error),
            ], []
        kind, bits, body, tables, low = _split_digits(symbols)
        coarse_error = error * 4**LOW_BITS
        coarse = [
            SegmentBody(group, 0, SIDE, side + tables, coarse_error),
            SegmentBody(group, 0, kind, body, coarse_error, bits),
        ]
        return coarse, [SegmentBody(group, 1, PACKED, low, error, LOW_BITS)]

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_one_plane_per_group(header)
        if header.params not in (b"\0\0\0\0", b"\1\0\0\0"):
            raise CorruptError("int8 parameters", got=header.params, expected="a flag of 0 or 1")
        entropy = header.params[0] == 1
        if header.passes != 1 + entropy:
            raise CorruptError("passes", got=header.passes, expected=1 + entropy)
        planes = []
        for group in range(len(header.groups)):
            plane = target.plane(group // 2, is_value=group % 2 == 1)
            source = _source(reader, group, plane, entropy=entropy)
            planes.append(native.QuantizedPlane(source.rows, 0, (source,), plane))
        native.decode_planes(
            planes,
            dtype=target.dtype,
            stored=header.geometry.dtype,
            shared=parametric_tables()[0],
        )


def _source(
    reader: ObjectReader, group: int, plane: native.PlaneTarget, *, entropy: bool
) -> native.MatrixSource:
    """Return the bytes of a plane. Raises: CorruptError, ChecksumError."""
    tokens, heads = len(plane.offsets), plane.heads
    side = reader.side(group, 0)
    scales = read_scales(side, (tokens, heads), reader.header.geometry.dtype.numpy)
    tables = side[scales.nbytes :]
    segment, body = reader.segment(group, 0)
    check_kind(segment.kind, (RANS, PACKED) if entropy else (BYTES,))
    models, low = None, NOTHING
    if segment.kind == RANS:
        models = ParametricModels.from_bytes(tables, heads * plane.dim)
    elif len(tables):
        raise CorruptError("side information", got=len(side), expected=scales.nbytes)
    if segment.kind == PACKED and segment.bits != HIGH_BITS:
        raise CorruptError("packed high digits", got=segment.bits, expected=HIGH_BITS)
    if reader.passes_of(group) > 1:
        second, packed = reader.segment(group, 1)
        if second.kind != PACKED or second.bits != LOW_BITS:
            raise CorruptError("low digits", got=(second.kind, second.bits), expected="3 bits")
        low = np.frombuffer(packed, np.uint8)
    return native.MatrixSource(
        rows=tokens,
        kind=KINDS[segment.kind],
        bits=segment.bits,
        body=np.frombuffer(body, np.uint8),
        freqs=NOTHING,
        alphabet=0,
        classes=models.classes if models else NOTHING,
        rotations=models.rotations if models else NOTHING,
        shift=0,
        low_bits=LOW_BITS if entropy else 0,
        low=low,
        levels=LEVELS,
        scales=np.frombuffer(side[: scales.nbytes], np.uint8),
        per_head=True,
    )


def pack_params(*, entropy: bool) -> bytes:
    """Return the parameters of an object."""
    return _PARAMS.pack(entropy)


def _split_digits(symbols: Symbols) -> tuple[int, int, bytes, bytes, bytes]:
    """Return kind, bits and body of the high digits, their tables, and the low digits, packed."""
    tokens, channels = symbols.shape
    models = fit_parametric(symbols, LOW_BITS)
    high, low = native.split_digits(symbols, models.rotations, LOW_BITS)
    body = native.encode_segment(
        high,
        models.classes.astype(np.uint16),
        parametric_tables()[0],
        stream_steps=stream_steps(channels),
    )
    side = models.to_bytes()
    packed = HIGH_BITS * ((tokens * channels + 7) // 8)
    if len(body) + len(side) >= packed:
        plain = np.zeros(channels, np.uint8)
        high, low = native.split_digits(symbols, plain, LOW_BITS)
        return PACKED, HIGH_BITS, pack(high, HIGH_BITS), b"", low
    return RANS, 0, body, side, low
