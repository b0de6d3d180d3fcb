"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachegen.errors import FileWriteError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; afterwards the file is on the disk and replaces an older one.

    Temp then rename, so that a reader never sees half a file. After an error, also of the caller,
    the older file is there as it was, and nothing beside it.
    Raises: FileWriteError; FileNotFoundError if there is no such folder; IsADirectoryError.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            _sync(target.parent)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except OSError as error:
        raise FileWriteError(
            f"file {target}",
            got=error.strerror or str(error),
            expected="a disk with room, and a folder that this user may write",
            remedy=_remedy(error.errno, target.parent),
        ) from error
    finally:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file or nothing. Raises: as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _remedy(number: int | None, folder: Path) -> str:
    if number in _FULL:
        return f"free space under {folder}, or write elsewhere"
    if number in _DENIED:
        return f"check owner, mode and mount of {folder}"
    return "write elsewhere"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
