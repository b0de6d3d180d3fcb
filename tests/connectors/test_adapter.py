"""Loads and saves: what reaches the cache, what is reported, and what never happens after that."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from paged_world import (
    BLOCKS,
    CHUNK,
    Gate,
    World,
    chain,
    chunk_of,
    key_of,
    load,
    piece,
    wait_for,
)

from cachegen import errors
from cachegen.chunk import KVChunk
from cachegen.connectors.adapter import Fence, LoadJob, LoadReport, reason_of
from cachegen.connectors.coding import Coding
from cachegen.types import ChunkKey


def finish_threads(world: World) -> None:
    """End the loader and wait for the last of its threads."""
    world.loader.close()
    for thread in world.loader._fetcher._pool._threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_load_fills_its_blocks_and_no_others(world: World) -> None:
    world.put(0, 1)
    report = load(world, piece(0, 4, 9), piece(1, 2, 7))
    assert report == LoadReport("r", frozenset(), None)
    np.testing.assert_array_equal(world.held(4, 9), chunk_of(0).to_array())
    np.testing.assert_array_equal(world.held(2, 7), chunk_of(1).to_array())
    others = [block for block in range(BLOCKS) if block not in (4, 9, 2, 7)]
    assert (world.held(*others) == -7).all()
    assert world.loader.poll() == []
    assert world.counters.get("loaded_tokens_total") == 2 * CHUNK


def test_blocks_that_the_engine_has_are_left_alone(world: World) -> None:
    world.put(0)
    load(world, piece(0, 5, skip_blocks=1))
    np.testing.assert_array_equal(world.held(5), chunk_of(0).to_array()[:, :, 16:])
    assert (world.held(*(b for b in range(BLOCKS) if b != 5)) == -7).all()


def test_a_missing_chunk_fails_its_blocks_and_those_behind_it(world: World) -> None:
    world.put(0, 2)
    report = load(world, piece(0, 0, 1), piece(1, 2, 3), piece(2, 4, 5))
    assert report == LoadReport("r", frozenset({2, 3, 4, 5}), "missing")
    np.testing.assert_array_equal(world.held(0, 1), chunk_of(0).to_array())
    assert world.counters.get("failed_loads_total", reason="missing") == 1


def test_a_damaged_chunk_is_a_miss_and_makes_room(world: World) -> None:
    world.put(0)
    name = key_of(0).name
    data = bytearray(world.store.get(name))
    data[len(data) // 2] ^= 1
    world.store.put(name, bytes(data))
    report = load(world, piece(0, 0, 1))
    assert report == LoadReport("r", frozenset({0, 1}), "damaged")
    assert (world.held(0, 1) == -7).all()
    wait_for(lambda: world.store.exists([name]) == [False])


def test_a_chunk_under_another_name_is_a_miss(world: World) -> None:
    world.put(1)
    world.store.put(key_of(0).name, world.store.get(key_of(1).name))
    assert load(world, piece(0, 0, 1)).reason == "other_key"
    assert (world.held(0, 1) == -7).all()


def test_a_chunk_of_another_geometry_is_a_miss(world: World) -> None:
    kv = np.zeros((3, 2, CHUNK, 1, 32), np.float32)
    world.store.put(key_of(0).name, world.coder.encode(KVChunk.from_array(kv), key_of(0)))
    assert load(world, piece(0, 0, 1)).reason == "geometry"
    short = np.zeros((3, 2, CHUNK // 2, 2, 32), np.float32)
    world.store.put(key_of(0).name, world.coder.encode(KVChunk.from_array(short), key_of(0)))
    assert load(world, piece(0, 0, 1)).reason == "geometry"


def test_a_store_that_fails_is_a_miss(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, begin: int, end: int) -> bytes:
        raise errors.StoreError("store", got="a closed connection")

    monkeypatch.setattr(world.store, "get_range", fail)
    assert load(world, piece(0, 0, 1)).reason == "store_error"


def test_nothing_is_written_after_a_deadline_in_the_middle_of_a_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(0)
    gate, read = Gate(), world.store.get_range

    def slow(name: str, begin: int, end: int) -> bytes | None:
        gate.pass_through()
        return read(name, begin, end)

    monkeypatch.setattr(world.store, "get_range", slow)
    report = load(world, piece(0, 0, 1), budget_s=0.05)
    assert report == LoadReport("r", frozenset({0, 1}), "late")
    before = world.bits()
    gate.opened.set()
    finish_threads(world)
    assert world.bits() == before
    assert world.loader.poll() == []


def test_nothing_is_written_after_an_abort_in_the_middle_of_a_decode(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(0, 1)
    gate, decode = Gate(), world.coder.decode

    def slow(data: bytes, key: ChunkKey, **options: Any) -> KVChunk:
        if key == key_of(1):
            gate.pass_through()
        return decode(data, key, **options)

    monkeypatch.setattr(world.coder, "decode", slow)
    world.loader.start(LoadJob("r", (piece(0, 0, 1), piece(1, 2, 3)), 30.0))
    assert gate.entered.wait(20)
    wait_for(lambda: world.loader._loads["r"].written == 1)
    world.loader.cancel("r")
    (report,) = world.loader.poll()
    assert report == LoadReport("r", frozenset({2, 3}), "cancelled")
    before = world.bits()
    gate.opened.set()
    finish_threads(world)
    assert world.bits() == before


def test_a_report_waits_for_the_write_under_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(0)
    gate, write = Gate(), world.cache.write_layer

    def slow(layer: int, *args: object, **named: object) -> None:
        if layer == 1:
            gate.pass_through()
        write(layer, *args, **named)

    monkeypatch.setattr(world.cache, "write_layer", slow)
    world.loader.start(LoadJob("r", (piece(0, 0, 1),), 30.0))
    assert gate.entered.wait(20)
    reports: list[LoadReport] = []

    def end() -> None:
        world.loader.cancel("r")
        reports.extend(world.loader.poll())

    ending = threading.Thread(target=end)
    ending.start()
    time.sleep(0.05)
    assert not reports
    gate.opened.set()
    ending.join(20)
    # The last layer may or may not have come in before the fence was closed.
    whole, cut = LoadReport("r", frozenset(), None), LoadReport("r", frozenset({0, 1}), "cancelled")
    assert reports in ([whole], [cut])
    before = world.bits()
    finish_threads(world)
    assert world.bits() == before


def test_cancelling_what_is_not_loading_does_nothing(world: World) -> None:
    world.loader.cancel("nobody")
    assert world.loader.poll() == []


def test_a_closed_fence_stays_closed() -> None:
    fence = Fence()
    with fence.writing() as allowed:
        assert allowed
    fence.close()
    with fence.writing() as allowed:
        assert not allowed
    assert not fence.is_open


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.KeyMismatchError("key"), "other_key"),
        (errors.ChecksumError("segment"), "damaged"),
        (errors.TruncatedError("object"), "damaged"),
        (errors.ProfileError("profile"), "no_profile"),
        (errors.GeometryError("heads"), "geometry"),
        (errors.NonFiniteError("K"), "not_finite"),
        (errors.StoreFullError("quota"), "store_error"),
        (ConnectionResetError(), "store_error"),
        (errors.StoreTimeoutError("store"), "store_timeout"),
        (ZeroDivisionError(), "callback_error"),
    ],
)
def test_every_error_has_a_reason(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


@pytest.mark.parametrize("quality", ["balanced", "small"])
def test_progressive_objects_are_read_in_part(quality: str) -> None:
    world = World(Coding.choose(quality))
    world.put(0)
    assert load(world, piece(0, 0, 1)).reason is None
    got, want = world.held(0, 1), chunk_of(0).to_array()
    assert 0 < np.abs(got - want).mean() < 0.6  # noise of deviation 1 is the worst case
    size = len(world.store.get(key_of(0, world.coder.coding).name))
    assert world.counters.get("loaded_bytes_total") <= size
    world.close()


def test_chains_name_chunks() -> None:
    assert key_of(0) != key_of(1)
    assert key_of(0).chain == chain(0)
