"""What the plan of a batch shares between codecs: planes, rows, angles, launches."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.container import Buffer
from cachegen.codec.gpu.frozen import FrozenTables
from cachegen.codec.gpu.target import Target
from cachegen.codec.header import Header, Segment
from cachegen.codec.reader import ObjectReader
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device
from cachegen.types import Array, RopeSpec

LANES = 32
WARPS = 4
WARP_BYTES = 4816  # kWarpBytes of progressive.cuh
ROW_SHARED_BYTES = WARPS * 8 * 32 * plan.BUCKET_BYTES
TRANSFORM_BYTES = 64 * 132 * 4
MAX_GRID_SHARE = 256


class Item:
    """One object of a batch and where its tokens go.

    base: address of its bytes on the device. words: its bytes as 32-bit words.
    mapping: address of one int64 slot per token, or 0 for rows in order. errors: indices of all
    its error words.
    """

    def __init__(
        self,
        job: plan.Plan,
        data: Buffer,
        reader: ObjectReader,
        target: Target,
        mapping: np.uint64,
    ) -> None:
        self.data = data
        self.target = target
        self.errors: list[int] = []
        self.reader = reader
        self.header: Header = reader.header
        whole = np.frombuffer(data, np.uint8)
        self.base = job.upload.add(whole)
        self.words = whole[: len(whole) // 4 * 4].view("<u4")
        self.mapping = mapping

    def address(self, segment: Segment) -> np.uint64:
        """Return the address of a segment's first byte."""
        return np.uint64(self.base + np.uint64(segment.offset))


class Placed(Protocol):
    """A chunk of a batch: its shape, where its planes lie, which slots are its tokens'."""

    header: Header
    target: Target
    mapping: np.uint64
    errors: list[int]


