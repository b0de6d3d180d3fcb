"""What a store would give back: chunks encoded, cut to a quality and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cachegen.chunk import KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.container import read_header
from cachegen.codec.levels import prefix_bytes, relative_distortions
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.codec.registry import decode
from cachegen.profile import Profile
from cachegen.types import ChunkKey, KVDtype

STORED_DTYPE = KVDtype.BFLOAT16
# Name of the profile in a model's folder.
PROFILE_FILE = "cachegen.profile"


def find_profile(model_folder: str | Path, name: str | None = None) -> Profile | None:
    """Load the profile of a model.

    name: a file, "none", or None for the one in the model's folder if there is one.
    Raises: FileNotFoundError, ProfileError.
    """
    if name == "none":
        return None
    path = Path(name) if name else Path(model_folder) / PROFILE_FILE
    return Profile.load(path) if name or path.is_file() else None


def at_quality(data: bytes, quality: str) -> bytes:
    """Return the prefix of an object that a named quality reads; all of it for no name."""
    return data[: prefix_bytes(read_header(data), quality)] if quality else data


def at_rate(data: bytes, bits_per_value: float) -> bytes:
    """Return the longest prefix of a ``progressive`` object within a rate, pass 0 at least."""
    header = read_header(data)
    if header.codec_id != ProgressiveCodec.codec_id:
        return data
    least = relative_distortions(header)[0][0]
    budget = max(least, int(bits_per_value * header.value_count / 8))
    return data[: prefix_bytes(header, budget_bytes=budget)]


def encode_all(
    codec: Codec, chunks: Sequence[KVChunk], keys: Sequence[ChunkKey | None]
) -> list[bytes]:
    """Encode consecutive chunks, each under its key."""
    return [codec.encode(chunk, key=key) for chunk, key in zip(chunks, keys, strict=True)]


class Coder:
    """A codec that encodes every context once, however many qualities are read of it."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._objects: dict[int, tuple[KVChunk, list[bytes]]] = {}

    def objects(self, kv: KVChunk) -> list[bytes]:
        """Return the objects of a context: cast to 16 bit, cut into chunks, encoded."""
        if id(kv) not in self._objects:
            chunks = kv.astype(STORED_DTYPE).split()
            # The context is kept as well, so that no other one gets its id.
            self._objects[id(kv)] = kv, encode_all(self.codec, chunks, [None] * len(chunks))
        return self._objects[id(kv)][1]

    def decode(self, data: bytes) -> KVChunk:
        """Decode an object, or as much of it as there is."""
        profile = getattr(self.codec, "profile", None)
        return decode(data, allow_partial=True, profile=profile)

    def round_trip(self, kv: KVChunk, quality: str = "") -> KVChunk:
        """Return a context as it comes back at a quality."""
        return KVChunk.concat([self.decode(at_quality(data, quality)) for data in self.objects(kv)])


def round_trip(codec: Codec, kv: KVChunk, quality: str = "") -> KVChunk:
    """Return a context as it comes back at a quality: 16 bit, in chunks, encoded and decoded."""
    return Coder(codec).round_trip(kv, quality)
