"""Saves: what is stored, when, and what is dropped."""

from __future__ import annotations

import time

import numpy as np
import pytest
from paged_world import CHUNK, Gate, World, chunk_of, load, piece, wait_for

from cachegen import errors
from cachegen.connectors import saver
from cachegen.settings import Settings


def saved(world: World) -> None:
    wait_for(lambda: not world.saver._backlog_bytes)


def test_what_is_saved_can_be_loaded(world: World) -> None:
    world.put(3)
    load(world, piece(3, 4, 9))
    copy = world.cache.stage((4, 9))
    world.cache.finish_copies()
    for tensor in world.tensors:
        tensor.fill_(5)  # the engine goes on
    world.saver.submit(piece(0, 4, 9), copy)
    saved(world)
    assert load(world, piece(0, 1, 2)).reason is None
    np.testing.assert_array_equal(world.held(1, 2), chunk_of(3).to_array())
    assert world.counters.get("saved_tokens_total") == CHUNK


def test_a_chunk_is_stored_once(world: World) -> None:
    for _ in range(2):
        world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
        saved(world)
    assert world.counters.get("saved_chunks_total") == 1
    assert world.counters.get("skipped_saves_total", reason="stored") == 1


def test_a_save_that_fails_is_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, data: bytes) -> None:
        raise errors.StoreFullError("quota", got="full")

    monkeypatch.setattr(world.store, "put", fail)
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    saved(world)
    assert world.counters.get("skipped_saves_total", reason="store_error") == 1
    assert world.saver.has_room


def test_a_backlog_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(settings=Settings(chunk_tokens=CHUNK, backlog_bytes=1))
    gate = Gate()
    monkeypatch.setattr(world.coder, "encode", lambda chunk, key: gate.pass_through() or b"x")
    assert world.saver.has_room
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    assert not world.saver.has_room
    gate.opened.set()
    saved(world)
    assert world.saver.has_room
    world.close()


@pytest.mark.parametrize(("computes", "name"), [(True, "SILENT_S"), (False, "QUIET_S")])
def test_saving_waits_for_a_quiet_moment(
    world: World, monkeypatch: pytest.MonkeyPatch, computes: bool, name: str
) -> None:
    for short in ("SILENT_S", "QUIET_S"):
        monkeypatch.setattr(saver, short, 0.01)
    monkeypatch.setattr(saver, name, 0.2)
    world.saver._waits = True
    begin = time.monotonic()
    world.saver.note_step(begins=False, computes=computes)
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    saved(world)
    assert time.monotonic() - begin >= 0.2


def test_a_busy_engine_cannot_keep_saving_waiting_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "MOST_WAIT_S", 0.2)
    world.saver._waits = True
    world.saver.note_step(begins=True, computes=True)
    begin = time.monotonic()
    for index in range(3):
        world.saver.submit(piece(index, 4, 9), world.cache.stage((4, 9)))
    saved(world)
    assert 0.2 <= time.monotonic() - begin < 10
    assert world.counters.get("saved_chunks_total") == 3


def test_half_a_backlog_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(settings=Settings(chunk_tokens=CHUNK, backlog_bytes=1))
    monkeypatch.setattr(saver, "MOST_WAIT_S", 1000.0)
    world.saver._waits = True
    world.saver.note_step(begins=True, computes=True)
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    saved(world)
    world.close()


def test_closing_does_not_wait_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(world.coder, "encode", lambda chunk, key: gate.pass_through() or b"x")
    world.saver.submit(piece(0, 4, 9), world.cache.stage((4, 9)))
    begin = time.monotonic()
    world.saver.close(wait_s=0.05)
    assert time.monotonic() - begin < 10
    gate.opened.set()
