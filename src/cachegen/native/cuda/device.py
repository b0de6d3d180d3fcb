"""What the decoder needs of a device, and the CUDA one; ``emulation.py`` has the other."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import ConfigError
from cachegen.native.cuda import cache, source

THREADS = 128
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Memory(Protocol):
    """Device memory; freed when the object goes."""

    address: int
    size_bytes: int


class Device(Protocol):
    """Memory and launches of one device. All work is in order of the stream that is passed."""

    name: str
    max_shared_bytes: int
    tables: dict[str, Any]

    def allocate(self, size_bytes: int, stream: Any) -> Memory:
        """Allot memory, 256-byte aligned, of any content."""

    def upload(self, address: int, data: NDArray[np.uint8], stream: Any) -> None:
        """Copy bytes to the device; they must stay until the stream has come so far."""

    def download(self, address: int, size_bytes: int, stream: Any) -> NDArray[np.uint8]:
        """Wait for the stream and return bytes of the device."""

    def zero(self, address: int, size_bytes: int, stream: Any) -> None:
        """Set bytes of the device to 0."""

    def launch(self, kernel: str, grid: int, shared_bytes: int, argument: int, stream: Any) -> None:
        """Start a kernel with blocks of 128 threads."""


def compile_cubin(target: str, *, small: bool = False) -> Path:
    """Compile all kernels for a target such as ``"sm_90"`` by NVRTC, or find them compiled.

    small: without unrolled loops, slow but compiled in seconds; for tests of the source.
    Returns: the file of the machine code. Raises: ConfigError if ``cuda.core`` is not installed.
    """
    core = load_core()
    macros = {"define_macro": "CACHEGEN_SMALL"} if small else {}
    options = core.ProgramOptions(
        arch=target, std="c++17", device_as_default_execution_space=True, **macros
    )
    name = f"{source.digest(target, str(small), str(core.__version__))}.cubin"

    def make(path: Path) -> None:
        program = core.Program(source.joined_source(), "c++", options)
        path.write_bytes(bytes(program.compile("cubin").code))

    return cache.cached(name, make)


def load_core() -> Any:
    """Import ``cuda.core``. Raises: ConfigError if it is not installed."""
    try:
        import cuda.core as core

        if not hasattr(core, "Program"):
            import cuda.core.experimental as core  # type: ignore[no-redef,unused-ignore]
    except ImportError:
        raise ConfigError(
            "cuda.core",
            got="not installed",
            expected="installed",
            remedy="pip install cachegen[cuda]",
        ) from None
    return core


def _check(result: Sequence[Any], what: str) -> Any:
    status = result[0]
    if int(status) != 0:
        raise ConfigError(f"CUDA driver, {what}", got=status, expected="success")
    return result[1] if len(result) == 2 else None


class CudaMemory:
    """Memory from the driver's stream-ordered pool."""

    def __init__(self, device: CudaDevice, size_bytes: int, stream: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        self._stream = stream
        with device:
            driver = device.driver
            pointer = _check(driver.cuMemAllocAsync(max(size_bytes, 1), stream), "allocation")
        self.address = int(pointer)

    def __del__(self) -> None:
        # Nothing was allotted if the constructor raised.
        if getattr(self, "address", 0):
            with self._device:
                self._device.driver.cuMemFreeAsync(self.address, self._stream)


class CudaDevice:
    """One CUDA device, through the driver; shares its primary context with torch and others.

    Get one with ``cuda_device``. Streams are handles, 0 for the default stream.
    """

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:
            raise ConfigError(
                "cuda.bindings",
                got="not installed",
                expected="installed",
                remedy="pip install cachegen[cuda]",
            ) from None
        self.driver = driver
        self.index = index
        self.tables: dict[str, Any] = {}
        try:
            _check(driver.cuInit(0), "start")
        except RuntimeError as error:  # no driver on this machine
            raise ConfigError("CUDA driver", got=str(error), expected="a driver") from None
        handle = _check(driver.cuDeviceGet(index), f"device {index}")
        self._context = _check(driver.cuDevicePrimaryCtxRetain(handle), "context")
        self.name = _check(driver.cuDeviceGetName(256, handle), "name").split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute

        def property_of(name: str) -> int:
            wanted = getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_check(driver.cuDeviceGetAttribute(wanted, handle), name))

        major = property_of("COMPUTE_CAPABILITY_MAJOR")
        self.target = f"sm_{major}{property_of('COMPUTE_CAPABILITY_MINOR')}"
        self.max_shared_bytes = property_of("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        code = compile_cubin(self.target).read_bytes()
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._functions: dict[str, Any] = {}
        with self:
            self._module = _check(driver.cuModuleLoadData(code), "kernels")
            for name in source.KERNELS:
                function = _check(driver.cuModuleGetFunction(self._module, name.encode()), name)
                self._functions[name] = function
                if name.startswith("decode_progressive"):
                    status = driver.cuFuncSetAttribute(function, dynamic, self.max_shared_bytes)
                    _check(status, "shared memory")

    def __enter__(self) -> CudaDevice:
        _check(self.driver.cuCtxPushCurrent(self._context), "context")
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.cuCtxPopCurrent()

    def allocate(self, size_bytes: int, stream: Any) -> CudaMemory:
        return CudaMemory(self, size_bytes, stream)

    def upload(self, address: int, data: NDArray[np.uint8], stream: Any) -> None:
        with self:
            status = self.driver.cuMemcpyHtoDAsync(address, data.ctypes.data, data.nbytes, stream)
            _check(status, "upload")

    def download(self, address: int, size_bytes: int, stream: Any) -> NDArray[np.uint8]:
        out = np.empty(size_bytes, np.uint8)
        with self:
            driver = self.driver
            status = driver.cuMemcpyDtoHAsync(out.ctypes.data, address, out.nbytes, stream)
            _check(status, "download")
            _check(driver.cuStreamSynchronize(stream), "kernels")
        return out

    def zero(self, address: int, size_bytes: int, stream: Any) -> None:
        with self:
            _check(self.driver.cuMemsetD8Async(address, 0, size_bytes, stream), "memset")

    def launch(self, kernel: str, grid: int, shared_bytes: int, argument: int, stream: Any) -> None:
        parameters = ((argument,), (ctypes.c_uint64,))
        function, block = self._functions[kernel], (THREADS, 1, 1)
        with self:
            status = self.driver.cuLaunchKernel(
                function, grid, 1, 1, *block, shared_bytes, stream, parameters, 0
            )
            _check(status, kernel)


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """Return the device of this index, kernels compiled and loaded. Raises: ConfigError."""
    return CudaDevice(index)
