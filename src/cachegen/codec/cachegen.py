"""The ``cachegen`` codec: layer-graded bins, a max-abs scale per token, per-channel entropy coding.

Source: CacheGen (SIGCOMM'24), section 5. Without delta it is what LMCache ships; ``delta="anchor"``
is the paper's change-based encoding. The formulas are in FORMAT.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec.base import (
    Codec,
    check_one_plane_per_group,
    each_plane,
    payload_order,
    planes_of,
    quantization_error,
)
from cachegen.codec.container import SIDE, write_object
from cachegen.codec.entropy import (
    Freqs,
    Symbols,
    TableMode,
    alphabet_size,
    bits_saved,
    digit_shift,
    encode_matrix,
    frozen_tables,
    histogram,
    normalize_counts,
    parametric_tables,
)
from cachegen.codec.grading import DEFAULT_LEVEL, MAX_BINS, MIN_BINS, CacheGenConfig
from cachegen.codec.header import Header, SegmentBody
from cachegen.codec.plane_source import SEGMENT_KINDS, matrix_source
from cachegen.codec.reader import ObjectReader
from cachegen.codec.target import Target
from cachegen.errors import ConfigError, CorruptError, GeometryError, ProfileError
from cachegen.profile import Profile, require_profile
from cachegen.types import Array, ChunkKey, KVDtype

ANCHOR_TOKENS = 10
ANCHOR_LEVELS = 127
# Widths of a delta bin in the first, middle and last third of the layers (paper, section 5.1.2).
DELTA_WIDTHS = (0.5, 1.0, 1.5)
_PARAMS = struct.Struct("<BB2x")


@dataclass(frozen=True)
class CacheGenCodec(Codec):
    """CacheGen's codec.

    grading: bins per layer, or None to grade every chunk by its depth at ``level``.
    level: 1 (smallest), 2 or 3 of the artifact; used only without a grading.
    delta: "none", or "anchor" for deltas to the first token of every group of 10.
    tables: "chunk" (sent with every chunk), "profile" (from ``profile``) or "parametric".
    profile: what ``fit_profile`` returned; needed for tables="profile".
    """

    name: ClassVar[str] = "cachegen"
    codec_id: ClassVar[int] = 2
    grading: CacheGenConfig | None = None
    level: int = DEFAULT_LEVEL
    delta: str = "none"
    tables: str = "chunk"
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.tables not in {mode.label for mode in TableMode}:
            raise ConfigError("tables", got=self.tables, expected="chunk, profile or parametric")
        if self.delta not in ("none", "anchor"):
            raise ConfigError("delta", got=self.delta, expected="none or anchor")
        if self.level not in (1, 2, 3):
            raise ConfigError("level", got=self.level, expected="1, 2 or 3")

    def config(self) -> dict[str, Any]:
        return {
            "codec": self.name,
            "level": self.level,
            "grading": self.grading.config() if self.grading else None,
            "delta": self.delta,
            "tables": self.tables,
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
        grading = config.get("grading")
        return cls(
            grading=CacheGenConfig.from_config(grading) if grading else None,
            level=config.get("level", DEFAULT_LEVEL),
            delta=config.get("delta", "none"),
            tables=config.get("tables", "chunk"),
            profile=profile,
        )

    def plane_bins(self, layers: int) -> tuple[int, ...]:
        """Return the bins of every plane in group order. Raises: GeometryError."""
        grading = self.grading or CacheGenConfig.from_layers(layers, level=self.level)
        if grading.nlayers != layers:
            raise GeometryError(
                "layers",
                got=layers,
                expected=grading.nlayers,
                remedy="build the config from this model",
            )
        return tuple(
            bins for pair in zip(grading.key_bins, grading.value_bins, strict=True) for bins in pair
        )

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        bins = self.plane_bins(chunk.geometry.layers)
        mode = TableMode[self.tables.upper()]
        if mode is TableMode.PROFILE and self.profile is None:
            raise ProfileError("profile", got=None, expected="a profile for tables='profile'")
        passes: list[list[SegmentBody]] = [[] for _ in range(1 + (self.delta == "anchor"))]
        planes = planes_of(chunk)
        if self.delta == "none" and mode is not TableMode.PROFILE:
            passes[0] = self._encode_planes(planes, bins, mode)
            return self._object(chunk, passes, mode, bins, key)

        def encode_plane(group: int) -> list[list[SegmentBody]]:
            matrices = self._quantise_plane(planes[group], group, bins)
            return [
                self._encode_matrix(group, index, matrix, mode)
                for index, matrix in enumerate(matrices)
            ]

        for segments in each_plane(encode_plane, len(planes)):
            for index, of_pass in enumerate(segments):
                passes[index] += of_pass
        return self._object(chunk, passes, mode, bins, key)

    def _object(
        self,
        chunk: KVChunk,
        passes: list[list[SegmentBody]],
        mode: TableMode,
        bins: tuple[int, ...],
        key: ChunkKey | None,
    ) -> bytes:
        return write_object(
            chunk,
            codec_id=self.codec_id,
            passes=len(passes),
            params=pack_params(mode, self.delta, bins),
            segments=payload_order(passes),
            profile=self.profile.digest if mode is TableMode.PROFILE and self.profile else None,
            key=key,
        )

    @staticmethod
    def _encode_planes(
        planes: list[Array], bins: tuple[int, ...], mode: TableMode
    ) -> list[SegmentBody]:
        """Return the segments of all planes as ``_encode_matrix`` makes them, one by one."""
        levels = [count // 2 - 1 for count in bins]
        tables = frozen_tables() if mode is TableMode.PARAMETRIC else bits_saved()
        found = native.encode_planes(planes, levels, per_head=False, tables=tables)
        segments: list[SegmentBody] = []
        for group, (coded, plane) in enumerate(zip(found, planes, strict=True)):
            error = quantization_error(coded.scales, levels[group], _flat_width(plane))
            side = coded.scales.tobytes() + coded.tables
            segments += [
                SegmentBody(group, 0, SIDE, side, error),
                SegmentBody(group, 0, SEGMENT_KINDS[coded.kind], coded.body.data, error),
            ]
        return segments

    def _encode_matrix(
        self, group: int, index: int, matrix: _Matrix, mode: TableMode
    ) -> list[SegmentBody]:
        freqs = profile_freqs(self.profile, group, index) if self.profile else None
        coded = encode_matrix(matrix.symbols, matrix.levels, mode, freqs)
        side = matrix.scales.tobytes() + coded.tables
        return [
            SegmentBody(group, index, SIDE, side, matrix.distortion),
            SegmentBody(group, index, coded.kind, coded.body, matrix.distortion),
        ]

    def _quantise_plane(self, plane: Array, group: int, bins: tuple[int, ...]) -> list[_Matrix]:
        if self.delta == "none":
            return [_quantise(plane, bins[group] // 2 - 1)]
        return _quantise_delta(plane, delta_levels(bins[group], group // 2, len(bins) // 2))

    def fit_profile(self, chunks: Sequence[KVChunk], *, model_name: str = "") -> Profile:
        """Fit the frequency tables of tables="profile" to calibration chunks (paper, section 5.2).

        Every symbol of the alphabet stays encodable. Returns: a profile for this configuration.
        """
        if not chunks:
            raise GeometryError("calibration chunks", got=0, expected="at least one")
        bins = self.plane_bins(chunks[0].geometry.layers)
        counts: dict[str, Array] = {}
        for chunk in chunks:
            for group, plane in enumerate(planes_of(chunk)):
                for index, matrix in enumerate(self._quantise_plane(plane, group, bins)):
                    shifted = matrix.symbols >> np.uint8(digit_shift(matrix.levels))
                    seen = histogram(shifted, alphabet_size(matrix.levels))
                    name = f"cachegen.{group}.{index}"
                    counts[name] = counts.get(name, 0) + seen
        arrays = {name: normalize_counts(16 * seen + 1) for name, seen in counts.items()}
        meta = {
            "codec": {**self.config(), "tables": "profile", "profile": None},
            "calibration_tokens": sum(chunk.tokens for chunk in chunks),
        }
        return Profile(model_name, arrays, meta)

    @classmethod
    def coded_shape(cls, header: Header, group: int, pass_index: int) -> tuple[int, int, int]:
        tokens, channels, _ = super().coded_shape(header, group, pass_index)
        layers = header.geometry.layers
        _, anchor_tokens, bins = unpack_params(header.params, layers)
        if not anchor_tokens:
            return tokens, channels, digit_shift(bins[group] // 2 - 1)
        anchors = -(-tokens // anchor_tokens)
        if pass_index == 0:
            return anchors, channels, digit_shift(ANCHOR_LEVELS)
        return (
            tokens - anchors,
            channels,
            digit_shift(delta_levels(bins[group], group // 2, layers)),
        )

    @classmethod
    def decode_into(cls, reader: ObjectReader, target: Target, *, profile: Profile | None) -> None:
        header = reader.header
        check_one_plane_per_group(header)
        mode, anchor_tokens, bins = unpack_params(header.params, header.geometry.layers)
        if header.passes != 1 + (anchor_tokens > 0):
            raise CorruptError("passes", got=header.passes, expected=1 + (anchor_tokens > 0))
        if mode is TableMode.PROFILE:
            profile = matching_profile(profile, header.profile)
        elif header.profile is not None:
            raise CorruptError("profile digest", got="present", expected="none for these tables")
        planes = []
        for group in range(len(header.groups)):
            plane = target.plane(group // 2, is_value=group % 2 == 1)
            tokens, plain = len(plane.offsets), bins[group] // 2 - 1
            steps = [(tokens, plain)]
            if anchor_tokens:
                anchors = -(-tokens // anchor_tokens)
                finer = delta_levels(bins[group], group // 2, header.geometry.layers)
                steps = [(anchors, ANCHOR_LEVELS), (tokens - anchors, finer)]
            passes = []
            for index, (rows, levels) in enumerate(steps[: reader.passes_of(group)]):
                freqs = profile_freqs(profile, group, index) if mode is TableMode.PROFILE else None
                channels = plane.heads * plane.dim
                passes.append(
                    matrix_source(reader, group, index, (rows, channels), levels, mode, freqs)
                )
            planes.append(native.QuantizedPlane(tokens, anchor_tokens, passes, plane))
        native.decode_planes(
            planes,
            dtype=target.dtype,
            stored=header.geometry.dtype,
            shared=parametric_tables()[0],
        )


@dataclass(frozen=True)
class _Matrix:
    """A quantised matrix: symbols (T, C), scales (T, 1), M; the group's error when decoded."""

    symbols: Symbols
    scales: Array
    levels: int
    distortion: float


