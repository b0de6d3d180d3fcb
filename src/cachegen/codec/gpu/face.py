"""What callers see of decoding on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, Buffer
from cachegen.codec.gpu.prepared import Prepared, stream_handle
from cachegen.codec.gpu.target import Tensor
from cachegen.errors import GeometryError
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
    first = out
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    index = Tensor.of(first).device
    if device is None:
        if index < 0:
            raise GeometryError("out", got="memory of the host", expected="memory of a CUDA device")
        device = cuda_device(index)
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
