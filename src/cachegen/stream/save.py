"""Saving chunks of a namespace with or without a profile, and finding the profile of an object.

With ``profile="auto"`` the first chunks of a namespace are coded without a profile and become one,
see ``autoprofile``. The key of a chunk says ``"auto"`` and not which profile, so that one look-up
finds what was saved before and after; the object itself names the profile it needs.

>>> saver = Saver(store, namespace)  # doctest: +SKIP
>>> (key,) = saver.keys([chain])  # doctest: +SKIP
>>> saver.save(chunk, key)  # doctest: +SKIP
>>> Fetcher(store, find_profile=saver.find_profile).request([key])  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.container import read_header
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode, get_codec
from cachegen.errors import ConfigError
from cachegen.profile import Profile, require_profile
from cachegen.stream.autoprofile import DEFAULT_TOKENS, AutoProfile, ProfileStore
from cachegen.types import ChunkKey, digest_config

AUTO: Final = "auto"


class Saver:
    """Saves and loads the chunks of one namespace of a store. Thread-safe.

    namespace: 32 bytes, see ``store.keys``. codec: name of a codec. profile: ``"auto"``, a profile,
    or None; codecs that take none are used without. auto_tokens: how many make an automatic
    profile. settings: of the codec.
    Raises: ConfigError for settings that the codec does not have.
    """

    def __init__(
        self,
        store: ProfileStore,
        namespace: bytes,
        *,
        codec: str = ProgressiveCodec.name,
        profile: Profile | Literal["auto"] | None = AUTO,
        auto_tokens: int = DEFAULT_TOKENS,
        model_name: str = "",
        **settings: Any,
    ) -> None:
        if isinstance(profile, str) and profile != AUTO:
            raise ConfigError("profile", got=profile, expected="'auto', a profile or None")
        self._store = store
        self._namespace = namespace
        self._settings = settings
        self._codec = codec
        self._plain = get_codec(codec, **settings)
        takes_profile = codec == ProgressiveCodec.name
        self._fixed = profile if takes_profile and isinstance(profile, Profile) else None
        self._auto: AutoProfile | None = None
        if takes_profile and profile == AUTO:
            self._auto = AutoProfile(store, namespace, model_name=model_name, tokens=auto_tokens)

    @property
    def config(self) -> dict[str, Any]:
        """What keys are named after, JSON-able; ``profile`` is ``"auto"`` in automatic mode."""
        if self._auto is not None:
            return self._plain.config() | {"profile": AUTO}
        return (self._plain if self._fixed is None else self._with(self._fixed)).config()

    def keys(self, chains: Sequence[bytes]) -> list[ChunkKey]:
        """Return the key of every chunk. chains: what ``store.keys.chain_digests`` returned."""
        codec = digest_config(self.config)
        return [ChunkKey(self._namespace, chain, codec) for chain in chains]

    def encode(self, chunk: KVChunk, *, key: ChunkKey | None = None) -> bytes:
        """Encode a chunk with the profile that is due. Raises: as the codec and the store."""
        profile = self._fixed if self._auto is None else self._auto.observe(chunk)
        codec = self._plain if profile is None else self._with(profile)
        return codec.encode(chunk, key=key)

    def save(self, chunk: KVChunk, key: ChunkKey) -> int:
        """Encode and store a chunk. Returns: its bytes. Raises: as the codec and the store."""
        data = self.encode(chunk, key=key)
        self._store.put(key.name, data)
        return len(data)

    def load(self, key: ChunkKey) -> KVChunk | None:
        """Read and decode a chunk whole; None if there is none.

        Raises: FormatError, KeyMismatchError, ProfileError, as the store.
        """
        data = self._store.get(key.name)
        return None if data is None else self.decode(data, key=key)

    def decode(
        self, data: bytes, *, key: ChunkKey | None = None, allow_partial: bool = False
    ) -> KVChunk:
        """Decode an object, or a prefix of one. Raises: FormatError, ProfileError."""
        digest = read_header(data).profile
        profile = None if digest is None else self.find_profile(digest)
        return decode(data, key=key, allow_partial=allow_partial, profile=profile)

    def find_profile(self, digest: bytes) -> Profile:
        """Return the profile that an object names. Raises: ProfileError."""
        if self._auto is not None:
            return self._auto.find(digest)
        return require_profile(self._fixed, digest)

    def _with(self, profile: Profile) -> Codec:
        return get_codec(self._codec, **self._settings, profile=profile)
