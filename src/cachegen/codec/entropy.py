"""Entropy coding of symbol matrices: which tables, which kind of segment, and the way back.

A matrix has one row per token and one column per channel; every channel has a model of its own.
Source: CacheGen (SIGCOMM'24), section 5.2, "arithmetic coding" with per-channel-layer statistics.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec.container import BYTES, RANS, Buffer
from cachegen.errors import CorruptError, ProfileError

TOTAL = 4096
ALPHABET = 32
ZERO_RESIDUAL = 16
TARGET_STREAM_STEPS = 1024
COST_UNIT = 1024

Symbols = NDArray[np.uint8]
Freqs = NDArray[np.uint16]


class TableMode(enum.Enum):
    """Where the decoder has its frequencies from. The value is the code in the object."""

    CHUNK = 0
    PROFILE = 1
    PARAMETRIC = 2

    @property
    def label(self) -> str:
        return self.name.lower()


def stream_steps(channels: int) -> int:
    """Return the restart spacing: whole places, about 1,024 steps."""
    return channels * max(1, TARGET_STREAM_STEPS // max(channels, 1))


def digit_shift(levels: int) -> int:
    """Return how many low bits of a symbol go raw so that the rest has at most 32 values."""
    shift = 0
    while (2 * levels) >> shift >= ALPHABET:
        shift += 1
    return shift


def alphabet_size(levels: int) -> int:
    """Return the number of distinct coded values of symbols 0 .. 2*levels."""
    return ((2 * levels) >> digit_shift(levels)) + 1


def histogram(symbols: Symbols, size: int) -> NDArray[np.int64]:
    """Count the symbols of every channel: (T, C) uint8 -> (C, size)."""
    channels = symbols.shape[1]
    flat = symbols.astype(np.int64) + size * np.arange(channels)
    return np.bincount(flat.ravel(), minlength=size * channels).reshape(channels, size)


def normalize_counts(counts: NDArray[Any]) -> Freqs:
    """Scale histograms (C, A) to frequencies that sum to 4096, none that occurs being 0.

    The twin of ``native.normalize_counts``, for counts of any type.
    A channel that never occurs gets certainty on value 0.
    """
    counts = np.asarray(counts, np.int64).copy()
    counts[counts.sum(axis=1) == 0, 0] = 1
    total = counts.sum(axis=1, keepdims=True)
    exact = counts * (TOTAL / total)
    freqs = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    rows = np.arange(len(freqs))
    # One unit at a time where it saves (or costs) the fewest bits; at most A + a few rounds.
    while (short := TOTAL - freqs.sum(axis=1)).any():
        safe = np.maximum(freqs, 1)
        gain = np.where(counts > 0, counts * np.log2((safe + 1) / safe), -np.inf)
        loss = np.where(freqs > 1, counts * np.log2(safe / np.maximum(safe - 1, 1)), np.inf)
        freqs[rows, gain.argmax(axis=1)] += short > 0
        freqs[rows, loss.argmin(axis=1)] -= short < 0
    return freqs.astype(np.uint16)


@functools.cache
def bits_saved() -> NDArray[np.float64]:
    """Return what a channel saves per symbol if its frequency f is raised by one, (4097,)."""
    freqs = np.arange(TOTAL + 1, dtype=np.float64)
    freqs[0] = 1
    return np.log2((freqs + 1) / freqs)


@functools.cache
def _cost_pairs() -> NDArray[np.int16]:
    costs = parametric_tables()[1].astype(np.int16).reshape(-1, ALPHABET // 2, 2)
    return np.ascontiguousarray(costs.transpose(1, 0, 2))


@functools.cache
def parametric_tables() -> tuple[native.Tables, NDArray[np.float64]]:
    """Return the frozen table set 1 and what each of its entries costs, (112, 32).

    Costs are whole numbers of 1/1024 bit, so that sums have no order.
    """
    path = resources.files("cachegen.codec") / "tables_v1.npy"
    with path.open("rb") as file:
        freqs = np.load(file, allow_pickle=False)
    return native.Tables(freqs, None), np.rint(-np.log2(freqs / TOTAL) * COST_UNIT)


@dataclass(frozen=True)
class ParametricModels:
    """Choice of a frozen table for every channel.

    classes: (C,) uint8, index into table set 1. rotations: (C,) uint8, 0 to 31 (FORMAT.md).
    """

    classes: Symbols
    rotations: Symbols

    def to_bytes(self) -> bytes:
        return self.classes.tobytes() + self.rotations.tobytes()

    @classmethod
    def from_bytes(cls, side: Buffer, channels: int) -> ParametricModels:
        """Parse the side information of C channels. Raises: CorruptError."""
        if len(side) != 2 * channels:
            raise CorruptError(
                "parametric side information", got=f"{len(side)} bytes", expected=2 * channels
            )
        both = np.frombuffer(side, np.uint8).reshape(2, channels)
        if both[0].size and both[0].max() >= parametric_tables()[0].count:
            raise CorruptError("table class", got=int(both[0].max()), expected="0 to 111")
        if both[1].size and both[1].max() >= ALPHABET:
            raise CorruptError("table rotation", got=int(both[1].max()), expected="0 to 31")
        return cls(both[0], both[1])


@functools.cache
def frozen_tables() -> native.FrozenTables:
    """Return the frozen table set 1 for ``native.encode_planes``."""
    return native.FrozenTables(parametric_tables()[0], _cost_pairs())


def fit_parametric(symbols: Symbols, shift: int) -> ParametricModels:
    """Choose for every channel the class and rotation with the shortest code.

    symbols: (T, C) uint8; without their ``shift`` low bits 0 to 31. Tries rotations that centre the
    table around the channel's mean.
    """
    counts = native.count_symbols(symbols, ALPHABET, shift=shift)
    return ParametricModels(*native.fit_classes(counts, _cost_pairs()))


def fit_parametric_by_numpy(digits: Symbols) -> ParametricModels:
    """Do what ``fit_parametric`` does: its twin. digits: (T, C) uint8, 0 to 31."""
    channels = digits.shape[1]
    counts = histogram(digits, ALPHABET)
    columns = np.arange(ALPHABET)
    mean = counts @ columns / np.maximum(counts.sum(axis=1), 1)
    _, costs = parametric_tables()
    best = np.full(channels, np.inf)
    classes = np.zeros(channels, np.uint8)
    rotations = np.zeros(channels, np.uint8)
    for step in (0, -1, 1):
        rotation = (np.rint(mean).astype(np.int64) + step - ZERO_RESIDUAL) % ALPHABET
        rotated = np.take_along_axis(counts, (columns + rotation[:, None]) % ALPHABET, axis=1)
        bits = rotated @ costs.T
        choice = bits.argmin(axis=1)
        cost = bits[np.arange(channels), choice]
        better = cost < best
        best[better] = cost[better]
        classes[better] = choice[better]
        rotations[better] = rotation[better]
    return ParametricModels(classes, rotations)


def rotate(symbols: Symbols, rotations: Symbols, shift: int, *, back: bool) -> Symbols:
    """Subtract (or with back add) each channel's rotation of the digit above ``shift`` low bits."""
    mask = np.uint8((ALPHABET << shift) - 1)
    offset = rotations << np.uint8(shift)
    return (symbols + offset if back else symbols - offset) & mask


