"""What callers see of decoding and encoding on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachegen.codec.base import Codec
from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, Buffer
from cachegen.codec.gpu.encoding import DeviceChunk, EncodeJob, does_encode
from cachegen.codec.gpu.prepared import Prepared, stream_handle
from cachegen.codec.gpu.target import Tensor
from cachegen.errors import ConfigError, GeometryError
from cachegen.native.cuda.device import Device, cuda_device
from cachegen.profile import Profile
from cachegen.types import ChunkKey


def decode(
    data: Buffer,
    *,
    out: Any,
    slot_mapping: Any = None,
    stream: Any = None,
    key: ChunkKey | None = None,
    allow_partial: bool = False,
    profile: Profile | None = None,
    max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    device: Device | None = None,
) -> None:
    """Decode an object of any codec into a cache on a CUDA device, and wait for it.

    data, key, allow_partial, profile, max_decoded_bytes: as in ``cachegen.decode``.
    out: for each layer K and V on one device, in the dtype of the object, last axis contiguous:
        (T, H, D) or, with slot_mapping, blocks of a paged cache (blocks, block size, H, D); or one
        tensor of all of them. torch, CuPy, or anything with DLPack.
    slot_mapping: (T,) integers, ``block * block_size + place`` of every token, -1 to leave it out;
        on the host, or int64 on the device.
    stream: torch or CuPy stream, or its handle; None: torch's current one, else the default stream.
    Raises: FormatError, KeyMismatchError, ProfileError, UnknownCodecError, GeometryError,
        DtypeError, ConfigError without ``cachegen[cuda]``. After an error out holds anything.
    """
    prepared = prepare(
        [data],
        out=out,
        slot_mapping=slot_mapping,
        stream=stream,
        keys=None if key is None else [key],
        allow_partial=allow_partial,
        profile=profile,
        max_decoded_bytes=max_decoded_bytes,
        device=device,
    )
    prepared.launch()
    prepared.check()


def prepare(
    objects: Sequence[Buffer],
    *,
    out: Any,
    slot_mapping: Any = None,
    stream: Any = None,
    keys: Sequence[ChunkKey] | None = None,
    allow_partial: bool = False,
    profile: Profile | None = None,
    max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    device: Device | None = None,
) -> Prepared:
    """Check a batch of objects, lay out its launches and upload it.

    objects: of one geometry. slot_mapping: of all tokens of the batch in order; needed for more
        than one object. Others as in ``decode``. device: for tests; None: the device of out.
    Returns: launches that write to out; they hold memory for the objects, their tables and, with a
        profile, 4 bytes for each value: prepare few objects at a time to bound it.
    Raises: as ``decode``, but for errors in coded data, which ``Prepared.check`` raises.
    """
    if not objects:
        raise GeometryError("objects", got=0, expected="at least one")
    if len(objects) > 1 and slot_mapping is None:
        raise GeometryError("slot mapping", got=None, expected="one, for several objects")
    first, device = _device_of(out, device, "out")
    return Prepared(
        device,
        list(objects),
        out=out,
        slot_mapping=slot_mapping,
        stream=stream_handle(stream, first),
        keys=list(keys) if keys is not None else [None] * len(objects),
        allow_partial=allow_partial,
        profile=profile,
        max_decoded_bytes=max_decoded_bytes,
    )


def _device_of(planes: Any, device: Device | None, what: str) -> tuple[Any, Device]:
    """Return the first tensor and the device of a cache. Raises: GeometryError on the host."""
    first = planes
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    index = Tensor.of(first).device
    if device is None:
        if index < 0:
            raise GeometryError(what, got="memory of the host", expected="memory of a CUDA device")
        device = cuda_device(index)
    return first, device


def encode(
    codec: Codec,
    chunk: DeviceChunk,
    *,
    key: ChunkKey | None = None,
    stream: Any = None,
    device: Device | None = None,
) -> bytes:
    """Encode a chunk that lies on a CUDA device; the host sees nothing but what is stored of it.

    codec: of any kind; ``raw`` and ``lossless`` copy the chunk to the host and encode there.
    key, stream, device: as in ``decode``. Returns: the object.
    Raises: as ``Codec.encode``; GeometryError, DtypeError, ConfigError without ``cachegen[cuda]``.
    """
    if not does_encode(codec):
        return codec.encode(chunk.to_host(), key=key)
    job = prepare_encode(codec, [chunk], keys=[key], stream=stream, device=device)
    job.launch()
    return job.finish()[0]


def prepare_encode(
    codec: Codec,
    chunks: Sequence[DeviceChunk],
    *,
    keys: Sequence[ChunkKey | None] | None = None,
    stream: Any = None,
    device: Device | None = None,
) -> EncodeJob:
    """Lay out the launches that encode a batch of chunks.

    codec: ``int8``, ``cachegen`` or ``progressive``. chunks: all on one device.
    Returns: launches and the way to their objects. They hold 4 bytes for each value, 8 with a
        profile, and as many as the coded passes may take: prepare few chunks at a time to bound it.
    Raises: GeometryError, DtypeError, ProfileError, ConfigError.
    """
    if not chunks:
        raise GeometryError("chunks", got=0, expected="at least one")
    if not does_encode(codec):
        raise ConfigError(
            "codec", got=codec.name, expected="int8, cachegen or progressive", remedy="use encode"
        )
    first, device = _device_of(chunks[0].planes, device, "chunk")
    return EncodeJob(
        device,
        codec,
        chunks,
        [None] * len(chunks) if keys is None else keys,
        stream=stream_handle(stream, first),
    )
