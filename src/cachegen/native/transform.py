"""Decoding of ``progressive`` groups with a profile: from bytes through one product to K and V.

The processor's matrix unit multiplies where there is one, else its vector unit; ``can_transform``
says whether there is a kernel at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachegen.native import _core
from cachegen.native._checks import Symbols
from cachegen.native._tables import Tables
from cachegen.native.fused import Constants, PlaneTarget, rope_kinds
from cachegen.native.threads import threads
from cachegen.types import KVDtype, RopeSpec


class PackedBasis:
    """A basis in the order that the kernels read it.

    values: (N, N) float32, C-contiguous, components to channels, and mean: (N,) float32 of the
    channels; kept alive, not copied, and packed when first used.
    dims: of every head, in channel order; their sum is N. Raises: GeometryError.
    """

    def __init__(
        self, values: NDArray[np.float32], mean: NDArray[np.float32], *, dims: Sequence[int]
    ) -> None:
        self._core = _core.PackedBasis(values, mean, np.asarray(dims, np.uint32))

    @property
    def is_joint(self) -> bool:
        """Whether some component makes channels of several heads."""
        joint: bool = self._core.is_joint
        return joint


class TransformSource(NamedTuple):
    """The bytes of one group and all that the decoder needs beside them.

    passes: (kind, body) of the passes at hand, pass 0 first. side: its side information.
    classes: (N,) uint8 of the components, family * 64 + class.
    planes: in channel order. constants: with what V is divided by.
    """

    tokens: int
    passes: Sequence[tuple[int, memoryview]]
    side: Symbols
    basis: PackedBasis
    classes: Symbols
    constants: Constants
    planes: Sequence[PlaneTarget]


def can_transform(dtype: KVDtype) -> bool:
    """Return whether ``decode_transformed`` has a kernel for targets of a type."""
    found: bool = _core.can_transform(dtype.label)
    return found


def uses_tiles(dtype: KVDtype) -> bool:
    """Return whether the matrix unit (AMX) multiplies for targets of a type."""
    found: bool = _core.uses_tiles(dtype.label)
    return found


def allow_tiles(allowed: bool, /) -> bool:
    """Let the matrix unit (AMX) be used or not, and return what was so before.

    It is unless the environment variable ``CACHEGEN_TILES`` is 0.
    """
    before: bool = _core.allow_tiles(allowed)
    return before


def decode_transformed(
    groups: Sequence[TransformSource],
    *,
    dtype: KVDtype,
    stored: KVDtype,
    passes: int,
    coarse: Tables,
    refine: Tables,
    rope: RopeSpec | None,
) -> None:
    """Decode groups of one object with a profile into their targets.

    dtype: of the targets. stored: of the object. passes: of the whole object, 1 to 6.
    coarse, refine: the frozen tables of the ladder.
    Raises: TruncatedError, CorruptError, GeometryError; ConfigError unless ``can_transform``; after
    an error the targets hold anything.
    """
    entries = [
        (
            group.tokens,
            group.passes,
            group.side,
            group.basis._core,
            group.classes,
            group.constants,
            group.planes,
        )
        for group in groups
    ]
    _core.decode_transformed(
        dtype.label,
        stored.label,
        passes,
        coarse._core,
        refine._core,
        rope_kinds(rope),
        entries,
        threads(),
    )
