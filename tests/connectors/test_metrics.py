"""Counters and how they are shown."""

from __future__ import annotations

from cachegen.connectors.metrics import Counters, merge, render, split, summary


def counted() -> Counters:
    counters = Counters()
    counters.add("requests_total")
    counters.add("looked_up_tokens_total", 100)
    counters.add("hit_tokens_total", 64)
    counters.add("failed_loads_total", reason="late")
    counters.add("failed_loads_total", 2, reason="missing")
    return counters


def test_drain_returns_what_is_new() -> None:
    counters = counted()
    assert counters.drain()["hit_tokens_total"] == 64
    assert counters.drain() == {}
    counters.add("requests_total")
    assert counters.drain() == {"requests_total": 1}
    assert counters.get("requests_total") == 2
    assert counters.get("failed_loads_total", reason="missing") == 2
    assert counters.get("saved_tokens_total") == 0


def test_snapshots_add_up() -> None:
    snapshot = counted().snapshot()
    both = merge(snapshot, {"requests_total": 2, "saved_tokens_total": 5})
    assert both["requests_total"] == 3
    assert both["saved_tokens_total"] == 5
    assert both["failed_loads_total|late"] == 1


def test_prometheus_text() -> None:
    text = render(counted().snapshot())
    assert "# TYPE cachegen_requests_total counter\ncachegen_requests_total 1\n" in text
    assert 'cachegen_failed_loads_total{reason="missing"} 2\n' in text
    assert text.count("# HELP cachegen_failed_loads_total ") == 1
    assert render({}) == ""


def test_summary() -> None:
    figures = summary(counted().snapshot())
    assert figures["hit_rate"] == 0.64
    assert figures["failed_loads"] == 3
    assert summary({})["hit_rate"] == 0


def test_keys_split() -> None:
    assert split("failed_loads_total|late") == ("failed_loads_total", "late")
    assert split("requests_total") == ("requests_total", None)