class Batch:
    """Structs of all codecs of a batch, collected object by object."""

    def __init__(self, device: Device, tables: FrozenTables, stream: Any) -> None:
        self.device = device
        self.tables = tables
        self.stream = stream
        self.job = plan.Plan()
        self.errors = 0
        self.matrices: list[NDArray[Any]] = []
        self.groups: list[NDArray[Any]] = []
        self.tiles: list[NDArray[Any]] = []
        self.finishing: list[int] = []  # groups that wait in the workspace without a transform
        self.copies: list[int] = []  # matrices of values as they are
        self.row_streams: list[NDArray[Any]] = []
        self.delta_streams: list[NDArray[Any]] = []
        # By number of passes: the streams of pass 0 of all groups; then of each later pass.
        self.group_streams: dict[int, list[list[NDArray[Any]]]] = {}
        self._planes: list[NDArray[Any]] = []
        self._plane_count = 0
        self._slots: list[NDArray[Any]] = []
        self._rows: dict[tuple[Any, ...], np.uint64] = {}
        self._ropes: list[NDArray[Any]] = []
        self._angles: dict[tuple[Any, ...], np.uint64] = {}
        self._frequencies: dict[tuple[Any, ...], np.uint64] = {}
        self._models: list[NDArray[Any]] = []
        self.max_half = 0

    def new_error(self, item: Placed) -> int:
        """Return the index of a new error word of an object."""
        item.errors.append(self.errors)
        self.errors += 1
        return self.errors - 1

    def add_planes(self, rows: list[NDArray[Any]]) -> int:
        """Add planes that follow one another. Returns: the index of the first."""
        first = self._plane_count
        self._planes += rows
        self._plane_count += len(rows)
        return first

    def plane(
        self,
        item: Placed,
        layer: int,
        *,
        is_value: bool,
        divisor: float = 1.0,
        first_channel: int = 0,
    ) -> NDArray[Any]:
        """Describe one plane of an object: where it goes, and its RoPE if it has to be redone."""
        header = item.header
        begin, end = header.ranges[layer]
        place = item.target.places[layer][is_value]
        row = np.zeros(1, plan.PLANE)
        row["base"] = plan.absolute(place.address)
        # Without slots a plane holds the tokens of its layer alone.
        skipped = begin if item.mapping else 0
        row["rows"] = self._rows_of(item, place.rows) + np.uint64(8 * skipped)
        row["head_stride"] = place.head_stride
        row["heads"] = header.geometry.kv_heads
        row["dim"] = header.geometry.plane_dim(is_value=is_value)
        row["dtype"] = plan.DTYPE_CODES[header.geometry.dtype]
        row["first_channel"] = first_channel
        row["divisor"] = divisor
        row["tokens"] = end - begin
        if header.rope is not None and not is_value and end > begin:
            kind = header.rope.layer_kinds[layer]
            if kind >= 0 and header.rope.frequencies[kind]:
                row["rope"] = self._angles_of(item, header.rope, kind, begin, end)
                row["half"] = len(header.rope.frequencies[kind])
                row["interleaved"] = header.rope.interleaved
        return row

    def _rows_of(self, item: Placed, place: tuple[int, int, int, int]) -> np.uint64:
        key = (id(item), place)
        if key not in self._rows:
            slots, block_slots, block_stride, slot_stride = place
            entry = np.zeros(1, plan.SLOTS)
            entry["mapping"] = item.mapping
            entry["rows"] = self._rows[key] = self.job.work.reserve(8 * item.header.tokens)
            entry["slots"], entry["block_slots"] = slots, block_slots
            entry["block_stride"], entry["slot_stride"] = block_stride, slot_stride
            entry["tokens"] = item.header.tokens if item.mapping else min(slots, item.header.tokens)
            entry["error"] = self.new_error(item)
            self._slots.append(entry)
        return self._rows[key]

    def _angles_of(
        self, item: Placed, rope: RopeSpec, kind: int, begin: int, end: int
    ) -> np.uint64:
        position = item.header.first_position + begin
        frequencies, scale = rope.frequencies[kind], rope.attention_scale[kind]
        key = (position, end - begin, frequencies, scale)
        if key not in self._angles:
            if frequencies not in self._frequencies:
                wide = np.asarray(frequencies, "<f4")
                self._frequencies[frequencies] = self.job.upload.add(wide)
            entry = np.zeros(1, plan.ROPE)
            places, half = -(-(end - begin) // LANES), len(frequencies)
            entry["frequencies"] = self._frequencies[frequencies]
            table = self.job.work.reserve(8 * places * half * LANES)
            entry["table"] = self._angles[key] = table
            entry["position"], entry["scale"] = position, scale
            entry["half"], entry["tokens"], entry["places"] = half, end - begin, places
            self._ropes.append(entry)
        return self._angles[key]

    def add_models(
        self, freqs: Array | memoryview, count: int, alphabet: int, error: int
    ) -> tuple[np.uint64, int]:
        """Have alias tables built for frequencies that come with an object or a profile.

        freqs: (count, alphabet) uint16. Returns: their address and the buckets of a table.
        """
        buckets = 16 if alphabet <= 16 else 32
        entry = np.zeros(1, plan.MODELS)
        entry["freqs"] = self.job.upload.add(freqs)
        entry["buckets"] = self.job.work.reserve(count * buckets * plan.BUCKET_BYTES)
        entry["count"], entry["alphabet"] = count, alphabet
        entry["kind"], entry["error"] = buckets, error
        self._models.append(entry)
        return np.uint64(entry["buckets"][0]), buckets

    def finish(self) -> tuple[np.uint64, int]:
        """Add all launches. Returns: address of the bytes to zero before, their number."""
        job = self.job
        record = np.zeros(1, plan.LAUNCH)
        errors = job.work.reserve(4 * self.errors)
        active = job.work.reserve(4 * len(self.groups), 4)
        record["errors"], record["active"] = errors, active
        record["coarse"], record["refine"] = self.tables.coarse, self.tables.refine
        record["coarse_escapes"] = self.tables.coarse_escapes
        record["planes"] = job.structs(plan.PLANE, self._planes) if self._planes else 0
        record["matrices"] = job.structs(plan.MATRIX, self.matrices) if self.matrices else 0
        record["groups"] = job.structs(plan.GROUP, self.groups) if self.groups else 0
        self._prepare(record)
        self._launch_rows(record)
        self._launch_groups(record)
        return errors, 4 * (self.errors + len(self.groups))

    def _prepare(self, record: NDArray[Any]) -> None:
        job = self.job
        if self._models:
            one = record.copy()
            one["items"] = job.structs(plan.MODELS, self._models)
            one["extra"] = blocks = max(-(-int(m["count"][0]) // 128) for m in self._models)
            job.launch("build_tables", blocks * len(self._models), one)
        if self._slots:
            one = record.copy()
            one["items"] = job.structs(plan.SLOTS, self._slots)
            job.launch("map_rows", len(self._slots), one)
        if self._ropes:
            one = record.copy()
            one["items"] = job.structs(plan.ROPE, self._ropes)
            size = max(int(rope["half"][0]) * int(rope["places"][0]) for rope in self._ropes)
            one["extra"] = share = min(-(-size * LANES // 128), MAX_GRID_SHARE)
            job.launch("rope_table", share * len(self._ropes), one)

    def _launch_rows(self, record: NDArray[Any]) -> None:
        job = self.job
        for streams in (self.row_streams, self.delta_streams):
            if streams:
                one = record.copy()
                one["streams"] = job.structs(plan.STREAM, streams)
                one["count"] = count = sum(len(part) for part in streams)
                job.launch("decode_rows", -(-count // WARPS), one, ROW_SHARED_BYTES)
        for first, last in _runs(self.copies):
            one = record.copy()
            one["first"] = first
            sizes = [int(m["tokens"][0]) * int(m["channels"][0]) for m in self.matrices[first:last]]
            one["extra"] = share = min(max(-(-max(sizes) // 1024), 1), MAX_GRID_SHARE)
            job.launch("copy_rows", share * (last - first), one)

    def _launch_groups(self, record: NDArray[Any]) -> None:
        job = self.job
        for passes, by_pass in sorted(self.group_streams.items()):
            one = record.copy()
            one["streams"] = job.structs(plan.STREAM, [part for parts in by_pass for part in parts])
            one["count"] = count = sum(len(part) for part in by_pass[0])
            one["extra"] = self.max_half
            shared = WARPS * (WARP_BYTES + self.max_half * LANES * 4)
            job.launch(f"decode_progressive_{passes}", -(-count // WARPS), one, shared)
        if self.tiles:
            one = record.copy()
            one["items"] = job.structs(plan.TILE, self.tiles)
            job.launch(
                "transform_back", sum(len(part) for part in self.tiles), one, TRANSFORM_BYTES
            )
        if self.finishing:
            one = record.copy()
            one["items"] = job.upload.add(np.array(self.finishing, "<u4"))
            one["extra"] = 64
            job.launch("finish_values", 64 * len(self.finishing), one)
        exempt = [index for index, group in enumerate(self.groups) if group["exempt"][0]]
        for first, last in _runs(exempt):
            one = record.copy()
            one["first"], one["extra"] = first, 4
            job.launch("put_exempt", 4 * (last - first), one)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Join rising indices to half-open runs."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
