"""Fused encoding of ``progressive`` chunks: from K and V to the bytes of all passes.

Two passes over the input, groups shared by the threads of the call (docs/fused-encode.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Array, Symbols
from cachegen.native._tables import Tables
from cachegen.native.fused import data_address
from cachegen.native.threads import threads
from cachegen.types import KVDtype

LANES = 32
# Kinds of a coded pass, as the extension numbers them.
RANS, BYTES, PACKED, SPARSE = 0, 1, 2, 3


class PlaneSource(NamedTuple):
    """One plane of a chunk: (T, H, D) in memory that the caller keeps alive.

    address: of token 0, head 0. strides: bytes. weight: what elements are multiplied by.
    angles: (2, D_rot / 2, P * 32) float32, cos and sin that turn keys back, in the order of
    ``token_order``, or None. interleaved: pairs of channels are neighbours.
    """

    address: int
    dtype: str
    token_stride: int
    head_stride: int
    heads: int
    dim: int
    weight: float
    angles: NDArray[np.float32] | None
    interleaved: bool


class EncodeSource(NamedTuple):
    """A group to encode: planes, or with a profile components (N, P * 32) in ``token_order``.

    families: (N,) uint8 of the profile, or None. exempt: tokens, rising.
    """

    tokens: int
    channels: int
    planes: Sequence[PlaneSource]
    components: NDArray[np.float32] | None
    families: Symbols | None
    exempt: Sequence[int]


class EncodedGroup(NamedTuple):
    """What the encoder found for a group.

    exempt: tokens, rising. mean_levels: (N,) int8 as bytes; mean_scale: 0 for no mean.
    classes: (N,) uint8 as bytes, family * 64 + class. class_offset: shift of a profile's.
    errors: squared error in finest steps, by decay, then by pass. passes: (kind,
    body), bodies being views of the encoder's memory.
    """

    exempt: list[int]
    mean_levels: bytes
    mean_scale: float
    classes: bytes
    class_offset: int
    errors: list[float]
    passes: list[tuple[int, Symbols]]


class EncodeTables:
    """The frozen tables of the ladder, ready for the encoder; make one per process."""

    def __init__(self, coarse: Tables, refine: Tables) -> None:
        self._core = _core.EncodeTables(coarse._core, refine._core)


class ChunkEncoder:
    """Encodes the groups of one chunk; they must stay alive and unchanged meanwhile."""

    def __init__(self, groups: Sequence[EncodeSource]) -> None:
        self._core = _core.ChunkEncoder(groups)
        self._count = len(groups)

    def survey(self) -> tuple[int | None, list[float]]:
        """Find means and exempt tokens of groups without components.

        Returns: the first group with a value that is not finite or beyond 2**100, or None; and the
            energy of the centred values of every group.
        """
        self._core.survey(threads())
        found = [self._core.surveyed(index) for index in range(self._count)]
        refused = next((index for index, (bad, _) in enumerate(found) if bad), None)
        return refused, [energy for _, energy in found]

    def encode(
        self,
        step: float,
        passes: int,
        *,
        base_classes: Sequence[Symbols | None],
        tables: EncodeTables,
        costs: NDArray[np.int16],
        centroids: NDArray[np.float64],
    ) -> list[EncodedGroup]:
        """Encode all groups after ``survey``.

        step: the finest one. base_classes: (N,) uint8 of groups with components.
        costs: (pairs, 192, 2), of what is counted under every way to code it.
        centroids: (4, passes, 2, 64), see ``codec.ladder.cell_shares``.
        """
        self._core.encode(step, passes, base_classes, tables._core, costs, centroids, threads())
        return [EncodedGroup(*self._core.encoded(index)) for index in range(self._count)]


def plane_source(
    plane: Array,
    dtype: KVDtype,
    *,
    weight: float,
    angles: NDArray[np.float32] | None,
    interleaved: bool,
) -> PlaneSource:
    """Describe a plane (T, H, D) whose head dimension lies side by side."""
    address = data_address(plane)
    token_stride, head_stride, _ = plane.strides
    _, heads, dim = plane.shape
    return PlaneSource(
        address, dtype.label, token_stride, head_stride, heads, dim, weight, angles, interleaved
    )


def token_order(tokens: int) -> NDArray[np.int64]:
    """Return the token of every column of angles and components, (P * 32,).

    The columns of a place are its lanes from the last to the first, which is how the encoder meets
    them. A column of an idle lane has the number of a token that does not exist.
    """
    places = -(-tokens // LANES)
    lanes = np.arange(LANES - 1, -1, -1)
    return (np.arange(places)[:, None] + places * lanes).ravel()
