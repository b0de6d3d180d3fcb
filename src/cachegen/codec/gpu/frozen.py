"""Tables that never change, on a device: built there once from the frozen frequencies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import ladder
from cachegen.codec.basis import ModelBasis, load_basis
from cachegen.codec.entropy import parametric_tables
from cachegen.codec.passes import coarse_escapes
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device, Memory
from cachegen.profile import Profile
from cachegen.types import Array, Geometry

Floats = NDArray[np.float32]

Built = TypeVar("Built")

_KEY = "frozen"


@dataclass(frozen=True)
class FrozenTables:
    """Addresses of packed alias tables: progressive's two sets and the parametric set 1."""

    coarse: np.uint64
    coarse_escapes: np.uint64
    refine: np.uint64
    parametric: np.uint64
    memory: tuple[Memory, ...]


def frozen_tables(device: Device, stream: Any) -> FrozenTables:
    """Return the tables of a device; the first call builds them and waits for that."""
    return held(device, _KEY, lambda: _build(device, stream))


def held(device: Device, key: str, build: Callable[[], Built]) -> Built:
    """Return what a device holds under a key; the first call builds it."""
    if key not in device.tables:
        device.tables[key] = build()
    built: Built = device.tables[key]
    return built


def _build(device: Device, stream: Any) -> FrozenTables:
    sets, (escapes,), memory = build_sets(
        device, "build_tables", plan.BUCKET_BYTES, [coarse_escapes()], stream
    )
    coarse, refine, parametric = sets
    return FrozenTables(coarse, escapes, refine, parametric, memory)


def build_sets(
    device: Device, kernel: str, bucket_bytes: int, constants: Sequence[Array], stream: Any
) -> tuple[list[np.uint64], list[np.uint64], tuple[Memory, ...]]:
    """Have a kernel make tables of the frozen frequencies, and wait for it.

    bucket_bytes: what the kernel makes of a bucket. constants: arrays to be uploaded with them.
    Returns: addresses of progressive's two sets and of the parametric set 1, addresses of the
        constants, and the memory that holds all of them.
    """
    sets = (
        (ladder.coarse_freqs().reshape(-1, 32), 32),
        (ladder.refine_freqs().reshape(-1, 3), 4),
        (parametric_tables()[0].freqs, 32),
    )
    job = plan.Plan()
    items = np.zeros(len(sets), plan.MODELS)
    for item, (freqs, buckets) in zip(items, sets, strict=True):
        item["freqs"] = job.upload.add(freqs.astype("<u2"))
        item["buckets"] = job.work.reserve(len(freqs) * buckets * bucket_bytes, 256)
        item["count"], item["alphabet"], item["kind"] = len(freqs), freqs.shape[1], buckets
    addresses = [job.upload.add(array) for array in constants]
    record = np.zeros(1, plan.LAUNCH)
    record["items"] = job.structs(plan.MODELS, items)
    record["errors"] = job.work.reserve(4)
    record["extra"] = blocks = -(-max(len(freqs) for freqs, _ in sets) // 128)
    job.launch(kernel, blocks * len(sets), record)
    upload = device.allocate(job.upload_bytes, stream)
    work = device.allocate(job.workspace_bytes, stream)
    image, launches = job.finish(upload.address, work.address)
    device.upload(upload.address, image, stream)
    for launch in launches:
        device.launch(*launch, stream)
    device.download(work.address, 1, stream)  # waits
    places = [plan.absolute(int(item["buckets"])) for item in items]
    return places, [place_of(address, upload) for address in addresses], (upload, work)


def upload_arena(device: Device, arena: plan.Arena, stream: Any) -> Memory:
    """Copy the arrays of an arena to a device, and wait for that, as the copy here goes away."""
    memory = device.allocate(arena.size_bytes, stream)
    image = np.zeros(arena.size_bytes, np.uint8)
    arena.write(image)
    device.upload(memory.address, image, stream)
    device.download(memory.address, 1, stream)  # waits
    return memory


def place_of(address: np.uint64, memory: Memory) -> np.uint64:
    """Return where an address of an uploaded arena lies; 0 stays 0."""
    return plan.absolute(int(address ^ plan.UPLOAD) + memory.address) if address else address


@dataclass(frozen=True)
class DeviceBasis:
    """A profile on a device.

    matrices: for each group its basis times ``1 / scales[g]``, rounded to halves, rows padded to a
    multiple of 8. rests: what rounding lost, 0 where it lost nothing. means: floats.
    """

    basis: ModelBasis
    matrices: tuple[np.uint64, ...]
    rests: tuple[np.uint64, ...]
    scales: tuple[float, ...]
    means: tuple[np.uint64, ...]
    memory: Memory


def device_basis(device: Device, profile: Profile, geometry: Geometry, stream: Any) -> DeviceBasis:
    """Return a profile's bases on a device; the first call for a profile uploads them.

    Raises: ProfileError if they do not fit.
    """
    key = f"basis {profile.digest.hex()} {geometry}"
    return held(device, key, lambda: _upload_basis(device, load_basis(profile, geometry), stream))


def _upload_basis(device: Device, basis: ModelBasis, stream: Any) -> DeviceBasis:
    arena = plan.Arena(plan.UPLOAD)
    matrices, rests, scales, means = [], [], [], []
    for group in basis.bases:
        assert group is not None
        high, low, scale = split_halves(group.basis)
        matrices.append(arena.add(high))
        rests.append(arena.add(low) if low.any() else np.uint64(0))
        scales.append(scale)
        means.append(arena.add(group.mean.astype("<f4")))
    memory = upload_arena(device, arena, stream)

    def place(addresses: list[np.uint64]) -> tuple[np.uint64, ...]:
        return tuple(place_of(address, memory) for address in addresses)

    return DeviceBasis(basis, place(matrices), place(rests), tuple(scales), place(means), memory)


def split_halves(basis: Floats) -> tuple[NDArray[np.float16], NDArray[np.float16], float]:
    """Return two matrices of halves whose sum is (basis / scale) to 22 bits, and the scale.

    basis: (R, N). Rows of the results are padded with zeros to a multiple of 8. The scale is a
    power of two that puts the largest value near 1024, so that the lower halves are not subnormal.
    """
    channels = basis.shape[1]
    largest = float(np.abs(basis).max())
    scale = 2.0 ** (np.floor(np.log2(largest)) - 9) if largest > 0 else 1.0
    scaled = np.zeros((len(basis), -(-channels // 8) * 8), np.float32)
    scaled[:, :channels] = basis / np.float32(scale)
    high = scaled.astype(np.float16)
    low = (scaled - high.astype(np.float32)).astype(np.float16)
    return high, low, scale


@functools.lru_cache(maxsize=256)
def cell_constants(passes: int, present: int, decay: int) -> NDArray[np.float32]:
    """Return, for each class, what to add to the inner edge of a cell of either width, (64, 2).

    As ``ladder.descend``: width times centroid, for cells of one step and of 1.2 steps.
    """
    step = np.float32(3.0 ** (passes - present))
    scale_class = np.arange(ladder.CLASSES)
    slope = (np.sqrt(2.0) * (decay / 64) / ladder.deviation_of(scale_class)).astype(np.float32)
    wide = np.float32(2 * ladder.DEAD_ZONE) * step
    early = step * ladder.centroid(step * slope)
    late = wide * ladder.centroid(wide * slope)
    return np.ascontiguousarray(np.stack([early, late], axis=1).astype(np.float32))
