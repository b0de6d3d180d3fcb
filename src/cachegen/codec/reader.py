"""Reading one object: header, passes that are whole, verified segments."""

from __future__ import annotations

import xxhash

from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, SIDE, Buffer, read_header
from cachegen.codec.header import Segment
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
        self._passes = [0] * len(self.header.groups)
        self._segments = {}
        for segment in self.header.segments:
            if segment.offset + segment.length > size:
                break  # payload is in the order of the table
            is_side = segment.kind == SIDE
            self._segments[segment.group, segment.pass_index, is_side] = segment
            if not is_side:
                self._passes[segment.group] += 1
        if 0 in self._passes:
            raise TruncatedError(
                "object",
                got=f"{size} bytes",
                expected="at least every pass 0",
                remedy="fetch more of it",
            )

    def passes_of(self, group: int) -> int:
        """Return how many passes of a group are whole."""
        return self._passes[group]

    def segment(self, group: int, pass_index: int) -> tuple[Segment, memoryview]:
        """Return the coded segment of a pass and its verified bytes. Raises: ChecksumError."""
        segment = self._segments[group, pass_index, False]
        return segment, self._verified(segment)

    def side(self, group: int, pass_index: int) -> memoryview:
        """Return the verified side information of a pass; empty if it has none."""
        segment = self._segments.get((group, pass_index, True))
        return self._verified(segment) if segment else memoryview(b"")

    def _verified(self, segment: Segment) -> memoryview:
        end, padded_end = segment.offset + segment.length, segment.end
        body = self._data[segment.offset : end]
        if xxhash.xxh3_64_intdigest(body) != segment.checksum:
            label = self.header.groups[segment.group].label
            raise ChecksumError(
                f"checksum of segment {label} pass {segment.pass_index}",
                got="damaged bytes",
                expected=f"{segment.checksum:016x}",
                remedy="the object is damaged: fetch or encode it again",
            )
        if padded_end > end and any(self._data[end:padded_end]):
            raise CorruptError("segment padding", got="non-zero bytes", expected="zero bytes")
        return body

    def verify(self) -> None:
        """Check every segment that is present. Raises: ChecksumError, CorruptError."""
        for segment in self._segments.values():
            self._verified(segment)
