"""``lossless``: every bit pattern of every dtype, and hostile bytes."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import reference_lossless
from cachegen.codec.base import empty_chunk, planes_of
from cachegen.codec.container import SIDE, read_header, write_object
from cachegen.codec.entropy import bits_saved
from cachegen.codec.header import SegmentBody
from cachegen.codec.lossless import LosslessCodec, symbol_costs
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode, get_codec
from cachegen.codec.target import Target
from cachegen.errors import CorruptError, FormatError, TruncatedError
from cachegen.types import KVDtype

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def check(chunk: KVChunk) -> bytes:
    data = LosslessCodec().encode(chunk)
    decoded = decode(data)
    assert decoded.geometry == chunk.geometry
    for a, b in zip(chunk.layers, decoded.layers, strict=True):
        assert a.begin == b.begin
        assert np.array_equal(bits(a.keys), bits(b.keys))
        assert np.array_equal(bits(a.values), bits(b.values))
    return data


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_16_bits(dtype) -> None:
    """NaN payloads, infinities, -0 and subnormals; of float32 a random sample and the corners."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype is np.float32:
        rng = np.random.default_rng(0)
        low = rng.integers(0, 1 << 16, 1 << 16).astype(np.uint32)
        low[:8] = 0
        words = patterns.astype(np.uint32) << np.uint32(16) | low
    else:
        words = patterns
    values = words.view(dtype)
    check(KVChunk.from_array(values.reshape(1, 2, 256, 8, 16)))
    check(KVChunk.from_array(values.reshape(1, 2, 2048, 2, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 65504.0])
def test_a_special_value_among_ordinary_ones(make_kv, dtype, special: float) -> None:
    chunk = make_kv(tokens=40, dtype=dtype)
    layers = [LayerKV(layer.keys.copy(), layer.values.copy()) for layer in chunk.layers]
    layers[1].keys[7] = special
    layers[2].values[:, 1, 3] = special
    check(KVChunk.from_layers(layers))


def test_a_real_shape_is_much_smaller(make_kv) -> None:
    chunk = make_kv(layers=2, heads=4, tokens=256, dim=32)
    data = check(chunk)
    assert chunk.size_bytes / len(data) > 1.4
    # One special value costs bytes, not the compression of its channel.
    layers = [LayerKV(layer.keys.copy(), layer.values.copy()) for layer in chunk.layers]
    layers[0].keys[3, 2, 1] = np.nan
    assert len(check(KVChunk.from_layers(layers))) < len(data) + 16


def test_noise_costs_no_more_than_raw() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, (1, 2, 64, 2, 16)).astype(np.uint16).view(np.float16)
    chunk = KVChunk.from_array(noise)
    assert len(check(chunk)) <= len(get_codec("raw").encode(chunk))


