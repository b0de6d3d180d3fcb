"""Damaged objects: the kernels refuse them with the error of the CPU and touch nothing beyond."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cachegen.chunk import KVChunk
from cachegen.codec import gpu
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import SPARSE, read_header
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import FormatError
from cachegen.native.cuda import emulation
from cachegen.native.cuda.emulation import EmulatedDevice

sys.path.insert(0, str(Path(__file__).parent))
from samples import (
    BFLOAT16,
    SPARSE_CODEC,
    Sample,
    assert_close,
    damaged,
    draw_kv,
    empty_like,
    few_wide_values,
    profiled,
    replaced,
    samples,
    sparse_samples,
    with_rope,
)


def outcome(sample: Sample) -> KVChunk | FormatError:
    try:
        return sample.expected()
    except FormatError as error:
        return error


def attack(device: EmulatedDevice, sample: Sample) -> bool:
    """Decode on both; return whether it was refused. Both have to say the same."""
    expected = outcome(sample)
    whole = decode(UNDAMAGED[sample.name], profile=sample.profile, allow_partial=True)
    out = empty_like(whole)
    try:
        gpu.decode(
            sample.data,
            out=out,
            profile=sample.profile,
            allow_partial=sample.partial,
            device=device,
        )
    except FormatError as error:
        assert isinstance(expected, FormatError), f"{sample.name}: only the kernels refuse: {error}"
        assert (type(error), str(error)) == (type(expected), str(expected))
        return True
    assert isinstance(expected, KVChunk), f"{sample.name}: only the CPU refuses: {expected}"
    for (keys, values), layer in zip(out, expected.layers, strict=True):
        for got, plane in ((keys, layer.keys), (values, layer.values)):
            if np.isfinite(plane.astype(np.float32)).all():
                assert_close(got, plane, exact=False)
    return False


def corpus() -> list[Sample]:
    return [*samples(), *sparse_samples(), profiled()[0]]


UNDAMAGED: dict[str, bytes] = {}


def test_damage_is_refused_as_on_the_cpu(emulated: EmulatedDevice) -> None:
    rng = np.random.default_rng(4)
    refused = total = 0
    for sample in corpus():
        if "profile dim" in sample.name:
            continue
        UNDAMAGED[sample.name] = sample.data
        for _ in range(6):
            if sample.partial:
                continue
            data = damaged(sample.data, rng)
            refused += attack(emulated, Sample(sample.name, data, sample.profile))
            total += 1
    assert refused > total / 4


def test_the_corpus_takes_every_way(emulated: EmulatedDevice) -> None:
    """Segments of all kinds, escapes, both sizes of tables."""
    kinds, escapes = set(), 0
    for sample in corpus():
        header = read_header(sample.data)
        for segment in header.segments:
            if segment.offset + segment.length > len(sample.data):
                continue
            kinds.add((header.codec_id, segment.pass_index > 0, segment.kind))
            if segment.kind == 1 and header.codec_id == 3 and segment.pass_index == 0:
                body = sample.data[segment.offset :]
                escapes += int.from_bytes(body[8:12], "little")
    assert escapes > 0
    assert {(1, False, 1), (1, False, 2), (1, False, 3), (1, True, 2)} <= kinds
    assert {(2, False, 1), (2, False, 3), (3, False, 1), (3, True, 1), (3, False, 4)} <= kinds


def bits(*fields: tuple[int, int]) -> bytes:
    """Pack numbers, each with its number of bits, the lowest first."""
    whole = at = 0
    for value, count in fields:
        whole |= value << at
        at += count
    return whole.to_bytes(-(-at // 8), "little")


def sparse_body(*fields: tuple[int, int], count: int = 1, low_bits: int = 4) -> bytes:
    return count.to_bytes(4, "little") + bytes([low_bits]) + bits(*fields)


# 40 tokens of 36 channels: 72 steps, of which places 0 and 1 have 20 lanes.
ONE = ((1, 1), (0, 4), (1, 1), (1, 1))  # at place 0: no gap, positive, magnitude 1
HOSTILE_BODIES = {
    "no head": b"\1\0\0\0",
    "more symbols than steps": sparse_body(*ONE * 73, count=73),
    "as many symbols as 32 bits count": sparse_body(*ONE, count=2**32 - 1),
    "too many low bits": sparse_body(*ONE, low_bits=41),
    "no bits": sparse_body(),
    "only zeros": sparse_body((0, 200)),
    "bits missing": sparse_body(*ONE, count=2),
    "bits left over": sparse_body(*ONE, (1, 1)),
    "bytes left over": sparse_body(*ONE, (0, 16)),
    "a lane without a token": sparse_body((2, 2), (4, 4), *ONE[2:]),
    "a place behind the end": sparse_body((0, 144), *ONE),
    "a gap of 2 to the power of 39": sparse_body((1, 1), (1 << 39, 40), *ONE[2:], low_bits=40),
    "a symbol above 254": sparse_body(*ONE[:3], (0, 7), (1, 1), (0, 7)),
    "a magnitude of eight bits": sparse_body(*ONE[:3], (0, 8), (1, 1), (0, 8)),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_sparse_bodies(
    emulated: EmulatedDevice, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused as on the CPU, before a kernel runs."""
    good = ProgressiveCodec(passes=1, step=8.0).encode(few_wide_values(40, 9))
    segments = read_header(good).segments
    index = next(i for i, one in enumerate(segments) if one.kind == SPARSE)
    sound = Sample(name, replaced(good, index, sparse_body(*ONE)))
    UNDAMAGED[name] = good
    assert not attack(emulated, sound)
    gpu.prepare([good], out=empty_like(sound.expected()), device=emulated)  # builds the tables
    monkeypatch.setattr(emulated, "launch", None)
    assert attack(emulated, Sample(name, replaced(good, index, HOSTILE_BODIES[name])))


