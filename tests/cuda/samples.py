"""Objects of every codec and option, and comparisons of what the kernels make of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from cachegen import native
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import ladder, passes
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import RANS, SIDE, read_header, write_object
from cachegen.codec.header import SegmentBody, plane_groups
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import decode
from cachegen.codec.side import GroupSide
from cachegen.profile import Profile
from cachegen.types import RopeSpec

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/v1"
BFLOAT16 = ml_dtypes.bfloat16
SEGMENT_ENTRY = 20


GOLDEN_NAMES = sorted(path.stem for path in GOLDEN.glob("*.cgen"))


def golden_script() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts/make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_sample(name: str) -> Sample:
    """Return a golden object with the profile that it needs."""
    script = golden_script()
    data = (GOLDEN / f"{name}.cgen").read_bytes()
    header, profile = read_header(data), None
    if header.profile is not None and header.codec_id == ProgressiveCodec.codec_id:
        profile = Profile.load(GOLDEN / script.PROFILE)
    elif header.profile is not None:
        profile = script.codecs()[name].profile
    return Sample(name, data, profile)


def draw_kv(
    layers: int = 2, heads: int = 2, tokens: int = 64, dim: int = 16, *, seed: int, dtype: Any
) -> KVChunk:
    """Draw K and V with a mean and a spread per channel; a few values far out."""
    rng = np.random.default_rng(seed)

    def plane() -> np.ndarray:
        mean = rng.normal(0, 2, (1, heads, dim))
        spread = np.exp(rng.normal(-0.5, 0.9, (1, heads, dim)))
        values = mean + spread * rng.standard_t(4, (tokens, heads, dim))
        return np.clip(values, -300, 300).astype(dtype)

    return KVChunk.from_layers([LayerKV(plane(), plane()) for _ in range(layers)])


def few_wide_values(tokens: int = 200, dim: int = 16, *, share: float = 0.0005) -> KVChunk:
    """Values of one spread, but for a few: the first pass of a fine ladder is nearly all zero."""
    rng = np.random.default_rng(5)
    kv = rng.normal(size=(2, 2, tokens, 2, dim))
    kv[rng.random(kv.shape) < share] *= 20
    return KVChunk.from_array(kv.astype(BFLOAT16))


SPARSE_CODEC = ProgressiveCodec(passes=4, step=0.3)


def sparse_samples() -> Iterator[Sample]:
    """Objects whose groups have sparse first passes, cut behind different passes."""
    for tokens, dim in ((200, 16), (70, 40), (33, 12), (40, 9)):
        for half in (0, dim // 4, dim // 2):
            kv = few_wide_values(tokens, dim, share=0.0008)
            data = SPARSE_CODEC.encode(with_rope(kv, half) if half else kv)
            sample = Sample(f"progressive sparse {tokens} x {dim}, half {half}", data)
            yield sample
            header = read_header(data)
            first = [segment for segment in header.segments if segment.pass_index == 0]
            yield Sample(f"{sample.name}, pass 0", data[: first[-1].end], None, True)
            for groups in (1, 5):
                cut = partial(sample, groups)
                yield replace(cut, name=f"{cut.name} at {groups}")


def with_rope(chunk: KVChunk, half: int, *, interleaved: bool = False) -> KVChunk:
    """Give a chunk a RoPE for all layers but the last, positions from 1000."""
    layers = chunk.geometry.layers
    frequencies = tuple(float(np.float32(10000.0 ** (-i / half))) for i in range(half))
    kinds = (0,) * (layers - 1) + (0 if layers == 1 else -1,)
    spec = RopeSpec((frequencies,), (1.25,), kinds, interleaved)
    return replace(chunk, rope=spec, first_position=1000)


def ragged(chunk: KVChunk) -> KVChunk:
    """Let layer 0 hold only the later tokens, as a sliding window does."""
    layer = chunk.layers[0]
    begin = chunk.tokens // 3
    first = LayerKV(layer.keys[begin:], layer.values[begin:], begin)
    return KVChunk.from_layers(
        [first, *chunk.layers[1:]], tokens=chunk.tokens, first_position=5, rope=chunk.rope
    )


@dataclass(frozen=True)
class Sample:
    """An object, or with partial a prefix of one."""

    name: str
    data: bytes
    profile: Profile | None = None
    partial: bool = False

    def expected(self) -> KVChunk:
        return decode(self.data, profile=self.profile, allow_partial=self.partial)


def partial(sample: Sample, groups: int = 1) -> Sample:
    """Cut an object behind some groups' first refinement."""
    header = read_header(sample.data)
    later = [segment for segment in header.segments if segment.pass_index > 0]
    cut = later[min(groups, len(later)) - 1].end
    return Sample(f"{sample.name}, cut", sample.data[:cut], sample.profile, True)


