"""The object container, version 1: the only module that knows offsets. Its law is FORMAT.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec.header import (
    ALIGNMENT,
    Group,
    Header,
    SegmentBody,
    SegmentTable,
    padded,
    plane_groups,
)
from cachegen.errors import (
    ChecksumError,
    CorruptError,
    GeometryError,
    LimitError,
    MagicError,
    TruncatedError,
    VersionError,
)
from cachegen.types import ChunkKey, Geometry, KVDtype, RopeSpec

MAGIC = b"CGKV"
VERSION = 1

MAX_HEADER_BYTES = 16 << 20
MAX_ROPE_BYTES = 1 << 20
MAX_SEGMENTS = 1 << 18
MAX_SEGMENT_BYTES = (1 << 31) - 1
MAX_PASSES = 16
MAX_GROUPS = 2048
MAX_POSITION = 1 << 40
DEFAULT_MAX_DECODED_BYTES = 1 << 30

_FIXED = struct.Struct("<4sHHIIQHHHHIIQBBBBHHII")
_PREFIX = struct.Struct("<4sHHII")
_SEGMENT = np.dtype(
    [
        ("checksum", "<u8"),
        ("length", "<u4"),
        ("distortion", "<f4"),
        ("group", "<u2"),
        ("pass", "u1"),
        ("kind", "u1"),
    ]
)
_GROUP = np.dtype([("layer", "<u2"), ("layers", "<u2"), ("planes", "u1"), ("zero", "u1")])
_CHECKSUM_AT = slice(16, 24)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_RAGGED, _KEYED, _PROFILED = 1, 2, 4

SIDE, RANS, PACKED, BYTES, SPARSE = 0, 1, 2, 3, 4
KIND_NAMES = {SIDE: "side", RANS: "rans", PACKED: "packed", BYTES: "bytes", SPARSE: "sparse"}

Buffer = bytes | bytearray | memoryview


def write_object(
    chunk: KVChunk,
    *,
    codec_id: int,
    passes: int,
    params: bytes,
    segments: Sequence[SegmentBody],
    groups: Sequence[Group] | None = None,
    rope: RopeSpec | None = None,
    profile: bytes | None = None,
    key: ChunkKey | None = None,
) -> bytes:
    """Serialise a chunk's segments into one object.

    segments: in payload order, see FORMAT.md. groups: None for one plane per group.
    rope: only where the codec has undone it; None leaves the keys flagged as cached.
    Returns: the object's bytes. Raises: LimitError if a field is beyond its cap.
    """
    geometry = chunk.geometry
    ragged = not chunk.is_uniform
    flags = _RAGGED * ragged | _KEYED * (key is not None) | _PROFILED * (profile is not None)
    blocks = [key.to_bytes() if key else b"", profile or b"", params]
    blocks.append(rope.to_bytes() if rope else b"")
    group_count = len(groups) if groups is not None else 2 * geometry.layers
    if groups is not None:
        table = np.zeros(len(groups), _GROUP)
        for row, group in zip(table, groups, strict=True):
            row["layer"], row["layers"], row["planes"] = group.layer, group.layers, group.planes
        blocks.append(table.tobytes())
    if ragged:
        ranges = [(layer.begin, layer.tokens) for layer in chunk.layers]
        blocks.append(np.array(ranges, "<u4").tobytes())
    rows: list[tuple[int, int, float, int, int, int]] = []
    payload: list[bytes | memoryview] = []
    for segment in segments:
        size, kind = len(segment.body), segment.kind | segment.bits << 4
        if size > MAX_SEGMENT_BYTES:
            raise LimitError("segment bytes", got=size, expected=MAX_SEGMENT_BYTES)
        checksum = xxhash.xxh3_64_intdigest(segment.body)
        distortion = min(segment.distortion, _LARGEST_FLOAT)
        rows.append((checksum, size, distortion, segment.group, segment.pass_index, kind))
        payload += [segment.body, bytes(-size % 4)]
    table = np.array(rows, _SEGMENT)
    blocks.append(table.tobytes())
    body = b"".join(block + bytes(-len(block) % 4) for block in blocks)
    header_bytes = _FIXED.size + len(body)
    for name, size, cap in (
        ("header bytes", header_bytes, MAX_HEADER_BYTES),
        ("segments", len(segments), MAX_SEGMENTS),
        ("codec parameter bytes", len(params), 0xFFFF),
        ("RoPE block bytes", len(blocks[3]), MAX_ROPE_BYTES),
        ("first position", chunk.first_position, MAX_POSITION - 1),
    ):
        if size > cap:
            raise LimitError(name, got=size, expected=f"at most {cap}")
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        flags,
        header_bytes,
        0,
        0,
        geometry.layers,
        geometry.kv_heads,
        geometry.key_dim,
        geometry.value_dim,
        chunk.tokens,
        len(segments),
        chunk.first_position,
        geometry.dtype.value,
        codec_id,
        passes,
        groups is not None,
        group_count,
        len(params),
        len(blocks[3]),
        0,
    )
    header = bytearray(fixed + body)
    header[_CHECKSUM_AT] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(header)))
    return b"".join([bytes(header), *payload])


def read_header_size(prefix: Buffer) -> int:
    """Return the header length from the first 16 bytes of an object, for ranged reads.

    Raises: TruncatedError, MagicError, VersionError, LimitError.
    """
    if len(prefix) == 0:
        raise TruncatedError(
            "object", got="0 bytes", expected="a header", remedy="the file or object is empty"
        )
    magic = bytes(prefix[:4])
    if magic != MAGIC[: len(magic)]:
        raise MagicError(
            "magic number", got=magic, expected=MAGIC, remedy="is this a .cgen object?"
        )
    if len(prefix) < _PREFIX.size:
        raise TruncatedError("object", got=f"{len(prefix)} bytes", expected="a whole header")
    _, version, flags, header_bytes, reserved = _PREFIX.unpack_from(prefix)
    if version != VERSION:
        raise VersionError(
            "format version", got=version, expected=VERSION, remedy="update cachegen or re-encode"
        )
    if flags & ~(_RAGGED | _KEYED | _PROFILED) or reserved:
        raise CorruptError("header flags", got=(flags, reserved), expected="known flags only")
    if not _FIXED.size <= header_bytes <= MAX_HEADER_BYTES or header_bytes % 4:
        raise LimitError(
            "header length",
            got=header_bytes,
            expected=f"{_FIXED.size} to {MAX_HEADER_BYTES}, a multiple of 4",
        )
    return int(header_bytes)


class _Cursor:
    """Walks the variable blocks of a header; every step is checked before it is taken."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, length: int, what: str) -> bytes:
        end = self.offset + padded(length)
        if end > len(self.data):
            raise CorruptError(what, got=f"{length} bytes", expected="a block within the header")
        block = self.data[self.offset : self.offset + length]
        if any(self.data[self.offset + length : end]):
            raise CorruptError(what, got="non-zero padding", expected="zero bytes")
        self.offset = end
        return block


