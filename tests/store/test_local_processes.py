"""Many processes on one folder, some of them killed. The processes are in workers.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachegen.errors import StoreFullError
from cachegen.store import LocalStore


def run(command: str, folder: Path | str, *numbers: float) -> dict[str, int]:
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("workers.py")), command, str(folder)]
        + [json.dumps(number) for number in numbers],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    counts: dict[str, int] = json.loads(finished.stdout)
    return counts


def test_killed_at_random_leaves_old_or_new(tmp_path: Path) -> None:
    counts = run("kill_at_random", tmp_path / "s", 200)
    assert counts["rounds"] == 200
    assert counts["changed"] > 2  # the writers did get to write
    LocalStore(tmp_path / "s")
    assert os.listdir(tmp_path / "s" / "partial") == []


@pytest.mark.parametrize("kind", ["redis", "s3"])
def test_killed_writers_of_remotes_leave_old_or_new(
    remote_url: Callable[[str], str], kind: str
) -> None:
    counts = run("kill_remote_writers", remote_url(kind), 25, 8)
    assert counts["killed"] == 200
    assert counts["changed"] > 10


def mount_small_disk(folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root; test_local.py injects the same errors")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount_small_disk(tmp_path)
    try:
        store = LocalStore(tmp_path / "s")
        store.put("kept", bytes(300_000))
        for name, put in (
            ("put", lambda data: store.put("a", data)),
            ("put_if_absent", lambda data: store.put_if_absent("a", data)),
            ("put_stream", lambda data: store.put_stream("a", [data[:1000], data[1000:]])),
            ("replace", lambda data: store.put("kept", data)),
        ):
            with pytest.raises(StoreFullError, match="free space"):
                put(bytes(900_000))
            assert store.get("a") is None, name
            assert store.get("kept") == bytes(300_000), name
            assert os.listdir(tmp_path / "s" / "partial") == []
        store.put("a", bytes(300_000))
        assert store.used_bytes() == 600_000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_killed_at_every_call_leaves_old_or_new(tmp_path: Path) -> None:
    # Two puts make some 40 calls; fewer steps would mean that calls were not intercepted.
    assert run("kill_at_every_call", tmp_path)["steps"] > 30


def test_side_by_side(tmp_path: Path) -> None:
    counts = run("run_side_by_side", tmp_path / "s", 4, 2.0)
    assert counts["failed"] == 0
    assert counts["checks"] > 20
    # The documented bound: the quota for values, one value per writer for partial files.
    assert 0.8 * counts["quota"] < counts["highest"] <= counts["quota"]
    assert counts["highest_partial"] <= counts["partial_bound"]


def test_opening_sweeps_no_live_writer(tmp_path: Path) -> None:
    counts = run("sweep_beside_writers", tmp_path / "s", 100)
    assert counts["failed"] == 0
    assert counts["opened"] > 10


def test_created_by_many_at_once(tmp_path: Path) -> None:
    for attempt in range(3):
        counts = run("open_at_once", tmp_path / f"s{attempt}", 8)
        assert counts == {"failed": 0, "found": 8}


# File modes bind everybody but root.
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_to_write(tmp_path: Path) -> None:
    """The same for root is in test_local.py, with injected errors."""
    from cachegen.errors import StoreReadOnlyError

    LocalStore(tmp_path / "s").put("a", b"value")
    folders = [folder for folder, _, _ in os.walk(tmp_path / "s")]
    for folder in folders:
        os.chmod(folder, 0o500)
    try:
        store = LocalStore(tmp_path / "s")
        assert store.get("a") == b"value"
        with pytest.raises(StoreReadOnlyError):
            store.put("a", b"new")
    finally:
        for folder in folders:
            os.chmod(folder, 0o700)
