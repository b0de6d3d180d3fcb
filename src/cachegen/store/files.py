"""The file system calls under a local store, and what their failures are called."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachegen.errors import StoreError, StoreFullError, StoreReadOnlyError

GONE = frozenset({errno.ENOENT, errno.ESTALE})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DENIED = frozenset({errno.EACCES, errno.EPERM})
NOT_WRITABLE = DENIED | {errno.EROFS}

_WRITING = frozenset({"open", "put", "delete"})
_READ_CAP_BYTES = 1 << 30


@contextmanager
def named_errors(path: str, verb: str) -> Iterator[None]:
    """Turn what the operating system raises into a named error."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        got = f"{verb}: {error.strerror or error} ({where})"
        if error.errno in FULL:
            raise StoreFullError(
                "disk under the store",
                got=got,
                expected="free space",
                remedy=f"free space under {path} or open the store with a smaller quota",
            ) from error
        if error.errno == errno.EROFS or (error.errno in DENIED and verb in _WRITING):
            raise StoreReadOnlyError(
                "permission to write the store",
                got=got,
                expected="a folder that this user may write",
                remedy=f"check owner, mode and mount of {path}",
            ) from error
        if error.errno in DENIED:
            raise StoreError(
                "permission to read the store",
                got=got,
                expected="files that this user may read",
                remedy=f"check owner and mode under {path}",
            ) from error
        raise StoreError("file system under the store", got=got) from error


def size_of(file: str) -> int | None:
    """Return the bytes of a file, None if there is none. Raises: OSError."""
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return None


def modified_ns(file: str) -> int | None:
    """Return the modification time of a file, None if there is none. Raises: OSError."""
    try:
        return os.stat(file).st_mtime_ns
    except FileNotFoundError:
        return None


def touch(fd: int) -> None:
    """Set the modification time of an open file to now. Raises: OSError."""
    # The time is given, since the kernel's own is only as fine as its tick.
    now_ns = time.time_ns()
    os.utime(fd, ns=(now_ns, now_ns))


def write(fd: int, view: memoryview) -> None:
    """Write all of view, however many calls that takes. Raises: OSError."""
    while view.nbytes:
        view = view[os.write(fd, view) :]


def read_at(fd: int, begin: int, end: int) -> bytes:
    """Read the bytes [begin, end) of an open file. Raises: StoreError if it ends before."""
    parts = []
    while begin < end:
        part = os.pread(fd, min(end - begin, _READ_CAP_BYTES), begin)
        if not part:
            raise StoreError(
                "object in the store", got=f"its end at {begin}", expected=f"{end} bytes"
            )
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sync_folder(path: str) -> None:
    """Bring the names in a folder to the disk. Raises: OSError."""
    # A rename is on the disk only when the folder is.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
