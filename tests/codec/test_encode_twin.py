"""Objects are byte for byte what plain NumPy makes, but for the last digits of distortions."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen import native
from cachegen.chunk import KVChunk
from cachegen.codec import ladder, passes
from cachegen.codec.container import read_header
from cachegen.codec.progressive import ProgressiveCodec


def numpy_fit_decay(
    scaled: np.ndarray, held: ladder.Ladder, classes: np.ndarray
) -> tuple[int, list[float]]:
    def errors(decay: int, rows: slice) -> list[float]:
        result = []
        for count in range(held.passes):
            part = ladder.Ladder(held.coarse[rows], tuple(d[rows] for d in held.digits[:count]))
            values = ladder.descend(part, held.passes, classes, decay / 64) - scaled[rows]
            result.append(float(np.vdot(values, values)))
        return result

    sample = slice(None, None, passes.DECAY_SAMPLE)
    best = min(
        passes.DECAYS,
        key=lambda decay: float(np.log(np.maximum(errors(decay, sample), 1e-30)).sum()),
    )
    return best, errors(best, slice(None))


def numpy_climb(values: np.ndarray, count: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    held = ladder.climb(values, count)
    return held.coarse, held.digits


@pytest.mark.parametrize(("tokens", "heads", "dim", "count"), [(256, 4, 64, 4), (77, 3, 20, 2)])
def test_equals_numpy(
    monkeypatch: pytest.MonkeyPatch, tokens: int, heads: int, dim: int, count: int
) -> None:
    rng = np.random.default_rng(tokens)
    spread = np.exp(rng.normal(0, 1, (2, 2, 1, heads, dim)))
    kv = rng.laplace(size=(2, 2, tokens, heads, dim)) * spread + rng.normal(size=dim)
    chunk = KVChunk.from_array(kv.astype(np.float16))
    ours = ProgressiveCodec(passes=count).encode(chunk)
    monkeypatch.setattr(native, "climb", numpy_climb)
    monkeypatch.setattr(native, "column_medians", lambda rows: np.median(rows, axis=0))
    monkeypatch.setattr(passes, "fit_decay", numpy_fit_decay)
    theirs = ProgressiveCodec(passes=count).encode(chunk)
    headers = read_header(ours), read_header(theirs)
    bodies = [
        {
            (s.group, s.pass_index, s.kind): data[s.offset : s.offset + s.length]
            for s in header.segments
        }
        for header, data in zip(headers, (ours, theirs), strict=True)
    ]
    assert bodies[0] == bodies[1]
    left = [[s.distortion for s in sorted(h.segments, key=lambda s: s[:3])] for h in headers]
    np.testing.assert_allclose(left[0], left[1], rtol=1e-4)
