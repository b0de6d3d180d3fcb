"""Building, and the tests that need a device: alone and under compute-sanitizer."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("numpy", "ml_dtypes", "xxhash", "safetensors", "rich", "torch")
CHECKS = ("memcheck", "racecheck", "initcheck")


def build() -> dict[str, Any]:
    """Build the C++ extension in place if this Python has none. Returns: how long it took."""
    begin = time.perf_counter()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    if importlib.util.find_spec("cachegen.native._core") is None:
        folder = ROOT / "build" / f"gpu-{sys.version_info[0]}{sys.version_info[1]}"
        cmake = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        python = f"-DPython_EXECUTABLE={sys.executable}"
        subprocess.run([*cmake, "-DCMAKE_BUILD_TYPE=Release", python], check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)
        for library in folder.glob("_core*.so"):
            shutil.copy(library, ROOT / "src/cachegen/native")
        importlib.invalidate_caches()
    return {"seconds": time.perf_counter() - begin}


def run_tests(*, sanitize: bool, limit_s: float) -> dict[str, Any]:
    """Run the tests that need a device, then damaged objects and encodings under a sanitizer.

    limit_s: for all of them. What cannot run says why: ``passed`` is None.
    """
    environment = {**os.environ, "CACHEGEN_REQUIRE_CUDA": "1", "PYTHONPATH": str(ROOT / "src")}
    hostile = [sys.executable, str(ROOT / "benchmarks/gpu_bench/hostile.py")]
    results = {"hostile": _run(hostile, environment, limit_s / 5)}
    if importlib.util.find_spec("pytest") is None:
        results["tests"] = {"passed": None, "output": "pytest is not installed"}
    else:
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command = [*tests, str(ROOT / "tests/cuda/test_device.py")]
        results["tests"] = _run(command, environment, limit_s / 3)
    tool = shutil.which("compute-sanitizer")
    for check in CHECKS if sanitize else ():
        if tool is None:
            found = {"passed": None, "output": "compute-sanitizer is not on the path"}
        else:
            command = [tool, "--tool", check, "--error-exitcode", "9", *hostile, "--small"]
            found = _run(command, environment, limit_s / 6)
        results[f"sanitizer {check}"] = found
    return results


def _run(command: list[str], environment: dict[str, str], limit_s: float) -> dict[str, Any]:
    begin = time.perf_counter()
    passed: bool | None
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
        passed, output = done.returncode == 0, done.stdout[-1500:] + done.stderr[-500:]
    except subprocess.TimeoutExpired:
        passed, output = None, f"stopped after {limit_s:.0f} s"
    return {"passed": passed, "output": output, "seconds": time.perf_counter() - begin}
