"""Devices of the tests: the kernels emulated on the host, and a real device where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachegen.errors import CacheGenError
from cachegen.native.cuda import emulation
from cachegen.native.cuda.device import CudaDevice, cuda_device
from cachegen.native.cuda.emulation import EmulatedDevice


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled kernels of the tests in the build folder of a checkout, never in a home."""
    os.environ.setdefault(
        "CACHEGEN_KERNEL_CACHE", str(Path(__file__).parents[2] / "build" / "kernels")
    )


@pytest.fixture(scope="session")
def emulated(kernel_cache: None) -> EmulatedDevice:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulation with")
    return EmulatedDevice()


@pytest.fixture(scope="session")
def real(kernel_cache: None) -> CudaDevice:
    try:
        return cuda_device(0)
    except (CacheGenError, ImportError, RuntimeError) as error:
        if os.environ.get("CACHEGEN_REQUIRE_CUDA") == "1":
            pytest.fail(f"CACHEGEN_REQUIRE_CUDA=1, and there is no device: {error}")
        pytest.skip(f"no CUDA device: {error}")