def samples() -> Iterator[Sample]:
    """Objects that take every way through the kernels, small enough to emulate."""
    shapes = [(2, 2, 64, 16), (1, 3, 37, 8), (1, 1, 5, 12)]
    for layers, heads, tokens, dim in shapes:
        size = f"{tokens} x {heads} x {dim}"
        for dtype in (BFLOAT16, np.float16, np.float32):
            kv = draw_kv(layers, heads, tokens, dim, seed=tokens, dtype=dtype)
            name = f"{np.dtype(dtype).name}, {size}"
            yield Sample(f"raw {name}", RawCodec().encode(kv))
            yield Sample(f"int8 {name}", Int8Codec().encode(kv))
            yield Sample(f"int8 bytes {name}", Int8Codec(entropy=False).encode(kv))
            for tables in ("chunk", "parametric"):
                yield Sample(f"cachegen {tables} {name}", CacheGenCodec(tables=tables).encode(kv))
            anchored = Sample(
                f"cachegen anchor {name}",
                CacheGenCodec(delta="anchor", tables="parametric").encode(kv),
            )
            yield anchored
            plain = Sample(f"progressive {name}", ProgressiveCodec().encode(kv))
            yield plain
            if dtype is BFLOAT16:
                yield partial(anchored)
                yield partial(plain)
                yield Sample(f"progressive 1 pass {name}", ProgressiveCodec(passes=1).encode(kv))
                yield Sample(
                    f"progressive 6 passes {name}", ProgressiveCodec(passes=6, step=0.01).encode(kv)
                )
                fitted = CacheGenCodec().fit_profile([kv])
                codec = CacheGenCodec(tables="profile", profile=fitted)
                yield Sample(f"cachegen profile {name}", codec.encode(kv), fitted)
    tall = draw_kv(1, 2, 200, 24, seed=3, dtype=BFLOAT16)
    yield Sample("int8 rANS", Int8Codec().encode(tall))
    yield Sample("cachegen rANS, K of 16", CacheGenCodec(level=1).encode(tall))
    for half, interleaved, dim in ((8, False, 16), (4, False, 16), (8, True, 16), (6, False, 12)):
        kv = draw_kv(2, 2, 40, dim, seed=half + dim, dtype=BFLOAT16)
        turned = Sample(
            f"progressive RoPE half {half} of {dim}, interleaved {interleaved}",
            ProgressiveCodec().encode(with_rope(kv, half, interleaved=interleaved)),
        )
        yield turned
        yield partial(turned, 2)
    window = ragged(draw_kv(2, 2, 64, 16, seed=9, dtype=BFLOAT16))
    for codec in (RawCodec(), Int8Codec(), CacheGenCodec(), ProgressiveCodec()):
        yield Sample(f"{codec.name} ragged", codec.encode(window))


