"""Calibration on a real model, and token redundancy on made-up chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cachegen.bench.calibrate import calibrate, captured_contexts, token_redundancy
from cachegen.chunk import KVChunk
from cachegen.codec.basis import load_basis
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.errors import GeometryError, UnsupportedModelError
from cachegen.hf.load import begin_and_text, load_model
from cachegen.hf.models import geometry_of
from cachegen.profile import Profile
from cachegen.types import KVDtype

MODEL = Path(__file__).parents[2] / "models/reference"


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(MODEL))


def test_a_profile_of_a_model_shrinks_its_objects(loaded) -> None:
    model, tokenizer = loaded
    text = (MODEL / "calibration_text.txt").read_text(encoding="utf-8")
    begin, ids = begin_and_text(tokenizer, text)
    assert begin == [model.config.bos_token_id]
    profile = calibrate(model, [ids], tokens=4096, context=512, begin=begin, model_name="reference")
    assert profile.meta["calibration_tokens"] == 4096
    _, held_out = begin_and_text(tokenizer, (MODEL / "eval_text.txt").read_text(encoding="utf-8"))
    captured = captured_contexts(model, held_out, tokens=512, context=512, begin=begin)
    chunk = next(captured).astype(KVDtype.BFLOAT16)
    joint = ProgressiveCodec(step=0.3, profile=profile).encode(chunk)
    plain = ProgressiveCodec(step=0.3).encode(chunk)
    assert len(joint) < 0.7 * len(plain)
    decoded, truth = decode(joint, profile=profile).to_array(), chunk.to_array()
    assert np.array_equal(decoded[:, :, 0], truth[:, :, 0])  # the sink is exact
    assert profile.meta["metric"] == "gradients"
    # V of a layer that hardly matters gets coarser steps, in units of its own spread.
    gap = np.square(decoded.astype(np.float64) - truth.astype(np.float64)).mean(axis=(2, 3, 4))
    spread = np.var(truth.astype(np.float64), axis=2).mean(axis=(2, 3))
    assert (gap / spread)[2, 1] > 2 * (gap / spread)[1, 1]


def test_a_model_without_gradients_gets_plain_weights(loaded, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise UnsupportedModelError("model", got="no gradients", expected="gradients")

    monkeypatch.setattr("cachegen.bench.calibrate.cache_gradients", refuse)
    ids = list(range(100, 400))
    profile = calibrate(loaded[0], [ids, ids], context=128, model_name="x")
    assert profile.meta["metric"] == "plain"
    assert "no gradients" in profile.meta["no_sensitivity"]
    assert profile.meta["calibration_tokens"] == 4 * 128
    asked = calibrate(loaded[0], [ids], context=128, tokens=130, sensitivity=False)
    assert asked.meta["no_sensitivity"] == "not asked for"
    assert asked.meta["calibration_tokens"] == 128


def test_the_shipped_profile_fits_the_reference_model(loaded) -> None:
    profile = Profile.load(MODEL / "cachegen.profile")
    assert (MODEL / "cachegen.profile").stat().st_size < 2_000_000
    basis = load_basis(profile, geometry_of(loaded[0]))
    assert profile.meta["metric"] == "gradients"
    assert [group.layers for group in basis.groups] == [2, 2]


def test_too_little_text(loaded) -> None:
    with pytest.raises(GeometryError, match="calibration text"):
        calibrate(loaded[0], [[5, 6, 7]], context=64)


def test_token_redundancy() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (1, 2, 4000, 1, 4)).astype(np.float32)
    walk = noise.copy()
    for token in range(1, 4000):
        walk[0, 0, token] = 0.8 * walk[0, 0, token - 1] + 0.6 * noise[0, 0, token]
    walk[0, 1] += 3
    (row,) = token_redundancy([KVChunk.from_array(walk)])
    assert row["key_lag1"] == pytest.approx(0.8, abs=0.05)
    assert row["value_lag1"] == pytest.approx(0.0, abs=0.05)
    assert row["value_mean_share"] == pytest.approx(0.9, abs=0.02)
    assert "key_before_rope_lag1" not in row
