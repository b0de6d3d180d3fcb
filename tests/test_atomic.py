"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cachegen.atomic import replacing, write_whole
from cachegen.errors import CacheGenError, FileWriteError


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(os.fspath(tmp_path / "b"), b"")
    assert (tmp_path / "b").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EROFS, "owner, mode and mount"),
        (errno.EIO, "elsewhere"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_is_named_and_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, remedy: str
) -> None:
    path = tmp_path / "a"
    write_whole(path, b"one")

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(FileWriteError, match=remedy) as caught:
        write_whole(path, b"two")
    assert isinstance(caught.value, OSError) and isinstance(caught.value, CacheGenError)
    assert caught.value.got == os.strerror(number) and str(path) in caught.value.what
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_caller_raises_passes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"one")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError("b")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
