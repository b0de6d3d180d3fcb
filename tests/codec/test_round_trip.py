"""Every codec: round trips over shapes, dtypes and layouts, and determinism."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.registry import decode, get_codec
from cachegen.errors import (
    ConfigError,
    CorruptError,
    GeometryError,
    KeyMismatchError,
    LimitError,
    NonFiniteError,
    ProfileError,
    UnknownCodecError,
)
from cachegen.types import ChunkKey

# Largest error allowed, as a share of the largest magnitude of a token: half a step of the
# coarsest grid (level 1: M = 5, in the last third of a delta M = 3) with room for 16-bit rounding.
TOLERANCE = {
    "raw": 0.0,
    "lossless": 0.0,
    "int8": 1.0 / 127,
    "cachegen": 0.6 / 3,
    "progressive": 0.2,
}


def relative_error(chunk: KVChunk, other: KVChunk) -> float:
    worst = 0.0
    for a, b in zip(chunk.layers, other.layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            if x.size:
                gap = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(axis=(1, 2))
                top = np.abs(x.astype(np.float64)).max(axis=(1, 2))
                worst = max(worst, float((gap / np.maximum(top, 1e-30)).max()))
    return worst


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("tokens", [1, 31, 33, 64])
def test_round_trip(codec: Codec, make_kv, dtype, tokens: int) -> None:
    chunk = make_kv(tokens=tokens, dtype=dtype)
    decoded = decode(codec.encode(chunk))
    assert decoded.geometry == chunk.geometry
    assert decoded.tokens == tokens
    # Deltas of one third of the depth may be as large as twice the token's own magnitude.
    slack = 4 if getattr(codec, "delta", "none") == "anchor" else 1
    assert relative_error(chunk, decoded) <= slack * TOLERANCE[codec.name]


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "value_dim"), [(1, 1, 1, 1), (2, 3, 80, 80), (1, 1, 8, 12)]
)
def test_odd_geometries(codec: Codec, make_kv, layers, heads, dim, value_dim) -> None:
    chunk = make_kv(layers, heads, 40, dim, value_dim=value_dim)
    decoded = decode(codec.encode(chunk))
    assert decoded.geometry == chunk.geometry
    # A single channel has no louder one beside it that its error could be small against.
    if codec.name != "progressive" or dim > 1:
        assert relative_error(chunk, decoded) <= 4 * TOLERANCE[codec.name]


def test_layers_that_hold_fewer_tokens(codec: Codec, make_kv) -> None:
    full = make_kv(layers=3, tokens=40)
    a, b, c = full.layers
    ragged = [a, LayerKV(b.keys[25:], b.values[25:], 25), LayerKV(c.keys[:0], c.values[:0], 40)]
    chunk = KVChunk.from_layers(ragged, tokens=40, first_position=512)
    decoded = decode(codec.encode(chunk))
    assert [(layer.begin, layer.tokens) for layer in decoded.layers] == [(0, 40), (25, 15), (40, 0)]
    assert decoded.first_position == 512
    assert relative_error(chunk, decoded) <= 4 * TOLERANCE[codec.name]


def test_layouts_give_the_same_bytes(codec: Codec, make_kv) -> None:
    chunk = make_kv()
    array = chunk.to_array()
    keys = np.ascontiguousarray(array[:, 0].transpose(0, 2, 1, 3))
    values = np.ascontiguousarray(array[:, 1].transpose(0, 2, 1, 3))
    expected = codec.encode(chunk)
    assert codec.encode(KVChunk.from_array(array)) == expected
    assert codec.encode(KVChunk.from_keys_values(keys, values)) == expected


def test_torch_tensors_without_copy(codec: Codec, make_kv) -> None:
    torch = pytest.importorskip("torch")
    array = make_kv().to_array()
    tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    chunk = KVChunk.from_array(tensor)
    assert np.shares_memory(chunk.layers[0].keys, array)
    assert codec.encode(chunk) == codec.encode(KVChunk.from_array(array))


def test_encoding_is_deterministic_across_processes(codec: Codec, make_kv, tmp_path) -> None:
    chunk = make_kv()
    np.save(tmp_path / "kv.npy", chunk.to_array().view(np.uint16))
    script = (
        "import sys, json, hashlib, numpy as np, ml_dtypes\n"
        "from cachegen import KVChunk, get_codec\n"
        "kv = np.load(sys.argv[1]).view(ml_dtypes.bfloat16)\n"
        "config = json.loads(sys.argv[2]); name = config.pop('codec')\n"
        "config = {k: v for k, v in config.items() if k not in ('grading', 'profile')}\n"
        "data = get_codec(name, **config).encode(KVChunk.from_array(kv))\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    import hashlib

    arguments = [sys.executable, "-c", script, str(tmp_path / "kv.npy"), json.dumps(codec.config())]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == hashlib.sha256(codec.encode(chunk)).hexdigest()


def test_config_survives_json(codec: Codec) -> None:
    config = json.loads(json.dumps(codec.config()))
    assert type(codec).from_config(config) == codec


def test_key_is_checked(codec: Codec, make_kv) -> None:
    key = ChunkKey(b"n" * 32, b"c" * 32, b"d" * 32)
    other = ChunkKey(b"n" * 32, b"x" * 32, b"d" * 32)
    data = codec.encode(make_kv(tokens=8), key=key)
    assert decode(data, key=key).tokens == 8
    assert read_header(data).key == key
    with pytest.raises(KeyMismatchError):
        decode(data, key=other)
    with pytest.raises(KeyMismatchError):
        decode(codec.encode(make_kv(tokens=8)), key=key)


def test_decoded_size_is_bounded_by_the_caller(codec: Codec, make_kv) -> None:
    chunk = make_kv()
    data = codec.encode(chunk)
    decode(data, max_decoded_bytes=chunk.size_bytes)
    with pytest.raises(LimitError, match="decoded size"):
        decode(data, max_decoded_bytes=chunk.size_bytes - 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values(codec: Codec, make_kv, bad: float) -> None:
    array = make_kv(dtype=np.float32).to_array().copy()
    array[1, 1, 5, 1, 3] = bad
    chunk = KVChunk.from_array(array)
    if isinstance(codec, RawCodec | LosslessCodec):
        kept = decode(codec.encode(chunk)).to_array()
        assert kept.tobytes() == array.tobytes()
        return
    with pytest.raises(NonFiniteError, match="token 5"):
        codec.encode(chunk)


def test_zero_planes_decode_to_zero(codec: Codec) -> None:
    chunk = KVChunk.from_array(np.zeros((2, 2, 40, 2, 8), np.float16))
    assert not decode(codec.encode(chunk)).to_array().any()


def test_zero_tokens_are_refused() -> None:
    with pytest.raises(GeometryError, match="tokens"):
        KVChunk.from_array(np.zeros((2, 2, 0, 2, 8), np.float16))


def test_unknown_codec_and_settings() -> None:
    with pytest.raises(UnknownCodecError, match="zip"):
        get_codec("zip")
    with pytest.raises(ConfigError, match="settings"):
        get_codec("int8", quality=3)
    with pytest.raises(ConfigError):
        CacheGenCodec(level=4)
    with pytest.raises(ConfigError):
        CacheGenCodec(delta="previous")
    with pytest.raises(ConfigError):
        CacheGenCodec(tables="none")


def test_wrong_codec_instance(make_kv) -> None:
    data = Int8Codec().encode(make_kv(tokens=4))
    with pytest.raises(CorruptError, match="codec id"):
        RawCodec().decode(data)


def test_int8_halves_16_bit(make_kv) -> None:
    chunk = make_kv(layers=2, tokens=256, dim=64)
    for codec in (Int8Codec(), Int8Codec(entropy=False)):
        assert len(codec.encode(chunk)) <= chunk.size_bytes / 1.9


def test_profile_tables(make_kv, tmp_path) -> None:
    from cachegen.profile import Profile

    codec = CacheGenCodec(delta="anchor")
    fitted = codec.fit_profile([make_kv(seed=1), make_kv(seed=2)], model_name="synthetic")
    fitted.save(tmp_path / "p.safetensors")
    profile = Profile.load(tmp_path / "p.safetensors")
    assert profile.digest == fitted.digest
    chunk = make_kv(seed=3)
    data = CacheGenCodec(delta="anchor", tables="profile", profile=profile).encode(chunk)
    sent = CacheGenCodec(delta="anchor", tables="chunk").encode(chunk)
    assert len(data) < len(sent)
    a, b = decode(data, profile=profile), decode(sent)
    assert a.to_array().tobytes() == b.to_array().tobytes()
    with pytest.raises(ProfileError, match="expected " + profile.digest.hex()):
        decode(data)
    with pytest.raises(ProfileError):
        decode(data, profile=Profile("other", {}))
    with pytest.raises(ProfileError):
        CacheGenCodec(tables="profile").encode(chunk)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_one_token_and_none(codec: Codec, make_kv, dtype) -> None:
    one = make_kv(tokens=1, dtype=dtype)
    assert decode(codec.encode(one)).geometry == one.geometry
    with pytest.raises(GeometryError, match="tokens: got 0, expected 1"):
        codec.encode(make_kv(tokens=0, dtype=dtype))
