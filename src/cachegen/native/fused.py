"""Fused decoding of ``progressive`` groups: all passes, from bytes to K and V in place.

What a block of 128 channels and 32 tokens needs stays in the first-level cache; nothing as large as
a plane is allocated (docs/fused-decode.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import ConfigError, GeometryError
from cachegen.native import _checks, _core
from cachegen.native._checks import Array, Body
from cachegen.native._tables import Tables
from cachegen.types import KVDtype, RopeSpec

SKIPPED = np.iinfo(np.int64).min

# Kinds of a pass, as the extension numbers them.
RANS, BYTES, PACKED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class PlaneTarget:
    """Where one plane is decoded to.

    array: holds the memory; address: of token offset 0, head 0, in it. offsets: (T,) int64, bytes
    from address to each token, ``SKIPPED`` for one that is not stored. head_stride: bytes.
    rope: kind of the layer in the RopeSpec, or -1. first_position: of token 0.
    """

    array: Array
    address: int
    offsets: NDArray[np.int64]
    head_stride: int
    heads: int
    dim: int
    is_value: bool
    rope: int = -1
    first_position: int = 0


@dataclass(frozen=True, eq=False)
class GroupSource:
    """The bytes of one group and all that the decoder needs beside them.

    passes: (kind, body) of the passes at hand, pass 0 first. classes: (N,) uint8.
    late_below: 3**k for k + 1 passes. scaling: (5,) float32, the scales of early and late values of
    K, the same of V, and what offsets and means of V are times. early_offset, late_offset: (64,)
    float32 by class, in units of K. mean: (N,) float32, or empty. exempt_tokens: (E,) uint32,
    exempt_rows: (E, N) in the dtype of the targets. planes: in channel order.
    """

    tokens: int
    channels: int
    passes: Sequence[tuple[int, Body]]
    classes: NDArray[np.uint8]
    late_below: int
    scaling: NDArray[np.float32]
    early_offset: NDArray[np.float32]
    late_offset: NDArray[np.float32]
    mean: NDArray[np.float32]
    exempt_tokens: NDArray[np.uint32]
    exempt_rows: Array
    planes: Sequence[PlaneTarget]


def decode_groups(
    groups: Sequence[GroupSource],
    *,
    dtype: KVDtype,
    passes: int,
    coarse: Tables,
    refine: Tables,
    rope: RopeSpec | None,
) -> None:
    """Decode groups of one object into their targets.

    dtype: of the targets. passes: of the whole object, 1 to 6. coarse, refine: the frozen tables of
    the ladder.
    Raises: TruncatedError, CorruptError, GeometryError; after an error the targets hold anything.
    """
    kinds = []
    if rope is not None:
        for frequencies, scale in zip(rope.frequencies, rope.attention_scale, strict=True):
            kinds.append((np.asarray(frequencies, np.float32), float(scale), rope.interleaved))
    _core.decode_groups(dtype.label, passes, coarse._core, refine._core, kinds, [_fields(group) for group in groups])


def _fields(group: GroupSource) -> tuple[Any, ...]:
    return (
        group.tokens,
        group.channels,
        [(kind, _checks.as_bytes(body)) for kind, body in group.passes],
        group.classes,
        group.scaling,
        group.late_below,
        group.early_offset,
        group.late_offset,
        group.mean,
        group.exempt_tokens,
        np.ascontiguousarray(group.exempt_rows).reshape(-1).view(np.uint8),
        [
            (
                plane.address,
                plane.offsets,
                plane.head_stride,
                plane.heads,
                plane.dim,
                plane.rope,
                plane.first_position,
                plane.is_value,
            )
            for plane in group.planes
        ],
    )


def token_offsets(tokens: int, array: Array, slots: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the byte offset of every token in an array.

    array: (T, H, D), or with slots (B, S, H, D), a paged cache of B blocks of S tokens. slots: (T,)
    int64, ``block * S + place in the block``, -1 for a token that is not stored.
    Returns: (T,) int64. Raises: GeometryError for slots out of range, ConfigError if two tokens
    have one slot.
    """
    if slots is None:
        return np.arange(tokens, dtype=np.int64) * np.int64(array.strides[0])
    blocks, size = array.shape[:2]
    stored = slots[slots >= 0]
    if len(stored) and (int(stored.max()) >= blocks * size or int(slots.min()) < -1):
        raise GeometryError(
            "slot mapping",
            got=f"{int(slots.min())} to {int(stored.max())}",
            expected=f"-1, or below {blocks} * {size}",
        )
    if len(np.unique(stored)) != len(stored):
        raise ConfigError("slot mapping", got="a slot twice", expected="one slot for each token")
    block, place = np.divmod(slots, max(size, 1))
    offsets = block * np.int64(array.strides[0]) + place * np.int64(array.strides[1])
    return np.where(slots < 0, SKIPPED, offsets)
