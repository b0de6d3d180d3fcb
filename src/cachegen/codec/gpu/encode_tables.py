"""Tables of the encoder, once for each device: inverses of frozen models, code lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import ladder
from cachegen.codec.entropy import TOTAL, parametric_tables
from cachegen.codec.passes import centroid_shares, coarse_escapes, code_costs
from cachegen.native.cuda import plan
from cachegen.native.cuda.device import Device, Memory
from cachegen.native.cuda.encode_plan import INVERSE_WORDS

MAX_PASSES = 6
_KEY = "encode"


@dataclass(frozen=True)
class EncodeTables:
    """Addresses of what ``csrc/cuda`` calls inverses, costs, edges and shares.

    costs, shares: by the number of passes, from 1. gains: of a unit more in a frequency, in bits.
    """

    coarse: np.uint64
    refine: np.uint64
    parametric: np.uint64
    escapes: np.uint64
    edges: np.uint64
    gains: np.uint64
    parametric_costs: np.uint64
    costs: tuple[np.uint64, ...]
    shares: tuple[np.uint64, ...]
    memory: tuple[Memory, ...]


def encode_tables(device: Device, stream: Any) -> EncodeTables:
    """Return the tables of a device; the first call builds them and waits for that."""
    if _KEY not in device.tables:
        device.tables[_KEY] = _build(device, stream)
    tables: EncodeTables = device.tables[_KEY]
    return tables


def _build(device: Device, stream: Any) -> EncodeTables:
    sets = (
        (ladder.coarse_freqs().reshape(-1, 32), 32),
        (ladder.refine_freqs().reshape(-1, 3), 4),
        (parametric_tables()[0].freqs, 32),
    )
    job = plan.Plan()
    items = np.zeros(len(sets), plan.MODELS)
    for item, (freqs, buckets) in zip(items, sets, strict=True):
        item["freqs"] = job.upload.add(freqs.astype("<u2"))
        item["buckets"] = job.work.reserve(len(freqs) * 4 * INVERSE_WORDS * buckets, 256)
        item["count"], item["alphabet"], item["kind"] = len(freqs), freqs.shape[1], buckets
    upload = job.upload
    escapes = upload.add(coarse_escapes())
    edges = upload.add(ladder.class_edges().astype("<f4"))
    gains = upload.add(unit_gains())
    parametric_costs = upload.add(np.ascontiguousarray(parametric_tables()[1].T, "<f8"))
    costs = [upload.add(_ladder_costs(passes)) for passes in range(1, MAX_PASSES + 1)]
    shares = [upload.add(centroid_shares(passes)) for passes in range(1, MAX_PASSES + 1)]
    record = np.zeros(1, plan.LAUNCH)
    record["items"] = job.structs(plan.MODELS, items)
    record["errors"] = job.work.reserve(4)
    record["extra"] = blocks = -(-max(len(freqs) for freqs, _ in sets) // 128)
    job.launch("build_inverses", blocks * len(sets), record)
    memory = device.allocate(job.upload_bytes, stream)
    work = device.allocate(job.workspace_bytes, stream)
    image, launches = job.finish(memory.address, work.address)
    device.upload(memory.address, image, stream)
    for launch in launches:
        device.launch(*launch, stream)
    device.download(work.address, 1, stream)  # waits

    def place(address: np.uint64) -> np.uint64:
        return plan.absolute(int(plan.resolve(address, memory.address, work.address, 0)))

    coarse, refine, parametric = (plan.absolute(int(item["buckets"])) for item in items)
    return EncodeTables(
        coarse,
        refine,
        parametric,
        place(escapes),
        place(edges),
        place(gains),
        place(parametric_costs),
        tuple(place(address) for address in costs),
        tuple(place(address) for address in shares),
        (memory, work),
    )


def unit_gains() -> NDArray[np.float64]:
    """Return log2((n + 1) / n) for n from 0 to 4096, 0 at 0, as normalize_counts computes it."""
    n = np.arange(1, TOTAL + 1)
    gains = np.concatenate([[0.0], np.log2((n + 1) / n)])
    return np.ascontiguousarray(gains, "<f8")


def _ladder_costs(passes: int) -> NDArray[np.uint32]:
    """Return what is counted costs under every family and class: (counters, 192), 1/1024 bit."""
    costs = code_costs(passes)
    rows = costs.transpose(0, 2, 1).reshape(-1, costs.shape[1])
    return np.ascontiguousarray(rows, "<u4")
