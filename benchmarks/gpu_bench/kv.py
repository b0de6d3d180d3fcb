"""KV values to measure with: drawn per channel as the reference model's are spread and shaped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPE_FILE = ROOT / "benchmarks/results/kv_shape.json"
QUANTILES = 33


def measure_shape() -> dict[str, Any]:
    """Measure, on the reference model, how channels spread and how their values are shaped.

    Returns: quantiles over channels of log standard deviation, of |mean| over deviation, and of
    E|x| / deviation, for K before RoPE and for V.
    """
    import numpy as np

    from cachegen.bench.calibrate import captured_contexts
    from cachegen.bench.report import environment
    from cachegen.codec.basis import group_matrix
    from cachegen.codec.header import Group
    from cachegen.hf.load import begin_and_text, load_model

    model, tokenizer = load_model(str(ROOT / "models/reference"))
    text = (ROOT / "models/reference/eval_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    chunks = list(captured_contexts(model, ids, tokens=4096, context=1024, begin=begin))
    shape: dict[str, Any] = {"model": "models/reference", "tokens": 4096}
    grid = np.linspace(0, 1, QUANTILES)
    for name, planes in (("keys", 1), ("values", 2)):
        columns: dict[str, list[Any]] = {"log_deviation": [], "mean_share": [], "shape": []}
        for layer in range(chunks[0].geometry.layers):
            rows = np.concatenate(
                [group_matrix(chunk, Group(layer, 1, planes), 1.0)[4:] for chunk in chunks]
            )
            mean, deviation = rows.mean(axis=0), np.maximum(rows.std(axis=0), 1e-6)
            columns["log_deviation"].append(np.log(deviation))
            columns["mean_share"].append(np.abs(mean) / deviation)
            columns["shape"].append(np.abs(rows - mean).mean(axis=0) / deviation)
        shape[name] = {
            key: np.quantile(np.concatenate(parts), grid).round(5).tolist()
            for key, parts in columns.items()
        }
    return {**shape, **environment()}


def draw_chunk(geometry: tuple[int, int, int], tokens: int, seed: int) -> Any:
    """Draw a chunk in bfloat16 with the measured spreads and shapes, RoPE applied to K."""
    import ml_dtypes
    import numpy as np

    from cachegen.chunk import KVChunk, LayerKV
    from cachegen.codec.rotary import rotate
    from cachegen.types import RopeSpec

    shape = json.loads(SHAPE_FILE.read_text(encoding="utf-8"))
    layers, heads, dim = geometry
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, QUANTILES)
    half = dim // 2
    frequencies = tuple(float(np.float32(10000.0 ** (-i / half))) for i in range(half))
    rope = RopeSpec((frequencies,), (1.0,), (0,) * layers)

    def plane(name: str) -> Any:
        def sample(key: str) -> Any:
            drawn = np.interp(rng.random(heads * dim), grid, shape[name][key])
            return drawn.astype(np.float32)

        deviation = np.exp(sample("log_deviation"))
        mean = sample("mean_share") * deviation * rng.choice([-1, 1], heads * dim)
        noise = rng.standard_normal((tokens, heads * dim), np.float32)
        # E|x| of a Gauss is 0.798 of its deviation; heavier tails are a power of it.
        power = np.where(sample("shape") < 0.75, 1.4, 1.0).astype(np.float32)
        noise = np.sign(noise) * np.abs(noise) ** power
        noise /= np.sqrt(np.mean(noise**2, axis=0))
        return (mean + deviation * noise).astype(np.float32).reshape(tokens, heads, dim)

    rows = []
    for layer in range(layers):
        keys = rotate(plane("keys"), rope, layer, 0, back=False)
        rows.append(LayerKV(keys.astype(ml_dtypes.bfloat16), plane("values").astype(keys.dtype)))
    rows = [LayerKV(row.keys, row.values.astype(ml_dtypes.bfloat16)) for row in rows]
    return replace(KVChunk.from_layers(rows), rope=rope)
