"""Writers that are killed or run side by side, for test_local_processes.py.

Run as a script, so that it has one thread and may fork: a fork costs a millisecond where a
fresh interpreter costs half a second. Prints one line of JSON with what it counted.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cachegen.store import LocalStore, open_store

# Every call by which LocalStore changes a folder, in the order a put makes them.
CALLS = ("open", "pwrite", "write", "utime", "fsync", "mkdir", "replace", "unlink", "close")


def version(number: int, size: int = 200_000) -> bytes:
    """Return a value that names its number and is damaged by any cut or mixture."""
    return bytes([number % 251]) * size + number.to_bytes(8, "little")


def number_of(data: bytes) -> int:
    number = int.from_bytes(data[-8:], "little")
    assert data == version(number, len(data) - 8), "a value that is neither old nor new"
    return number


def forked(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        os._exit(0)
    except BaseException as error:  # all of them: a child must never return into the caller
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def kill_at_random(folder: str, rounds: int) -> dict[str, int]:
    """Kill a writer again and again; after each kill the value is whole and not too old."""
    rng = random.Random(11)
    reader = LocalStore(folder)
    reader.put("a/b", version(0))
    number = changed = left = 0
    for _ in range(rounds):
        receive, send = os.pipe()

        def write(first: int = number + 1, send: int = send) -> None:
            store = LocalStore(folder)
            for following in range(first, first + 10_000):
                store.put("a/b", version(following))
                os.write(send, following.to_bytes(8, "little"))

        pid = forked(write)
        os.close(send)
        time.sleep(rng.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reports = b""
        while part := os.read(receive, 65536):
            reports += part
        os.close(receive)
        acknowledged = int.from_bytes(reports[-8:], "little") if reports else number
        found = number_of(reader.get("a/b") or b"")
        assert acknowledged <= found <= acknowledged + 1, (acknowledged, found)
        changed += found > number
        left += len(os.listdir(f"{folder}/partial"))
        number = found
    return {"rounds": rounds, "changed": changed, "left": left}


def kill_remote_writers(url: str, rounds: int, writers: int) -> dict[str, int]:
    """Kill writers to a remote at random instants; what was acknowledged is there, and whole.

    A killed process has several writers, each a thread with a name of its own. This process
    reads by other means: a client of object stores does not survive a fork.
    """
    read = _plain_reader(url)
    rng = random.Random(11)
    numbers = [0] * writers
    changed = 0
    for _ in range(rounds):
        receive, send = os.pipe()

        def write(first: tuple[int, ...] = tuple(numbers), send: int = send) -> None:
            store = open_store(url)
            store.exists(["warm"])
            os.write(send, bytes(16))

            def write_one(writer: int) -> None:
                for following in range(first[writer] + 1, first[writer] + 10_000):
                    store.put(f"a/{writer}", version(following, 200_000))
                    os.write(send, struct.pack("<QQ", writer, following))

            for writer in range(writers):
                threading.Thread(target=write_one, args=(writer,)).start()

        pid = forked(write)
        os.close(send)
        assert os.read(receive, 16) == bytes(16)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reports = b""
        while part := os.read(receive, 65536):
            reports += part
        os.close(receive)
        acknowledged = dict(enumerate(numbers)) | dict(struct.iter_unpack("<QQ", reports))
        for writer in range(writers):
            data = read(f"a/{writer}")
            found = 0 if data is None else number_of(data)
            # The server may still finish the last request of the one that was killed.
            least = acknowledged[writer]
            assert least <= found <= least + 1, (writer, least, found)
            changed += found > numbers[writer]
            numbers[writer] = found
    return {"killed": rounds * writers, "changed": changed}


def _plain_reader(url: str) -> Callable[[str], bytes | None]:
    if not url.startswith("s3:"):
        return lambda name: open_store(url).get(name)
    from urllib.parse import parse_qs, urlsplit

    import boto3

    parts = urlsplit(url)
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint"],
        region_name=options["region"],
        aws_access_key_id=options["access_key_id"],
        aws_secret_access_key=options["secret_access_key"],
    )

    def read(name: str) -> bytes | None:
        key = f"{parts.path.strip('/')}/{name}"
        try:
            data: bytes = client.get_object(Bucket=parts.netloc, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None
        return data

    return read


def break_calls(step: int, action: Callable[[str], None]) -> None:
    """Let the step-th filesystem call of this process do something else."""
    count = 0

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                action(name)
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def kill_at_every_call(folder: str) -> dict[str, int]:
    """Kill a writer just before its 1st, 2nd, 3rd ... filesystem call, until it gets through."""
    # "new" is a new name in a new shard, "old" replaces, and the quota makes both evict.
    template = LocalStore(f"{folder}/template")
    for name in ("evicted", "evicted2", "old", "kept"):
        template.put(name, version(1))
    for step in range(1, 200):
        where = f"{folder}/{step}"
        shutil.copytree(template.path, where)
        store = LocalStore(where, 1_000_000)

        def write(where: str = where, step: int = step) -> None:
            store = LocalStore(where, 1_000_000)
            break_calls(step, lambda _: os.kill(os.getpid(), signal.SIGKILL))
            store.put("old", version(2, 300_000))
            store.put("new", version(3, 300_000))

        _, status = os.waitpid(forked(write), 0)
        assert number_of(store.get("old") or b"") in (1, 2)
        assert number_of(store.get("new") or version(3)) == 3
        store = LocalStore(where, 1_000_000)
        assert os.listdir(f"{where}/partial") == []
        with store._locked() as ledger:
            assert ledger.total_bytes == store.used_bytes() <= 1_000_000
        if status == 0:
            return {"steps": step}
        assert os.WIFSIGNALED(status), status
    raise AssertionError("the writer never got through")


def run_side_by_side(folder: str, processes: int, run_s: float) -> dict[str, int]:
    """Let processes put, get, range and delete on one folder under a quota that always binds."""
    quota, names, largest = 400_000, 40, 60_000

    def use(seed: int) -> None:
        rng = random.Random(seed)
        store = LocalStore(folder, quota)
        end = time.monotonic() + run_s
        while time.monotonic() < end:
            name = f"ns/{rng.randrange(names)}"
            match rng.randrange(8):
                case 0 | 1 | 2:
                    body = rng.randbytes(rng.randrange(largest - 4))
                    store.put(name, zlib.crc32(body).to_bytes(4, "little") + body)
                case 3 | 4 | 5:
                    data = store.get(name)
                    assert data is None or zlib.crc32(data[4:]).to_bytes(4, "little") == data[:4]
                case 6:
                    part = store.get_range(name, 4, 100)
                    assert part is None or len(part) <= 96
                case 7:
                    store.delete(name)

    pids = [forked(lambda seed=seed: use(seed)) for seed in range(processes)]  # type: ignore[misc]
    checks = highest = highest_partial = 0
    store = LocalStore(folder)
    end = time.monotonic() + run_s
    while time.monotonic() < end:
        with store._locked() as ledger:
            assert ledger.total_bytes == store.used_bytes() <= quota
            highest = max(highest, ledger.total_bytes)
            partial = 0
            for entry in os.scandir(f"{folder}/partial"):
                with suppress(FileNotFoundError):  # its writer gave up
                    partial += entry.stat().st_size
            highest_partial = max(highest_partial, partial)
        checks += 1
        time.sleep(0.005)
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    assert os.listdir(f"{folder}/partial") == []
    with store._locked() as ledger:
        assert ledger.total_bytes == store.used_bytes() <= quota
    return {
        "failed": failed,
        "checks": checks,
        "highest": highest,
        "highest_partial": highest_partial,
        "quota": quota,
        "partial_bound": processes * largest,
    }


def sweep_beside_writers(folder: str, rounds: int) -> dict[str, int]:
    """Open the store again and again while others write: no live partial file is swept."""

    def write(seed: int) -> None:
        store = LocalStore(folder)
        for number in range(rounds):
            store.put(f"{seed}/{number % 5}", version(number, 50_000))

    pids = [forked(lambda seed=seed: write(seed)) for seed in range(2)]  # type: ignore[misc]
    opened = failed = 0
    while pids:
        LocalStore(folder)
        opened += 1
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            pids.remove(pid)
            failed += status != 0
    return {"opened": opened, "failed": failed}


def open_at_once(folder: str, processes: int) -> dict[str, int]:
    """Create one store from many processes at the same time."""
    begin = time.monotonic() + 0.05

    def create(seed: int) -> None:
        time.sleep(max(0.0, begin - time.monotonic()))
        LocalStore(folder, 10_000_000).put(f"p/{seed}", version(seed, 100))

    pids = [forked(lambda seed=seed: create(seed)) for seed in range(processes)]  # type: ignore[misc]
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    store = LocalStore(folder)
    found = sum(store.get(f"p/{seed}") == version(seed, 100) for seed in range(processes))
    return {"failed": failed, "found": found}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    folder, *numbers = arguments
    result = globals()[command](folder, *(json.loads(number) for number in numbers))
    print(json.dumps(result))
