"""Plan of the ``progressive`` codec: groups, streams of all passes together, tiles of the KLT."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec.basis import planes_of_group
from cachegen.codec.container import BYTES, PACKED, RANS, SPARSE
from cachegen.codec.gpu.batch import LANES, Batch, Item
from cachegen.codec.gpu.frozen import DeviceBasis, cell_constants, device_basis
from cachegen.codec.gpu.streams import PLAIN_STEPS, plain_streams, rans_streams, require
from cachegen.codec.ladder import MAX_COARSE
from cachegen.codec.passes import DIGIT_BITS
from cachegen.codec.progressive import MAX_PASSES, unpack_params
from cachegen.codec.reference import profile_classes
from cachegen.codec.side import GroupSide
from cachegen.native.cuda import plan
from cachegen.profile import Profile, require_profile

TILE_TOKENS, TILE_CHANNELS = 64, 128
MAX_SPARSE_STEPS = (1 << 32) // LANES - 1
# Stands behind the pairs of a sparse pass: a place that no matrix has.
BEYOND = np.array([[(1 << 32) - 1, 0]], np.uint32)
# The first half of a head waits in shared memory; wider ones go through the workspace.
MAX_FUSED_HALF = 64


class _Pending:
    """A group whose streams are parsed with those of the whole object."""

    def __init__(self, row: NDArray[Any], index: int, present: int) -> None:
        self.row = row
        self.index = index
        self.present = present
        self.kinds: list[int] = []
        # Places and symbols of a sparse pass 0, and where they will lie.
        self.pairs: NDArray[np.uint32] | None = None
        self.pairs_at = np.uint64(0)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.row["tokens"][0]), int(self.row["channels"][0])


def plan_progressive(batch: Batch, item: Item, profile: Profile | None) -> None:
    """Plan an object of codec ``progressive``.

    Raises: UnsoundError for what only the CPU can name or do, CorruptError, ProfileError.
    """
    header = item.header
    step, value_weight = unpack_params(header)
    held: DeviceBasis | None = None
    if header.profile is not None:
        named = require_profile(profile, header.profile)
        held = device_basis(batch.device, named, header.geometry, batch.stream)
        require(held.basis.groups == header.groups, "groups")
    else:
        for group in header.groups:
            spans = header.ranges[group.layer : group.layer + group.layers]
            require(len(set(spans)) == 1, "group")
    require(header.passes <= MAX_PASSES, "passes")
    pending: list[_Pending] = []
    bodies: list[tuple[int, int, int, int, int, int]] = []
    for index in range(len(header.groups)):
        pending.append(_plan_group(batch, item, index, held, step, value_weight, bodies))
    pending = [one for one in pending if one.row["tokens"][0]]
    _share_streams(batch, item, pending, bodies)


def _plan_group(
    batch: Batch,
    item: Item,
    index: int,
    held: DeviceBasis | None,
    step: float,
    value_weight: float,
    bodies: list[tuple[int, int, int, int, int, int]],
) -> _Pending:
    header = item.header
    group = header.groups[index]
    begin, end = header.ranges[group.layer]
    tokens, heads = end - begin, header.geometry.kv_heads
    planes, channels = [], 0
    for layer, is_value in planes_of_group(group):
        divisor = value_weight if is_value else 1.0
        plane = batch.plane(item, layer, is_value=is_value, divisor=divisor, first_channel=channels)
        planes.append(plane)
        channels += heads * header.geometry.plane_dim(is_value=is_value)
    data = item.reader.side(index, 0)
    side = GroupSide.from_bytes(data, tokens, channels, header.geometry.dtype, plain=held is None)
    classes, present = side.classes, item.reader.passes_of(index)
    row = np.zeros(1, plan.GROUP)
    upload = batch.job.upload
    if held is not None:
        statistics = held.basis.bases[index]
        classes = profile_classes(statistics, step, side.class_offset)
        row["basis"], row["means"] = held.matrices[index], held.means[index]
        row["basis_low"], row["basis_scale"] = held.rests[index], held.scales[index]
    elif side.mean_scale:
        row["means"] = upload.add(side.mean.astype("<f4"))
    row["classes"] = upload.add(classes)
    row["constants"] = upload.add(cell_constants(header.passes, present, side.decay))
    row["tokens"], row["channels"], row["places"] = tokens, channels, -(-tokens // LANES)
    row["total_passes"], row["step"] = header.passes, step
    row["plane"], row["planes"] = batch.add_planes(planes), len(planes)
    row["exempt"] = len(side.exempt_tokens)
    if len(side.exempt_tokens):
        row["exempt_tokens"] = upload.add(side.exempt_tokens.astype("<u4"))
        row["exempt_rows"] = upload.add(np.ascontiguousarray(side.exempt_rows).view(np.uint8))
    row["stride"] = stride = -(-channels // 8) * 8
    number = len(batch.groups)
    row["active"], row["error"] = number, batch.new_error(item)
    one = _Pending(row, number, present)
    for pass_index in range(present):
        segment, body = item.reader.segment(index, pass_index)
        entry = row["passes"][0][pass_index]
        entry["kind"], entry["body"] = segment.kind, item.address(segment)
        one.kinds.append(segment.kind)
        if segment.kind == RANS:
            if tokens:
                bodies.append((segment.offset, segment.length, tokens, channels, 0, number))
            else:
                require(not body, "body")
        elif pass_index == 0 and segment.kind == SPARSE:
            steps = -(-tokens // LANES) * channels
            require(steps <= MAX_SPARSE_STEPS, "places of 32 bits")
            one.pairs = native.parse_sparse(body, tokens, channels, largest=2 * MAX_COARSE)
            one.pairs_at = upload.add(np.concatenate([one.pairs, BEYOND]))
        elif pass_index == 0:
            require(segment.kind == BYTES and len(body) == tokens * channels, "pass 0")
        else:
            plane_bytes = (tokens * channels + 7) // 8
            sound = segment.kind == PACKED and segment.bits == DIGIT_BITS
            require(sound and len(body) == DIGIT_BITS * plane_bytes, "packed pass")
            if tokens * channels % 8:
                last = np.frombuffer(body, np.uint8).reshape(DIGIT_BITS, plane_bytes)[:, -1]
                require(not np.any(last >> (tokens * channels % 8)), "packed pass")
    if held is not None:
        row["coefficients"] = batch.job.work.reserve(4 * tokens * stride)
        batch.tiles.append(_tiles(number, tokens, planes, int(row["plane"][0])))
    elif not _can_fuse(item, index, planes, one):
        row["coefficients"] = batch.job.work.reserve(4 * tokens * stride)
        batch.finishing.append(number)
    else:
        halves = [int(plane["half"][0]) for plane in planes]
        batch.max_half = max(batch.max_half, *halves)
    batch.groups.append(row)
    return one


def _can_fuse(item: Item, index: int, planes: list[NDArray[Any]], group: _Pending) -> bool:
    """Whether one warp decodes both halves of every head that RoPE turns, in whole eights."""
    turned = [plane for plane in planes if plane["rope"][0]]
    if not turned:
        return True
    spacing = PLAIN_STEPS
    if RANS in group.kinds and group.shape[0]:
        # That of all passes, see _share_streams.
        segment, _ = item.reader.segment(index, group.kinds.index(RANS))
        spacing = int(item.words[segment.offset // 4]) if segment.length >= 4 else 1
    dim = int(turned[0]["dim"][0])
    return all(
        plane["half"][0] % 8 == 0
        and plane["half"][0] <= MAX_FUSED_HALF
        and plane["dim"][0] % 8 == 0
        and plane["first_channel"][0] % dim == 0
        and not plane["interleaved"][0]
        and spacing % dim == 0
        and group.row["channels"][0] % dim == 0
        for plane in turned
    )


def _tiles(number: int, tokens: int, planes: list[NDArray[Any]], first: int) -> NDArray[Any]:
    """Cut tokens x channels into tiles of whole heads. Raises: UnsoundError beyond 128 channels."""
    parts = []
    for offset, plane in enumerate(planes):
        dim, width = int(plane["dim"][0]), int(plane["heads"][0]) * int(plane["dim"][0])
        turns = bool(plane["rope"][0])
        require(dim <= TILE_CHANNELS or not turns, "head wider than a tile")
        share = TILE_CHANNELS // dim * dim if turns else TILE_CHANNELS
        begins = np.arange(0, width, share)
        for token in range(0, tokens, TILE_TOKENS):
            part = np.zeros(len(begins), plan.TILE)
            part["group"], part["plane"], part["first_token"] = number, first + offset, token
            part["first_channel"] = begins + int(plane["first_channel"][0])
            part["width"] = np.minimum(share, width - begins)
            parts.append(part)
    return np.concatenate(parts) if parts else np.zeros(0, plan.TILE)


def _share_streams(
    batch: Batch,
    item: Item,
    pending: list[_Pending],
    bodies: list[tuple[int, int, int, int, int, int]],
) -> None:
    """Parse all streams of the object, and sort them by number of passes and by pass.

    Raises: UnsoundError also for passes of a group with unequal restart points, which no encoder
        of ours writes: the kernel decodes a stream of all passes at once.
    """
    by_group: dict[int, list[tuple[NDArray[Any], int]]] = {}
    if bodies:
        fields = np.array(bodies, np.int64)
        owners = fields[:, 5]
        first_of = np.r_[True, owners[1:] != owners[:-1]]
        # Bodies come group by group in order of passes, and only pass 0 has escapes.
        kinds = {one.index: one.kinds for one in pending}
        may_escape = first_of & np.array([kinds[int(owner)][0] == RANS for owner in owners])
        streams, counts, spacings = rans_streams(item.words, item.base, fields, may_escape)
        ends = np.cumsum(counts)
        for body, owner in enumerate(owners.tolist()):
            part = streams[ends[body] - counts[body] : ends[body]]
            by_group.setdefault(owner, []).append((part, int(spacings[body])))
    for one in pending:
        coded = by_group.get(one.index, [])
        found = {steps for _, steps in coded}
        require(len(found) <= 1, "restart points of passes")
        spacing = found.pop() if found else PLAIN_STEPS
        parts = iter(coded)
        lists = batch.group_streams.setdefault(one.present, [[] for _ in range(one.present)])
        for index, kind in enumerate(one.kinds):
            if kind == RANS:
                part = next(parts)[0]
            elif index == 0:
                part = plain_streams(*one.shape, one.index, spacing)
                if one.pairs is not None:
                    first = np.searchsorted(one.pairs[:, 0], LANES * part["begin_step"])
                    part["base"] = one.pairs_at + (plan.PAIR_BYTES * first).astype(np.uint64)
            else:
                continue
            lists[index].append(part)


def number_streams(batch: Batch) -> None:
    """Tell every group where the streams of each of its passes begin."""
    for lists in batch.group_streams.values():
        offset = 0
        for index, parts in enumerate(lists):
            for part in parts:
                owner = int(part["owner"][0])
                batch.groups[owner]["passes"][0][index]["first_stream"] = offset
                offset += len(part)
