"""The commands on stores, on a folder and on a real Redis server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_commands import run

from cachegen import ChunkKey, get_codec, open_store
from cachegen.store import LocalStore

KEYS = [ChunkKey(bytes([1]) * 32, bytes([n]) * 32, bytes([9]) * 32) for n in range(4)]


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        store = f"redis://127.0.0.1:{port}?attempts=40"
        open_store(store).exists(["warm"])
        yield store
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def objects(tmp_path: Path, make_kv: Any) -> list[Path]:
    paths = []
    for number, key in enumerate(KEYS):
        path = tmp_path / f"{number}.cgen"
        path.write_bytes(get_codec("int8").encode(make_kv(tokens=32, seed=number), key=key))
        paths.append(path)
    return paths


def as_json(tmp_path: Path, *arguments: object, code: int = 0) -> Any:
    report = tmp_path / "report.json"
    run(*arguments, "--json", report, code=code)
    return json.loads(report.read_text())


def test_put_get_ls_du_rm(url: str, objects: list[Path], tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in objects]
    shown = run("put", url, *objects).stdout
    assert all(key.name in shown for key in KEYS)  # an object goes under the key inside it
    assert run("put", url, objects[0], "--name", "other/name").stdout.startswith("other/name")
    assert "there already" in run("put", url, objects[1], "--if-absent").stdout
    back = tmp_path / "back"
    run("get", url, KEYS[2].name, "-o", back)
    assert back.read_bytes() == objects[2].read_bytes()
    listed = as_json(tmp_path, "ls", url)
    assert {row["name"] for row in listed["values"]} == {key.name for key in KEYS} | {"other/name"}
    assert listed["bytes"] == sum(sizes) + sizes[0]
    assert all(abs(row["used"] - time.time()) < 120 for row in listed["values"])
    used = as_json(tmp_path, "du", url)["namespaces"]
    assert {row["namespace"]: row["values"] for row in used} == {"01" * 32: 4, "other": 1}
    assert "5 values" in run("ls", url, "--limit", 2).stdout
    run("rm", url, "other/name", "never/there")
    assert as_json(tmp_path, "ls", url, "--prefix", "other")["values"] == []
    assert len(as_json(tmp_path, "rm", url, "--prefix", "01")["would_delete"]) == 4
    assert len(as_json(tmp_path, "ls", url)["values"]) == 4
    run("rm", url, "--prefix", "01", "--yes")
    assert as_json(tmp_path, "ls", url)["values"] == []


def test_verify_a_store(url: str, objects: list[Path], tmp_path: Path) -> None:
    run("put", url, *objects)
    assert "4 sound" in run("verify", url).stdout
    store = open_store(url)
    data = bytearray(objects[0].read_bytes())
    data[-3] ^= 1
    store.put(KEYS[0].name, bytes(data))
    store.put(KEYS[1].name, objects[2].read_bytes())  # sound, but of another key
    store.put("notes.txt", b"hello")
    report = as_json(tmp_path, "verify", url, code=2)
    states = {row["name"]: row["state"] for row in report["values"]}
    assert states == {
        KEYS[0].name: "broken",
        KEYS[1].name: "broken",
        KEYS[2].name: "sound",
        KEYS[3].name: "sound",
        "notes.txt": "foreign",
    }
    shown = run("verify", url, code=2)
    assert "holds the chunk" in shown.stdout and "cachegen gc --broken" in shown.stderr
    assert "2 of 5" in run("gc", url, "--broken").stdout
    assert "5 values" in run("ls", url).stdout
    run("gc", url, "--broken", "--yes")
    assert "1 foreign, 2 sound" in run("verify", url).stdout


def test_profiles_in_a_store_decode_its_objects(tmp_path: Path, make_kv: Any) -> None:
    from cachegen.stream.autoprofile import AutoProfile

    store = LocalStore(tmp_path / "s")
    auto = AutoProfile(store, KEYS[0].namespace, tokens=256)
    profile = None
    for seed in range(10):
        profile = auto.observe(make_kv(tokens=64, seed=seed))
        if profile is not None:
            break
    assert profile is not None
    coded = get_codec("progressive", profile=profile).encode(make_kv(tokens=64), key=KEYS[0])
    store.put(KEYS[0].name, coded)
    assert "3 sound" in run("verify", tmp_path / "s").stdout
    store.delete(f"{KEYS[0].namespace.hex()}/profiles/{profile.digest.hex()}")
    assert "1 undecoded" in run("verify", tmp_path / "s").stdout
    saved = tmp_path / "profile.safetensors"
    profile.save(saved)
    assert "2 sound" in run("verify", tmp_path / "s", "--profile", saved).stdout


def test_collect_by_age_and_size(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "s")
    now_s = time.time()
    for days in range(6):
        name = "/".join([f"{days % 2:064x}", f"{days:064x}", "0" * 16])
        store.put(name, bytes(1000))
        file = next((tmp_path / "s" / "objects").rglob(name.replace("/", "+")))
        os.utime(file, (now_s - days * 86400 - 3600,) * 2)
    pointer = f"{1:064x}/profile"
    store.put(pointer, bytes(32))
    os.utime(
        next((tmp_path / "s" / "objects").rglob(pointer.replace("/", "+"))), (now_s - 864000,) * 2
    )
    arguments = ("gc", tmp_path / "s", "--older-than", "3d", "--keep", "2100")
    rows = as_json(tmp_path, *arguments)["would_delete"]
    reasons = [row["reason"] for row in rows]
    assert reasons == ["age", "age", "age", "size"]
    assert pointer not in {row["name"] for row in rows}  # its namespace is in use
    assert len(list(store.names())) == 7
    assert "deleted (3 for age, 1 for size)" in run(*arguments, "--yes").stdout
    assert store.used_bytes() == 2032
    assert "0 of 3" in run("gc", tmp_path / "s", "--older-than", "3d").stdout


def test_collecting_needs_a_rule_and_deleting_names(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    LocalStore(folder)
    for arguments in (
        ("gc", folder),
        ("gc", folder, "--keep", "much"),
        ("gc", folder, "--older-than", "long"),
        ("rm", folder),
        ("rm", folder, "a", "--prefix", "b"),
        ("get", folder, "a", "-o", tmp_path / "x"),
        ("put", folder, tmp_path / "none"),
        ("put", folder, tmp_path, "--name", "a//b"),
        ("ls", "gopher://x"),
        ("ls", "file:///x?size=3"),
    ):
        result = run(*arguments, code=2)
        assert result.stderr.startswith("error: "), arguments
        assert len(result.stderr.strip().splitlines()) == 1, arguments
    result = run("ls", "redis://127.0.0.1:1?attempts=1", code=1)
    assert "refused" in result.stderr
