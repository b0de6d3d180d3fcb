"""Write golden objects for a format version, seeded. Frozen: existing files are never rewritten."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.raw import RawCodec
from cachegen.types import ChunkKey

GOLDEN = Path(__file__).parents[1] / "tests/golden/v1"


def chunk() -> KVChunk:
    """Three layers, one of them with fewer tokens; values on a grid, so that float16 is exact."""
    rng = np.random.default_rng(2026)
    layers = []
    for begin in (0, 0, 29):
        planes = np.rint(rng.normal(0, 40, (2, 45 - begin, 2, 8)) + rng.normal(0, 30, (2, 1, 2, 8)))
        keys, values = (planes / 16).astype(np.float16)
        layers.append(LayerKV(keys, values, begin))
    return KVChunk.from_layers(layers, tokens=45, first_position=256)


def codecs() -> dict[str, Codec]:
    fitted = CacheGenCodec(level=2).fit_profile([chunk()], model_name="golden")
    return {
        "raw": RawCodec(),
        "lossless": LosslessCodec(),
        "int8": Int8Codec(),
        "int8_bytes": Int8Codec(entropy=False),
        "cachegen_chunk": CacheGenCodec(level=1),
        "cachegen_parametric": CacheGenCodec(level=2, tables="parametric"),
        "cachegen_profile": CacheGenCodec(level=2, tables="profile", profile=fitted),
        "cachegen_anchor": CacheGenCodec(level=3, delta="anchor", tables="parametric"),
    }


def key() -> ChunkKey:
    return ChunkKey(bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96)))


def decoded_bits(decoded: KVChunk) -> bytes:
    """Return K and V of every layer as bytes, in order."""
    return b"".join(
        plane.tobytes() for layer in decoded.layers for plane in (layer.keys, layer.values)
    )


def main() -> None:
    from cachegen.codec.registry import decode

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, codec in codecs().items():
        data = codec.encode(chunk(), key=key())
        decoded = decode(data, profile=getattr(codec, "profile", None))
        for path, content in (
            (GOLDEN / f"{name}.cgen", data),
            (GOLDEN / f"{name}.decoded", decoded_bits(decoded)),
        ):
            if path.exists():
                sys.exit(f"{path.name} exists: golden files are frozen; a change is a new version")
            path.write_bytes(content)


if __name__ == "__main__":
    main()
