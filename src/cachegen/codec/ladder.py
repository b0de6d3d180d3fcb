"""Nested ternary quantisation: one index for every quality, cut into passes.

A coefficient ``x``, in units of the finest step, is coarsely placed in a cell by pass 0; every
later pass cuts the cell into three. With ``P`` passes the steps are ``3**(P-1), ..., 3, 1``. Zero
reaches to 0.6 of a pass's step (the dead zone, where rate-distortion-optimised rounding puts the
edge for the distributions at hand), so each pass is as good a quantiser as one made for its step:

- zero so far: does it become significant, and with which sign? Its cell is then
  ``[0.6 s, 1.8 s)`` for the step ``s`` of the pass;
- not zero so far: in which third of its cell, counted from zero, does its magnitude lie?
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Digits = NDArray[np.uint8]

DEAD_ZONE = 0.6
# Cells of values that become significant after pass 0, in one finest step.
LATE_CELLS = np.float32(1) / np.float32(2 * DEAD_ZONE)
FAMILIES = 3
CLASSES = 64
CLASSES_PER_FACTOR_3 = 6
BASE_DEVIATION = 0.08
LOWEST_ROW = -24
ROWS = 88
MAX_COARSE = 127


@functools.cache
def coarse_freqs() -> NDArray[np.uint16]:
    """Return the frozen tables of pass 0, (families, rows, 32) uint16.

    Symbols are values in the order 0, -1, 1, -2, 2, ...; the last one of a row that has a frequency
    is its escape.
    """
    return _load("ladder_coarse_v1.npy")


@functools.cache
def refine_freqs() -> NDArray[np.uint16]:
    """Return the frozen tables of later passes, (families, rows, 2 contexts, 3) uint16."""
    return np.ascontiguousarray(_load("ladder_refine_v1.npy")[..., :3])


def _load(name: str) -> NDArray[np.uint16]:
    with (resources.files("cachegen.codec") / name).open("rb") as file:
        array: NDArray[np.uint16] = np.load(file, allow_pickle=False)
    return array


def row_of(scale_class: NDArray[np.integer], below: int) -> NDArray[np.int64]:
    """Return the table row of a class for the pass whose step is 3**below."""
    row = scale_class.astype(np.int64) - CLASSES_PER_FACTOR_3 * below - LOWEST_ROW
    return np.clip(row, 0, ROWS - 1)


def deviation_of(scale_class: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the standard deviation that a class stands for, in finest steps."""
    return BASE_DEVIATION * 3.0 ** (scale_class / CLASSES_PER_FACTOR_3)


