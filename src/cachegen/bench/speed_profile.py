"""Synthetic profiles, with KV that they fit: what a KLT costs, beside its matrix product alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cachegen.bench.speed_data import SpeedGeometry
from cachegen.chunk import KVChunk
from cachegen.codec import ladder, passes
from cachegen.codec.basis import FITTED_VALUE_WEIGHT, KIND, load_basis, planes_of_group
from cachegen.codec.fit import BASIS_LEVELS
from cachegen.codec.fused import channels_of
from cachegen.codec.header import Group
from cachegen.codec.progressive import unpack_params
from cachegen.codec.reader import ObjectReader
from cachegen.codec.reference import profile_classes
from cachegen.codec.rotary import rotate
from cachegen.codec.side import GroupSide
from cachegen.profile import Profile

Floats = NDArray[np.float32]

# Every layer costs the same; more of them would only take longer to prepare. What is done once for
# an object weighs more here than with all layers of a model, the less so the more there are.
LAYERS = {"head": 16, "joint": 2}
CHUNK_TOKENS = 256
GAUSS = 2
# Standard deviation and mean of a channel, all together; about what models have.
SCALE, MEAN = 1.0, 0.5


@dataclass(frozen=True)
class ProfileCase:
    """A geometry of few layers, its profile, and a chunk of bfloat16 KV that the profile fits.

    transform: "head", a KLT for each head, or "joint", one for K and V of a layer.
    """

    transform: str
    geometry: SpeedGeometry
    profile: Profile
    chunk: KVChunk


def profile_case(geometry: SpeedGeometry, transform: str, *, seed: int = 0) -> ProfileCase:
    """Draw a random basis whose components have the spectrum measured on the reference model.

    Values are independent Gauss draws of each component. transform: as in ``ProfileCase``.
    """
    geometry = replace(geometry, layers=min(LAYERS[transform], geometry.layers))
    rng = np.random.default_rng(seed)
    width = geometry.kv_heads * geometry.dim
    joint = transform == "joint"
    groups = [
        Group(layer, 1, planes)
        for layer in range(geometry.layers)
        for planes in ((3,) if joint else (1, 2))
    ]
    deviations = _spectrum(transform, 2 * width if joint else geometry.dim)
    arrays: dict[str, Any] = {}
    kv = np.empty((geometry.layers, 2, CHUNK_TOKENS, geometry.kv_heads, geometry.dim), np.float32)
    for index, group in enumerate(groups):
        if joint:
            vectors, spread = _orthonormal(rng, 2 * width), deviations
        else:
            vectors, spread = _per_head(rng, geometry), np.repeat(deviations, geometry.kv_heads)
        channels = len(vectors)
        scale = (np.abs(vectors).max(axis=0) / BASIS_LEVELS).astype(np.float32)
        mean = rng.normal(0, MEAN, channels).astype(np.float32)
        parts = {
            "mean": mean,
            "basis": np.rint(vectors / scale).astype(np.int8),
            "scale": scale,
            "deviation": spread.astype(np.float32),
            "families": np.full(channels, GAUSS, np.uint8),
        }
        arrays |= {f"group{index}.{name}": array for name, array in parts.items()}
        draws = rng.standard_normal((CHUNK_TOKENS, channels)) * spread
        rows = (draws @ vectors.T + mean).astype(np.float32)
        for place, (layer, is_value) in enumerate(planes_of_group(group)):
            plane = rows[:, place * width : (place + 1) * width]
            kv[layer, int(is_value)] = plane.reshape(kv.shape[2:])
    kv[:, 1] /= np.float32(FITTED_VALUE_WEIGHT)
    spec = geometry.rope
    if spec is not None:
        for layer in range(geometry.layers):
            kv[layer, 0] = rotate(kv[layer, 0], spec, layer, 0, back=False)
    chunk = KVChunk.from_array(kv.astype(ml_dtypes.bfloat16), rope=spec)
    meta = {
        "kind": KIND,
        "geometry": [geometry.layers, geometry.kv_heads, geometry.dim, geometry.dim],
        "groups": [[group.layer, group.layers, group.planes] for group in groups],
        "metric": "plain",
        "calibration_tokens": 0,
        "before_rope": spec is not None,
    }
    return ProfileCase(transform, geometry, Profile(geometry.name, arrays, meta), chunk)


def _spectrum(transform: str, count: int) -> NDArray[np.float64]:
    """Return the standard deviations of components, largest first."""
    file = resources.files("cachegen.bench") / "speed_statistics.json"
    logs = json.loads(file.read_text(encoding="utf-8"))[f"spectrum_{transform}"]
    ranks = np.linspace(0, 1, count)
    values: NDArray[np.float64] = SCALE * np.exp(
        np.interp(ranks, np.linspace(0, 1, len(logs)), logs)
    )
    return values


def _orthonormal(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    vectors: NDArray[np.float64] = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return vectors


def _per_head(rng: np.random.Generator, geometry: SpeedGeometry) -> NDArray[np.float64]:
    """Return vectors that touch one head each, those of all heads in turn, (N, N)."""
    heads, dim = geometry.kv_heads, geometry.dim
    vectors = np.zeros((heads, dim, dim, heads))
    for head in range(heads):
        vectors[head, :, :, head] = _orthonormal(rng, dim)
    return vectors.reshape(heads * dim, dim * heads)


def matrix_product(data: bytes, case: ProfileCase) -> Callable[[], object]:
    """Return a call that does nothing but the matrix products of decoding an object.

    data: an object or a prefix. Only components that are not zero throughout the chunk count, as
    for the decoder. With one block for each head it is a product for each of them.
    """
    reader = ObjectReader(data, allow_partial=True)
    header = reader.header
    step, _ = unpack_params(header)
    basis = load_basis(case.profile, header.geometry)
    products: list[tuple[Floats, Floats, Floats]] = []
    for index, (group, statistics) in enumerate(zip(header.groups, basis.bases, strict=True)):
        assert statistics is not None
        shape = (header.tokens, channels_of(header, group))
        dtype = header.geometry.dtype
        side = GroupSide.from_bytes(reader.side(index, 0), *shape, dtype, plain=False)
        classes = profile_classes(statistics, step, side.class_offset)
        digits = passes.read(reader, index, shape, classes)
        values = ladder.descend(digits, header.passes, classes % ladder.CLASSES, side.decay / 64)
        used = np.flatnonzero(values.any(axis=0))
        blocks = [slice(None)]
        if case.transform == "head":
            dim = case.geometry.dim
            blocks = [slice(head * dim, (head + 1) * dim) for head in range(shape[1] // dim)]
        for block in blocks:
            rows = statistics.basis[block][:, used]
            touched = rows.any(axis=0)
            right = np.ascontiguousarray(rows[:, touched].T)
            left = np.ascontiguousarray(values[:, used[touched]])
            products.append((left, right, np.empty((len(left), right.shape[1]), np.float32)))

    def multiply() -> None:
        for left, right, out in products:
            np.matmul(left, right, out=out)

    return multiply


@functools.cache
def known_case(geometry: SpeedGeometry, transform: str) -> ProfileCase:
    """Return a case that is made once."""
    return profile_case(geometry, transform)
