"""``cachegen bench speed``: rows have the agreed keys; synthetic KV has measured spreads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cachegen import native
from cachegen.bench.speed import SpeedSettings, run_speed
from cachegen.bench.speed_data import geometry_of, synthetic_chunk
from cachegen.bench.speed_report import plot_speed
from cachegen.errors import ConfigError

KEYS = {
    "kernel",
    "isa",
    "codec",
    "quality",
    "geometry",
    "passes",
    "threads",
    "billed_bits_per_value",
    "gsym_per_s",
    "output_bytes_per_s",
    "ratio_to_memcpy",
}


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachegen.bench.speed.DESTINATION_BYTES", 1 << 20)
    fastest = native.available_isas()[-1]
    settings = SpeedSettings(("reference",), (fastest,), (1,), seconds=0.001)
    result = run_speed(settings)
    assert {row["kernel"] for row in result["rows"]} == {"symbols", "decode", "encode"}
    for row in result["rows"]:
        assert set(row) == KEYS
        assert row["gsym_per_s"] > 0 and row["billed_bits_per_value"] > 0
    assert native.isa() == fastest
    plot_speed(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_synthetic_channels_differ_in_spread() -> None:
    chunk = synthetic_chunk(geometry_of("reference"))
    values = chunk.layers[0].values.astype(np.float32).reshape(chunk.tokens, -1)
    spreads = values.std(axis=0)
    assert spreads.max() > 1.5 * spreads.min()
    again = synthetic_chunk(geometry_of("reference"))
    np.testing.assert_array_equal(again.to_array(), chunk.to_array())
    with pytest.raises(ConfigError):
        geometry_of("gpt-9")
