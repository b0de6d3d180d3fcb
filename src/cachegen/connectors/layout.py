"""How an engine's paged cache holds K and V, and the way from its blocks to a chunk and back.

A *block* holds N tokens of one layer. Letters name the axes of a layer's cache as the engine shows
it: B blocks, H heads, N tokens, D the head dimension, C the dimensions of K and V one after the
other, and 2 for K and V. What lies in memory behind such a view (strides) does not matter here,
but for the packings of vLLM's CPU backend, see ``cpu_blocks``.

| axes | who, as the published versions show |
|---|---|
| BHNC | vLLM from 0.28, every attention backend; the CPU backend from 0.25 |
| B2NHD | vLLM 0.25: FlashAttention, FlashInfer, Triton, FlexAttention; 0.22: FlashInfer, Triton |
| 2BNHD | vLLM 0.22: FlashAttention, FlexAttention |
| 2BHND | vLLM 0.22: the CPU backend |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cachegen.connectors.cpu_blocks import (
    Packing,
    check_block,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)
from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.types import Array

KNOWN_AXES = ("BHNC", "2BNHD", "B2NHD", "2BHND", "B2HND")


@dataclass(frozen=True)
class BlockLayout:
    """The paged cache of one layer.

    axes: one of ``KNOWN_AXES``. block_tokens: N of the cache's own blocks. heads: KV heads of
    this rank. packing: other than rows only for vLLM's CPU backend.
    """

    axes: str
    block_tokens: int
    heads: int
    key_dim: int
    value_dim: int
    packing: Packing = Packing.ROWS

    def __post_init__(self) -> None:
        if self.axes not in KNOWN_AXES:
            raise UnsupportedModelError(
                "axes of the paged cache", got=self.axes, expected=" or ".join(KNOWN_AXES)
            )
        if "C" not in self.axes and self.key_dim != self.value_dim:
            raise GeometryError(
                f"K and V in one axis of {self.axes}",
                got=f"dimensions {self.key_dim} and {self.value_dim}",
                expected="equal ones",
            )
        if self.packing is not Packing.ROWS and self.axes not in ("BHNC", "2BHND"):
            raise UnsupportedModelError(
                "packed blocks", got=self.axes, expected="head-major blocks: BHNC or 2BHND"
            )

    @property
    def block_axis(self) -> int:
        """Index of the axis that counts blocks."""
        return self.axes.index("B")

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block: that of the cache without its block axis."""
        return self._shape(self.axes.replace("B", ""))

    def check(self, shape: Sequence[int], item_bytes: int) -> None:
        """Check the shape of a cache against the layout. Raises: GeometryError."""
        seen = tuple(shape)
        axis = self.block_axis
        if len(seen) != len(self.axes) or (*seen[:axis], *seen[axis + 1 :]) != self.block_shape:
            raise GeometryError(
                f"shape of a paged cache with axes {self.axes}",
                got=seen,
                expected=f"blocks of {self.block_shape}",
            )
        for dim in (self.key_dim, self.value_dim):
            check_block(
                self.packing, block_tokens=self.block_tokens, head_dim=dim, item_bytes=item_bytes
            )

    def unpack(self, blocks: Array) -> tuple[Array, Array]:
        """Turn blocks into rows.

        blocks: (n, *block_shape). Returns: keys (n*N, H, key_dim), values (n*N, H, value_dim);
        views where the layout allows.
        """
        if self.packing is not Packing.ROWS:
            return self._unpack_packed(blocks)
        axes = "B" + self.axes.replace("B", "")
        if "C" in axes:
            rows = blocks.transpose(_order(axes, "BNHC"))
            keys, values = rows[..., : self.key_dim], rows[..., self.key_dim :]
        else:
            keys, values = blocks.transpose(_order(axes, "2BNHD"))
        count = len(blocks) * self.block_tokens
        return (
            keys.reshape(count, self.heads, self.key_dim),
            values.reshape(count, self.heads, self.value_dim),
        )

    def pack(self, keys: Array, values: Array) -> Array:
        """Turn rows into blocks, the inverse of ``unpack``.

        keys, values: (n*N, H, D). Returns: (n, *block_shape), contiguous.
        Raises: GeometryError unless the rows fill whole blocks of this layout.
        """
        count, rest = divmod(len(keys), self.block_tokens)
        expected = (len(keys), self.heads)
        if rest or keys.shape != (*expected, self.key_dim):
            raise GeometryError(
                "keys for paged blocks",
                got=keys.shape,
                expected=(f"a multiple of {self.block_tokens}", self.heads, self.key_dim),
            )
        if values.shape != (*expected, self.value_dim):
            raise GeometryError(
                "values for paged blocks", got=values.shape, expected=(*expected, self.value_dim)
            )
        k = keys.reshape(count, self.block_tokens, self.heads, self.key_dim)
        v = values.reshape(count, self.block_tokens, self.heads, self.value_dim)
        if self.packing is not Packing.ROWS:
            return self._pack_packed(k, v)
        axes = "B" + self.axes.replace("B", "")
        if "C" in axes:
            joined = np.concatenate([k, v], axis=-1)
            return np.ascontiguousarray(joined.transpose(_order("BNHC", axes)))
        return np.ascontiguousarray(np.stack([k, v]).transpose(_order("2BNHD", axes)))

    def _unpack_packed(self, blocks: Array) -> tuple[Array, Array]:
        count = len(blocks)
        split = self.block_tokens * self.key_dim
        regions: tuple[Array, Array]
        if self.axes == "BHNC":
            flat = blocks.reshape(count, self.heads, -1)
            regions = flat[..., :split], flat[..., split:]
        else:
            both = blocks.reshape(count, 2, self.heads, split)
            regions = both[:, 0], both[:, 1]
        rows = []
        parts: tuple[tuple[Array, int, Callable[[Array, Packing], Array]], ...] = (
            (regions[0], self.key_dim, unpack_keys),
            (regions[1], self.value_dim, unpack_values),
        )
        for region, dim, unpack in parts:
            packed = region.reshape(count, self.heads, self.block_tokens, dim)
            heads_first = unpack(packed, self.packing)
            rows.append(
                heads_first.transpose(0, 2, 1, 3).reshape(
                    count * self.block_tokens, self.heads, dim
                )
            )
        return rows[0], rows[1]

    def _pack_packed(self, k: Array, v: Array) -> Array:
        count = len(k)
        regions = [
            pack(np.ascontiguousarray(plane.transpose(0, 2, 1, 3)), self.packing).reshape(
                count, self.heads, -1
            )
            for plane, pack in ((k, pack_keys), (v, pack_values))
        ]
        if self.axes == "BHNC":
            joined = np.concatenate(regions, axis=-1)
        else:
            joined = np.stack(regions, axis=1)
        return np.ascontiguousarray(joined).reshape(count, *self.block_shape)

    def _shape(self, axes: str) -> tuple[int, ...]:
        sizes = {
            "2": 2,
            "H": self.heads,
            "N": self.block_tokens,
            "D": self.key_dim,
            "C": self.key_dim + self.value_dim,
        }
        return tuple(sizes[axis] for axis in axes)


