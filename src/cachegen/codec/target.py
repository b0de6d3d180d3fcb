"""Where a decoder puts K and V: arrays of a chunk, or blocks of an engine's paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk, aligned_empty, as_numpy
from cachegen.codec.header import Header
from cachegen.errors import DtypeError, GeometryError
from cachegen.native.fused import PlaneTarget, data_address, token_offsets
from cachegen.types import Array, KVDtype

Pairs = Sequence[tuple[object, object]]


class Target:
    """Destination of all planes of one object.

    header: of the object. out: a chunk of the same shape, or for each layer K and V, arrays or CPU
        tensors whose last axis is contiguous: (T_l, H, D) each, or with slot_mapping
        (blocks, block size, H, D). Their dtype is one, but not necessarily the object's.
    slot_mapping: (T,) integers, ``block * block_size + place``; -1 leaves a token out.
    Raises: GeometryError, DtypeError, ConfigError.
    """

    def __init__(
        self, header: Header, out: KVChunk | Pairs, slot_mapping: object | None = None
    ) -> None:
        self._header = header
        if isinstance(out, KVChunk):
            pairs: list[tuple[Array, Array]] = [(layer.keys, layer.values) for layer in out.layers]
        else:
            pairs = [(_on_cpu(keys), _on_cpu(values)) for keys, values in out]
        self._slots = None if slot_mapping is None else _slots(slot_mapping, header.tokens)
        if len(pairs) != header.geometry.layers:
            raise GeometryError("layers of out", got=len(pairs), expected=header.geometry.layers)
        self._pairs = pairs
        self.dtype = KVDtype.of(pairs[0][0].dtype)
        seen: set[tuple[Any, ...]] = set()
        for layer, pair in enumerate(pairs):
            for is_value, array in enumerate(pair):
                # Planes are all alike, usually.
                kind = header.ranges[layer], is_value, array.shape, array.strides, array.dtype
                if kind not in seen or not array.flags.writeable:
                    self._check(layer, bool(is_value), array)
                    seen.add(kind)
        self._offsets: dict[tuple[Any, ...], NDArray[np.int64]] = {}

    def _check(self, layer: int, is_value: bool, array: Array) -> None:
        begin, end = self._header.ranges[layer]
        geometry = self._header.geometry
        head = (geometry.kv_heads, geometry.plane_dim(is_value=is_value))
        fits = array.shape == (end - begin, *head)
        if self._slots is not None:
            fits = array.ndim == 4 and array.shape[2:] == head
        name = f"{'V' if is_value else 'K'} of layer {layer} in out"
        if not fits or not array.flags.writeable:
            paged = ("blocks", "block size", *head)
            expected = f"{(end - begin, *head) if self._slots is None else paged}, writeable"
            raise GeometryError(name, got=array.shape, expected=expected)
        if KVDtype.of(array.dtype) is not self.dtype:
            raise DtypeError(name, got=array.dtype, expected=self.dtype.label)
        if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
            raise GeometryError(
                name,
                got=f"values of a head {array.strides[-1]} bytes apart",
                expected="side by side",
                remedy="pass arrays whose last axis is contiguous",
            )

    def plane(
        self, layer: int, *, is_value: bool, rope: int = -1, first_position: int = 0
    ) -> PlaneTarget:
        """Return where a plane goes. rope, first_position: as in ``PlaneTarget``."""
        array = self._pairs[layer][is_value]
        strides, shape = array.strides, array.shape
        key = self._header.ranges[layer], strides, shape
        offsets = self._offsets.get(key)
        if offsets is None:
            begin, end = self._header.ranges[layer]
            slots = None if self._slots is None else self._slots[begin:end]
            offsets = self._offsets[key] = token_offsets(end - begin, array, slots)
        address = data_address(array)
        return PlaneTarget(
            address, offsets, strides[-2], shape[-2], shape[-1], rope, first_position, is_value
        )

    def store_tokens(
        self, layer: int, tokens: NDArray[np.int64], rows: Array, *, is_value: bool
    ) -> None:
        """Store some tokens of a plane: (E,) indices, (E, H * D) values of any KV dtype."""
        array = self._pairs[layer][is_value]
        heads = rows.reshape(len(tokens), *array.shape[-2:])
        if self._slots is None:
            array[tokens] = convert(heads, self.dtype)
            return
        slots = self._slots[self._header.ranges[layer][0] + tokens]
        kept = slots >= 0
        block, place = np.divmod(slots[kept], array.shape[1])
        array[block, place] = convert(heads[kept], self.dtype)

    @contextmanager
    def writing(self, layer: int, *, is_value: bool) -> Iterator[Array]:
        """Give a plane (T_l, H, D) of the object's dtype to fill; it is stored afterwards.

        It is the destination itself where that has this form, else memory of one plane.
        """
        array = self._pairs[layer][is_value]
        geometry = self._header.geometry
        if self._slots is None and self.dtype is geometry.dtype:
            yield array
            return
        begin, end = self._header.ranges[layer]
        shape = (end - begin, geometry.kv_heads, geometry.plane_dim(is_value=is_value))
        plane = aligned_empty(shape, geometry.dtype.numpy)
        yield plane
        values = convert(plane, self.dtype)
        if self._slots is None:
            array[...] = values
            return
        slots = self._slots[begin:end]
        kept = slots >= 0
        token_offsets(end - begin, array, slots)  # checks them
        block, place = np.divmod(slots[kept], array.shape[1])
        array[block, place] = values[kept]


def convert(rows: Array, dtype: KVDtype) -> Array:
    """Round to a dtype, to its finite range where float16 ends earlier than the source."""
    if rows.dtype == dtype.numpy:
        return rows
    if dtype is KVDtype.FLOAT16:
        wide = rows.astype(np.float32)
        limit = np.float32(np.finfo(np.float16).max)
        rows = np.where(np.isfinite(wide), np.clip(wide, -limit, limit), wide)
    with np.errstate(over="ignore"):
        result: Array = rows.astype(dtype.numpy)
    return result


def _on_cpu(array: object) -> Array:
    device = str(getattr(array, "device", "cpu"))
    if device != "cpu":
        raise GeometryError(
            "out", got=f"memory on {device}", expected="memory of the CPU", remedy="decode and copy"
        )
    return as_numpy(array)


def _slots(mapping: object, tokens: int) -> NDArray[np.int64]:
    slots = np.asarray(mapping)
    if slots.shape != (tokens,) or slots.dtype.kind not in "iu":
        raise GeometryError(
            "slot mapping", got=f"{slots.shape} of {slots.dtype}", expected=f"({tokens},) integers"
        )
    return slots.astype(np.int64)
