"""Reading and writing blocks of an engine's paged cache, on the CPU or on a GPU.

``stage`` begins to copy blocks out, and ``finish_copies`` waits until the engine may overwrite
them: on a CPU a thread copies meanwhile, on a GPU the engine's own stream keeps the order. Turning
the copy into host rows can then happen in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachegen.chunk import KVChunk, LayerKV, as_numpy
from cachegen.connectors.device_blocks import DeviceBlocks, find_device
from cachegen.connectors.layout import BlockLayout
from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.native.cuda.device import Device
from cachegen.types import Array, Geometry, KVDtype, RopeSpec


@dataclass(frozen=True)
class StagedBlocks:
    """Blocks of all layers, copied out of the cache.

    ready: waits until the copy is complete and returns the blocks of every layer: on the host, or
        on the GPU where its kernels encode them.
    """

    ready: Callable[[], list[Any]]
    size_bytes: int


class PagedCache:
    """All layers of an engine's cache on one rank.

    caches: one torch tensor per layer, in order of depth. layouts: theirs.
    block_tokens: tokens of a block as the scheduler counts them; the cache's own blocks may be a
        fraction of it.
    device: whose kernels encode and decode the blocks; None: that of a cache on a GPU, if it has
        any. The emulated one is for tests.
    """

    def __init__(
        self,
        caches: Sequence[Any],
        layouts: Sequence[BlockLayout],
        *,
        block_tokens: int,
        device: Device | None = None,
    ) -> None:
        if not caches or len(caches) != len(layouts):
            raise GeometryError(
                "layers of the paged cache", got=(len(caches), len(layouts)), expected="as many"
            )
        self._caches = list(caches)
        self._layouts = list(layouts)
        self._block_tokens = block_tokens
        dtypes = {KVDtype.of(cache.dtype) for cache in caches}
        sizes = {(layout.heads, layout.key_dim, layout.value_dim) for layout in layouts}
        if len(dtypes) > 1 or len(sizes) > 1:
            raise UnsupportedModelError(
                "layers of the paged cache",
                got=f"{len(dtypes)} dtypes, {len(sizes)} head geometries",
                expected="the same in all layers",
            )
        for cache, layout in zip(caches, layouts, strict=True):
            layout.check(cache.shape, cache.element_size())
        heads, key_dim, value_dim = sizes.pop()
        self.geometry = Geometry(len(caches), heads, key_dim, value_dim, dtypes.pop())
        self._on_host = caches[0].device.type == "cpu"
        # Memory of a CPU cache, as integers: NumPy copies those much faster than bfloat16.
        self._arrays = [_bits(as_numpy(cache)) for cache in caches] if self._on_host else []
        self._stream: Any = None
        self._device = find_device(caches[0], layouts) if device is None else device
        self._copier = ThreadPoolExecutor(1, "cachegen-copy")
        self._copying: list[tuple[frozenset[int], Future[list[Array]]]] = []

    def stage(self, block_ids: Sequence[int]) -> StagedBlocks:
        """Begin to copy blocks out of every layer; called in the order of the engine's work.

        block_ids: as the scheduler counts blocks. The engine may free them for others, but nothing
        may be written to them before ``finish_copies``.
        """
        if not self._on_host:
            return self._stage_device(block_ids)
        copying = self._copier.submit(self._copy, tuple(block_ids))
        self._copying.append((frozenset(block_ids), copying))
        values = len(block_ids) * self._block_tokens * self.geometry.values_per_token
        return StagedBlocks(copying.result, values * self._arrays[0].itemsize)

    @property
    def is_copying(self) -> bool:
        """True if there is something for ``finish_copies`` to wait for."""
        return bool(self._copying)

    def finish_copies(self, block_ids: Collection[int] | None = None) -> None:
        """Wait until what was staged is copied, or will be before the engine's writes.

        block_ids: those that will be written to, None for all.
        """
        for blocks, copying in self._copying:
            if block_ids is None or not blocks.isdisjoint(block_ids):
                wait([copying])
        self._copying = [entry for entry in self._copying if not entry[1].done()]

    def close(self) -> None:
        """Stop the thread that copies, once it has nothing to do."""
        self._copier.shutdown(wait=False)

    def to_chunk(
        self, blocks: Sequence[Any], *, first_position: int, rope: RopeSpec | None
    ) -> KVChunk | DeviceBlocks:
        """Turn the blocks of every layer into a chunk; it stays where they are.

        Raises: GeometryError.
        """
        dtype = self.geometry.dtype.numpy
        if self._device is not None:
            return DeviceBlocks.of(
                [raw.view(dtype) if isinstance(raw, np.ndarray) else raw for raw in blocks],
                self._layouts,
                device=self._device,
                stream=None if self._on_host else self._device_stream(),
                first_position=first_position,
                rope=rope,
            )
        layers = []
        for raw, layout in zip(blocks, self._layouts, strict=True):
            keys, values = layout.unpack(_bits(raw))
            layers.append(LayerKV(keys.view(dtype), values.view(dtype)))
        return KVChunk.from_layers(layers, first_position=first_position, rope=rope)

    def room(self, tokens: int) -> DeviceBlocks | None:
        """Return new blocks on the GPU for a chunk to be decoded to, or None to decode on the host.

        tokens: of the chunk; whole blocks.
        """
        if self._device is None:
            return None
        import torch

        first = self._caches[0]
        stream = None if self._on_host else self._device_stream()
        # Allotted on the stream that will use it: what had the memory before is done there.
        with torch.cuda.stream(stream):
            blocks = [
                torch.empty(
                    (tokens // layout.block_tokens, *layout.block_shape),
                    dtype=first.dtype,
                    device=first.device,
                )
                for layout in self._layouts
            ]
        return DeviceBlocks.of(blocks, self._layouts, device=self._device, stream=stream)

    def to_blocks(self, chunk: KVChunk | DeviceBlocks) -> list[Any]:
        """Turn a chunk that fills whole blocks into the blocks of every layer.

        Returns: integers on the host, or what ``room`` made.
        Raises: GeometryError if the chunk is not of this cache, so that it cannot be written.
        """
        if isinstance(chunk, DeviceBlocks):
            return list(chunk.blocks)
        if chunk.geometry != self.geometry or not chunk.is_uniform:
            raise GeometryError(
                "geometry of a stored chunk", got=chunk.geometry, expected=self.geometry
            )
        return [
            layout.pack(_bits(layer.keys), _bits(layer.values))
            for layer, layout in zip(chunk.layers, self._layouts, strict=True)
        ]

    def write_layer(
        self, layer: int, blocks: Any, block_ids: Sequence[int], *, skip_blocks: int = 0
    ) -> None:
        """Write blocks into one layer of the cache.

        blocks: (n, ...), as ``to_blocks`` returned them, of which the first skip_blocks scheduler
        blocks are left out.
        block_ids: where the others go.
        """
        layout = self._layouts[layer]
        ratio = self._block_tokens // layout.block_tokens
        part = blocks[skip_blocks * ratio :]
        own = self._own_ids(block_ids, layout)
        if len(part) != len(own):
            raise GeometryError("blocks to write", got=len(part), expected=len(own))
        if self._on_host:
            rows = part if isinstance(part, np.ndarray) else _bits(as_numpy(part))
            np.moveaxis(self._arrays[layer], layout.block_axis, 0)[own] = rows
        else:
            self._write_device(layer, part, own)

    def finish_writes(self) -> None:
        """Wait until everything written by this thread is in the cache."""
        if not self._on_host:
            self._device_stream().synchronize()

    def _copy(self, block_ids: Sequence[int]) -> list[Array]:
        """Copy blocks of every layer into one allocation: large enough for huge pages."""
        own = [self._own_ids(block_ids, layout) for layout in self._layouts]
        shapes = [
            (len(ids), *layout.block_shape) for ids, layout in zip(own, self._layouts, strict=True)
        ]
        memory = np.empty(sum(math.prod(shape) for shape in shapes), self._arrays[0].dtype)
        copies, begin = [], 0
        for array, layout, ids, shape in zip(self._arrays, self._layouts, own, shapes, strict=True):
            copy = memory[begin : begin + math.prod(shape)].reshape(shape)
            begin += copy.size
            blocks = np.moveaxis(array, layout.block_axis, 0)
            # Block by block: a plain copy each, without Python's lock.
            for place, block in enumerate(ids):
                np.copyto(copy[place], blocks[block])
            copies.append(copy)
        return copies

    def _own_ids(self, block_ids: Sequence[int], layout: BlockLayout) -> Array:
        """Numbers of the cache's own blocks that make up the scheduler's blocks."""
        ids = np.asarray(block_ids, np.int64)
        ratio = self._block_tokens // layout.block_tokens
        if ratio == 1:
            return ids
        own: Array = (ids[:, None] * ratio + np.arange(ratio)).reshape(-1)
        return own

    def _device_stream(self) -> Any:
        if self._stream is None:
            import torch

            self._stream = torch.cuda.Stream(device=self._caches[0].device)
        return self._stream

    def _stage_device(self, block_ids: Sequence[int]) -> StagedBlocks:
        import torch

        gathered = []
        for cache, layout in zip(self._caches, self._layouts, strict=True):
            own = torch.from_numpy(self._own_ids(block_ids, layout)).to(cache.device)
            blocks = cache.index_select(layout.block_axis, own).movedim(layout.block_axis, 0)
            gathered.append(blocks)
        copied = torch.cuda.Event()
        copied.record()
        size_bytes = sum(blocks.numel() * blocks.element_size() for blocks in gathered)

        def ready() -> list[Any]:
            if self._device is not None:
                self._device_stream().wait_event(copied)
                return gathered
            # On a stream of its own: the engine's next steps do not wait for the bus.
            stream = torch.cuda.Stream(device=gathered[0].device)
            with torch.cuda.stream(stream):
                stream.wait_event(copied)
                return [as_numpy(blocks.contiguous().cpu()) for blocks in gathered]

        return StagedBlocks(ready, size_bytes)

    def _write_device(self, layer: int, part: Any, own: Array) -> None:
        import torch

        cache, axis = self._caches[layer], self._layouts[layer].block_axis
        with torch.cuda.stream(self._device_stream()):
            if isinstance(part, np.ndarray):
                bits = torch.from_numpy(np.ascontiguousarray(part))
                part = bits.to(cache.device).view(cache.dtype)
            moved = part.movedim(0, axis)
            cache.index_copy_(axis, torch.from_numpy(own).to(cache.device), moved)


def _bits(array: Array) -> Array:
    """View values as signed integers of the same size, which torch has too."""
    return array.view(np.int16 if array.itemsize == 2 else np.int32)
