"""Side information of a group in the ``progressive`` codec: exempt tokens, mean, classes, decay."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.ladder import CLASSES, FAMILIES
from cachegen.errors import CorruptError
from cachegen.types import Array, KVDtype

Floats = NDArray[np.float32]

# decay, class offset, number of exempt tokens, scale of the mean.
_HEAD = struct.Struct("<BbHf")
MEAN_LEVELS = 127
# A mean costs 8 bits for a channel: below this many tokens it is dearer than what it saves.
MIN_MEAN_TOKENS = 8


@dataclass(frozen=True)
class GroupSide:
    """What the decoder of a group needs beside the digits.

    exempt_tokens: (E,) rows that are stored exactly. exempt_rows: (E, N) in the object's dtype.
    mean: (N,) float32, and mean_levels, mean_scale: how it is stored; only without a profile.
    classes: (N,) uint8, family * 64 + class; only without a profile.
    class_offset: shift of the profile's classes. decay: see ``ladder.descend``, in 1/64.
    """

    exempt_tokens: NDArray[np.int64]
    exempt_rows: Array
    mean: Floats
    mean_levels: NDArray[np.int8]
    mean_scale: float
    classes: NDArray[np.uint8]
    class_offset: int = 0
    decay: int = 64

    @classmethod
    def empty(cls, channels: int, tokens: NDArray[np.int64], rows: Array) -> GroupSide:
        """Start with exempt tokens alone."""
        return cls(
            tokens,
            rows,
            np.zeros(channels, np.float32),
            np.zeros(channels, np.int8),
            0.0,
            np.zeros(channels, np.uint8),
        )

    def with_mean(self, rows: Floats) -> GroupSide:
        """Set the mean of the channels of rows (T, N), rounded to 8 bits."""
        if len(rows) < MIN_MEAN_TOKENS:
            return self
        exact = rows.mean(axis=0, dtype=np.float64)
        scale = float(np.float32(np.abs(exact).max() / MEAN_LEVELS)) if exact.size else 0.0
        if scale == 0:
            return self
        levels = np.clip(np.rint(exact / scale), -MEAN_LEVELS, MEAN_LEVELS).astype(np.int8)
        mean = levels.astype(np.float32) * np.float32(scale)
        return replace(self, mean=mean, mean_levels=levels, mean_scale=scale)

    def with_classes(self, classes: NDArray[np.uint8]) -> GroupSide:
        """Set the classes of the channels."""
        return replace(self, classes=classes)

    def with_offset(self, offset: int) -> GroupSide:
        """Set the shift of the profile's classes."""
        return replace(self, class_offset=offset)

    def with_decay(self, decay: int) -> GroupSide:
        """Set the decay within cells, in 1/64."""
        return replace(self, decay=decay)

    def to_bytes(self, *, plain: bool) -> bytes:
        """Serialise; plain: without a profile, so that mean and classes are needed."""
        count = len(self.exempt_tokens)
        parts = [_HEAD.pack(self.decay, self.class_offset, count, self.mean_scale)]
        if plain:
            parts.append(self.classes.tobytes())
            if self.mean_scale:
                parts.append(self.mean_levels.tobytes())
        parts.append(self.exempt_tokens.astype("<u4").tobytes())
        parts.append(np.ascontiguousarray(self.exempt_rows).tobytes())
        return b"".join(parts)

    @classmethod
    def from_bytes(
        cls, data: memoryview, tokens: int, channels: int, dtype: KVDtype, *, plain: bool
    ) -> GroupSide:
        """Parse what ``to_bytes`` wrote for (tokens, channels). Raises: CorruptError."""
        if len(data) < _HEAD.size:
            raise CorruptError("side information", got=f"{len(data)} bytes", expected=_HEAD.size)
        decay, offset, count, scale = _HEAD.unpack_from(data)
        has_mean = plain and scale != 0
        lengths = [channels if plain else 0, channels if has_mean else 0, 4 * count]
        lengths.append(count * channels * dtype.size_bytes)
        if len(data) != _HEAD.size + sum(lengths) or not 0 <= scale < 2.0**100:
            raise CorruptError(
                "side information",
                got=f"{len(data)} bytes, scale {scale}",
                expected=f"{_HEAD.size + sum(lengths)} bytes",
            )
        blocks = []
        position = _HEAD.size
        for length in lengths:
            blocks.append(data[position : position + length])
            position += length
        classes = np.frombuffer(blocks[0], np.uint8) if plain else np.zeros(channels, np.uint8)
        levels = np.frombuffer(blocks[1], np.int8) if has_mean else np.zeros(channels, np.int8)
        exempt = np.frombuffer(blocks[2], "<u4").astype(np.int64)
        rows: NDArray[Any] = np.frombuffer(blocks[3], dtype.numpy).reshape(count, channels)
        if classes.size and classes.max() >= FAMILIES * CLASSES:
            raise CorruptError("class", got=int(classes.max()), expected=f"0 to {191}")
        if count and (exempt[-1] >= tokens or np.any(np.diff(exempt) <= 0)):
            raise CorruptError("exempt tokens", got=exempt.tolist(), expected="rising, in range")
        mean = levels.astype(np.float32) * np.float32(scale)
        return cls(exempt, rows, mean, levels, float(scale), classes, offset, decay)
