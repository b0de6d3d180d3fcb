"""Checks that every codec has to pass."""

from __future__ import annotations

import pytest

from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.int8 import Int8Codec
from cachegen.codec.lossless import LosslessCodec
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.raw import RawCodec


def every_codec() -> list[Codec]:
    return [
        RawCodec(),
        LosslessCodec(),
        Int8Codec(),
        Int8Codec(entropy=False),
        CacheGenCodec(),
        CacheGenCodec(level=1, tables="parametric"),
        CacheGenCodec(level=3, delta="anchor"),
        CacheGenCodec(level=3, delta="anchor", tables="parametric"),
        ProgressiveCodec(),
    ]


def _label(codec: Codec) -> str:
    return "-".join(str(part) for part in codec.config().values() if part not in (None, "none"))


@pytest.fixture(params=every_codec(), ids=_label)
def codec(request: pytest.FixtureRequest) -> Codec:
    return request.param
