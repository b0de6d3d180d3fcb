"""The packings that vLLM's CPU backend keeps K and V in, inside each block.

A block of one head holds N rows of K and then N rows of V, but not as rows: the attention kernels
of an instruction set want the operands of their multiplications next to each other. The logical
shape [B, H, N, 2D] does not show it, so slicing that view gives wrong values. The arrangement
follows from the instruction set that vLLM's ``_get_attn_isa`` names, the element size and the head
dimension:

- ``vec``, ``vec16``: K as (D, N), V as (N, D).
- ``amx``, for dimensions that are multiples of 32: tiles of 16. With p = 4 bytes / element size
  values that are multiplied as one, K is (N/16, D/p, 16 tokens, p channels) and V is
  (D/16, N/p, 16 channels, p tokens). Other dimensions fall back to ``vec16``.
"""

from __future__ import annotations

import enum

import numpy as np

from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.types import Array

TILE = 16
_WORD_BYTES = 4


class Packing(enum.Enum):
    """How one head's K and V of a block are arranged."""

    ROWS = "rows"
    VECTOR = "vector"
    TILES = "tiles"


_OF_ISA = {"vec": Packing.VECTOR, "vec16": Packing.VECTOR, "amx": Packing.TILES}


def packing_of(isa: str, *, head_dim: int) -> Packing:
    """Return the packing that vLLM's CPU backend uses for an instruction set.

    isa: what ``vllm.v1.attention.backends.cpu_attn._get_attn_isa`` returns.
    Raises: UnsupportedModelError for a set whose packing has not been proven.
    """
    try:
        packing = _OF_ISA[isa]
    except KeyError:
        raise UnsupportedModelError(
            "packing of vLLM's CPU blocks",
            got=f"instruction set {isa!r}",
            expected=" or ".join(_OF_ISA),
            remedy="run on x86-64, or on a GPU",
        ) from None
    if packing is Packing.TILES and head_dim % 32:
        return Packing.VECTOR
    return packing


def check_block(packing: Packing, *, block_tokens: int, head_dim: int, item_bytes: int) -> None:
    """Raise GeometryError unless blocks of this shape can be packed so."""
    if packing is Packing.TILES and (block_tokens % TILE or head_dim % TILE or item_bytes > 4):
        raise GeometryError(
            "block for tiles of 16",
            got=f"{block_tokens} tokens of dimension {head_dim}, {item_bytes} bytes each",
            expected="multiples of 16, at most 4 bytes",
        )


def unpack_keys(packed: Array, packing: Packing) -> Array:
    """Return keys (..., N, D) from what one head's block holds, in the shape (..., N, D)."""
    tokens, dim = packed.shape[-2:]
    lead = packed.shape[:-2]
    if packing is Packing.ROWS:
        return packed
    if packing is Packing.VECTOR:
        return packed.reshape(*lead, dim, tokens).swapaxes(-1, -2)
    pair = _WORD_BYTES // packed.itemsize
    tiles = packed.reshape(*lead, tokens // TILE, dim // pair, TILE, pair)
    return np.moveaxis(tiles, -3, -2).reshape(*lead, tokens, dim)


def pack_keys(keys: Array, packing: Packing) -> Array:
    """Undo ``unpack_keys``: (..., N, D) to the packed values in the shape (..., N, D)."""
    tokens, dim = keys.shape[-2:]
    lead = keys.shape[:-2]
    if packing is Packing.ROWS:
        return keys
    if packing is Packing.VECTOR:
        return np.ascontiguousarray(keys.swapaxes(-1, -2)).reshape(*lead, tokens, dim)
    pair = _WORD_BYTES // keys.itemsize
    tiles = keys.reshape(*lead, tokens // TILE, TILE, dim // pair, pair)
    return np.moveaxis(tiles, -3, -2).reshape(*lead, tokens, dim)


def unpack_values(packed: Array, packing: Packing) -> Array:
    """Return values (..., N, D) from what one head's block holds, in the shape (..., N, D)."""
    if packing is not Packing.TILES:
        return packed
    tokens, dim = packed.shape[-2:]
    lead = packed.shape[:-2]
    pair = _WORD_BYTES // packed.itemsize
    tiles = packed.reshape(*lead, dim // TILE, tokens // pair, TILE, pair)
    # (D/16, N/p, 16, p) to (N/p, p, D/16, 16)
    count = len(lead)
    order = (*range(count), count + 1, count + 3, count, count + 2)
    return tiles.transpose(order).reshape(*lead, tokens, dim)


def pack_values(values: Array, packing: Packing) -> Array:
    """Undo ``unpack_values``: (..., N, D) to the packed values in the shape (..., N, D)."""
    if packing is not Packing.TILES:
        return values
    tokens, dim = values.shape[-2:]
    lead = values.shape[:-2]
    pair = _WORD_BYTES // values.itemsize
    tiles = values.reshape(*lead, tokens // pair, pair, dim // TILE, TILE)
    count = len(lead)
    order = (*range(count), count + 2, count, count + 3, count + 1)
    return tiles.transpose(order).reshape(*lead, tokens, dim)
