"""A disk without room: a file system in memory, of one MiB, in a mount namespace of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cachegen.chunk import KVChunk
from cachegen.codec.raw import RawCodec
from cachegen.kvfile import save_kv

MOUNT = 'mount -t tmpfs -o size=1m,{options} tmpfs "$1" && shift && exec "$@"'

STORE = """
import os, sys
from cachegen.errors import StoreFullError
from cachegen.store import LocalStore

folder = sys.argv[1]
store = LocalStore(folder + "/store", *map(int, sys.argv[2:]))
store.put("old", b"a" * 300_000)

def refused(call):
    try:
        call()
    except StoreFullError as error:
        assert "free space" in str(error) and folder in str(error), error
    else:
        raise AssertionError("not refused")
    assert os.listdir(folder + "/store/partial") == []
    assert store.get("old") == b"a" * 300_000
    assert list(store.names()) == ["old"]

refused(lambda: store.put("large", b"b" * 2_000_000))
refused(lambda: store.put("old", b"b" * 900_000))
refused(lambda: store.put_if_absent("large", b"b" * 2_000_000))
refused(lambda: store.put_stream("large", iter([b"b" * 200_000] * 10)))
try:
    with open(folder + "/filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
refused(lambda: store.put("small", b"b"))
refused(lambda: store.put("old", b"b"))
refused(lambda: LocalStore(folder + "/second"))
# Without room it can be read, opened and emptied, and then written again.
again = LocalStore(folder + "/store")
assert again.exists(["old", "large"]) == [True, False] and again.used_bytes() == 300_000
again.delete("old")
again.put("small", b"b" * 1000)
assert list(again.names()) == ["small"]
LocalStore(folder + "/second").put("small", b"b")
"""

# No room for another file: store, marker, objects, partial and one shard with one value fit.
INODES = """
import os, sys
from cachegen.errors import StoreFullError
from cachegen.store import LocalStore

folder = sys.argv[1]
store = LocalStore(folder + "/store")
store.put("n0", b"abc")
for name in ("n1", "n2"):
    try:
        store.put(name, b"abc")
    except StoreFullError:
        pass
    else:
        raise AssertionError("not refused")
assert os.listdir(folder + "/store/partial") == []
assert list(store.names()) == ["n0"] and store.get("n0") == b"abc"
"""

COMMANDS = """
import contextlib, io, os, sys
from cachegen.cli.main import app

folder, kv, coded = sys.argv[1:]
old = [folder + "/" + name for name in ("a.cgen", "a.safetensors", "a.json")]
for path in old:
    with open(path, "wb") as file:
        file.write(b"old")

def failed(*words):
    sys.argv = ["cachegen", *words]
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        try:
            app()
        except SystemExit as stop:
            assert stop.code == 1, (words, stop.code, heard.getvalue())
        else:
            raise AssertionError(words)
    text = heard.getvalue()
    assert "No space left" in text and "free space" in text and folder in text, text
    assert [open(path, "rb").read() for path in old] == [b"old"] * 3
    left = {name for name in os.listdir(folder)} - {os.path.basename(path) for path in old}
    assert left <= {"filler", "store"}, left

failed("encode", kv, "-o", old[0], "--codec", "raw")
failed("decode", coded, "-o", old[1])
failed("put", folder + "/store", coded)
try:
    with open(folder + "/filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
failed("inspect", coded, "--json", old[2])
failed("encode", kv, "-o", old[0])
"""


def on_a_small_disk(folder: Path, script: str, *words: str, options: str = "mode=755") -> None:
    folder = folder / "disk"
    folder.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    command += [MOUNT.format(options=options), "sh", str(folder)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespace of its own: {error}")
    run = [*command, sys.executable, "-c", script, str(folder), *words]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []  # it was a disk of its own


@pytest.mark.parametrize("quota", [(), ("50000000",)], ids=["no quota", "a quota beyond the disk"])
def test_a_local_store_keeps_what_it_has(tmp_path: Path, quota: tuple[str, ...]) -> None:
    on_a_small_disk(tmp_path, STORE, *quota)


def test_a_local_store_without_room_for_files(tmp_path: Path) -> None:
    on_a_small_disk(tmp_path, INODES, options="nr_inodes=8")


def test_commands_leave_older_files_and_say_what_to_do(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 2, 512, 2, 64)).astype(np.float16)
    chunk = KVChunk.from_array(values)
    kv, coded = tmp_path / "kv.safetensors", tmp_path / "a.cgen"
    save_kv(kv, chunk)
    coded.write_bytes(RawCodec().encode(chunk))
    on_a_small_disk(tmp_path, COMMANDS, str(kv), str(coded))
