import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from cachegen.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from cachegen.store import LocalStore, MemoryStore, Store, TieredStore, deadline, open_store
from cachegen.store.base import BytesLike


class Switchable(MemoryStore):
    """A store that can be down, or whose writes can wait."""

    def __init__(self, quota_bytes: int | None = None) -> None:
        super().__init__(quota_bytes)
        self.down = False
        self.gate = threading.Event()
        self.gate.set()
        self.puts = 0
        self.gets = 0

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailableError("connection", reason="refused")

    def put(self, name: str, data: BytesLike) -> None:
        self._check()
        self.puts += 1
        assert self.gate.wait(20)
        super().put(name, data)

    def get(self, name: str) -> bytes | None:
        self._check()
        self.gets += 1
        return super().get(name)

    def exists(self, names: Sequence[str]) -> list[bool]:
        self._check()
        return super().exists(names)

    def delete(self, name: str) -> None:
        self._check()
        super().delete(name)


def held(store: Store, name: str) -> bytes | None:
    return MemoryStore.get(store, name) if isinstance(store, MemoryStore) else store.get(name)


@pytest.fixture
def near() -> Switchable:
    return Switchable()


@pytest.fixture
def home() -> Switchable:
    return Switchable()


def test_write_through_is_everywhere_at_once(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home])
    store.put("a", b"value")
    assert held(near, "a") == held(home, "a") == b"value"
    assert store.put_if_absent("a", b"other") is False
    assert store.put_if_absent("b", b"new") is True
    assert held(near, "b") == held(home, "b") == b"new"
    store.delete("a")
    assert held(near, "a") is held(home, "a") is None


def test_reads_prefer_the_nearest_and_promote_what_is_read_whole(
    near: Switchable, home: Switchable
) -> None:
    store = TieredStore([near, home])
    home.put("a", b"value")
    assert store.get("a") == b"value"
    assert store.flush(10)
    assert held(near, "a") == b"value"
    gets = home.gets
    assert store.get("a") == b"value"
    assert home.gets == gets
    stats = store.stats()
    assert (stats["tier1.hits"], stats["tier0.hits"], stats["copies"]) == (1, 1, 1)
    assert store.get("none") is None
    assert store.stats()["misses"] == 1


def test_promotion_can_be_switched_off(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home], promote=False)
    home.put("a", b"value")
    for _ in range(3):
        assert store.get("a") == store.get_range("a", 0, 5) == b"value"
    assert store.flush(10)
    assert held(near, "a") is None


def test_prefixes_are_promoted_when_read_again(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home])
    home.put("a", b"value")
    # One load of a prefix reads its beginning once and more of it later.
    assert store.get_range("a", 0, 2) == b"va"
    assert store.get_range("a", 2, 4) == b"lu"
    assert store.flush(10)
    assert held(near, "a") is None
    assert b"".join(store.get_stream("a", slice_bytes=2) or ()) == b"value"
    assert store.flush(10)
    assert held(near, "a") == b"value"


