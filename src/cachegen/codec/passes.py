"""Passes of the ``progressive`` codec: digits to segments and back, classes, payload order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE, SPARSE
from cachegen.codec.entropy import unpack, unpack_bytes
from cachegen.codec.header import SegmentBody
from cachegen.codec.ladder import (
    CLASSES,
    FAMILIES,
    MAX_COARSE,
    ROWS,
    Digits,
    Ladder,
    cell_shares,
    coarse_freqs,
    contexts,
    refine_freqs,
    row_of,
)
from cachegen.codec.reader import ObjectReader
from cachegen.codec.sparse import read_sparse
from cachegen.errors import CorruptError

TOTAL = 4096
ESCAPE_BITS = 8
DIGIT_BITS = 2
# Streams this long make lane states cheap (0.008 bit/value a pass); they still are restart points.
STREAM_STEPS = 4096
# How densities may fall within cells, in 1/64; see ``ladder.descend``.
DECAYS = (0, 32, 64, 96)
# Code lengths are sums of whole numbers, in 1/1024 bit, so that every machine finds the same.
COST_UNIT = 1024


@functools.cache
def coarse_tables() -> native.Tables:
    """Return the frozen tables of pass 0, row family * 88 + row."""
    freqs = coarse_freqs().reshape(-1, 32)
    return native.Tables(freqs, coarse_escapes())


@functools.cache
def coarse_escapes() -> NDArray[np.uint8]:
    """Return the escape index of every frozen table of pass 0, row family * 88 + row."""
    return _escapes(coarse_freqs().reshape(-1, 32))


def _escapes(freqs: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the index of the last frequency that is not zero, along the last axis."""
    behind = (freqs[..., ::-1] > 0).argmax(axis=-1)
    result: NDArray[np.uint8] = (freqs.shape[-1] - 1 - behind).astype(np.uint8)
    return result


@functools.cache
def refine_tables() -> native.Tables:
    """Return the frozen tables of later passes, row 2 * (family * 88 + row) + context."""
    return native.Tables(np.ascontiguousarray(refine_freqs().reshape(-1, 3)), None)


@functools.cache
def _coarse_costs() -> NDArray[np.float64]:
    """Bits of a magnitude 0 to 15 (sign included) and of an escape, (families, rows, 17)."""
    freqs = coarse_freqs()
    escape = _escapes(freqs).astype(np.int64)[..., None]
    with np.errstate(divide="ignore"):
        bits = -np.log2(freqs / TOTAL)
    symbols = 2 * np.arange(17)
    beyond = np.take_along_axis(bits, escape, axis=-1) + ESCAPE_BITS
    within = bits[..., np.minimum(symbols, bits.shape[-1] - 1)]
    return np.where(symbols < escape, within, beyond)


@functools.cache
def _refine_costs() -> NDArray[np.float64]:
    """Bits of a digit in each context, (families, rows, 6)."""
    return -np.log2(refine_freqs() / TOTAL).reshape(FAMILIES, ROWS, 6)


@functools.cache
def encode_tables() -> native.EncodeTables:
    """Return the frozen tables for the encoder."""
    return native.EncodeTables(coarse_tables(), refine_tables())


@functools.cache
def code_costs(count: int) -> NDArray[np.int16]:
    """Return the cost of everything that is counted, (pairs, 192, 2), in 1/1024 bit.

    Counted are magnitudes 0 to 15 and larger of pass 0, nothing, and for each later pass the digits
    in context 0, then in context 1. The ways to code a channel are family * 64 + class.
    """
    scale = np.arange(CLASSES)
    ways = FAMILIES * CLASSES
    coarse = _coarse_costs()[:, row_of(scale, count - 1)].reshape(ways, -1)
    columns = [coarse, np.zeros((ways, 1))]
    for index in range(1, count):
        rows = row_of(scale, count - 1 - index)
        columns.append(_refine_costs()[:, rows].reshape(ways, -1))
    costs = np.rint(np.concatenate(columns, axis=1) * COST_UNIT).astype(np.int16)
    return np.ascontiguousarray(costs.reshape(ways, -1, 2).transpose(1, 0, 2))