def test_layers_with_fewer_tokens_or_none(make_kv) -> None:
    a, b, c = make_kv(tokens=64).layers
    layers = [a, LayerKV(b.keys[50:], b.values[50:], 50), LayerKV(c.keys[:0], c.values[:0], 64)]
    check(KVChunk.from_layers(layers, tokens=64))
    check(make_kv(tokens=1))
    check(make_kv(tokens=40, dim=8, value_dim=24))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_bits(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = data.draw(st.integers(1, 70))
    width = np.dtype(dtype).itemsize
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    base = data.draw(st.sampled_from([0.0, 1.0, 1e-38, 300.0]))
    values = (base * (1 + rng.normal(0, 1, (1, 2, tokens, 1, 3)))).astype(dtype)
    raw = values.view(f"u{width}")
    for _ in range(data.draw(st.integers(0, 8))):
        place = tuple(int(rng.integers(size)) for size in raw.shape)
        raw[place] = rng.integers(0, 1 << (8 * width), dtype=np.uint64).astype(raw.dtype)
    check(KVChunk.from_array(values))


def test_a_part_of_an_object_is_refused(make_kv) -> None:
    data = LosslessCodec().encode(make_kv(tokens=40))
    with pytest.raises(TruncatedError):
        decode(data[:-4], allow_partial=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda side, body: (b"\0" + side[1:], body),
        lambda side, body: (b"\x11" + side[1:], body),
        lambda side, body: (side[:1] + b"\1" + side[2:], body),
        lambda side, body: (side[:70], body),
        lambda side, body: (side + b"\x01", body),
        lambda side, body: (side, body[:-1]),
        lambda side, body: (side, body + b"\0"),
        lambda side, body: (side, struct.pack("<I", 3) + body[4:]),
        lambda side, body: (side, body[:3]),
        lambda side, body: (side[:4] + b"\xff\xff" + side[6:], body),
        lambda side, body: (side[:-1] + b"\x7f", body),
        lambda side, body: (side[: 4 + 64 * side[0]] + b"\xff" + side[5 + 64 * side[0] :], body),
        lambda side, body: (side[: 4 + 64 * side[0]] + b"\1" + side[5 + 64 * side[0] :], body),
    ],
)
def test_a_hostile_writer(make_kv, change) -> None:
    """Right checksums around wrong parts: a named error, never another one."""
    chunk = make_kv(layers=1, heads=1, tokens=64, dim=16)
    reader = ObjectReader(LosslessCodec().encode(chunk))
    segments = []
    for group in range(2):
        _, body = reader.segment(group, 0)
        side, coded = bytes(reader.side(group, 0)), bytes(body)
        assert side
        if group == 0:
            side, coded = change(side, coded)
        segments += [SegmentBody(group, 0, SIDE, side), SegmentBody(group, 0, 3, coded)]
    data = write_object(chunk, codec_id=5, passes=1, params=b"", segments=segments)
    with pytest.raises(FormatError):
        decode(data)


def test_parameters_are_refused(make_kv) -> None:
    chunk = make_kv(layers=1)
    reader = ObjectReader(LosslessCodec().encode(chunk))
    segments = [
        SegmentBody(s.group, 0, s.kind, bytes(reader.side(s.group, 0)))
        if s.kind == SIDE
        else SegmentBody(s.group, 0, s.kind, bytes(reader.segment(s.group, 0)[1]))
        for s in reader.header.segments
    ]
    data = write_object(chunk, codec_id=5, passes=1, params=b"\0\0\0\0", segments=segments)
    assert read_header(data).params
    with pytest.raises(CorruptError, match="lossless parameters"):
        decode(data)


def chunk_like_kv(shape: tuple[int, int, int, int], dtype: type, *, seed: int = 0) -> KVChunk:
    """Draw channels with means, spreads and signs of their own, and a few special values."""
    layers, tokens, heads, dim = shape
    rng = np.random.default_rng(seed)
    channel = (layers, 2, 1, heads, dim)
    values = rng.normal(0, 1, channel) + np.exp(rng.normal(0, 1, channel)) * rng.normal(
        0, 1, (layers, 2, tokens, heads, dim)
    )
    values[rng.random(values.shape) < 0.002] = 1e-30
    values[rng.random(values.shape) < 0.002] = np.nan
    values[rng.random(values.shape) < 0.002] = -0.0
    return KVChunk.from_array(values.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 256, 2, 64), (1, 70, 3, 21), (1, 33, 1, 130), (2, 9, 2, 1), (1, 1, 1, 7)], ids=str
)
def test_bytes_and_values_are_those_of_the_twin(isa: str, shape, dtype) -> None:
    chunk = chunk_like_kv(shape, dtype)
    for planes in (planes_of(chunk), [plane[::-1, :, ::-1] for plane in planes_of(chunk)]):
        coded = native.encode_lossless(
            planes, dtype=chunk.geometry.dtype, costs=symbol_costs(), bits_saved=bits_saved()
        )
        for plane, (side, body) in zip(planes, coded, strict=True):
            expected = reference_lossless.encode_plane(plane, chunk.geometry.dtype)
            assert (side.tobytes(), body.tobytes()) == expected
    data = check(chunk)
    reader = ObjectReader(data)
    twin = empty_chunk(reader.header)
    reference_lossless.decode_planes(reader, Target(reader.header, twin))
    for a, b in zip(planes_of(chunk), planes_of(twin), strict=True):
        assert np.array_equal(bits(a), bits(b))


