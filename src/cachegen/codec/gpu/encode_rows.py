"""Encoding with ``int8`` and ``cachegen`` on a device: from the plan of matrices to segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import cachegen, int8
from cachegen.codec.base import payload_order, quantization_error
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE
from cachegen.codec.entropy import (
    TableMode,
    alphabet_size,
    checked_profile,
    digit_shift,
    stream_steps,
)
from cachegen.codec.gpu.batch import LANES
from cachegen.codec.gpu.collect import Collector, Results
from cachegen.codec.gpu.encode_batch import CodedSegment, EncodeBatch, Feed, columns
from cachegen.codec.header import SegmentBody
from cachegen.errors import ProfileError
from cachegen.native.cuda import encode_plan, plan
from cachegen.native.cuda.encode_plan import INVERSE_WORDS
from cachegen.types import Array


@dataclass
class _Matrix:
    """A matrix that is being encoded. coded: its rANS streams, None for bytes from the outset."""

    row: NDArray[Any]
    index: int
    coded: CodedSegment | None
    missing: np.uint64 | None = None
    kind: int = 0
    bits: int = 0
    at: int = 0
    size: int = 0
    low_at: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.row["tokens"][0]), int(self.row["channels"][0])

    def scales(self, results: Results, dtype: np.dtype[Any]) -> Array:
        """Return the scales that the device found, (rows, scales of a row)."""
        tokens, channels = self.shape
        width = channels // int(self.row["scale_width"][0])
        found = results.array(self.row["scales"][0], np.uint8, tokens * width * dtype.itemsize)
        return found.view(dtype).reshape(tokens, width)

    def models(self, results: Results) -> bytes:
        """Return the tables that go with the segment: classes and rotations, or frequencies."""
        channels = self.shape[1]
        if self.row["classes"][0]:
            names = "classes", "rotations"
            found = [results.array(self.row[name][0], np.uint8, channels) for name in names]
            return b"".join(part.tobytes() for part in found)
        if self.row["freqs"][0]:
            size = channels * int(self.row["alphabet"][0])
            return results.array(self.row["freqs"][0], "<u2", size).tobytes()
        return b""

    def fetch(
        self, what: int, collector: Collector, *, bits: int, first_bit: int = 0
    ) -> tuple[int, int]:
        """Ask for the matrix without entropy coding; returns offset and size."""
        count = self.shape[0] * self.shape[1]
        size = count if bits == 8 else bits * -(-count // 8)
        return collector.plain(what, self.index, size, pass_index=first_bit, bits=bits), size


def _matrix(
    batch: EncodeBatch, feed: Feed, shape: tuple[int, int], plane: int, **numbers: int
) -> tuple[NDArray[Any], int]:
    """Describe a matrix of symbols, (rows, channels); returns it and its index."""
    tokens, channels = shape
    row = np.zeros(1, encode_plan.SYMBOLS)
    row["tokens"], row["channels"], row["places"] = tokens, channels, -(-tokens // LANES)
    row["plane"], row["error"] = plane, batch.new_error(feed)
    for name, number in numbers.items():
        row[name] = number
    size = feed.header.geometry.dtype.size_bytes
    row["symbols"] = batch.job.work.reserve(tokens * channels)
    row["scales"] = batch.result(tokens * (channels // int(row["scale_width"][0])) * size)
    batch.symbols.append(row)
    return row, len(batch.symbols) - 1


def _use_parametric(batch: EncodeBatch, row: NDArray[Any], index: int) -> None:
    channels = int(row["channels"][0])
    row["classes"], row["rotations"] = batch.result(channels), batch.result(channels)
    row["inverses"], row["buckets"] = batch.inverses.parametric, 32
    batch.symbol_tiles.setdefault("fit_parametric", []).append(columns(index, channels))


def _use_models(batch: EncodeBatch, row: NDArray[Any], freqs: np.uint64, alphabet: int) -> None:
    """Have inverse tables built of a model for each channel."""
    channels = int(row["channels"][0])
    buckets = 16 if alphabet <= 16 else 32
    entry = np.zeros(1, plan.MODELS)
    entry["freqs"] = freqs
    entry["buckets"] = batch.job.work.reserve(4 * INVERSE_WORDS * buckets * channels)
    entry["count"], entry["alphabet"], entry["kind"] = channels, alphabet, buckets
    entry["error"] = row["error"]
    row["inverses"], row["buckets"], row["alphabet"] = entry["buckets"], buckets, alphabet
    batch.inverse_models.append(entry)


class Int8Encoding:
    """One chunk on its way to an ``int8`` object."""

    def __init__(self, batch: EncodeBatch, feed: Feed, codec: int8.Int8Codec) -> None:
        self.feed, self.codec = feed, codec
        geometry = feed.header.geometry
        self.matrices = []
        for group in range(2 * geometry.layers):
            dim = geometry.plane_dim(is_value=group % 2 == 1)
            begin, end = feed.header.ranges[group // 2]
            shape = end - begin, geometry.kv_heads * dim
            plane = batch.add_planes([batch.plane(feed, group // 2, is_value=group % 2 == 1)])
            shift = int8.LOW_BITS if codec.entropy else 0
            row, index = _matrix(
                batch, feed, shape, plane, levels=int8.LEVELS, scale_width=dim, shift=shift
            )
            coded = None
            if codec.entropy:
                _use_parametric(batch, row, index)
                steps = stream_steps(shape[1])
                coded = batch.add_streams(shape, steps, index, 0, kind="bytes")
                batch.symbol_runs.append(coded.runs)
            self.matrices.append(_Matrix(row, index, coded))

    def choose(self, results: Results, collector: Collector) -> None:
        """Read what the device found, and ask for the bytes of segments."""
        self.results = results
        for matrix in self.matrices:
            if matrix.coded is None:
                matrix.kind = BYTES
                matrix.at, matrix.size = matrix.fetch(encode_plan.SYMBOL_BYTES, collector, bits=8)
                continue
            size = results.measure(matrix.coded)
            count = matrix.shape[0] * matrix.shape[1]
            side, low = len(matrix.models(results)), encode_plan.ROTATED_PLANES
            if size + side >= int8.HIGH_BITS * -(-count // 8):
                matrix.kind, matrix.bits, low = PACKED, int8.HIGH_BITS, encode_plan.SYMBOL_PLANES
                matrix.at, matrix.size = matrix.fetch(
                    low, collector, first_bit=int8.LOW_BITS, bits=int8.HIGH_BITS
                )
            else:
                matrix.kind, matrix.size = RANS, size
                matrix.at = collector.coded(matrix.coded, results)
            matrix.low_at, _ = matrix.fetch(low, collector, bits=int8.LOW_BITS)

    def write(self, collector: Collector) -> dict[str, Any]:
        """Return what ``write_object`` needs."""
        dtype = self.feed.header.geometry.dtype.numpy
        coarse: list[SegmentBody] = []
        fine: list[SegmentBody] = []
        for group, matrix in enumerate(self.matrices):
            scales = matrix.scales(self.results, dtype)
            width = int(matrix.row["scale_width"][0])
            error = quantization_error(scales, int8.LEVELS, width)
            body, side = collector.bytes(matrix.at, matrix.size), scales.tobytes()
            coarse_error = error * 4**int8.LOW_BITS if self.codec.entropy else error
            if matrix.kind == RANS:
                side += matrix.models(self.results)
            coarse.append(SegmentBody(group, 0, SIDE, side, coarse_error))
            coarse.append(SegmentBody(group, 0, matrix.kind, body, coarse_error, matrix.bits))
            if self.codec.entropy:
                count = matrix.shape[0] * matrix.shape[1]
                low = collector.bytes(matrix.low_at, int8.LOW_BITS * -(-count // 8))
                fine.append(SegmentBody(group, 1, PACKED, low, error, int8.LOW_BITS))
        return {
            "codec_id": self.codec.codec_id,
            "passes": 1 + self.codec.entropy,
            "params": int8.pack_params(entropy=self.codec.entropy),
            "segments": payload_order([coarse, fine]),
        }


class CacheGenEncoding:
    """One chunk on its way to a ``cachegen`` object."""

    def __init__(self, batch: EncodeBatch, feed: Feed, codec: cachegen.CacheGenCodec) -> None:
        self.feed, self.codec = feed, codec
        self.mode = TableMode[codec.tables.upper()]
        if self.mode is TableMode.PROFILE and codec.profile is None:
            raise ProfileError("profile", got=None, expected="a profile for tables='profile'")
        geometry = feed.header.geometry
        self.bins = codec.plane_bins(geometry.layers)
        self.passes: list[list[_Matrix]] = [[] for _ in range(1 + (codec.delta == "anchor"))]
        for group in range(2 * geometry.layers):
            dim = geometry.plane_dim(is_value=group % 2 == 1)
            channels = geometry.kv_heads * dim
            begin, end = feed.header.ranges[group // 2]
            tokens = end - begin
            plane = batch.add_planes([batch.plane(feed, group // 2, is_value=group % 2 == 1)])
            if codec.delta != "anchor":
                levels = self.bins[group] // 2 - 1
                shape = tokens, channels
                self.passes[0].append(self._add(batch, group, 0, shape, plane, levels=levels))
                continue
            count = -(-tokens // cachegen.ANCHOR_TOKENS)
            memory = batch.job.work.reserve(count * channels * geometry.dtype.size_bytes)
            levels = cachegen.delta_levels(self.bins[group], group // 2, geometry.layers)
            length = cachegen.ANCHOR_TOKENS
            for index, rows in enumerate((count, tokens - count)):
                matrix = self._add(
                    batch,
                    group,
                    index,
                    (rows, channels),
                    plane,
                    levels=levels if index else cachegen.ANCHOR_LEVELS,
                    anchor_tokens=length,
                    is_delta=index,
                )
                matrix.row["anchors"] = memory
                if index:
                    matrix.missing = batch.result(8 * rows)
                    matrix.row["missing"] = matrix.missing
                    batch.deltas.append(matrix.index)
                self.passes[index].append(matrix)

    def _add(
        self,
        batch: EncodeBatch,
        group: int,
        index: int,
        shape: tuple[int, int],
        plane: int,
        **numbers: int,
    ) -> _Matrix:
        levels = numbers["levels"]
        shift = digit_shift(levels)
        row, number = _matrix(
            batch, self.feed, shape, plane, scale_width=shape[1], shift=shift, raw=shift, **numbers
        )
        if not shape[0] * shape[1]:
            return _Matrix(row, number, None)
        size = alphabet_size(levels)
        if self.mode is TableMode.PARAMETRIC:
            _use_parametric(batch, row, number)
        elif self.mode is TableMode.CHUNK:
            row["freqs"] = batch.result(2 * shape[1] * size)
            batch.symbol_tiles.setdefault("fit_frequencies", []).append(columns(number, shape[1]))
            _use_models(batch, row, row["freqs"][0], size)
        else:
            freqs = cachegen.profile_freqs(self.codec.profile, group, index)
            found = checked_profile(freqs, shape[1], levels)
            _use_models(batch, row, batch.job.upload.add(found.astype("<u2")), size)
        coded = batch.add_streams(
            shape, stream_steps(shape[1]), number, index, kind="bytes", raw=shift
        )
        batch.symbol_runs.append(coded.runs)
        return _Matrix(row, number, coded)

    def choose(self, results: Results, collector: Collector) -> None:
        """Read what the device found, and ask for the bytes of segments."""
        self.results = results
        for matrix in (matrix for matrices in self.passes for matrix in matrices):
            matrix.kind = BYTES
            if matrix.coded is None:
                continue
            count = matrix.shape[0] * matrix.shape[1]
            size = results.measure(matrix.coded)
            if size + len(matrix.models(results)) >= count:
                matrix.at, matrix.size = matrix.fetch(encode_plan.SYMBOL_BYTES, collector, bits=8)
            else:
                matrix.kind, matrix.size = RANS, size
                matrix.at = collector.coded(matrix.coded, results)

    def write(self, collector: Collector) -> dict[str, Any]:
        """Return what ``write_object`` needs."""
        dtype = self.feed.header.geometry.dtype.numpy
        segments: list[list[SegmentBody]] = [[] for _ in self.passes]
        for group in range(len(self.passes[0])):
            matrices = [matrices[group] for matrices in self.passes]
            scales = [matrix.scales(self.results, dtype) for matrix in matrices]
            errors = [
                quantization_error(found, int(matrix.row["levels"][0]), matrix.shape[1])
                for matrix, found in zip(matrices, scales, strict=True)
            ]
            if matrices[-1].missing is not None:
                rows = matrices[-1].shape[0]
                missing = self.results.array(matrices[-1].missing, "<f8", rows)
                errors = [errors[0] + float(np.sum(missing)), errors[0] + errors[1]]
            for index, matrix in enumerate(matrices):
                side = scales[index].tobytes()
                if matrix.kind == RANS:
                    side += matrix.models(self.results)
                body = collector.bytes(matrix.at, matrix.size)
                segments[index] += [
                    SegmentBody(group, index, SIDE, side, errors[index]),
                    SegmentBody(group, index, matrix.kind, body, errors[index]),
                ]
        profile = self.codec.profile
        return {
            "codec_id": self.codec.codec_id,
            "passes": len(self.passes),
            "params": cachegen.pack_params(self.mode, self.codec.delta, self.bins),
            "segments": payload_order(segments),
            "profile": profile.digest if self.mode is TableMode.PROFILE and profile else None,
        }
