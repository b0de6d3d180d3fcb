import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachegen.errors import ConfigError, StoreError, StoreTimeoutError
from cachegen.store import LocalStore, carry_deadline, deadline, remaining_s
from cachegen.store.base import check_deadline
from cachegen.store.ledger import lock_ledger


def test_without_a_deadline_there_is_no_bound() -> None:
    assert remaining_s() is None
    check_deadline("read")
    with deadline(None):
        assert remaining_s() is None


def test_the_earlier_of_nested_deadlines_holds() -> None:
    with deadline(100):
        with deadline(5):
            assert 4 < (remaining_s() or 0) <= 5
            with deadline(50):
                assert (remaining_s() or 0) <= 5
            with deadline(None):
                assert (remaining_s() or 0) <= 5
        assert 90 < (remaining_s() or 0) <= 100
    assert remaining_s() is None


def test_a_deadline_that_has_passed() -> None:
    with deadline(0.0):
        assert remaining_s() == 0.0
        with pytest.raises(StoreTimeoutError, match="read") as caught:
            check_deadline("read")
    assert isinstance(caught.value, StoreError)
    assert caught.value.reason == "timeout"
    with deadline(-3):
        assert remaining_s() == 0.0


def test_a_deadline_is_a_number() -> None:
    with pytest.raises(ConfigError, match="deadline"), deadline(math.nan):
        pass


def test_a_deadline_ends_with_its_block_also_by_an_error() -> None:
    with pytest.raises(KeyError), deadline(1):
        raise KeyError
    assert remaining_s() is None


def test_threads_take_a_deadline_along_only_when_told() -> None:
    with ThreadPoolExecutor(1) as pool, deadline(10):
        assert pool.submit(remaining_s).result() is None
        carried = pool.submit(carry_deadline(remaining_s)).result()
        assert carried is not None and 9 < carried <= 10
        assert pool.submit(remaining_s).result() is None


def test_waiting_for_the_lock_of_a_local_store_ends_at_the_deadline(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    release = threading.Event()
    held = threading.Event()

    def hold() -> None:
        with lock_ledger(store.path):
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    begin = time.monotonic()
    try:
        with deadline(0.05), pytest.raises(StoreTimeoutError, match="lock"):
            store.put("a", b"x")
        assert time.monotonic() - begin < 2.0
    finally:
        release.set()
        thread.join()
    store.put("a", b"x")
