"""Blocks of a paged cache that stay on a GPU: coded there, so that no KV crosses the bus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachegen.chunk import KVChunk
from cachegen.codec import gpu
from cachegen.codec.base import Codec
from cachegen.connectors.cpu_blocks import Packing
from cachegen.connectors.layout import BlockLayout
from cachegen.errors import ConfigError
from cachegen.native.cuda.device import Device, cuda_device
from cachegen.profile import Profile
from cachegen.types import ChunkKey, RopeSpec


@dataclass(frozen=True)
class DeviceBlocks:
    """A chunk's blocks in memory of their own on a GPU.

    blocks: for each layer (n, *block_shape). chunk: the same as K and V of tokens in order.
    stream: on which they may be used. device: whose kernels code them.
    """

    blocks: tuple[Any, ...]
    chunk: gpu.DeviceChunk
    tokens: int
    stream: Any
    device: Device

    @classmethod
    def of(
        cls,
        blocks: Sequence[Any],
        layouts: Sequence[BlockLayout],
        *,
        device: Device,
        stream: Any = None,
        first_position: int = 0,
        rope: RopeSpec | None = None,
    ) -> DeviceBlocks:
        """View blocks of all layers as tokens. blocks: tensors, or arrays for the emulation."""
        planes = [_planes(part, layout) for part, layout in zip(blocks, layouts, strict=True)]
        tokens = len(blocks[0]) * layouts[0].block_tokens
        chunk = gpu.DeviceChunk(planes, np.arange(tokens), first_position, rope)
        return cls(tuple(blocks), chunk, tokens, stream, device)

    def to_host(self) -> KVChunk:
        """Copy the chunk to the host."""
        return self.chunk.to_host()

    def encode(self, codec: Codec, key: ChunkKey) -> bytes:
        """Encode the chunk. Raises: as ``Codec.encode``."""
        return gpu.encode(codec, self.chunk, key=key, stream=self.stream, device=self.device)

    def decode(
        self, data: bytes, key: ChunkKey, *, allow_partial: bool, profile: Profile | None
    ) -> None:
        """Decode an object of as many tokens into the blocks. Raises: as ``cachegen.decode``."""
        gpu.decode(
            data,
            out=self.chunk.planes,
            slot_mapping=self.chunk.slots,
            key=key,
            allow_partial=allow_partial,
            profile=profile,
            stream=self.stream,
            device=self.device,
        )


def find_device(tensor: Any, layouts: Sequence[BlockLayout]) -> Device | None:
    """Return the device whose kernels can code a cache, or None: the host codes it.

    None for a cache on the host, packed blocks, and without ``cachegen[cuda]``.
    """
    if tensor.device.type != "cuda" or any(one.packing is not Packing.ROWS for one in layouts):
        return None
    try:
        return cuda_device(tensor.device.index or 0)
    except ConfigError:  # no cuda.core, or a driver that cannot load the kernels
        return None


def _planes(blocks: Any, layout: BlockLayout) -> tuple[Any, Any]:
    """View blocks (n, *block_shape) as K and V, (n, N, H, D) each."""
    axes = layout.axes.replace("B", "")
    if "C" in axes:
        keys, values = blocks[..., : layout.key_dim], blocks[..., layout.key_dim :]
    else:
        keys, values = blocks[:, 0], blocks[:, 1]
    if axes.index("H") < axes.index("N"):
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)
    return keys, values
