"""The HIP branch of the kernels: compiled by hipcc where there is one, else checked by name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cachegen.native.cuda import emulation, source

NAMES = Path(__file__).parent / "hip_names.h"


def test_kernels_compile_with_the_names_of_hip(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.hip"
    kernels.write_text(source.joined_source(), encoding="utf-8")
    hipcc, compiler = shutil.which("hipcc"), emulation.compiler()
    if hipcc is not None:
        flags = ["-std=c++17", "--offload-arch=gfx942", "--cuda-device-only", "-fsyntax-only"]
        command = [hipcc, *flags, str(kernels)]
    elif compiler is not None:
        flags = ["-std=c++20", "-D__HIP_PLATFORM_AMD__", "-fsyntax-only", "-Wno-unknown-pragmas"]
        command = [compiler, "-x", "c++", *flags, "-include", str(NAMES), str(kernels)]
    else:
        pytest.skip("neither hipcc nor a C++ compiler")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
