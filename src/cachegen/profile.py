"""Profiles: statistics of one model that codecs share between chunks, content-addressed.

A profile is a safetensors file of plain arrays and a JSON description; its digest is the SHA-256
of their canonical form, so that a chunk can name exactly the profile it needs. Nothing is executed
on load.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cachegen.atomic import write_whole
from cachegen.errors import CacheGenError, ProfileError
from cachegen.types import Array

FORMAT = "cachegen-profile-1"
MAX_PROFILE_BYTES = 4 << 30


def require_profile(profile: Profile | None, digest: bytes | str) -> Profile:
    """Return the profile if it is the one that is named. Raises: ProfileError."""
    wanted = digest if isinstance(digest, str) else digest.hex()
    if profile is None or profile.digest.hex() != wanted:
        raise ProfileError(
            "profile",
            got=profile.digest.hex() if profile else None,
            expected=wanted,
            remedy="pass profile=Profile.load(...) with the one that was encoded with",
        )
    return profile


@dataclass(frozen=True, eq=False)
class Profile:
    """Statistics of one model. Treat the arrays as read-only.

    model_name: for people; identity is the digest. arrays: name to array.
    meta: JSON-able description, such as the codec configuration the tables were fitted for.
    """

    model_name: str
    arrays: dict[str, Array]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> bytes:
        """32-byte SHA-256 of the canonical content."""
        sha = hashlib.sha256(self._description().encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            head = json.dumps([name, array.dtype.str, list(array.shape)])
            sha.update(len(head).to_bytes(8, "little") + head.encode() + array.tobytes())
        return sha.digest()

    def _description(self) -> str:
        content = {"format": FORMAT, "model_name": self.model_name, "meta": self.meta}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def to_bytes(self) -> bytes:
        """Serialise to the bytes of a safetensors file."""
        metadata = {"cachegen": self._description(), "digest": self.digest.hex()}
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return save(arrays, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str = "profile") -> Profile:
        """Parse what ``to_bytes`` made and check its digest. Raises: ProfileError."""
        try:
            arrays = load(data)
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            content = json.loads(metadata["cachegen"])
            if content["format"] != FORMAT:
                raise ProfileError("profile format", got=content["format"], expected=FORMAT)
            profile = cls(str(content["model_name"]), arrays, dict(content["meta"]))
        except CacheGenError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(
                what, got=str(error), expected="a profile file", remedy="make it again"
            ) from None
        if profile.digest.hex() != metadata.get("digest"):
            raise ProfileError(
                f"digest of {what}",
                got=profile.digest.hex(),
                expected=metadata.get("digest"),
                remedy="the file is damaged: make it again",
            )
        return profile

    def save(self, path: str | Path) -> None:
        """Write the profile, whole or not at all. Raises: FileWriteError, FileNotFoundError."""
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile and check its digest. Raises: ProfileError, FileNotFoundError."""
        size = Path(path).stat().st_size
        if size > MAX_PROFILE_BYTES:
            raise ProfileError("profile size", got=size, expected=f"at most {MAX_PROFILE_BYTES}")
        return cls.from_bytes(Path(path).read_bytes(), what=f"profile {path}")
