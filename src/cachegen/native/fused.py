"""Fused decoding of ``progressive`` groups: all passes, from bytes to K and V in place.

What a block of 128 channels and 32 tokens needs stays in the first-level cache; nothing as large as
a plane is allocated (docs/fused-decode.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import ConfigError, GeometryError
from cachegen.native import _core
from cachegen.native._checks import Array, Symbols
from cachegen.native._tables import Tables
from cachegen.native.threads import threads
from cachegen.types import KVDtype, RopeSpec

SKIPPED = np.iinfo(np.int64).min

# Kinds of a pass, as the extension numbers them.
RANS, BYTES, PACKED, SPARSE = 0, 1, 2, 3


class PlaneTarget(NamedTuple):
    """Where one plane is decoded to.

    address: of head 0 in memory that the caller keeps alive. offsets: (T,) int64, bytes from there
    to each token, ``SKIPPED`` for one that is not stored. head_stride: bytes.
    rope: kind of the layer in the RopeSpec, or -1. first_position: of token 0.
    """

    address: int
    offsets: NDArray[np.int64]
    head_stride: int
    heads: int
    dim: int
    rope: int
    first_position: int
    is_value: bool


class Constants(NamedTuple):
    """What turns values of ``progressive`` into floats; see csrc/ladder.h.

    late_below: 3**k for k + 1 passes. scaling: (5,) float32, the scales of early and late values of
    K, the same of V, and what offsets and means of V are times. early_offset, late_offset: (64,)
    float32 by class, in units of K.
    """

    late_below: int
    scaling: NDArray[np.float32]
    early_offset: NDArray[np.float32]
    late_offset: NDArray[np.float32]


class Coefficients(NamedTuple):
    """Where the components of a group go, for a transform to follow.

    classes: (N,) uint8, family * 64 + class. values: (N, P * 32) float32 for P places, written
    whole: token ``lane * P + place`` is column ``place * 32 + lane``. used: (N,) uint8, zeros; set
    to 1 where a component is not 0 everywhere.
    """

    classes: Symbols
    values: NDArray[np.float32]
    used: Symbols


class GroupSource(NamedTuple):
    """The bytes of one group and all that the decoder needs beside them.

    passes: (kind, body) of the passes at hand, pass 0 first. side: its side information, or with a
    profile where components go. planes: in channel order; none with a profile.
    """

    tokens: int
    channels: int
    passes: Sequence[tuple[int, memoryview]]
    side: memoryview | Coefficients
    constants: Constants
    planes: Sequence[PlaneTarget]


def decode_groups(
    groups: Sequence[GroupSource],
    *,
    dtype: KVDtype,
    stored: KVDtype,
    passes: int,
    coarse: Tables,
    refine: Tables,
    rope: RopeSpec | None,
) -> None:
    """Decode groups of one object into their targets.

    dtype: of the targets. stored: of the object. passes: of the whole object, 1 to 6.
    coarse, refine: the frozen tables of the ladder.
    Raises: TruncatedError, CorruptError, GeometryError; after an error the targets hold anything.
    """
    kinds = rope_kinds(rope)
    _core.decode_groups(
        dtype.label, stored.label, passes, coarse._core, refine._core, kinds, groups, threads()
    )


def rope_kinds(rope: RopeSpec | None) -> list[tuple[NDArray[np.float32], float, bool]]:
    """Return what the extension takes for a RopeSpec."""
    if rope is None:
        return []
    return [
        (np.asarray(frequencies, np.float32), float(scale), rope.interleaved)
        for frequencies, scale in zip(rope.frequencies, rope.attention_scale, strict=True)
    ]


def data_address(array: Array) -> int:
    """Return where the first element of an array lies in memory."""
    address: int = _core.data_address(array)
    return address


def finish_plane(
    target: PlaneTarget,
    values: NDArray[np.float32],
    *,
    dtype: KVDtype,
    mean: NDArray[np.float32],
    factor: float,
    angles: NDArray[np.float32] | None,
    interleaved: bool,
    exempt: Symbols,
) -> None:
    """Store a plane of floats: (values + mean) * factor, RoPE, rounding.

    values: (P * 32, H * D), rows ordered as columns of ``Coefficients``. mean: (H * D,).
    angles: (2, T, D_rot / 2), cos and sin, or None. exempt: (T,), tokens that are left as they are.
    """
    _core.finish_plane(
        dtype.label, target, values, mean, float(factor), angles, interleaved, exempt
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
