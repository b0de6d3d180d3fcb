"""Objects of the fused encoder are byte for byte what plain NumPy makes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.codec import progressive
from cachegen.codec.container import BYTES, PACKED, read_header
from cachegen.codec.encode_reference import ReferenceEncoder
from cachegen.codec.fit import choose_groups, fit_basis
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import NonFiniteError
from cachegen.profile import Profile
from cachegen.types import RopeSpec


def reference_bytes(codec: ProgressiveCodec, chunk: KVChunk) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progressive, "FusedEncoder", ReferenceEncoder)
        return codec.encode(chunk)


def values(shape: tuple[int, ...], seed: int, dtype: Any = np.float16) -> np.ndarray:
    """Draw channels of all widths, some of them beyond the reach of pass 0, with means."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 1.5, (*shape[:2], 1, *shape[3:])))
    mean = rng.normal(size=(*shape[:2], 1, *shape[3:]))
    return (rng.laplace(size=shape) * spread + mean).astype(dtype)


def rope_of(layers: int, half: int, *, interleaved: bool = False) -> RopeSpec:
    frequencies = tuple(float(0.3**i) for i in range(half))
    return RopeSpec((frequencies,), (1.25,), (0,) * layers, interleaved)


CASES = {
    # layers, tokens, heads, dim; of RoPE: pairs, 0 for none; passes.
    "plain": ((2, 256, 4, 64), 0, 4, np.float16),
    "bfloat16": ((2, 256, 4, 64), 32, 4, ml_dtypes.bfloat16),
    "float32": ((1, 77, 3, 20), 10, 2, np.float32),
    "partial_rope": ((1, 77, 3, 80), 16, 3, ml_dtypes.bfloat16),
    "one_token": ((2, 1, 1, 8), 4, 4, np.float16),
    "two_tokens": ((1, 2, 3, 16), 8, 5, np.float16),
    "one_pass": ((1, 45, 2, 33), 0, 1, np.float16),
    "six_passes": ((1, 300, 2, 40), 20, 6, np.float32),
    "long": ((1, 700, 1, 40), 20, 5, ml_dtypes.bfloat16),
    # More places than a byte can count bits of.
    "longer": ((1, 1050, 1, 24), 0, 4, np.float16),
    "two_passes": ((1, 256, 1, 40), 20, 2, np.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(isa: str, name: str) -> None:
    (layers, tokens, heads, dim), half, count, dtype = CASES[name]
    kv = values((layers, 2, tokens, heads, dim), tokens, dtype)
    rope = rope_of(layers, half, interleaved=name == "partial_rope") if half else None
    chunk = KVChunk.from_array(kv, first_position=5, rope=rope)
    codec = ProgressiveCodec(passes=count)
    assert codec.encode(chunk) == reference_bytes(codec, chunk)


def test_exempt_tokens_equal_numpy(isa: str) -> None:
    """Sinks, outliers of several sizes, and values beyond pass 0 that are no outliers."""
    kv = values((2, 2, 200, 2, 48), 3, np.float32)
    kv[:, :, 17] *= 1000
    kv[0, 0, 40:43] *= 40
    kv[1, 1, 60, 1, 5] = 2.0**90
    kv[0, 1, 199] += 77
    kv[1, 0, :, 0, 3] = 0
    kv[1, 0, 90, 0, 3] = 150
    chunk = KVChunk.from_array(kv)
    codec = ProgressiveCodec(sink_tokens=3, passes=2, step=0.05)
    data = codec.encode(chunk)
    assert data == reference_bytes(codec, chunk)
    out = decode(data).to_array()
    np.testing.assert_array_equal(out[:, :, :3], kv[:, :, :3])
    np.testing.assert_array_equal(out[1, 1, 60], kv[1, 1, 60])


def test_wide_channels_equal_numpy(isa: str) -> None:
    """Steps so fine that most values are early, and some are escapes."""
    chunk = KVChunk.from_array(values((1, 2, 64, 2, 24), 4))
    codec = ProgressiveCodec(passes=3, step=0.02)
    assert codec.encode(chunk) == reference_bytes(codec, chunk)


@pytest.mark.parametrize("step", [0.02, 0.5])
def test_packed_digits_and_bytes_equal_numpy(isa: str, step: float) -> None:
    """So few tokens that the states of the entropy coder cost more than it saves."""
    chunk = KVChunk.from_array(values((1, 2, 3, 1, 5), 8))
    codec = ProgressiveCodec(passes=3, step=step, sink_tokens=0)
    data = codec.encode(chunk)
    assert data == reference_bytes(codec, chunk)
    kinds = {segment.kind for segment in read_header(data).segments}
    assert PACKED in kinds and BYTES in kinds
    decode(data)


def test_strides_and_ragged_layers(isa: str) -> None:
    kv = values((3, 2, 50, 2, 16), 5)
    codec = ProgressiveCodec()
    wanted = codec.encode(KVChunk.from_array(kv))
    turned = np.ascontiguousarray(kv.transpose(3, 4, 0, 2, 1)).transpose(2, 4, 3, 0, 1)
    assert codec.encode(KVChunk.from_array(turned)) == wanted
    assert codec.encode(KVChunk.from_array(kv[:, :, ::-1][:, :, ::-1])) == wanted
    layers = [
        LayerKV(kv[0, 0], kv[0, 1]),
        LayerKV(kv[1, 0, 30:], kv[1, 1, 30:], 30),
        LayerKV(kv[2, 0, :0], kv[2, 1, :0], 50),
    ]
    ragged = KVChunk.from_layers(layers, tokens=50, rope=rope_of(3, 8))
    data = codec.encode(ragged)
    assert data == reference_bytes(codec, ragged)
    assert decode(data).layers[2].tokens == 0


def test_constant_and_zero_planes(isa: str) -> None:
    kv = np.zeros((2, 2, 40, 1, 16), np.float16)
    kv[1, 1] = 3
    codec = ProgressiveCodec()
    chunk = KVChunk.from_array(kv)
    assert codec.encode(chunk) == reference_bytes(codec, chunk)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(isa: str, dtype: Any, value: float) -> None:
    kv = values((1, 2, 40, 1, 8), 9, dtype)
    kv[0, 1, 33, 0, 5] = value
    with pytest.raises(NonFiniteError, match="V of layer 0, token 33, head 0, dimension 5"):
        ProgressiveCodec().encode(KVChunk.from_array(kv))


def profile_for(chunk: KVChunk) -> Profile:
    return fit_basis([chunk], groups=choose_groups(chunk.geometry, layers=1))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_profile_equals_numpy(isa: str, dtype: Any) -> None:
    kv = values((2, 2, 130, 2, 16), 6, dtype)
    chunk = KVChunk.from_array(kv, rope=rope_of(2, 8))
    codec = ProgressiveCodec(profile=profile_for(chunk))
    assert codec.encode(chunk) == reference_bytes(codec, chunk)


def test_threads_do_not_change_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    chunk = KVChunk.from_array(values((3, 2, 100, 2, 32), 7), rope=rope_of(3, 16))
    objects = set()
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("CACHEGEN_THREADS", threads)
        objects.add(ProgressiveCodec().encode(chunk))
    assert len(objects) == 1
