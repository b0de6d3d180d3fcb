"""What restart points and sparse first passes of ``progressive`` cost in bytes.

    python benchmarks/stream_lengths.py --json benchmarks/results/stream_lengths.json

One encoding for each length of streams: shorter ones are decoded by more threads and warps; each
stores the states of 32 lanes. And the first passes of the same objects, each as places if so few
of its symbols are not 0, else entropy-coded. The reference model's KV is that of held-out text,
wide planes are drawn as in ``benchmarks/gpu.py``, a whole model as in ``cachegen bench speed``.
Wide groups of a profile are those of four contexts of the reference model side by side, as heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_bench.kv import draw_chunk
from numpy.typing import NDArray
from rich.console import Console

from cachegen import native
from cachegen.bench.calibrate import captured_contexts
from cachegen.bench.report import environment, format_cell, write_json
from cachegen.bench.speed_data import geometry_of, synthetic_chunk
from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import ladder, passes
from cachegen.codec.basis import load_basis
from cachegen.codec.container import RANS, SIDE, read_header
from cachegen.codec.header import padded
from cachegen.codec.levels import NAMED, prefix_bytes
from cachegen.codec.progressive import ProgressiveCodec, unpack_params
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference import profile_classes
from cachegen.codec.side import GroupSide
from cachegen.codec.sparse import write_sparse
from cachegen.hf.load import begin_and_text, load_model
from cachegen.profile import Profile
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[1] / "models/reference"
STEPS = (512, 1024, 2048, 4096, 8192, 16384)
# A first pass is sparse if at most one symbol of so many is not 0; 0: never.
SHARES = (0, 128, 256, 384)
CHUNK_TOKENS = 256
# Layers, KV heads, head dimension: planes as wide as a served model's, few of them.
WIDE = {"llama-3.1-8b, 2 layers": (2, 8, 128), "qwen2.5-0.5b, 4 layers": (4, 2, 64)}
WHOLE = "llama-3.1-8b"
COLUMNS = (
    ("kv", ""),
    ("profile", ""),
    ("quality", ""),
    ("stream_steps", "d"),
    ("billed_bits_per_value", ".4f"),
    ("bytes_over_4096", "+.4f"),
)


def chunks_of_reference(tokens: int) -> list[KVChunk]:
    """Capture held-out text in chunks of 256 tokens, bfloat16."""
    model, tokenizer = load_model(str(MODEL))
    text = (MODEL / "eval_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    captured = captured_contexts(model, ids, tokens=tokens, context=1024, begin=begin)
    return [part for kv in captured for part in kv.astype(KVDtype.BFLOAT16).split(CHUNK_TOKENS)]


def side_by_side(chunks: Sequence[KVChunk]) -> KVChunk:
    """Join chunks of several contexts, at the same place of each, as heads of one."""
    layers = []
    for parts in zip(*(chunk.layers for chunk in chunks), strict=True):
        keys, values = ([part.plane(is_value=side) for part in parts] for side in (False, True))
        layers.append(LayerKV(np.concatenate(keys, axis=1), np.concatenate(values, axis=1)))
    return KVChunk.from_layers(layers, first_position=chunks[0].first_position, rope=chunks[0].rope)


def widened(profile: Profile, count: int) -> Profile:
    """Return the profile of so many contexts side by side: each keeps its own components."""
    layers, heads, *dims = profile.meta["geometry"]
    arrays = {
        name: np.concatenate([array] * count, axis=1)
        for name, array in profile.arrays.items()
        if name.startswith("metric.")
    }
    for index, (_, joined, planes) in enumerate(profile.meta["groups"]):
        widths = [heads * dim for side, dim in enumerate(dims) if planes >> side & 1] * joined
        # Channels of a context lie beside those of the others, plane by plane.
        place = np.concatenate([np.full(width, i) for i, width in enumerate(widths)])
        order = np.argsort(np.tile(place, count), kind="stable")
        for name in ("mean", "deviation", "families", "scale"):
            array = np.tile(profile.arrays[f"group{index}.{name}"], count)
            arrays[f"group{index}.{name}"] = array[order] if name == "mean" else array
        basis = np.kron(np.eye(count, dtype=np.int8), profile.arrays[f"group{index}.basis"])
        arrays[f"group{index}.basis"] = basis[order]
    meta = {**profile.meta, "geometry": [layers, heads * count, *dims]}
    return Profile(profile.model_name, arrays, meta)


def groups_of(
    reader: ObjectReader, profile: Profile | None
) -> Iterator[tuple[ladder.Ladder, NDArray[np.uint8]]]:
    """Yield digits and classes of every group."""
    header = reader.header
    step = unpack_params(header)[0]
    bases = load_basis(profile, header.geometry).bases if profile else None
    for index in range(len(header.groups)):
        shape = ProgressiveCodec.coded_shape(header, index, 0)[:2]
        data = reader.side(index, 0)
        side = GroupSide.from_bytes(data, *shape, header.geometry.dtype, plain=bases is None)
        classes = side.classes
        if bases is not None and bases[index] is not None:
            classes = profile_classes(bases[index], step, side.class_offset)
        yield passes.read(reader, index, shape, classes), classes


def coarse_symbols(digits: ladder.Ladder) -> NDArray[np.uint8]:
    """Return the symbols of pass 0."""
    value = digits.coarse.astype(np.int64)
    return (2 * np.abs(value) - (value < 0)).astype(np.uint8)


def segment_sizes(reader: ObjectReader, profile: Profile | None) -> list[list[int]]:
    """Return the size of every segment in payload order, for each length of streams."""
    header = reader.header
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, (digits, classes) in enumerate(groups_of(reader, profile)):
        family, scale = (part.astype(np.int64) for part in np.divmod(classes, ladder.CLASSES))
        for j in range(header.passes):
            rows = family * ladder.ROWS + ladder.row_of(scale, header.passes - 1 - j)
            if j == 0:
                symbols = coarse_symbols(digits)
                model = rows.astype(np.uint16), passes.coarse_tables()
                contexts = None
            else:
                symbols = digits.digits[j - 1]
                model = (2 * rows).astype(np.uint16), passes.refine_tables()
                contexts = ladder.contexts(digits, j)
            sizes[index, j] = [
                len(native.encode_segment(symbols, *model, contexts=contexts, stream_steps=steps))
                for steps in STEPS
            ]
    return [
        sizes[segment.group, segment.pass_index]
        if segment.kind == RANS
        else [segment.length] * len(STEPS)
        for segment in header.segments
    ]


def measure(name: str, chunks: list[KVChunk], profile: Profile | None) -> list[dict[str, Any]]:
    """Encode the digits of the same objects at every length of streams."""
    codec = ProgressiveCodec(profile=profile)
    values = sum(chunk.value_count for chunk in chunks)
    sizes = {(quality, steps): 0 for quality in ("whole", *NAMED) for steps in STEPS}
    for chunk in chunks:
        data = codec.encode(chunk)
        header = read_header(data)
        found = segment_sizes(ObjectReader(data), profile)
        for quality in ("whole", *NAMED):
            end = len(data) if quality == "whole" else prefix_bytes(header, quality)
            kept = [segment.offset < end for segment in header.segments]
            for index, steps in enumerate(STEPS):
                lengths = [row[index] for row, keep in zip(found, kept, strict=True) if keep]
                total = header.header_bytes + sum(map(padded, lengths))
                assert steps != passes.STREAM_STEPS or total - end in range(4)
                sizes[quality, steps] += total
    return [
        {
            "kv": name,
            "profile": profile is not None,
            "quality": quality,
            "stream_steps": steps,
            "chunks": len(chunks),
            "billed_bits_per_value": 8 * size / values,
            "bytes_over_4096": size / sizes[quality, 4096] - 1,
        }
        for (quality, steps), size in sizes.items()
    ]


def first_passes(name: str, chunks: list[KVChunk], profile: Profile | None) -> list[dict[str, Any]]:
    """Code the first passes of objects, sparse ones by each share of symbols that are not 0."""
    codec = ProgressiveCodec(profile=profile)
    totals, sparse, others, groups = dict.fromkeys(SHARES, 0), dict.fromkeys(SHARES, 0), 0, 0
    for chunk in chunks:
        data = codec.encode(chunk)
        header = read_header(data)
        end = prefix_bytes(header, "balanced")
        first = [s for s in header.segments if s.pass_index == 0 and s.kind != SIDE]
        others += end - sum(padded(segment.length) for segment in first)
        for digits, classes in groups_of(ObjectReader(data), profile):
            groups += 1
            symbols = coarse_symbols(digits)
            family, scale = (part.astype(np.int64) for part in np.divmod(classes, ladder.CLASSES))
            rows = (family * ladder.ROWS + ladder.row_of(scale, header.passes - 1)).astype(
                np.uint16
            )
            coded = native.encode_segment(
                symbols, rows, passes.coarse_tables(), stream_steps=passes.STREAM_STEPS
            )
            places = write_sparse(symbols)
            for share in SHARES:
                is_sparse = share > 0 and share * np.count_nonzero(symbols) <= symbols.size
                totals[share] += padded(len(places if is_sparse else coded))
                sparse[share] += is_sparse
    values = sum(chunk.value_count for chunk in chunks)
    return [
        {
            "kv": name,
            "profile": profile is not None,
            "share": share,
            "chunks": len(chunks),
            "sparse_groups": float(sparse[share] / groups),
            "first_pass_bytes": totals[share] / len(chunks),
            "balanced_bits_per_value": 8 * (others + totals[share]) / values,
        }
        for share in SHARES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    reference = chunks_of_reference(options.tokens)
    profile = Profile.load(MODEL / "cachegen.profile")
    # Four chunks of each context, one context after the other.
    contexts = [reference[begin : begin + 4] for begin in range(0, len(reference), 4)]
    wide = [side_by_side(chunks) for chunks in zip(*contexts, strict=True)]
    cases = [
        ("reference", reference, None),
        ("reference", reference, profile),
        ("reference, contexts side by side", wide, widened(profile, len(contexts))),
        *((name, [draw_chunk(shape, CHUNK_TOKENS, seed=1)], None) for name, shape in WIDE.items()),
    ]
    rows = [row for case in cases for row in measure(*case)]
    # Which first passes are sparse differs from plane to plane: that takes a whole model.
    whole = (WHOLE, [synthetic_chunk(geometry_of(WHOLE), tokens=CHUNK_TOKENS)], None)
    first = [row for case in (*cases[:3], whole) for row in first_passes(*case)]
    console = Console(width=120)
    for row in sorted(rows, key=lambda row: (row["kv"], row["profile"], row["quality"])):
        line = "  ".join(f"{name} {format_cell(row[name], form)}" for name, form in COLUMNS)
        console.print(line, soft_wrap=True)
    for row in first:
        console.print(row, soft_wrap=True)
    if options.json:
        write_json(options.json, {"rows": rows, "first_passes": first, **environment()})


if __name__ == "__main__":
    main()
