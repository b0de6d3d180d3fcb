import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachegen.errors import ConfigError, StoreError, StoreFullError, StoreReadOnlyError
from cachegen.store import LocalStore, eviction, files, ledger

CALLS = ("open", "pwrite", "write", "utime", "fsync", "mkdir", "replace", "unlink", "close")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def partials(folder: Path) -> list[str]:
    return os.listdir(folder / "partial")


def recorded_total(store: LocalStore) -> int:
    with store._locked() as book:
        return book.total_bytes


# -- layout -----------------------------------------------------------------------------------


def test_values_are_files_in_shards(folder: Path) -> None:
    store = LocalStore(folder)
    namespace = "ab" * 32
    for i in range(40):
        store.put(f"{namespace}/{i:064x}/0123", b"x")
    files = [path for path in (folder / "objects").rglob("*") if path.is_file()]
    assert len(files) == 40
    assert len({path.parent for path in files}) > 20  # not all in the shard of their namespace
    assert (folder / "cachegen-store").read_bytes() == b"cachegen store 1\n" + b"%020d" % 40
    assert partials(folder) == []


def test_a_second_instance_sees_the_first(folder: Path) -> None:
    LocalStore(folder).put("a/b", b"value")
    other = LocalStore(folder)
    assert other.get("a/b") == b"value"
    assert list(other.names()) == ["a/b"]


def test_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"store path: got a file at {tmp_path}/file"):
            LocalStore(path)


def test_refuses_a_folder_of_other_things(tmp_path: Path) -> None:
    """Evicting in, say, a git repository would destroy it."""
    (tmp_path / "objects" / "ab").mkdir(parents=True)
    (tmp_path / "objects" / "ab" / "precious").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holds 'objects', expected an empty folder"):
        LocalStore(tmp_path, 1)
    assert (tmp_path / "objects" / "ab" / "precious").exists()
    assert sorted(os.listdir(tmp_path)) == ["objects"]


def test_created_by_another_process_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def create_first(path: str) -> list[str]:
        monkeypatch.setattr(os, "listdir", listdir)
        LocalStore(path).put("a", b"first")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", create_first)
    assert LocalStore(folder).get("a") == b"first"


