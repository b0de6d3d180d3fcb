"""What the header of an object says, once it is parsed: groups, segments, geometry."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

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


@functools.lru_cache(maxsize=64)
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


class SegmentTable(Sequence[Segment]):
    """The entries of a segment table, made when they are asked for.

    group, pass_index, kind, offset, length, checksum, distortion, bits: a column each, integers but
    for distortion; offsets ascend.
    """

    def __init__(
        self,
        group: NDArray[np.int64],
        pass_index: NDArray[np.int64],
        kind: NDArray[Any],
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        checksum: NDArray[np.uint64],
        distortion: NDArray[np.float32],
        bits: NDArray[Any],
    ) -> None:
        self.group = group
        self.pass_index = pass_index
        self.kind = kind
        self.offset = offset
        self.length = length
        self.checksum = checksum
        self.distortion = distortion
        self.bits = bits

    @functools.cached_property
    def entries(self) -> tuple[Segment, ...]:
        """All entries."""
        columns: tuple[NDArray[Any], ...] = (
            self.group,
            self.pass_index,
            self.kind,
            self.offset,
            self.length,
            self.checksum,
            self.distortion,
            self.bits,
        )
        return tuple(map(Segment._make, zip(*(column.tolist() for column in columns), strict=True)))

    @classmethod
    def empty(cls) -> SegmentTable:
        """Return a table without entries."""
        none = np.zeros(0, np.int64)
        return cls(
            none, none, none, none, none, none.astype(np.uint64), none.astype(np.float32), none
        )

    @property
    def end(self) -> int:
        """Offset of the first byte after the last segment and its padding."""
        return int(self.offset[-1]) + padded(int(self.length[-1]))

    def __len__(self) -> int:
        return len(self.group)

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Segment, ...]: ...

    def __getitem__(self, index: int | slice) -> Segment | tuple[Segment, ...]:
        return self.entries[index]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentTable) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)


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
    segments: SegmentTable
    header_bytes: int

    @property
    def object_bytes(self) -> int:
        """Length of the whole object."""
        return self.segments.end

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
