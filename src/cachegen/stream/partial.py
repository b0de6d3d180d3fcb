"""An object of which only a prefix is here yet: its header, its bytes, its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cachegen.codec.container import read_header, read_header_size
from cachegen.codec.header import Header
from cachegen.codec.levels import prefix_bytes, relative_distortions
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.errors import KeyMismatchError, TruncatedError
from cachegen.stream.plan import ChunkCurve, Step
from cachegen.types import ChunkKey

# Holds the header of any but the widest objects; what is too much is payload that is needed anyway.
HEADER_READ_BYTES = 8192
_SIZED_BYTES = 16
# Nothing coarser is handed over: who gets that in time is worse off than who computes.
LEAST_QUALITY = "small"
_UNBOUNDED_BYTES = 1 << 62


def curve_of(header: Header, quality: str | None) -> ChunkCurve:
    """Return what reading more of an object brings.

    quality: a named quality of ``codec.levels`` beyond which nothing is read; None for all.
    The first step is what ``LEAST_QUALITY`` needs. A codec other than ``progressive`` has one
    quality: the whole object.
    """
    if header.codec_id != ProgressiveCodec.codec_id:
        steps = (Step(header.object_bytes, 0.0),)
        return ChunkCurve(header.tokens, header.first_position, steps)
    points = relative_distortions(header)
    # Whoever wants everything wants the padding behind the last segment too.
    points[-1] = (header.object_bytes, points[-1][1])
    most = header.object_bytes if quality is None else prefix_bytes(header, quality)
    least = min(prefix_bytes(header, LEAST_QUALITY), most)
    points = [point for point in points if least <= point[0] <= most] or points[-1:]
    return ChunkCurve.of_points(points, tokens=header.tokens, begin_token=header.first_position)


def curve_of_versions(headers: Sequence[Header]) -> ChunkCurve:
    """Return the choice between objects of a chunk, in rising order of length.

    Distortion is relative to the coarsest one's: their tables share a unit, but not a scale.
    """
    left = [max(_error_left(header), 1e-30) for header in headers]
    steps, lowest = [], 1.0
    for header, error in zip(headers, left, strict=True):
        lowest = min(lowest, error / left[0])
        steps.append(Step(header.object_bytes, lowest))
    head = headers[0]
    return ChunkCurve(head.tokens, head.first_position, tuple(steps), separate=True)


def _error_left(header: Header) -> float:
    """Return the squared error that the whole object leaves, by its table."""
    left = {segment.group: segment.distortion for segment in header.segments}
    return math.fsum(left.values())


@dataclass(eq=False)
class ObjectState:
    """One object that may serve a chunk.

    asked_bytes: end of the reads that were sent. have_bytes: all before it is here.
    limit_bytes: where the first read that failed began; nothing beyond is asked for any more.
    """

    key: ChunkKey
    header: Header | None = None
    asked_bytes: int = 0
    have_bytes: int = 0
    limit_bytes: int = _UNBOUNDED_BYTES
    missing: bool = False
    _parts: list[bytes] = field(default_factory=list)
    _early: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def left_bytes(self) -> int:
        """How much of the object is not here; 1 while its length is unknown."""
        return 1 if self.header is None else max(0, self.header.object_bytes - self.have_bytes)

    @property
    def is_cut(self) -> bool:
        """True if a read of it failed."""
        return self.limit_bytes < _UNBOUNDED_BYTES

    @property
    def header_bytes(self) -> int:
        """How far to read for the header: a guess until the first bytes are here."""
        if self.have_bytes < _SIZED_BYTES:
            return HEADER_READ_BYTES
        return read_header_size(self.prefix(_SIZED_BYTES))

    @property
    def held_bytes(self) -> int:
        """Bytes in memory, those that came early included."""
        return sum(map(len, self._parts)) + sum(len(data) for _, data in self._early)

    def take(self, begin: int, data: bytes) -> None:
        """Add the bytes at an offset; parses the header once it is whole.

        Bytes may come out of order and more than once. Raises: FormatError, KeyMismatchError.
        """
        self._early.append((begin, data))
        self._early.sort(key=lambda part: part[0])
        while self._early and self._early[0][0] <= self.have_bytes:
            start, part = self._early.pop(0)
            fresh = part[self.have_bytes - start :]
            if fresh:
                self._parts.append(fresh)
                self.have_bytes += len(fresh)
        if self.header is None and self.have_bytes >= _SIZED_BYTES:
            size = read_header_size(self.prefix(_SIZED_BYTES))
            if self.have_bytes >= size:
                self._parse(size)

    def _parse(self, size: int) -> None:
        header = read_header(self.prefix(size), max_decoded_bytes=_UNBOUNDED_BYTES)
        if header.key != self.key:
            stored = header.key.name if header.key else "no key"
            raise KeyMismatchError("chunk key", got=stored, expected=self.key.name)
        self.header = header
        self.asked_bytes = min(self.asked_bytes, header.object_bytes)

    def check_end(self, begin: int, end: int, got_bytes: int) -> None:
        """Check the length of the answer to a read. Raises: TruncatedError if bytes are missing."""
        whole = end if self.header is None else min(end, self.header.object_bytes)
        if begin + got_bytes < whole:
            raise TruncatedError(
                "object in the store",
                got=f"{begin + got_bytes} bytes",
                expected=f"at least {whole} bytes",
                remedy="it was cut short: encode it again",
            )

    def prefix(self, size: int) -> bytes:
        """Return the first bytes."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0][:size] if self._parts else b""

    def drop(self) -> None:
        """Free the bytes."""
        self._parts.clear()
        self._early.clear()
