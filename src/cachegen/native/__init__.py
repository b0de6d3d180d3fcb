"""The C++ core: entropy coding of symbol matrices and max-abs quantisation.

This is the only module that imports the extension. ``cachegen.native.reference`` has the same
functions in plain NumPy; both give equal bytes, integers and float bits. FORMAT.md is the law.
"""

from __future__ import annotations

import numpy as np

from cachegen.native import _checks, _core
from cachegen.native._checks import (
    Array,
    Body,
    Models,
    StreamLayout,
    Symbols,
    stream_count,
)
from cachegen.native._tables import Tables
from cachegen.native.fused import (
    Coefficients,
    GroupSource,
    PlaneTarget,
    decode_groups,
    finish_plane,
)
from cachegen.native.fused_encode import (
    ChunkEncoder,
    EncodedGroup,
    EncodeSource,
    EncodeTables,
)
from cachegen.native.lossless import LosslessSource, decode_lossless, encode_lossless
from cachegen.native.medians import column_medians
from cachegen.native.models import count_symbols, fit_classes, normalize_counts
from cachegen.native.plane_encode import EncodedPlane, FrozenTables, encode_planes
from cachegen.native.planes import MatrixSource, QuantizedPlane, decode_planes
from cachegen.native.sparse import parse_sparse, write_sparse
from cachegen.native.threads import threads, use_one_thread
from cachegen.native.transform import (
    PackedBasis,
    TransformSource,
    allow_tiles,
    can_transform,
    decode_transformed,
    uses_tiles,
)

_BITS = {2: np.uint16, 4: np.uint32}


def encode_segment(
    symbols: Symbols,
    models: Models,
    tables: Tables,
    *,
    shifts: Symbols | None = None,
    contexts: Symbols | None = None,
    stream_steps: int,
) -> bytes:
    """Encode a symbol matrix to the body of a rANS segment.

    symbols: (T, C) uint8, C-contiguous. models: uint16 index into tables, (C,) or, one
    per place, (ceil(T / 32), C). shifts: (C,) uint8 digit shifts, 0 to 7; None means all 0.
    contexts: (T, C) uint8, 0 or 1, added to the model index of each symbol, or None; with contexts
    tables must have A <= 4 and no escapes, and all shifts must be 0.
    stream_steps: steps between restart points.
    Raises: ConfigError for a symbol its model cannot code, and for models, shifts or contexts out
    of range; GeometryError.
    """
    _checks.check_symbols(symbols)
    _checks.check_stream_steps(stream_steps)
    tokens, channels = symbols.shape
    models, shifts = _checks.check_coding(tokens, channels, models, shifts)
    contexts = _checks.check_contexts(contexts, tokens, channels)
    return _core.encode_segment(symbols, models, tables._core, shifts, contexts, stream_steps)


def decode_segment(
    body: Body,
    tokens: int,
    channels: int,
    models: Models,
    tables: Tables,
    *,
    shifts: Symbols | None = None,
    contexts: Symbols | None = None,
    out: Symbols | None = None,
    streams: tuple[int, int] | None = None,
) -> Symbols:
    """Decode the body of a rANS segment; the other arguments as in ``encode_segment``.

    body: any contiguous buffer, not copied. out: (T, C) uint8, C-contiguous, or None for a new
    array. streams: (first, count) decodes only these streams and leaves the rest of out as it is.
    Returns: out. After an error out holds anything.
    Raises: TruncatedError, CorruptError, GeometryError, ConfigError.
    """
    models, shifts = _checks.check_coding(tokens, channels, models, shifts)
    first, count = _checks.check_streams(streams)
    out = _checks.check_out(out, tokens, channels, whole=streams is None)
    contexts = _checks.check_contexts(contexts, tokens, channels)
    data = _checks.as_bytes(body)
    _core.decode_segment(data, models, tables._core, shifts, contexts, first, count, out)
    return out


def verify_segment(body: Body, tokens: int, channels: int, models: Models, tables: Tables) -> None:
    """Decode a body without shifts and contexts, block by block, and keep nothing.

    All that ``decode_segment`` checks is checked. It takes as long as entropy decoding alone.
    Raises: TruncatedError, CorruptError, GeometryError.
    """
    models, _ = _checks.check_coding(tokens, channels, models, None)
    _core.verify_segment(_checks.as_bytes(body), tokens, channels, models, tables._core)


