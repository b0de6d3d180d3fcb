"""Decoding on a CUDA device: from an object's bytes to an engine's paged KV cache.

``decode`` does one object, ``prepare`` a batch whose kernels can be launched again, also within a
CUDA graph. What the kernels do not do (heads beyond 128 channels with a profile, restart points
that no encoder of this library writes, the lossless codec) is decoded on the CPU and copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachegen.codec.gpu.target import is_on_gpu

if TYPE_CHECKING:
    from cachegen.codec.gpu.encoding import DeviceChunk, EncodeJob
    from cachegen.codec.gpu.face import decode, encode, prepare, prepare_encode
    from cachegen.codec.gpu.prepared import Prepared

__all__ = [
    "DeviceChunk",
    "EncodeJob",
    "Prepared",
    "decode",
    "encode",
    "is_on_gpu",
    "prepare",
    "prepare_encode",
]


def __getattr__(name: str) -> Any:
    # Later, as the planners import the codecs and the registry of codecs imports this package.
    if name in ("decode", "encode", "prepare", "prepare_encode"):
        from cachegen.codec.gpu import face

        return getattr(face, name)
    if name in ("DeviceChunk", "EncodeJob"):
        from cachegen.codec.gpu import encoding

        return getattr(encoding, name)
    if name == "Prepared":
        from cachegen.codec.gpu.prepared import Prepared

        return Prepared
    raise AttributeError(name)
