"""The extension built from csrc/bindings.cpp. Only cachegen.native imports it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Tables:
    def __init__(self, freqs: NDArray[Any], escapes: NDArray[Any] | None) -> None: ...

class EncodeTables:
    def __init__(self, coarse: Tables, refine: Tables) -> None: ...

class PlaneEncoder:
    def __init__(
        self,
        type: str,
        planes: Sequence[tuple[Any, ...]],
        per_head: bool,
        low_bits: int,
        shared: Tables | None,
        costs: NDArray[Any] | None,
        bits_saved: NDArray[Any] | None,
        threads: int,
    ) -> None: ...
    def encoded(self, index: int) -> tuple[int, bytes, NDArray[Any], NDArray[Any]]: ...

class PackedBasis:
    def __init__(self, values: NDArray[Any], mean: NDArray[Any], dims: NDArray[Any]) -> None: ...
    @property
    def is_joint(self) -> bool: ...

class ChunkEncoder:
    def __init__(self, groups: Sequence[tuple[Any, ...]]) -> None: ...
    def survey(self, threads: int) -> None: ...
    def surveyed(self, index: int) -> tuple[bool, float]: ...
    def encode(
        self,
        step: float,
        passes: int,
        base_classes: Sequence[NDArray[Any] | None],
        tables: EncodeTables,
        costs: NDArray[Any],
        centroids: NDArray[Any],
        threads: int,
    ) -> None: ...
    def encoded(self, index: int) -> tuple[Any, ...]: ...

def encode_segment(
    symbols: NDArray[Any],
    models: NDArray[Any],
    tables: Tables,
    shifts: NDArray[Any] | None,
    contexts: NDArray[Any] | None,
    stream_steps: int,
) -> bytes: ...
def decode_segment(
    body: NDArray[Any],
    models: NDArray[Any],
    tables: Tables,
    shifts: NDArray[Any] | None,
    contexts: NDArray[Any] | None,
    first: int,
    count: int,
    out: NDArray[Any],
) -> None: ...
def verify_segment(
    body: NDArray[Any], tokens: int, channels: int, models: NDArray[Any], tables: Tables
) -> None: ...
def segment_layout(
    body: NDArray[Any], tokens: int, channels: int, shifts: NDArray[Any] | None
) -> list[tuple[int, int, int, int, int, int, int]]: ...
def quantize(
    values: NDArray[Any],
    type: str,
    levels: int,
    symbols: NDArray[Any],
    scales: NDArray[Any],
) -> None: ...
def dequantize(
    symbols: NDArray[Any],
    scales: NDArray[Any],
    levels: int,
    out: NDArray[Any],
    type: str,
) -> None: ...
def decode_groups(
    type: str,
    stored: str,
    passes: int,
    coarse: Tables,
    refine: Tables,
    ropes: list[tuple[NDArray[Any], float, bool]],
    groups: Sequence[tuple[Any, ...]],
    threads: int,
) -> None: ...
def data_address(array: NDArray[Any]) -> int: ...
def finish_plane(
    type: str,
    target: tuple[Any, ...],
    values: NDArray[Any],
    mean: NDArray[Any],
    factor: float,
    angles: NDArray[Any] | None,
    interleaved: bool,
    exempt: NDArray[Any],
) -> None: ...
def decode_transformed(
    type: str,
    stored: str,
    passes: int,
    coarse: Tables,
    refine: Tables,
    ropes: list[tuple[NDArray[Any], float, bool]],
    groups: Sequence[tuple[Any, ...]],
    threads: int,
) -> None: ...
def can_transform(type: str) -> bool: ...
def allow_tiles(allowed: bool) -> bool: ...
def uses_tiles(type: str) -> bool: ...
def decode_planes(
    type: str, stored: str, shared: Tables, planes: Sequence[tuple[Any, ...]], threads: int
) -> None: ...
def encode_lossless(
    type: str,
    planes: Sequence[tuple[int, ...]],
    costs: NDArray[np.int16],
    bits_saved: NDArray[np.float64],
    threads: int,
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]: ...
def decode_lossless(
    type: str, stored: str, planes: Sequence[tuple[Any, ...]], threads: int
) -> None: ...
def count_symbols(symbols: NDArray[Any], shift: int, counts: NDArray[Any]) -> None: ...
def normalize_counts(
    counts: NDArray[Any], bits_saved: NDArray[Any], freqs: NDArray[Any]
) -> None: ...
def fit_classes(
    counts: NDArray[Any],
    costs: NDArray[Any],
    classes: NDArray[Any],
    rotations: NDArray[Any],
) -> None: ...
def parse_sparse(
    body: NDArray[Any], tokens: int, channels: int, largest: int
) -> NDArray[np.uint32]: ...
def write_sparse(pairs: NDArray[Any], tokens: int, channels: int) -> bytes: ...
def column_medians(values: NDArray[Any], out: NDArray[Any]) -> None: ...
def isa() -> str: ...
def select_isa(isa: str) -> None: ...
def available_isas() -> list[str]: ...