def segment_layout(
    body: Body, tokens: int, channels: int, shifts: Symbols | None = None
) -> list[StreamLayout]:
    """Return where the streams of a rANS segment body lie, without decoding them.

    What the streams do not cover, ``4 + 8 * len(streams)`` bytes, is the directory.
    Raises: TruncatedError, CorruptError, GeometryError.
    """
    if shifts is not None:
        shifts = _checks.check_shifts(shifts, channels)
    rows = _core.segment_layout(_checks.as_bytes(body), tokens, channels, shifts)
    return [StreamLayout(*row) for row in rows]


def quantize(values: Array, levels: int, *, per_head: bool) -> tuple[Symbols, Array]:
    """Quantise a plane to symbols 0 .. 2*levels, scaled by the largest magnitude.

    values: (T, H, D) float16, bfloat16 or float32, any strides. levels: 1 to 127.
    Returns: symbols (T, H*D) uint8; scales, the largest magnitudes in the type of values, of each
    head (T, H) with per_head, else over all heads (T, 1).
    Raises: NonFiniteError for NaN, Inf or magnitudes beyond 2**100, ConfigError, DtypeError,
    GeometryError.
    Source: CacheGen (SIGCOMM'24), section 5.2, "layer-wise quantization".
    """
    _checks.check_levels(levels)
    dtype = _checks.check_values(values)
    tokens, heads, dim = values.shape
    if dim > 1 and values.strides[2] != values.itemsize:
        values = np.ascontiguousarray(values)
    symbols = np.empty((tokens, heads * dim), np.uint8)
    scales = np.zeros((tokens, heads if per_head else 1), values.dtype)
    bits = _BITS[values.itemsize]
    _core.quantize(values.view(bits), dtype.label, levels, symbols, scales.view(bits))
    return symbols, scales


def dequantize(symbols: Symbols, scales: Array, levels: int, out: Array) -> Array:
    """Undo ``quantize`` up to rounding: value = (symbol - levels) * (scale / levels).

    symbols: (T, H*D) uint8. scales: (T, H) or (T, 1), in the type of out. out: (T, H, D) float16,
    bfloat16 or float32, any strides; every value is rounded to nearest even.
    Returns: out.
    Raises: CorruptError for a scale that is NaN, Inf or negative, ConfigError, DtypeError,
    GeometryError.
    """
    dtype = _checks.check_scaled(symbols, scales, levels, out)
    symbols = np.ascontiguousarray(symbols)
    bits = _BITS[out.itemsize]
    scale_bits = np.ascontiguousarray(scales).view(bits)
    direct = out.shape[2] <= 1 or out.strides[2] == out.itemsize
    target = out if direct else np.empty(out.shape, out.dtype)
    _core.dequantize(symbols, scale_bits, levels, target.view(bits), dtype.label)
    if not direct:
        out[...] = target
    return out


def isa() -> str:
    """Return the name of the instruction set in use. ``CACHEGEN_ISA`` chooses it before first use.

    Raises: ConfigError if ``CACHEGEN_ISA`` names none that this machine can run.
    """
    return _core.isa()


def available_isas() -> list[str]:
    """Return the instruction sets that this build and this machine both have, slowest first."""
    return _core.available_isas()


def select_isa(name: str) -> None:
    """Use this instruction set from now on, in all threads. Raises: ConfigError."""
    _core.select_isa(name)


__all__ = [
    "ChunkEncoder",
    "Coefficients",
    "EncodeSource",
    "EncodeTables",
    "EncodedGroup",
    "EncodedPlane",
    "FrozenTables",
    "GroupSource",
    "LosslessSource",
    "MatrixSource",
    "PackedBasis",
    "PlaneTarget",
    "QuantizedPlane",
    "StreamLayout",
    "Tables",
    "TransformSource",
    "allow_tiles",
    "available_isas",
    "can_transform",
    "column_medians",
    "count_symbols",
    "decode_groups",
    "decode_lossless",
    "decode_planes",
    "decode_segment",
    "decode_transformed",
    "dequantize",
    "encode_lossless",
    "encode_planes",
    "encode_segment",
    "finish_plane",
    "fit_classes",
    "isa",
    "normalize_counts",
    "parse_sparse",
    "quantize",
    "segment_layout",
    "select_isa",
    "stream_count",
    "threads",
    "use_one_thread",
    "uses_tiles",
    "verify_segment",
    "write_sparse",
]
