"""The library's own codecs as peers: real objects, real bytes, every one of them billed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.bench.baselines.base import Bill, Peer, Point, Prefix
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.container import SIDE, read_header
from cachegen.codec.header import Header
from cachegen.codec.levels import NAMED, prefix_bytes, relative_distortions
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.codec.side import GroupSide
from cachegen.codec.summary import summarize
from cachegen.profile import Profile

# Operating points of stored objects: a label, and for each object how many of its bytes are read.
Cuts = Callable[[Sequence[bytes]], list[tuple[str, list[int]]]]
# Points of a nested codec's curve, evenly spaced in log bytes.
CURVE_POINTS = 10


def named_levels(objects: Sequence[bytes]) -> list[tuple[str, list[int]]]:
    """Levels by their names: each object is read as far as it says it has to be."""
    headers = [read_header(data, max_decoded_bytes=1 << 62) for data in objects]
    return [(name, [prefix_bytes(header, name) for header in headers]) for name in NAMED]


def whole_objects(objects: Sequence[bytes]) -> list[tuple[str, list[int]]]:
    """The one operating point of a codec without levels: everything is read."""
    return [("", [len(data) for data in objects])]


@dataclass(frozen=True)
class SlopeCuts:
    """Levels of nested objects: a prefix of each, ended where distortion per byte falls too low.

    count: operating points, 2 or more, from pass 0 alone to everything, evenly spaced in log bytes.

    All chunks of a context share one slope, which is what a planner with one budget for all of
    them reads. A prefix ends at a vertex of the lower convex hull of (bytes, distortion left).
    """

    count: int = 6

    def __call__(self, objects: Sequence[bytes]) -> list[tuple[str, list[int]]]:
        """Return ``count`` operating points. Raises: FormatError."""
        hulls = [_Hull.of(data) for data in objects]
        slopes = np.unique(np.concatenate([hull.slopes for hull in hulls]))[::-1]
        # Reading nothing but pass 0 is an infinite slope.
        choices = [[hull.read(slope) for hull in hulls] for slope in (np.inf, *slopes)]
        totals = np.array([sum(lengths) for lengths in choices], np.float64)
        targets = np.geomspace(totals[0], totals[-1], self.count)
        nearest = np.abs(np.log(totals)[:, None] - np.log(targets)).argmin(axis=0)
        return [(f"cut {index}", choices[choice]) for index, choice in enumerate(nearest)]


@dataclass(frozen=True)
class _Hull:
    """Vertices of the lower convex hull of one object's (bytes read, distortion left).

    lengths: (n,) ascending, the first one ends pass 0. slopes: (n - 1,) descending, > 0.
    """

    lengths: NDArray[np.int64]
    slopes: NDArray[np.float64]

    @classmethod
    def of(cls, data: bytes) -> _Hull:
        left: dict[int, float] = {}
        hull: list[tuple[int, float]] = []
        for segment in read_header(data, max_decoded_bytes=1 << 62).segments:
            if segment.kind == SIDE:
                continue
            left[segment.group] = segment.distortion
            point = segment.offset + segment.length, sum(left.values())
            if segment.pass_index == 0:
                hull = [point]
                continue
            if point[1] >= hull[-1][1]:
                continue
            while _bends_up(hull, point):
                hull.pop()
            hull.append(point)
        lengths, distortions = np.array([p[0] for p in hull]), np.array([p[1] for p in hull])
        return cls(lengths, -np.diff(distortions) / np.diff(lengths))

    def read(self, slope: float) -> int:
        """Return the bytes up to which every step removes at least ``slope`` per byte."""
        return int(self.lengths[np.count_nonzero(self.slopes >= slope)])


def _bends_up(hull: list[tuple[int, float]], point: tuple[int, float]) -> bool:
    """True if the last vertex lies on or above the line from the one before it to the point."""
    if len(hull) < 2:
        return False
    (x0, y0), (x1, y1), (x2, y2) = hull[-2], hull[-1], point
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)


class CodecPeer(Peer):
    """A codec of the registry, in chunks.

    family: name of its curve. label: of this operating point. cuts: how one stored object gives
    several operating points; their labels are appended. names: levels by name, beside the curve.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        family: str,
        label: str = "",
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        cuts: Cuts = whole_objects,
        names: Cuts | None = None,
    ) -> None:
        self.codec = codec
        self.family = family
        self.label = label
        self.chunk_tokens = chunk_tokens
        self.cuts = cuts
        self.names = names

    @property
    def profile(self) -> Profile | None:
        """The profile that encoder and decoder share, if any."""
        profile: Profile | None = getattr(self.codec, "profile", None)
        return profile

    @property
    def calibration_bytes(self) -> int:
        """Bytes of the profile's arrays."""
        arrays = self.profile.arrays.values() if self.profile else ()
        return sum(int(array.nbytes) for array in arrays)

    def points(self, prefix: Prefix) -> list[Point]:
        """Encode every chunk once; decode it as far as each operating point reads."""
        objects = [self.codec.encode(chunk) for chunk in prefix.kv.split(self.chunk_tokens)]
        asked = [(*cut, False) for cut in self.cuts(objects)]
        asked += [(*cut, True) for cut in self.names(objects)] if self.names else []
        points = []
        decoded: dict[tuple[int, ...], KVChunk] = {}
        for label, lengths, named in asked:
            read = [data[:length] for data, length in zip(objects, lengths, strict=True)]
            bill = sum((bill_of(data) for data in read), Bill())
            partial = lengths != [len(data) for data in objects]
            if tuple(lengths) not in decoded:
                decoded[tuple(lengths)] = KVChunk.concat(
                    [decode(data, allow_partial=partial, profile=self.profile) for data in read]
                )
            name = " ".join(part for part in (self.label, label) if part)
            left = distortion_left(objects, lengths)
            chunk = decoded[tuple(lengths)]
            points.append(Point(name, bill, chunk, named=named, distortion=left))
        return points


def bill_of(data: bytes) -> Bill:
    """Bill one object, or a prefix of one: its header, padding and lane states are side bytes."""
    summary = summarize(data, allow_partial=True)
    named = sum(group.side_bytes for group in summary.groups)
    exempt = exempt_bytes(data, summary.header)
    framing = summary.total_bytes - summary.payload_bytes - named
    return Bill(summary.payload_bytes, framing + named - exempt, exempt, framing)


def exempt_bytes(data: bytes, header: Header) -> int:
    """Return the bytes of tokens that a ``progressive`` object stores exactly."""
    if header.codec_id != ProgressiveCodec.codec_id:
        return 0
    total = 0
    for segment in header.segments:
        if segment.kind != SIDE:
            continue
        tokens, channels, _ = ProgressiveCodec.coded_shape(header, segment.group, 0)
        side = GroupSide.from_bytes(
            memoryview(data)[segment.offset : segment.offset + segment.length],
            tokens,
            channels,
            header.geometry.dtype,
            plain=header.profile is None,
        )
        total += side.exempt_rows.nbytes + 4 * len(side.exempt_tokens)
    return total


def distortion_left(objects: Sequence[bytes], lengths: Sequence[int]) -> float | None:
    """Return the mean relative distortion that objects state for what is read of them."""
    left = []
    for data, length in zip(objects, lengths, strict=True):
        header = read_header(data, max_decoded_bytes=1 << 62)
        if header.codec_id != ProgressiveCodec.codec_id:
            return None
        left.append([d for size, d in relative_distortions(header) if size <= length][-1])
    return float(np.mean(left))
