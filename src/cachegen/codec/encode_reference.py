"""Encoding ``progressive`` groups in plain NumPy: the twin of the fused encoder, to the byte.

Matrices as large as a group, one step after the other. Wherever floats are summed, the order is
that of the kernels (docs/fused-encode.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec import ladder, passes
from cachegen.codec.basis import ModelBasis, group_matrix
from cachegen.codec.entropy import pack
from cachegen.codec.fused_encode import MAX_MAGNITUDE, analyse
from cachegen.codec.reference import profile_base
from cachegen.codec.sparse import is_sparse, write_sparse
from cachegen.native import fused_encode as coded
from cachegen.native.fused_encode import LANES, token_order
from cachegen.types import Array

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

FEW_TOKENS = 8
MEAN_LEVELS = 127
OUTLIER_NORM = 3.0
OUTLIER_ROUNDS = 4
HUGE = np.float32(2.0**50)
ERROR_PLACES = 8
OFFSETS = range(-12, 13)


@dataclass
class _Group:
    """What is known of a group. rows: (T, N), or with a profile components."""

    rows: Floats
    exempt: list[int]
    families: NDArray[np.uint8] | None = None
    refused: bool = False
    energy: float = 0.0
    levels: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    scale: np.float32 = field(default_factory=lambda: np.float32(0))

    @property
    def places(self) -> int:
        return -(-len(self.rows) // LANES)

    def kept(self) -> NDArray[np.bool_]:
        """Return which tokens are not exempt, (T,)."""
        kept = np.ones(len(self.rows), bool)
        kept[self.exempt] = False
        return kept

    def by_element(self, values: Array) -> Array:
        """Reorder the tokens of an array (T, ...) to (P, 32, ...), zeros for idle lanes."""
        order = token_order(len(values))
        padded = np.zeros((len(order), *values.shape[1:]), values.dtype)
        padded[order < len(values)] = values[order[order < len(values)]]
        return padded.reshape(self.places, LANES, *values.shape[1:])


def _halves(rows: Floats) -> Floats:
    """Sum (32, N) over elements, halves added to one another."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + rows[half:]
    total: Floats = rows[0]
    return total


def _in_order(values: Floats | Doubles) -> NDArray[np.floating]:
    """Sum along the last axis, one after the other."""
    return np.add.accumulate(values, axis=-1)[..., -1]


def survey(group: _Group) -> None:
    """Find exempt tokens, mean and energy of a group without a profile."""
    tokens, channels = group.rows.shape
    group.levels, group.scale, group.energy = np.zeros(channels, np.int8), np.float32(0), 0.0
    if not group.rows.size:
        return
    group.refused = not bool((np.abs(group.rows) <= MAX_MAGNITUDE).all())
    elements = group.by_element(group.rows)
    huge = ~(np.abs(elements) <= HUGE).all(axis=2)
    order = token_order(tokens).reshape(group.places, LANES)
    for _ in range(OUTLIER_ROUNDS):
        keep = group.by_element(group.kept())
        middle = group.places // 2
        count = np.float32(keep[middle].sum())
        masked = np.where(keep[middle][:, None], elements[middle], np.float32(0))
        centre = _halves(masked) / count if count else np.zeros(channels, np.float32)
        moved = np.where(keep[..., None], elements - centre, np.float32(0))
        by_lane = np.zeros((LANES, channels), np.float32)
        for place in moved:
            by_lane += place
        sums = _halves(by_lane)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = _in_order(moved * moved)
        norms = np.sqrt(squares.astype(np.float64))
        limit = np.inf
        if keep.sum() >= FEW_TOKENS:
            limit = OUTLIER_NORM * max(float(np.median(norms[keep])), 1e-30)
        odd = keep & ((norms > limit) | huge)
        group.exempt = sorted([*group.exempt, *order[odd].tolist()])
        if not odd.any():
            break
    _set_mean(group, centre.astype(np.float64), sums.astype(np.float64), squares)