def read_header(data: Buffer, *, max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES) -> Header:
    """Parse and check the header of an object; data may end anywhere after the header.

    Raises: FormatError (one of its subclasses) for anything that is not sound, LimitError
        also if the object would decode to more than max_decoded_bytes.
    """
    header_bytes = read_header_size(data)
    if len(data) < header_bytes:
        raise TruncatedError(
            "object", got=f"{len(data)} bytes", expected=f"a header of {header_bytes} bytes"
        )
    raw = bytearray(data[:header_bytes])
    (stored,) = struct.unpack("<Q", raw[_CHECKSUM_AT])
    raw[_CHECKSUM_AT] = bytes(8)
    actual = xxhash.xxh3_64_intdigest(bytes(raw))
    if actual != stored:
        raise ChecksumError(
            "header checksum",
            got=f"{actual:016x}",
            expected=f"{stored:016x}",
            remedy="the object is damaged: fetch or encode it again",
        )
    header = _parse(bytes(raw))
    if header.decoded_bytes > max_decoded_bytes:
        raise LimitError(
            "decoded size",
            got=f"{header.decoded_bytes} bytes",
            expected=f"at most {max_decoded_bytes}",
            remedy="raise max_decoded_bytes if you trust the source",
        )
    return header


def _parse(raw: bytes) -> Header:
    (_, _, flags, header_bytes, _, _, layers, heads, key_dim, value_dim, tokens, n_segments) = (
        fixed := _FIXED.unpack_from(raw)
    )[:12]
    position, dtype, codec_id, passes, grouping, n_groups, n_params, n_rope, reserved = fixed[12:]
    if dtype not in {kind.value for kind in KVDtype} or grouping > 1 or reserved:
        raise CorruptError("header fields", got=(dtype, grouping, reserved))
    for name, value, low, high in (
        ("tokens", tokens, 1, 1 << 24),
        ("segments", n_segments, 1, MAX_SEGMENTS),
        ("passes", passes, 1, MAX_PASSES),
        ("groups", n_groups, 1, MAX_GROUPS),
        ("RoPE block bytes", n_rope, 0, MAX_ROPE_BYTES),
        ("first position", position, 0, MAX_POSITION - 1),
    ):
        if not low <= value <= high:
            raise LimitError(name, got=value, expected=f"{low} to {high}")
    try:
        geometry = Geometry(layers, heads, key_dim, value_dim, KVDtype(dtype))
    except GeometryError as error:
        raise LimitError(error.what, got=error.got, expected=error.expected) from None
    cursor = _Cursor(raw, _FIXED.size)
    key = ChunkKey.from_bytes(cursor.take(96, "key")) if flags & _KEYED else None
    profile = cursor.take(32, "profile digest") if flags & _PROFILED else None
    params = cursor.take(n_params, "codec parameters")
    rope_block = cursor.take(n_rope, "RoPE block")
    rope = RopeSpec.from_bytes(rope_block) if n_rope else None
    if rope is not None and len(rope.layer_kinds) != layers:
        raise CorruptError("RoPE layers", got=len(rope.layer_kinds), expected=layers)
    if grouping:
        groups = _parse_groups(cursor.take(n_groups * _GROUP.itemsize, "groups"), layers)
    elif n_groups != 2 * layers:
        raise CorruptError("groups", got=n_groups, expected=2 * layers)
    else:
        groups = plane_groups(layers)
    ranges = [(0, tokens)] * layers
    if flags & _RAGGED:
        table = np.frombuffer(cursor.take(8 * layers, "layer ranges"), "<u4").reshape(layers, 2)
        ranges = [(int(begin), int(begin) + int(count)) for begin, count in table]
        if any(end > tokens for _, end in ranges):
            raise CorruptError("layer ranges", got="a range beyond the chunk", expected=tokens)
    entries = np.frombuffer(cursor.take(n_segments * _SEGMENT.itemsize, "segments"), _SEGMENT)
    if cursor.offset != header_bytes:
        raise CorruptError("header length", got=header_bytes, expected=cursor.offset)
    segments = _parse_segments(entries, header_bytes, len(groups), passes)
    return Header(
        geometry,
        tokens,
        position,
        codec_id,
        passes,
        params,
        rope,
        profile,
        key,
        groups,
        tuple(ranges),
        segments,
        header_bytes,
    )


