"""Which codec has which name and id, and decoding an object whatever its codec."""

from __future__ import annotations

from typing import Any, overload

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec, empty_chunk
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import DEFAULT_MAX_DECODED_BYTES, Buffer
from cachegen.codec.gpu.target import is_on_gpu
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Pairs, Target
from cachegen.errors import ConfigError, UnknownCodecError
from cachegen.profile import Profile
from cachegen.types import ChunkKey

CODECS: tuple[type[Codec], ...] = (
    Int8Codec,
    CacheGenCodec,
    ProgressiveCodec,
    RawCodec,
    LosslessCodec,
)


def get_codec(name: str, **settings: Any) -> Codec:
    """Build a codec by name, such as ``get_codec("cachegen", level=1)``.

    Raises: UnknownCodecError, ConfigError for a setting that the codec does not have.
    """
    for codec in CODECS:
        if codec.name == name:
            try:
                return codec(**settings)
            except TypeError as error:
                raise ConfigError(
                    f"settings of codec {name}", got=sorted(settings), expected=str(error)
                ) from None
    names = ", ".join(codec.name for codec in CODECS)
    raise UnknownCodecError("codec", got=name, expected=f"one of {names}")


def codec_class(codec_id: int) -> type[Codec]:
    """Return the codec class of an object's codec id. Raises: UnknownCodecError."""
    for codec in CODECS:
        if codec.codec_id == codec_id:
            return codec
    known = ", ".join(f"{codec.codec_id} ({codec.name})" for codec in CODECS)
    raise UnknownCodecError(
        "codec id", got=codec_id, expected=known, remedy="update cachegen to read this object"
    )


@overload
def decode(
    data: Buffer,
    *,
    key: ChunkKey | None = ...,
    allow_partial: bool = ...,
    profile: Profile | None = ...,
    max_decoded_bytes: int = ...,
    out: KVChunk | None = ...,
) -> KVChunk: ...


@overload
def decode(
    data: Buffer,
    *,
    key: ChunkKey | None = ...,
    allow_partial: bool = ...,
    profile: Profile | None = ...,
    max_decoded_bytes: int = ...,
    out: Pairs,
    slot_mapping: object | None = ...,
    stream: object | None = ...,
) -> None: ...


def decode(
    data: Buffer,
    *,
    key: ChunkKey | None = None,
    allow_partial: bool = False,
    profile: Profile | None = None,
    max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    out: KVChunk | Pairs | None = None,
    slot_mapping: object | None = None,
    stream: object | None = None,
) -> KVChunk | None:
    """Decode an object of any codec.

    data: the object; with allow_partial a prefix of it, decoded to the passes that are whole.
    key: if given, the key that the object must carry.
    out: where to decode to, without memory of the size of the result in between: a chunk of the
        object's shape, or for each layer K and V, arrays or CPU tensors of any strides whose last
        axis is contiguous: (T, H, D) or, with slot_mapping, blocks of a paged cache,
        (blocks, block size, H, D). Its dtype need not be the object's. Tensors on a CUDA device are
        decoded to by the device, see ``cachegen.codec.gpu``; theirs must be the object's.
    slot_mapping: (T,) integers, ``block * block_size + place`` of every token, -1 to leave it out.
    stream: of a CUDA device, for out there; None: torch's current one.
    Returns: a chunk in the dtype that was encoded; out if it is a chunk; else None. After an error
        out holds anything.
    Raises: FormatError, KeyMismatchError, ProfileError, UnknownCodecError, GeometryError.
    """
    if out is not None and not isinstance(out, KVChunk) and is_on_gpu(out):
        from cachegen.codec import gpu

        gpu.decode(
            data,
            out=out,
            slot_mapping=slot_mapping,
            stream=stream,
            key=key,
            allow_partial=allow_partial,
            profile=profile,
            max_decoded_bytes=max_decoded_bytes,
        )
        return None
    reader = ObjectReader(
        data, key=key, allow_partial=allow_partial, max_decoded_bytes=max_decoded_bytes
    )
    chunk = out if isinstance(out, KVChunk) else None
    if out is None:
        chunk = out = empty_chunk(reader.header)
    target = Target(reader.header, out, slot_mapping)
    codec_class(reader.header.codec_id).decode_into(reader, target, profile=profile)
    return chunk
