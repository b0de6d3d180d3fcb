"""The interface of anything that can be measured, and the arithmetic that peers share.

A peer takes the captured KV of a whole prefix and returns what a decoder would give back, with a
bill of every byte the decoder needs. Adding a peer: one short file here, a line in ``families.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk, LayerKV
from cachegen.errors import GeometryError
from cachegen.hf.rope import rotate
from cachegen.types import KVDtype, RopeSpec

Floats = NDArray[np.float32]

# Of scales and minima of peers whose papers say 16 bits: the finer of the two 16-bit types.
SCALE_DTYPE = KVDtype.FLOAT16


@dataclass(frozen=True)
class Bill:
    """Bytes that are stored for one prefix; together they are all that is billed.

    payload_bytes: coded values. side_bytes: scales, tables, indices, headers.
    exempt_bytes: tokens kept in 8 or 16 bits beside the code (sinks, recent windows).
    framing_bytes: of side_bytes, what only makes an object of it: header, lane states, padding.
    """

    payload_bytes: int = 0
    side_bytes: int = 0
    exempt_bytes: int = 0
    framing_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All billed bytes."""
        return self.payload_bytes + self.side_bytes + self.exempt_bytes

    def __add__(self, other: Bill) -> Bill:
        return Bill(
            self.payload_bytes + other.payload_bytes,
            self.side_bytes + other.side_bytes,
            self.exempt_bytes + other.exempt_bytes,
            self.framing_bytes + other.framing_bytes,
        )


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a peer encodes: the KV of the first T tokens of a prompt.

    kv: 16-bit K and V of all T tokens, position 0 first. importance: (T,) float64, attention each
    token has received within the prefix; only for peers with ``needs_importance``.
    """

    kv: KVChunk
    importance: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """One operating point on one prefix.

    label: the same for every prefix, such as "level 2". bill: bytes for the whole prefix.
    decoded: KV of all T tokens in the prefix's dtype.
    kept: (T,) bool, False for evicted tokens that nothing may attend to; None if all are kept.
    named: True for a level that is chosen by its promise; it is no part of the family's curve.
    distortion: relative squared error that the object itself states, None if it states none.
    """

    label: str
    bill: Bill
    decoded: KVChunk
    kept: NDArray[np.bool_] | None = None
    named: bool = False
    distortion: float | None = None


class Peer(ABC):
    """Anything that can be measured.

    family: name of the rate-quality curve that its points belong to.
    """

    family: str
    needs_importance: bool = False

    @property
    def calibration_bytes(self) -> int:
        """Bytes of calibration data a decoder needs once per model; not billed to a prefix."""
        return 0

    @abstractmethod
    def points(self, prefix: Prefix) -> list[Point]:
        """Encode and decode a prefix at every operating point.

        Returns: the same labels in the same order for every prefix.
        Raises: GeometryError, and what the codec raises.
        """


def split_planes(kv: KVChunk) -> tuple[Floats, Floats]:
    """Return keys and values as float32, (L, T, H, D) each.

    Raises: GeometryError if layers hold different tokens (sliding windows).
    """
    if not kv.is_uniform:
        raise GeometryError(
            "layers of the prefix",
            got="different token ranges",
            expected="all tokens in every layer",
            remedy="measure peers on a model without sliding windows",
        )
    keys = np.stack([layer.keys for layer in kv.layers]).astype(np.float32)
    values = np.stack([layer.values for layer in kv.layers]).astype(np.float32)
    return keys, values


def join_planes(like: KVChunk, keys: Floats, values: Floats) -> KVChunk:
    """Return a chunk with new values, (L, T, H, D) each, rounded to the dtype of ``like``."""
    dtype = like.geometry.dtype.numpy
    layers = [LayerKV(k.astype(dtype), v.astype(dtype)) for k, v in zip(keys, values, strict=True)]
    return KVChunk.from_layers(layers, first_position=like.first_position, rope=like.rope)


def rotate_keys(keys: Floats, rope: RopeSpec, positions: Sequence[int], *, undo: bool) -> Floats:
    """Apply a RoPE to keys (L, T, H, D) at (T,) positions, or with undo take it off again."""
    where = np.asarray(positions, np.int64)
    out = np.empty_like(keys)
    for layer, plane in enumerate(keys):
        # To rotate back by the same angles leaves the attention scale squared.
        kind = rope.layer_kinds[layer]
        scale = rope.attention_scale[kind] ** 2 if undo and kind >= 0 else 1.0
        heads = plane.astype(np.float64).transpose(1, 0, 2)
        turned = rotate(heads, -where if undo else where, rope, layer) / scale
        out[layer] = turned.transpose(1, 0, 2)
    return out


def positions_of(kv: KVChunk) -> range:
    """Return the positions of a chunk's tokens in their context."""
    return range(kv.first_position, kv.first_position + kv.tokens)


def round_to(values: Floats, dtype: KVDtype) -> Floats:
    """Round side information to the 16 bits it is billed at."""
    rounded: Floats = values.astype(dtype.numpy).astype(np.float32)
    return rounded
