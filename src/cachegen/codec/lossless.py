"""The ``lossless`` codec: every bit kept, exponents and signs entropy-coded, mantissas raw.

Neighbouring values of a channel have neighbouring exponents and mostly one sign; their mantissas
are noise. Channels are moved to a common place (largest exponent first, commoner sign first), so
that a few tables, sent with each plane, fit all of them. The law of its bytes is FORMAT.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec, check_one_plane_per_group, planes_of
from cachegen.codec.container import BYTES, SIDE, write_object
from cachegen.codec.entropy import normalize_counts, pack, unpack
from cachegen.codec.header import SegmentBody
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import Array, ChunkKey, KVDtype

Symbols = NDArray[np.uint8]
Bits = NDArray[np.uint32]

# Bits of exponent and mantissa.
_FIELDS = {KVDtype.FLOAT16: (5, 10), KVDtype.BFLOAT16: (8, 7), KVDtype.FLOAT32: (8, 23)}
ALPHABET = 32
ESCAPE = ALPHABET - 1
# A distance that stands for an exponent in the list: infinite, NaN, or very far below the top.
LISTED = 127
MAX_TABLES = 16
FLIP = 0x80
STREAM_STEPS = 4096
_ROUNDS = 4
_COUNT = struct.Struct("<I")


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
        segments: list[SegmentBody] = []
        for group, plane in enumerate(planes_of(chunk)):
            segments += _encode_plane(group, plane, chunk.geometry.dtype)
        return write_object(
            chunk, codec_id=self.codec_id, passes=1, params=b"", segments=segments, key=key
        )

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_one_plane_per_group(header)
        if header.params or header.passes != 1:
            raise CorruptError(
                "lossless parameters", got=(header.params, header.passes), expected="none"
            )
        for group in range(len(header.groups)):
            segment, body = reader.segment(group, 0)
            side = reader.side(group, 0)
            with target.writing(group // 2, is_value=group % 2 == 1) as plane:
                if segment.kind != BYTES or (not len(side) and len(body) != plane.nbytes):
                    raise CorruptError(
                        "lossless segment", got=f"{len(body)} bytes", expected=plane.nbytes
                    )
                if len(side):
                    _decode_plane(side, body, plane, header.geometry.dtype)
                else:
                    plane[:] = np.frombuffer(body, plane.dtype).reshape(plane.shape)


def _encode_plane(group: int, plane: Array, dtype: KVDtype) -> list[SegmentBody]:
    raw = np.ascontiguousarray(plane)
    if raw.size:
        side, body = _code(_matrix(raw), dtype)
        if len(side) + len(body) < raw.nbytes:
            return [SegmentBody(group, 0, SIDE, side), SegmentBody(group, 0, BYTES, body)]
    return [SegmentBody(group, 0, BYTES, raw.tobytes())]


def _matrix(plane: Array) -> Bits:
    """View (T, H, D) values as their bits, (T, C) uint32."""
    bits = plane.view(f"<u{plane.dtype.itemsize}")
    return bits.reshape(len(plane), plane.shape[1] * plane.shape[2]).astype(np.uint32)


def _code(bits: Bits, dtype: KVDtype) -> tuple[bytes, bytes]:
    """Return the side information and the coded segment of a plane."""
    exponent_bits, mantissa_bits = _FIELDS[dtype]
    infinite = (1 << exponent_bits) - 1
    sign = (bits >> np.uint32(exponent_bits + mantissa_bits)).astype(np.uint8)
    exponent = ((bits >> np.uint32(mantissa_bits)) & np.uint32(infinite)).astype(np.int64)
    top = np.where(exponent < infinite, exponent, 0).max(axis=0)
    flip = 2 * sign.sum(axis=0, dtype=np.int64) > len(sign)
    distance = np.where(exponent == 0, 0, top + 1 - exponent)
    listed = (distance >= LISTED) | (exponent == infinite)
    distance[listed] = LISTED
    symbols = (2 * distance + (sign ^ flip)).astype(np.uint8)
    freqs, classes = _fit_tables(symbols)
    tables = native.Tables(freqs, np.full(len(freqs), ESCAPE, np.uint8))
    coded = native.encode_segment(
        symbols, classes.astype(np.uint16), tables, stream_steps=STREAM_STEPS
    )
    side = b"".join(
        [
            bytes([len(freqs), 0, 0, 0]),
            freqs.astype("<u2").tobytes(),
            top.astype(np.uint8).tobytes(),
            (classes + FLIP * flip).astype(np.uint8).tobytes(),
            exponent[listed].astype(np.uint8).tobytes(),
        ]
    )
    widths = _byte_widths(mantissa_bits)
    planes = [
        pack(((bits >> np.uint32(8 * index)) & np.uint32((1 << width) - 1)).astype(np.uint8), width)
        for index, width in enumerate(widths)
    ]
    return side, b"".join([_COUNT.pack(len(coded)), coded, *planes])


def _byte_widths(bits: int) -> list[int]:
    """Cut a number of bits into bytes, low ones first."""
    return [min(8, bits - begin) for begin in range(0, bits, 8)]


def _fit_tables(symbols: Symbols) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Choose 1 to 16 tables and one of them for every channel, by the bits they take in all.

    Returns: frequencies (n, 32) uint16, the index of each channel's table (C,).
    """
    channels = symbols.shape[1]
    flat = np.minimum(symbols, ESCAPE).astype(np.int64) + ALPHABET * np.arange(channels)
    counted = np.bincount(flat.ravel(), minlength=ALPHABET * channels)
    counts: NDArray[np.float64] = counted.reshape(channels, ALPHABET).astype(np.float64)
    # How far symbols lie from the top, in the mean, orders channels from narrow to wide.
    order = np.argsort((counts * np.arange(ALPHABET)).sum(axis=1), kind="stable")
    best: tuple[float, NDArray[np.uint16], NDArray[np.int64]] | None = None
    number = 1
    while number <= min(MAX_TABLES, channels):
        classes = np.empty(channels, np.int64)
        classes[order] = np.arange(channels) * number // channels
        freqs = _tables_of(counts, classes, number)
        for _ in range(_ROUNDS if number > 1 else 0):
            classes = (counts @ _costs(freqs).T).argmin(axis=1)
            freqs = _tables_of(counts, classes, number)
        payload = float((counts * _costs(freqs)[classes]).sum())
        total = payload + 16 * ALPHABET * number
        if best is None or total < best[0]:
            best = total, freqs, classes
        number *= 2
    assert best is not None
    return best[1], best[2]


