"""Stored chunks for the tests of streaming."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def chunks(make_kv):
    """Four chunks of 64 tokens."""
    return make_kv(layers=4, tokens=256, dim=64).split(64)


@pytest.fixture(scope="session")
def progressive(chunks) -> dict[str, bytes]:
    """Objects of the four chunks, about 27 kB each, their first passes under 8 kB."""
    from fakes import encode_all, keys_of

    from cachegen.codec.progressive import ProgressiveCodec

    return encode_all(ProgressiveCodec(), chunks, keys_of(4))
