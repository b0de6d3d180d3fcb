"""How a connector codes chunks: which codec writes them, and how much of one is read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.levels import NAMED
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.reader import ObjectReader
from cachegen.codec.registry import CODECS, codec_class, get_codec
from cachegen.errors import ConfigError
from cachegen.stream.autoprofile import AutoProfile
from cachegen.types import ChunkKey

EXACT = ("lossless", "raw")


@dataclass(frozen=True)
class Coding:
    """What is stored for a chunk and how much of it is read.

    codec: name of the codec that writes. quality: what readers take of a ``progressive`` object, a
        name of ``codec.levels.NAMED``; None reads objects whole. settings: of the codec.
    """

    codec: str
    quality: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def choose(cls, quality: str, *, codec: str | None = None, **settings: Any) -> Coding:
        """Choose by quality: a named level, or ``"lossless"``; codec: to use another one.

        Raises: ConfigError, UnknownCodecError.
        """
        if codec is None:
            names = [known.name for known in CODECS]
            exact = next(name for name in EXACT if name in names)
            codec = exact if quality == "lossless" else ProgressiveCodec.name
        if codec == ProgressiveCodec.name:
            if quality not in NAMED:
                raise ConfigError(
                    "quality", got=quality, expected=" or ".join(["lossless", *NAMED])
                )
            coding = cls(codec, quality, settings)
        else:
            coding = cls(codec, None, settings)
        coding.make()
        return coding

    @property
    def is_exact(self) -> bool:
        """True if what is read back equals what was saved, to the last bit."""
        return self.codec in EXACT

    @property
    def label(self) -> dict[str, Any]:
        """What keys are named after: what is stored, not how much is read or with which profile.

        An object says itself which profile it needs, so that readers need not know beforehand.
        """
        return {"codec": self.codec, "by": "connector", **self.settings}

    def make(self, **more: Any) -> Codec:
        """Build the codec. Raises: ConfigError, UnknownCodecError."""
        return get_codec(self.codec, **self.settings, **more)


class ChunkCoder:
    """Encodes and decodes the chunks of one namespace; thread-safe.

    profiles: where profiles of ``progressive`` objects are made and found, or None for none.
    """

    def __init__(self, coding: Coding, profiles: AutoProfile | None = None) -> None:
        self.coding = coding
        self._profiles = profiles if coding.codec == ProgressiveCodec.name else None
        self._plain = coding.make()

    def encode(self, chunk: KVChunk, key: ChunkKey) -> bytes:
        """Encode a chunk, with the namespace's profile as soon as there is one.

        Raises: as the codec and the store of profiles.
        """
        profile = None if self._profiles is None else self._profiles.observe(chunk)
        codec = self._plain if profile is None else self.coding.make(profile=profile)
        return codec.encode(chunk, key=key)

    def decode(self, data: bytes, key: ChunkKey) -> KVChunk:
        """Decode an object, or the part of one that was read. Raises: as ``cachegen.decode``."""
        partial = self.coding.quality is not None
        reader = ObjectReader(data, key=key, allow_partial=partial)
        digest = reader.header.profile
        profile = None
        if digest is not None and self._profiles is not None:
            profile = self._profiles.find(digest)
        return codec_class(reader.header.codec_id).decode_object(reader, profile=profile)
