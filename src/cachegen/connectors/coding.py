"""How a connector codes chunks: which codec writes them, and how much of one is read back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.levels import NAMED
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import CODECS, decode, get_codec
from cachegen.connectors.device_blocks import DeviceBlocks
from cachegen.errors import ConfigError, ProfileError
from cachegen.profile import Profile, require_profile
from cachegen.stream.autoprofile import AutoProfile, ProfileStore
from cachegen.types import ChunkKey

logger = logging.getLogger("vllm.cachegen")

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


class Profiles(Protocol):
    """Where profiles come from, see ``AutoProfile``."""

    def observe(self, chunk: KVChunk) -> Profile | None:
        """Take in a chunk; returns the profile to encode it with, or None."""

    def find(self, digest: bytes) -> Profile:
        """Return the profile that an object names. Raises: ProfileError."""


class OneProfile:
    """A profile from a file, for every chunk."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def observe(self, chunk: KVChunk) -> Profile | None:
        """Return the profile; ragged chunks go without."""
        return self._profile if chunk.is_uniform else None

    def find(self, digest: bytes) -> Profile:
        """Return the profile if it is the one. Raises: ProfileError."""
        return require_profile(self._profile, digest)


def profiles_of(setting: str, store: ProfileStore, namespace: bytes) -> Profiles | None:
    """Return what the ``profile`` setting says: ``auto``, ``none`` or a file.

    Raises: FileNotFoundError, ProfileError.
    """
    if setting == "none":
        return None
    if setting == "auto":
        return AutoProfile(store, namespace)
    return OneProfile(Profile.load(setting))


class ChunkCoder:
    """Encodes and decodes the chunks of one namespace; thread-safe.

    profiles: where profiles of ``progressive`` objects are made and found, or None for none.
    """

    def __init__(self, coding: Coding, profiles: Profiles | None = None) -> None:
        self.coding = coding
        self._profiles = profiles if coding.codec == ProgressiveCodec.name else None
        self._plain = coding.make()
        self._observes = self._profiles is not None

    def encode(self, chunk: KVChunk | DeviceBlocks, key: ChunkKey) -> bytes:
        """Encode a chunk where it lies, with the namespace's profile as soon as there is one.

        Where none can be fitted, chunks are encoded without. Raises: as the codec and the store.
        """
        profile = self._observed(chunk)
        codec = self._plain if profile is None else self.coding.make(profile=profile)
        if isinstance(chunk, DeviceBlocks):
            return chunk.encode(codec, key)
        return codec.encode(chunk, key=key)

    def _observed(self, chunk: KVChunk | DeviceBlocks) -> Profile | None:
        """Take in a chunk; returns the profile to encode it with, or None."""
        if self._profiles is None or not self._observes:
            return None
        try:
            # Profiles are made on the host.
            seen = chunk.to_host() if isinstance(chunk, DeviceBlocks) else chunk
            return self._profiles.observe(seen)
        except ProfileError as error:
            # The next chunk would only bring the same fit once more.
            self._observes = False
            logger.warning("no profile is made, chunks will be larger: %s", error)
            return None

    def decode(
        self,
        data: bytes,
        key: ChunkKey,
        *,
        profile: bytes | None,
        room: DeviceBlocks | None = None,
    ) -> KVChunk | DeviceBlocks:
        """Decode an object, or the part of one that was read.

        profile: digest of the profile that the object names, if it does. room: where on a GPU to
        decode to, if there. Returns: room, or a chunk on the host.
        Raises: as ``cachegen.decode``, ProfileError.
        """
        found = None
        if profile is not None and self._profiles is not None:
            found = self._profiles.find(profile)
        partial = self.coding.quality is not None
        if room is not None:
            room.decode(data, key, allow_partial=partial, profile=found)
            return room
        return decode(data, key=key, allow_partial=partial, profile=found)
