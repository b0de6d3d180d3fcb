"""Golden objects of format version 1, and a reader written from FORMAT.md alone."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cachegen.codec.container import SIDE, read_header
from cachegen.codec.registry import decode
from cachegen.profile import Profile

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/v1"


def _script():
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts/make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _script()
CODECS = golden.codecs()


@pytest.mark.parametrize("name", CODECS)
def test_golden_objects(name: str) -> None:
    """A missing file fails; nothing here ever writes one."""
    stored, expected = GOLDEN / f"{name}.cgen", GOLDEN / f"{name}.decoded"
    assert stored.exists(), f"{stored.name} is missing: restore it from version control"
    codec = CODECS[name]
    assert codec.encode(golden.chunk(), key=golden.key()) == stored.read_bytes()
    decoded = decode(stored.read_bytes(), key=golden.key(), profile=getattr(codec, "profile", None))
    assert decoded.first_position == 256
    assert golden.decoded_bits(decoded) == expected.read_bytes()


@pytest.mark.parametrize("name", ["progressive", "progressive_profile"])
def test_golden_progressive_objects(name: str) -> None:
    """Integers are equal everywhere; floats pass through sines and sums of products.

    Tolerance: 2^-9 of a value, two roundings to float16, and 2^-9 absolute, for values near 0 that
    are differences of larger ones.
    """
    data = (GOLDEN / f"{name}.cgen").read_bytes()
    profile = Profile.load(GOLDEN / golden.PROFILE) if name.endswith("profile") else None
    digest = (GOLDEN / f"{name}.digits").read_text().strip()
    assert golden.digits_digest(data, profile) == digest
    stored = np.frombuffer((GOLDEN / f"{name}.decoded").read_bytes(), "<f2").astype(np.float64)
    decoded = decode(data, key=golden.key(), profile=profile)
    got = np.frombuffer(golden.decoded_bits(decoded), "<f2").astype(np.float64)
    assert np.allclose(got, stored, rtol=2**-9, atol=2**-9)
    truth = np.frombuffer(golden.decoded_bits(golden.rotated_chunk(0)), "<f2").astype(np.float64)
    assert np.abs(got - truth).mean() < 0.1 * np.abs(truth).mean()


def test_golden_lossless_object() -> None:
    data = (GOLDEN / "lossless.cgen").read_bytes()
    assert any(segment.kind == SIDE for segment in read_header(data).segments)
    expected = (GOLDEN / "lossless.decoded").read_bytes()
    assert golden.decoded_bits(decode(data, key=golden.key())) == expected
    assert golden.decoded_bits(golden.lossless_chunk()) == expected


def test_the_golden_profile_is_the_one_that_is_named() -> None:
    profile = Profile.load(GOLDEN / golden.PROFILE)
    header = read_header((GOLDEN / "progressive_profile.cgen").read_bytes())
    assert header.profile == profile.digest
    assert profile.meta["metric"] == "gradients"


def test_a_reader_written_from_the_page() -> None:
    """Parse a golden object with nothing but struct and the tables of FORMAT.md."""
    data = (GOLDEN / "raw.cgen").read_bytes()
    assert data[:4] == b"CGKV"
    version, flags, header_bytes = struct.unpack_from("<HHI", data, 4)
    assert (version, flags) == (1, 1 | 2)
    header = bytearray(data[:header_bytes])
    (checksum,) = struct.unpack_from("<Q", header, 16)
    header[16:24] = bytes(8)
    assert xxhash.xxh3_64_intdigest(bytes(header)) == checksum
    layers, heads, key_dim, value_dim = struct.unpack_from("<4H", data, 24)
    tokens, segments = struct.unpack_from("<II", data, 32)
    (position,) = struct.unpack_from("<Q", data, 40)
    dtype, codec, passes, grouping = struct.unpack_from("<4B", data, 48)
    groups, params, rope = struct.unpack_from("<HHI", data, 52)
    assert (layers, heads, key_dim, value_dim, tokens, position) == (3, 2, 8, 8, 45, 256)
    assert (dtype, codec, passes, grouping, groups) == (1, 4, 1, 0, 6)
    assert (params, rope, segments) == (0, 0, 6)
    offset = 64
    assert data[offset : offset + 96] == golden.key().to_bytes()
    offset += 96
    ranges = [struct.unpack_from("<II", data, offset + 8 * layer) for layer in range(layers)]
    assert ranges == [(0, 45), (0, 45), (29, 16)]
    offset += 8 * layers
    body = header_bytes
    for index in range(segments):
        entry = struct.unpack_from("<QIfHBB", data, offset + 20 * index)
        checksum, length, distortion, group, pass_index, kind = entry
        assert (group, pass_index, kind, distortion) == (index, 0, 3, 0.0)
        content = data[body : body + length]
        assert xxhash.xxh3_64_intdigest(content) == checksum
        layer = golden.chunk().layers[index // 2]
        plane = layer.values if index % 2 else layer.keys
        assert np.array_equal(np.frombuffer(content, "<f2").reshape(plane.shape), plane)
        body += (length + 3) // 4 * 4
    assert offset + 20 * segments == header_bytes
    assert body == len(data)


def test_the_frozen_tables_are_the_ones_of_the_page() -> None:
    import hashlib

    from cachegen.codec.entropy import parametric_tables

    tables, _ = parametric_tables()
    digest = hashlib.sha256(np.ascontiguousarray(tables.freqs, "<u2").tobytes()).hexdigest()
    assert digest in (ROOT / "FORMAT.md").read_text(encoding="utf-8")
    assert tables.freqs.shape == (112, 32)
    assert (tables.freqs.sum(axis=1) == 4096).all()
    assert tables.freqs.min() >= 1
