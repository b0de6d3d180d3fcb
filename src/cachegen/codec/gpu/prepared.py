"""A batch on its way to the device: planned, uploaded, launched any number of times, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import Buffer
from cachegen.codec.gpu.batch import Batch, Item
from cachegen.codec.gpu.frozen import frozen_tables
from cachegen.codec.gpu.progressive import number_streams, plan_progressive
from cachegen.codec.gpu.rows import plan_cachegen, plan_int8, plan_raw
from cachegen.codec.gpu.streams import UnsoundError
from cachegen.codec.gpu.target import Target, Tensor
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.errors import ConfigError, CorruptError, GeometryError
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device
from cachegen.profile import Profile
from cachegen.types import ChunkKey


def stream_handle(stream: Any, out: Any) -> int:
    """Return the handle of a stream: torch's, CuPy's, a number; of torch's current one for None."""
    if stream is None:
        if type(out).__module__.partition(".")[0] == "torch" and out.device.type == "cuda":
            import torch

            return int(torch.cuda.current_stream(out.device).cuda_stream)
        return 0
    if isinstance(stream, int):
        return stream
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise ConfigError("stream", got=type(stream).__name__, expected="a CUDA stream or its handle")


class Prepared:
    """Launches that decode a batch. Make one with ``cachegen.codec.gpu.prepare``.

    ``launch`` allots no memory and waits for nothing, so that it may be captured in a CUDA graph;
    it can be repeated while out and a slot mapping on the device stay where they are.
    """

    def __init__(
        self,
        device: Device,
        objects: list[Buffer],
        *,
        out: Any,
        slot_mapping: Any,
        stream: int,
        keys: list[ChunkKey | None],
        allow_partial: bool,
        profile: Profile | None,
        max_decoded_bytes: int,
    ) -> None:
        self.device = device
        self.stream = stream
        self._objects = objects
        self._allow_partial = allow_partial
        self._max_decoded_bytes = max_decoded_bytes
        self._profile = profile
        self._out = out
        self.fallbacks = 0
        tables = frozen_tables(device, stream)
        readers = [
            ObjectReader(
                data, key=key, allow_partial=allow_partial, max_decoded_bytes=max_decoded_bytes
            )
            for data, key in zip(objects, keys, strict=True)
        ]
        mapping = Mapping(slot_mapping, [reader.header.tokens for reader in readers])
        geometry = readers[0].header.geometry
        for reader in readers:
            if reader.header.geometry != geometry:
                raise GeometryError(
                    "geometry of an object", got=reader.header.geometry, expected=geometry
                )
        target = Target.of(out, geometry, paged=slot_mapping is not None)
        _check_rows(target, readers[0], paged=slot_mapping is not None)
        data = list(objects)
        while True:
            batch = Batch(device, tables, stream)
            addresses = mapping.addresses(batch.job)
            self._items: list[Item] = []
            failed = None
            for index, reader in enumerate(readers):
                item = Item(batch.job, data[index], reader, target, addresses[index])
                self._items.append(item)
                try:
                    _plan(batch, item, profile)
                except (UnsoundError, CorruptError):
                    failed = index
                    break
            if failed is None:
                break
            # The CPU names what is wrong; if nothing is, it decodes what no kernel does.
            data[failed] = RawCodec().encode(self._on_cpu(objects[failed]))
            readers[failed] = ObjectReader(data[failed], max_decoded_bytes=max_decoded_bytes)
            self.fallbacks += 1
        number_streams(batch)
        errors, self._zero_bytes = batch.finish()
        self._errors = batch.errors
        self._upload = device.allocate(batch.job.upload_bytes, stream)
        self._work = device.allocate(batch.job.workspace_bytes, stream)
        self._flags = self._work.address + int(errors ^ plan.WORK)
        self._image, self.launches = batch.job.finish(self._upload.address, self._work.address)
        self.upload_bytes = self._image.nbytes
        self.workspace_bytes = self._work.size_bytes
        device.upload(self._upload.address, self._image, stream)
        self._held = (target, mapping, batch.tables)

    def upload(self) -> None:
        """Copy the batch to the device once more, as ``prepare`` does first; for measurements."""
        self.device.upload(self._upload.address, self._image, self.stream)

    def launch(self, stream: Any = None) -> None:
        """Start all kernels. stream: another one than the batch was prepared for, or None."""
        handle = self.stream if stream is None else stream_handle(stream, None)
        self.device.zero(self._flags, self._zero_bytes, handle)
        for launch in self.launches:
            self.device.launch(*launch, handle)

    def check(self) -> None:
        """Wait for the kernels and raise what they found wrong, as the CPU names it.

        Raises: FormatError for damaged data, GeometryError for a slot beyond the cache.
        """
        size = 4 * self._errors
        flags = self.device.download(self._flags, size, self.stream)[:size].view("<u4")
        if not flags.any():
            return
        if (flags & plan.BAD_SLOT).any():
            raise GeometryError(
                "slot mapping", got="a slot beyond it", expected="slots of the cache"
            )
        for data, item in zip(self._objects, self._items, strict=True):
            found = flags[item.errors]
            if found.any():
                self._on_cpu(data)
                raise CorruptError("object", got=f"flags {found.max()}", expected="sound data")

    def _on_cpu(self, data: Buffer) -> Any:
        from cachegen.codec.registry import decode

        return decode(
            data,
            profile=self._profile,
            allow_partial=self._allow_partial,
            max_decoded_bytes=self._max_decoded_bytes,
        )


