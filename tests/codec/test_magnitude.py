"""Scaled inputs give scaled outputs, over all of float32's normal range."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import progressive
from cachegen.codec.base import Codec, planes_of
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.encode_reference import ReferenceEncoder
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.levels import prefix_bytes
from cachegen.codec.magnitude import balancing_exponent
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import NonFiniteError
from cachegen.types import RopeSpec

CODECS: list[Codec] = [
    ProgressiveCodec(),
    ProgressiveCodec(passes=2, step=0.02, sink_tokens=0),
    Int8Codec(),
    CacheGenCodec(),
    CacheGenCodec(level=3, delta="anchor"),
]
EXPONENTS = [0, -20, -60, -100, -120, 20, 60, 90]


def chunk_of(dtype: type = np.float32, *, rope: bool = False) -> KVChunk:
    """Draw channels with means, a wide one and an outlier token."""
    rng = np.random.default_rng(0)
    channel = (2, 2, 1, 2, 16)
    values = rng.normal(0, 1, channel) + np.exp(rng.normal(0, 0.5, channel)) * rng.normal(
        0, 1, (2, 2, 70, 2, 16)
    )
    values[..., 3] *= 9
    values[:, :, 40] *= 6
    # So many bits that a power of two rounds nothing, unless below 2^-126 after all.
    values = np.where(np.abs(values) < 2**-5, 2**-5, values).astype(ml_dtypes.bfloat16)
    spec = RopeSpec((tuple(0.3**i for i in range(8)),), (1.0,), (0, 0)) if rope else None
    return KVChunk.from_array(values.astype(dtype), rope=spec)


def times(chunk: KVChunk, exponent: int) -> KVChunk:
    factor = np.float32(2.0**exponent)
    layers = tuple(
        LayerKV(*(plane.astype(np.float32) * factor for plane in (layer.keys, layer.values)))
        for layer in chunk.layers
    )
    dtype = chunk.geometry.dtype.numpy
    layers = tuple(
        LayerKV(layer.keys.astype(dtype), layer.values.astype(dtype)) for layer in layers
    )
    return replace(chunk, layers=layers, _array=None)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(list(codec.config().values())))
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_scaled_chunk_decodes_to_scaled_values(codec: Codec, dtype, exponent: int) -> None:
    chunk = chunk_of(dtype, rope=isinstance(codec, ProgressiveCodec))
    data = codec.encode(chunk)
    moved = codec.encode(times(chunk, exponent))
    if exponent > -120:
        assert len(moved) == len(data)
    back, plain = decode(moved), decode(data)
    unit = np.float64(2.0) ** exponent
    for got, wanted in zip(planes_of(back), planes_of(plain), strict=True):
        scaled = wanted.astype(np.float64) * unit
        # Small values of the last case are below the normal range, where bfloat16 has steps of
        # 2^-133; a step that is rounded there may move a value to its neighbour.
        below = exponent == -120
        assert np.allclose(
            got.astype(np.float64),
            scaled,
            rtol=2**-7 if below else 0,
            atol=2.0**-132 if below else 0,
        )


@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 90])
def test_the_twin_agrees(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = times(chunk_of(rope=True), exponent)
    data = ProgressiveCodec().encode(chunk)
    monkeypatch.setattr(progressive, "FusedEncoder", ReferenceEncoder)
    assert ProgressiveCodec().encode(chunk) == data


def test_named_qualities_read_as_much_as_of_the_plain_chunk() -> None:
    """Distortions and what they are relative to have one unit."""
    chunk = chunk_of()
    sizes = {
        prefix_bytes(read_header(ProgressiveCodec().encode(times(chunk, exponent))), "balanced")
        for exponent in (0, -100, -60, 60, 90)
    }
    assert len(sizes) == 1


def test_one_huge_token_does_not_drown_the_rest() -> None:
    """What is typical decides; a token out of the ordinary is stored exactly, as ever."""
    chunk = times(chunk_of(), -60)
    keys = chunk.layers[0].keys.copy()
    keys[9] = np.float32(2.0**40)
    odd = replace(
        chunk, layers=(LayerKV(keys, chunk.layers[0].values), chunk.layers[1]), _array=None
    )
    assert balancing_exponent(odd) in range(50, 60)
    decoded = decode(ProgressiveCodec().encode(odd))
    assert np.array_equal(decoded.layers[0].keys[9], keys[9])
    others = np.arange(70) != 9
    error = np.abs(decoded.layers[0].keys[others] - keys[others]).mean()
    assert error < 0.25 * np.abs(keys[others]).mean()


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-80, 2.0**80, 2.0**-149])
def test_constant_chunks(value: float) -> None:
    chunk = KVChunk.from_array(np.full((1, 2, 40, 1, 8), value, np.float32))
    decoded = decode(ProgressiveCodec().encode(chunk)).layers[0]
    assert np.allclose(decoded.keys.astype(np.float64), value, rtol=0.01, atol=2.0**-149)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(list(codec.config().values())))
def test_beyond_2_to_100_is_refused_by_name(codec: Codec) -> None:
    with pytest.raises(NonFiniteError, match=r"2\^100|2\*\*100"):
        codec.encode(times(chunk_of(), 101))