def test_only_first_passes_may_be_sparse(emulated: EmulatedDevice) -> None:
    good = SPARSE_CODEC.encode(few_wide_values(40, 9))
    segments = read_header(good).segments
    UNDAMAGED["kind"] = good
    index = next(i for i, one in enumerate(segments) if one.pass_index == 1)
    assert attack(emulated, Sample("kind", replaced(good, index, sparse_body(*ONE), kind=SPARSE)))


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    """Once more with a sanitizer around all memory of the emulated device."""
    compiler = emulation.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    # libstdc++ too, or the sanitizer does not find the throw that it replaces.
    found, cxx = (
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    )
    if not Path(found).is_file():
        pytest.skip("no AddressSanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{found} {cxx}",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "PYTHONPATH": str(Path(emulation.__file__).parents[3]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "attacks" in done.stdout and "encoded" in done.stdout


def main() -> None:
    device = EmulatedDevice(sanitize=True)
    rng = np.random.default_rng(5)
    count = 0
    for index, sample in enumerate(corpus()):
        UNDAMAGED[sample.name] = sample.data
        attack(device, sample)
        if index % 3 == 0 and not sample.partial:
            attack(device, Sample(sample.name, damaged(sample.data, rng), sample.profile))
        count += 1
    print(count, "attacks")
    for codec in (Int8Codec(), CacheGenCodec(delta="anchor"), ProgressiveCodec()):
        for tokens, dim in ((70, 16), (37, 9)):
            kv = draw_kv(2, 3, tokens, dim, seed=1, dtype=np.float16)
            planes = [(layer.keys, layer.values) for layer in kv.layers]
            assert gpu.encode(codec, gpu.DeviceChunk(planes), device=device) == codec.encode(kv)
    profile = profiled()[1]
    kv = with_rope(draw_kv(2, 2, 70, 16, seed=20, dtype=BFLOAT16), 8)
    chunk = gpu.DeviceChunk([(layer.keys, layer.values) for layer in kv.layers], rope=kv.rope)
    gpu.encode(ProgressiveCodec(profile=profile), chunk, device=device)
    print("encoded")


if __name__ == "__main__":
    main()