def _set_mean(group: _Group, centre: Doubles, sums: Doubles, squares: Floats) -> None:
    kept = group.kept()
    count = float(kept.sum())
    if not count:
        return
    exact = centre + sums / count
    if count >= FEW_TOKENS:
        group.scale = np.float32(np.abs(exact).max() / MEAN_LEVELS)
    mean = np.zeros(len(exact))
    if group.scale > 0:
        levels = np.clip(np.rint(exact / np.float64(group.scale)), -MEAN_LEVELS, MEAN_LEVELS)
        group.levels = levels.astype(np.int8)
        mean = (levels.astype(np.float32) * group.scale).astype(np.float64)
    terms = squares[group.by_element(kept)].astype(np.float64)
    moved = mean - centre
    lost = 2 * moved * sums - count * moved * moved
    energy = float(_in_order(np.concatenate([[0.0], terms, -lost])))
    group.energy = max(energy, 0.0)


class ReferenceEncoder:
    """The twin of ``fused_encode.FusedEncoder``."""

    def __init__(self, chunk: KVChunk, basis: ModelBasis, exempt: Sequence[list[int]]) -> None:
        self._basis = basis
        self._groups = []
        for group, statistics, tokens in zip(basis.groups, basis.bases, exempt, strict=True):
            if statistics is None:
                rows = group_matrix(chunk, group, basis.value_weight)
                self._groups.append(_Group(rows, list(tokens)))
                continue
            rows, energy = analyse(chunk, group, basis, statistics, tokens)
            known = _Group(rows, list(tokens), statistics.families, energy=energy)
            self._groups.append(known)

    def survey(self) -> tuple[int | None, list[float]]:
        """Find means, exempt tokens and energies."""
        for group in self._groups:
            if group.families is None:
                survey(group)
        refused = next((i for i, group in enumerate(self._groups) if group.refused), None)
        return refused, [group.energy for group in self._groups]

    def encode(self, step: float, passes_: int) -> list[native.EncodedGroup]:
        """Encode all groups; step: the finest one."""
        found = []
        for group, statistics in zip(self._groups, self._basis.bases, strict=True):
            base = None if statistics is None else profile_base(statistics, step)
            found.append(_encode(group, np.float32(step), passes_, base))
        return found


def _encode(
    group: _Group, step: np.float32, count: int, base: NDArray[np.uint8] | None
) -> native.EncodedGroup:
    scaled = _scaled(group, step)
    # What pass 0 cannot hold becomes exempt; then the means are others.
    beyond = (np.abs(scaled) > np.float32(ladder.reach(count))).any(axis=1)
    if beyond.any():
        group.exempt = sorted([*group.exempt, *np.flatnonzero(beyond).tolist()])
        if base is None:
            survey(group)
        scaled = _scaled(group, step)
    digits = ladder.climb(scaled, count)
    lengths = code_lengths(digits)
    offset, columns = 0, np.arange(lengths.shape[1])
    classes = lengths.argmin(axis=0).astype(np.uint8)
    if base is not None and group.families is not None:
        high, start = group.families.astype(np.int64) * ladder.CLASSES, base.astype(np.int64)
        ways = {shift: high + np.clip(start + shift, 0, ladder.CLASSES - 1) for shift in OFFSETS}
        offset = min(OFFSETS, key=lambda shift: int(lengths[ways[shift], columns].sum()))
        classes = ways[offset].astype(np.uint8)
    return native.EncodedGroup(
        group.exempt,
        group.levels.tobytes(),
        float(group.scale),
        classes.tobytes(),
        offset,
        _errors(group, scaled, digits, classes % ladder.CLASSES),
        _write(digits, classes),
    )


def _scaled(group: _Group, step: np.float32) -> Floats:
    mean = group.levels.astype(np.float32) * group.scale if len(group.levels) else np.float32(0)
    scaled = (group.rows - mean) * (np.float32(1) / step)
    return np.where(group.kept()[:, None], scaled, np.float32(0))


def code_lengths(digits: ladder.Ladder) -> NDArray[np.int64]:
    """Return the length of every channel coded every way, (192, N), in 1/1024 bit."""
    channels = digits.coarse.shape[1]
    magnitudes = np.minimum(np.abs(digits.coarse), 16)
    counts = [_count(magnitudes, 18)]
    for index, matrix in enumerate(digits.digits, 1):
        counts.append(_count(3 * ladder.contexts(digits, index) + matrix, 6))
    shift = max(0, len(digits.coarse).bit_length() - 15)
    both = np.concatenate(counts, axis=1) >> shift if channels else np.zeros((0, 0), np.int64)
    costs = passes.code_costs(digits.passes).astype(np.int64)
    flat = costs.transpose(1, 0, 2).reshape(costs.shape[1], -1)
    return flat @ both.T if channels else np.zeros((len(flat), 0), np.int64)