def test_a_far_tier_that_fails_is_no_miss(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home])
    store.put("a", b"value")
    home.down = True
    assert store.get("a") == b"value"
    assert store.exists(["a"]) == [True]
    for call in (
        lambda: store.get("b"),
        lambda: store.get_range("b", 0, 1),
        lambda: store.get_stream("b", slice_bytes=1),
        lambda: store.exists(["a", "b"]),
        lambda: store.put("b", b"x"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(StoreUnavailableError):
            call()
    assert held(near, "a") is None  # deleted where it could be
    assert held(near, "b") is None  # home comes first, so no tier is ahead of it
    assert store.stats()["tier1.failures.refused"] == 6


def test_a_near_tier_that_fails_is_passed_over(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home])
    store.put("a", b"old")
    near.down = True
    store.put("b", b"value")
    assert store.get("b") == b"value"
    assert store.exists(["a", "b"]) == [True, True]
    near.down = False
    # A value too large for the near tier must not leave the old one readable there.
    small = Switchable(10)
    store = TieredStore([small, home])
    store.put("a", b"old")
    store.put("a", b"new but too large")
    assert store.get("a") == b"new but too large"
    assert held(small, "a") is None


def test_write_back_returns_before_home_has_it(near: Switchable, home: Switchable) -> None:
    home.gate.clear()
    store = TieredStore([near, home], write="back")
    for version in (b"one", b"two", b"three"):
        store.put("a", version)
    assert held(home, "a") is None
    assert store.get("a") == b"three"
    MemoryStore.delete(near, "a")  # evicted before it was written
    assert store.get("a") == b"three"
    assert store.get_range("a", 1, 3) == b"hr"
    assert store.exists(["a"]) == [True]
    assert store.put_if_absent("a", b"x") is False
    assert store.flush(0.01) is False
    home.gate.set()
    assert store.close(10) is True
    assert held(home, "a") == b"three"
    assert home.puts <= 2  # what was replaced while it waited was never sent


def test_a_full_queue_makes_puts_wait_for_home(near: Switchable, home: Switchable) -> None:
    home.gate.clear()
    store = TieredStore([near, home], write="back", queue_bytes=10)
    store.put("a", b"12345678")
    done = threading.Event()

    def put() -> None:
        store.put("b", b"12345678")
        done.set()

    thread = threading.Thread(target=put)
    thread.start()
    assert not done.wait(0.05)
    home.gate.set()
    thread.join(10)
    assert done.is_set()
    assert store.close(10)
    assert held(home, "a") == held(home, "b") == b"12345678"
    assert store.stats()["queue.full"] == 1


def test_failures_of_late_writes_are_counted_and_the_rest_goes_on(
    near: Switchable, home: Switchable
) -> None:
    store = TieredStore([near, home], write="back")
    home.down = True
    store.put("a", b"value")
    assert store.flush(10)
    home.down = False
    store.put("b", b"value")
    assert store.flush(10)
    assert held(home, "a") is None and held(home, "b") == b"value"
    stats = store.stats()
    assert (stats["queue.failed"], stats["queue.failed.refused"], stats["queue.done"]) == (1, 1, 1)


def test_deletion_reaches_what_waits(near: Switchable, home: Switchable) -> None:
    home.gate.clear()
    store = TieredStore([near, home], write="back")
    store.put("a", b"value")
    while not home.puts:
        pass  # until the write to home is under way
    store.put("b", b"value")
    store.delete("b")
    with pytest.raises(StoreTimeoutError), deadline(0.05):
        store.delete("a")
    home.gate.set()
    store.delete("a")
    assert store.close(10)
    assert held(home, "a") is held(home, "b") is None


def test_after_closing_everything_is_written_through(near: Switchable, home: Switchable) -> None:
    store = TieredStore([near, home], write="back")
    store.close()
    store.put("a", b"value")
    assert held(home, "a") == b"value"


def test_a_forked_child_has_a_queue_of_its_own(tmp_path: Path) -> None:
    store = TieredStore([MemoryStore(), LocalStore(tmp_path / "s")], write="back")
    store.put("parent", b"value")
    assert store.flush(10)
    pid = os.fork()
    if pid == 0:
        store.put("child", b"value")
        os._exit(0 if store.close(10) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.get("child") == b"value"


def test_a_process_that_ends_writes_what_waits(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from cachegen.store import LocalStore, MemoryStore, TieredStore\n"
        "class Slow(LocalStore):\n"
        "    def put(self, name, data):\n"
        "        time.sleep(0.3)\n"
        "        super().put(name, data)\n"
        "store = TieredStore([MemoryStore(), Slow(sys.argv[1])], write='back')\n"
        "store.put('a', b'value')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "s")], check=True, timeout=60)
    assert LocalStore(tmp_path / "s").get("a") == b"value"


def test_listing_counts_each_value_once(tmp_path: Path) -> None:
    url = f"tiered:memory://?quota=1KiB,file://{tmp_path}/s"
    store = open_store(url)
    assert isinstance(store, TieredStore)
    for number in range(5):
        store.put(f"n/{number}", bytes(400))
    assert sorted(store.names()) == [f"n/{number}" for number in range(5)]
    assert store.used_bytes() == 2000


def test_too_few_tiers_and_full_tiers(near: Switchable) -> None:
    with pytest.raises(ConfigError, match="tiers"):
        TieredStore([near])
    with pytest.raises(ConfigError, match="backlog"):
        TieredStore([near, near], queue_bytes=0)
    store = TieredStore([near, MemoryStore(10)])
    with pytest.raises(StoreFullError):
        store.put("a", bytes(100))
    assert held(near, "a") is None
    assert issubclass(StoreFullError, StoreError)
