"""The GPU benchmark runs from end to end on the emulation, so that a device only has to time it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachegen.native.cuda import emulation

ROOT = Path(__file__).parents[2]
ROW = {
    *("kernel", "codec", "geometry", "chunks", "passes", "billed_bits_per_value"),
    *("output_gb_per_s", "ratio_to_copy"),
}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulation with")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry-run", "--json", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(out.read_text())
    assert content["dry_run"] and content["device"].startswith("none")
    assert {row["codec"] for row in content["rows"]} >= {"progressive", "int8", "cachegen"}
    for row in content["rows"]:
        assert set(row) >= ROW
        assert row["output_gb_per_s"] > 0 and row["fallbacks"] == 0
    assert len(content["models"]) == 2
    assert len(content["ttft"]) == 10
    assert content["hardware"] and content["date"]
