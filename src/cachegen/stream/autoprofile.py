"""Profiles that make themselves: the first chunks of a namespace become its profile.

A store carries profiles beside chunks. Each is stored under its own digest, so that an object that
names one can always be decoded; a pointer per namespace says which one writers use now. The pointer
is created once: whoever publishes second adopts what is there.
"""

from __future__ import annotations

import threading
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class CreatingProfileStore(ProfileStore, Protocol):
    """A store that can create an object without ever replacing one."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Store an object unless there is one; True if this call created it."""


class AutoProfile:
    """The profile of one namespace of a store, accumulated where there is none yet.

    namespace: 32 bytes, see ``store.keys``. tokens: how many make a profile. Thread-safe; several
    processes agree where the store has ``put_if_absent``, and nearly always where it has not.
    Writers that use another profile for a while do no harm: objects name theirs, and it is stored.
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

    def profile_name(self, digest: bytes) -> str:
        """Return the name of the object that holds a profile."""
        return f"{self._namespace}/profiles/{digest.hex()}"

    def current(self) -> Profile | None:
        """Return the profile to encode with, or None while there is none.

        A pointer that is damaged, or whose profile is gone from the store, counts as none: objects
        are coded without one, and new chunks make another. Raises: as the store.
        """
        with self._lock:
            return self._read_current()

    def find(self, digest: bytes) -> Profile:
        """Return the profile that an object names. Raises: ProfileError if the store lacks it."""
        with self._lock:
            return self._load(digest)

    def observe(self, chunk: KVChunk) -> Profile | None:
        """Take in a chunk that is about to be saved.

        Chunks whose layers hold different tokens are passed over, and so are chunks of another
        kind than the first. With enough tokens the profile is fitted and published.
        Returns: the profile to encode with from now on, or None. Raises: as the store.
        """
        with self._lock:
            profile = self._read_current()
            if profile is not None or not chunk.is_uniform:
                return profile
            fit = self._fit = self._fit or BasisFit(chunk.geometry)
            if not fit.accepts(chunk):
                return None
            fit.add(chunk)
            if fit.tokens < self._tokens:
                return None
            fitted = fit.finish(model_name=self._model_name)
            self._fit = None
            self._current = self._publish(fitted)
            return self._current

    def _read_current(self) -> Profile | None:
        if self._current is None:
            digest = self._store.get(self.pointer_name)
            if digest is not None:
                try:
                    self._current = self._load(digest)
                except ProfileError:
                    return None
        return self._current

    def _publish(self, profile: Profile) -> Profile:
        """Store a profile, then point to it unless another writer was first."""
        self._store.put(self.profile_name(profile.digest), profile.to_bytes())
        self._known[profile.digest] = profile
        if isinstance(self._store, CreatingProfileStore):
            created = self._store.put_if_absent(self.pointer_name, profile.digest)
        else:
            created = self._store.get(self.pointer_name) is None
            if created:
                self._store.put(self.pointer_name, profile.digest)
        # Read back even what was just written: without put_if_absent the last writer has won.
        digest = self._store.get(self.pointer_name)
        if digest is not None:
            try:
                return self._load(digest)
            except ProfileError:
                # The pointer leads nowhere, so that no writer can follow it: take its place.
                self._store.put(self.pointer_name, profile.digest)
        return profile

    def _load(self, digest: bytes) -> Profile:
        if len(digest) != DIGEST_BYTES:
            raise ProfileError("digest", got=f"{len(digest)} bytes", expected=DIGEST_BYTES)
        if digest not in self._known:
            data = self._store.get(self.profile_name(digest))
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