def test_more_tokens_than_16_bits_count(isa: str) -> None:
    """Signs and counts are summed in 16 bits, for so many tokens at a time."""
    rng = np.random.default_rng(0)
    values = (rng.normal(-1, 1, (1, 2, 70_000, 1, 3)) * [1, 5, 0.1]).astype(np.float16)
    plane = values[0, 0]
    ((side, body),) = native.encode_lossless(
        [plane], dtype=KVDtype.FLOAT16, costs=symbol_costs(), bits_saved=bits_saved()
    )
    expected = reference_lossless.encode_plane(plane, KVDtype.FLOAT16)
    assert len(side)
    assert (side.tobytes(), body.tobytes()) == expected
    check(KVChunk.from_array(values))


@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_what_once_was_a_smaller_type_costs_no_more(make_kv, source) -> None:
    """Low mantissa bits that are 0 everywhere are left out."""
    narrow = make_kv(layers=1, heads=2, tokens=128, dim=32, dtype=np.float32)
    arrays = [plane.astype(source) for plane in planes_of(narrow)]
    target = ml_dtypes.bfloat16 if source is ml_dtypes.float8_e4m3fn else np.float32
    wide = KVChunk.from_layers([LayerKV(*(array.astype(target) for array in arrays))])
    size = len(check(wide))
    bits_of_mantissa = ml_dtypes.finfo(source).nmant
    values = 2 * arrays[0].size
    # Mantissas as they are, 5 bits at most for sign and exponent, and 2 KiB for all else.
    assert size < values * (bits_of_mantissa + 5) / 8 + 2048
    if source is not ml_dtypes.float8_e4m3fn:
        same = KVChunk.from_layers([LayerKV(*arrays)])
        assert abs(size - len(check(same))) < 0.02 * size


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_takes_next_to_nothing(dtype, value: float) -> None:
    chunk = KVChunk.from_array(np.full((1, 2, 256, 4, 64), value, dtype))
    planes = 256 * 4 * 64 * 2 // 8 if value == -1.5 else 0  # one bit of the mantissa
    assert len(check(chunk)) < planes + 4096


def test_threads_do_not_change_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunk_like_kv((4, 256, 4, 64), np.float16)
    found = set()
    for count in ("1", "2"):
        monkeypatch.setenv("CACHEGEN_THREADS", count)
        found.add(check(chunk))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_cut_and_flip_of_a_plane(dtype) -> None:
    """Damage behind right checksums: a named error or other values, the same as the twin's."""
    chunk = chunk_like_kv((1, 70, 1, 11), dtype, seed=3)
    ((side, body),) = native.encode_lossless(
        planes_of(chunk)[:1],
        dtype=chunk.geometry.dtype,
        costs=symbol_costs(),
        bits_saved=bits_saved(),
    )
    assert len(side)
    rng = np.random.default_rng(0)
    cuts = [(side[:size], body) for size in range(1, len(side))]
    cuts += [(side, body[:size]) for size in range(len(body))]
    for cut in cuts:
        with pytest.raises(FormatError):
            decode(plane_object(chunk, *cut))
    cases = []
    for part in range(2):
        for at in range(0, len((side, body)[part]), 3):
            both = [side.copy(), body.copy()]
            both[part][at] ^= 1 << int(rng.integers(8))
            cases.append((both[0], both[1]))
    refused = 0
    for damaged in cases:
        data = plane_object(chunk, *damaged)
        try:
            expected = twin_bits(data)
        except FormatError:
            refused += 1
            with pytest.raises(FormatError):
                decode(data)
        else:
            assert np.array_equal(bits(decode(data).layers[0].keys), expected)
    assert 0 < refused < len(cases)


def plane_object(chunk: KVChunk, side: np.ndarray, body: np.ndarray) -> bytes:
    """Write an object whose first plane has these bytes; its second one is stored as it is."""
    values = planes_of(chunk)[1].tobytes()
    segments = [SegmentBody(0, 0, SIDE, side.tobytes()), SegmentBody(0, 0, 3, body.tobytes())]
    segments.append(SegmentBody(1, 0, 3, values))
    return write_object(chunk, codec_id=5, passes=1, params=b"", segments=segments)


def twin_bits(data: bytes) -> np.ndarray:
    reader = ObjectReader(data)
    twin = empty_chunk(reader.header)
    reference_lossless.decode_planes(reader, Target(reader.header, twin))
    return bits(twin.layers[0].keys)
