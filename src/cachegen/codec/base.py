"""The interface of a codec, and what all codecs share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV, aligned_empty
from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, Buffer
from cachegen.codec.header import Header, SegmentBody
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import CorruptError
from cachegen.profile import Profile
from cachegen.types import Array, ChunkKey

Result = TypeVar("Result")


class Codec(ABC):
    """Turns a chunk into one object and back; a frozen dataclass that survives JSON.

    Adding a codec: subclass, give it a name and an id, list it in ``registry.py`` and FORMAT.md.
    """

    name: ClassVar[str]
    codec_id: ClassVar[int]

    @abstractmethod
    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        """Encode a chunk into an object.

        chunk: any geometry; K and V finite. key: embedded, so that a reader can refuse another.
        Returns: the object. Raises: NonFiniteError, GeometryError, ProfileError.
        """

    def decode(
        self,
        data: Buffer,
        *,
        key: ChunkKey | None = None,
        allow_partial: bool = False,
        max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    ) -> KVChunk:
        """Decode an object of this codec; its parameters come from the object.

        allow_partial: accept an object that ends early and decode the passes that are whole.
        Returns: a chunk in the dtype that was encoded. Raises: FormatError, KeyMismatchError.
        """
        reader = ObjectReader(
            data, key=key, allow_partial=allow_partial, max_decoded_bytes=max_decoded_bytes
        )
        if reader.header.codec_id != self.codec_id:
            raise CorruptError(
                "codec id",
                got=reader.header.codec_id,
                expected=f"{self.codec_id} ({self.name})",
                remedy="use cachegen.decode, which picks the codec by the object",
            )
        chunk = empty_chunk(reader.header)
        target = Target(reader.header, chunk)
        self.decode_into(reader, target, profile=getattr(self, "profile", None))
        return chunk

    @classmethod
    @abstractmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        """Decode a checked object to where a target says. Raises: FormatError, ProfileError."""

    @classmethod
    def coded_shape(cls, header: Header, group: int, pass_index: int) -> tuple[int, int, int]:
        """Return tokens, channels and digit shift of a coded segment, for accounting.

        All tokens that the plane holds and no shift, unless a codec overrides it.
        """
        plane = header.groups[group]
        begin, end = header.ranges[plane.layer]
        dim = header.geometry.plane_dim(is_value=plane.planes == 2)
        return end - begin, header.geometry.kv_heads * dim, 0

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the configuration as JSON-able values; it determines the object's bytes."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a codec from what ``config`` returned. Raises: ConfigError."""


def check_one_plane_per_group(header: Header) -> None:
    """Raise CorruptError unless groups are single planes in the default order."""
    expected = [(index // 2, 1, 1 + index % 2) for index in range(2 * header.geometry.layers)]
    if [(group.layer, group.layers, group.planes) for group in header.groups] != expected:
        raise CorruptError("groups", got="joined planes", expected="one plane per group")


def empty_chunk(header: Header) -> KVChunk:
    """Allocate the chunk that a header describes, values undefined.

    A uniform chunk with equal K and V dimensions is one array (L, 2, T, H, D).
    """
    geometry = header.geometry
    dtype, heads = geometry.dtype.numpy, geometry.kv_heads
    uniform = all(held == (0, header.tokens) for held in header.ranges)
    if uniform and geometry.key_dim == geometry.value_dim:
        shape = (geometry.layers, 2, header.tokens, heads, geometry.key_dim)
        return KVChunk.from_array(aligned_empty(shape, dtype), first_position=header.first_position)
    layers = [
        LayerKV(
            aligned_empty((end - begin, heads, geometry.key_dim), dtype),
            aligned_empty((end - begin, heads, geometry.value_dim), dtype),
            begin,
        )
        for begin, end in header.ranges
    ]
    return KVChunk.from_layers(layers, tokens=header.tokens, first_position=header.first_position)


def planes_of(chunk: KVChunk) -> list[Array]:
    """Return the planes in group order, each (T_l, H, D): K and V of layer 0, of layer 1, ..."""
    return [plane for layer in chunk.layers for plane in (layer.keys, layer.values)]


def each_plane(work: Callable[[int], Result], count: int) -> list[Result]:
    """Do something for every plane, in as many threads as a call may use.

    Returns: results in order. Of several errors that of the first plane is raised. Threads end with
    the call.
    """
    most = min(native.threads(), count)
    if most <= 1:
        return [work(plane) for plane in range(count)]
    with ThreadPoolExecutor(max_workers=most) as pool:
        return list(pool.map(work, range(count)))


def payload_order(passes: list[list[SegmentBody]]) -> list[SegmentBody]:
    """Join the segments of all groups pass by pass: every pass 0 first."""
    return [segment for segments in passes for segment in segments]


def read_scales(side: memoryview, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """Read scales from the front of side information. Raises: CorruptError."""
    size = shape[0] * shape[1] * dtype.itemsize
    if len(side) < size:
        raise CorruptError("scales", got=f"{len(side)} bytes", expected=f"{size} bytes")
    return np.frombuffer(side[:size], dtype).reshape(shape)


def quantization_error(scales: Array, levels: float, width: int) -> float:
    """Return the expected squared error of uniform quantisation: step^2 / 12 for each value.

    scales: any shape, one per row of width values; step = scale / levels.
    """
    steps: NDArray[np.float64] = np.asarray(scales, np.float64) / levels
    return float(np.sum(steps**2) / 12 * width)
