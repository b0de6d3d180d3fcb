"""What the header of an object says, once it is parsed: groups, segments, geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cachegen.types import ChunkKey, Geometry, RopeSpec

ALIGNMENT = 4


def padded(length: int) -> int:
    """Round a length up to the alignment of segments and header blocks."""
    return (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True)
class Group:
    """The planes that are coded together: layers [layer, layer + layers), K, V or both."""

    layer: int
    layers: int
    planes: int

    @property
    def label(self) -> str:
        side = {1: "K", 2: "V", 3: "KV"}[self.planes]
        last = self.layer + self.layers - 1
        return f"{side}{self.layer}" if self.layers == 1 else f"{side}{self.layer}-{last}"


def plane_groups(layers: int) -> tuple[Group, ...]:
    """Return the default grouping: one plane per group, K and V of layer 0, of layer 1, ..."""
    return tuple(Group(index // 2, 1, 1 + index % 2) for index in range(2 * layers))


class Segment(NamedTuple):
    """An entry of the segment table. offset: of the segment's first byte in the object."""

    group: int
    pass_index: int
    kind: int
    offset: int
    length: int
    checksum: int
    distortion: float
    bits: int = 0

    @property
    def end(self) -> int:
        """Offset of the first byte after the segment and its padding."""
        return self.offset + padded(self.length)


@dataclass(frozen=True)
class Header:
    """Everything that precedes the payload.

    ranges: for each layer the half-open range of the chunk's tokens that it holds.
    """

    geometry: Geometry
    tokens: int
    first_position: int
    codec_id: int
    passes: int
    params: bytes
    rope: RopeSpec | None
    profile: bytes | None
    key: ChunkKey | None
    groups: tuple[Group, ...]
    ranges: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]
    header_bytes: int

    @property
    def object_bytes(self) -> int:
        """Length of the whole object."""
        return self.segments[-1].end

    @property
    def value_count(self) -> int:
        """Number of K and V values that the object decodes to."""
        per_token = self.geometry.kv_heads * (self.geometry.key_dim + self.geometry.value_dim)
        return per_token * sum(end - begin for begin, end in self.ranges)

    @property
    def decoded_bytes(self) -> int:
        return self.value_count * self.geometry.dtype.size_bytes


@dataclass(frozen=True)
class SegmentBody:
    """A segment to be written: its place in the table and its bytes, side by side in memory."""

    group: int
    pass_index: int
    kind: int
    body: bytes | memoryview
    distortion: float = 0.0
    bits: int = 0
