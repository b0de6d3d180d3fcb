"""Passes of the ``progressive`` codec: digits to segments and back, classes, payload order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.codec.container import BYTES, PACKED, RANS, SIDE
from cachegen.codec.entropy import pack, unpack, unpack_bytes
from cachegen.codec.header import SegmentBody
from cachegen.codec.ladder import (
    CLASSES,
    FAMILIES,
    MAX_COARSE,
    ROWS,
    Digits,
    Floats,
    Ladder,
    class_offsets,
    coarse_freqs,
    contexts,
    refine_freqs,
    row_of,
)
from cachegen.codec.reader import ObjectReader
from cachegen.errors import CorruptError

TOTAL = 4096
ESCAPE_BITS = 8
DIGIT_BITS = 2
# Streams this long make lane states cheap (0.008 bit/value a pass); they still are restart points.
STREAM_STEPS = 4096
DECAYS = (0, 32, 64, 96)
DECAY_SAMPLE = 8
_OFFSETS = range(-12, 13)


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
def coarse_costs() -> NDArray[np.float64]:
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
def refine_costs() -> NDArray[np.float64]:
    """Bits of a digit in each context, (families, rows, 6)."""
    return -np.log2(refine_freqs() / TOTAL).reshape(FAMILIES, ROWS, 6)


def _code_lengths(ladder: Ladder) -> NDArray[np.float64]:
    """Return the bits of every channel under every family and class, (families * classes, N)."""
    scale = np.arange(CLASSES)
    histograms = native.count_digits(ladder.coarse, ladder.digits)
    bits = np.zeros((FAMILIES * CLASSES, ladder.coarse.shape[1]))
    for index, counts in enumerate(histograms):
        rows = row_of(scale, ladder.passes - 1 - index)
        costs = (coarse_costs() if index == 0 else refine_costs())[:, rows]
        bits += costs.reshape(len(bits), -1) @ np.ascontiguousarray(counts.T)
    return bits


def fit_classes(ladder: Ladder) -> NDArray[np.uint8]:
    """Choose for every channel the family and class with the shortest code: family * 64 + class."""
    best: NDArray[np.uint8] = _code_lengths(ladder).argmin(axis=0).astype(np.uint8)
    return best


def fit_offset(ladder: Ladder, classes_at: Callable[[int], NDArray[np.uint8]]) -> int:
    """Choose the shift of a profile's classes with the shortest code."""
    bits = _code_lengths(ladder)
    columns = np.arange(bits.shape[1])
    return min(_OFFSETS, key=lambda shift: float(bits[classes_at(shift), columns].sum()))


def fit_decay(
    scaled: Floats, ladder: Ladder, scale_class: NDArray[np.integer]
) -> tuple[int, list[float]]:
    """Choose the decay within cells that reconstructs best, on a sample of the tokens.

    Returns: the decay in 1/64, and the squared error left after each pass, in squared finest steps.
    """

    offsets = np.stack([decay_offsets(ladder.passes, decay) for decay in DECAYS])
    classes = np.ascontiguousarray(scale_class, np.uint8)

    def errors(offsets: Floats, stride: int) -> NDArray[np.float64]:
        return native.ladder_errors(
            scaled, ladder.coarse, ladder.digits, classes=classes, offsets=offsets, stride=stride
        )

    # Relative errors of all passes count the same.
    sampled = np.log(np.maximum(errors(offsets, DECAY_SAMPLE), 1e-30)).sum(axis=1)
    best = int(sampled.argmin())
    return DECAYS[best], errors(offsets[best : best + 1], 1)[0].tolist()


@functools.cache
def decay_offsets(total: int, decay: int) -> Floats:
    """Return the offsets of every pass and class, (passes, 2, 64) float32."""
    return np.stack([class_offsets(total, present, decay) for present in range(1, total + 1)])


def write(
    group: int, ladder: Ladder, classes: NDArray[np.uint8], distortions: Sequence[float]
) -> list[SegmentBody]:
    """Code all passes of a group."""
    family, scale = classes // CLASSES, classes % CLASSES
    value = ladder.coarse.astype(np.int64)
    symbols = (2 * np.abs(value) - (value < 0)).astype(np.uint8)
    rows = family.astype(np.int64) * ROWS + row_of(scale, ladder.passes - 1)
    body = native.encode_segment(
        symbols, rows.astype(np.uint16), coarse_tables(), stream_steps=STREAM_STEPS
    )
    if len(body) < symbols.size:
        segments = [SegmentBody(group, 0, RANS, body, distortions[0])]
    else:
        segments = [SegmentBody(group, 0, BYTES, symbols.tobytes(), distortions[0])]
    for index, digits in enumerate(ladder.digits, 1):
        rows = family.astype(np.int64) * ROWS + row_of(scale, ladder.passes - 1 - index)
        body = native.encode_segment(
            digits,
            (2 * rows).astype(np.uint16),
            refine_tables(),
            contexts=contexts(ladder, index),
            stream_steps=STREAM_STEPS,
        )
        packed = pack(digits, DIGIT_BITS) if len(body) >= digits.size // 4 else b""
        if packed and len(packed) <= len(body):
            entry = SegmentBody(group, index, PACKED, packed, distortions[index], DIGIT_BITS)
        else:
            entry = SegmentBody(group, index, RANS, body, distortions[index])
        segments.append(entry)
    return segments


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
            else:
                raise CorruptError("kind of pass 0", got=segment.kind, expected="rANS or bytes")
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