class Mapping:
    """Slots of the tokens of a batch, on the host or on the device."""

    def __init__(self, mapping: Any, tokens: list[int]) -> None:
        self._tokens = tokens
        self._host: NDArray[np.int64] | None = None
        self._tensor: Tensor | None = None
        if mapping is None:
            return
        total = sum(tokens)
        if hasattr(mapping, "data_ptr") or hasattr(mapping, "__cuda_array_interface__"):
            tensor = Tensor.of(mapping)
            dtype = str(getattr(mapping, "dtype", ""))
            if tensor.shape != (total,) or tensor.strides != (1,) or not dtype.endswith("int64"):
                raise GeometryError(
                    "slot mapping", got=f"{tensor.shape} of {dtype}", expected=f"({total},) int64"
                )
            if tensor.device >= 0:
                self._tensor = tensor
                return
            mapping = mapping.numpy()
        host = np.asarray(mapping)
        if host.shape != (total,) or host.dtype.kind not in "iu":
            raise GeometryError(
                "slot mapping", got=f"{host.shape} of {host.dtype}", expected=f"({total},) integers"
            )
        self._host = np.ascontiguousarray(host, "<i8")

    def addresses(self, job: plan.Plan) -> list[np.uint64]:
        """Return the address of every object's part; zeros without a mapping."""
        if self._host is not None:
            base = job.upload.add(self._host)
        elif self._tensor is not None:
            base = plan.absolute(self._tensor.address)
        else:
            return [np.uint64(0)] * len(self._tokens)
        begins = np.cumsum([0, *self._tokens[:-1]])
        return [np.uint64(base + np.uint64(8 * int(begin))) for begin in begins]


def _check_rows(target: Target, reader: ObjectReader, *, paged: bool) -> None:
    """Raise GeometryError unless a cache without slots has just the rows of the object."""
    if paged:
        return
    for layer, (begin, end) in enumerate(reader.header.ranges):
        for place in target.places[layer]:
            if place.slots != end - begin:
                raise GeometryError(
                    f"tokens of layer {layer} in out", got=place.slots, expected=end - begin
                )


def _plan(batch: Batch, item: Item, profile: Profile | None) -> None:
    codec_id = item.header.codec_id
    if codec_id == Int8Codec.codec_id:
        plan_int8(batch, item)
    elif codec_id == CacheGenCodec.codec_id:
        plan_cachegen(batch, item, profile)
    elif codec_id == ProgressiveCodec.codec_id:
        plan_progressive(batch, item, profile)
    elif codec_id == RawCodec.codec_id:
        plan_raw(batch, item)
    else:
        raise UnsoundError("codec")