def delta_levels(bins: int, layer: int, layers: int) -> int:
    """Return M of the deltas: bins scaled by 1/0.5, 1 and 1/1.5 by thirds of depth."""
    width = DELTA_WIDTHS[3 * layer // layers]
    return max(1, int((bins // 2 - 1) / width + 0.5))


def _quantise(plane: Array, levels: int) -> _Matrix:
    symbols, scales = native.quantize(plane, levels, per_head=False)
    error = quantization_error(scales, levels, _flat_width(plane))
    return _Matrix(symbols, scales, levels, error)


def _flat_width(plane: Array) -> int:
    """Return the number of channels of a plane (T, H, D)."""
    return int(plane.shape[1] * plane.shape[2])


def _quantise_delta(plane: Array, levels: int) -> list[_Matrix]:
    """Quantise anchors, then the other tokens less their group's decoded anchor."""
    if not np.isfinite(plane).all():
        native.quantize(plane, ANCHOR_LEVELS, per_head=False)  # raises, and names the token
    anchors = _quantise(plane[::ANCHOR_TOKENS], ANCHOR_LEVELS)
    decoded = np.empty(plane[::ANCHOR_TOKENS].shape, plane.dtype)
    native.dequantize(anchors.symbols, anchors.scales, ANCHOR_LEVELS, decoded)
    rows = delta_rows(plane.shape[0], ANCHOR_TOKENS)
    base = decoded[rows // ANCHOR_TOKENS].astype(np.float32)
    difference = plane[rows].astype(np.float32) - base
    if KVDtype.of(plane.dtype) is KVDtype.FLOAT16:
        limit = np.finfo(np.float16).max
        difference = np.clip(difference, -limit, limit)
    deltas = _quantise(difference.astype(plane.dtype), levels)
    missing = float(np.sum(np.square(difference, dtype=np.float64)))
    return [
        replace(anchors, distortion=anchors.distortion + missing),
        replace(deltas, distortion=anchors.distortion + deltas.distortion),
    ]


def delta_rows(tokens: int, group_tokens: int) -> NDArray[np.int64]:
    """Return the tokens that are no anchors."""
    return np.flatnonzero(np.arange(tokens) % group_tokens)


def profile_freqs(profile: Profile | None, group: int, index: int) -> Freqs | None:
    """Return a profile's frequencies of one pass of a plane, (C, A), if it has them."""
    return profile.arrays.get(f"cachegen.{group}.{index}") if profile else None


def matching_profile(profile: Profile | None, digest: bytes | None) -> Profile:
    """Return the profile that an object names. Raises: CorruptError, ProfileError."""
    if digest is None:
        raise CorruptError("profile digest", got="none", expected="a digest for profile tables")
    return require_profile(profile, digest)


def pack_params(mode: TableMode, delta: str, bins: tuple[int, ...]) -> bytes:
    """Return the parameters of an object."""
    """Return the parameters of an object."""
    return _PARAMS.pack(mode.value, ANCHOR_TOKENS if delta == "anchor" else 0) + bytes(bins)


def unpack_params(params: bytes, layers: int) -> tuple[TableMode, int, tuple[int, ...]]:
    """Return tables, length of anchor groups, bins of every plane. Raises: CorruptError."""
    bins = tuple(params[_PARAMS.size :])
    if len(params) < _PARAMS.size or len(bins) != 2 * layers or any(params[2:4]):
        raise CorruptError(
            "cachegen parameters", got=f"{len(params)} bytes", expected=2 * layers + 4
        )
    mode, anchor_tokens = _PARAMS.unpack_from(params)
    if mode > TableMode.PARAMETRIC.value or anchor_tokens == 1:
        raise CorruptError(
            "cachegen parameters", got=(mode, anchor_tokens), expected="known values"
        )
    if not all(MIN_BINS <= count <= MAX_BINS for count in bins):
        raise CorruptError("bins", got=bins, expected=f"{MIN_BINS} to {MAX_BINS}")
    return TableMode(mode), anchor_tokens, bins
