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
    check_kind,
    frozen_tables,
    parametric_tables,
)
from cachegen.codec.header import SegmentBody
from cachegen.codec.plane_source import KINDS, SEGMENT_KINDS
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.native.planes import NOTHING
from cachegen.profile import Profile
from cachegen.types import ChunkKey

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
        coarse, fine = self._coded(chunk) if self.entropy else (self._plain(chunk), [])
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=1 + self.entropy,
            params=pack_params(entropy=self.entropy),
            segments=payload_order([coarse, fine]),
            key=key,
        )

    @staticmethod
    def _coded(chunk: KVChunk) -> tuple[list[SegmentBody], list[SegmentBody]]:
        """Return the segments of pass 0 and of pass 1."""
        planes = planes_of(chunk)
        coarse: list[SegmentBody] = []
        fine: list[SegmentBody] = []
        found = native.encode_planes(
            planes,
            [LEVELS] * len(planes),
            per_head=True,
            tables=frozen_tables(),
            low_bits=LOW_BITS,
        )
        for group, (coded, plane) in enumerate(zip(found, planes, strict=True)):
            error = quantization_error(coded.scales, LEVELS, plane.shape[2])
            coarse_error = error * 4**LOW_BITS
            kind = SEGMENT_KINDS[coded.kind]
            side = coded.scales.tobytes() + coded.tables
            bits = HIGH_BITS if kind == PACKED else 0
            coarse += [
                SegmentBody(group, 0, SIDE, side, coarse_error),
                SegmentBody(group, 0, kind, coded.body.data, coarse_error, bits),
            ]
            fine.append(SegmentBody(group, 1, PACKED, coded.low.data, error, LOW_BITS))
        return coarse, fine

    @staticmethod
    def _plain(chunk: KVChunk) -> list[SegmentBody]:
        planes = planes_of(chunk)

        def encode_plane(group: int) -> list[SegmentBody]:
            symbols, scales = native.quantize(planes[group], LEVELS, per_head=True)
            error = quantization_error(scales, LEVELS, planes[group].shape[2])
            return [
                SegmentBody(group, 0, SIDE, scales.tobytes(), error),
                SegmentBody(group, 0, BYTES, symbols.tobytes(), error),
            ]

        pairs = each_plane(encode_plane, len(planes))
        return [segment for pair in pairs for segment in pair]

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
