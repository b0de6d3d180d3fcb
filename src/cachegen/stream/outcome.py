"""What became of the chunks of a request: each one came, or there is a reason why not."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from cachegen.chunk import KVChunk
from cachegen.errors import (
    FormatError,
    KeyMismatchError,
    ProfileError,
    StoreError,
    StoreTimeoutError,
    UnknownCodecError,
)
from cachegen.types import ChunkKey


class Reason(enum.StrEnum):
    """Why a chunk came, or did not come."""

    LOADED = "loaded"
    RECOMPUTED = "recomputed"  # the policy left it to the model, which has done it
    MISSING = "missing"  # the store has no such object
    AFTER_MISS = "after_miss"  # an earlier chunk did not come, so this one would be of no use
    LATE = "late"  # the deadline passed before it could be decoded
    LEFT_OUT = "left_out"  # the policy gave up on it
    DAMAGED = "damaged"  # a checksum or a field is wrong
    OTHER_KEY = "other_key"  # sound, but stored under another key
    NO_PROFILE = "no_profile"  # the profile that it names is not at hand
    STORE_ERROR = "store_error"
    STORE_TIMEOUT = "store_timeout"
    DECODE_ERROR = "decode_error"  # the decoder raised something that it should not
    CALLBACK_ERROR = "callback_error"  # what the caller passed raised
    FENCED = "fenced"  # the caller's fence said no
    CANCELLED = "cancelled"


CAME = frozenset({Reason.LOADED, Reason.RECOMPUTED})


def reason_of(error: Exception, otherwise: Reason = Reason.STORE_ERROR) -> Reason:
    """Say in one word why reading or decoding a chunk failed."""
    for kind, reason in (
        (StoreTimeoutError, Reason.STORE_TIMEOUT),
        ((StoreError, OSError), Reason.STORE_ERROR),
        (KeyMismatchError, Reason.OTHER_KEY),
        (ProfileError, Reason.NO_PROFILE),
        ((FormatError, UnknownCodecError), Reason.DAMAGED),
    ):
        if isinstance(error, kind):
            return reason
    return otherwise


@dataclass(frozen=True, eq=False)
class FetchedChunk:
    """One chunk, or the reason why it did not come.

    chunk: the KV if it came, except for a request with ``direct``. data: the whole passes that were
        read, for ``direct`` only; they may end before the object does.
    version: index of the object that was read, among the alternatives of the chunk.
    read_bytes: length of the whole passes read. object_bytes: length of the object, 0 if unknown.
    distortion: what these passes leave by the object's own table, relative to the spread of the
        values; 0.0 for codecs of one quality; None if the chunk did not come.
    network_s: from its first read to its last byte. arrived_s: when that came, counted from the
        begin of the request. decode_s: decoding, or recomputing.
    profile: digest of the profile that the object needs, if any. begin_token, tokens: where the
        chunk is in its context. decoded_bytes: size of its KV. All 0 while that is unknown.
    error: what went wrong, if something did.
    """

    index: int
    key: ChunkKey
    reason: Reason
    chunk: KVChunk | None = None
    data: bytes = b""
    version: int = 0
    read_bytes: int = 0
    object_bytes: int = 0
    distortion: float | None = None
    network_s: float = 0.0
    arrived_s: float = 0.0
    decode_s: float = 0.0
    profile: bytes | None = None
    begin_token: int = 0
    tokens: int = 0
    decoded_bytes: int = 0
    error: Exception | None = None

    @property
    def came(self) -> bool:
        """True if the chunk is there: loaded or recomputed."""
        return self.reason in CAME


@dataclass(frozen=True, eq=False)
class FetchReport:
    """A finished request.

    chunks: in order of their tokens, one entry for every key. seconds: from asking to the end.
    wire_bytes: everything that was read for it, used or not. reads, hedged_reads: calls of the
    store, and how many of them were sent a second time. error: the first that was met.
    """

    chunks: tuple[FetchedChunk, ...]
    seconds: float
    wire_bytes: int = 0
    reads: int = 0
    hedged_reads: int = 0

    @property
    def reasons(self) -> Counter[str]:
        """How many chunks there are of each reason."""
        return Counter(item.reason.value for item in self.chunks)

    @property
    def prefix_chunks(self) -> int:
        """Number of chunks from the first one on that came without a gap."""
        for count, item in enumerate(self.chunks):
            if not item.came:
                return count
        return len(self.chunks)

    @property
    def error(self) -> Exception | None:
        """The first error of any chunk, if there was one."""
        return next((item.error for item in self.chunks if item.error is not None), None)
