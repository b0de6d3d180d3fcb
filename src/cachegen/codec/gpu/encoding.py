"""Chunks on their way from device memory to objects: planned, launched, fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cachegen.chunk import KVChunk, LayerKV, as_numpy
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import write_object
from cachegen.codec.gpu.collect import Collector, Results
from cachegen.codec.gpu.encode_batch import EncodeBatch, Feed
from cachegen.codec.gpu.encode_progressive import ProgressiveEncoding
from cachegen.codec.gpu.encode_rows import CacheGenEncoding, Int8Encoding
from cachegen.codec.gpu.encode_tables import encode_tables
from cachegen.codec.gpu.prepared import Mapping, stream_handle
from cachegen.codec.gpu.target import Target
from cachegen.codec.header import Header, SegmentTable, plane_groups
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.errors import CacheGenError, DtypeError, GeometryError
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device
from cachegen.types import ChunkKey, Geometry, RopeSpec

Encoding = ProgressiveEncoding | Int8Encoding | CacheGenEncoding


@dataclass(frozen=True)
class DeviceChunk:
    """A run of tokens in device memory.

    planes: for each layer K and V, as ``out`` of ``decode``: (T, H, D), or with slots blocks of a
        paged cache (blocks, block size, H, D), any strides but a contiguous last axis.
    slots: (T,) integers, ``block * block_size + place``, on the host; None for rows in order.
    first_position: of token 0. rope: what K was rotated with, or None if unknown or absent.
    begins: of every layer the first token that it holds, for sliding windows; None: all hold all.
    """

    planes: Any
    slots: Any = None
    first_position: int = 0
    rope: RopeSpec | None = None
    begins: tuple[int, ...] | None = None

    def geometry(self) -> tuple[Geometry, int]:
        """Return geometry and number of tokens. Raises: GeometryError, DtypeError."""
        pairs = Target.pairs(self.planes)
        if not pairs:
            raise GeometryError("layers", got=0, expected="at least one")
        keys, values = pairs[0]
        paged = self.slots is not None
        if len(keys.shape) != 3 + paged or len(values.shape) != 3 + paged:
            raise GeometryError(
                "axes of K and V of a layer",
                got=(keys.shape, values.shape),
                expected="(blocks, block size, H, D)" if paged else "(T, H, D)",
            )
        if keys.dtype is None:
            raise DtypeError("dtype of K", got="another", expected="float16, bfloat16 or float32")
        geometry = Geometry(
            len(pairs), keys.shape[-2], keys.shape[-1], values.shape[-1], keys.dtype
        )
        begins = self.layer_begins(len(pairs))
        return geometry, len(self.slots) if paged else keys.shape[0] + begins[0]

    def layer_begins(self, layers: int) -> tuple[int, ...]:
        """Return the first token that each layer holds. Raises: GeometryError."""
        begins = (0,) * layers if self.begins is None else self.begins
        if len(begins) != layers or min(begins) < 0:
            raise GeometryError("first tokens of layers", got=begins, expected=f"{layers} of them")
        return begins

    def to_host(self) -> KVChunk:
        """Copy the chunk to the host."""
        pairs = self.planes
        pairs = [pair if isinstance(pair, (list, tuple)) else (pair[0], pair[1]) for pair in pairs]
        begins = self.layer_begins(len(pairs))
        layers = [
            LayerKV(self._rows(keys, begin), self._rows(values, begin), begin)
            for begin, (keys, values) in zip(begins, pairs, strict=True)
        ]
        return KVChunk.from_layers(layers, first_position=self.first_position, rope=self.rope)

    def _rows(self, tensor: Any, begin: int) -> Any:
        if self.slots is None:
            return as_numpy(tensor)
        slots = np.asarray(self.slots, np.int64)[begin:]
        where: tuple[Any, ...] = np.divmod(slots, tensor.shape[1])
        if not isinstance(tensor, np.ndarray):
            import torch

            where = tuple(torch.from_numpy(part).to(tensor.device) for part in where)
        return as_numpy(tensor[where])


def does_encode(codec: Codec) -> bool:
    """Return whether the kernels encode with a codec; others are encoded on the CPU."""
    return isinstance(codec, (Int8Codec, CacheGenCodec, ProgressiveCodec))


class EncodeJob:
    """Launches that encode a batch. Make one with ``cachegen.codec.gpu.prepare_encode``.

    ``launch`` allots no memory and waits for nothing, so that it may be captured in a CUDA graph;
    it can be repeated while the chunks stay where they are. ``finish`` waits, fetches what was
    coded and returns the objects.
    """

    def __init__(
        self,
        device: Device,
        codec: Codec,
        chunks: Sequence[DeviceChunk],
        keys: Sequence[ChunkKey | None],
        *,
        stream: int,
    ) -> None:
        self.device = device
        self.stream = stream
        self.fallbacks = 0
        self._codec = codec
        self._chunks = list(chunks)
        self._keys = list(keys)
        batch = self._batch = EncodeBatch(device, encode_tables(device, stream), stream)
        self._mappings: list[Mapping] = []
        self._feeds = [self._feed(chunk) for chunk in chunks]
        self._encodings = [_plan(batch, feed, codec) for feed in self._feeds]
        zero, self._zero_bytes = batch.plan_launches()
        job = batch.job
        self._upload = device.allocate(job.upload_bytes, stream)
        self._work = device.allocate(job.workspace_bytes, stream)
        self._results_at = self._work.address + job.results_offset
        self._zero_at = self._results_at + int(zero ^ plan.RESULTS)
        self._image, self.launches = job.finish(self._upload.address, self._work.address)
        self.upload_bytes, self.workspace_bytes = self._image.nbytes, self._work.size_bytes
        device.upload(self._upload.address, self._image, stream)

    def _feed(self, chunk: DeviceChunk) -> Feed:
        geometry, tokens = chunk.geometry()
        paged = chunk.slots is not None
        target = Target.of(chunk.planes, geometry, paged=paged)
        begins = chunk.layer_begins(geometry.layers)
        for begin, places in zip(begins, target.places, strict=True):
            for place in places:
                if place.address % geometry.dtype.size_bytes:
                    raise GeometryError("address of K or V", got="unaligned", expected="aligned")
                held = tokens - begin
                if held < 1 or (not paged and place.slots != held):
                    raise GeometryError("tokens of a layer", got=place.slots, expected=held)
        slots = None
        if paged:
            slots = np.asarray(chunk.slots)
            if slots.size and int(slots.min()) < 0:
                raise GeometryError(
                    "slot mapping", got=int(slots.min()), expected="no token left out"
                )
        mapping = Mapping(slots, [tokens])
        self._mappings.append(mapping)
        shadow = _shadow(chunk, geometry, tokens)
        header = Header(
            geometry=geometry,
            tokens=tokens,
            first_position=chunk.first_position,
            codec_id=self._codec.codec_id,
            passes=1,
            params=b"",
            rope=_backwards(chunk.rope) if isinstance(self._codec, ProgressiveCodec) else None,
            profile=None,
            key=None,
            groups=plane_groups(geometry.layers),
            ranges=tuple((begin, tokens) for begin in begins),
            segments=SegmentTable.empty(),
            header_bytes=0,
        )
        return Feed(shadow, header, target, mapping.addresses(self._batch.job)[0])

    def launch(self, stream: Any = None) -> None:
        """Start all kernels. stream: another one than the batch was prepared for, or None."""
        handle = self.stream if stream is None else stream_handle(stream, None)
        self.device.zero(self._zero_at, self._zero_bytes, handle)
        for launch in self.launches:
            self.device.launch(*launch, handle)

    def finish(self) -> list[bytes]:
        """Wait for the kernels, and return the objects.

        A chunk that the kernels give up is encoded on the CPU: not finite, beyond the reach of the
        coarsest pass, or with streams so uneven that their room did not suffice.
        Raises: NonFiniteError and others as ``Codec.encode``, GeometryError for a slot beyond.
        """
        job = self._batch.job
        image = self.device.download(self._results_at, job.results.size_bytes, self.stream)
        results = Results(self._batch, image, self._upload.address, self._work.address)
        flags = results.array(self._batch.error_words, "<u4", self._batch.errors)
        if (flags & plan.BAD_SLOT).any():
            raise GeometryError("slot mapping", got="a slot beyond", expected="slots of the cache")
        record = self._batch.record.copy()
        plan.relocate(record, self._upload.address, self._work.address, self._results_at)
        for name in ("streams", "matrices", "groups", "planes", "active", "errors"):
            record[name] |= plan.ABSOLUTE
        collector = Collector(self.device, record, self.stream)
        sound = [not flags[feed.errors].any() for feed in self._feeds]
        for encoding, is_sound in zip(self._encodings, sound, strict=True):
            if is_sound:
                encoding.choose(results, collector)
        collector.fetch()
        objects = []
        for index, encoding in enumerate(self._encodings):
            if not sound[index]:
                self.fallbacks += 1
                host = self._chunks[index].to_host()
                objects.append(self._codec.encode(host, key=self._keys[index]))
                continue
            parts = encoding.write(collector)
            shadow = self._feeds[index].shadow
            objects.append(write_object(shadow, key=self._keys[index], **parts))
        return objects


def _plan(batch: EncodeBatch, feed: Feed, codec: Codec) -> Encoding:
    if isinstance(codec, ProgressiveCodec):
        return ProgressiveEncoding(batch, feed, codec)
    if isinstance(codec, Int8Codec):
        return Int8Encoding(batch, feed, codec)
    if isinstance(codec, CacheGenCodec):
        return CacheGenEncoding(batch, feed, codec)
    raise CacheGenError(f"no kernels encode with {codec.name}")


def _shadow(chunk: DeviceChunk, geometry: Geometry, tokens: int) -> KVChunk:
    """Return a chunk of this shape whose arrays have no memory of their own."""
    nothing = np.zeros((), geometry.dtype.numpy)
    layers = []
    for begin in chunk.layer_begins(geometry.layers):
        keys, values = (
            np.broadcast_to(nothing, (tokens - begin, geometry.kv_heads, dim))
            for dim in (geometry.key_dim, geometry.value_dim)
        )
        layers.append(LayerKV(keys, values, begin))
    return KVChunk.from_layers(
        layers, tokens=tokens, first_position=chunk.first_position, rope=chunk.rope
    )


def _backwards(rope: RopeSpec | None) -> RopeSpec | None:
    """Return the RoPE whose attention scale undoes that of another one."""
    if rope is None:
        return None
    scales = tuple(float(1 / np.float32(scale)) for scale in rope.attention_scale)
    return replace(rope, attention_scale=scales)
