"""``config show`` and ``doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from test_commands import run

from cachegen.cli import doctor
from cachegen.errors import StoreError
from cachegen.store import LocalStore, MemoryStore, open_store


def test_show_names_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, report = tmp_path / "c.yaml", tmp_path / "r.json"
    file.write_text("slo_s: 3\nremote_url: redis://user:secret@host:1\ncache_policy: LRU\n")
    monkeypatch.setenv("CACHEGEN_QUALITY", "small")
    shown = run("config", "show", "--config", file, "--set", "save=no", "--json", report).stdout
    assert "secret" not in shown and "cache_policy has no effect" in " ".join(shown.split())
    settings = json.loads(report.read_text())["settings"]
    assert settings["save"] == {"value": False, "source": "flag: save"}
    assert settings["quality"] == {"value": "small", "source": "environment: CACHEGEN_QUALITY"}
    assert settings["slo_s"]["source"] == f"file: {file}: slo_s"
    assert settings["store"]["value"] == "redis://***@host:1"
    assert settings["policy"] == {"value": "deadline", "source": "default"}


@pytest.mark.parametrize(
    "said", ["qualty=small", "quality=superb", "policy=luck", "slo_s=0", "codec=zip", "save"]
)
def test_show_refuses_what_cannot_work(said: str) -> None:
    result = run("config", "show", "--set", said, code=2)
    assert result.stderr.startswith("error: ")
    if said.startswith("qualty"):
        assert "did you mean quality" in result.stderr


def test_a_sound_store(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    folder = tmp_path / "s"
    run("doctor", folder, "--size", "64KiB", "--json", report)
    content = json.loads(report.read_text())
    assert content["sound"] is True
    states = {row["check"]: row["state"] for row in content["checks"]}
    assert set(states.values()) == {"ok"}
    assert {"keys", "write", "read", "second process", "create once", "delete"} <= states.keys()
    assert content["figures"]["read_bytes_per_s"] > 0
    assert list(LocalStore(folder).names()) == []


def test_a_store_in_memory_is_a_warning() -> None:
    assert "seen by one process only" in run("doctor", "memory://", "--size", "1KiB").stdout


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    shown = run("doctor", "redis://127.0.0.1:1?attempts=1", code=1)
    assert "reason: refused" in shown.stdout and "reach and log in" in shown.stderr
    assert "none is set" in run("doctor", code=1).stdout
    assert "fail" in run("doctor", "gopher://x", code=1).stdout
    (tmp_path / "file").write_text("x")
    assert "fail" in run("doctor", tmp_path / "file", code=1).stdout


class Forgetful(MemoryStore):
    def get(self, name: str) -> bytes | None:
        value = super().get(name)
        return value if value is None else bytes(len(value))


class ReadOnly(MemoryStore):
    def put(self, name: str, data: object) -> None:
        raise StoreError("permission", reason="read_only")


class Careless(MemoryStore):
    def put_if_absent(self, name: str, data: object) -> bool:
        self.put(name, data)  # type: ignore[arg-type]
        return True


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Forgetful, "other bytes than written"),
        (ReadOnly, "reason: read_only"),
        (Careless, "conditional writes do not work"),
    ],
)
def test_stores_that_misbehave(kind: type[MemoryStore], expected: str) -> None:
    store = kind()
    with mock.patch("cachegen.store.open_store", lambda url: store):
        shown = run("doctor", "memory://", "--size", "1KiB", code=1)
    assert expected in shown.stdout
    assert list(store.names()) == []


def test_keys_that_depend_on_the_process_are_found() -> None:
    with mock.patch.object(doctor, "sample_keys", lambda: "other"):
        assert "they differ by process" in run("doctor", "memory://", code=1).stdout


def test_the_second_process_reads_for_itself(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/s"
    open_store(url).put("a", b"x")
    answer = doctor.probe({"url": url, "name": "a"})
    assert answer["keys"] == doctor.sample_keys()
    assert answer["sha256"] is not None
    assert doctor.probe({"url": url, "name": "b"})["sha256"] is None
    with pytest.raises(StoreError, match="second process"):
        doctor.probe({"url": "gopher://x", "name": "b"})
