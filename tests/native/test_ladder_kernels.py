"""Kernels of the progressive encoder against NumPy, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cachegen import native
from cachegen.codec import ladder, passes
from cachegen.errors import ConfigError, TruncatedError


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


def coefficients(rows: int, columns: int, count: int) -> np.ndarray:
    rng = np.random.default_rng([rows, columns, count])
    spread = np.exp(rng.normal(0, 2, columns)) * 3 ** (count - 1)
    values = (rng.laplace(size=(rows, columns)) * spread).astype(np.float32)
    values[: rows // 2, :3] = 0
    values[0, -1] = -0.0
    return values


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize(("rows", "columns"), [(77, 83), (1, 1), (33, 130)])
def test_digits_equal_numpy(isa: str, rows: int, columns: int, count: int) -> None:
    values = coefficients(rows, columns, count)
    wanted = ladder.climb(values, count)
    coarse, digits = native.climb(values, count)
    np.testing.assert_array_equal(coarse, wanted.coarse)
    assert len(digits) == count - 1
    for ours, theirs in zip(digits, wanted.digits, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_counts_equal_numpy() -> None:
    held = ladder.Ladder(*native.climb(coefficients(50, 9, 3), 3))
    counts = native.count_digits(held.coarse, held.digits)
    for channel in range(9):
        magnitude = np.minimum(np.abs(held.coarse[:, channel]), 16)
        np.testing.assert_array_equal(counts[0][channel], np.bincount(magnitude, minlength=17))
        for index, digits in enumerate(held.digits, 1):
            both = 3 * ladder.contexts(held, index)[:, channel] + digits[:, channel]
            np.testing.assert_array_equal(counts[index][channel], np.bincount(both, minlength=6))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_errors_are_those_of_descend(isa: str, count: int) -> None:
    values = coefficients(70, 83, count)
    held = ladder.Ladder(*native.climb(values, count))
    classes = np.random.default_rng(1).integers(0, 64, 83).astype(np.uint8)
    _, errors = passes.fit_decay(values, held, classes)
    offsets = np.stack([ladder.class_offsets(count, p, 32) for p in range(1, count + 1)])[None]
    ours = native.ladder_errors(
        values, held.coarse, held.digits, classes=classes, offsets=offsets, stride=1
    )[0]
    for present in range(1, count + 1):
        part = ladder.Ladder(held.coarse, held.digits[: present - 1])
        left = ladder.descend(part, count, classes, 0.5) - values
        wanted = np.square(left, dtype=np.float64).sum()
        np.testing.assert_allclose(ours[present - 1], wanted, rtol=1e-4)
    assert len(errors) == count


@pytest.mark.parametrize("rows", [1, 2, 7, 256])
def test_medians_equal_numpy(isa: str, rows: int) -> None:
    values = coefficients(256, 83, 2)[:rows]
    np.testing.assert_array_equal(native.column_medians(values), np.median(values, axis=0))


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("CACHEGEN_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert native.threads() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert native.threads() == 3
    monkeypatch.setenv("CACHEGEN_THREADS", "99")
    assert native.threads() == 8
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("CACHEGEN_THREADS", wrong)
        with pytest.raises(ConfigError, match="CACHEGEN_THREADS"):
            native.threads()


def test_a_body_is_verified_without_keeping_symbols() -> None:
    rng = np.random.default_rng(2)
    tables = native.Tables(np.full((1, 16), 256, np.uint16))
    symbols = rng.integers(0, 16, (70, 33)).astype(np.uint8)
    models = np.zeros(33, np.uint16)
    body = bytearray(native.encode_segment(symbols, models, tables, stream_steps=20))
    native.verify_segment(body, 70, 33, models, tables)
    with pytest.raises(TruncatedError):
        native.verify_segment(body[:-4], 70, 33, models, tables)