@dataclass(frozen=True)
class CodedMatrix:
    """A coded symbol matrix: kind and bits of its segment, its body and its tables."""

    kind: int
    body: bytes
    tables: bytes
    bits: int = 0


def encode_matrix(
    symbols: Symbols, levels: int, mode: TableMode, profile_freqs: Freqs | None = None
) -> CodedMatrix:
    """Code symbols 0 .. 2*levels with tables from the chunk, a profile or the frozen set.

    symbols: (T, C) uint8, C-contiguous. profile_freqs: (C, A) uint16 for TableMode.PROFILE.
    Returns: rANS, or bytes where they are no larger than body and tables together.
    """
    _, channels = symbols.shape
    if symbols.size == 0:
        return CodedMatrix(BYTES, b"", b"")
    shift = digit_shift(levels)
    coded = symbols
    if mode is TableMode.PARAMETRIC:
        models = fit_parametric(symbols, shift)
        coded = rotate(symbols, models.rotations, shift, back=False)
        tables, side = parametric_tables()[0], models.to_bytes()
        index = models.classes.astype(np.uint16)
    else:
        if mode is TableMode.CHUNK:
            counts = native.count_symbols(symbols, alphabet_size(levels), shift=shift)
            freqs = native.normalize_counts(counts, bits_saved())
            side = freqs.astype("<u2").tobytes()
        else:
            freqs, side = checked_profile(profile_freqs, channels, levels), b""
        tables, index = native.Tables(_widened(freqs), None), _identity(channels)
    body = native.encode_segment(
        coded,
        index,
        tables,
        shifts=digit_shifts(shift, channels),
        stream_steps=stream_steps(channels),
    )
    if len(body) + len(side) >= symbols.size:
        return CodedMatrix(BYTES, symbols.tobytes(), b"")
    return CodedMatrix(RANS, body, side)


