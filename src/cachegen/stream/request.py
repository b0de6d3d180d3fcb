"""One request for chunks as a state machine: no thread, no clock, no store.

``fetch.Fetcher`` calls it under its lock and does the waiting, reading and decoding. All times are
those of the caller's clock, in seconds.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cachegen.chunk import KVChunk
from cachegen.codec.container import SIDE, read_header, read_header_size
from cachegen.codec.header import Header
from cachegen.errors import FormatError, KeyMismatchError, TruncatedError
from cachegen.types import ChunkKey

# Holds the header of any but the widest objects; what is too much is payload that is needed anyway.
HEADER_READ_BYTES = 8192
UNBOUNDED_BYTES = 1 << 62


class Reason(enum.StrEnum):
    """Why a chunk came, or did not come."""

    LOADED = "loaded"
    MISSING = "missing"  # the store has no such object
    AFTER_MISS = "after_miss"  # an earlier chunk did not come, so this one would be of no use
    RECOMPUTE = "recompute"  # the policy leaves it to the model
    LATE = "late"  # the deadline passed before the coarsest version was decoded
    DAMAGED = "damaged"  # a checksum or a field is wrong
    OTHER_KEY = "other_key"  # sound, but stored under another key
    NO_PROFILE = "no_profile"  # the profile that it names is not at hand
    STORE_ERROR = "store_error"
    STORE_TIMEOUT = "store_timeout"
    DECODE_ERROR = "decode_error"
    DELIVER_ERROR = "deliver_error"  # the caller's own callback raised
    FENCED = "fenced"  # the caller's fence said no
    CANCELLED = "cancelled"


@dataclass(frozen=True, eq=False)
class FetchedChunk:
    """One chunk, or the reason why it did not come.

    chunk: None unless the reason is LOADED; None as well for a request with ``direct``.
    data: the prefix of the object that was whole, for ``direct``; else empty.
    version: which of the alternatives of the chunk was read. read_bytes: length of the prefix.
    distortion: squared error that the object's table says is left, relative to that of its
        coarsest version; 0.0 if read whole, None if nothing came.
    network_s: from the first read until the last byte. decode_s: decoding and delivery.
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
    decode_s: float = 0.0
    error: Exception | None = None


