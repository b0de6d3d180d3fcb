"""Profiles that make themselves: accumulated, published once, agreed on, found by digest."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cachegen.chunk import KVChunk, LayerKV
from cachegen.errors import ProfileError
from cachegen.profile import Profile
from cachegen.store import LocalStore
from cachegen.store.memory import MemoryStore
from cachegen.stream.autoprofile import AutoProfile

NAMESPACE = bytes(range(32))


def keeper(store: MemoryStore, tokens: int = 128) -> AutoProfile:
    return AutoProfile(store, NAMESPACE, model_name="synthetic", tokens=tokens)


def test_published_after_enough_tokens_and_used_by_others(make_kv) -> None:
    store = MemoryStore()
    auto = keeper(store)
    assert auto.current() is None
    assert auto.observe(make_kv(tokens=64, seed=1)) is None
    profile = auto.observe(make_kv(tokens=64, seed=2))
    assert profile is not None
    assert profile.meta["calibration_tokens"] == 128
    assert auto.observe(make_kv(tokens=64, seed=3)) is profile
    other = keeper(store)
    assert other.current().digest == profile.digest
    assert other.find(profile.digest).digest == profile.digest


def test_ragged_chunks_are_passed_over(make_kv) -> None:
    full = make_kv(tokens=64)
    a, b, c = full.layers
    ragged = KVChunk.from_layers([a, LayerKV(b.keys[9:], b.values[9:], 9), c], tokens=64)
    auto = keeper(MemoryStore(), tokens=64)
    assert auto.observe(ragged) is None
    assert auto.observe(full) is not None


def test_racing_writers_agree(make_kv) -> None:
    store = MemoryStore()
    keepers = [keeper(store, tokens=64) for _ in range(6)]
    barrier = threading.Barrier(len(keepers))

    def work(index: int) -> None:
        barrier.wait()
        keepers[index].observe(make_kv(tokens=64, seed=index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(keepers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pointed = store.get(keepers[0].pointer_name)
    assert keeper(store).current().digest == pointed
    # Whatever a writer used in between, the store has it: objects that name it decode.
    for auto in keepers:
        assert auto.find(auto.current().digest).digest == auto.current().digest


def test_a_second_publisher_adopts_the_first(make_kv) -> None:
    store = MemoryStore()
    first, second = keeper(store), keeper(store)
    second.observe(make_kv(tokens=64, seed=5))
    chosen = None
    for seed in (1, 2):
        chosen = first.observe(make_kv(tokens=64, seed=seed))
    assert second.observe(make_kv(tokens=64, seed=6)).digest == chosen.digest


def test_missing_and_damaged_profiles(make_kv) -> None:
    store = MemoryStore()
    auto = keeper(store, tokens=64)
    with pytest.raises(ProfileError, match="none in the store"):
        auto.find(b"x" * 32)
    profile = auto.observe(make_kv(tokens=64))
    name = auto.profile_name(profile.digest)
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    with pytest.raises(ProfileError, match="digest"):
        keeper(store).find(profile.digest)
    arrays = {"a": np.zeros(3, np.float32)}
    store.put(name, Profile("other", arrays).to_bytes())
    with pytest.raises(ProfileError, match="profile in the store"):
        keeper(store).find(profile.digest)


@pytest.mark.parametrize("pointer", [b"x" * 32, b"short", b""])
def test_a_pointer_to_nothing_is_replaced_by_the_next_profile(make_kv, pointer: bytes) -> None:
    """No profile is better than a writer that fails for ever."""
    store = MemoryStore()
    auto = keeper(store, tokens=64)
    store.put(auto.pointer_name, pointer)
    assert auto.current() is None
    profile = auto.observe(make_kv(tokens=64))
    assert profile is not None
    assert keeper(store).current().digest == profile.digest


def test_chunks_of_another_kind_are_passed_over(make_kv) -> None:
    auto = keeper(MemoryStore(), tokens=128)
    assert auto.observe(make_kv(tokens=64)) is None
    assert auto.observe(make_kv(tokens=64, layers=2)) is None
    broken = make_kv(tokens=64, dtype=np.float32)
    broken.layers[0].keys[3, 0, 0] = np.inf
    assert auto.observe(broken) is None
    assert auto.observe(make_kv(tokens=64)).meta["calibration_tokens"] == 128


class PlainStore:
    """A store without ``put_if_absent``."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        return self.held.get(name)

    def put(self, name: str, data: bytes) -> None:
        self.held[name] = bytes(data)


def test_a_store_that_cannot_create(make_kv) -> None:
    store = PlainStore()
    profile = keeper(store, tokens=64).observe(make_kv(tokens=64))
    assert keeper(store, tokens=64).observe(make_kv(tokens=64, seed=9)).digest == profile.digest


def test_racing_threads_use_one_profile(make_kv) -> None:
    """With ``put_if_absent`` every writer gets the same profile from the moment it publishes."""
    store = MemoryStore()
    barrier = threading.Barrier(6)
    chosen: list[bytes] = []

    def work(seed: int) -> None:
        auto = keeper(store, tokens=64)
        barrier.wait()
        chosen.append(auto.observe(make_kv(tokens=64, seed=seed)).digest)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == 6
    assert set(chosen) == {store.get(keeper(store).pointer_name)}


def test_racing_processes_use_one_profile(tmp_path: Path) -> None:
    script = """
import sys
import numpy as np
from cachegen.chunk import KVChunk
from cachegen.store import LocalStore
from cachegen.stream.autoprofile import AutoProfile
seed, folder = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(seed)
kv = rng.normal(0, 1, (2, 2, 64, 2, 8)).astype(np.float16)
auto = AutoProfile(LocalStore(folder), bytes(32), tokens=64)
sys.stdin.readline()
print(auto.observe(KVChunk.from_array(kv)).digest.hex())
"""
    command = [sys.executable, "-c", script]
    racers = [
        subprocess.Popen(
            [*command, str(seed), str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    digests = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    store = LocalStore(tmp_path / "store")
    auto = AutoProfile(store, bytes(32))
    assert set(digests) == {auto.current().digest.hex()}