def _tables_of(
    counts: NDArray[np.float64], classes: NDArray[np.int64], number: int
) -> NDArray[np.uint16]:
    """Return one table for each class, in which every symbol of the plane can be coded."""
    everywhere = counts.sum(axis=0)
    sums = np.stack([counts[classes == index].sum(axis=0) for index in range(number)])
    return normalize_counts(np.where(everywhere > 0, np.rint(sums) + 1, 0).astype(np.int64))


def _costs(freqs: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return the bits of every symbol; those of frequency 0 do not occur and cost nothing."""
    return np.where(freqs > 0, 12 - np.log2(np.maximum(freqs, 1)), 0.0)


def _decode_plane(side: memoryview, body: memoryview, plane: Array, dtype: KVDtype) -> None:
    exponent_bits, mantissa_bits = _FIELDS[dtype]
    tokens, channels = len(plane), plane.shape[1] * plane.shape[2]
    number = side[0]
    fixed = 4 + 2 * ALPHABET * number + 2 * channels
    if not 1 <= number <= MAX_TABLES or any(side[1:4]) or len(side) < fixed:
        raise CorruptError("side information", got=f"{len(side)} bytes", expected=f"{fixed}")
    begin = 4 + 2 * ALPHABET * number
    freqs = np.frombuffer(side[4:begin], "<u2").reshape(number, ALPHABET).astype(np.uint16)
    top = np.frombuffer(side[begin : begin + channels], np.uint8).astype(np.int64)
    kinds = np.frombuffer(side[begin + channels : fixed], np.uint8)
    exceptions = np.frombuffer(side[fixed:], np.uint8)
    classes, flip = kinds & (FLIP - 1), kinds >> 7
    infinite = (1 << exponent_bits) - 1
    too_high = exceptions.size and int(exceptions.max()) > infinite
    if int(classes.max()) >= number or int(top.max()) >= infinite or too_high:
        raise CorruptError("side information", got="out of range", expected="known classes")
    widths = _byte_widths(mantissa_bits)
    size = tokens * channels
    packed = sum(width * ((size + 7) // 8) for width in widths)
    coded = len(body) - packed - _COUNT.size
    if coded < 0 or _COUNT.unpack_from(body)[0] != coded:
        raise CorruptError("lossless segment", got=f"{len(body)} bytes", expected="its parts")
    tables = native.Tables(freqs, np.full(number, ESCAPE, np.uint8))
    offset = _COUNT.size + coded
    symbols = native.decode_segment(
        body[_COUNT.size : offset], tokens, channels, classes.astype(np.uint16), tables
    )
    distance = (symbols >> 1).astype(np.int64)
    exponent = np.where(distance == 0, 0, top + 1 - distance)
    listed = distance == LISTED
    if int(listed.sum()) != len(exceptions) or np.any((exponent < 1) & (distance > 0) & ~listed):
        raise CorruptError("exponents", got="out of range", expected="those of the dtype")
    exponent[listed] = exceptions
    sign = (symbols & 1) ^ flip
    bits = sign.astype(np.uint32) << np.uint32(exponent_bits)
    bits = (bits | exponent.astype(np.uint32)) << np.uint32(mantissa_bits)
    for index, width in enumerate(widths):
        length = width * ((size + 7) // 8)
        part = unpack(body[offset : offset + length], width, (tokens, channels))
        bits |= part.astype(np.uint32) << np.uint32(8 * index)
        offset += length
    plane[:] = bits.astype(f"<u{plane.dtype.itemsize}").view(plane.dtype).reshape(plane.shape)
