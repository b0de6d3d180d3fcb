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
    *("ratio_to_copy", "microseconds"),
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
        rate = "output_gb_per_s" if row["kernel"] == "decode" else "input_gb_per_s"
        assert row[rate] > 0 and row["fallbacks"] == 0
        assert row.get("equal_to_cpu", True)
    assert {row["kernel"] for row in content["rows"]} == {"decode", "encode"}
    assert content["peers"] == {"lmcache": "no device", "nvcomp_ans": "no device"}
    assert len(content["models"]) == 2
    assert len(content["ttft"]) == 10
    assert content["hardware"] and content["date"]


@pytest.mark.slow
def test_damaged_objects_and_encodings() -> None:
    """What a sanitizer runs on a device runs on the emulation."""
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulation with")
    script = ROOT / "benchmarks/gpu_bench/hostile.py"
    command = [sys.executable, str(script), "--small", "--emulate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    objects, refused, encoded = (int(word) for word in done.stdout.split() if word.isdigit())
    assert objects > 40 and refused > 3 and encoded == 15