@functools.cache
def centroid_shares(count: int) -> NDArray[np.float64]:
    """Return where values lie in their cells, (decays, passes, 2, 64), as shares of the width.

    The third axis: cells of one step, of values significant since pass 0, and of 1.2 steps.
    """
    return np.array(
        [
            [cell_shares(count, present, decay) for present in range(1, count + 1)]
            for decay in DECAYS
        ],
        np.float64,
    )


def read(
    reader: ObjectReader, group: int, shape: tuple[int, int], classes: NDArray[np.uint8]
) -> Ladder:
    """Decode the passes of a group that are whole. Raises: CorruptError, ChecksumError."""
    family, scale = classes // CLASSES, classes % CLASSES
    passes = reader.header.passes
    ladder = Ladder(np.zeros(shape, np.int16), ())
    for index in range(reader.passes_of(group)):
        segment, body = reader.segment(group, index)
        rows = family.astype(np.int64) * ROWS + row_of(scale, passes - 1 - index)
        if index == 0:
            if segment.kind == RANS:
                symbols = native.decode_segment(
                    body, *shape, rows.astype(np.uint16), coarse_tables()
                )
            elif segment.kind == BYTES:
                symbols = unpack_bytes(body, shape)
            elif segment.kind == SPARSE:
                symbols = read_sparse(body, shape, 2 * MAX_COARSE)
            else:
                expected = "rANS, bytes or sparse"
                raise CorruptError("kind of pass 0", got=segment.kind, expected=expected)
            ladder = Ladder(_coarse_values(symbols), ())
            continue
        if segment.kind == RANS:
            digits = native.decode_segment(
                body,
                *shape,
                (2 * rows).astype(np.uint16),
                refine_tables(),
                contexts=contexts(ladder, index),
            )
        elif segment.kind == PACKED and segment.bits == DIGIT_BITS:
            digits = unpack(body, DIGIT_BITS, shape)
        else:
            raise CorruptError("kind of a pass", got=segment.kind, expected="rANS or 2 bits")
        if digits.size and int(digits.max()) > 2:
            raise CorruptError("digit", got=int(digits.max()), expected="0 to 2")
        ladder = Ladder(ladder.coarse, (*ladder.digits, digits))
    return ladder


def _coarse_values(symbols: Digits) -> NDArray[np.int16]:
    if symbols.size and int(symbols.max()) > 2 * MAX_COARSE:
        raise CorruptError("symbol of pass 0", got=int(symbols.max()), expected="0 to 254")
    value = symbols.astype(np.int16)
    magnitude = (value + 1) // 2
    return np.where(value % 2 == 1, -magnitude, magnitude).astype(np.int16)


def order(segments: Sequence[SegmentBody]) -> list[SegmentBody]:
    """Order the payload: every pass 0 with its side information, then refinements by slope.

    The slope is the distortion a pass removes for each of its bytes. A pass never comes before the
    one it refines: where a later pass has the steeper slope, both go as one.
    """
    first = [segment for segment in segments if segment.pass_index == 0]
    left = {s.group: s.distortion for s in first if s.kind != SIDE}
    runs: list[tuple[float, int, list[SegmentBody]]] = []
    by_group: dict[int, list[SegmentBody]] = {}
    for segment in segments:
        if segment.pass_index > 0:
            by_group.setdefault(segment.group, []).append(segment)
    for group, later in by_group.items():
        hull: list[tuple[float, int, list[SegmentBody]]] = []
        before = left[group]
        for segment in later:
            gain, size, run = before - segment.distortion, max(len(segment.body), 1), [segment]
            before = segment.distortion
            while hull and gain * hull[-1][1] > hull[-1][0] * size:
                earlier_gain, earlier_size, earlier = hull.pop()
                gain, size, run = gain + earlier_gain, size + earlier_size, earlier + run
            hull.append((gain, size, run))
        runs += [(gain / size, -index, run) for index, (gain, size, run) in enumerate(hull)]
    # Sorting is stable and slopes fall within a group, so precedence holds.
    runs.sort(key=lambda entry: -entry[0])
    return [*first, *(segment for _, _, run in runs for segment in run)]
