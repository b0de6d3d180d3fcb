"""Profiles that make themselves: the first chunks of a namespace become its profile.

A store carries profiles beside chunks. Each is stored under its own digest, so that an object that
names one can always be decoded; a pointer per namespace says which one writers use now. Whoever
publishes second finds the pointer set and adopts it.
"""

from __future__ import annotations

import threading
from typing import Protocol

from cachegen.chunk import KVChunk
from cachegen.codec.fit import BasisFit
from cachegen.errors import ProfileError
from cachegen.profile import Profile

DEFAULT_TOKENS = 16_384
DIGEST_BYTES = 32


class ProfileStore(Protocol):
    """The part of a store that profiles need."""

    def get(self, name: str) -> bytes | None:
        """Return the object of that name, or None."""

    def put(self, name: str, data: bytes) -> None:
        """Store an object whole, or raise."""


class AutoProfile:
    """The profile of one namespace of a store, accumulated where there is none yet.

    namespace: 32 bytes, see ``store.keys``. tokens: how many make a profile. Thread-safe.
    """

    def __init__(
        self,
        store: ProfileStore,
        namespace: bytes,
        *,
        model_name: str = "",
        tokens: int = DEFAULT_TOKENS,
    ) -> None:
        self._store = store
        self._namespace = namespace.hex()
        self._model_name = model_name
        self._tokens = tokens
        self._lock = threading.Lock()
        self._fit: BasisFit | None = None
        self._current: Profile | None = None
        self._known: dict[bytes, Profile] = {}

    @property
    def pointer_name(self) -> str:
        """Name of the object that holds the digest of the namespace's profile."""
        return f"{self._namespace}/profile"

    def current(self) -> Profile | None:
        """Return the profile to encode with, or None while there is none. Raises: as the store."""
        with self._lock:
            if self._current is None:
                digest = self._store.get(self.pointer_name)
                if digest is not None:
                    self._current = self._load(digest)
            return self._current

    def find(self, digest: bytes) -> Profile:
        """Return the profile that an object names. Raises: ProfileError if the store lacks it."""
        with self._lock:
            return self._load(digest)

    def observe(self, chunk: KVChunk) -> Profile | None:
        """Take in a chunk that is about to be saved.

        Chunks whose layers hold different tokens are passed over. With enough tokens the profile is
        fitted and published. Returns: the profile to encode with from now on, or None.
        """
        profile = self.current()
        if profile is not None or not chunk.is_uniform:
            return profile
        with self._lock:
            if self._fit is None:
                self._fit = BasisFit(chunk.geometry)
            self._fit.add(chunk)
            if self._fit.tokens < self._tokens:
                return None
            fitted = self._fit.finish(model_name=self._model_name)
            self._fit = None
            self._current = self._publish(fitted)
            return self._current

    def _publish(self, profile: Profile) -> Profile:
        """Store a profile and point to it, unless another writer was first."""
        self._store.put(self._profile_name(profile.digest), profile.to_bytes())
        if self._store.get(self.pointer_name) is None:
            self._store.put(self.pointer_name, profile.digest)
        # Whoever wrote the pointer last has won; read back, so that all writers agree.
        digest = self._store.get(self.pointer_name) or profile.digest
        self._known[profile.digest] = profile
        return self._load(digest)

    def _load(self, digest: bytes) -> Profile:
        if digest not in self._known:
            data = self._store.get(self._profile_name(digest))
            if data is None:
                raise ProfileError(
                    "profile",
                    got="none in the store",
                    expected=digest.hex(),
                    remedy="treat the chunk as a miss, or restore the profile",
                )
            profile = Profile.from_bytes(data, what=f"profile {digest.hex()[:16]}")
            if profile.digest != digest:
                raise ProfileError(
                    "profile in the store", got=profile.digest.hex(), expected=digest.hex()
                )
            self._known[digest] = profile
        return self._known[digest]

    def _profile_name(self, digest: bytes) -> str:
        return f"{self._namespace}/profiles/{digest.hex()}"