def recognize(
    shape: Sequence[int],
    *,
    block_tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    packing: Packing = Packing.ROWS,
) -> BlockLayout:
    """Find the layout of a layer's cache from its shape.

    block_tokens: the scheduler's block size; the cache's own blocks may be a fraction of it.
    Returns: the layout, with the cache's own block size.
    Raises: UnsupportedModelError if no known layout fits, or more than one does.
    """
    found = []
    for axes in KNOWN_AXES:
        if len(shape) != len(axes):
            continue
        own = shape[axes.index("N")]
        if own < 1 or block_tokens % own:
            continue
        if "C" not in axes and key_dim != value_dim:
            continue
        if packing is not Packing.ROWS and axes not in ("BHNC", "2BHND"):
            continue
        layout = BlockLayout(axes, own, heads, key_dim, value_dim, packing)
        try:
            layout.check(shape, item_bytes=1)
        except GeometryError:
            continue
        found.append(layout)
    if len(found) != 1:
        raise UnsupportedModelError(
            "shape of the paged cache",
            got=f"{tuple(shape)} for blocks of {block_tokens} tokens, {heads} heads of "
            f"{key_dim} and {value_dim}" + (", which fits more than one layout" if found else ""),
            expected=" or ".join(KNOWN_AXES),
            remedy="use another attention backend",
        )
    return found[0]


def _order(source: str, target: str) -> tuple[int, ...]:
    return tuple(source.index(axis) for axis in target)