def _count(symbols: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    channels = symbols.shape[1]
    flat = symbols.astype(np.int64) + size * np.arange(channels)
    return np.bincount(flat.ravel(), minlength=size * channels).reshape(channels, size)


def _errors(
    group: _Group, scaled: Floats, digits: ladder.Ladder, scale: NDArray[np.uint8]
) -> list[float]:
    """Return the squared error in finest steps by decay and pass, from every eighth place."""
    count = digits.passes
    step = 3 ** (count - 1)
    half = (step - 1) // 2
    errors = np.zeros((len(passes.DECAYS), count))
    places = np.arange(len(scaled)) % max(group.places, 1)
    measured = (places % ERROR_PLACES == 0) & group.kept()
    if not measured.any():
        return errors.ravel().tolist()
    # Places in cells in quarters: a factor of 4 rounds nothing.
    magnitude = np.minimum(np.abs(scaled[measured]), np.float32(128 * step))
    shift = np.float32(1 - ladder.DEAD_ZONE) * np.float32(step)
    inside = (np.float32(4) * (magnitude + shift)).astype(np.int64)
    inside = np.minimum(inside, 4 * 128 * step - 1)
    outside = np.float32(4) * (magnitude * ladder.LATE_CELLS + np.float32(0.5))
    outside = np.minimum(outside.astype(np.int64), 4 * (half + 1) - 1)
    early = digits.coarse[measured] != 0
    shares = passes.centroid_shares(count)
    for number in range(ladder.CLASSES):
        of = np.broadcast_to(scale == number, early.shape)
        if not of.any():
            continue
        for index in range(count):
            unit = 3 ** (count - 1 - index)
            late = of & ~early & (2 * (outside // 4) > unit)
            zeros = of & ~early & ~late
            first = 4 * (inside[of & early] // 4 % unit) + inside[of & early] % 4
            later = 4 * ((outside[late] // 4 + half) % unit) + outside[late] % 4
            for way in range(len(passes.DECAYS)):
                share = shares[way, index, :, number] * unit
                errors[way, index] += _error(first, share[0]) + (1.2 * 1.2) * (
                    _error(later, share[1]) + _error(outside[zeros] - 2, 0.0)
                )
    tokens = float(group.kept().sum())
    return (errors * (tokens / float(measured.sum()))).ravel().tolist()


def _error(places: NDArray[np.int64], point: float) -> float:
    """Return squared distances from a point; values lie anywhere within their quarters."""
    n, first = float(len(places)), float(places.sum())
    second = (float((places * places).sum()) + first + n / 3) / 16
    return second - 2 * point * ((first + n / 2) / 4) + n * (point * point)


def _write(
    digits: ladder.Ladder, classes: NDArray[np.uint8]
) -> list[tuple[int, NDArray[np.uint8]]]:
    """Code all passes."""
    family, scale = classes // ladder.CLASSES, classes % ladder.CLASSES
    value = digits.coarse.astype(np.int64)
    symbols = (2 * np.abs(value) - (value < 0)).astype(np.uint8)
    bodies = []
    for index in range(digits.passes):
        below = digits.passes - 1 - index
        rows = family.astype(np.int64) * ladder.ROWS + ladder.row_of(scale, below)
        matrix = digits.digits[index - 1] if index else symbols
        body = native.encode_segment(
            matrix,
            (2 * rows if index else rows).astype(np.uint16),
            passes.refine_tables() if index else passes.coarse_tables(),
            contexts=ladder.contexts(digits, index) if index else None,
            stream_steps=passes.STREAM_STEPS,
        )
        kind = coded.RANS
        if index == 0 and is_sparse(matrix):
            kind, body = coded.SPARSE, write_sparse(matrix)
        elif index == 0 and len(body) >= matrix.size:
            kind, body = coded.BYTES, matrix.tobytes()
        if index and matrix.size and len(body) >= matrix.size // 4:
            packed = pack(matrix, passes.DIGIT_BITS)
            if len(packed) <= len(body):
                kind, body = coded.PACKED, packed
        bodies.append((kind, np.frombuffer(body, np.uint8)))
    return bodies
