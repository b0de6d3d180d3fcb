"""A store in a folder, for many processes of one machine at once (POSIX).

Layout of the folder::

    cachegen-store           the marker, see ledger.py; locked (flock) by every writer
    objects/ab/<name>        the values, "/" in a name written "+"; ab from SHA-256 of the name
    partial/<pid>-<id>.part  values being written, each locked by its writer as long as it lives

Invariants:

- A value is written to partial/, synced, then renamed: a reader, who takes no lock, sees the
  old or the new file, whole, at whatever instant a writer dies.
- The bytes in objects/ never exceed the quota; those in partial/ come on top, at most one
  value per put under way. The total is raised before a rename and lowered after a removal, so
  a writer that dies in between leaves it too high by one value, never too low. Each scan
  (at opening with a quota, and when the eviction queue is empty) sets it right again.
- Recency is the modification time of a file, set by every read, whatever the mount options.
- A partial file is swept only by one who gets its lock, so never while its writer lives.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from cachegen.errors import ConfigError, StoreFullError
from cachegen.store.base import (
    BytesLike,
    Entry,
    check_name,
    check_names,
    check_quota,
    check_range,
    view_bytes,
)
from cachegen.store.eviction import Values, remove
from cachegen.store.files import (
    GONE,
    NOT_WRITABLE,
    named_errors,
    read_at,
    size_of,
    sync_folder,
    touch,
    write,
)
from cachegen.store.ledger import Ledger, check_layout, lock_ledger

_PARTIAL_NAME = re.compile(r"[0-9]+-[0-9a-f]{16}\.part")


class LocalStore:
    """Keeps values as files under a folder; any number of processes may share it.

    path: the folder, created if missing; it must be empty or a store already.
    quota_bytes: bound on the bytes of all values together; the least recently used go first.
        None for no bound. Processes that share a folder should agree on it.
    A folder that can be read but not written opens for reading.
    Raises: ConfigError if path is a file or a folder with other things in it,
        StoreFullError, StoreReadOnlyError, StoreError.
    """

    def __init__(self, path: str | os.PathLike[str], quota_bytes: int | None = None) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.quota_bytes = check_quota(quota_bytes)
        self._objects = os.path.join(self.path, "objects")
        self._partial = os.path.join(self.path, "partial")
        self._values = Values(self._objects)
        self._open()

    def put(self, name: str, data: BytesLike) -> None:
        """Store data under name; it is on the disk, not in a buffer, when this returns.

        Raises: ConfigError; StoreFullError if data is beyond the quota or the disk is full;
            StoreReadOnlyError; StoreError. Then the old value or the new one is there, whole.
        """
        self._put(name, data, replace=True)

    def put_if_absent(self, name: str, data: BytesLike) -> bool:
        """Store data unless name is taken; atomic among all processes that share the folder.

        Returns: True if this call created the value, which then is on the disk.
        Raises: as put.
        """
        check_name(name)
        with named_errors(self.path, "put"):
            # Saves writing what would be thrown away; _commit asks again under the lock.
            if size_of(self._file_of(name)) is not None:
                view_bytes(data)
                return False
        return self._put(name, data, replace=False)

    def put_stream(self, name: str, parts: Iterable[BytesLike]) -> int:
        """Store the joined parts under name, writing each as it comes.

        Returns: the bytes stored. Raises: as put, and what parts raise.
        """
        check_name(name)
        return self._put_parts(name, parts, replace=True)[0]

    def get(self, name: str) -> bytes | None:
        """Read a value whole; counts as a use.

        Returns: the bytes, or None if there is no such name.
        Raises: ConfigError, StoreError.
        """
        check_name(name)
        parts = self._read(name, None)
        return None if parts is None else parts[0]

    def get_range(self, name: str, begin: int, end: int) -> bytes | None:
        """Read the bytes [begin, end), or those of them that exist; counts as a use.

        Returns: the bytes, b"" beyond the end, or None if there is no such name.
        Raises: ConfigError, StoreError.
        """
        parts = self.get_ranges(name, [(begin, end)])
        return None if parts is None else parts[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read several ranges of one version of a value; counts as a use.

        Returns: for each range what get_range returns; None if there is no such name.
        Raises: ConfigError, StoreError.
        """
        check_name(name)
        for begin, end in ranges:
            check_range(begin, end)
        return self._read(name, ranges)

    def exists(self, names: Sequence[str]) -> list[bool]:
        """Look up many names at once. Returns: one bool per name. Raises: as get."""
        check_names(names)
        with named_errors(self.path, "look up"):
            return [size_of(self._file_of(name)) is not None for name in names]

    def delete(self, name: str) -> None:
        """Delete a value; a missing name is no error.

        Raises: ConfigError, StoreReadOnlyError, StoreError.
        """
        check_name(name)
        with named_errors(self.path, "delete"):
            file = self._file_of(name)
            if size_of(file) is not None:
                with self._locked() as ledger:
                    remove(ledger, file)
                sync_folder(os.path.dirname(file))

    def names(self) -> Iterator[str]:
        """List the names held, in no order. Raises: StoreError."""
        with named_errors(self.path, "list"):
            for _, _, file in self._values.scan():
                yield os.path.basename(file).replace("+", "/")

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """List the values whose names begin with prefix, in no order. Raises: StoreError."""
        with named_errors(self.path, "list"):
            for used_ns, size_bytes, file in self._values.scan():
                name = os.path.basename(file).replace("+", "/")
                if name.startswith(prefix):
                    yield Entry(name, size_bytes, used_ns / 1e9)

    def used_bytes(self) -> int:
        """Return the bytes of all values held, by a scan. Raises: StoreError."""
        with named_errors(self.path, "list"):
            return sum(size for _, size, _ in self._values.scan())

    # -- opening ------------------------------------------------------------------------------

    def _open(self) -> None:
        with named_errors(self.path, "open"):
            try:
                os.makedirs(self.path, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(
                    "store path", got=f"a file at {error.filename}", expected="a folder"
                ) from None
            is_store = check_layout(self.path)
            try:
                with self._locked() as ledger:
                    os.makedirs(self._objects, exist_ok=True)
                    os.makedirs(self._partial, exist_ok=True)
                    if not is_store:
                        sync_folder(self.path)
                    self._sweep()
                    if self.quota_bytes is not None:
                        self._values.rescan(ledger)
                        self._values.make_room(ledger, 0, self.quota_bytes)
            except OSError as error:
                if not (is_store and error.errno in NOT_WRITABLE):
                    raise
                # A store that this user may only read: puts will say so.

    def _sweep(self) -> None:
        """Remove the partial files of dead writers; needs the lock of the marker."""
        for entry in list(os.scandir(self._partial)):
            if not _PARTIAL_NAME.fullmatch(entry.name):
                continue
            try:
                fd = os.open(entry.path, os.O_RDWR)
            except (FileNotFoundError, PermissionError):
                continue  # finished just now, or another user's to sweep
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            except (BlockingIOError, FileNotFoundError, PermissionError):
                pass  # its writer lives, or as above
            finally:
                os.close(fd)

    # -- writing ------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[Ledger]:
        with lock_ledger(self.path) as ledger:
            if not ledger.is_sound:
                self._values.rescan(ledger)
                ledger.sync()
            yield ledger

    def _put(self, name: str, data: BytesLike, *, replace: bool) -> bool:
        check_name(name)
        view = view_bytes(data)
        self._check_size(view.nbytes)
        return self._put_parts(name, (view,), replace=replace)[1]

    def _put_parts(
        self, name: str, parts: Iterable[BytesLike], *, replace: bool
    ) -> tuple[int, bool]:
        size_bytes = 0
        with named_errors(self.path, "put"):
            partial, fd = self._create_partial()
        try:
            for part in parts:
                view = view_bytes(part)
                size_bytes += view.nbytes
                self._check_size(size_bytes)
                with named_errors(self.path, "put"):
                    write(fd, view)
            with named_errors(self.path, "put"):
                touch(fd)
                os.fsync(fd)
                file = self._file_of(name)
                self._make_shard(os.path.dirname(file))
                with self._locked() as ledger:
                    created = self._commit(ledger, partial, file, size_bytes, replace=replace)
        except BaseException:
            # The first error is the one to report; what stays behind is swept when opened.
            with suppress(OSError):
                os.unlink(partial)
            raise
        finally:
            with named_errors(self.path, "put"):
                os.close(fd)
        if created:
            with named_errors(self.path, "put"):
                sync_folder(os.path.dirname(file))
        return size_bytes, created

    def _check_size(self, size_bytes: int) -> None:
        if self.quota_bytes is not None and size_bytes > self.quota_bytes:
            raise StoreFullError(
                "size of an object in bytes",
                got=size_bytes,
                expected=f"at most the quota of {self.quota_bytes}",
                remedy="raise quota_bytes or store smaller chunks",
            )

    def _create_partial(self) -> tuple[str, int]:
        partial = os.path.join(self._partial, f"{os.getpid()}-{os.urandom(8).hex()}.part")
        fd = -1
        try:
            # Under the lock of the store: no sweep sees the file before it is locked itself.
            with self._locked():
                fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            if fd >= 0:
                with suppress(OSError):
                    os.unlink(partial)
                os.close(fd)
            raise
        return partial, fd

    def _make_shard(self, shard: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(shard)
            sync_folder(self._objects)

    def _commit(
        self, ledger: Ledger, partial: str, file: str, size_bytes: int, *, replace: bool
    ) -> bool:
        replaced = size_of(file)
        if replaced is not None and not replace:
            os.unlink(partial)
            return False
        replaced = replaced or 0
        if self.quota_bytes is not None:
            self._values.make_room(ledger, size_bytes - replaced, self.quota_bytes, keep=file)
        ledger.add(size_bytes)
        try:
            os.replace(partial, file)
        except OSError:
            ledger.add(-size_bytes)
            raise
        ledger.add(-replaced)
        return True

    # -- reading ------------------------------------------------------------------------------

    def _read(self, name: str, ranges: Sequence[tuple[int, int]] | None) -> list[bytes] | None:
        with named_errors(self.path, "get"):
            try:
                fd = os.open(self._file_of(name), os.O_RDONLY)
                try:
                    # From here on the file cannot change: values are replaced, never rewritten.
                    size = os.fstat(fd).st_size
                    parts = [
                        read_at(fd, begin, min(end, size))
                        for begin, end in ([(0, size)] if ranges is None else ranges)
                    ]
                    try:
                        touch(fd)
                    except OSError as error:
                        # One who may only read leaves no trace of the use.
                        if error.errno not in NOT_WRITABLE:
                            raise
                    return parts
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno in GONE:
                    return None
                raise

    def _file_of(self, name: str) -> str:
        # By a digest, because the names of one model all begin with the same characters.
        shard = hashlib.sha256(name.encode()).hexdigest()[:2]
        return os.path.join(self._objects, shard, name.replace("/", "+"))