def decode_matrix(
    kind: int,
    body: Buffer,
    side: Buffer,
    shape: tuple[int, int],
    levels: int,
    mode: TableMode,
    profile_freqs: Freqs | None = None,
) -> Symbols:
    """Undo ``encode_matrix``; side holds the tables alone. Raises: CorruptError, ProfileError."""
    tokens, channels = shape
    if kind == BYTES:
        if len(side):
            raise CorruptError("tables of a byte segment", got=f"{len(side)} bytes", expected=0)
        return unpack_bytes(body, shape)
    if kind != RANS:
        raise CorruptError("segment kind", got=kind, expected="rANS or bytes")
    shift = digit_shift(levels)
    if mode is TableMode.PARAMETRIC:
        models = ParametricModels.from_bytes(side, channels)
        coded = native.decode_segment(
            body,
            tokens,
            channels,
            models.classes.astype(np.uint16),
            parametric_tables()[0],
            shifts=digit_shifts(shift, channels),
        )
        return rotate(coded, models.rotations, shift, back=True)
    size = alphabet_size(levels)
    if mode is TableMode.CHUNK:
        if len(side) != 2 * channels * size:
            raise CorruptError("tables", got=f"{len(side)} bytes", expected=2 * channels * size)
        freqs = np.frombuffer(side, "<u2").reshape(channels, size).astype(np.uint16)
    elif len(side):
        raise CorruptError("tables in the object", got=f"{len(side)} bytes", expected="a profile")
    else:
        freqs = checked_profile(profile_freqs, channels, levels)
    tables = native.Tables(_widened(freqs), None)
    shifts = digit_shifts(shift, channels)
    return native.decode_segment(body, tokens, channels, _identity(channels), tables, shifts=shifts)


def _identity(channels: int) -> NDArray[np.uint16]:
    return np.arange(channels, dtype=np.uint16)


def digit_shifts(shift: int, channels: int) -> Symbols | None:
    """Return the same shift for every channel, or None for no shift."""
    return np.full(channels, shift, np.uint8) if shift else None


def _widened(freqs: Freqs) -> Freqs:
    """A model has at least two symbols; a one-symbol alphabet gets one that never occurs."""
    return np.pad(freqs, ((0, 0), (0, 1))) if freqs.shape[1] < 2 else freqs


def checked_profile(freqs: Freqs | None, channels: int, levels: int) -> Freqs:
    """Return the frequencies of a profile, (C, A). Raises: ProfileError if they do not fit."""
    if freqs is None or freqs.shape != (channels, alphabet_size(levels)):
        raise ProfileError(
            "frequency tables of the profile",
            got=None if freqs is None else freqs.shape,
            expected=(channels, alphabet_size(levels)),
            remedy="fit the profile with this codec configuration and model",
        )
    return freqs


def pack(symbols: Symbols, bits: int) -> bytes:
    """Pack the low bits of symbols as bit-planes (FORMAT.md, "Packed")."""
    flat = np.ascontiguousarray(symbols).ravel()
    planes = [np.packbits((flat >> bit) & 1, bitorder="little") for bit in range(bits)]
    return b"".join(plane.tobytes() for plane in planes)


def unpack(body: Buffer, bits: int, shape: tuple[int, int]) -> Symbols:
    """Undo ``pack``. Raises: CorruptError if the length or the padding is wrong."""
    count = shape[0] * shape[1]
    plane_bytes = (count + 7) // 8
    if len(body) != bits * plane_bytes:
        raise CorruptError("packed segment", got=len(body), expected=bits * plane_bytes)
    planes = np.frombuffer(body, np.uint8).reshape(bits, plane_bytes)
    if count % 8 and np.any(planes[:, -1] >> (count % 8)):
        raise CorruptError("packed segment", got="non-zero padding", expected="zero bits")
    symbols = np.zeros(count, np.uint8)
    for bit, plane in enumerate(planes):
        symbols |= np.unpackbits(plane, count=count, bitorder="little") << np.uint8(bit)
    return symbols.reshape(shape)


def unpack_bytes(body: Buffer, shape: tuple[int, int]) -> Symbols:
    """Read a byte segment as (T, C) uint8. Raises: CorruptError."""
    if len(body) != shape[0] * shape[1]:
        raise CorruptError("byte segment", got=len(body), expected=shape[0] * shape[1])
    return np.frombuffer(body, np.uint8).reshape(shape)


def check_kind(kind: int, allowed: tuple[int, ...]) -> None:
    """Raise CorruptError unless a segment's kind is one that its codec writes."""
    if kind not in allowed:
        raise CorruptError("segment kind", got=kind, expected=f"one of {allowed}")
