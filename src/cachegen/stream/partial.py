"""An object of which only a prefix is here yet: its header, its curve, its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cachegen.codec.container import SIDE, read_header, read_header_size
from cachegen.codec.header import Header
from cachegen.errors import KeyMismatchError, TruncatedError
from cachegen.types import ChunkKey

# Holds the header of any but the widest objects; what is too much is payload that is needed anyway.
HEADER_READ_BYTES = 8192
_SIZED_BYTES = 16
_UNBOUNDED_BYTES = 1 << 62


def curve_of(header: Header) -> tuple[tuple[int, float], ...]:
    """Return (prefix bytes, squared error left) of every prefix that decodes, shortest first."""
    left = [0.0] * len(header.groups)
    points = []
    segments = header.segments
    for index, segment in enumerate(segments):
        if segment.kind == SIDE:
            continue
        left[segment.group] = segment.distortion
        if index + 1 == len(segments) or segments[index + 1].pass_index > 0:
            points.append((segment.offset + segment.length, math.fsum(left)))
    # The whole object includes the padding after its last segment.
    points[-1] = (header.object_bytes, points[-1][1])
    return tuple(points)


@dataclass(eq=False)
class ObjectState:
    """One object that may serve a chunk, and how much of it is here.

    asked_bytes: end of the reads that were sent. have_bytes: all before it is here.
    """

    key: ChunkKey
    header: Header | None = None
    curve: tuple[tuple[int, float], ...] = ()
    asked_bytes: int = 0
    have_bytes: int = 0
    missing: bool = False
    _parts: dict[int, bytes] = field(default_factory=dict)
    _early: dict[int, bytes] = field(default_factory=dict)

    @property
    def wanted_header_bytes(self) -> int:
        """How much of the beginning has to be read before the segment table is known."""
        if self.header is not None or self.missing:
            return 0
        if self.have_bytes < _SIZED_BYTES:
            return HEADER_READ_BYTES
        return read_header_size(self.prefix(_SIZED_BYTES))

    def take(self, begin: int, data: bytes) -> None:
        """Add bytes at an offset; parses the header once it is whole. Raises: FormatError."""
        self._early[begin] = data
        while (part := self._early.pop(self.have_bytes, None)) is not None:
            if part:
                self._parts[self.have_bytes] = part
                self.have_bytes += len(part)
        if self.header is None and self.have_bytes >= _SIZED_BYTES:
            size = read_header_size(self.prefix(_SIZED_BYTES))
            if self.have_bytes >= size:
                header = read_header(self.prefix(size), max_decoded_bytes=_UNBOUNDED_BYTES)
                if header.key != self.key:
                    raise KeyMismatchError("chunk key", got="another", expected=self.key.name)
                self.header, self.curve = header, curve_of(header)
                if self.have_bytes > header.object_bytes:
                    raise TruncatedError(
                        "object", got=f"{self.have_bytes} bytes", expected=header.object_bytes
                    )
                self.asked_bytes = min(self.asked_bytes, header.object_bytes)

    def prefix(self, size: int) -> bytes:
        """Return the first bytes, at most as many as are here."""
        return b"".join(self._parts.values())[:size]

    def level(self) -> int | None:
        """Return the index of the best point of the curve that is here, or None."""
        best = None
        for index, (size, _) in enumerate(self.curve):
            if size <= self.have_bytes:
                best = index
        return best

    def drop(self) -> None:
        """Free the bytes."""
        self._parts.clear()
        self._early.clear()
