"""Where decoded K and V go: the addresses and strides of a cache in device memory.

Paged caches are blocks (B, N, H, D): B blocks of N slots, any strides but 1 for the last axis, so
that a cache laid out as (B, H, N, D) is passed transposed. A token goes to slot
``block * N + place``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachegen.errors import DtypeError, GeometryError
from cachegen.types import Geometry, KVDtype


def is_on_gpu(out: Any) -> bool:
    """Return whether a cache to decode into lies in the memory of a CUDA device."""
    while isinstance(out, (list, tuple)) and out:
        out = out[0]
    if hasattr(out, "data_ptr"):
        return str(getattr(out, "device", "cpu")).startswith("cuda")
    return hasattr(out, "__cuda_array_interface__")


@dataclass(frozen=True)
class Tensor:
    """A tensor in device memory: address, shape, strides in elements, element type, device.

    owner: whatever keeps the memory alive. device: index, or -1 for host memory.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: KVDtype | None
    device: int
    owner: object

    @classmethod
    def of(cls, tensor: Any) -> Tensor:
        """View a torch or NumPy tensor, or anything with ``__cuda_array_interface__`` or DLPack.

        dtype is None for types that KV caches do not have, such as int64.
        Raises: GeometryError for other objects.
        """
        if isinstance(tensor, Tensor):
            return tensor
        if isinstance(tensor, np.ndarray):
            strides = tuple(step // tensor.itemsize for step in tensor.strides)
            address = tensor.ctypes.data
            return cls(address, tensor.shape, strides, _kind(tensor.dtype), -1, tensor)
        if hasattr(tensor, "data_ptr"):
            index = tensor.device.index if tensor.device.type == "cuda" else -1
            dtype, shape = _kind(tensor.dtype), tuple(tensor.shape)
            return cls(tensor.data_ptr(), shape, tuple(tensor.stride()), dtype, index, tensor)
        if hasattr(tensor, "__cuda_array_interface__") or hasattr(tensor, "__dlpack__"):
            from cuda.core.utils import StridedMemoryView

            view = StridedMemoryView.from_any_interface(tensor, stream_ptr=-1)
            strides = tuple(view.strides or _contiguous(view.shape))
            return cls(
                view.ptr, tuple(view.shape), strides, _kind(view.dtype), view.device_id, view
            )
        raise GeometryError(
            "cache to decode into",
            got=type(tensor).__name__,
            expected="a torch tensor, or one with DLPack",
        )

    def __getitem__(self, index: int) -> Tensor:
        size = (self.dtype or KVDtype.FLOAT32).size_bytes
        address = self.address + index * self.strides[0] * size
        return Tensor(
            address, self.shape[1:], self.strides[1:], self.dtype, self.device, self.owner
        )


def _kind(dtype: Any) -> KVDtype | None:
    try:
        return KVDtype.of(dtype)
    except DtypeError:
        return None


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = [1]
    for size in reversed(shape[1:]):
        sizes.append(sizes[-1] * size)
    return tuple(reversed(sizes))


@dataclass(frozen=True)
class Place:
    """Where a plane goes: slot ``s`` of head ``h`` is at ``address`` plus, in elements,
    ``s // block_slots * block_stride + s % block_slots * slot_stride + h * head_stride``.
    """

    address: int
    slots: int
    block_slots: int
    block_stride: int
    slot_stride: int
    head_stride: int

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """What planes that share a table of rows have in common."""
        return self.slots, self.block_slots, self.block_stride, self.slot_stride


@dataclass(frozen=True)
class Target:
    """All planes of a cache: ``places[layer][0]`` for K, ``[1]`` for V. device: index or -1."""

    places: tuple[tuple[Place, Place], ...]
    dtype: KVDtype
    device: int
    owners: tuple[object, ...]

    @classmethod
    def of(cls, out: Any, geometry: Geometry, *, paged: bool) -> Target:
        """View a cache.

        out: for each layer K and V, each (B, N, H, D) where paged, else (T, H, D); or one tensor of
            them all, (L, 2, ...).
        Raises: GeometryError, DtypeError if it does not fit the geometry.
        """
        pairs = cls.pairs(out)
        if len(pairs) != geometry.layers:
            raise GeometryError("layers of the cache", got=len(pairs), expected=geometry.layers)
        places = []
        for layer, pair in enumerate(pairs):
            row = []
            for is_value, tensor in zip((False, True), pair, strict=True):
                what = f"{'V' if is_value else 'K'} cache of layer {layer}"
                row.append(_place(tensor, geometry, what, is_value=is_value, paged=paged))
            places.append((row[0], row[1]))
        flat = [tensor for pair in pairs for tensor in pair]
        devices = {tensor.device for tensor in flat}
        if len(devices) != 1:
            raise GeometryError("devices of the cache", got=sorted(devices), expected="one")
        owners = tuple(tensor.owner for tensor in flat)
        return cls(tuple(places), geometry.dtype, devices.pop(), owners)

    @staticmethod
    def pairs(out: Any) -> list[tuple[Tensor, Tensor]]:
        """Return K and V of every layer of a cache. Raises: GeometryError."""
        if not isinstance(out, (list, tuple)):
            whole = Tensor.of(out)
            if len(whole.shape) < 2 or whole.shape[1] != 2:
                raise GeometryError("shape of the cache", got=whole.shape, expected="(L, 2, ...)")
            return [(whole[layer][0], whole[layer][1]) for layer in range(whole.shape[0])]
        pairs = []
        for pair in out:
            if isinstance(pair, (list, tuple)):
                if len(pair) != 2:
                    raise GeometryError("cache of a layer", got=len(pair), expected="K and V")
                pairs.append((Tensor.of(pair[0]), Tensor.of(pair[1])))
                continue
            both = Tensor.of(pair)
            if len(both.shape) < 1 or both.shape[0] != 2:
                raise GeometryError("cache of a layer", got=both.shape, expected="K and V")
            pairs.append((both[0], both[1]))
        return pairs


def _place(tensor: Tensor, geometry: Geometry, what: str, *, is_value: bool, paged: bool) -> Place:
    shape, strides = tensor.shape, tensor.strides
    head = (geometry.kv_heads, geometry.plane_dim(is_value=is_value))
    if len(shape) != 3 + paged or shape[-2:] != head:
        first = ("blocks", "block size") if paged else ("tokens",)
        raise GeometryError(what, got=shape, expected=(*first, *head))
    if head[1] > 1 and strides[-1] != 1:
        raise GeometryError(what, got=f"strides {strides}", expected="the last axis contiguous")
    if min(strides) < 0:
        raise GeometryError(what, got=f"strides {strides}", expected="none below 0")
    if tensor.dtype is not geometry.dtype:
        got = tensor.dtype.label if tensor.dtype else "another type"
        remedy = "decode on the CPU, which converts, or keep the cache in the dtype that was stored"
        raise DtypeError(what, got=got, expected=geometry.dtype.label, remedy=remedy)
    if paged:
        blocks, size = shape[:2]
        return Place(
            tensor.address, blocks * size, max(size, 1), strides[0], strides[1], strides[2]
        )
    return Place(tensor.address, shape[0], 1, strides[0], 0, strides[1])
