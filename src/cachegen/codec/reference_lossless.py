"""The ``lossless`` codec in NumPy: the twin of the native encoder and decoder.

Bytes and values are equal.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec.entropy import COST_UNIT, histogram, normalize_counts, pack, unpack
from cachegen.codec.lossless import check_lossless, symbol_costs
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.types import Array, KVDtype

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
_UNITS = 128
_ROUNDS, _LAST_ROUNDS = 4, 2
_COUNT = struct.Struct("<I")


def encode_plane(plane: Array, dtype: KVDtype) -> tuple[bytes, bytes]:
    """Return side information and body of a plane (T, H, D), both empty if they are no smaller."""
    raw = np.ascontiguousarray(plane)
    if raw.size:
        side, body = _code(_matrix(raw), dtype)
        if len(side) + len(body) < raw.nbytes:
            return side, body
    return b"", b""


def decode_planes(reader: ObjectReader, target: Target) -> None:
    """Decode an object of the codec into its target. Raises: CorruptError, TruncatedError."""
    check_lossless(reader)
    header = reader.header
    for group in range(len(header.groups)):
        side, (_, body) = reader.side(group, 0), reader.segment(group, 0)
        with target.writing(group // 2, is_value=group % 2 == 1) as plane:
            if len(side):
                _decode_plane(side, body, plane, header.geometry.dtype)
                continue
            if len(body) != plane.nbytes:
                raise CorruptError("lossless segment", got=len(body), expected=plane.nbytes)
            plane[:] = np.frombuffer(body, plane.dtype).reshape(plane.shape)


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
    left_out = _zero_bits(int(np.bitwise_or.reduce(bits, axis=None)), mantissa_bits)
    side = b"".join(
        [
            bytes([len(freqs), left_out, 0, 0]),
            freqs.astype("<u2").tobytes(),
            top.astype(np.uint8).tobytes(),
            (classes + FLIP * flip).astype(np.uint8).tobytes(),
            exponent[listed].astype(np.uint8).tobytes(),
        ]
    )
    mantissas = (bits & np.uint32((1 << mantissa_bits) - 1)) >> np.uint32(left_out)
    planes = [
        pack((mantissas >> np.uint32(8 * index)).astype(np.uint8), width)
        for index, width in enumerate(_byte_widths(mantissa_bits - left_out))
    ]
    return side, b"".join([_COUNT.pack(len(coded)), coded, *planes])


def _zero_bits(seen: int, most: int) -> int:
    """Return how many low bits are 0, at most so many."""
    seen |= 1 << most
    return (seen & -seen).bit_length() - 1


def _byte_widths(bits: int) -> list[int]:
    """Cut a number of bits into bytes, low ones first."""
    return [min(8, bits - begin) for begin in range(0, bits, 8)]


def _fit_tables(symbols: Symbols) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Choose 1 to 16 tables and one of them for every channel, by the bits they take in all.

    Returns: frequencies (n, 32) uint16, the index of each channel's table (C,).
    """
    channels = symbols.shape[1]
    counts = histogram(np.minimum(symbols, ESCAPE).astype(np.uint8), ALPHABET)
    # How far symbols lie from the top, in the mean, orders channels from narrow to wide. Among runs
    # of them the tables are searched for; only in the end each channel chooses for itself.
    order = np.argsort((counts * np.arange(ALPHABET)).sum(axis=1), kind="stable")
    units = min(_UNITS, channels)
    joined = np.zeros((units, ALPHABET), np.int64)
    np.add.at(joined, np.arange(channels) * units // channels, counts[order])
    best: tuple[int, NDArray[np.uint16]] | None = None
    number = 1
    while number <= min(MAX_TABLES, channels):
        classes = np.arange(units) * number // units
        freqs = _tables_of(joined, classes, number)
        for _ in range(_ROUNDS if number > 1 else 0):
            classes = (joined @ _costs(freqs).T).argmin(axis=1)
            freqs = _tables_of(joined, classes, number)
        total = int((joined * _costs(freqs)[classes]).sum()) + COST_UNIT * 16 * freqs.size
        if best is None or total < best[0]:
            best = total, freqs
        number *= 2
    assert best is not None
    freqs, classes = best[1], np.zeros(channels, np.int64)
    for _ in range(_LAST_ROUNDS if len(freqs) > 1 else 0):
        classes = (counts @ _costs(freqs).T).argmin(axis=1)
        freqs = _tables_of(counts, classes, len(freqs))
    return freqs, classes


def _tables_of(
    counts: NDArray[np.int64], classes: NDArray[np.int64], number: int
) -> NDArray[np.uint16]:
    """Return one table for each class, in which every symbol of the plane can be coded."""
    everywhere = counts.sum(axis=0)
    sums = np.stack([counts[classes == index].sum(axis=0) for index in range(number)])
    return normalize_counts(np.where(everywhere > 0, sums + 1, 0))


def _costs(freqs: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Return what every symbol takes in 1/1024 bit; those of frequency 0 do not occur."""
    return symbol_costs()[freqs].astype(np.int64)


def _decode_plane(side: memoryview, body: memoryview, plane: Array, dtype: KVDtype) -> None:
    exponent_bits, mantissa_bits = _FIELDS[dtype]
    tokens, channels = len(plane), plane.shape[1] * plane.shape[2]
    number = side[0]
    fixed = 4 + 2 * ALPHABET * number + 2 * channels
    if not 1 <= number <= MAX_TABLES or len(side) < fixed or any(side[2:4]):
        raise CorruptError("side information", got=f"{len(side)} bytes", expected=f"{fixed}")
    left_out = side[1]
    if left_out > mantissa_bits:
        raise CorruptError("mantissa bits left out", got=left_out, expected=f"<= {mantissa_bits}")
    begin = 4 + 2 * ALPHABET * number
    freqs = np.frombuffer(side[4:begin], "<u2").reshape(number, ALPHABET).astype(np.uint16)
    top = np.frombuffer(side[begin : begin + channels], np.uint8).astype(np.int64)
    kinds = np.frombuffer(side[begin + channels : fixed], np.uint8)
    exceptions = np.frombuffer(side[fixed:], np.uint8)
    classes, flip = kinds & (FLIP - 1), kinds >> 7
    infinite = (1 << exponent_bits) - 1
    too_high = exceptions.size and int(exceptions.max()) > infinite
    if np.any(classes >= number) or np.any(top >= infinite) or too_high:
        raise CorruptError("side information", got="out of range", expected="known classes")
    widths = _byte_widths(mantissa_bits - left_out)
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
        bits |= part.astype(np.uint32) << np.uint32(left_out + 8 * index)
        offset += length
    plane[:] = bits.astype(f"<u{plane.dtype.itemsize}").view(plane.dtype).reshape(plane.shape)