def class_of(deviation: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the class nearest to a standard deviation in finest steps."""
    return np.searchsorted(class_edges(), deviation, side="right").astype(np.uint8)


@functools.cache
def class_edges() -> NDArray[np.float32]:
    """Return the 63 deviations between classes, (63,) float32.

    Compared with, never recomputed through a logarithm per value: encoder and decoder on different
    machines have to agree on every class.
    """
    between = (np.arange(CLASSES - 1) + 0.5) / CLASSES_PER_FACTOR_3
    edges: NDArray[np.float32] = (BASE_DEVIATION * 3.0**between).astype(np.float32)
    return edges


@dataclass(frozen=True)
class Ladder:
    """Digits of a coefficient matrix (T, N).

    coarse: int16, the signed index of pass 0. digits: uint8, a matrix for each later pass, 0 to 2:
    where the value was zero before, negative, zero or positive; else the third of its cell.
    """

    coarse: NDArray[np.int16]
    digits: tuple[Digits, ...]

    @property
    def passes(self) -> int:
        """Number of passes held."""
        return 1 + len(self.digits)


def climb(values: Floats, passes: int) -> Ladder:
    """Quantise coefficients, in finest steps, to the digits of all passes.

    A magnitude that pass 0 does not leave at zero is, with 0.4 steps of pass 0 added, cut to an
    integer: the quotient by that step is the index, the remainder has the digits, in base 3. Any
    other magnitude is rounded to a multiple of 1.2: its digits in balanced ternary, the first one
    with the sign, the others plus 1, are those of the passes (docs/fused-encode.md).
    Magnitudes beyond the reach of pass 0 are clamped; see ``reach``.
    """
    step = 3 ** (passes - 1)
    half = (step - 1) // 2
    magnitude = np.minimum(np.abs(values), np.float32((MAX_COARSE + 1) * step))
    shifted = (magnitude + np.float32(1 - DEAD_ZONE) * np.float32(step)).astype(np.int32)
    early = np.minimum(shifted, (MAX_COARSE + 1) * step - 1)
    late = (magnitude * LATE_CELLS + np.float32(0.5)).astype(np.int32)
    index = early // step
    negative = values < 0
    coarse = np.where(negative, -index, index).astype(np.int16)
    seen = index > 0
    rest = np.where(seen, early % step, np.minimum(late, half) + half)
    digits = []
    for below in range(passes - 2, -1, -1):
        digit, rest = np.divmod(rest, 3**below)
        sign = ~seen & negative & (digit == 2)
        digits.append(np.where(sign, 0, digit).astype(np.uint8))
        seen |= digit != 1
    return Ladder(coarse, tuple(digits))


def reach(passes: int) -> float:
    """Return the largest magnitude, in finest steps, that pass 0 can hold."""
    return float((MAX_COARSE + DEAD_ZONE) * 3 ** (passes - 1))


def contexts(ladder: Ladder, index: int) -> Digits:
    """Return which values are not zero before pass ``index`` >= 1: the contexts of its digits."""
    seen = ladder.coarse != 0
    for digits in ladder.digits[: index - 1]:
        seen = seen | (digits != 1)
    result: Digits = seen.astype(np.uint8)
    return result


def descend(ladder: Ladder, passes: int, scale_class: NDArray[np.integer], decay: float) -> Floats:
    """Return the values that the digits stand for, in finest steps, (T, N) float32.

    passes: of the whole object; the ladder may hold fewer. scale_class: (N,) or (T, N).
    decay: how fast densities fall within a cell, relative to a Laplace density of the class's
        deviation; 0 puts values into the middle of their cells.
    """
    step = np.float32(3.0 ** (passes - 1))
    index = np.abs(ladder.coarse).astype(np.float32)
    negative = ladder.coarse < 0
    significant = index > 0
    low = (index - np.float32(1 - DEAD_ZONE)) * step
    # Cells are one step wide, or 1.2 for values that became significant after pass 0.
    late = np.zeros(index.shape, bool)
    wide = np.float32(2 * DEAD_ZONE)
    for digits in ladder.digits:
        step /= np.float32(3)
        fresh = ~significant & (digits != 1)
        negative |= fresh & (digits == 0)
        low += digits * np.where(late, wide * step, step)
        low[~significant] = np.float32(DEAD_ZONE) * step
        late |= fresh
        significant |= fresh
    slope = (np.sqrt(2.0) * decay / deviation_of(scale_class)).astype(np.float32)
    early, later = step * centroid(step * slope), wide * step * centroid(wide * step * slope)
    value = low + np.where(late, later, early)
    value[~significant] = 0
    np.negative(value, out=value, where=negative)
    return value


def class_offsets(total: int, present: int, decay: int) -> Floats:
    """Return what the values of each class are moved by, in steps of the last pass present.

    total, present: passes of the object and those at hand. decay: in 1/64.
    Returns: (2, 64) float32: for values significant since pass 0, and for those since a later pass.
        With csrc/ladder.h's numbers v, ``descend`` gives v + offset, or 0.6 v + offset.
    """
    early, late = cell_shares(total, present, decay)
    late = np.float32(2 * DEAD_ZONE) * late
    return np.stack([early - np.float32((1 - DEAD_ZONE) * 3 ** (present - 1)), late])


def cell_shares(total: int, present: int, decay: int) -> Floats:
    """Return where values of each class lie in their cells, as shares of the width.

    total, present, decay: as in ``class_offsets``. Returns: (2, 64) float32: cells of one step, of
        values significant since pass 0, and of 1.2 steps.
    """
    step = np.float32(3.0 ** (total - present))
    slope = (np.sqrt(2.0) * (decay / 64) / deviation_of(np.arange(CLASSES))).astype(np.float32)
    wide = np.float32(2 * DEAD_ZONE)
    return np.stack([centroid(step * slope), centroid(wide * step * slope)])


def centroid(fall: Floats) -> Floats:
    """Return where the centroid of a cell lies, as a share of its width from the inner edge.

    fall: by which the log density falls over the cell. For an exponential density it is
    ``1 / fall - 1 / (exp(fall) - 1)``, 1/2 for a flat one.
    """
    small = fall < 0.02
    safe = np.where(small, np.float32(1), np.minimum(fall, np.float32(60)))
    exact = 1 / safe - 1 / np.expm1(safe)
    share: Floats = np.where(small, 0.5 - fall / 12, exact).astype(np.float32)
    return share