def restreamed(kv: KVChunk, codec: ProgressiveCodec, steps: tuple[int, ...]) -> bytes:
    """Encode without a profile, with other restart points: ``steps`` by pass, over and over."""
    data = codec.encode(kv)
    reader = ObjectReader(data)
    header = reader.header
    digits: dict[int, tuple[Any, Any]] = {}
    segments = []
    for segment in header.segments:
        group, index = segment.group, segment.pass_index
        body = data[segment.offset : segment.offset + segment.length]
        shape = ProgressiveCodec.coded_shape(header, group, 0)[:2]
        if segment.kind == SIDE:
            side = GroupSide.from_bytes(memoryview(body), *shape, header.geometry.dtype, plain=True)
            digits[group] = side.classes, passes.read(reader, group, shape, side.classes)
        elif segment.kind == RANS:
            classes, found = digits[group]
            family, scale = (part.astype(np.int64) for part in np.divmod(classes, ladder.CLASSES))
            rows = family * ladder.ROWS + ladder.row_of(scale, header.passes - 1 - index)
            spacing = steps[index % len(steps)]
            if index == 0:
                value = found.coarse.astype(np.int64)
                symbols = (2 * np.abs(value) - (value < 0)).astype(np.uint8)
                models, tables = rows.astype(np.uint16), passes.coarse_tables()
                body = native.encode_segment(symbols, models, tables, stream_steps=spacing)
            else:
                body = native.encode_segment(
                    found.digits[index - 1],
                    (2 * rows).astype(np.uint16),
                    passes.refine_tables(),
                    contexts=ladder.contexts(found, index),
                    stream_steps=spacing,
                )
        entry = SegmentBody(group, index, segment.kind, body, segment.distortion, segment.bits)
        segments.append(entry)
    plain = header.groups == plane_groups(header.geometry.layers)
    return write_object(
        kv,
        codec_id=header.codec_id,
        passes=header.passes,
        params=header.params,
        segments=segments,
        groups=None if plain else header.groups,
        rope=header.rope,
    )


def profiled(*, dim: int = 16, turned: bool = True) -> tuple[Sample, Profile]:
    """Return an object with a profile of its own."""
    from cachegen.codec import basis

    try:
        from cachegen.codec import fit as maker
    except ImportError:
        maker = basis
    chunks = [draw_kv(2, 2, 70, dim, seed=20 + seed, dtype=BFLOAT16) for seed in range(4)]
    if turned:
        chunks = [with_rope(chunk, dim // 2) for chunk in chunks]
    profile = maker.fit_basis(chunks)
    data = ProgressiveCodec(profile=profile, step=0.05).encode(chunks[0])
    return Sample(f"progressive profile dim {dim} RoPE {turned}", data, profile), profile


def empty_like(chunk: KVChunk) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return arrays to decode a chunk into, of a content that no decoder leaves."""
    return [(np.full_like(layer.keys, 7), np.full_like(layer.values, 7)) for layer in chunk.layers]


def assert_close(got: np.ndarray, expected: np.ndarray, *, exact: bool) -> None:
    """Equal, or apart by a unit in the last place of the dtype and the rounding of float32 sums."""
    if exact:
        assert np.array_equal(_bits(got), _bits(expected))
        return
    a, b = got.astype(np.float64), expected.astype(np.float64)
    info = ml_dtypes.finfo(got.dtype)
    largest = float(np.abs(b).max(initial=0))
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(b), float(info.tiny))))) * float(info.eps)
    assert (np.abs(a - b) <= unit + largest * 2.0**-20).all()


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a byte of a segment and put its checksum, and the header's, right again."""
    header = read_header(data)
    segment = header.segments[rng.integers(len(header.segments))]
    if not segment.length:
        return data
    body = bytearray(data[segment.offset : segment.offset + segment.length])
    if segment.kind != SIDE and rng.random() < 0.3:
        at = int(rng.integers(min(segment.length, 16)))  # the directory
    else:
        at = int(rng.integers(segment.length))
    body[at] ^= 1 << int(rng.integers(8))
    return replaced(data, header.segments.index(segment), bytes(body))


def replaced(data: bytes, index: int, body: bytes, *, kind: int | None = None) -> bytes:
    """Put another body, and kind, in the place of a segment, checksums and lengths right."""
    header = read_header(data)
    head = bytearray(data[: header.header_bytes])
    entry = header.header_bytes - SEGMENT_ENTRY * (len(header.segments) - index)
    head[entry : entry + 8] = xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    head[entry + 8 : entry + 12] = len(body).to_bytes(4, "little")
    if kind is not None:
        head[entry + 19] = kind
    head[16:24] = bytes(8)
    head[16:24] = xxhash.xxh3_64_intdigest(bytes(head)).to_bytes(8, "little")
    bodies = [data[one.offset : one.end] for one in header.segments]
    bodies[index] = body
    return bytes(head) + b"".join(one + bytes(-len(one) % 4) for one in bodies)
