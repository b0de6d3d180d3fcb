"""The ``raw`` codec: the values as they are, in their own dtype; exact, NaN and Inf included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec, check_one_plane_per_group, planes_of
from cachegen.codec.container import BYTES, write_object
from cachegen.codec.header import SegmentBody
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import ChunkKey


@dataclass(frozen=True)
class RawCodec(Codec):
    """Stores every plane uncompressed. The yardstick for the others, and a lossless store."""

    name: ClassVar[str] = "raw"
    codec_id: ClassVar[int] = 4

    def config(self) -> dict[str, Any]:
        return {"codec": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        segments = [
            SegmentBody(group, 0, BYTES, np.ascontiguousarray(plane).tobytes())
            for group, plane in enumerate(planes_of(chunk))
        ]
        return write_object(
            chunk, codec_id=self.codec_id, passes=1, params=b"", segments=segments, key=key
        )

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_one_plane_per_group(header)
        if header.params or header.passes != 1:
            raise CorruptError(
                "raw parameters", got=(header.params, header.passes), expected="none"
            )
        for group in range(len(header.groups)):
            with target.writing(group // 2, is_value=group % 2 == 1) as plane:
                segment, body = reader.segment(group, 0)
                if segment.kind != BYTES or len(body) != plane.nbytes or len(reader.side(group, 0)):
                    raise CorruptError(
                        "raw segment", got=f"{len(body)} bytes", expected=plane.nbytes
                    )
                plane[:] = np.frombuffer(body, plane.dtype).reshape(plane.shape)
