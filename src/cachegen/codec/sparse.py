"""Sparse segments: a symbol matrix that is nearly all 0, as the places of everything else.

The twin of csrc/sparse.cpp; their law is FORMAT.md, "Sparse segment body".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.container import Buffer
from cachegen.errors import CorruptError

Symbols = NDArray[np.uint8]

LANES = 32
# An encoder writes a matrix sparsely if at most one symbol of so many is not 0: about where entropy
# coding takes as many bytes, and ten times as long.
SHARE = 256
MOST_LOW_BITS = 40
_HEAD = struct.Struct("<IB")


def is_sparse(symbols: Symbols) -> bool:
    """Whether an encoder writes a matrix (T, C) as a sparse segment."""
    return symbols.size > 0 and SHARE * int(np.count_nonzero(symbols)) <= symbols.size


def write_sparse(symbols: Symbols) -> bytes:
    """Return the body of a sparse segment: places and values of all symbols (T, C) but 0."""
    tokens, channels = symbols.shape
    places = -(-tokens // LANES)
    token, channel = np.nonzero(symbols)
    at = ((token % places) * channels + channel) * LANES + token // places
    order = np.argsort(at)
    typical = places * channels * LANES * 11 // (16 * (len(at) + 1))
    low_bits = max(typical.bit_length() - 1, 0)
    text = []
    gaps = np.diff(at[order], prepend=-1) - 1
    for gap, symbol in zip(gaps.tolist(), symbols[token, channel][order].tolist(), strict=True):
        magnitude = (symbol + 1) // 2
        length = magnitude.bit_length() - 1
        text.append("0" * (gap >> low_bits) + "1" + _lowest_first(gap, low_bits))
        text.append(str(1 - symbol % 2) + "0" * length + "1" + _lowest_first(magnitude, length))
    bits = np.frombuffer("".join(text).encode(), np.uint8) - ord("0")
    return _HEAD.pack(len(at), low_bits) + np.packbits(bits, bitorder="little").tobytes()


def _lowest_first(value: int, count: int) -> str:
    return "".join(str(value >> i & 1) for i in range(count))


class _Bits:
    """Bits from the lowest of the first byte on."""

    def __init__(self, body: Buffer) -> None:
        self._bits = np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little")
        self._ones = np.flatnonzero(self._bits)
        self.at = 0

    def unary(self) -> int:
        """Return the number of zeros before the next one, which is taken, too."""
        one = int(np.searchsorted(self._ones, self.at))
        if one == len(self._ones):
            raise CorruptError("sparse segment, bits", got=len(self._bits), expected="more")
        zeros = int(self._ones[one]) - self.at
        self.at += zeros + 1
        return zeros

    def number(self, count: int) -> int:
        part = self._bits[self.at : self.at + count].tolist()
        if len(part) < count:
            raise CorruptError("sparse segment, bits", got=len(self._bits), expected="more")
        self.at += count
        return sum(bit << i for i, bit in enumerate(part))

    def finish(self) -> None:
        left = self._bits[self.at :]
        if len(left) >= 8 or np.any(left):
            raise CorruptError("sparse segment, bits left", got=len(left), expected="zero padding")


def read_sparse(body: Buffer, shape: tuple[int, int], largest: int) -> Symbols:
    """Return the matrix (T, C) uint8 of a sparse segment, symbols 0 to ``largest``.

    Raises: CorruptError.
    """
    tokens, channels = shape
    places = -(-tokens // LANES)
    if len(body) < _HEAD.size:
        raise CorruptError("sparse segment, bytes", got=len(body), expected="5 or more")
    count, low_bits = _HEAD.unpack_from(body)
    if count > places * channels or low_bits > MOST_LOW_BITS:
        raise CorruptError("sparse segment, count", got=(count, low_bits), expected="fewer")
    bits = _Bits(body[_HEAD.size :])
    symbols = np.zeros(shape, np.uint8)
    at = 0
    for _ in range(count):
        at += bits.unary() << low_bits
        at += bits.number(low_bits)
        is_positive, length = bits.number(1), bits.unary()
        symbol = 2 * (1 << length | bits.number(min(length, 8))) - 1 + is_positive
        step, lane = divmod(at, LANES)
        place = step // channels
        token = lane * places + place
        if place >= places or token >= tokens or symbol > largest:
            raise CorruptError("sparse segment, symbol", got=(at, symbol), expected="a token's")
        symbols[token, step % channels] = symbol
        at += 1
    bits.finish()
    return symbols
