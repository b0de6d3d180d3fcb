from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachegen.errors import ConfigError
from cachegen.stream.traces import (
    GBPS,
    LEAST_RATE,
    MOST_RATE,
    Trace,
    bucket_trace,
    cloud_traces,
    constant_trace,
    load_traces,
    markov_trace,
    parse_trace,
    step_trace,
)

STAIRS = Trace("stairs", (0.0, 1.0, 3.0, 4.0), (10.0, 0.0, 30.0))


def test_a_trace_carries_what_its_pieces_say() -> None:
    assert STAIRS.carried_bytes(0.0, 4.0) == 40.0
    assert STAIRS.carried_bytes(0.5, 3.5) == 20.0
    assert STAIRS.carried_bytes(2.0, 2.0) == 0.0
    assert STAIRS.mean_bytes_per_s == 10.0
    assert STAIRS.rate_at(1.5) == (0.0, 3.0)


def test_a_trace_begins_anew() -> None:
    assert STAIRS.rate_at(8.25) == (10.0, 9.0)
    assert STAIRS.carried_bytes(3.5, 4.5) == 20.0
    assert STAIRS.carried_bytes(0.0, 400.0) == 4000.0


@given(st.floats(0, 50), st.floats(0, 50))
def test_walking_the_pieces_gives_the_same_bytes(begin_s: float, length_s: float) -> None:
    trace = markov_trace(5, length_s=2.0)
    end_s, now_s, total = begin_s + length_s, begin_s, 0.0
    while now_s < end_s:
        rate, until_s = trace.rate_at(now_s)
        assert until_s > now_s
        total += rate * (min(until_s, end_s) - now_s)
        now_s = until_s
    assert trace.carried_bytes(begin_s, end_s) == pytest.approx(total, rel=1e-6, abs=10.0)


@pytest.mark.parametrize(
    ("times", "rates"),
    [
        ((0.0, 1.0), (1.0, 2.0)),
        ((0.0, 1.0, 1.0), (1.0, 2.0)),
        ((1.0, 2.0), (1.0,)),
        ((0.0, 1.0), (0.0,)),
        ((0.0, 1.0), (-1.0,)),
        ((0.0, float("inf")), (1.0,)),
        ((0.0, 1.0), (float("nan"),)),
    ],
)
def test_impossible_traces_are_refused(times: tuple[float, ...], rates: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        Trace("bad", times, rates)


@pytest.mark.parametrize("kind", [markov_trace, bucket_trace, step_trace])
def test_seeded_traces_repeat_and_stay_in_range(kind: object) -> None:
    assert callable(kind)
    assert kind(3) == kind(3) != kind(4)
    for seed in range(20):
        rates = kind(seed).rates_bytes_per_s
        assert all(LEAST_RATE <= rate <= MOST_RATE for rate in rates)


def test_cloud_traces_have_drops() -> None:
    traces = cloud_traces(25, 7)
    assert len({trace.name for trace in traces}) == 25
    assert [trace.name.split()[0] for trace in traces[:5]] == [
        *("markov", "bucket", "markov", "step", "markov")
    ]
    dropping = [
        min(trace.rates_bytes_per_s) < 0.3 * statistics.median(trace.rates_bytes_per_s)
        for trace in traces
    ]
    assert statistics.fmean(dropping) > 0.7
    assert constant_trace(GBPS).mean_bytes_per_s == pytest.approx(GBPS)
    with pytest.raises(ConfigError):
        cloud_traces(0, 0)


def test_mahimahi_counts_packets() -> None:
    trace = parse_trace("0\n10\n10\n150\n", "uplink")
    assert trace.rates_bytes_per_s == (3 * 1500 / 0.1, 1500 / 0.1)
    assert trace.carried_bytes(0.0, 0.2) == pytest.approx(4 * 1500)


def test_columns_of_seconds_and_mbit() -> None:
    trace = parse_trace("# time rate\n100, 8\n102, 16\n\n103.5, 0.8\n", "lte.csv")
    assert trace.times_s == (0.0, 2.0, 3.5, 5.0)
    assert trace.rates_bytes_per_s == (1e6, 2e6, 1e5)
    assert parse_trace("0 80", "one").mean_bytes_per_s == 1e7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("abc\n", "line 1"),
        ("1\n2 3\n", "line 2"),
        ("5\n4\n", "line 2"),
        ("1 5\n1 6\n", "line 2"),
        ("1 2 3\n", "line 1"),
        ("1 -5\n", "line 1"),
        ("1 nan\n", "line 1"),
        ("# nothing\n", "no lines"),
        ("0 0\n1 0\n", "rates"),
    ],
)
def test_other_files_are_refused(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        parse_trace(text, "bad")


def test_a_pattern_loads_every_file(tmp_path: Path) -> None:
    (tmp_path / "b.log").write_text("0 8\n1 8\n")
    (tmp_path / "a.log").write_text("0\n100\n")
    (tmp_path / "c.txt").write_text("nonsense")
    assert [trace.name for trace in load_traces(str(tmp_path / "*.log"))] == ["a.log", "b.log"]
    with pytest.raises(FileNotFoundError):
        load_traces(str(tmp_path / "*.none"))
