"""Small kernels against NumPy, on every instruction set, and what concerns all kernels."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cachegen import native
from cachegen.errors import ConfigError, TruncatedError


def coefficients(rows: int, columns: int, count: int) -> np.ndarray:
    rng = np.random.default_rng([rows, columns, count])
    spread = np.exp(rng.normal(0, 2, columns)) * 3 ** (count - 1)
    values = (rng.laplace(size=(rows, columns)) * spread).astype(np.float32)
    values[: rows // 2, :3] = 0
    values[0, -1] = -0.0
    return values


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


def test_a_thread_may_be_alone() -> None:
    counts = []

    def work() -> None:
        native.use_one_thread()
        counts.append(native.threads())

    before = native.threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts == [1]
    assert native.threads() == before  # the others go on as they were


def test_a_body_is_verified_without_keeping_symbols() -> None:
    rng = np.random.default_rng(2)
    tables = native.Tables(np.full((1, 16), 256, np.uint16))
    symbols = rng.integers(0, 16, (70, 33)).astype(np.uint8)
    models = np.zeros(33, np.uint16)
    body = bytearray(native.encode_segment(symbols, models, tables, stream_steps=20))
    native.verify_segment(body, 70, 33, models, tables)
    with pytest.raises(TruncatedError):
        native.verify_segment(body[:-4], 70, 33, models, tables)
