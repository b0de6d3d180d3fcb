"""Saving with an automatic, a given and no profile: one key, one look-up, whatever was used."""

from __future__ import annotations

import numpy as np
import pytest

from cachegen.codec.container import read_header
from cachegen.codec.fit import fit_basis
from cachegen.errors import ConfigError, KeyMismatchError, ProfileError
from cachegen.store.memory import MemoryStore
from cachegen.stream.fetch import Fetcher
from cachegen.stream.save import Saver

NAMESPACE = bytes(range(32))


def chains(count: int) -> list[bytes]:
    return [bytes([index]) * 32 for index in range(count)]


def test_chunks_saved_before_and_after_the_profile_are_found_alike(make_kv) -> None:
    store = MemoryStore()
    saver = Saver(store, NAMESPACE, auto_tokens=128)
    keys = saver.keys(chains(3))
    chunks = [make_kv(tokens=64, seed=seed) for seed in range(3)]
    for chunk, key in zip(chunks, keys, strict=True):
        assert saver.save(chunk, key) == len(store.get(key.name))
    named = [read_header(store.get(key.name)).profile for key in keys]
    assert named[0] is None
    assert named[1] is not None
    assert named[1] == named[2]
    # Another process knows the store and the namespace, nothing else.
    reader = Saver(store, NAMESPACE)
    assert reader.keys(chains(3)) == keys
    for chunk, key in zip(chunks, keys, strict=True):
        gap = reader.load(key).to_array().astype(float) - chunk.to_array().astype(float)
        assert np.abs(gap).mean() < 0.2
    with Fetcher(store, find_profile=reader.find_profile) as fetcher:
        items = list(fetcher.request(keys))
    assert all(item.chunk is not None for item in items)


def test_a_given_profile_and_none(make_kv) -> None:
    store = MemoryStore()
    profile = fit_basis([make_kv(tokens=64, seed=seed) for seed in range(4)])
    with_profile = Saver(store, NAMESPACE, profile=profile)
    without = Saver(store, NAMESPACE, profile=None)
    (a,), (b,) = with_profile.keys(chains(1)), without.keys(chains(1))
    assert len({a.codec, b.codec, Saver(store, NAMESPACE).keys(chains(1))[0].codec}) == 3
    chunk = make_kv(tokens=64)
    with_profile.save(chunk, a)
    without.save(chunk, b)
    assert read_header(store.get(a.name)).profile == profile.digest
    assert read_header(store.get(b.name)).profile is None
    assert with_profile.load(a).tokens == without.load(b).tokens == 64
    with pytest.raises(ProfileError):
        without.decode(store.get(a.name))
    assert with_profile.load(with_profile.keys([b"z" * 32])[0]) is None
    with pytest.raises(KeyMismatchError):
        with_profile.decode(store.get(a.name), key=b)


def test_other_codecs_and_settings(make_kv) -> None:
    store = MemoryStore()
    exact = Saver(store, NAMESPACE, codec="lossless")
    (key,) = exact.keys(chains(1))
    chunk = make_kv(tokens=64)
    exact.save(chunk, key)
    assert np.array_equal(exact.load(key).to_array(), chunk.to_array())
    finer = Saver(store, NAMESPACE, step=0.1)
    assert finer.config["step"] == 0.1
    assert finer.keys(chains(1)) != Saver(store, NAMESPACE).keys(chains(1))
    with pytest.raises(ConfigError, match="settings of codec"):
        Saver(store, NAMESPACE, codec="lossless", step=0.1)
    with pytest.raises(ConfigError, match="profile"):
        Saver(store, NAMESPACE, profile="always")
