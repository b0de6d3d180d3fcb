"""The extension built from csrc/bindings.cpp. Only cachegen.native imports it."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

class Tables:
    def __init__(self, freqs: NDArray[Any], escapes: NDArray[Any] | None) -> None: ...

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
def decode_planes(
    type: str, stored: str, shared: Tables, planes: Sequence[tuple[Any, ...]], threads: int
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
def climb(values: NDArray[Any], coarse: NDArray[Any], digits: Sequence[NDArray[Any]]) -> None: ...
def count_digits(
    coarse: NDArray[Any],
    digits: Sequence[NDArray[Any]],
    counts: NDArray[Any],
) -> None: ...
def ladder_errors(
    values: NDArray[Any],
    coarse: NDArray[Any],
    digits: Sequence[NDArray[Any]],
    classes: NDArray[Any],
    offsets: NDArray[Any],
    stride: int,
    errors: NDArray[Any],
) -> None: ...
def column_medians(values: NDArray[Any], out: NDArray[Any]) -> None: ...
def isa() -> str: ...
def select_isa(isa: str) -> None: ...
def available_isas() -> list[str]: ...
