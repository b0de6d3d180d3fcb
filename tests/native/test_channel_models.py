"""Counts, frequencies and classes of channels: equal to NumPy's, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen import native
from cachegen.codec import entropy
from cachegen.errors import GeometryError
from cachegen.native import _core


def symbols_of(tokens: int, channels: int, levels: int) -> np.ndarray:
    rng = np.random.default_rng(tokens + channels)
    centre = rng.uniform(0, 2 * levels, channels)
    spread = rng.uniform(0, levels, channels) * (rng.random(channels) < 0.9)
    values = np.rint(centre + spread * rng.normal(size=(tokens, channels)))
    return np.clip(values, 0, 2 * levels).astype(np.uint8)


SHAPES = [(0, 5), (1, 1), (70, 63), (255, 64), (256, 65), (600, 130)]


@pytest.mark.parametrize("levels", [1, 7, 15, 31, 127])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_and_frequencies(shape: tuple[int, int], levels: int, isa: str) -> None:
    symbols = symbols_of(*shape, levels)
    shift, size = entropy.digit_shift(levels), entropy.alphabet_size(levels)
    counts = native.count_symbols(symbols, size, shift=shift)
    wanted = entropy.histogram(symbols >> np.uint8(shift), size)
    np.testing.assert_array_equal(counts, wanted)
    freqs = native.normalize_counts(counts, entropy.bits_saved())
    np.testing.assert_array_equal(freqs, entropy.normalize_counts(wanted))
    assert (freqs.sum(axis=1) == 4096).all()


@pytest.mark.parametrize("size", [1, 5, 32])
def test_channels_of_one_value(size: int, isa: str) -> None:
    """What 256 tokens share is counted past the eighth bit, unless nobody asks for that value."""
    symbols = np.repeat(np.array([[0, 3, 4, 5, 31, 32, 255]], np.uint8), 256, axis=0)
    counts = native.count_symbols(symbols, size)
    wanted = (symbols[0][:, None] == np.arange(size)) * 256
    np.testing.assert_array_equal(counts, wanted)


def test_frequencies_of_uneven_counts() -> None:
    rng = np.random.default_rng(0)
    rare = rng.integers(0, 3, (200, 31)) * (rng.random((200, 31)) < 0.7)
    rare[:, 0] += 10 ** rng.integers(0, 7, 200)
    rare[0] = 0
    freqs = native.normalize_counts(rare.astype(np.uint32), entropy.bits_saved())
    np.testing.assert_array_equal(freqs, entropy.normalize_counts(rare))


@pytest.mark.parametrize("levels", [15, 60, 127])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_classes(shape: tuple[int, int], levels: int, isa: str) -> None:
    symbols = symbols_of(*shape, levels)
    shift = entropy.digit_shift(levels)
    ours = entropy.fit_parametric(symbols, shift)
    twin = entropy.fit_parametric_by_numpy(symbols >> np.uint8(shift))
    np.testing.assert_array_equal(ours.classes, twin.classes)
    np.testing.assert_array_equal(ours.rotations, twin.rotations)


def test_classes_of_many_tokens(isa: str) -> None:
    """Counts beyond 16 bits take another way to the same classes."""
    rng = np.random.default_rng(4)
    digits = np.clip(np.rint(rng.normal([9, 16, 30], [1, 6, 2], (40000, 3))), 0, 31)
    ours = entropy.fit_parametric(digits.astype(np.uint8), 0)
    twin = entropy.fit_parametric_by_numpy(digits.astype(np.uint8))
    np.testing.assert_array_equal(ours.classes, twin.classes)
    np.testing.assert_array_equal(ours.rotations, twin.rotations)


def test_refuses_sizes_that_do_not_fit() -> None:
    counts = np.zeros((4, 32), np.uint32)
    costs = np.zeros((16, 129, 2), np.int16)
    rows = np.zeros((2, 4), np.uint8)
    with pytest.raises(GeometryError):
        native.fit_classes(counts, costs)
    with pytest.raises(GeometryError):
        native.normalize_counts(counts, np.zeros(4096))
    with pytest.raises(GeometryError):
        _core.count_symbols(rows, 0, np.zeros((5, 32), np.uint32))
    with pytest.raises(GeometryError):
        _core.count_symbols(rows, 8, counts)
