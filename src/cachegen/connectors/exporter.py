"""Counters for Prometheus without an engine's own endpoint: snapshots in a folder, served by HTTP.

A connector that has no endpoint leaves its counters in a folder (``Publisher``); one exporter a
machine adds them up and tells the state of the store beside them (``cachegen exporter``).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cachegen.connectors.metrics import PREFIX, Counters, Snapshot, merge
from cachegen.errors import StoreError
from cachegen.store.base import CatalogStore, CountingStore, Store
from cachegen.store.clock import deadline

DEFAULT_INTERVAL_S = 15.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_NAMESPACES = 50
_PROBE_TIMEOUT_S = 5.0
_LIST_TIMEOUT_S = 120.0


class Publisher:
    """Leaves counters in a folder every interval_s, and once more when it is closed.

    The file of a process that has ended stays: counters must not go down.
    """

    def __init__(
        self,
        counters: Counters,
        folder: str | os.PathLike[str],
        *,
        interval_s: float = DEFAULT_INTERVAL_S,
    ) -> None:
        self._counters = counters
        self._path = Path(folder) / f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stop = threading.Event()
        self._interval_s = interval_s
        self._thread = threading.Thread(target=self._run, name="cachegen-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last state and end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            stopped = self._stop.wait(self._interval_s)
            # Renamed, so that the exporter never reads half of it; a full disk costs figures only.
            draft = self._path.with_suffix(".tmp")
            with contextlib.suppress(OSError):
                draft.write_text(json.dumps(self._counters.snapshot()), encoding="utf-8")
                draft.replace(self._path)
            if stopped:
                return


def read_snapshots(folder: str | os.PathLike[str]) -> Snapshot:
    """Add up what publishers left in a folder; a file that is not theirs is passed over."""
    total: Snapshot = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            total = merge(total, {str(key): float(value) for key, value in content.items()})
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return total


class StoreWatch:
    """Says how a store is doing: whether it answers, how fast, and what it holds.

    list_every_s: a listing may be long, so it is repeated only after this time.
    """

    def __init__(self, store: Store, *, list_every_s: float = 300.0) -> None:
        self._store = store
        self._list_every_s = list_every_s
        self._listed_at = float("-inf")
        self._values: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def render(self) -> str:
        """Ask the store and write what it is like in Prometheus' text format."""
        with self._lock:
            lines = self._probe()
            if time.monotonic() - self._listed_at >= self._list_every_s:
                self._list()
            lines += _family(
                "store_values", "gauge", "values held", self._values, label="namespace"
            )
            lines += _family(
                "store_bytes", "gauge", "bytes of values held", self._bytes, label="namespace"
            )
            lines += _family(
                "store_probe_failures_total",
                "counter",
                "probes and listings that failed, by reason",
                self._failures,
                label="reason",
            )
            if isinstance(self._store, CountingStore):
                stats = self._store.stats()
                lines += _family(
                    "store_client", "gauge", "counters of the client", stats, label="event"
                )
        return "\n".join(lines) + "\n"

    def _probe(self) -> list[str]:
        begin = time.perf_counter()
        up = 1.0
        try:
            with deadline(_PROBE_TIMEOUT_S):
                self._store.exists(["exporter/probe"])
        except StoreError as error:
            up = 0.0
            self._failures[error.reason] += 1
        seconds = time.perf_counter() - begin
        lines = _family("store_up", "gauge", "1 if the store answers", {"": up})
        return lines + _family(
            "store_probe_seconds", "gauge", "time of a look-up of one name", {"": seconds}
        )

    def _list(self) -> None:
        if not isinstance(self._store, CatalogStore):
            return
        values: defaultdict[str, int] = defaultdict(int)
        sizes: defaultdict[str, int] = defaultdict(int)
        try:
            with deadline(_LIST_TIMEOUT_S):
                for entry in self._store.entries():
                    namespace = entry.name.partition("/")[0][:16]
                    values[namespace] += 1
                    sizes[namespace] += entry.size_bytes
        except StoreError as error:
            self._failures[error.reason] += 1
            return
        self._listed_at = time.monotonic()
        largest = sorted(sizes, key=lambda name: -sizes[name])
        self._values.clear()
        self._bytes.clear()
        for index, namespace in enumerate(largest):
            # Bounded, since each label is a series that Prometheus keeps.
            shown = namespace if index < _MAX_NAMESPACES else "other"
            self._values[shown] += values[namespace]
            self._bytes[shown] += sizes[namespace]


def _family(
    name: str, kind: str, text: str, values: Mapping[str, float], *, label: str | None = None
) -> list[str]:
    lines = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
    for key, value in sorted(values.items()):
        labels = f'{{{label}="{key}"}}' if label else ""
        lines.append(f"{PREFIX}{name}{labels} {value:.10g}")
    return lines


class MetricsServer:
    """Serves what collect returns under /metrics; /healthz answers as long as it runs.

    port: 0 for a free one, see ``port``. host: the loopback unless told otherwise.
    """

    def __init__(
        self, collect: Callable[[], str], *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path not in ("/metrics", "/healthz"):
                    self.send_error(404)
                    return
                body = (collect() if path == "/metrics" else "ok\n").encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: Prometheus asks every few seconds."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Serve in a thread until close."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="cachegen-exporter", daemon=True
        )
        self._thread.start()

    def run(self) -> None:
        """Serve until interrupted."""
        self._server.serve_forever()

    def close(self) -> None:
        """Stop serving."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
