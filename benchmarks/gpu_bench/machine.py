"""What the benchmark measures on: a CUDA device with torch, or in a dry run the emulation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

REPEATS = 15


@dataclass
class Bench:
    """A device to measure on: torch and CUDA, or in a dry run the emulation and the clock."""

    dry: bool
    device: Any
    name: str
    compile_s: float
    deadline: float = 0.0
    cut_short: bool = False

    def out_of_time(self) -> bool:
        """Return whether the part at hand has used up its time, and remember it."""
        late = time.perf_counter() > self.deadline
        self.cut_short |= late
        return late

    def empty(self, shape: tuple[int, ...]) -> Any:
        if self.dry:
            import ml_dtypes
            import numpy as np

            return np.zeros(shape, ml_dtypes.bfloat16)
        import torch

        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    def put(self, array: Any) -> Any:
        """Copy an array of bfloat16 to the device."""
        if self.dry:
            return array.copy()
        from cachegen.chunk import as_torch

        return as_torch(array).cuda()

    def seconds(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        """Return the median time of some work on the device."""
        if self.dry:
            begin_s = time.perf_counter()
            work()
            return time.perf_counter() - begin_s
        import torch

        for _ in range(2):
            work()
        times: list[float] = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def copy_seconds(self, tensor: Any) -> float:
        other = tensor.copy() if self.dry else tensor.clone()
        copy = (lambda: other.__setitem__(..., tensor)) if self.dry else lambda: other.copy_(tensor)
        return self.seconds(copy)


def emulated() -> Bench:
    """Return the emulation on the host."""
    from cachegen.native.cuda.emulation import EmulatedDevice

    begin = time.perf_counter()
    device = EmulatedDevice()
    name = "none: emulation, times mean nothing"
    return Bench(True, device, name, time.perf_counter() - begin)


def real() -> Bench:
    """Return the first CUDA device, kernels compiled."""
    import torch

    from cachegen.native.cuda.device import cuda_device

    begin = time.perf_counter()
    device = cuda_device(0)
    return Bench(False, device, torch.cuda.get_device_name(0), time.perf_counter() - begin)
