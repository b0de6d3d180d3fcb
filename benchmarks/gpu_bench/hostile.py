"""Damaged objects and encodings of every kind on a device, without torch: for a sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu_bench/hostile.py --small

Every damaged object must be refused with the error of the CPU, or decode to the same; every chunk
must be encoded to the bytes of the CPU. ``--emulate`` runs on the host.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/cuda"))

import numpy as np
from samples import Sample, assert_close, damaged, draw_kv, empty_like, profiled, samples, with_rope

from cachegen.chunk import KVChunk
from cachegen.codec import gpu
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.gpu.target import Tensor
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import FormatError
from cachegen.types import KVDtype


class Arrays:
    """Arrays on a device, there and back."""

    def __init__(self, device: Any, index: int) -> None:
        self._device = device
        self._index = index

    def put(self, array: np.ndarray) -> Tensor:
        flat = np.ascontiguousarray(array)
        memory = self._device.allocate(max(flat.nbytes, 1), 0)
        self._device.upload(memory.address, flat.reshape(-1).view(np.uint8), 0)
        self._device.download(memory.address, 1, 0)  # waits
        strides = tuple(step // flat.itemsize for step in flat.strides)
        dtype = KVDtype.of(flat.dtype)
        return Tensor(memory.address, flat.shape, strides, dtype, self._index, memory)

    def get(self, tensor: Tensor) -> np.ndarray:
        assert tensor.dtype is not None  # put gave it one
        dtype = tensor.dtype.numpy
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        found: np.ndarray = self._device.download(tensor.address, size, 0)
        return found.view(dtype).reshape(tensor.shape)


def attack(arrays: Arrays, device: Any, sample: Sample, whole: KVChunk) -> bool:
    """Decode on both; return whether it was refused. Both have to say the same."""
    expected: KVChunk | FormatError
    try:
        expected = sample.expected()
    except FormatError as error:
        expected = error
    out = [tuple(arrays.put(plane) for plane in pair) for pair in empty_like(whole)]
    options = {"profile": sample.profile, "allow_partial": sample.partial, "device": device}
    try:
        gpu.decode(sample.data, out=out, **options)
    except FormatError as error:
        assert type(error) is type(expected), f"{sample.name}: {error}"
        return True
    assert isinstance(expected, KVChunk), f"{sample.name}: only the CPU refuses: {expected}"
    for pair, layer in zip(out, expected.layers, strict=True):
        for tensor, plane in zip(pair, (layer.keys, layer.values), strict=True):
            if np.isfinite(plane.astype(np.float32)).all():
                assert_close(arrays.get(tensor), plane, exact=False)
    return False


def encode_all(arrays: Arrays, device: Any) -> int:
    """Encode chunks with every codec; return how many."""
    import ml_dtypes

    done = 0
    codecs = (
        *(Int8Codec(), Int8Codec(entropy=False), CacheGenCodec(), CacheGenCodec(delta="anchor")),
        *(CacheGenCodec(tables="parametric"), ProgressiveCodec(), ProgressiveCodec(passes=6)),
    )
    for tokens, dtype in ((70, ml_dtypes.bfloat16), (37, np.float16)):
        kv = with_rope(draw_kv(2, 2, tokens, 16, seed=tokens, dtype=dtype), 8)
        pairs = [(arrays.put(layer.keys), arrays.put(layer.values)) for layer in kv.layers]
        chunk = gpu.DeviceChunk(pairs, None, kv.first_position, kv.rope)
        for codec in codecs:
            data = gpu.encode(codec, chunk, device=device)
            assert data == codec.encode(kv), codec.config()
            done += 1
    sample, profile = profiled()
    kv = with_rope(draw_kv(2, 2, 70, 16, seed=20, dtype=ml_dtypes.bfloat16), 8)
    pairs = [(arrays.put(layer.keys), arrays.put(layer.values)) for layer in kv.layers]
    chunk = gpu.DeviceChunk(pairs, None, kv.first_position, kv.rope)
    codec = ProgressiveCodec(profile=profile, step=0.05)
    data = gpu.encode(codec, chunk, device=device)
    assert abs(len(data) - len(sample.data)) <= len(sample.data) // 50
    return done + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="every third object, for a sanitizer")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    device: Any
    if options.emulate:
        from cachegen.native.cuda.emulation import EmulatedDevice

        device = EmulatedDevice()
    else:
        from cachegen.native.cuda.device import cuda_device

        device = cuda_device(0)
    arrays = Arrays(device, -1 if options.emulate else 0)
    rng = np.random.default_rng(5)
    refused = attacks = 0
    for sample in [*samples(), profiled()[0]][:: 3 if options.small else 1]:
        whole = decode(sample.data, profile=sample.profile, allow_partial=True)
        attack(arrays, device, sample, whole)
        attacks += 1
        for _ in range(0 if sample.partial else 1 if options.small else 4):
            broken = Sample(sample.name, damaged(sample.data, rng), sample.profile)
            refused += attack(arrays, device, broken, whole)
            attacks += 1
    print(f"{attacks} objects, {refused} refused, {encode_all(arrays, device)} encoded")


if __name__ == "__main__":
    main()