def test_accepts_an_empty_mount_point(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    LocalStore(tmp_path).put("a", b"x")


def test_refuses_another_layout(folder: Path) -> None:
    LocalStore(folder).put("a", b"x")
    (folder / "cachegen-store").write_bytes(b"cachegen store 2\n" + b"0" * 20)
    with pytest.raises(ConfigError, match="layout of the store"):
        LocalStore(folder)


@pytest.mark.parametrize("text", [b"", b"cachegen store 1\n", b"cachegen store 1\n" + b"x" * 20])
def test_damaged_total_is_scanned_anew(folder: Path, text: bytes) -> None:
    LocalStore(folder).put("a", bytes(70))
    (folder / "cachegen-store").write_bytes(text)
    assert recorded_total(LocalStore(folder)) == 70


def test_folder_removed_while_open(folder: Path) -> None:
    store = LocalStore(folder)
    store.put("a", b"x")
    os.rename(folder, folder.with_name("elsewhere"))
    assert store.get("a") is None
    with pytest.raises(StoreError, match="No such file"):
        store.put("a", b"x")


# -- reading ----------------------------------------------------------------------------------


def test_range_reads_only_the_range(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    store.put("a", bytes(range(256)) * 4096)
    read = 0
    pread = os.pread

    def count(fd: int, size: int, offset: int) -> bytes:
        nonlocal read
        read += size
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", count)
    assert store.get_range("a", 1000, 1010) == bytes(range(232, 242))
    assert read == 10


def test_value_is_read_whole_in_many_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_READ_CAP_BYTES", 1000)
    store = LocalStore(folder)
    data = random.Random(1).randbytes(12_345)
    store.put("a", data)
    assert store.get("a") == data
    assert store.get_range("a", 999, 5001) == data[999:5001]


def test_short_writes_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:100]))
    store = LocalStore(folder)
    data = random.Random(1).randbytes(1234)
    store.put("a", data)
    assert store.get("a") == data


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_get_overtaken_by_a_writer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The value goes between opening and reading: the reader still has it whole."""
    store, other = LocalStore(folder), LocalStore(folder)
    store.put("a", b"old" * 1000)
    fstat = os.fstat

    def overtake(fd: int) -> os.stat_result:
        monkeypatch.setattr(os, "fstat", fstat)
        if change == "delete":
            other.delete("a")
        else:
            other.put("a", b"new")
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", overtake)
    assert store.get("a") == b"old" * 1000
    assert store.get("a") == (None if change == "delete" else b"new")


def test_stale_file_handle_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network file system says of a file that another machine deleted."""
    store = LocalStore(folder)
    store.put("a", b"x")

    def stale(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    assert store.get("a") is None


def test_file_cut_from_outside_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    store.put("a", b"x" * 100)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(StoreError, match="got its end at 0, expected 100 bytes"):
        store.get("a")


# -- quota ------------------------------------------------------------------------------------


def test_evicts_the_least_recently_used(folder: Path) -> None:
    store = LocalStore(folder, 30)
    for name in "abc":
        store.put(name, bytes(10))
    store.get("a")
    store.get_range("b", 0, 1)
    store.exists(["c"])  # is no use
    store.put("d", bytes(10))
    assert store.exists(list("abcd")) == [True, True, False, True]
    assert store.used_bytes() == recorded_total(store) == 30


def test_order_is_exact_over_many_evictions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a model, with a queue so short that it is refilled often, and two instances."""
    monkeypatch.setattr(eviction, "_QUEUE_LENGTH", 3)
    stores = [LocalStore(folder, 200), LocalStore(folder, 200)]
    rng = random.Random(3)
    model: dict[str, int] = {}  # the least recently used first
    for _ in range(120):
        store, name, size = rng.choice(stores), f"n{rng.randrange(20)}", rng.randrange(1, 50)
        if rng.random() < 0.4:
            assert (store.get(name) is None) == (name not in model)
            if name in model:
                model[name] = model.pop(name)
        else:
            store.put(name, bytes(size))
            model.pop(name, None)
            while sum(model.values()) + size > 200:
                del model[next(iter(model))]
            model[name] = size
        assert set(store.names()) == model.keys()
    assert recorded_total(stores[0]) == stores[0].used_bytes() == sum(model.values())


def test_recency_needs_no_atime(folder: Path) -> None:
    """Times set far back stand for a mount that never records accesses by itself."""
    store = LocalStore(folder, 20)
    for age, name in enumerate("ab"):
        store.put(name, bytes(10))
        file = next((folder / "objects").rglob(name))
        os.utime(file, (1000 + age, 1000 + age))
    LocalStore(folder).get("a")  # another instance, without a quota of its own
    store.put("c", bytes(10))
    assert store.exists(["a", "b", "c"]) == [True, False, True]


def test_object_beyond_the_quota(folder: Path) -> None:
    store = LocalStore(folder, 30)
    store.put("a", b"old")
    with pytest.raises(StoreFullError, match="got 31, expected at most the quota of 30; raise"):
        store.put("a", bytes(31))
    assert store.get("a") == b"old"


def test_replacing_evicts_no_more_than_needed(folder: Path) -> None:
    store = LocalStore(folder, 30)
    store.put("a", bytes(20))
    store.put("b", bytes(10))
    store.put("a", bytes(15))
    assert store.exists(["a", "b"]) == [True, True]
    store.put("a", bytes(30))  # the least recently used is not a itself
    assert store.exists(["a", "b"]) == [True, False]
    assert store.used_bytes() == recorded_total(store) == 30


def test_replacing_the_next_to_be_evicted(folder: Path) -> None:
    store = LocalStore(folder, 30)
    for name in "abcd":  # d evicts a, and the scan leaves b and c in the queue
        store.put(name, bytes(10))
    store.put("b", bytes(15))
    assert set(store.names()) == {"b", "d"}
    assert store.used_bytes() == recorded_total(store) == 25


def test_failed_put_evicts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder, 30)
    for name in "abc":
        store.put(name, bytes(10))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError):
            store.put("d", bytes(30))
    assert set(store.names()) == {"a", "b", "c"}


def test_smaller_quota_at_opening(folder: Path) -> None:
    store = LocalStore(folder)
    for name in "abcd":
        store.put(name, bytes(10))
    assert set(LocalStore(folder, 25).names()) == {"c", "d"}


def test_values_removed_by_hand(folder: Path) -> None:
    """The recorded total is then too high; the scan before an eviction sets it right."""
    store = LocalStore(folder, 30)
    for name in "abc":
        store.put(name, bytes(10))
    for name in "ab":
        next((folder / "objects").rglob(name)).unlink()
    assert recorded_total(store) == 30
    store.put("d", bytes(10))
    assert set(store.names()) == {"c", "d"}
    assert recorded_total(store) == 20


@pytest.mark.parametrize("quota", [0, -5])
def test_bad_quota(folder: Path, quota: int) -> None:
    with pytest.raises(ConfigError, match="quota"):
        LocalStore(folder, quota)


# -- partial files ----------------------------------------------------------------------------


def test_partial_of_a_dead_writer_is_swept(folder: Path) -> None:
    store = LocalStore(folder)
    (folder / "partial" / f"123-{'0' * 16}.part").write_bytes(b"half")
    (folder / "partial" / "notes.txt").write_bytes(b"not ours")
    assert store.used_bytes() == 0
    LocalStore(folder)
    assert partials(folder) == ["notes.txt"]


def test_partial_of_a_live_writer_is_not_swept(folder: Path) -> None:
    LocalStore(folder)
    partial = folder / "partial" / f"123-{'0' * 16}.part"
    with open(partial, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(partial, (0, 0))  # age alone does not matter
        LocalStore(folder)
        assert partial.exists()
    LocalStore(folder)
    assert not partial.exists()


def test_stopped_lock_holder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_LOCK_TIMEOUT_S", 0.05)
    store = LocalStore(folder)
    store.put("a", b"x")
    with open(folder / "cachegen-store", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin = time.monotonic()
        with pytest.raises(StoreError, match=r"lock of the store: .* stopped process"):
            store.put("a", b"y")
        assert time.monotonic() - begin < 1
        assert store.get("a") == b"x"  # readers never wait for the lock
    store.put("a", b"y")


# -- failures of the file system --------------------------------------------------------------


class Faults:
    """Fails the step-th filesystem call (the first is 1) with an error number."""

    def __init__(self, patch: pytest.MonkeyPatch, step: int, code: int, *, lasting: bool) -> None:
        self.count, self.failed = 0, ""
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name), step, code, lasting))

    def _wrap(
        self, name: str, call: Callable[..., Any], step: int, code: int, lasting: bool
    ) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if name == "close":  # a file that could not be closed would leak its lock
                result = call(*args, **kwargs)
            if self.count == step or (lasting and self.count > step):
                self.failed = self.failed or name
                raise OSError(code, os.strerror(code))
            return result if name == "close" else call(*args, **kwargs)

        return wrapped


def failing_puts(
    tmp_path: Path, code: int, *, lasting: bool
) -> Iterator[tuple[str, Path, LocalStore, StoreError]]:
    """Fail a replacing and evicting put at its 1st, 2nd ... call until it gets through."""
    seen: set[str] = set()
    template = LocalStore(tmp_path / "template")
    for name in ("evicted", "a", "kept"):
        template.put(name, b"old" * 30)
    for step in range(1, 100):
        folder = tmp_path / f"{code}-{step}"
        shutil.copytree(template.path, folder)
        store = LocalStore(folder, 300)
        store._values.forget()  # so that the put has to scan
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, step, code, lasting=lasting)
            try:
                store.put("a", b"new" * 40)
            except StoreError as error:
                caught = error
            else:
                assert not faults.failed, f"{faults.failed} failed and nobody said so"
                assert seen >= {"open", "pwrite", "write", "utime", "fsync", "mkdir", "replace"}
                return
        seen.add(faults.failed)
        yield faults.failed, folder, store, caught
    raise AssertionError("the put never got through")


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_every_filesystem_call_may_fail(tmp_path: Path, lasting: bool) -> None:
    before_rename = True
    for failed, folder, store, error in failing_puts(tmp_path, errno.EIO, lasting=lasting):
        assert isinstance(error.__cause__, OSError)
        value = store.get("a")
        # Old until the rename; after it a failure leaves the new value, and is still reported.
        assert value in (b"old" * 30, b"new" * 40)
        before_rename = before_rename and value == b"old" * 30
        if failed == "replace":
            assert value == b"old" * 30
        if before_rename:
            assert value == b"old" * 30
        if not lasting:
            assert partials(folder) == []
            assert recorded_total(store) >= store.used_bytes()
            if failed == "replace":
                assert recorded_total(store) == store.used_bytes()
        again = LocalStore(folder, 300)
        assert partials(folder) == []
        assert recorded_total(again) == again.used_bytes() <= 300
        again.put("a", b"after" * 10)
        assert again.get("a") == b"after" * 10
    assert not before_rename


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path: Path, code: int) -> None:
    for _, folder, store, error in failing_puts(tmp_path, code, lasting=False):
        assert isinstance(error, StoreFullError)
        assert "free space under" in str(error)
        assert store.get("a") in (b"old" * 30, b"new" * 40)
        assert partials(folder) == []


def test_synced_before_and_after_the_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would show: the value, then its name, in this order and on the disk."""
    store = LocalStore(folder)
    calls: list[str] = []

    def watch(name: str) -> None:
        call = getattr(os, name)

        def watched(*args: Any) -> Any:
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{args[0]}")
                first, *below = os.path.relpath(target, folder).split("/")
                calls.append(f"fsync {first}{'/*' * len(below)}")
            else:
                calls.append(name)
            return call(*args)

        monkeypatch.setattr(os, name, watched)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    for name in ("write", "fsync", "mkdir", "replace"):
        watch(name)
    store.put("a", b"x")
    assert calls[:2] == ["write", "fsync partial/*"]
    assert calls[2:] == ["mkdir", "fsync objects", "replace", "fsync objects/*"]


def test_read_only_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    store.put("a", b"value")
    make_read_only(monkeypatch, errno.EROFS)
    for reader in (store, LocalStore(folder), LocalStore(folder, 1000)):
        assert reader.get("a") == b"value"
        assert reader.get_range("a", 1, 3) == b"al"
        assert reader.exists(["a", "b"]) == [True, False]
        assert list(reader.names()) == ["a"]
        with pytest.raises(StoreReadOnlyError, match="Read-only file system"):
            reader.put("a", b"new")
        with pytest.raises(StoreReadOnlyError, match="Read-only file system"):
            reader.delete("a")
    assert store.get("a") == b"value"
    with pytest.raises(StoreReadOnlyError):
        LocalStore(folder.with_name("new"))


def test_no_permission_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LocalStore(folder).put("a", b"value")
    make_read_only(monkeypatch, errno.EACCES)
    store = LocalStore(folder)
    assert store.get("a") == b"value"
    with pytest.raises(StoreReadOnlyError, match=r"permission to write the store: .*check owner"):
        store.put("a", b"new")


def test_no_permission_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    store.put("a", b"value")

    def denied(path: str, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StoreError, match=r"permission to read the store: .*Permission denied"):
        store.get("a")
    with pytest.raises(StoreError, match="permission to read the store"):
        store.get_range("a", 0, 1)


def make_read_only(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real_open = os.open

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), path)

    def open_to_read(path: Any, flags: int, *mode: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_to_read)
    for name in ("utime", "mkdir", "replace", "unlink", "write", "pwrite"):
        monkeypatch.setattr(os, name, refuse)
