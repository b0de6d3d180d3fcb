"""What the plan of an encoding shares between codecs: planes, rooms of streams, results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec.gpu.batch import LANES, TRANSFORM_BYTES, WARPS, Batch
from cachegen.codec.gpu.encode_tables import EncodeTables
from cachegen.codec.gpu.frozen import frozen_tables
from cachegen.codec.gpu.progressive import TILE_CHANNELS, TILE_TOKENS
from cachegen.codec.gpu.target import Target
from cachegen.codec.header import Header
from cachegen.native.cuda import encode_plan, plan
from cachegen.native.cuda.device import Device

# Room for what a stream becomes, in 16-bit words and bytes, for each symbol: more than a segment
# may take without being stored in another way, unless its streams are very unlike each other.
ROOM = {"bytes": (1 / 2, 1 / 4), "digits": (3 / 16, 0.0)}
SPARE = 128
MAX_WARPS = 4096
# Shared memory: inverse tables of eight steps, and counters of 32 channels, for each warp.
TABLE_BYTES = WARPS * 8 * encode_plan.INVERSE_WORDS * 32 * 4
COUNTER_BYTES = WARPS * 48 * LANES * 4


@dataclass
class Feed:
    """A chunk to be encoded: where its values lie. Looks to a ``Batch`` like an object's item.

    shadow: the chunk's shape without memory behind it. header: likewise, with the RoPE that undoes
    the chunk's. mapping: address of one int64 slot per token, or 0 for rows in order.
    """

    shadow: KVChunk
    header: Header
    target: Target
    mapping: np.uint64
    errors: list[int] = field(default_factory=list)


@dataclass
class CodedSegment:
    """A segment that is coded on the device, and what its streams became.

    runs: its streams (RUN). spacing: steps of a stream. raw: raw words of a step.
    counts: where the words and escapes of its streams are counted.
    """

    runs: NDArray[Any]
    spacing: int
    raw: int
    counts: np.uint64


class EncodeBatch(Batch):
    """Structs of the kernels that encode chunks, collected chunk by chunk."""

    def __init__(self, device: Device, tables: EncodeTables, stream: Any) -> None:
        super().__init__(device, frozen_tables(device, stream), stream)
        self.inverses = tables
        self.chunks: list[NDArray[Any]] = []
        self.sources: list[NDArray[Any]] = []
        self.source_planes: list[tuple[int, int]] = []  # plane, source
        self.tiles: list[NDArray[Any]] = []
        self.runs: list[NDArray[Any]] = []
        self.forward_tiles: list[NDArray[Any]] = []
        self.symbols: list[NDArray[Any]] = []
        self.symbol_runs: list[NDArray[Any]] = []
        self.symbol_tiles: dict[str, list[NDArray[Any]]] = {}  # by the kernel that fits models
        self.deltas: list[int] = []  # matrices that need the anchors of others
        self.inverse_models: list[NDArray[Any]] = []
        self.chunk_states = np.uint64(0)
        self.error_words = np.uint64(0)
        self.record = np.zeros(1, plan.LAUNCH)

    def result(self, size_bytes: int) -> np.uint64:
        """Reserve bytes that the host asks for afterwards."""
        return self.job.results.reserve(size_bytes)

    def add_streams(
        self,
        shape: tuple[int, int],
        spacing: int,
        owner: int,
        index: int,
        *,
        kind: str,
        raw: int = 0,
    ) -> CodedSegment:
        """Give the streams of a segment room.

        shape: tokens and channels. spacing: steps of a stream. owner: index of the source or
        matrix. index: pass. kind: of ``ROOM``. raw: low digits that go into the streams.
        """
        tokens, channels = shape
        places = -(-tokens // LANES)
        steps = places * channels
        begin = np.arange(0, steps, spacing)
        runs = np.zeros(len(begin), encode_plan.RUN)
        runs["begin_step"] = begin
        runs["end_step"] = np.minimum(begin + spacing, steps)
        runs["lanes"] = -(-(tokens - begin // channels) // places)
        runs["owner"], runs["pass"] = owner, index
        symbols = (runs["end_step"] - runs["begin_step"]).astype(np.int64) * LANES
        for name, share, unit in zip(("word", "escape"), ROOM[kind], (2, 1), strict=True):
            room = (symbols * share).astype(np.int64) + (SPARE if share else 0)
            room += -room % (4 // unit)
            runs[f"{name}_room"] = room
            ends = np.cumsum(room * unit)
            base = self.job.work.reserve(int(ends[-1]))
            runs[f"{name}s"] = base + (ends - room * unit).astype(np.uint64)
        number = np.arange(len(begin), dtype=np.uint64)
        runs["states"] = self.job.work.reserve(4 * LANES * len(begin)) + 4 * LANES * number
        raw_bytes = 4 * raw * spacing
        runs["raw"] = self.job.work.reserve(raw_bytes * len(begin)) + np.uint64(raw_bytes) * number
        counts = self.result(8 * len(begin))
        runs["counts"] = counts + np.uint64(8) * number
        return CodedSegment(runs, spacing, raw, counts)

    def add_forward(self, owner: int, row: NDArray[Any]) -> None:
        """Have a source's rows transformed to components."""
        tokens, channels = int(row["tokens"][0]), int(row["channels"][0])
        begins = np.arange(0, channels, TILE_CHANNELS)
        for token in range(0, tokens, TILE_TOKENS):
            part = np.zeros(len(begins), plan.TILE)
            part["group"], part["first_token"], part["first_channel"] = owner, token, begins
            part["width"] = np.minimum(TILE_CHANNELS, channels - begins)
            self.forward_tiles.append(part)

    def plan_launches(self) -> tuple[np.uint64, int]:
        """Add all launches. Returns: address of the bytes to zero before, their number."""
        job = self.job
        self.error_words = self.result(4 * self.errors)
        self.chunk_states = self.result(encode_plan.CHUNK_STATE.itemsize * len(self.chunks))
        record = self.record
        record["errors"] = self.error_words
        record["coarse_escapes"] = self.inverses.escapes
        record["planes"] = job.structs(plan.PLANE, self._planes) if self._planes else 0
        record["groups"] = job.structs(encode_plan.SOURCE, self.sources) if self.sources else 0
        record["matrices"] = job.structs(encode_plan.SYMBOLS, self.symbols) if self.symbols else 0
        self._prepare(record)
        if self.sources:
            self._launch_sources(record)
        if self.symbols:
            self._launch_symbols(record)
        return np.uint64(plan.ALIGNMENT) | plan.RESULTS, job.results.size_bytes - plan.ALIGNMENT

    def _launch_sources(self, record: NDArray[Any]) -> None:
        job, groups = self.job, len(self.sources)
        record["active"] = self.chunk_states
        tiles = np.concatenate(self.tiles)
        columns = record.copy()
        columns["items"] = job.structs(encode_plan.COLUMNS, tiles)
        columns["count"] = len(tiles)
        warps = -(-len(tiles) // WARPS)
        each = record.copy()
        each["count"], each["extra"] = groups, 1
        passes = int(self.sources[0]["passes"][0])
        owners = np.array([source for _, source in self.source_planes], "<u4")
        load = record.copy()
        load["items"] = job.upload.add(owners)
        load["extra"] = share = 64
        job.launch("load_values", share * len(owners), load)
        if self.forward_tiles:
            self._launch_forward(record)
        tokens = each.copy()
        longest = max(int(source["tokens"][0]) for source in self.sources)
        per_group = -(-groups // WARPS)
        if self.forward_tiles:
            tokens["extra"] = share = max(1, min(longest, MAX_WARPS // groups))
            job.launch("column_medians", warps, columns)
            job.launch("row_norms", -(-groups * share // WARPS), tokens)
            job.launch("find_odd", per_group, each)
            job.launch("sum_squares", warps, columns)
        else:
            tokens["extra"] = share = -(-longest // LANES)
            for _ in range(encode_plan.ROUNDS):
                job.launch("survey_columns", warps, columns)
                job.launch("survey_tokens", -(-groups * share // WARPS), tokens)
                job.launch("find_outliers", per_group, each)
        job.launch("set_means", per_group, each)
        chunks = record.copy()
        chunks["count"] = len(self.chunks)
        chunks["items"] = job.structs(encode_plan.CHUNK_STATE, self.chunks)
        job.launch("choose_step", -(-len(self.chunks) // WARPS), chunks)
        fit = columns.copy()
        fit["coarse"], fit["refine"] = self.inverses.costs[passes - 1], self.inverses.edges
        job.launch("fit_classes", warps, fit, COUNTER_BYTES)
        shift = each.copy()
        shift["refine"] = self.inverses.edges
        job.launch("choose_offset", per_group, shift)
        job.launch("count_bins", warps, columns)
        errors = each.copy()
        errors["coarse"] = self.inverses.shares[passes - 1]
        job.launch("measure_errors", per_group, errors)
        coder = record.copy()
        coder["coarse"], coder["refine"] = self.inverses.coarse, self.inverses.refine
        coder["streams"] = job.structs(encode_plan.RUN, self.runs)
        coder["count"] = count = sum(len(runs) for runs in self.runs)
        job.launch("encode_progressive", -(-count // WARPS), coder, TABLE_BYTES)

    def _launch_forward(self, record: NDArray[Any]) -> None:
        split, product = record.copy(), record.copy()
        split["extra"] = share = 64
        self.job.launch("split_rows", share * len(self.sources), split)
        product["items"] = self.job.structs(plan.TILE, self.forward_tiles)
        blocks = sum(len(part) for part in self.forward_tiles)
        self.job.launch("transform_forward", blocks, product, TRANSFORM_BYTES)

    def _launch_symbols(self, record: NDArray[Any]) -> None:
        job = self.job
        first = [index for index in range(len(self.symbols)) if index not in set(self.deltas)]
        for indices in (first, self.deltas):
            if not indices:
                continue
            one = record.copy()
            one["items"] = job.upload.add(np.array(indices, "<u4"))
            one["count"] = len(indices)
            one["extra"] = share = max(1, min(512, MAX_WARPS // len(indices)))
            job.launch("quantise_rows", -(-len(indices) * share // WARPS), one)
        tables = {"fit_parametric": self.inverses.parametric_costs}
        for kernel, parts in self.symbol_tiles.items():
            one = record.copy()
            one["items"] = job.structs(encode_plan.COLUMNS, parts)
            one["count"] = count = sum(len(part) for part in parts)
            one["coarse"] = tables.get(kernel, self.inverses.gains)
            job.launch(kernel, -(-count // WARPS), one, WARPS * 32 * LANES * 4)
        if self.inverse_models:
            one = record.copy()
            one["items"] = job.structs(plan.MODELS, self.inverse_models)
            one["extra"] = blocks = max(-(-int(m["count"][0]) // 128) for m in self.inverse_models)
            job.launch("build_inverses", blocks * len(self.inverse_models), one)
        if self.symbol_runs:
            one = record.copy()
            one["streams"] = job.structs(encode_plan.RUN, self.symbol_runs)
            one["count"] = count = sum(len(runs) for runs in self.symbol_runs)
            job.launch("encode_rows", -(-count // WARPS), one, TABLE_BYTES)


def columns(owner: int, channels: int) -> NDArray[Any]:
    """Cut the channels of a source or matrix into tiles (COLUMNS)."""
    tiles = np.zeros(-(-channels // encode_plan.TILE), encode_plan.COLUMNS)
    tiles["owner"] = owner
    tiles["first"] = np.arange(len(tiles)) * encode_plan.TILE
    return tiles
