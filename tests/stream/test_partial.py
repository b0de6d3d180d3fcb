"""Objects of which only a part is here."""

from __future__ import annotations

import itertools

import pytest
from fakes import keys_of

from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.container import read_header
from cachegen.codec.levels import prefix_bytes
from cachegen.errors import FormatError, KeyMismatchError, TruncatedError
from cachegen.stream.partial import ObjectState, curve_of, curve_of_versions


@pytest.fixture
def data(progressive) -> bytes:
    return progressive[keys_of(1)[0].name]


def test_bytes_may_come_in_any_order_and_twice(data) -> None:
    cuts = [0, 5, 100, 2000, 9000, 20_000, len(data)]
    parts = [(begin, data[begin:end]) for begin, end in itertools.pairwise(cuts)]
    for order in (parts, parts[::-1], [*parts[3:], *parts[:4]], [(0, data), *parts]):
        entry = ObjectState(keys_of(1)[0])
        for begin, part in order:
            entry.take(begin, part)
        assert entry.have_bytes == len(data)
        assert entry.left_bytes == 0
        assert entry.prefix(len(data)) == data
        assert entry.held_bytes == len(data)
        assert entry.header == read_header(data)
    entry.drop()
    assert entry.held_bytes == 0


def test_overlapping_parts(data) -> None:
    entry = ObjectState(keys_of(1)[0])
    entry.take(0, data[:6000])
    entry.take(4000, data[4000:9000])
    entry.take(1000, data[1000:2000])
    assert entry.have_bytes == 9000
    assert entry.prefix(9000) == data[:9000]


def test_the_header_tells_how_far_to_read_for_it(data) -> None:
    entry = ObjectState(keys_of(1)[0])
    assert entry.header_bytes == 8192
    entry.take(0, data[:16])
    assert entry.header_bytes == read_header(data).header_bytes
    assert entry.header is None and entry.left_bytes == 1
    entry.asked_bytes = 1 << 20
    entry.take(16, data[16:8192])
    assert entry.asked_bytes == len(data)


def test_what_is_refused(data) -> None:
    with pytest.raises(KeyMismatchError):
        ObjectState(keys_of(2)[1]).take(0, data)
    with pytest.raises(FormatError):
        ObjectState(keys_of(1)[0]).take(0, b"x" * 100)
    entry = ObjectState(keys_of(1)[0])
    entry.take(0, data)
    entry.check_end(8192, 1 << 20, len(data) - 8192)
    with pytest.raises(TruncatedError, match="cut short"):
        entry.check_end(8192, 1 << 20, len(data) - 8193)


def test_curves(data, chunks) -> None:
    header = read_header(data)
    whole, small = curve_of(header, None), curve_of(header, "small")
    assert whole.steps[-1].end_bytes == len(data)
    assert small.steps[-1].end_bytes == prefix_bytes(header, "small") < len(data)
    assert small.steps[0] == whole.steps[0]
    objects = [CacheGenCodec(level=level).encode(chunks[0]) for level in (1, 2, 3)]
    single = curve_of(read_header(objects[0]), "small")
    assert [(step.end_bytes, step.distortion) for step in single.steps] == [(len(objects[0]), 0.0)]
    versions = curve_of_versions([read_header(item) for item in objects])
    assert versions.separate
    assert [step.end_bytes for step in versions.steps] == [len(item) for item in objects]
    left = [step.distortion for step in versions.steps]
    assert left[0] == 1.0 and left == sorted(left, reverse=True)
