"""The ``progressive`` codec: one stored object, every quality.

Keys are taken back before RoPE, means removed, with a profile a KLT joins heads, K and V and
layers; one step size for everything, and nested ternary passes. Any prefix that holds every pass 0
decodes. The law of its bytes is FORMAT.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cachegen.chunk import KVChunk
from cachegen.codec import ladder, passes
from cachegen.codec.base import Codec, empty_chunk
from cachegen.codec.basis import (
    GroupBasis,
    ModelBasis,
    group_matrix,
    load_basis,
    outlier_tokens,
    plain_basis,
    planes_of_group,
)
from cachegen.codec.container import SIDE, write_object
from cachegen.codec.fused import decode_plain
from cachegen.codec.header import Group, Header, SegmentBody, plane_groups
from cachegen.codec.reader import ObjectReader
from cachegen.codec.rotary import rotate
from cachegen.codec.side import GroupSide
from cachegen.codec.target import Target
from cachegen.errors import ConfigError, CorruptError, NonFiniteError, ProfileError
from cachegen.profile import Profile, require_profile
from cachegen.types import Array, ChunkKey, KVDtype

Floats = NDArray[np.float32]

DEFAULT_PASSES = 4
DEFAULT_SINK_TOKENS = 1
MAX_SINK_TOKENS = 64
DEFAULT_STEP = 0.3
DEFAULT_PROFILE_STEP = 0.12
MAX_PASSES = 6
MAX_MAGNITUDE = 2.0**100
_PARAMS = struct.Struct("<BBHffff")


@dataclass(frozen=True)
class ProgressiveCodec(Codec):
    """One object for every quality.

    passes: 1 to 6; each later one makes the step three times finer.
    step: the finest step, relative to the root mean square of the chunk's centred values; None
        takes 0.3 without a profile and 0.12 with one, about 4 and 3 bits/value in full.
    sink_tokens: so many first tokens of a context are stored exactly: attention sinks, whose errors
        reach every later token.
    profile: what ``cachegen calibrate`` made; chunks whose layers hold different tokens (sliding
        windows) are coded without it.
    """

    name: ClassVar[str] = "progressive"
    codec_id: ClassVar[int] = 3
    passes: int = DEFAULT_PASSES
    step: float | None = None
    sink_tokens: int = DEFAULT_SINK_TOKENS
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= MAX_PASSES:
            raise ConfigError("passes", got=self.passes, expected=f"1 to {MAX_PASSES}")
        if not 0 <= self.sink_tokens <= MAX_SINK_TOKENS:
            raise ConfigError(
                "sink_tokens", got=self.sink_tokens, expected=f"0 to {MAX_SINK_TOKENS}"
            )
        if self.step is not None and not 1e-4 <= self.step <= 100:
            raise ConfigError("step", got=self.step, expected="1e-4 to 100, or None")

    def config(self) -> dict[str, Any]:
        return {
            "codec": self.name,
            "passes": self.passes,
            "step": self.step,
            "sink_tokens": self.sink_tokens,
            "profile": self.profile.digest.hex() if self.profile else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, profile: Profile | None = None) -> Self:
        """Build from what ``config`` returned; a profile it names has to be passed.

        Raises: ConfigError, ProfileError.
        """
        wanted = config.get("profile")
        if wanted is not None:
            require_profile(profile, wanted)
        return cls(
            passes=config.get("passes", DEFAULT_PASSES),
            step=config.get("step"),
            sink_tokens=config.get("sink_tokens", DEFAULT_SINK_TOKENS),
            profile=profile,
        )

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        uses_profile = self.profile is not None and chunk.is_uniform
        if uses_profile and self.profile is not None:
            basis = load_basis(self.profile, chunk.geometry)
            if self.profile.meta.get("before_rope") != (chunk.rope is not None):
                raise ProfileError(
                    "RoPE of the chunk",
                    got="known" if chunk.rope else "unknown",
                    expected="known" if chunk.rope is None else "unknown",
                    remedy="calibrate on captures of the same kind",
                )
        else:
            basis = plain_basis(chunk)
        relative = self.step
        if relative is None:
            relative = DEFAULT_PROFILE_STEP if uses_profile else DEFAULT_STEP
        sinks = np.arange(max(0, self.sink_tokens - chunk.first_position))
        groups = [_Prepared.of(chunk, *pair, basis, also=sinks) for pair in _pairs(basis)]
        values = sum(group.coefficients.size for group in groups)
        energy = sum(float(np.square(g.coefficients, dtype=np.float64).sum()) for g in groups)
        spread = float(np.sqrt(energy / max(values, 1)))
        step = float(np.float32(relative * spread)) if spread > 0 else 1.0
        segments: list[SegmentBody] = []
        reach = ladder.reach(self.passes) * step
        for index, (group, pair) in enumerate(zip(groups, _pairs(basis), strict=True)):
            beyond = np.flatnonzero((np.abs(group.coefficients) > reach).any(axis=1))
            beyond += chunk.layers[pair[0].layer].begin
            if len(beyond):
                also = np.union1d(sinks, beyond)
                segments += _Prepared.of(chunk, *pair, basis, also=also).encode(
                    index, step, self.passes
                )
            else:
                segments += group.encode(index, step, self.passes)
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=self.passes,
            params=_PARAMS.pack(0, 0, 0, step, basis.value_weight, spread, 0.0),
            segments=passes.order(segments),
            groups=None if basis.groups == plane_groups(chunk.geometry.layers) else basis.groups,
            rope=chunk.rope,
            profile=self.profile.digest if uses_profile and self.profile else None,
            key=key,
        )

    @classmethod
    def decode_object(cls, reader: ObjectReader, *, profile: Profile | None) -> KVChunk:
        header = reader.header
        step, value_weight = unpack_params(header)
        basis = _basis_of(header, profile)
        if basis.groups != header.groups:
            raise CorruptError("groups", got="others than the basis", expected="those of the basis")
        chunk = empty_chunk(header)
        if header.profile is None:
            decode_plain(reader, Target(header, chunk), step=step, value_weight=value_weight)
            return chunk
        for index, (group, statistics) in enumerate(_pairs(basis)):
            held = chunk.layers[group.layer]
            tokens = held.tokens
            channels = sum(
                header.geometry.kv_heads * header.geometry.plane_dim(is_value=side)
                for _, side in planes_of_group(group)
            )
            side = GroupSide.from_bytes(
                reader.side(index, 0), tokens, channels, header.geometry.dtype, statistics is None
            )
            classes = side.classes
            if statistics is not None:
                classes = profile_classes(statistics, step, side.class_offset)
            digits = passes.read(reader, index, (tokens, channels), classes)
            values = ladder.descend(
                digits, header.passes, classes % ladder.CLASSES, side.decay / 64
            )
            values *= np.float32(step)
            _write_group(header, chunk, group, statistics, side, values, value_weight)
        return chunk

    @classmethod
    def coded_shape(cls, header: Header, group: int, pass_index: int) -> tuple[int, int, int]:
        entry = header.groups[group]
        begin, end = header.ranges[entry.layer]
        channels = sum(
            header.geometry.kv_heads * header.geometry.plane_dim(is_value=side)
            for _, side in planes_of_group(entry)
        )
        return end - begin, channels, 0


def _pairs(basis: ModelBasis) -> list[tuple[Group, GroupBasis | None]]:
    return list(zip(basis.groups, basis.bases, strict=True))


@dataclass(frozen=True)
class _Prepared:
    """A group ready for quantisation.

    coefficients: (T, N) float32, zero in exempt rows. side: what the decoder needs beside digits.
    """

    coefficients: Floats
    side: GroupSide
    statistics: GroupBasis | None

    @classmethod
    def of(
        cls,
        chunk: KVChunk,
        group: Group,
        statistics: GroupBasis | None,
        basis: ModelBasis,
        *,
        also: NDArray[np.int64],
    ) -> _Prepared:
        """Transform a group. also: tokens of the chunk to exempt beside the outliers."""
        rows = group_matrix(chunk, group, basis.value_weight)
        if rows.size and not float(np.abs(rows).max()) <= MAX_MAGNITUDE:
            _refuse_non_finite(chunk, group)
        # Tokens of the chunk become rows of what these layers hold.
        held = also - chunk.layers[group.layer].begin
        held = held[(held >= 0) & (held < len(rows))]
        outliers = np.union1d(outlier_tokens(rows), held).astype(np.int64)
        exempt = np.concatenate(
            [
                _flat(chunk.layers[layer].plane(is_value=side)[outliers])
                for layer, side in planes_of_group(group)
            ],
            axis=1,
        )
        side = GroupSide.empty(rows.shape[1], outliers, exempt)
        if statistics is None:
            kept = np.delete(rows, outliers, axis=0)
            side = side.with_mean(kept)
            centred = rows - side.mean
        else:
            centred = (rows - statistics.mean) @ statistics.basis
        centred[outliers] = 0
        return cls(centred, side, statistics)

    def encode(self, index: int, step: float, count: int) -> list[SegmentBody]:
        scaled = self.coefficients / np.float32(step)
        digits = ladder.climb(scaled, count)
        if self.statistics is None:
            classes = passes.fit_classes(digits)
            side = self.side.with_classes(classes)
        else:
            offset = passes.fit_offset(
                digits, lambda shift: profile_classes(self.statistics, step, shift)
            )
            classes = profile_classes(self.statistics, step, offset)
            side = self.side.with_offset(offset)
        scale_class = classes % ladder.CLASSES
        decay, errors = passes.fit_decay(scaled, digits, scale_class)
        distortions = [error * step * step for error in errors]
        body = side.with_decay(decay).to_bytes(plain=self.statistics is None)
        return [
            SegmentBody(index, 0, SIDE, body, distortions[0]),
            *passes.write(index, digits, classes, distortions),
        ]


def profile_classes(statistics: GroupBasis | None, step: float, offset: int) -> NDArray[np.uint8]:
    """Return family * 64 + class of every component, from its deviation in the profile."""
    assert statistics is not None
    base = ladder.class_of(statistics.deviation / np.float64(np.float32(step))).astype(np.int64)
    shifted = np.clip(base + offset, 0, ladder.CLASSES - 1)
    return (statistics.families * ladder.CLASSES + shifted).astype(np.uint8)


def _flat(plane: Array) -> Array:
    """Join heads and dimensions: (T, H, D) to (T, H*D), also for no tokens."""
    return plane.reshape(plane.shape[0], plane.shape[1] * plane.shape[2])


def _refuse_non_finite(chunk: KVChunk, group: Group) -> None:
    for layer, side in planes_of_group(group):
        plane = chunk.layers[layer].plane(is_value=side).astype(np.float32)
        bad = np.argwhere(~(np.abs(plane) <= MAX_MAGNITUDE))
        if len(bad):
            token, head, dim = (int(i) for i in bad[0])
            raise NonFiniteError(
                f"{'V' if side else 'K'} of layer {layer}, token {token}, head {head}, "
                f"dimension {dim}",
                got=plane[token, head, dim],
                expected="a finite magnitude up to 2^100",
                remedy="use the raw codec, which keeps such values, or drop the prompt",
            )


def unpack_params(header: Header) -> tuple[float, float]:
    if len(header.params) != _PARAMS.size:
        raise CorruptError(
            "progressive parameters", got=len(header.params), expected=f"{_PARAMS.size} bytes"
        )
    version, flags, zero, step, weight, spread, reserved = _PARAMS.unpack(header.params)
    numbers = np.array([step, weight, spread])
    sound = np.isfinite(numbers).all() and step > 0 and weight > 0 and spread >= 0
    if version or flags or zero or reserved or not sound or header.passes > MAX_PASSES:
        raise CorruptError("progressive parameters", got=header.params.hex(), expected="known ones")
    return float(step), float(weight)


def _basis_of(header: Header, profile: Profile | None) -> ModelBasis:
    if header.profile is None:
        for group in header.groups:
            if len(set(header.ranges[group.layer : group.layer + group.layers])) > 1:
                raise CorruptError("group", got="layers with different tokens", expected="the same")
        return ModelBasis(header.groups, (None,) * len(header.groups))
    return load_basis(require_profile(profile, header.profile), header.geometry)


def _write_group(
    header: Header,
    chunk: KVChunk,
    group: Group,
    statistics: GroupBasis | None,
    side: GroupSide,
    values: Floats,
    value_weight: float,
) -> None:
    """Undo transform, mean, weight and RoPE, and store the planes of a group."""
    if statistics is None:
        values += side.mean
    else:
        values = values @ statistics.basis.T + statistics.mean
    offset = 0
    for layer, is_value in planes_of_group(group):
        held = chunk.layers[layer]
        plane = held.plane(is_value=is_value)
        width = plane.shape[1] * plane.shape[2]
        part = values[:, offset : offset + width].reshape(plane.shape)
        if is_value:
            part = part / np.float32(value_weight)
        elif header.rope is not None:
            position = header.first_position + held.begin
            part = rotate(part, header.rope, layer, position, back=False)
        with np.errstate(over="ignore"):
            plane[:] = _clamped(part, plane.dtype)
        plane[side.exempt_tokens] = side.exempt_rows[:, offset : offset + width].reshape(
            -1, *plane.shape[1:]
        )
        offset += width


def _clamped(values: Floats, dtype: np.dtype[Any]) -> Array:
    """Round to the dtype; float16 to its finite range, for a value near the end may overshoot."""
    if KVDtype.of(dtype) is KVDtype.FLOAT16:
        limit = np.float32(np.finfo(np.float16).max)
        values = np.clip(values, -limit, limit)
    result: Array = values.astype(dtype)
    return result


def spread_of(header: Header) -> float:
    """Return the root mean square of the centred values that an object's steps are relative to."""
    return float(_PARAMS.unpack(header.params)[5])
