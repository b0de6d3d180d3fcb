"""A small paged cache, stores that misbehave on demand, and chunks to move between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from cachegen.chunk import KVChunk
from cachegen.connectors.adapter import Loader, LoadJob, LoadReport, Piece
from cachegen.connectors.coding import ChunkCoder, Coding
from cachegen.connectors.layout import BlockLayout
from cachegen.connectors.metrics import Counters
from cachegen.connectors.paged import PagedCache
from cachegen.connectors.saver import Saver
from cachegen.settings import Settings
from cachegen.store.keys import chunk_keys
from cachegen.store.memory import MemoryStore
from cachegen.types import ChunkKey

LAYERS, BLOCKS, HEADS, BLOCK, DIM = 3, 12, 2, 16, 32
CHUNK = 2 * BLOCK
NAMESPACE = b"n" * 32
SETTINGS = Settings(chunk_tokens=CHUNK, slo_s=30.0)
RAW = Coding.choose("lossless", codec="raw")


def chain(index: int) -> bytes:
    return bytes([index + 1]) * 32


def key_of(index: int, coding: Coding = RAW) -> ChunkKey:
    return chunk_keys(NAMESPACE, [chain(index)], coding.label)[0]


def chunk_of(index: int, dtype: object = np.float32) -> KVChunk:
    rng = np.random.default_rng(index)
    kv = rng.normal(size=(LAYERS, 2, CHUNK, HEADS, DIM)).astype(dtype)
    return KVChunk.from_array(kv, first_position=index * CHUNK)


class World:
    """One worker: a store, a cache, and what moves chunks between them."""

    def __init__(self, coding: Coding = RAW, settings: Settings = SETTINGS) -> None:
        self.store = MemoryStore()
        self.counters = Counters()
        self.tensors = [torch.full((BLOCKS, HEADS, BLOCK, 2 * DIM), -7.0) for _ in range(LAYERS)]
        layouts = [BlockLayout("BHNC", BLOCK, HEADS, DIM, DIM)] * LAYERS
        self.cache = PagedCache(self.tensors, layouts, block_tokens=BLOCK)
        self.coder = ChunkCoder(coding)
        self.loader = Loader(
            self.store,
            self.cache,
            self.coder,
            namespace=NAMESPACE,
            settings=settings,
            counters=self.counters,
        )
        self.saver = Saver(
            self.store,
            self.to_chunk,
            self.coder,
            namespace=NAMESPACE,
            settings=settings,
            counters=self.counters,
        )

    def to_chunk(self, blocks: list[np.ndarray], *, first_position: int) -> KVChunk:
        return self.cache.to_chunk(blocks, first_position=first_position, rope=None)

    def put(self, *indices: int) -> None:
        for index in indices:
            key = key_of(index, self.coder.coding)
            self.store.put(key.name, self.coder.encode(chunk_of(index), key))

    def held(self, *block_ids: int) -> np.ndarray:
        return self.cache.to_chunk(
            self.cache.stage(block_ids).ready(), first_position=0, rope=None
        ).to_array()

    def bits(self) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in self.tensors)

    def close(self) -> None:
        self.loader.close()
        self.saver.close(wait_s=5)


def piece(index: int, *block_ids: int, skip_blocks: int = 0) -> Piece:
    return Piece(index, chain(index), block_ids, skip_blocks)


def wait_for(condition: Callable[[], object], timeout_s: float = 20) -> object:
    """Poll until the condition is truthy; a hang is an error."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.002)
    raise AssertionError("timed out")


def load(world: World, *pieces: Piece, budget_s: float = 30.0) -> LoadReport:
    world.loader.start(LoadJob("r", tuple(pieces), budget_s))
    (report,) = wait_for(world.loader.poll)
    return report


class Gate:
    """Stops whoever calls ``pass_through`` until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.opened.wait(20)