def _parse_groups(block: bytes, layers: int) -> tuple[Group, ...]:
    seen = np.zeros((layers, 2), np.uint8)
    groups = []
    for row in np.frombuffer(block, _GROUP):
        first, count, planes = int(row["layer"]), int(row["layers"]), int(row["planes"])
        if not 1 <= planes <= 3 or count < 1 or first + count > layers or row["zero"]:
            raise CorruptError("group", got=(first, count, planes), expected=f"{layers} layers")
        seen[first : first + count, 0] += planes & 1
        seen[first : first + count, 1] += planes >> 1
        groups.append(Group(first, count, planes))
    if not np.all(seen == 1):
        raise CorruptError("groups", got="planes missing or doubled", expected="each plane once")
    return tuple(groups)


def _parse_segments(entries: np.ndarray, offset: int, n_groups: int, passes: int) -> SegmentTable:
    """Check the order of the table (FORMAT.md, "Segment table") and derive the offsets."""
    group, index = entries["group"].astype(np.int64), entries["pass"].astype(np.int64)
    kind, bits = entries["kind"] & 15, entries["kind"] >> 4
    length, distortion = entries["length"].astype(np.int64), entries["distortion"]

    def check(sound: NDArray[np.bool_], what: str, expected: object) -> None:
        if not sound.all():
            at = int(sound.argmin())
            got = tuple(int(column[at]) for column in (group, index, kind, bits))
            raise CorruptError(what, got=got, expected=expected)

    packed = (kind == PACKED) & (bits >= 1) & (bits <= 8)
    known = (kind <= SPARSE) & (packed | ((kind != PACKED) & (bits == 0)))
    check(known & (group < n_groups) & (index < passes), "segment", "known values")
    if np.any(length > MAX_SEGMENT_BYTES) or not np.all(
        (distortion >= 0) & np.isfinite(distortion)
    ):
        worst = int(length.max()), float(distortion.max())
        raise LimitError("segment length or distortion", got=worst)
    # Side information stands in front of the pass it belongs to, and passes are in order.
    order = np.argsort(group, kind="stable")
    side, owner = (kind == SIDE)[order], group[order]
    first = np.r_[True, owner[1:] != owner[:-1]]
    coded = np.cumsum(~side)
    done = coded - ~side - (coded - ~side)[np.flatnonzero(first)][np.cumsum(first) - 1]
    doubled = side & np.r_[False, side[:-1]] & ~first
    in_order = np.empty(len(order), bool)
    in_order[order] = (index[order] == done) & ~doubled
    check(in_order, "segment order", "passes in order, side information before its pass")
    late = (index == 0) & (np.maximum.accumulate(index) > 0)
    check(~late, "segment order", "pass 0 first")
    last = np.r_[first[1:], True]
    whole = not np.any(last & (side | (done + 1 != passes)))
    if int(first.sum()) != n_groups or not whole:
        raise CorruptError("segments", got="a group without all its passes", expected=passes)
    padded_length = (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    offsets = offset + np.cumsum(padded_length) - padded_length
    checksum = entries["checksum"]
    return SegmentTable(group, index, kind, offsets, length, checksum, distortion, bits)
