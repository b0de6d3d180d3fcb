"""What the ``progressive`` codec knows of a model: groups of planes, means, bases, deviations.

Without a profile there is no transform. With one, channels are first put into coordinates in which
every error costs the same (see ``metric``), then the Karhunen-Loeve transform of each group, taken
from calibration data, turns the correlated channels of several heads, of K and V and of
neighbouring layers into uncorrelated components. ``codec.fit`` makes such a profile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.header import Group, plane_groups
from cachegen.codec.ladder import FAMILIES
from cachegen.codec.metric import Metric, weigh
from cachegen.codec.rotary import rotate
from cachegen.errors import ProfileError
from cachegen.profile import Profile
from cachegen.types import Geometry

Floats = NDArray[np.float32]

KIND = "progressive-2"
# A step of V is finer than one of K by this factor in objects without a profile, with one that was
# fitted to KV alone, and with one that has measured what every error costs.
PLAIN_VALUE_WEIGHT, FITTED_VALUE_WEIGHT, MEASURED_VALUE_WEIGHT = 1.0, 1.5, 1.0
MIN_SEGMENT_CHANNELS = 256
# An error in the first third of the layers counts this many times as much as a later one where
# nothing is known of the model: later layers build on it. CacheGen's grading is the same prior.
EARLY_WEIGHT = 16.0
# Vectors of a profile are orthonormal but for their rounding to 8 bits; this share of it is left.
LEAST_GRAM = 0.1
# Tokens beyond this many median norms are stored exactly: attention sinks, mostly.
OUTLIER_NORM = 3.0


@functools.lru_cache(maxsize=4096)
@functools.lru_cache(maxsize=4096)
def planes_of_group(group: Group) -> tuple[tuple[int, bool], ...]:
    """Return (layer, is_value) of the planes of a group, in channel order."""
    sides = [side for side in (False, True) if group.planes >> side & 1]
    layers = range(group.layer, group.layer + group.layers)
    return tuple((layer, side) for layer in layers for side in sides)


def group_matrix(chunk: KVChunk, group: Group, value_weight: float) -> Floats:
    """Join the planes of a group: (T, N) float32, keys before RoPE, values times their weight."""
    parts = []
    for layer, is_value in planes_of_group(group):
        held = chunk.layers[layer]
        if is_value:
            plane = held.values.astype(np.float32) * np.float32(value_weight)
        elif chunk.rope is not None:
            position = chunk.first_position + held.begin
            plane = rotate(held.keys, chunk.rope, layer, position, back=True)
        else:
            plane = held.keys.astype(np.float32)
        parts.append(plane.reshape(held.tokens, plane.shape[1] * plane.shape[2]))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def outlier_tokens(rows: Floats) -> NDArray[np.int64]:
    """Return tokens whose norm is beyond 3 times the median: kept exactly, they spoil no class."""
    if len(rows) < 8:
        return np.zeros(0, np.int64)
    centred = rows - native.column_medians(rows)
    norms = np.sqrt(np.square(centred, dtype=np.float64).sum(axis=1))
    return np.flatnonzero(norms > OUTLIER_NORM * max(float(np.median(norms)), 1e-30))


@dataclass(frozen=True, eq=False)
class GroupBasis:
    """Statistics of one group of N channels, from a profile.

    mean: (N,) float32 of the channels. basis: (N, N) float32, what the decoder multiplies by:
    ``components @ basis.T + mean`` are the channels. It is not orthonormal: components are those of
    weighted channels, where an error of one costs as much as the same error of any other.
    deviation: (N,) float32 of the components. families: (N,) uint8, which table family fits.
    vectors: (N, K) float32, the components of weighted channels, K <= N; columns of ``basis``
    beyond K are 0. blocks: the weights, (H, D, D) for each plane.
    """

    mean: Floats
    basis: Floats
    deviation: Floats
    families: NDArray[np.uint8]
    vectors: Floats
    blocks: tuple[Floats, ...]

    @cached_property
    def _forward(self) -> Floats:
        """Weighted channels to components, (N, K): the pseudo-inverse of rounded vectors."""
        gram = self.vectors.T @ self.vectors
        try:
            # Rounding moves every vector a little, and the more the fewer channels it is made of:
            # what counts is that together they still span all their dimensions.
            np.linalg.cholesky(gram - LEAST_GRAM * np.eye(len(gram), dtype=np.float32))
        except np.linalg.LinAlgError:
            raise ProfileError(
                "vectors of a group",
                got="far from orthonormal",
                expected=f"a Gram matrix with no eigenvalue below {LEAST_GRAM}",
                remedy="the profile is damaged: calibrate again",
            ) from None
        forward: Floats = self.vectors @ np.linalg.inv(gram)
        return forward

    def forward_matrix(self) -> Floats:
        """Return what ``analyse`` multiplies centred channels by, (N, K), weights included."""
        # Blocks are symmetric, so that columns are weighed as rows of the transposed matrix.
        wide = weigh(self._forward.T.astype(np.float64), self.blocks)
        matrix: Floats = np.ascontiguousarray(wide.T, np.float32)
        return matrix

    def analyse(self, rows: Floats) -> Floats:
        """Return the components of channels, (T, N) to (T, N) float32."""
        components = np.zeros(rows.shape, np.float32)
        kept = self.vectors.shape[1]
        components[:, :kept] = weigh(rows - self.mean, self.blocks) @ self._forward
        return components


@dataclass(frozen=True)
class ModelBasis:
    """Groups of a model and, with a profile, their bases.

    value_weight: what V is multiplied by before means and bases apply, and divided by in the end.
    is_measured: a profile has measured what errors cost; it is in its components already.
    """

    groups: tuple[Group, ...]
    bases: tuple[GroupBasis | None, ...]
    value_weight: float = PLAIN_VALUE_WEIGHT
    is_measured: bool = False

    def error_weights(self) -> list[float]:
        """Return what the squared errors of each group count, 1 in the mean over layers.

        It decides what comes first in an object.
        """
        layers = max(group.layer + group.layers for group in self.groups)
        if self.is_measured:
            return [1.0] * len(self.groups)
        weights = [EARLY_WEIGHT if 3 * layer < layers else 1.0 for layer in range(layers)]
        mean = sum(weights) / layers
        return [
            sum(weights[group.layer : group.layer + group.layers]) / group.layers / mean
            for group in self.groups
        ]


def plain_basis(chunk: KVChunk) -> ModelBasis:
    """Return the basis without a profile: no transform.

    Narrow planes of neighbouring layers share segments, K apart from V, so that lane states stay
    cheap; a chunk whose layers hold different tokens is coded plane by plane.
    """
    geometry = chunk.geometry
    span = max(1, -(-MIN_SEGMENT_CHANNELS // (geometry.kv_heads * geometry.key_dim)))
    groups = plane_groups(geometry.layers)
    if chunk.is_uniform and span > 1:
        groups = tuple(
            Group(layer, min(span, geometry.layers - layer), planes)
            for layer in range(0, geometry.layers, span)
            for planes in (1, 2)
        )
    return ModelBasis(groups, (None,) * len(groups))


# Bases are the same for every chunk of a profile; making one takes longer than a chunk.
_LOADED: WeakKeyDictionary[Profile, tuple[Geometry, ModelBasis]] = WeakKeyDictionary()


def load_basis(profile: Profile, geometry: Geometry) -> ModelBasis:
    """Read the basis of a geometry from a profile. Raises: ProfileError if they do not fit."""
    known = _LOADED.get(profile)
    if known is None or known[0] != geometry:
        known = geometry, _read_basis(profile, geometry)
        _LOADED[profile] = known
    return known[1]


def _read_basis(profile: Profile, geometry: Geometry) -> ModelBasis:
    meta = profile.meta
    if meta.get("kind") != KIND:
        raise ProfileError(
            "profile kind",
            got=meta.get("kind"),
            expected=KIND,
            remedy="make one with cachegen calibrate",
        )
    shape = [geometry.layers, geometry.kv_heads, geometry.key_dim, geometry.value_dim]
    if meta.get("geometry") != shape:
        raise ProfileError(
            "geometry of the profile",
            got=meta.get("geometry"),
            expected=shape,
            remedy="calibrate this model and rank, or pass profile=None",
        )
    groups = _read_groups(meta.get("groups"), geometry)
    if meta.get("metric") == "plain":
        metric, value_weight = Metric.plain(geometry), FITTED_VALUE_WEIGHT
    else:
        keys, values = (profile.arrays.get(f"metric.{name}") for name in ("keys", "values"))
        metric, value_weight = Metric.from_arrays(keys, values, geometry), MEASURED_VALUE_WEIGHT
    bases = tuple(
        _read_group(profile, index, metric.blocks(planes_of_group(group)))
        for index, group in enumerate(groups)
    )
    return ModelBasis(groups, bases, value_weight, meta.get("metric") != "plain")


def _read_groups(entries: object, geometry: Geometry) -> tuple[Group, ...]:
    """Check that groups cover every plane once. Raises: ProfileError."""
    try:
        groups = tuple(Group(*(int(field) for field in fields)) for fields in entries)  # type: ignore[attr-defined]
        planes = sorted(plane for group in groups for plane in planes_of_group(group))
    except (TypeError, ValueError):
        groups, planes = (), []
    if planes != [(layer, side) for layer in range(geometry.layers) for side in (False, True)]:
        raise ProfileError(
            "groups of the profile",
            got=entries,
            expected="every plane in one group",
            remedy="the profile is damaged: calibrate again",
        )
    return groups


def _read_group(profile: Profile, index: int, blocks: Sequence[Floats]) -> GroupBasis:
    channels = sum(block.shape[0] * block.shape[1] for block in blocks)
    arrays = {
        name: profile.arrays.get(f"group{index}.{name}")
        for name in ("basis", "mean", "scale", "deviation", "families")
    }
    basis = arrays["basis"]
    kept = basis.shape[1] if basis is not None and basis.ndim == 2 else 0
    kept = kept if 1 <= kept <= channels else channels
    shapes = dict.fromkeys(arrays, (channels,)) | {"basis": (channels, kept), "scale": (kept,)}
    for name, array in arrays.items():
        if array is None or array.shape != shapes[name]:
            raise ProfileError(
                f"{name} of group {index}",
                got=None if array is None else array.shape,
                expected=shapes[name],
                remedy="the profile is damaged: calibrate again",
            )
    mean, levels, scale, deviation = (
        np.asarray(arrays[name], np.float32) for name in ("mean", "basis", "scale", "deviation")
    )
    families = np.asarray(arrays["families"]).astype(np.uint8)
    vectors = levels * scale
    sound = all(np.isfinite(array).all() for array in (mean, vectors, deviation))
    if not sound or families.max() >= FAMILIES:
        raise ProfileError(f"group {index}", got="values out of range", expected="finite ones")
    return make_group_basis(mean, vectors, deviation, families, blocks)


def make_group_basis(
    mean: Floats,
    vectors: Floats,
    deviation: Floats,
    families: NDArray[np.uint8],
    blocks: Sequence[Floats],
) -> GroupBasis:
    """Join the parts of a group's statistics; see ``GroupBasis``."""
    inverses = [np.linalg.inv(block.astype(np.float64)) for block in blocks]
    basis = np.zeros((len(mean), len(mean)), np.float32)
    # Blocks are symmetric, so that rows of the transposed vectors may be weighed.
    basis[:, : vectors.shape[1]] = weigh(vectors.T.astype(np.float64), inverses).T
    return GroupBasis(mean, basis, deviation, families, vectors, tuple(blocks))
