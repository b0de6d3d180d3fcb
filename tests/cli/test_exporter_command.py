from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

from test_commands import run

from cachegen.connectors.exporter import Publisher
from cachegen.connectors.metrics import Counters
from cachegen.store import LocalStore


def test_once(tmp_path: Path) -> None:
    LocalStore(tmp_path / "s").put("ns/a", bytes(100))
    counters = Counters()
    counters.add("saved_bytes_total", 1000)
    Publisher(counters, tmp_path / "m").close()
    arguments = ("--store", tmp_path / "s", "--snapshots", tmp_path / "m")
    shown = run("exporter", *arguments, "--once").stdout
    assert "cachegen_saved_bytes_total 1000\n" in shown
    assert 'cachegen_store_bytes{namespace="ns"} 100\n' in shown
    assert "cachegen_store_up 1\n" in shown
    assert "expected --store or --snapshots" in run("exporter", code=2).stderr


def test_served(tmp_path: Path) -> None:
    LocalStore(tmp_path / "s")
    command = [sys.executable, "-c", "from cachegen.cli.main import app; app()", "exporter"]
    command += ["--store", str(tmp_path / "s"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"cachegen_store_up 1" in answer.read()
    finally:
        process.kill()
        process.wait()
