"""Plans of the codecs whose values are symbols times scales, and of ``raw``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import cachegen, int8
from cachegen.codec.base import check_one_plane_per_group
from cachegen.codec.container import BYTES, PACKED, RANS
from cachegen.codec.entropy import (
    ALPHABET,
    ParametricModels,
    TableMode,
    alphabet_size,
    digit_shift,
)
from cachegen.codec.gpu.batch import LANES, Batch, Item
from cachegen.codec.gpu.streams import PLAIN_STEPS, plain_streams, rans_streams, require
from cachegen.native.cuda import plan
from cachegen.profile import Profile


class _Coded:
    """rANS bodies of one object, parsed together at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int, int, int]] = []

    def add(self, begin: int, length: int, shape: tuple[int, int], shift: int, owner: int) -> None:
        self.rows.append((begin, length, *shape, shift, owner))

    def streams(self, item: Item) -> list[NDArray[Any]]:
        if not self.rows:
            return []
        bodies = np.array(self.rows, np.int64)
        may_escape = np.zeros(len(self.rows), bool)
        return [rans_streams(item.words, item.base, bodies, may_escape)[0]]


def _matrix(
    batch: Batch, item: Item, group: int, shape: tuple[int, int], *, plane: int
) -> NDArray[Any]:
    row = np.zeros(1, plan.MATRIX)
    row["tokens"], row["channels"] = shape
    row["places"] = -(-shape[0] // LANES)
    row["scale_width"] = max(shape[1], 1)
    row["plane"], row["error"] = plane, batch.new_error(item)
    return row


def _shape(item: Item, group: int) -> tuple[int, int, int]:
    """Return tokens held, heads and head dimension of a plane."""
    begin, end = item.header.ranges[group // 2]
    geometry = item.header.geometry
    return end - begin, geometry.kv_heads, geometry.plane_dim(is_value=bool(group % 2))


def _check_planes(item: Item) -> None:
    check_one_plane_per_group(item.header)


def plan_raw(batch: Batch, item: Item) -> None:
    """Plan an object of codec ``raw``. Raises: UnsoundError, CorruptError."""
    _check_planes(item)
    require(not item.header.params and item.header.passes == 1, "parameters")
    for group in range(len(item.header.groups)):
        tokens, heads, dim = _shape(item, group)
        segment, body = item.reader.segment(group, 0)
        size = item.header.geometry.dtype.size_bytes
        require(segment.kind == BYTES and len(body) == tokens * heads * dim * size, "raw")
        require(len(item.reader.side(group, 0)) == 0, "side information")
        plane = batch.add_planes([batch.plane(item, group // 2, is_value=bool(group % 2))])
        matrix = _matrix(batch, item, group, (tokens, heads * dim), plane=plane)
        matrix["body"] = item.address(segment)
        batch.copies.append(len(batch.matrices))
        batch.matrices.append(matrix)


def plan_int8(batch: Batch, item: Item) -> None:
    """Plan an object of codec ``int8``. Raises: UnsoundError, CorruptError."""
    _check_planes(item)
    header, reader = item.header, item.reader
    require(header.params in (b"\0\0\0\0", b"\1\0\0\0"), "parameters")
    entropy = header.params[0] == 1
    require(header.passes == 1 + entropy, "passes")
    coded = _Coded()
    for group in range(len(header.groups)):
        tokens, heads, dim = _shape(item, group)
        shape = (tokens, heads * dim)
        plane = batch.add_planes([batch.plane(item, group // 2, is_value=bool(group % 2))])
        matrix = _matrix(batch, item, group, shape, plane=plane)
        segment, body = reader.segment(group, 0)
        side = reader.side(group, 0)
        scale_bytes = tokens * heads * header.geometry.dtype.size_bytes
        require(len(side) >= scale_bytes, "scales")
        matrix["scales"] = batch.job.upload.add(side)
        matrix["scale_width"], matrix["levels"] = dim, int8.LEVELS
        matrix["kind"], matrix["bits"] = segment.kind, segment.bits
        matrix["body"], matrix["buckets"] = item.address(segment), 32
        tables = side[scale_bytes:]
        owner = len(batch.matrices)
        planes_bytes = (shape[0] * shape[1] + 7) // 8
        if not entropy:
            require(segment.kind == BYTES and not tables and len(body) == shape[0] * shape[1], "")
        else:
            matrix["low_bits"], matrix["low_centre"] = int8.LOW_BITS, int8.LOW_CENTRE
            if segment.kind == RANS:
                _use_parametric(batch, matrix, tables, shape[1])
                if tokens:
                    coded.add(segment.offset, segment.length, shape, 0, owner)
                else:
                    require(not body, "body")
            else:
                sound = segment.kind == PACKED and segment.bits == int8.HIGH_BITS and not tables
                _require_packed(sound, body, int8.HIGH_BITS, shape)
            if reader.passes_of(group) > 1:
                low, bits = reader.segment(group, 1)
                sound = low.kind == PACKED and low.bits == int8.LOW_BITS
                _require_packed(sound, bits, int8.LOW_BITS, shape)
                matrix["low"] = item.address(low) if planes_bytes else 0
        batch.matrices.append(matrix)
        if segment.kind != RANS:
            batch.row_streams.append(plain_streams(*shape, owner, PLAIN_STEPS))
    batch.row_streams += coded.streams(item)


def _require_packed(sound: bool, body: memoryview, bits: int, shape: tuple[int, int]) -> None:
    """Raise UnsoundError unless a packed body has the right length and zero padding."""
    count = shape[0] * shape[1]
    plane_bytes = (count + 7) // 8
    require(sound and len(body) == bits * plane_bytes, "packed segment")
    if count % 8:
        last = np.frombuffer(body, np.uint8).reshape(bits, plane_bytes)[:, -1]
        require(not np.any(last >> (count % 8)), "packed segment")


def _use_parametric(batch: Batch, matrix: NDArray[Any], tables: memoryview, channels: int) -> None:
    models = ParametricModels.from_bytes(tables, channels)
    matrix["tables"], matrix["buckets"] = batch.tables.parametric, 32
    matrix["classes"] = batch.job.upload.add(models.classes)
    matrix["rotations"] = batch.job.upload.add(models.rotations)


def plan_cachegen(batch: Batch, item: Item, profile: Profile | None) -> None:
    """Plan an object of codec ``cachegen``. Raises: UnsoundError, CorruptError, ProfileError."""
    _check_planes(item)
    header = item.header
    mode, anchor_tokens, bins = cachegen.unpack_params(header.params, header.geometry.layers)
    require(header.passes == 1 + (anchor_tokens > 0), "passes")
    if mode is TableMode.PROFILE:
        profile = cachegen.matching_profile(profile, header.profile)
    else:
        require(header.profile is None, "profile digest")
    first, second = _Coded(), _Coded()
    layers = header.geometry.layers
    for group in range(len(header.groups)):
        tokens, heads, dim = _shape(item, group)
        plane = batch.add_planes([batch.plane(item, group // 2, is_value=bool(group % 2))])
        settings = (mode, profile, plane)
        if not anchor_tokens:
            shape = (tokens, heads * dim)
            matrix = _cachegen_matrix(
                batch, item, (group, 0), shape, bins[group] // 2 - 1, settings, first
            )
            batch.matrices.append(matrix)
            continue
        count = -(-tokens // anchor_tokens)
        levels = cachegen.delta_levels(bins[group], group // 2, layers)
        size = header.geometry.dtype.size_bytes
        memory = batch.job.work.reserve(count * heads * dim * size)
        shape = (count, heads * dim)
        matrix = _cachegen_matrix(
            batch, item, (group, 0), shape, cachegen.ANCHOR_LEVELS, settings, first
        )
        matrix["anchors"], matrix["anchor_tokens"] = memory, anchor_tokens
        whole = item.reader.passes_of(group) > 1
        matrix["spreads"] = not whole
        batch.matrices.append(matrix)
        if whole:
            shape = (tokens - count, heads * dim)
            deltas = _cachegen_matrix(batch, item, (group, 1), shape, levels, settings, second)
            deltas["anchors"], deltas["anchor_tokens"] = memory, anchor_tokens
            deltas["is_delta"] = 1
            batch.matrices.append(deltas)
    batch.row_streams += first.streams(item)
    batch.delta_streams += second.streams(item)


def _cachegen_matrix(
    batch: Batch,
    item: Item,
    where: tuple[int, int],
    shape: tuple[int, int],
    levels: int,
    settings: tuple[TableMode, Profile | None, int],
    coded: _Coded,
) -> NDArray[Any]:
    """Describe one pass of a plane, (rows, channels); ``where`` is its group and pass."""
    mode, profile, plane = settings
    matrix = _matrix(batch, item, where[0], shape, plane=plane)
    rows, channels = shape
    side = item.reader.side(*where)
    scale_bytes = rows * item.header.geometry.dtype.size_bytes
    require(len(side) >= scale_bytes, "scales")
    tables = side[scale_bytes:]
    segment, body = item.reader.segment(*where)
    matrix["scales"] = batch.job.upload.add(side)
    matrix["levels"], matrix["kind"] = levels, segment.kind
    matrix["body"], matrix["buckets"] = item.address(segment), 32
    owner = len(batch.matrices)
    if segment.kind == BYTES:
        require(not tables and len(body) == rows * channels, "byte segment")
        streams = batch.delta_streams if where[1] else batch.row_streams
        streams.append(plain_streams(rows, channels, owner, PLAIN_STEPS))
        return matrix
    require(segment.kind == RANS, "segment kind")
    matrix["shift"] = shift = digit_shift(levels)
    if mode is TableMode.PARAMETRIC:
        _use_parametric(batch, matrix, tables, channels)
    else:
        size = alphabet_size(levels)
        if mode is TableMode.CHUNK:
            require(len(tables) == 2 * channels * size, "tables")
            freqs: Any = tables
        else:
            require(not tables, "tables")
            found = cachegen.profile_freqs(profile, *where)
            require(found is not None and found.shape == (channels, size), "profile tables")
            freqs = np.ascontiguousarray(found, "<u2")
        require(2 <= size <= ALPHABET, "alphabet")
        error = int(matrix["error"][0])
        matrix["tables"], matrix["buckets"] = batch.add_models(freqs, channels, size, error)
    if rows:
        coded.add(segment.offset, segment.length, shape, shift, owner)
    else:
        require(not body, "body")
    return matrix
