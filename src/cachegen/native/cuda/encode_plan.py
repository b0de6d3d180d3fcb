"""The structs of ``csrc/cuda/encode_plan.cuh`` as NumPy types."""

from __future__ import annotations

import numpy as np

from cachegen.native.cuda.plan import MAX_PASSES, U32, U64

SOURCE = np.dtype(
    [
        *((name, U64) for name in ("values", "centres", "sums", "norms", "largest", "marks")),
        *((name, U64) for name in ("means", "levels", "classes", "histogram", "result")),
        *((name, U64) for name in ("partials", "deviations", "families", "halves", "forward")),
        *((name, U64) for name in ("forward_low", "centre", "pairs")),
        *((name, U32) for name in ("tokens", "channels", "stride", "passes", "plane", "planes")),
        *((name, U32) for name in ("chunk", "sinks", "error", "tiles", "components")),
        ("forward_scale", "<f4"),
    ]
)
DECAYS = 4
GROUP_RESULT = np.dtype(
    [
        ("errors", "<f8", (DECAYS, MAX_PASSES)),
        ("energy", "<f8"),
        ("largest", "<f4"),
        ("widest", "<f4"),
        ("mean_scale", "<f4"),
        ("exempt", U32),
        ("offset", "<i4"),
        *((name, U32) for name in ("done", "nonzero", "listed")),
    ]
)
CHUNK_STATE = np.dtype(
    [
        *((name, "<f8") for name in ("relative", "values", "spread")),
        ("step", "<f4"),
        *((name, U32) for name in ("first_group", "groups", "zero")),
    ]
)
COLUMNS = np.dtype([("owner", U32), ("first", U32)])
RUN = np.dtype(
    [
        *((name, U64) for name in ("states", "raw", "words", "escapes", "counts")),
        *((name, U32) for name in ("word_room", "escape_room", "begin_step", "end_step")),
        *((name, U32) for name in ("lanes", "owner", "pass", "zero")),
    ]
)
SYMBOLS = np.dtype(
    [
        *((name, U64) for name in ("symbols", "scales", "anchors", "missing", "classes")),
        *((name, U64) for name in ("rotations", "freqs", "inverses")),
        *((name, U32) for name in ("tokens", "channels", "places", "levels", "scale_width")),
        *((name, U32) for name in ("shift", "raw", "alphabet", "buckets", "anchor_tokens")),
        *((name, U32) for name in ("is_delta", "plane", "error", "zero")),
    ]
)
SPAN = np.dtype([("from", U64), ("to", U64), ("size", U32), ("zero", U32)])
PLAIN = np.dtype(
    [
        ("to", U64),
        *((name, U32) for name in ("owner", "what", "pass", "bits")),
        ("tokens", U64),
        *((name, U32) for name in ("count", "zero")),
    ]
)
SIZES = {
    **{"Source": SOURCE, "GroupResult": GROUP_RESULT, "ChunkState": CHUNK_STATE, "Run": RUN},
    **{"Columns": COLUMNS, "Symbols": SYMBOLS, "Span": SPAN, "Plain": PLAIN},
}

TILE = 32
PARTIALS = 32
EXEMPT = 1
# Looks for outliers, see csrc/fused_survey.cpp.
ROUNDS = 4


def histogram_bins(passes: int) -> int:
    """Return the bins of the errors of a class: of late values and zeros, and of early ones."""
    coarse: int = 3 ** (passes - 1)
    return 2 * (coarse + 1) + 4 * coarse


# Kinds of Plain, see gather.cuh.
COARSE_BYTES, DIGIT_PLANES, SYMBOL_BYTES, SYMBOL_PLANES, ROTATED_PLANES, EXACT_ROWS = range(6)
# Words of an inverse table with 4 and 32 buckets are 3 for each bucket.
INVERSE_WORDS = 3
