"""The structs of ``csrc/cuda/plan.cuh`` as NumPy types, and the memory they travel in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import LimitError
from cachegen.types import Array, KVDtype

U32, U64 = "<u4", "<u8"

STREAM = np.dtype(
    [
        ("base", U64),
        *((name, U32) for name in ("raw", "words", "word_count", "escapes", "escape_count")),
        *((name, U32) for name in ("begin_step", "end_step", "lanes", "owner", "first")),
    ]
)
PLANE = np.dtype(
    [
        ("base", U64),
        ("rows", U64),
        ("head_stride", "<i8"),
        ("rope", U64),
        *((name, U32) for name in ("heads", "dim", "half", "interleaved", "dtype")),
        ("first_channel", U32),
        ("divisor", "<f4"),
        ("tokens", U32),
    ]
)
MATRIX = np.dtype(
    [
        *((name, U64) for name in ("tables", "classes", "rotations", "body", "low")),
        *((name, U64) for name in ("scales", "anchors")),
        *((name, U32) for name in ("buckets", "shift", "kind", "bits")),
        *((name, U32) for name in ("tokens", "channels", "places", "levels")),
        *((name, U32) for name in ("low_bits", "low_centre", "scale_width")),
        *((name, U32) for name in ("anchor_tokens", "is_delta", "plane", "spreads", "error")),
    ]
)
PASS = np.dtype([("body", U64), ("kind", U32), ("first_stream", U32)])
MAX_PASSES = 6
GROUP = np.dtype(
    [
        *(
            (name, U64)
            for name in ("classes", "constants", "means", "coefficients", "basis", "basis_low")
        ),
        *((name, U64) for name in ("exempt_tokens", "exempt_rows")),
        ("passes", PASS, (MAX_PASSES,)),
        *((name, U32) for name in ("tokens", "channels", "places", "total_passes")),
        *((name, U32) for name in ("plane", "planes", "exempt")),
        ("step", "<f4"),
        *((name, U32) for name in ("stride", "active", "error")),
        ("basis_scale", "<f4"),
    ]
)
SLOTS = np.dtype(
    [
        ("mapping", U64),
        ("rows", U64),
        ("block_stride", "<i8"),
        ("slot_stride", "<i8"),
        ("slots", U64),
        *((name, U32) for name in ("block_slots", "tokens", "error", "zero")),
    ]
)
ROPE = np.dtype(
    [
        ("frequencies", U64),
        ("table", U64),
        ("position", "<f8"),
        ("scale", "<f4"),
        *((name, U32) for name in ("half", "tokens", "places")),
    ]
)
MODELS = np.dtype(
    [
        ("freqs", U64),
        ("buckets", U64),
        *((name, U32) for name in ("count", "alphabet", "kind", "error")),
    ]
)
TILE = np.dtype(
    [(name, U32) for name in ("group", "plane", "first_channel", "width", "first_token", "zero")]
)
LAUNCH = np.dtype(
    [
        *((name, U64) for name in ("streams", "matrices", "groups", "planes")),
        *((name, U64) for name in ("coarse", "coarse_escapes", "refine", "errors", "active")),
        ("items", U64),
        *((name, U32) for name in ("first", "count", "extra", "zero")),
    ]
)
SIZES = {
    **{"Stream": STREAM, "Plane": PLANE, "Matrix": MATRIX, "Group": GROUP, "Slots": SLOTS},
    **{"Rope": ROPE, "Models": MODELS, "Tile": TILE, "Launch": LAUNCH},
}

DTYPE_CODES = {KVDtype.FLOAT16: 0, KVDtype.BFLOAT16: 1, KVDtype.FLOAT32: 2}
BUCKET_BYTES = 8
PAIR_BYTES = 8  # place and symbol of a sparse pass, see sparse.cuh
BAD_SLOT = 8

# An address before memory is allotted: an offset in one of the two buffers, or a real address.
UPLOAD, WORK, ABSOLUTE = np.uint64(1 << 60), np.uint64(1 << 61), np.uint64(1 << 62)
# What the host asks for afterwards: it lies at the end of the workspace, in one piece.
RESULTS = np.uint64(1 << 59)
_TAGS = UPLOAD | WORK | ABSOLUTE | RESULTS
# Decoders read words up to this far behind a stream, see rans.cuh.
SLACK_BYTES = 1024
ALIGNMENT = 256


def absolute(address: int) -> np.uint64:
    """Return a real device address as the address of a plan."""
    return np.uint64(address) | ABSOLUTE


class Arena:
    """Collects arrays that will lie in one buffer, and hands out their addresses beforehand."""

    def __init__(self, tag: np.uint64) -> None:
        self.size_bytes = ALIGNMENT
        self._tag = tag
        self._parts: list[tuple[int, NDArray[np.uint8]]] = []

    def reserve(self, size_bytes: int, alignment: int = 16) -> np.uint64:
        """Return the address of so many new bytes."""
        offset = -(-self.size_bytes // alignment) * alignment
        self.size_bytes = offset + size_bytes
        return np.uint64(offset) | self._tag

    def add(self, array: Array | memoryview | bytes) -> np.uint64:
        """Return the address that a copy of the array will have; the array is not copied yet."""
        if isinstance(array, np.ndarray):
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        else:
            flat = np.frombuffer(array, np.uint8)
        address = self.reserve(flat.size)
        self._parts.append((int(address ^ self._tag), flat))
        return address

    def write(self, out: NDArray[np.uint8]) -> None:
        """Copy all arrays to their places in a buffer of ``size_bytes``."""
        for offset, part in self._parts:
            out[offset : offset + part.size] = part


def resolve(addresses: Any, upload: int, work: int, results: int) -> Any:
    """Turn addresses of a plan, one or an array, into real ones."""
    base = np.where(addresses & UPLOAD, np.uint64(upload), np.uint64(0))
    base = base + np.where(addresses & WORK, np.uint64(work), np.uint64(0))
    base = base + np.where(addresses & RESULTS, np.uint64(results), np.uint64(0))
    return (addresses & ~_TAGS) + base


def relocate(array: NDArray[Any], upload: int, work: int, results: int) -> None:
    """Turn the addresses in an array of structs, in place, into real ones."""
    names = array.dtype.names or ()
    for name in names:
        kind = array.dtype[name]
        if kind.subdtype is not None:
            relocate(array[name], upload, work, results)
        elif kind == np.uint64 and name != "slots":
            array[name][...] = resolve(array[name], upload, work, results)


class Plan:
    """All launches of one batch: structs, constant arrays, and the workspace they need.

    ``launch`` collects kernels in order. ``finish`` lays everything out for given buffers.
    """

    def __init__(self) -> None:
        self.upload = Arena(UPLOAD)
        self.work = Arena(WORK)
        self.results = Arena(RESULTS)
        self._structs: list[NDArray[Any]] = []
        self._launches: list[tuple[str, int, int]] = []
        self._records: list[NDArray[Any]] = []

    def structs(self, dtype: np.dtype[Any], rows: Sequence[Any] | NDArray[Any]) -> np.uint64:
        """Add an array of structs, relocated at the end. Returns: its address, 0 if empty."""
        array = rows if isinstance(rows, np.ndarray) else np.concatenate(list(rows))
        assert array.dtype == dtype
        if not array.size:
            return np.uint64(0)
        array = np.ascontiguousarray(array)
        self._structs.append(array)
        return self.upload.add(array)

    def launch(self, kernel: str, grid: int, record: NDArray[Any], shared_bytes: int = 0) -> None:
        """Add a launch of blocks of 128 threads; nothing for an empty grid."""
        if grid == 0:
            return
        if grid >= 1 << 31:
            raise LimitError("blocks of a launch", got=grid, expected="below 2**31")
        self._launches.append((kernel, grid, shared_bytes))
        self._records.append(record.copy())

    def finish(
        self, upload: int, work: int
    ) -> tuple[NDArray[np.uint8], list[tuple[str, int, int, int]]]:
        """Return the bytes to upload and the launches (kernel, grid, shared bytes, argument).

        upload, work: device addresses of buffers of ``upload_bytes`` and ``workspace_bytes``.
        """
        results = work + self.results_offset
        records = np.concatenate(self._records) if self._records else np.zeros(0, LAUNCH)
        size = self.upload_bytes
        image = np.zeros(size, np.uint8)
        relocate(records, upload, work, results)
        for array in self._structs:
            relocate(array, upload, work, results)
        self.upload.write(image)
        begin = size - SLACK_BYTES - records.nbytes
        begin -= begin % 16
        image[begin : begin + records.nbytes] = records.view(np.uint8)
        launches = [
            (kernel, grid, shared, upload + begin + index * LAUNCH.itemsize)
            for index, (kernel, grid, shared) in enumerate(self._launches)
        ]
        return image, launches

    @property
    def results_offset(self) -> int:
        """Where in the workspace the results begin."""
        return -(-self.work.size_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def workspace_bytes(self) -> int:
        """Size of the buffer that the kernels work in, results included."""
        return self.results_offset + self.results.size_bytes

    @property
    def upload_bytes(self) -> int:
        """Size of the buffer to upload: arrays, launch records, and room to read beyond."""
        records = len(self._records) * LAUNCH.itemsize
        return -(-self.upload.size_bytes // 16) * 16 + 16 + records + SLACK_BYTES
