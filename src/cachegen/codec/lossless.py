"""The ``lossless`` codec: every bit kept, exponents and signs entropy-coded, mantissas raw.

Neighbouring values of a channel have neighbouring exponents and mostly one sign; their mantissas
are noise. Channels are moved to a common place (largest exponent first, commoner sign first), so
that a few tables, sent with each plane, fit all of them. Low mantissa bits that are 0 throughout,
as in float32 that was once a smaller type, are left out. The law of its bytes is FORMAT.md;
``reference_lossless`` is the twin of the native code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec, check_one_plane_per_group, planes_of
from cachegen.codec.container import BYTES, SIDE, write_object
from cachegen.codec.entropy import COST_UNIT, TOTAL, bits_saved
from cachegen.codec.header import SegmentBody
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import ChunkKey


@dataclass(frozen=True)
class LosslessCodec(Codec):
    """Keeps every bit, NaN payloads, infinities and -0 included; about 1.6 times smaller."""

    name: ClassVar[str] = "lossless"
    codec_id: ClassVar[int] = 5

    def config(self) -> dict[str, Any]:
        return {"codec": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        planes = planes_of(chunk)
        coded = native.encode_lossless(
            planes, dtype=chunk.geometry.dtype, costs=symbol_costs(), bits_saved=bits_saved()
        )
        segments: list[SegmentBody] = []
        for group, (side, body) in enumerate(coded):
            if len(side):
                segments.append(SegmentBody(group, 0, SIDE, side.data))
                segments.append(SegmentBody(group, 0, BYTES, body.data))
            else:
                segments.append(SegmentBody(group, 0, BYTES, planes[group].tobytes()))
        return write_object(
            chunk, codec_id=self.codec_id, passes=1, params=b"", segments=segments, key=key
        )

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_lossless(reader)
        planes = []
        for group in range(len(header.groups)):
            plane = target.plane(group // 2, is_value=group % 2 == 1)
            side = np.frombuffer(reader.side(group, 0), np.uint8)
            body = np.frombuffer(reader.segment(group, 0)[1], np.uint8)
            planes.append(native.LosslessSource(len(plane.offsets), side, body, plane))
        native.decode_lossless(planes, dtype=target.dtype, stored=header.geometry.dtype)


def check_lossless(reader: ObjectReader) -> None:
    """Raise CorruptError unless groups, parameters, passes and kinds are those of this codec."""
    header = reader.header
    check_one_plane_per_group(header)
    if header.params or header.passes != 1:
        raise CorruptError(
            "lossless parameters", got=(header.params, header.passes), expected="none"
        )
    kinds = {segment.kind for segment in header.segments}
    if not kinds <= {SIDE, BYTES}:
        raise CorruptError("lossless segment", got=f"kinds {sorted(kinds)}", expected="bytes")


@functools.cache
def symbol_costs() -> NDArray[np.int16]:
    """Return what a symbol takes in 1/1024 bit, by its frequency from 0 to 4096; 0 for none.

    Whole numbers, so that sums have no order.
    """
    freqs = np.maximum(np.arange(TOTAL + 1), 1)
    costs: NDArray[np.int16] = np.rint(-np.log2(freqs / TOTAL) * COST_UNIT).astype(np.int16)
    costs[0] = 0
    return costs
