"""Tables of the encoder, once for each device: inverses of frozen models, code lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec import ladder
from cachegen.codec.entropy import TOTAL, parametric_tables
from cachegen.codec.gpu.frozen import build_sets, held
from cachegen.codec.passes import centroid_shares, coarse_escapes, code_costs
from cachegen.native.cuda.device import Device, Memory
from cachegen.native.cuda.encode_plan import INVERSE_WORDS
from cachegen.native.cuda.plan import MAX_PASSES

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
    return held(device, _KEY, lambda: _build(device, stream))


def _build(device: Device, stream: Any) -> EncodeTables:
    passes = range(1, MAX_PASSES + 1)
    constants = [
        coarse_escapes(),
        ladder.class_edges().astype("<f4"),
        unit_gains(),
        np.ascontiguousarray(parametric_tables()[1].T, "<f8"),
        *(_ladder_costs(count) for count in passes),
        *(centroid_shares(count) for count in passes),
    ]
    sets, places, memory = build_sets(
        device, "build_inverses", 4 * INVERSE_WORDS, constants, stream
    )
    coarse, refine, parametric = sets
    escapes, edges, gains, parametric_costs, *rest = places
    costs, shares = tuple(rest[:MAX_PASSES]), tuple(rest[MAX_PASSES:])
    return EncodeTables(
        *(coarse, refine, parametric, escapes, edges, gains, parametric_costs),
        costs=costs,
        shares=shares,
        memory=memory,
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
