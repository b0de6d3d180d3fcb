"""Reading one object: header, passes that are whole, verified segments."""

from __future__ import annotations

import numpy as np
import xxhash

from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, SIDE, Buffer, read_header
from cachegen.codec.header import ALIGNMENT, Segment, padded
from cachegen.errors import ChecksumError, CorruptError, KeyMismatchError, TruncatedError
from cachegen.types import ChunkKey


class ObjectReader:
    """A checked view of one object: its header and its verified segments.

    data: the object, or with allow_partial a prefix of it; never copied.
    key: if given, the key the object must carry.
    Raises: FormatError subclasses, KeyMismatchError.
    """

    def __init__(
        self,
        data: Buffer,
        *,
        key: ChunkKey | None = None,
        allow_partial: bool = False,
        max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    ) -> None:
        self._data = memoryview(data).cast("B")
        self.header = read_header(self._data, max_decoded_bytes=max_decoded_bytes)
        if key is not None and self.header.key != key:
            stored = self.header.key.name if self.header.key else "no key"
            raise KeyMismatchError(
                "chunk key", got=stored, expected=key.name, remedy="treat it as a miss"
            )
        size, whole = len(self._data), self.header.object_bytes
        if size > whole:
            raise CorruptError("object length", got=f"{size} bytes", expected=f"{whole} bytes")
        if size < whole and not allow_partial:
            raise TruncatedError(
                "object",
                got=f"{size} bytes",
                expected=f"{whole} bytes",
                remedy="fetch the rest, or pass allow_partial=True to use the whole passes",
            )
        table = self.header.segments
        # Payload is in the order of the table.
        whole = int(np.searchsorted(table.offset + table.length, size, side="right"))
        group, is_side = table.group[:whole], table.kind[:whole] == SIDE
        groups = len(self.header.groups)
        present = np.bincount(group[~is_side], minlength=groups)
        if not present.all():
            raise TruncatedError(
                "object",
                got=f"{size} bytes",
                expected="at least every pass 0",
                remedy="fetch more of it",
            )
        places = np.full((groups, self.header.passes, 2), -1, np.int32)
        places[group, table.pass_index[:whole], is_side.astype(np.intp)] = np.arange(whole)
        self._whole = whole
        self._passes: list[int] = present.tolist()
        # By group, pass and whether it is side information: which entry of the table.
        self._places: list[list[list[int]]] = places.tolist()
        self._kinds: list[int] = table.kind.tolist()
        self._bits: list[int] = table.bits.tolist()
        self._offsets: list[int] = table.offset.tolist()
        self._lengths: list[int] = table.length.tolist()
        self._checksums: list[int] = table.checksum.tolist()

    def passes_of(self, group: int) -> int:
        """Return how many passes of a group are whole."""
        return self._passes[group]

    def segment(self, group: int, pass_index: int) -> tuple[Segment, memoryview]:
        """Return the coded segment of a pass and its verified bytes. Raises: ChecksumError."""
        place = self._places[group][pass_index][False]
        return self.header.segments[place], self._verified(place)

    def coded(self, group: int) -> list[tuple[int, int, memoryview]]:
        """Return kind, bits and verified bytes of the passes of a group. Raises: ChecksumError."""
        places = [place for place, _ in self._places[group][: self._passes[group]]]
        return [(self._kinds[place], self._bits[place], self._verified(place)) for place in places]

    def side(self, group: int, pass_index: int) -> memoryview:
        """Return the verified side information of a pass; empty if it has none."""
        place = self._places[group][pass_index][True]
        return self._verified(place) if place >= 0 else memoryview(b"")

    def _verified(self, place: int) -> memoryview:
        begin, length = self._offsets[place], self._lengths[place]
        end = begin + length
        body = self._data[begin:end]
        if xxhash.xxh3_64_intdigest(body) != self._checksums[place]:
            segment = self.header.segments[place]
            label = self.header.groups[segment.group].label
            raise ChecksumError(
                f"checksum of segment {label} pass {segment.pass_index}",
                got="damaged bytes",
                expected=f"{segment.checksum:016x}",
                remedy="the object is damaged: fetch or encode it again",
            )
        if length % ALIGNMENT and any(self._data[end : begin + padded(length)]):
            raise CorruptError("segment padding", got="non-zero bytes", expected="zero bytes")
        return body

    def verify(self) -> None:
        """Check every segment that is present. Raises: ChecksumError, CorruptError."""
        for place in range(self._whole):
            self._verified(place)
