"""Whole planes of ``int8`` and ``cachegen``: equal to the steps of the NumPy twin, one by one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cachegen import native
from cachegen.codec import entropy
from cachegen.errors import GeometryError, NonFiniteError
from cachegen.native import _core, fused, reference
from cachegen.types import Array

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
SHAPES = [(0, 2, 4), (1, 1, 1), (33, 3, 20), (70, 2, 64), (257, 1, 33)]


def plane_of(shape: tuple[int, int, int], dtype: type, seed: int = 0) -> Array:
    """Channels of all kinds: wide, narrow, always zero."""
    rng = np.random.default_rng(seed)
    tokens, heads, dim = shape
    spread = np.exp(rng.normal(size=heads * dim)) * (rng.random(heads * dim) < 0.9)
    values = rng.normal(size=(tokens, heads * dim)) * spread
    return values.reshape(shape).astype(dtype)


def twin(plane: Array, levels: int, *, per_head: bool, low_bits: int, frozen: bool) -> tuple:
    """Do the same in NumPy: scales, kind, tables, body, low digits."""
    symbols, scales = reference.quantize(plane, levels, per_head=per_head)
    channels = symbols.shape[1]
    shift = low_bits or entropy.digit_shift(levels)
    counted = symbols >> np.uint8(shift)
    if frozen:
        models = entropy.fit_parametric_by_numpy(counted)
        coded = entropy.rotate(symbols, models.rotations, shift, back=False)
        side, index = models.to_bytes(), models.classes.astype(np.uint16)
        freqs = np.load(entropy.resources.files("cachegen.codec") / "tables_v1.npy")
    else:
        size = entropy.alphabet_size(levels)
        freqs = entropy.normalize_counts(entropy.histogram(counted, size))
        coded, side, index = symbols, freqs.tobytes(), np.arange(channels, dtype=np.uint16)
    shifts = None if low_bits or not shift else np.full(channels, shift, np.uint8)
    body = b""
    if symbols.size:
        body = reference.encode_segment(
            coded >> np.uint8(low_bits),
            index,
            reference.Tables(freqs, None),
            shifts=shifts,
            stream_steps=entropy.stream_steps(channels),
        )
    low = entropy.pack(symbols, low_bits)
    if not symbols.size and not low_bits:
        side = b""
    plain = 5 * ((symbols.size + 7) // 8) if low_bits else symbols.size
    if len(body) + len(side) < plain:
        return scales, fused.RANS, side, body, low
    if low_bits:
        return scales, fused.PACKED, b"", entropy.pack(counted, 5), low
    return scales, fused.BYTES, b"", symbols.tobytes(), low


def check(plane: Array, levels: int, *, per_head: bool, low_bits: int, frozen: bool) -> int:
    (found,) = native.encode_planes(
        [plane],
        [levels],
        per_head=per_head,
        tables=entropy.frozen_tables() if frozen else entropy.bits_saved(),
        low_bits=low_bits,
    )
    scales, kind, tables, body, low = twin(
        plane, levels, per_head=per_head, low_bits=low_bits, frozen=frozen
    )
    np.testing.assert_array_equal(found.scales.astype(np.float32), scales.astype(np.float32))
    assert (found.kind, found.tables) == (kind, tables)
    assert found.body.tobytes() == body
    assert found.low.tobytes() == low
    return kind


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_digits_apart(shape: tuple[int, int, int], dtype: type, isa: str) -> None:
    check(plane_of(shape, dtype), 127, per_head=True, low_bits=3, frozen=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("levels", [1, 7, 15, 31, 127])
def test_tables_of_the_chunk_and_frozen_ones(levels: int, frozen: bool, isa: str) -> None:
    for shape in SHAPES:
        plane = plane_of(shape, ml_dtypes.bfloat16, seed=levels)
        check(plane, levels, per_head=False, low_bits=0, frozen=frozen)


def test_every_kind_is_chosen(isa: str) -> None:
    wide, small = plane_of((257, 1, 33), np.float32), plane_of((2, 1, 64), np.float32)
    args = {"per_head": True, "low_bits": 3, "frozen": True}
    assert {check(plane, 127, **args) for plane in (wide, small)} == {fused.RANS, fused.PACKED}
    args = {"per_head": True, "low_bits": 0, "frozen": False}
    assert {check(plane, 7, **args) for plane in (wide, small)} == {fused.RANS, fused.BYTES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("exponent", [-120, -76, 0, 12])
def test_quotients_that_are_ties(dtype: type, exponent: int, isa: str) -> None:
    """Whole numbers over a maximum of 2 * levels end in a half every other time."""
    rng = np.random.default_rng(exponent + 200)
    for levels in (1, 3, 15, 100, 127):
        values = rng.integers(-2 * levels, 2 * levels + 1, (40, 1, 70)).astype(np.float64)
        values[:, :, 0] = 2 * levels
        with np.errstate(under="ignore", over="ignore"):
            plane = (values * 2.0**exponent).astype(dtype)
        if not np.isfinite(plane.astype(np.float64)).all():
            continue
        symbols, scales = native.quantize(plane, levels, per_head=True)
        wanted, other = reference.quantize(plane, levels, per_head=True)
        np.testing.assert_array_equal(symbols, wanted)
        np.testing.assert_array_equal(scales.astype(np.float64), other.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_all_quotients_of_16_bit_types(dtype: type, isa: str) -> None:
    """Every magnitude over some maxima, which decides what a reciprocal may do."""
    bits = np.arange(1, 0x7C00 if dtype is np.float16 else 0x7F80, dtype=np.uint16)
    every = bits.view(dtype)
    rng = np.random.default_rng(1)
    for most in rng.choice(len(every) * 3 // 4, 25):
        plane = every[: most + 1][-3000:].reshape(1, 1, -1)
        if plane.astype(np.float64).max() > 2.0**100:
            continue
        symbols, _ = native.quantize(plane, 127, per_head=True)
        wanted, _ = reference.quantize(plane, 127, per_head=True)
        np.testing.assert_array_equal(symbols, wanted)


def test_planes_in_threads_and_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    array = rng.normal(size=(8, 40, 2, 16)).astype(np.float16)
    planes = [array[i].transpose(0, 1, 2) for i in range(6)] + [array[6][::-1], array[7][:, ::-1]]

    def encoded() -> list[tuple[bytes, ...]]:
        found = native.encode_planes(planes, [15] * 8, per_head=False, tables=entropy.bits_saved())
        return [(p.scales.tobytes(), p.tables, p.body.tobytes(), p.low.tobytes()) for p in found]

    monkeypatch.setenv("CACHEGEN_THREADS", "1")
    one = encoded()
    monkeypatch.setenv("CACHEGEN_THREADS", "4")
    assert encoded() == one


def test_the_first_bad_plane_is_named() -> None:
    planes = [np.ones((4, 2, 8), np.float32) for _ in range(5)]
    planes[4][0, 0, 0] = np.nan
    planes[2][3, 1, 5] = np.inf
    with pytest.raises(NonFiniteError, match="token 3, head 1, dimension 5"):
        native.encode_planes(
            planes, [127] * 5, per_head=True, tables=entropy.frozen_tables(), low_bits=3
        )


def test_bodies_outlive_the_encoder() -> None:
    """The next call takes the memory of bodies that are gone, not of those that are held."""
    plane = plane_of((64, 2, 64), np.float32)

    def encode(values: Array) -> list[native.EncodedPlane]:
        return native.encode_planes(
            [values] * 3, [127] * 3, per_head=True, tables=entropy.frozen_tables(), low_bits=3
        )

    held = encode(plane)
    before = [one.body.tobytes() for one in held]
    for seed in range(4):
        encode(plane_of((64, 2, 64), np.float32, seed=seed + 1))
    assert [one.body.tobytes() for one in held] == before


def test_refuses_what_leaves_too_many_values() -> None:
    plane = np.ones((4, 2, 8), np.float32)
    with pytest.raises(GeometryError):
        native.encode_planes(
            [plane], [127], per_head=True, tables=entropy.frozen_tables(), low_bits=2
        )
    with pytest.raises(GeometryError):
        native.encode_planes([plane], [128], per_head=True, tables=entropy.bits_saved())
    with pytest.raises(GeometryError):
        native.encode_planes([plane], [127], per_head=True, tables=np.zeros(4096))
    with pytest.raises(GeometryError):
        _core.PlaneEncoder("float32", [], True, 0, None, None, None, 1)
