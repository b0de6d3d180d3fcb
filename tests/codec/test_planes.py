"""Native decoding of ``int8`` and ``cachegen`` planes gives what the twin gives, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import reference_planes
from cachegen.codec.base import Codec, empty_chunk
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.entropy import parametric_tables
from cachegen.codec.grading import CacheGenConfig
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode
from cachegen.codec.target import Target
from cachegen.errors import CacheGenError, CorruptError, GeometryError, NonFiniteError
from cachegen.native import fused
from cachegen.native.planes import NOTHING
from cachegen.types import KVDtype

# Bins of 63 and 40 have raw digits within rANS, of both parities.
WIDE = CacheGenConfig.from_bins((63, 40, 5), (33, 16, 60))
CODECS: list[Codec] = [
    Int8Codec(),
    Int8Codec(entropy=False),
    CacheGenCodec(),
    CacheGenCodec(grading=WIDE),
    CacheGenCodec(grading=WIDE, tables="parametric"),
    CacheGenCodec(level=3, delta="anchor"),
    CacheGenCodec(level=1, delta="anchor", tables="parametric"),
]
SHAPES = [(3, 256, 2, 80), (3, 70, 3, 20), (3, 33, 1, 130), (3, 9, 2, 1), (3, 1, 1, 7)]


def chunk_of(
    shape: tuple[int, int, int, int], *, dtype: KVDtype = KVDtype.BFLOAT16, constant: bool = False
) -> KVChunk:
    layers, tokens, heads, dim = shape
    rng = np.random.default_rng(sum(shape))
    spread = np.exp(rng.normal(0, 1, (layers, 2, 1, heads, dim)))
    kv = rng.laplace(size=(layers, 2, tokens, heads, dim)) * (0 if constant else spread)
    return KVChunk.from_array(kv.astype(dtype.numpy))


def by_twin(data: bytes) -> KVChunk:
    reader = ObjectReader(data, allow_partial=True)
    chunk = empty_chunk(reader.header)
    reference_planes.decode_planes(reader, Target(reader.header, chunk))
    return chunk


def assert_equal(ours: KVChunk, theirs: KVChunk) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.keys.tobytes() == other.keys.tobytes()
        assert mine.values.tobytes() == other.values.tobytes()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(list(codec.config().values())))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(codec: Codec, shape: tuple[int, int, int, int], isa: str) -> None:
    for dtype in KVDtype:
        data = codec.encode(chunk_of(shape, dtype=dtype))
        header = read_header(data)
        first = max(s.end for s in header.segments if s.pass_index == 0)
        for size in {first, len(data)}:
            assert_equal(decode(data[:size], allow_partial=True), by_twin(data[:size]))


def test_coded_segments_of_every_kind(isa: str) -> None:
    """Constant planes and tiny ones are stored as bytes or packed."""
    kinds = set()
    for codec in CODECS:
        for chunk in (chunk_of((3, 300, 2, 8), constant=True), chunk_of((3, 2, 1, 8))):
            data = codec.encode(chunk)
            kinds |= {segment.kind for segment in read_header(data).segments}
            assert_equal(decode(data), by_twin(data))
    assert len(kinds) == 4


@pytest.mark.parametrize("codec", [CODECS[0], CODECS[4], CODECS[6]], ids=["int8", "plain", "delta"])
@pytest.mark.parametrize("dtype", list(KVDtype), ids=lambda dtype: dtype.label)
def test_other_destinations(codec: Codec, dtype: KVDtype) -> None:
    """Strides, other dtypes, and blocks of a paged cache, where some tokens are left out."""
    layers, tokens, heads, dim = shape = (3, 70, 2, 40)
    data = codec.encode(chunk_of(shape))
    wanted = by_twin(data)
    wide = np.full((layers, 2, heads, tokens, dim + 3), 7, dtype.numpy)
    planes = [
        tuple(wide[layer, side, :, :, 2:-1].transpose(1, 0, 2) for side in range(2))
        for layer in range(layers)
    ]
    decode(data, out=planes)
    slots = np.random.default_rng(1).permutation(96)[:tokens]
    slots[[3, 50]] = -1
    paged = [tuple(np.full((6, 16, heads, dim), 7, dtype.numpy) for _ in range(2)) for _ in planes]
    decode(data, out=paged, slot_mapping=slots)
    kept = slots >= 0
    for layer, held in enumerate(wanted.layers):
        for side, plane in enumerate((held.keys, held.values)):
            values = plane.astype(dtype.numpy)
            assert planes[layer][side].tobytes() == values.tobytes()
            blocks = paged[layer][side].reshape(96, heads, dim)
            assert blocks[slots[kept]].tobytes() == values[kept].tobytes()
            others = np.delete(blocks, slots[kept], axis=0)
            assert (others == 7).all()
    assert (wide[..., :2] == 7).all() and (wide[..., -1:] == 7).all()


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_threads_change_nothing(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunk_of((3, 256, 4, 64))
    for codec in CODECS:
        monkeypatch.setenv("CACHEGEN_THREADS", "1")
        data = codec.encode(chunk)
        monkeypatch.setenv("CACHEGEN_THREADS", threads)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3), raising=False)
        assert codec.encode(chunk) == data
        assert_equal(decode(data), by_twin(data))


def test_the_first_plane_that_cannot_be_encoded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEGEN_THREADS", "2")
    kv = np.ones((2, 2, 40, 1, 4), np.float32)
    kv[0, 1, 7] = np.nan
    kv[1, 1, 3] = np.inf
    with pytest.raises(NonFiniteError, match="token 7"):
        Int8Codec().encode(KVChunk.from_array(kv))


def test_layers_that_hold_fewer_tokens() -> None:
    rng = np.random.default_rng(0)
    layers = []
    for begin in (0, 30, 59):
        planes = [rng.normal(size=(60 - begin, 2, 24)).astype(np.float32) for _ in range(2)]
        layers.append(LayerKV(planes[0], planes[1], begin))
    chunk = KVChunk.from_layers(layers, tokens=60)
    for codec in CODECS:
        data = codec.encode(chunk)
        assert_equal(decode(data), by_twin(data))


def source(**changes: object) -> native.MatrixSource:
    """Rows of 40 tokens and 8 channels as bytes, with sound scales."""
    symbols = np.full(320, 14, np.uint8)
    scales = np.ones(40, np.float32).view(np.uint8)
    sound = native.MatrixSource(
        rows=40, kind=fused.BYTES, bits=0, body=symbols, freqs=NOTHING, alphabet=0,
        classes=NOTHING, rotations=NOTHING, shift=0, low_bits=0, low=NOTHING, levels=7,
        scales=scales, per_head=False,
    )  # fmt: skip
    return sound._replace(**changes)


def run(*passes: native.MatrixSource, group_tokens: int = 0) -> np.ndarray:
    out = np.zeros((40, 2, 4), np.float32)
    offsets = fused.token_offsets(40, out, None)
    address = out.__array_interface__["data"][0]
    target = native.PlaneTarget(address, offsets, out.strides[1], 2, 4, -1, 0, False)
    native.decode_planes(
        [native.QuantizedPlane(40, group_tokens, passes, target)],
        dtype=KVDtype.FLOAT32,
        stored=KVDtype.FLOAT32,
        shared=parametric_tables()[0],
    )
    return out


def test_a_sound_source_decodes() -> None:
    assert (run(source()) == 1).all()
    assert (run(source(body=np.full(320, 7, np.uint8))) == 0).all()
    packed = source(kind=fused.PACKED, bits=4, body=np.zeros(160, np.uint8))
    assert (run(packed) == -1).all()
    anchors = source(
        rows=4, body=np.full(32, 14, np.uint8), scales=np.ones(4, np.float32).view("B")
    )
    assert (run(anchors, group_tokens=10) == 1).all()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"body": np.full(320, 15, np.uint8)}, CorruptError),
        ({"body": np.full(319, 1, np.uint8)}, CorruptError),
        ({"scales": np.full(40, np.inf, np.float32).view(np.uint8)}, CorruptError),
        ({"scales": np.full(40, -1, np.float32).view(np.uint8)}, CorruptError),
        ({"scales": np.ones(39, np.float32).view(np.uint8)}, GeometryError),
        ({"rows": 41}, GeometryError),
        ({"levels": 0}, GeometryError),
        ({"levels": 128}, GeometryError),
        ({"shift": 4}, GeometryError),
        ({"kind": fused.PACKED, "bits": 4, "body": np.zeros(159, np.uint8)}, CorruptError),
        ({"kind": fused.PACKED, "bits": 9}, GeometryError),
        ({"kind": 3}, GeometryError),
        ({"low_bits": 1, "low": np.zeros(39, np.uint8)}, CorruptError),
        ({"kind": fused.RANS, "body": np.zeros(3, np.uint8)}, CacheGenError),
        ({"kind": fused.RANS, "alphabet": 15}, CacheGenError),
        ({"kind": fused.RANS, "alphabet": 16, "freqs": np.zeros(256, np.uint8)}, GeometryError),
    ],
)
def test_refuses(changes: dict[str, object], error: type[CacheGenError]) -> None:
    with pytest.raises(error):
        run(source(**changes))


def test_refuses_tables_and_classes_that_are_damaged(isa: str) -> None:
    frequencies = np.zeros((8, 15), np.uint16)
    frequencies[:, 3] = 4096
    tables = native.Tables(frequencies)
    models = np.arange(8, dtype=np.uint16)
    body = native.encode_segment(np.full((40, 8), 3, np.uint8), models, tables, stream_steps=1024)
    coded = np.frombuffer(body, np.uint8)
    good = source(kind=fused.RANS, body=coded, freqs=frequencies.view("B").ravel(), alphabet=15)
    assert np.allclose(run(good), -4 / 7)
    frequencies[5, 3] = 4095
    with pytest.raises(CorruptError, match="model 5"):
        run(good._replace(freqs=frequencies.view(np.uint8).ravel()))
    classes = np.full(8, 112, np.uint8)
    with pytest.raises(CorruptError, match="table class"):
        run(good._replace(freqs=NOTHING, classes=classes, rotations=np.zeros(8, np.uint8)))
    with pytest.raises(CorruptError, match="table rotation"):
        run(good._replace(classes=classes - 112, rotations=np.full(8, 32, np.uint8)))
