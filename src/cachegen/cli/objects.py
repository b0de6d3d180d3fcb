"""What is in a store: chunks, profiles and pointers to them, and whether each is sound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cachegen.codec.registry import decode
from cachegen.codec.summary import summarize
from cachegen.errors import ConfigError, InputError
from cachegen.profile import Profile
from cachegen.store.base import CatalogStore, Entry, Store
from cachegen.stream.autoprofile import DIGEST_BYTES

SOUND, UNDECODED, BROKEN, GONE, FOREIGN = "sound", "undecoded", "broken", "gone", "foreign"


@dataclass(frozen=True)
class Finding:
    """What a check of one value found.

    state: ``sound``; ``undecoded`` if checksums are right but the profile is not at hand;
        ``broken``; ``gone`` if it was dropped meanwhile; ``foreign`` if no object of this library.
    """

    name: str
    size_bytes: int
    state: str
    detail: str = ""


class Checker:
    """Checks values of a store by name and content, decoding chunks where it can.

    profile: for objects that name it; others are looked for in the store itself.
    """

    def __init__(
        self, store: Store, *, profile: Profile | None = None, max_decoded_bytes: int = 1 << 30
    ) -> None:
        self._store = store
        self._profiles: dict[bytes, Profile | None] = {}
        if profile is not None:
            self._profiles[profile.digest] = profile
        self._max_decoded_bytes = max_decoded_bytes

    def check(self, name: str) -> Finding:
        """Read a value and check it. Raises: StoreError."""
        data = self._store.get(name)
        if data is None:
            return Finding(name, 0, GONE)
        try:
            return Finding(name, len(data), *self._judge(name, data))
        except InputError as error:
            state = BROKEN if is_object_name(name) or _is_profile_name(name) else FOREIGN
            return Finding(name, len(data), state, str(error))

    def _judge(self, name: str, data: bytes) -> tuple[str, str]:
        if name.endswith("/profile"):
            sound = len(data) == DIGEST_BYTES
            return (SOUND if sound else BROKEN), "pointer to a profile"
        if _is_profile_name(name):
            profile = Profile.from_bytes(data, what=name)
            sound = profile.digest.hex() == name.rpartition("/")[2]
            return (SOUND if sound else BROKEN), "profile"
        header = summarize(data).header
        if header.key is not None and is_object_name(name) and header.key.name != name:
            return BROKEN, f"holds the chunk {header.key.name}"
        found = None if header.profile is None else self._profile(name, header.profile)
        if header.profile is not None and found is None:
            return UNDECODED, f"needs profile {header.profile.hex()[:16]}"
        decode(data, profile=found, max_decoded_bytes=self._max_decoded_bytes)
        return SOUND, "chunk"

    def _profile(self, name: str, digest: bytes) -> Profile | None:
        if digest not in self._profiles:
            data = self._store.get(f"{name.partition('/')[0]}/profiles/{digest.hex()}")
            self._profiles[digest] = None if data is None else Profile.from_bytes(data)
        return self._profiles[digest]


def is_object_name(name: str) -> bool:
    """Return True for the name of a chunk: ``namespace/chain/codec`` in hexadecimal."""
    parts = name.split("/")
    return [len(part) for part in parts] == [64, 64, 16] and all(
        set(part) <= set("0123456789abcdef") for part in parts
    )


def _is_profile_name(name: str) -> bool:
    return "/profiles/" in name


def catalog(store: Store) -> CatalogStore:
    """Return store if it can list. Raises: ConfigError."""
    if not isinstance(store, CatalogStore):
        raise ConfigError("store", got=type(store).__name__, expected="one that can list")
    return store


@dataclass(frozen=True)
class Doomed:
    """A value that garbage collection would delete, and why."""

    entry: Entry
    reason: str


def doomed_entries(
    entries: Iterable[Entry],
    *,
    now_s: float,
    older_than_s: float | None,
    keep_bytes: int | None,
) -> Iterator[Doomed]:
    """Choose what to delete: what was not used for long, then the least recently used.

    keep_bytes: of all that is left, at most; None for no bound. Profiles and pointers to them
        count as used whenever anything in their namespace is.
    """
    kept = []
    by_age = sorted(entries, key=lambda entry: entry.used_s)
    latest: dict[str, float] = {}
    for entry in by_age:
        latest[_namespace(entry)] = entry.used_s  # ascending, so the last one stays
    used = {
        entry.name: entry.used_s if is_object_name(entry.name) else latest[_namespace(entry)]
        for entry in by_age
    }
    for entry in sorted(by_age, key=lambda entry: used[entry.name]):
        if older_than_s is not None and now_s - used[entry.name] > older_than_s:
            yield Doomed(entry, "age")
        else:
            kept.append(entry)
    if keep_bytes is None:
        return
    total_bytes = sum(entry.size_bytes for entry in kept)
    for entry in kept:
        if total_bytes <= keep_bytes:
            return
        total_bytes -= entry.size_bytes
        yield Doomed(entry, "size")


def _namespace(entry: Entry) -> str:
    return entry.name.partition("/")[0]
