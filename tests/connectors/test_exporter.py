"""Counters in a folder, the state of a store, and both over HTTP in Prometheus' format."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachegen.connectors.exporter import MetricsServer, Publisher, StoreWatch, read_snapshots
from cachegen.connectors.metrics import Counters, render
from cachegen.errors import StoreUnavailableError
from cachegen.store import BreakerStore, Entry, MemoryStore


def values_of(text: str) -> dict[str, float]:
    """Parse the text format strictly: comment lines, then name, labels and a number."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) [a-z_:]+ .+", line), line
            continue
        match = re.fullmatch(r'([a-z_:]+(?:\{[a-z_]+="[^"]*"\})?) (\S+)', line)
        assert match, line
        assert match[1] not in found
        found[match[1]] = float(match[2])
    return found


def test_counters_of_several_processes_add_up(tmp_path: Path) -> None:
    publishers = []
    for hits in (3, 4):
        counters = Counters()
        publishers.append(Publisher(counters, tmp_path / "m", interval_s=60))
        counters.add("hit_tokens_total", 256 * hits)
        counters.add("request_misses_total", reason="absent")
    for publisher in publishers:
        publisher.close()
    (tmp_path / "m" / "foreign.json").write_text("[1, 2")
    (tmp_path / "m" / "other.json").write_text("[1, 2]")
    found = values_of(render(read_snapshots(tmp_path / "m")))
    assert found["cachegen_hit_tokens_total"] == 7 * 256
    assert found['cachegen_request_misses_total{reason="absent"}'] == 2
    assert not list((tmp_path / "m").glob("*.tmp"))


def test_counters_are_published_while_a_process_runs(tmp_path: Path) -> None:
    counters = Counters()
    publisher = Publisher(counters, tmp_path, interval_s=0.01)
    counters.add("requests_total", 5)
    waiting = threading.Event()
    for _ in range(500):
        if read_snapshots(tmp_path).get("requests_total") == 5:
            break
        waiting.wait(0.02)
    else:
        pytest.fail("nothing was published")
    publisher.close()


def test_a_folder_that_is_not_there_has_no_counters(tmp_path: Path) -> None:
    assert read_snapshots(tmp_path / "none") == {}


class Down(MemoryStore):
    down = False
    listings = 0

    def exists(self, names: object) -> list[bool]:
        if self.down:
            raise StoreUnavailableError("connection", reason="refused")
        return super().exists(names)  # type: ignore[arg-type]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        self.listings += 1
        return super().entries(prefix)


def test_a_store_is_described_and_listed_rarely() -> None:
    inner = Down()
    watch = StoreWatch(BreakerStore(inner), list_every_s=3600)
    for number in range(60):
        inner.put(f"{number:064x}/{0:064x}/{0:016x}"[48:], bytes(number + 1))
    found = values_of(watch.render())
    assert found["cachegen_store_up"] == 1
    assert found["cachegen_store_probe_seconds"] < 5
    by_namespace = {key: v for key, v in found.items() if key.startswith("cachegen_store_bytes")}
    assert len(by_namespace) == 51  # bounded, however many models share the store
    assert sum(by_namespace.values()) == sum(range(1, 61))
    assert by_namespace['cachegen_store_bytes{namespace="other"}'] == sum(range(1, 11))
    inner.down = True
    found = values_of(watch.render())
    assert found["cachegen_store_up"] == 0
    assert found['cachegen_store_probe_failures_total{reason="refused"}'] == 1
    assert found['cachegen_store_client{event="failures.refused"}'] == 1
    assert inner.listings == 1


def test_over_http() -> None:
    server = MetricsServer(lambda: "cachegen_x 1\n")
    server.start()
    try:
        url = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{url}/metrics?x=1", timeout=10) as answer:
            assert answer.read() == b"cachegen_x 1\n"
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/other", timeout=10)
        assert caught.value.code == 404
    finally:
        server.close()
