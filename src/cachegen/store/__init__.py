"""Where chunks are kept: one interface (base.py), one file per kind of store."""

from cachegen.store.base import (
    BytesLike,
    CatalogStore,
    CountingStore,
    CreatingStore,
    Entry,
    ListingStore,
    PartsStore,
    RangesStore,
    Store,
    StreamingStore,
    carry_deadline,
    deadline,
    remaining_s,
)
from cachegen.store.breaker import BreakerPolicy, BreakerStore
from cachegen.store.keys import chain_digests, chunk_keys, namespace_digest
from cachegen.store.limit import RateLimitedStore, parse_bandwidth
from cachegen.store.local import LocalStore
from cachegen.store.memory import MemoryStore
from cachegen.store.open import open_store, parse_size
from cachegen.store.retry import RetryPolicy
from cachegen.store.tiered import TieredStore

__all__ = [
    "BreakerPolicy",
    "BreakerStore",
    "BytesLike",
    "CatalogStore",
    "CountingStore",
    "CreatingStore",
    "Entry",
    "ListingStore",
    "LocalStore",
    "MemoryStore",
    "PartsStore",
    "RangesStore",
    "RateLimitedStore",
    "RetryPolicy",
    "Store",
    "StreamingStore",
    "TieredStore",
    "carry_deadline",
    "chain_digests",
    "chunk_keys",
    "deadline",
    "namespace_digest",
    "open_store",
    "parse_bandwidth",
    "parse_size",
    "remaining_s",
]
