"""The ``doctor`` command: tries a configuration and its store the way a connector uses them."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachegen.cli import config
from cachegen.cli.common import JsonOption, console
from cachegen.errors import CacheGenError, StoreError
from cachegen.units import format_size, parse_size

if TYPE_CHECKING:
    from cachegen.settings import Settings
    from cachegen.store import Store

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
_MARKS = {OK: "[green]ok[/]", WARNING: "[yellow]warn[/]", FAILED: "[red]fail[/]", SKIPPED: "skip"}
_PROBE_TIMEOUT_S = 60.0
_ROUNDS = 5


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command()(doctor)


@dataclass
class Report:
    """What was tried, in order: name, state, and what was found."""

    rows: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, state: str, detail: str) -> None:
        """Note and print a result."""
        self.rows.append({"check": name, "state": state, "detail": detail})
        console.print(f"{_MARKS[state]:>4}  {name}: ", end="", soft_wrap=True)
        console.print(detail, soft_wrap=True, markup=False, highlight=False)

    @property
    def failed(self) -> list[str]:
        """Names of what failed."""
        return [row["check"] for row in self.rows if row["state"] == FAILED]


def doctor(
    store: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="Default: that of the settings.")
    ] = None,
    config_file: config.ConfigOption = None,
    settings: config.SetOption = None,
    size: Annotated[str, typer.Option(help="Of the value that is written and read.")] = "4MiB",
    json_file: JsonOption = None,
) -> None:
    """Check settings and store: credentials, a second process, speed, keys; exit 1 on a failure."""
    from cachegen.bench.report import environment, write_json

    size_bytes = parse_size(size)
    report = Report()
    loaded = _check_settings(report, lambda: config.load(config_file, settings, store=store))
    _check_keys(report)
    if loaded is not None and loaded.store is None:
        report.add("store", FAILED, "none is set: pass a URL or set CACHEGEN_STORE")
    elif loaded is not None and loaded.store is not None:
        _check_store(report, loaded.store, size_bytes, loaded.slo_s)
    if json_file:
        figures = {name: round(value, 6) for name, value in report.figures.items()}
        content = {"checks": report.rows, "figures": figures, "sound": not report.failed}
        write_json(json_file, content | environment())
    if report.failed:
        raise StoreError("doctor", got=f"failed: {', '.join(report.failed)}")


def _check_settings(report: Report, load: Callable[[], Settings]) -> Settings | None:
    try:
        loaded = load()
        config.check(loaded)
    except (CacheGenError, OSError) as error:
        report.add("settings", FAILED, str(error))
        return None
    set_names = ", ".join(loaded.sources) or "all at their defaults"
    report.add("settings", OK, f"{set_names}")
    for note in loaded.notes:
        report.add("settings", WARNING, note)
    return loaded


def _check_keys(report: Report) -> None:
    """Keys must not depend on the process, or nobody hits what another saved."""
    seed = "54321" if os.environ.get("PYTHONHASHSEED") == "12345" else "12345"
    try:
        other = probe({"keys": True}, hash_seed=seed)["keys"]
    except StoreError as error:
        report.add("keys", FAILED, str(error))
        return
    same = other == sample_keys()
    detail = "equal in a process with another hash seed" if same else "they differ by process"
    report.add("keys", OK if same else FAILED, detail)


def _check_store(report: Report, url: str, size_bytes: int, slo_s: float) -> None:
    from cachegen.store import open_store
    from cachegen.store.open import redact

    try:
        store = open_store(url)
    except (CacheGenError, OSError) as error:
        report.add("store", FAILED, str(error))
        return
    report.add("store", OK, redact(url))
    name = f"doctor/{os.getpid()}-{os.urandom(8).hex()}"
    value = os.urandom(size_bytes)
    try:
        with _step(report, "reach and log in"):
            begin = time.perf_counter()
            store.exists([name])
            connect_s = time.perf_counter() - begin
            report.figures["connect_s"] = connect_s
            report.add("reach and log in", OK, f"first answer after {1000 * connect_s:.1f} ms")
        if not report.failed:
            _check_values(report, store, url, name, value, slo_s)
    finally:
        # Whatever failed, nothing of this is left behind if it can be helped.
        with _step(Report(), "clean up"):
            store.delete(name)
            store.delete(f"{name}-once")
        close = getattr(store, "close", None)
        if close is not None:
            close()


def _check_values(
    report: Report, store: Store, url: str, name: str, value: bytes, slo_s: float
) -> None:
    size = format_size(len(value))
    with _step(report, "write"):
        begin = time.perf_counter()
        store.put(name, value)
        write_s = time.perf_counter() - begin
        report.figures["write_bytes_per_s"] = len(value) / write_s
        report.add("write", OK, f"{size} in {1000 * write_s:.0f} ms, {_rate(value, write_s)}")
    if "write" in report.failed:
        return
    with _step(report, "read"):
        first_s = _median(lambda: store.get_range(name, 0, 1))
        begin = time.perf_counter()
        same = store.get(name) == value
        read_s = time.perf_counter() - begin
        report.figures |= {"first_byte_s": first_s, "read_bytes_per_s": len(value) / read_s}
        detail = f"first byte after {1000 * first_s:.1f} ms, {size} at {_rate(value, read_s)}"
        report.add("read", OK if same else FAILED, detail if same else "other bytes than written")
        if first_s > slo_s / 4:
            report.add("read", WARNING, f"a first byte takes over a quarter of slo_s={slo_s:g}")
    with _step(report, "ranges"):
        tail = store.get_range(name, len(value) - 5, len(value) + 5)
        right = tail == value[-5:] and store.get_range(f"{name}-none", 0, 1) is None
        report.add("ranges", OK if right else FAILED, "as they should be" if right else repr(tail))
    with _step(report, "create once"):
        _check_creation(report, store, f"{name}-once")
    with _step(report, "second process"):
        answer = probe({"url": url, "name": name})
        if answer["sha256"] == hashlib.sha256(value).hexdigest():
            report.add("second process", OK, "reads what this one wrote")
        elif url.startswith("memory:"):
            report.add("second process", WARNING, "a store in memory is seen by one process only")
        else:
            report.add("second process", FAILED, "does not see what this one wrote")
    with _step(report, "delete"):
        store.delete(name)
        gone = store.get(name) is None
        report.add("delete", OK if gone else FAILED, "gone" if gone else "still there")


def _check_creation(report: Report, store: Store, name: str) -> None:
    from cachegen.store import CreatingStore

    if not isinstance(store, CreatingStore):
        report.add("create once", SKIPPED, "this store cannot")
        return
    outcome = [store.put_if_absent(name, b"1"), store.put_if_absent(name, b"2"), store.get(name)]
    right = outcome == [True, False, b"1"]
    detail = "the first writer wins" if right else f"conditional writes do not work: {outcome}"
    report.add("create once", OK if right else FAILED, detail)


@contextmanager
def _step(report: Report, name: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        report.add(name, FAILED, f"{error} (reason: {error.reason})")


def _median(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _rate(value: bytes, seconds: float) -> str:
    return f"{len(value) / seconds / 1e6:,.1f} MB/s"


# -- the second process ---------------------------------------------------------------------------


def probe(request: dict[str, Any], *, hash_seed: str = "random") -> dict[str, Any]:
    """Let a fresh process answer. request: ``url`` and ``name`` to read, or ``keys``.

    Returns: ``sha256`` of the value or None; ``keys``, a digest of sample keys.
    Raises: StoreError if it fails.
    """
    command = [sys.executable, "-c", "from cachegen.cli.doctor import answer_probe as a; a()"]
    try:
        answer = subprocess.run(
            command,
            # Not as arguments, which every user of the machine can read: a URL may hold a password.
            input=json.dumps(request),
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise StoreError("second process", got=f"no answer in {_PROBE_TIMEOUT_S:g} s") from None
    if answer.returncode != 0:
        last = answer.stderr.strip().splitlines()[-1:] or ["no message"]
        raise StoreError("second process", got=last[0])
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def answer_probe() -> None:
    """Answer the request on standard input; runs in the second process."""
    from cachegen.store import open_store

    request = json.load(sys.stdin)
    digest = None
    if "url" in request:
        value = open_store(request["url"]).get(request["name"])
        digest = None if value is None else hashlib.sha256(value).hexdigest()
    json.dump({"sha256": digest, "keys": sample_keys()}, sys.stdout)


def sample_keys() -> str:
    """Return a digest over keys of a made-up model and prompt."""
    from cachegen.store.keys import chain_digests, chunk_keys, namespace_digest
    from cachegen.types import Geometry, KVDtype

    namespace = namespace_digest(
        weights_fingerprint=b"doctor",
        dtype=KVDtype.BFLOAT16,
        rope=None,
        geometry=Geometry(2, 4, 64, 64, KVDtype.BFLOAT16),
        layer_range=(0, 2),
        head_range=(0, 4),
        chunk_tokens=16,
        format_version=1,
    )
    chains = chain_digests(list(range(64)), chunk_tokens=16, tenant=b"doctor")
    keys = chunk_keys(namespace, chains, {"codec": "int8", "b": [1, 2], "a": {"z": 1, "y": None}})
    return hashlib.sha256("".join(key.name for key in keys).encode()).hexdigest()
