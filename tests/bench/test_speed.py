"""``cachegen bench speed``: rows have the agreed keys; synthetic KV has measured spreads."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cachegen import native
from cachegen.bench.speed import SpeedSettings, run_speed
from cachegen.bench.speed_data import geometry_of, synthetic_chunk
from cachegen.bench.speed_lmcache import CODEC, LMCachePeer, lmcache_python
from cachegen.bench.speed_peers import lmcache_rows
from cachegen.bench.speed_profile import matrix_product, profile_case
from cachegen.bench.speed_report import plot_speed, print_speed
from cachegen.bench.speed_summary import summarise
from cachegen.bench.speed_timing import ROUNDS, SAMPLE_S, Copier, in_turn
from cachegen.codec.progressive import ProgressiveCodec
from cachegen.errors import ConfigError

KEYS = {
    "kernel",
    "isa",
    "codec",
    "quality",
    "geometry",
    "passes",
    "threads",
    "billed_bits_per_value",
    "gsym_per_s",
    "output_bytes_per_s",
    "ratio_to_memcpy",
}


OPTIONAL = {"transform", "rope", "speedup", "memcpy_speedup", "ratio_to_product"}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachegen.bench.speed_timing.LEAST_BYTES", 1 << 20)
        patch.setattr("cachegen.bench.speed_timing.MOST_BYTES", 1 << 20)
        fastest = native.available_isas()[-1]
        settings = SpeedSettings(("reference",), (fastest,), (1, 2), seconds=0.001)
        before = native.isa()
        result = run_speed(settings)
        assert native.isa() == before
    return result


def test_rows(result: dict[str, Any]) -> None:
    assert {row["kernel"] for row in result["rows"]} == {"symbols", "decode", "encode"}
    for row in result["rows"]:
        assert set(row) == KEYS | OPTIONAL
        assert row["gsym_per_s"] > 0 and row["billed_bits_per_value"] > 0
        if row["threads"] == 2:
            assert row["speedup"] > 0
    decoded = [row for row in result["rows"] if row["kernel"] == "decode"]
    assert {row["transform"] for row in decoded} >= {"identity", "head", "joint"}
    assert {row["rope"] for row in decoded if row["transform"] == "identity"} == {True, False}
    json.dumps(result)


def test_comparisons_have_what_is_wanted(result: dict[str, Any]) -> None:
    names = [one["what"] for one in result["comparisons"]]
    for wanted in (
        "decode progressive, identity: speed / memcpy",
        "decode progressive, head: speed / memcpy",
        "decode progressive, joint: time / matrix product",
        "encode progressive: speed / memcpy",
        "decode progressive: two threads / one",
        "symbols rans-16: two threads / one",
    ):
        assert wanted in names
    for one in result["comparisons"]:
        good = one["ratio"] <= one["goal"] if one["at_most"] else one["ratio"] >= one["goal"]
        assert one["reached"] == good and one["ratio"] > 0


def test_lmcache_and_prototype_are_compared(result: dict[str, Any]) -> None:
    peer = next(row for row in result["rows"] if row["kernel"] == "decode")
    ratios = {"cachegen": 250.0, "progressive": 150.0}
    peer = peer | {"codec": CODEC, "transform": None, "ratio_to_own": ratios}
    rounds = {"avx2": {"ratio": 0.9}}
    found = summarise({"rows": [peer], "prototype": rounds})
    assert [(one["ratio"], one["reached"]) for one in found] == [
        (0.9, True),
        (250.0, True),
        (150.0, False),
    ]


def test_goal_of_two_threads_is_bounded_by_copying(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["kernel"] == "decode" and row["threads"] == 2]
    row = next(row for row in rows if row["codec"] == "progressive-2")
    for copying, goal in ((1.5, 1.2), (3.0, 1.8)):
        (found,) = summarise({"rows": [row | {"speedup": 1.5, "memcpy_speedup": copying}]})
        assert found["goal"] == pytest.approx(goal)
        assert found["reached"] == (goal < 1.5)


def test_reports(result: dict[str, Any], tmp_path: Path) -> None:
    plot_speed(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000
    text = io.StringIO()
    print_speed(result, Console(file=text))
    assert "speed / memcpy" in text.getvalue() and "..." not in text.getvalue()


def test_calls_take_turns_in_samples_of_some_length() -> None:
    now = 0.0
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        order.append(name)

    calls = [lambda: call("short", SAMPLE_S / 4), lambda: call("long", 2 * SAMPLE_S)]
    samples = in_turn(calls, lambda: now, 0.04)
    assert samples.median(0) == pytest.approx(SAMPLE_S / 4)
    assert samples.ratio(1, 0) == pytest.approx(8)
    assert order[2:] == (["short"] * 4 + ["long"]) * ROUNDS


def test_copies_every_byte_with_any_number_of_threads() -> None:
    for threads in (1, 2, 3):
        outs = [np.full(1001, value, np.uint8) for value in range(4)]
        copier = Copier(outs)
        copy = copier.call(threads)
        copy()
        copier.close()
        assert (outs[0] == 2).all() and (outs[1] == 1).all()


def test_a_profile_fits_its_chunk() -> None:
    case = profile_case(geometry_of("reference"), "joint")
    codec = ProgressiveCodec(profile=case.profile)
    data = codec.encode(case.chunk)
    plain = ProgressiveCodec().encode(case.chunk)
    assert len(data) < len(plain)
    product = matrix_product(data, case)
    product()


def test_lmcache_must_be_importable(tmp_path: Path) -> None:
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho 'No module named lmcache' >&2\nexit 1\n")
    without.chmod(0o755)
    with pytest.raises(ConfigError, match="No module named lmcache"):
        lmcache_python(without)
    if importlib.util.find_spec("lmcache") is None:
        assert lmcache_python(None)[0] is None


FAKE_LMCACHE = """
import json, sys
for line in sys.stdin:
    answer = {"versions": {"lmcache": "0"}, "encode": {"seconds": 2.0, "bytes": 7},
              "decode": {"seconds": 4.0, "error": 0.5}}[line.strip()]
    print(json.dumps(answer), flush=True)
"""


def test_lmcache_answers_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_LMCACHE)
    monkeypatch.setattr("cachegen.bench.speed_lmcache.lmcache_process.__file__", str(script))
    chunk = synthetic_chunk(geometry_of("reference"), tokens=8)
    own = {"cachegen": (lambda: 0.01, lambda: 0.04)}
    decode, encode = lmcache_rows(Path(sys.executable), chunk, "reference", own, 2)
    assert decode["ratio_to_own"] == {"cachegen": pytest.approx(100)}
    assert encode["ratio_to_own"] == {"cachegen": pytest.approx(200)}
    assert encode["billed_bits_per_value"] == 56 / chunk.value_count
    assert decode["output_bytes_per_s"] == chunk.size_bytes / 4
    monkeypatch.setattr(
        "cachegen.bench.speed_lmcache.lmcache_process.__file__", str(tmp_path / "none.py")
    )
    with pytest.raises(ConfigError, match="asked for versions"):
        LMCachePeer(Path(sys.executable), chunk, "reference")


def test_synthetic_channels_differ_in_spread() -> None:
    chunk = synthetic_chunk(geometry_of("reference"))
    values = chunk.layers[0].values.astype(np.float32).reshape(chunk.tokens, -1)
    spreads = values.std(axis=0)
    assert spreads.max() > 1.5 * spreads.min()
    again = synthetic_chunk(geometry_of("reference"))
    np.testing.assert_array_equal(again.to_array(), chunk.to_array())
    with pytest.raises(ConfigError):
        geometry_of("gpt-9")
