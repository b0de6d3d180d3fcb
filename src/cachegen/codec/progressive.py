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

from cachegen.chunk import KVChunk
from cachegen.codec import passes
from cachegen.codec.base import Codec
from cachegen.codec.basis import (
    ModelBasis,
    load_basis,
    plain_basis,
)
from cachegen.codec.container import write_object
from cachegen.codec.fused import channels_of, decode_plain
from cachegen.codec.fused_encode import FusedEncoder, encode_chunk
from cachegen.codec.fused_profile import decode_with_profile
from cachegen.codec.header import Header, plane_groups
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import ConfigError, CorruptError, ProfileError
from cachegen.profile import Profile, require_profile
from cachegen.types import ChunkKey

DEFAULT_SINK_TOKENS = 1
MAX_SINK_TOKENS = 64
# Number of passes and relative finest step: without a profile, with one, and with one that has
# measured what errors cost.
PLAIN_LADDER = (4, 0.3)
PROFILE_LADDER = (4, 0.12)
MEASURED_LADDER = (5, 0.22)
MAX_PASSES = 6
_PARAMS = struct.Struct("<BBHffff")


@dataclass(frozen=True)
class ProgressiveCodec(Codec):
    """One object for every quality.

    passes: 1 to 6; each later one makes the step three times finer. None takes 4, or 5 with a
        profile that has measured what errors cost.
    step: the finest step, relative to the root mean square of the chunk's centred values. None
        takes one at which the whole object is as good as uncompressed.
    sink_tokens: so many first tokens of a context are stored exactly: attention sinks, whose errors
        reach every later token.
    profile: what ``cachegen calibrate`` made; chunks whose layers hold different tokens (sliding
        windows) are coded without it.
    """

    name: ClassVar[str] = "progressive"
    codec_id: ClassVar[int] = 3
    passes: int | None = None
    step: float | None = None
    sink_tokens: int = DEFAULT_SINK_TOKENS
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.passes is not None and not 1 <= self.passes <= MAX_PASSES:
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
            passes=config.get("passes"),
            step=config.get("step"),
            sink_tokens=config.get("sink_tokens", DEFAULT_SINK_TOKENS),
            profile=profile,
        )

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        uses_profile = self.profile is not None and chunk.is_uniform
        if uses_profile and self.profile is not None:
            basis = load_basis(self.profile, chunk.geometry)
            self.check_rope(chunk)
        else:
            basis = plain_basis(chunk)
        count, relative = self.ladder_of(basis)
        sinks = np.arange(max(0, self.sink_tokens - chunk.first_position))
        segments, step, spread = encode_chunk(
            chunk,
            basis,
            sinks=sinks,
            passes_=count,
            relative_step=relative,
            make_encoder=FusedEncoder,
        )
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=count,
            params=pack_params(step, basis.value_weight, spread),
            segments=passes.order(segments),
            groups=None if basis.groups == plane_groups(chunk.geometry.layers) else basis.groups,
            rope=chunk.rope,
            profile=self.profile.digest if uses_profile and self.profile else None,
            key=key,
        )

    def check_rope(self, chunk: KVChunk) -> None:
        """Raise ProfileError if the profile was made of keys of another kind."""
        if self.profile is None:
            return
        if self.profile.meta.get("before_rope") != (chunk.rope is not None):
            raise ProfileError(
                "RoPE of the chunk",
                got="known" if chunk.rope else "unknown",
                expected="known" if chunk.rope is None else "unknown",
                remedy="calibrate on captures of the same kind",
            )

    def ladder_of(self, basis: ModelBasis) -> tuple[int, float]:
        """Return the number of passes and the relative finest step."""
        passes_, step = PLAIN_LADDER
        if basis.bases[0] is not None:
            measured = basis.is_measured
            passes_, step = MEASURED_LADDER if measured else PROFILE_LADDER
        return self.passes or passes_, step if self.step is None else self.step

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        step, value_weight = unpack_params(header)
        basis = _basis_of(header, profile)
        if basis.groups != header.groups:
            raise CorruptError("groups", got="others than the basis", expected="those of the basis")
        if header.profile is None:
            decode_plain(reader, target, step=step, value_weight=value_weight)
            return
        decode_with_profile(reader, target, basis, step=step)

    @classmethod
    def coded_shape(cls, header: Header, group: int, pass_index: int) -> tuple[int, int, int]:
        entry = header.groups[group]
        begin, end = header.ranges[entry.layer]
        return end - begin, channels_of(header, entry), 0


def pack_params(step: float, value_weight: float, spread: float) -> bytes:
    """Return the parameters of an object; spread: what the finest step is relative to."""
    return _PARAMS.pack(0, 0, 0, step, value_weight, spread, 0.0)


def unpack_params(header: Header) -> tuple[float, float]:
    """Return the finest step and the weight of V. Raises: CorruptError."""
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


def spread_of(header: Header) -> float:
    """Return the root mean square of the centred values that an object's steps are relative to."""
    return float(_PARAMS.unpack(header.params)[5])


def weight_of(header: Header) -> float:
    """Return the weight of V in an object; 1 says that its profile has measured all weights."""
    return float(_PARAMS.unpack(header.params)[4])
