"""What the decoder needs of a device, and the CUDA one; ``emulation.py`` has the other."""

from __future__ import annotations

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
        address = getattr(self, "address", 0)
        if address:
            with self._device:
                self._device.driver.cuMemFreeAsync(address, self._stream)


class CudaDevice:
    """One CUDA device, through ``cuda.core`` and the driver. Get one with ``cuda_device``.

    Streams are handles (int, 0 for the default stream) of the device's primary context.
    """

    def __init__(self, index: int) -> None:
        core = load_core()
        from cuda.bindings import driver

        self.core = core
        self.driver = driver
        self.index = index
        self.tables: dict[str, Any] = {}
        before = _current_context(driver)
        self._device = core.Device(index)
        self._device.set_current()
        self._context = _check(driver.cuCtxGetCurrent(), "context")
        self.name = str(self._device.name)
        capability = self._device.compute_capability
        self.target = f"sm_{capability[0]}{capability[1]}"
        attribute = driver.CUdevice_attribute
        limit = attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.max_shared_bytes = int(_check(driver.cuDeviceGetAttribute(limit, index), "attribute"))
        code = core.ObjectCode.from_cubin(compile_cubin(self.target).read_bytes())
        self._kernels = {name: code.get_kernel(name) for name in source.KERNELS}
        function = driver.CUfunction_attribute
        dynamic = function.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for name, kernel in self._kernels.items():
            if name.startswith("decode_progressive"):
                handle = driver.CUkernel(int(kernel.handle))
                status = driver.cuKernelSetAttribute(dynamic, self.max_shared_bytes, handle, index)
                _check(status, "shared memory")
        if before is not None:
            driver.cuCtxSetCurrent(before)

    def __enter__(self) -> CudaDevice:
        self.driver.cuCtxPushCurrent(self._context)
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
        config = self.core.LaunchConfig(grid=grid, block=THREADS, shmem_size=shared_bytes)
        with self:
            handle = self.core.Stream.from_handle(stream)
            self.core.launch(handle, config, self._kernels[kernel], np.uint64(argument))


def _current_context(driver: Any) -> Any:
    """Return the context of this thread, or None if there is none or no driver yet."""
    status, context = driver.cuCtxGetCurrent()
    return context if int(status) == 0 and int(context) else None


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """Return the device of this index, kernels compiled and loaded. Raises: ConfigError."""
    return CudaDevice(index)
