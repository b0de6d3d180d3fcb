"""Coding chunks for a store: with a profile where there is one, and never without a result."""

from __future__ import annotations

import numpy as np
import pytest
from paged_world import chunk_of, key_of

from cachegen.chunk import KVChunk
from cachegen.connectors.coding import ChunkCoder, Coding
from cachegen.errors import ConfigError, ProfileError
from cachegen.profile import Profile


class NoFit:
    """Profiles of data that none can be fitted to."""

    def __init__(self) -> None:
        self.observed = 0

    def observe(self, chunk: KVChunk) -> Profile | None:
        self.observed += 1
        raise ProfileError("vectors of a group", got="far from orthonormal")

    def find(self, digest: bytes) -> Profile:
        raise ProfileError("profile", got="none")


def test_chunks_are_saved_where_no_profile_can_be_fitted() -> None:
    profiles = NoFit()
    coder = ChunkCoder(Coding.choose("balanced"), profiles)
    for index in range(3):
        key = key_of(index, coder.coding)
        data = coder.encode(chunk_of(index), key)
        back = coder.decode(data, key, profile=None)
        assert np.abs(back.to_array() - chunk_of(index).to_array()).mean() < 0.5
    assert profiles.observed == 1


def test_qualities_name_codecs() -> None:
    assert Coding.choose("lossless").is_exact
    assert Coding.choose("balanced").quality == "balanced"
    assert Coding.choose("balanced", codec="int8").quality is None
    with pytest.raises(ConfigError, match="quality"):
        Coding.choose("splendid")
