"""Each peer against an independent restatement of its formula, and its bill byte by byte."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from measures import HALF, ROPE, error_of

from cachegen.bench.baselines.arithmetic import quantise_cdfs, stream_bytes
from cachegen.bench.baselines.base import (
    Bill,
    Prefix,
    join_planes,
    rotate_keys,
    split_planes,
)
from cachegen.bench.baselines.cachegen_lmcache import CacheGenLMCachePeer
from cachegen.bench.baselines.codec import CodecPeer, SlopeCuts
from cachegen.bench.baselines.families import NAMES, Calibration, build, check_names
from cachegen.bench.baselines.int8_zstd import Int8ZstdPeer, token_delta
from cachegen.bench.baselines.kivi import KiviPeer
from cachegen.bench.baselines.turboquant import (
    TurboQuantPeer,
    gaussian_centroids,
    random_rotation,
)
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.registry import decode, get_codec
from cachegen.errors import ConfigError, GeometryError


def bf16(value: float) -> float:
    return float(ml_dtypes.bfloat16(value))


# --- shared arithmetic


def test_planes_round_trip(kv: KVChunk) -> None:
    again = join_planes(kv, *split_planes(kv))
    assert error_of(again, kv) == 0
    assert (again.geometry, again.rope, again.tokens) == (kv.geometry, kv.rope, kv.tokens)
    short = LayerKV(kv.layers[0].keys[5:], kv.layers[0].values[5:], 5)
    ragged = KVChunk.from_layers([short, *kv.layers[1:]], tokens=kv.tokens)
    with pytest.raises(GeometryError, match="sliding"):
        split_planes(ragged)


def test_rope_comes_off_and_on_again(kv: KVChunk) -> None:
    keys, _ = split_planes(kv)
    positions = range(7, 7 + kv.tokens)
    plain = rotate_keys(keys, ROPE, positions, undo=True)
    assert rotate_keys(plain, ROPE, positions, undo=False) == pytest.approx(keys, abs=1e-4)
    assert np.array_equal(plain[1], keys[1])
    # One token by hand: pairs (i, i + 8), rotated back by its position, and the scale taken off.
    token, head, i = 9, 1, 2
    angle = (7 + token) * HALF[i]
    a, b = keys[2, token, head, [i, i + 8]]
    expected = (a * math.cos(angle) + b * math.sin(angle)) / 1.3
    assert plain[2, token, head, i] == pytest.approx(expected, abs=1e-4)


# --- int8 + zstd


def test_int8_zstd(kv: KVChunk) -> None:
    zstandard = pytest.importorskip("zstandard")
    point = Int8ZstdPeer().points(Prefix(kv))[0]
    payload = side = 0
    for begin in range(0, kv.tokens, 64):
        chunk = kv.slice_tokens(begin, min(begin + 64, kv.tokens))
        symbols, scales = bytearray(), bytearray()
        for is_value in (False, True):
            for layer in chunk.layers:
                before = None
                for row in layer.plane(is_value=is_value).astype(np.float32):
                    peak = np.abs(row).max(axis=1)
                    codes = np.rint(row * (np.float32(127) / peak[:, None])).astype(int)
                    delta = codes if before is None else codes - before
                    before = codes
                    symbols += (delta % 256).astype(np.uint8).tobytes()
                    scales += peak.astype(ml_dtypes.bfloat16).tobytes()
        compress = zstandard.ZstdCompressor(level=3).compress
        payload += len(compress(bytes(symbols)))
        side += len(compress(bytes(scales)))
    assert point.bill == Bill(payload, side)
    # The same values as the codec int8, but where a value lies halfway between two symbols.
    plain = decode(Int8Codec(entropy=False).encode(kv))
    for a, b in zip(split_planes(point.decoded), split_planes(plain), strict=True):
        assert np.mean(a != b) < 0.01


def test_token_delta_is_undone_by_a_running_sum() -> None:
    codes = np.random.default_rng(0).integers(-127, 128, (2, 9, 3, 4)).astype(np.int8)
    assert np.array_equal(np.cumsum(token_delta(codes), axis=1, dtype=np.int8), codes)


# --- CacheGen as LMCache stores it


class BitCoder:
    """The arithmetic coder written out bit by bit, as torchac does it."""

    def __init__(self, cdf: list[int]) -> None:
        self.cdf = cdf

    def encode(self, symbols: list[int]) -> list[int]:
        low, high, pending, bits = 0, 0xFFFFFFFF, 0, []

        def emit(bit: int) -> None:
            nonlocal pending
            bits.extend([bit] + [1 - bit] * pending)
            pending = 0

        for symbol in symbols:
            span = high - low + 1
            high = low - 1 + ((span * self.cdf[symbol + 1]) >> 16)
            low = low + ((span * self.cdf[symbol]) >> 16)
            while True:
                if high < 1 << 31:
                    emit(0)
                elif low >= 1 << 31:
                    emit(1)
                    low, high = low - (1 << 31), high - (1 << 31)
                elif low >= 1 << 30 and high < 3 << 30:
                    pending += 1
                    low, high = low - (1 << 30), high - (1 << 30)
                else:
                    break
                low, high = low << 1, (high << 1) | 1
        pending += 1
        emit(0 if low < 1 << 30 else 1)
        return bits

    def decode(self, bits: list[int], count: int) -> list[int]:
        stream = iter([*bits, *[0] * 64])
        value = int("".join(str(next(stream)) for _ in range(32)), 2)
        low, high, out = 0, 0xFFFFFFFF, []
        for _ in range(count):
            span = high - low + 1
            scaled = (((value - low + 1) << 16) - 1) // span
            symbol = max(i for i in range(len(self.cdf) - 1) if self.cdf[i] <= scaled)
            out.append(symbol)
            high = low - 1 + ((span * self.cdf[symbol + 1]) >> 16)
            low = low + ((span * self.cdf[symbol]) >> 16)
            while True:
                if high < 1 << 31:
                    offset = 0
                elif low >= 1 << 31:
                    offset = 1 << 31
                elif low >= 1 << 30 and high < 3 << 30:
                    offset = 1 << 30
                else:
                    break
                low, high = (low - offset) << 1, ((high - offset) << 1) | 1
                value = ((value - offset) << 1) | next(stream)
        return out


def test_arithmetic_coder_size_is_that_of_real_streams() -> None:
    rng = np.random.default_rng(2)
    spreads = (0.01, 0.3, 1.0, 3.0, 30.0)
    columns = [np.clip(np.rint(rng.normal(15, s, 120)), 0, 30).astype(np.uint8) for s in spreads]
    symbols = np.stack(columns, axis=1)
    counts = np.stack([np.bincount(column, minlength=31) for column in columns])
    cdfs = quantise_cdfs(counts, 33)
    assert cdfs.shape == (5, 33)
    assert (np.diff(cdfs, axis=1) >= 1).all()
    assert (cdfs[:, 0] == 0).all() and (cdfs[:, -1] == 65536).all()
    sizes = stream_bytes(symbols, cdfs)
    for column, cdf, size in zip(columns, cdfs.tolist(), sizes, strict=True):
        coder = BitCoder(cdf)
        bits = coder.encode(column.tolist())
        assert coder.decode(bits, len(column)) == column.tolist()
        assert size == -(-len(bits) // 8)


@pytest.mark.parametrize("level", [1, 3])
def test_cachegen_lmcache(kv: KVChunk, level: int) -> None:
    peer = CacheGenLMCachePeer(level, chunk_tokens=80)
    point = peer.points(Prefix(kv))[0]
    objects = [CacheGenCodec(level=level).encode(chunk) for chunk in kv.split(80)]
    assert error_of(point.decoded, KVChunk.concat([decode(data) for data in objects])) == 0
    streams = 3 * (3 * 2 * 32)  # chunks x (layers x K and V x channels)
    scales = 2 * 200 * 6
    assert point.bill.side_bytes == streams * (33 * 2 + 4) + scales
    # Within rounding to bytes of the entropy under a chunk's own statistics.
    entropy = 0.0
    for chunk in kv.split(80):
        for plane, bins in zip(
            (p for layer in chunk.layers for p in (layer.keys, layer.values)),
            CacheGenCodec(level=level).plane_bins(3),
            strict=True,
        ):
            x = plane.astype(np.float32).reshape(len(plane), -1)
            m = bins // 2 - 1
            codes = np.rint(x * m / np.abs(x).max(axis=1, keepdims=True)).astype(int)
            for column in codes.T:
                p = np.unique(column, return_counts=True)[1] / len(column)
                entropy -= len(column) * float((p * np.log2(p)).sum())
    assert entropy / 8 < point.bill.payload_bytes < entropy / 8 + 1.2 * streams


# --- KIVI, TurboQuant


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(kv: KVChunk, bits: int) -> None:
    point = KiviPeer(bits).points(Prefix(kv))[0]
    coded = 64  # 200 - 128 = 72, of which 64 are whole groups of 32
    tail = kv.slice_tokens(coded, 200)
    assert error_of(point.decoded.slice_tokens(coded, 200), tail) == 0
    values = coded * 3 * 2 * (16 + 16)
    groups = 3 * 2 * (16 * 2) + 3 * 2 * coded  # K: 2 groups a channel; V: head of 16, 1 a token
    assert point.bill == Bill(values * bits // 8, groups * 4, (200 - coded) * 3 * 2 * 32 * 2)
    top = 2**bits - 1

    def restated(group: list[float]) -> list[float]:
        low = float(np.float16(min(group)))
        step = float(np.float16((max(group) - low) / top))
        return [bf16(min(max(round((x - low) / step), 0), top) * step + low) for x in group]

    key = kv.layers[1].keys[32:64, 1, 3].astype(float).tolist()
    assert point.decoded.layers[1].keys[32:64, 1, 3].astype(float) == pytest.approx(restated(key))
    value = kv.layers[2].values[5, 0].astype(float).tolist()
    assert point.decoded.layers[2].values[5, 0].astype(float) == pytest.approx(restated(value))
    whole = KiviPeer(bits, window_tokens=0).points(Prefix(kv))[0]
    assert whole.bill.exempt_bytes == 8 * 3 * 2 * 32 * 2
    short = KiviPeer(bits).points(Prefix(kv.slice_tokens(0, 100)))[0]
    assert short.bill == Bill(0, 0, 100 * 3 * 2 * 32 * 2)


def test_lloyd_max_levels() -> None:
    """Max (1960), table I."""
    assert gaussian_centroids(1) == pytest.approx([-0.7979, 0.7979], abs=1e-4)
    assert gaussian_centroids(2)[2:] == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert gaussian_centroids(3)[4:] == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)
    draws = np.random.default_rng(0).normal(size=100_000)
    levels = gaussian_centroids(4)
    nearest = levels[np.abs(draws[:, None] - levels).argmin(axis=1)]
    assert np.square(draws - nearest).mean() == pytest.approx(0.009497, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant(kv: KVChunk, bits: int) -> None:
    point = TurboQuantPeer(bits).points(Prefix(kv))[0]
    vectors = 200 * 3 * 2 * 2
    assert point.bill == Bill(vectors * 16 * bits // 8, vectors * 2, 0)
    rotation = random_rotation(16)
    assert rotation @ rotation.T == pytest.approx(np.eye(16), abs=1e-6)
    vector = kv.layers[2].keys[77, 1].astype(np.float64)
    norm = math.sqrt(sum(x * x for x in vector))
    levels = gaussian_centroids(bits)
    turned = [sum(r * x for r, x in zip(row, vector, strict=True)) / norm * 4 for row in rotation]
    coded = [min(levels, key=lambda c: abs(c - x)) / 4 for x in turned]
    back = [sum(coded[i] * rotation[i][j] for i in range(16)) for j in range(16)]
    expected = np.array(back) * float(np.float16(norm))
    got = point.decoded.layers[2].keys[77, 1].astype(np.float64)
    assert got == pytest.approx(expected, rel=2**-8, abs=1e-3)


def test_more_bits_are_closer(kv: KVChunk) -> None:
    for peers in (
        [KiviPeer(2), KiviPeer(4)],
        [TurboQuantPeer(b) for b in (2, 3, 4)],
        [CacheGenLMCachePeer(level) for level in (1, 2, 3)],
    ):
        points = [peer.points(Prefix(kv))[0] for peer in peers]
        errors = [error_of(point.decoded, kv) for point in points]
        sizes = [point.bill.total_bytes for point in points]
        assert errors == sorted(errors, reverse=True)
        assert sizes == sorted(sizes)


# --- the library's own codecs


def test_codec_peer_bills_every_byte(kv: KVChunk) -> None:
    for codec in (get_codec("raw"), CacheGenCodec(level=1, delta="anchor", tables="parametric")):
        peer = CodecPeer(codec, family="x", label="one", chunk_tokens=64)
        (point,) = peer.points(Prefix(kv))
        objects = [codec.encode(chunk) for chunk in kv.split(64)]
        assert point.label == "one"
        assert point.bill.total_bytes == sum(len(data) for data in objects)
        assert error_of(point.decoded, KVChunk.concat([decode(data) for data in objects])) == 0
        assert peer.calibration_bytes == 0
    chunks = kv.split(64)
    profile = CacheGenCodec(level=1).fit_profile(chunks)
    codec = CacheGenCodec(level=1, tables="profile", profile=profile)
    peer = CodecPeer(codec, family="x", chunk_tokens=64)
    assert peer.calibration_bytes == sum(a.nbytes for a in profile.arrays.values())
    assert peer.points(Prefix(kv))[0].bill.side_bytes < 64 * 200


def test_one_stored_object_has_several_operating_points(kv: KVChunk) -> None:
    """The low digits of int8 are its second pass: less of them is read where they pay least."""
    peer = CodecPeer(get_codec("int8"), family="x", cuts=SlopeCuts(5), chunk_tokens=100)
    points = peer.points(Prefix(kv))
    sizes = [point.bill.total_bytes for point in points]
    errors = [error_of(point.decoded, kv) for point in points]
    assert [point.label for point in points] == [f"cut {i}" for i in range(5)]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert len(set(sizes)) == 5
    objects = [peer.codec.encode(chunk) for chunk in kv.split(100)]
    assert sizes[-1] == sum(len(data) for data in objects)
    # Pass 0 alone: everything but the packed low digits.
    low_digits = 2 * (100 * 32 * 3 // 8) * 6
    assert sizes[-1] - low_digits - 3 * 12 <= sizes[0] <= sizes[-1] - low_digits
    # Evenly spaced in log bytes, as near as whole segments allow.
    steps = np.diff(np.log(sizes))
    assert steps.max() < 3 * steps.min()


def test_cuts_lie_on_the_lower_hull() -> None:
    """A segment that removes little is read together with the good one behind it, or not at all."""
    codec = get_codec("int8")
    chunk = KVChunk.from_layers(
        [
            LayerKV(*(np.full((32, 1, 8), scale, ml_dtypes.bfloat16) for scale in scales))
            for scales in ((1e-3, 1.0), (1e-2, 100.0))
        ]
    )
    data = codec.encode(chunk)
    whole = read_header(data)
    ends = [s.offset + s.length for s in whole.segments if s.pass_index == 1]
    lengths = {tuple(cut) for _, cut in SlopeCuts(9)([data])}
    # Of the four low digits only those of the last V matter: all or nothing.
    assert lengths == {(ends[0] - whole.segments[-1].length,), (ends[3],)}


def test_cuts_of_a_codec_with_one_pass_are_all_the_whole_object(kv: KVChunk) -> None:
    objects = [get_codec("raw").encode(chunk) for chunk in kv.split(100)]
    for _, lengths in SlopeCuts(3)(objects):
        assert lengths == [len(data) for data in objects]


# --- families


def test_every_family_can_be_built_and_measured(kv: KVChunk) -> None:
    calibration = Calibration((kv,))
    names = [name for name in NAMES if name != "int8-zstd"]
    peers = build([*names, "h2o+kvtc-no-window", "cachegen:level=1,delta=anchor"], calibration)
    importance = np.arange(200.0)
    points: dict[str, list[Bill]] = {}
    for peer in peers:
        for point in peer.points(Prefix(kv, importance)):
            points.setdefault(peer.family, []).append(point.bill)
            assert point.decoded.tokens == 200
            assert 0 < point.bill.total_bytes < 1.1 * kv.size_bytes
    assert list(points) == [*names, "h2o+kvtc-no-window", "cachegen:level=1,delta=anchor"]
    assert len(points["cachegen-lmcache"]) == 3


def test_chunk_sizes_are_families_of_their_own(kv: KVChunk) -> None:
    peers = build(["int8", "kivi", "h2o+int8"], Calibration((kv,)), chunk_tokens=(64, 256))
    families = list(dict.fromkeys(peer.family for peer in peers))
    assert families == ["int8@64", "int8@256", "kivi", "h2o+int8@256"]


@pytest.mark.parametrize(
    "names",
    [(), ("zip",), ("int8", "int8"), ("cachegen:level",), ("kivi:bits=2",), ("h2o+zip",)],
)
def test_names_that_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        check_names(names)


def test_settings_reach_the_codec(kv: KVChunk) -> None:
    (peer,) = build(["cachegen:level=1,tables=parametric"], Calibration((kv,)))
    assert isinstance(peer, CodecPeer)
    assert peer.codec == CacheGenCodec(level=1, tables="parametric")
    with pytest.raises(ConfigError):
        build(["cachegen:no_such=1"], Calibration((kv,)))
    with pytest.raises(ConfigError, match="calibration"):
        build(["cachegen-paper"], Calibration(()))
