"""Write golden objects for a format version, seeded. Frozen: existing files are never rewritten."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import passes
from cachegen.codec.base import Codec
from cachegen.codec.basis import load_basis
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.fit import fit_basis
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.ladder import Ladder
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.metric import MetricFit
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference import profile_classes
from cachegen.codec.registry import decode
from cachegen.codec.rotary import rotate
from cachegen.codec.side import GroupSide
from cachegen.profile import Profile
from cachegen.types import ChunkKey, RopeSpec

GOLDEN = Path(__file__).parents[1] / "tests/golden/v1"
PROFILE = "progressive.safetensors"


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
        "int8": Int8Codec(),
        "int8_bytes": Int8Codec(entropy=False),
        "cachegen_chunk": CacheGenCodec(level=1),
        "cachegen_parametric": CacheGenCodec(level=2, tables="parametric"),
        "cachegen_profile": CacheGenCodec(level=2, tables="profile", profile=fitted),
        "cachegen_anchor": CacheGenCodec(level=3, delta="anchor", tables="parametric"),
    }


def rotated_chunk(seed: int) -> KVChunk:
    """Draw correlated K and V of two layers and 45 tokens, keys after RoPE; one loud token."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng([2026, seed])
    mixing = fixed.normal(0, 1, (6, 2 * 2 * 2 * 8))
    rows = rng.normal(0, 1, (45, 6)) @ mixing + fixed.normal(0, 2, mixing.shape[1])
    rows += 0.1 * rng.normal(0, 1, rows.shape)
    rows[11] *= 20
    planes = rows.reshape(45, 2, 2, 2, 8)
    spec = RopeSpec(((1.0, 0.3, 0.1, 0.03),), (1.0,), (0, 0))
    layers = []
    for layer in range(2):
        keys = rotate(planes[:, layer, 0], spec, layer, 512, back=False)
        layers.append(LayerKV(keys.astype(np.float16), planes[:, layer, 1].astype(np.float16)))
    return KVChunk.from_layers(layers, first_position=512, rope=spec)


def progressive_profile() -> Profile:
    """Fit a profile with measured weights to chunks of the same kind."""
    rng = np.random.default_rng(3)
    chunks = [rotated_chunk(seed) for seed in range(1, 9)]
    metric = MetricFit(chunks[0].geometry)
    for _ in range(8):
        metric.add(*(rng.normal(0, 1, (2, 45, 2, 8)).astype(np.float32) for _ in range(2)))
    return fit_basis(chunks, model_name="golden", metric=metric.finish())


def write_progressive() -> None:
    """Write objects of ``progressive``, a profile, and the integers and values they decode to.

    Their encoder takes sines and products of matrices, which differ in the last bits between
    machines: what is frozen is how the objects decode.
    """
    write(GOLDEN / PROFILE, progressive_profile().to_bytes())
    profile = Profile.load(GOLDEN / PROFILE)
    for name, codec in (
        ("progressive", ProgressiveCodec()),
        ("progressive_profile", ProgressiveCodec(profile=profile)),
    ):
        data = codec.encode(rotated_chunk(0), key=key())
        write(GOLDEN / f"{name}.cgen", data)
        write(GOLDEN / f"{name}.digits", digits_digest(data, codec.profile).encode() + b"\n")
        decoded = decode(data, profile=codec.profile)
        write(GOLDEN / f"{name}.decoded", decoded_bits(decoded))


def digits_digest(data: bytes, profile: Profile | None) -> str:
    """Return the SHA-256 of all decoded integers: classes, then digits, of every group."""
    sha = hashlib.sha256()
    for classes, ladder in decoded_digits(ObjectReader(data), profile):
        sha.update(np.ascontiguousarray(classes, np.uint8).tobytes())
        sha.update(np.ascontiguousarray(ladder.coarse, "<i2").tobytes())
        for digits in ladder.digits:
            sha.update(np.ascontiguousarray(digits, np.uint8).tobytes())
    return sha.hexdigest()


def decoded_digits(
    reader: ObjectReader, profile: Profile | None
) -> Iterator[tuple[NDArray[np.uint8], Ladder]]:
    """Yield the classes and the digits of every group of a ``progressive`` object."""
    header = reader.header
    step = struct.unpack_from("<f", header.params, 4)[0]
    bases = load_basis(profile, header.geometry).bases if profile else [None] * len(header.groups)
    for index, (group, basis) in enumerate(zip(header.groups, bases, strict=True)):
        shape = ProgressiveCodec.coded_shape(header, index, 0)[:2]
        side = GroupSide.from_bytes(
            reader.side(index, 0), *shape, header.geometry.dtype, plain=basis is None
        )
        assert header.ranges[group.layer] == (0, shape[0])
        classes = side.classes
        if basis is not None:
            classes = profile_classes(basis, step, side.class_offset)
        yield classes, passes.read(reader, index, shape, classes)


def key() -> ChunkKey:
    return ChunkKey(bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96)))


def decoded_bits(decoded: KVChunk) -> bytes:
    """Return K and V of every layer as bytes, in order."""
    return b"".join(
        plane.tobytes() for layer in decoded.layers for plane in (layer.keys, layer.values)
    )


def lossless_chunk() -> KVChunk:
    """Draw one layer of 200 tokens, with a NaN, an infinity, -0 and a subnormal number."""
    rng = np.random.default_rng(5)
    planes = rng.normal(1, 1, (1, 2, 200, 1, 16)).astype(np.float16)
    planes[0, 0, 3, 0, :4] = np.nan, np.inf, -0.0, 1e-7
    return KVChunk.from_array(planes)


def write_lossless() -> None:
    """Write an object of ``lossless`` that has coded planes."""
    data = LosslessCodec().encode(lossless_chunk(), key=key())
    write(GOLDEN / "lossless.cgen", data)
    write(GOLDEN / "lossless.decoded", decoded_bits(decode(data)))


def write(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; frozen ones stay as they are."""
    if path.exists():
        sys.stderr.write(f"{path.name} exists: golden files are frozen\n")
        return
    path.write_bytes(content)


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, codec in codecs().items():
        data = codec.encode(chunk(), key=key())
        decoded = decode(data, profile=getattr(codec, "profile", None))
        write(GOLDEN / f"{name}.cgen", data)
        write(GOLDEN / f"{name}.decoded", decoded_bits(decoded))
    write_lossless()
    write_progressive()


if __name__ == "__main__":
    main()
