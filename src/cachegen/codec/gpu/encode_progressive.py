"""Encoding with ``progressive`` on a device: from the plan of its groups to segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec import ladder, passes, sparse
from cachegen.codec.basis import ModelBasis, load_basis, plain_basis, planes_of_group
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE, SPARSE
from cachegen.codec.gpu.collect import Collector, Results
from cachegen.codec.gpu.encode_basis import EncodeBasis, encode_basis
from cachegen.codec.gpu.encode_batch import CodedSegment, EncodeBatch, Feed, columns
from cachegen.codec.header import SegmentBody, plane_groups
from cachegen.codec.magnitude import has_plain_squares
from cachegen.codec.progressive import ProgressiveCodec, pack_params
from cachegen.codec.side import GroupSide
from cachegen.native.cuda import encode_plan, plan


@dataclass
class _Group:
    """A group that is being encoded: its source, and where what the host needs will lie."""

    index: int
    row: NDArray[Any]
    coded: list[CodedSegment]


class ProgressiveEncoding:
    """One chunk on its way to a ``progressive`` object."""

    def __init__(self, batch: EncodeBatch, feed: Feed, codec: ProgressiveCodec) -> None:
        self.feed = feed
        self.codec = codec
        geometry = feed.header.geometry
        self.profile = codec.profile if feed.shadow.is_uniform else None
        self.basis: ModelBasis = plain_basis(feed.shadow)
        held: EncodeBasis | None = None
        if self.profile is not None:
            codec.check_rope(feed.shadow)
            self.basis = load_basis(self.profile, geometry)
            held = encode_basis(batch.device, self.profile, geometry, batch.stream)
        self.passes, relative = codec.ladder_of(self.basis)
        self.chunk = len(batch.chunks)
        self.first = len(batch.sources)
        state = np.zeros(1, encode_plan.CHUNK_STATE)
        state["relative"], state["values"] = relative, feed.shadow.value_count
        state["first_group"], state["groups"] = self.first, len(self.basis.groups)
        batch.chunks.append(state)
        self.groups = [
            _plan_group(batch, self, index, held) for index in range(len(self.basis.groups))
        ]

    def has_plain_squares(self, results: Results) -> bool:
        """Read step and spread. Returns whether squares of this chunk were within float32."""
        state = results.structs(results.batch.chunk_states, encode_plan.CHUNK_STATE, self.chunk + 1)
        self.step = float(state["step"][self.chunk])
        self.spread = float(state["spread"][self.chunk])
        return self.profile is not None or has_plain_squares(self.spread)

    def choose(self, results: Results, collector: Collector) -> None:
        """Ask for the bytes of segments, after ``has_plain_squares``."""
        self.chosen = [self._choose_group(group, results, collector) for group in self.groups]

    def _choose_group(self, group: _Group, results: Results, collector: Collector) -> _Chosen:
        row = group.row
        tokens, channels = int(row["tokens"][0]), int(row["channels"][0])
        found = results.structs(row["result"][0], encode_plan.GROUP_RESULT, 1)[0]
        marks = results.array(row["marks"][0], np.uint8, tokens)
        exempt = np.flatnonzero(marks & encode_plan.EXEMPT)
        chosen = _Chosen(
            found,
            exempt,
            results.array(row["levels"][0], np.int8, channels),
            results.array(row["classes"][0], np.uint8, channels),
            [],
            None,
        )
        owner = self.first + group.index
        if len(exempt):
            size = len(exempt) * channels * self.feed.header.geometry.dtype.size_bytes
            rows = exempt.astype("<u4")
            chosen.exempt_at = collector.plain(encode_plan.EXACT_ROWS, owner, size, tokens=rows)
        count = tokens * channels
        nonzero = int(found["nonzero"])
        for index, coded in enumerate(group.coded):
            if index == 0 and sparse.SHARE * nonzero <= count:
                size = plan.PAIR_BYTES * nonzero
                at = collector.copy(row["pairs"][0], size, results)
                chosen.segments.append((SPARSE, 0, at, size))
                continue
            size = results.measure(coded)
            packed = passes.DIGIT_BITS * (-(-count // 8))
            if index == 0 and size >= count:
                at = collector.plain(encode_plan.COARSE_BYTES, owner, count, bits=8)
                chosen.segments.append((BYTES, 0, at, count))
            elif index and size >= count // 4 and packed <= size:
                at = collector.plain(
                    encode_plan.DIGIT_PLANES,
                    owner,
                    packed,
                    pass_index=index,
                    bits=passes.DIGIT_BITS,
                )
                chosen.segments.append((PACKED, passes.DIGIT_BITS, at, packed))
            else:
                chosen.segments.append((RANS, 0, collector.coded(coded, results), size))
        return chosen

    def write(self, collector: Collector) -> dict[str, Any]:
        """Return what ``write_object`` needs."""
        weights = self.basis.error_weights()
        segments: list[SegmentBody] = []
        for group, chosen, weight in zip(self.groups, self.chosen, weights, strict=True):
            segments += self._segments(group, chosen, weight, collector)
        groups = self.basis.groups
        return {
            "codec_id": self.codec.codec_id,
            "passes": self.passes,
            "params": pack_params(self.step, self.basis.value_weight, self.spread),
            "segments": passes.order(segments),
            "groups": None if groups == plane_groups(self.feed.header.geometry.layers) else groups,
            "rope": self.feed.shadow.rope,
            "profile": self.profile.digest if self.profile else None,
        }

    def _segments(
        self, group: _Group, chosen: _Chosen, weight: float, collector: Collector
    ) -> list[SegmentBody]:
        found, dtype = chosen.found, self.feed.header.geometry.dtype.numpy
        channels = int(group.row["channels"][0])
        exempt: NDArray[Any] = np.zeros((0, channels), dtype)
        if chosen.exempt_at is not None:
            size = len(chosen.exempt) * channels * dtype.itemsize
            taken = np.frombuffer(collector.bytes(chosen.exempt_at, size), dtype)
            exempt = taken.reshape(len(chosen.exempt), channels)
        # As on the CPU: relative errors of all passes count the same.
        errors = found["errors"][:, : self.passes]
        best = int(np.log(np.maximum(errors, 1e-30)).sum(axis=1).argmin())
        distortions = (errors[best] * (self.step * self.step * weight)).tolist()
        side = GroupSide(
            chosen.exempt,
            exempt,
            np.zeros(0, np.float32),
            chosen.levels,
            float(found["mean_scale"]),
            chosen.classes,
            int(found["offset"]),
            passes.DECAYS[best],
        )
        body = side.to_bytes(plain=self.profile is None)
        segments = [SegmentBody(group.index, 0, SIDE, body, distortions[0])]
        for j, (kind, bits, at, size) in enumerate(chosen.segments):
            body = collector.bytes(at, size)
            if kind == SPARSE:
                body = _sparse_body(body, int(group.row["tokens"][0]), channels)
            segments.append(SegmentBody(group.index, j, kind, body, distortions[j], bits))
        return segments


def _sparse_body(listed: bytes, tokens: int, channels: int) -> bytes:
    """Return the body of a sparse segment of pairs in any order."""
    pairs = np.frombuffer(listed, "<u4").reshape(-1, 2)
    return native.write_sparse(pairs[np.argsort(pairs[:, 0])], tokens, channels)


@dataclass
class _Chosen:
    """What the device found for a group. segments: kind, bits, offset and size of each pass.

    Of a sparse pass offset and size are those of its pairs.
    """

    found: Any
    exempt: NDArray[np.int64]
    levels: NDArray[np.int8]
    classes: NDArray[np.uint8]
    segments: list[tuple[int, int, int, int]]
    exempt_at: int | None


def _plan_group(
    batch: EncodeBatch, encoding: ProgressiveEncoding, index: int, held: EncodeBasis | None
) -> _Group:
    feed, codec = encoding.feed, encoding.codec
    header, group = feed.header, encoding.basis.groups[index]
    begin, end = header.ranges[group.layer]
    tokens, owner = end - begin, len(batch.sources)
    planes, channels = [], 0
    for layer, is_value in planes_of_group(group):
        weight = encoding.basis.value_weight if is_value else 1.0
        planes.append(
            batch.plane(feed, layer, is_value=is_value, divisor=weight, first_channel=channels)
        )
        channels += header.geometry.kv_heads * header.geometry.plane_dim(is_value=is_value)
    row = np.zeros(1, encode_plan.SOURCE)
    work, stride = batch.job.work, -(-channels // 8) * 8
    first = batch.add_planes(planes)
    batch.source_planes += [(first + i, owner) for i in range(len(planes))]
    row["plane"], row["planes"] = first, len(planes)
    row["values"] = work.reserve(4 * tokens * stride, 32)
    for name in ("centres", "sums", "means"):
        row[name] = work.reserve(4 * channels)
    row["norms"], row["largest"] = work.reserve(8 * tokens), work.reserve(4 * tokens)
    bins = ladder.CLASSES * encode_plan.histogram_bins(encoding.passes)
    row["histogram"] = work.reserve(4 * bins)
    tiles = columns(owner, channels)
    row["partials"] = work.reserve(8 * encode_plan.PARTIALS * len(tiles))
    row["marks"], row["levels"] = batch.result(tokens), batch.result(channels)
    row["classes"] = batch.result(channels)
    row["pairs"] = work.reserve(plan.PAIR_BYTES * (tokens * channels // sparse.SHARE))
    row["result"] = batch.result(encode_plan.GROUP_RESULT.itemsize)
    row["tokens"], row["channels"], row["stride"] = tokens, channels, stride
    row["passes"], row["chunk"] = encoding.passes, encoding.chunk
    sinks = max(0, codec.sink_tokens - header.first_position)
    row["sinks"] = min(max(0, sinks - begin), tokens)
    row["error"], row["tiles"] = batch.new_error(feed), len(tiles)
    if held is not None:
        held.describe(row, index)
        row["halves"] = work.reserve(4 * tokens * stride)
        batch.add_forward(owner, row)
    batch.tiles.append(tiles)
    batch.sources.append(row)
    coded = [
        batch.add_streams(
            (tokens, channels),
            passes.STREAM_STEPS,
            owner,
            j,
            kind="digits" if j else "bytes",
        )
        for j in range(encoding.passes)
    ]
    batch.runs += [one.runs for one in coded]
    return _Group(index, row, coded)
