"""The source of the kernels: found beside the package or in a checkout, joined into one text."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from cachegen.errors import ConfigError

_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
KERNELS = (
    *("build_tables", "map_rows", "rope_table", "put_exempt", "decode_rows", "copy_rows"),
    *(f"decode_progressive_{passes}" for passes in range(1, 7)),
    *("transform_back", "finish_values"),
    *("build_inverses", "load_values", "column_medians", "row_norms", "find_outliers"),
    *(
        "survey_columns",
        "survey_tokens",
        "set_means",
        "find_odd",
        "sum_squares",
        "choose_step",
        "fit_classes",
        "choose_offset",
    ),
    *("count_bins", "measure_errors", "encode_progressive", "quantise_rows", "fit_parametric"),
    *("fit_frequencies", "encode_rows", "copy_spans", "write_plain", "split_rows"),
    "transform_forward",
)


def source_folder() -> Path:
    """Return the folder that holds ``cuda/kernels.cu``. Raises: ConfigError if it is missing."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "csrc", here.parents[4] / "csrc"):
        if (folder / "cuda" / "kernels.cu").is_file():
            return folder
    raise ConfigError(
        "source of the CUDA kernels",
        got="none",
        expected="csrc/cuda in the package or the checkout",
        remedy="install cachegen again",
    )


@functools.cache
def joined_source() -> str:
    """Return all kernels as one text without includes of our own, for a compiler without files."""
    seen: set[Path] = set()

    def read(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        if path.name == "emulation.h":
            return ""
        return _INCLUDE.sub(lambda match: read((path.parent / match[1]).resolve()), text)

    return read((source_folder() / "cuda" / "kernels.cu").resolve())


def digest(*more: str) -> str:
    """Return a name for what a compiler makes of the source with these settings."""
    sha = hashlib.sha256("\0".join((joined_source(), *more)).encode())
    return sha.hexdigest()[:32]
