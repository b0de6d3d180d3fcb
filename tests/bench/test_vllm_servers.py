"""Servers that a benchmark starts: they answer, and afterwards none of their processes is left."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cachegen.bench.vllm_servers import Launch, vllm_servers
from cachegen.errors import ConfigError

# Answers as a vLLM server does, with an engine's process of its own that ignores polite signals.
SERVER = """\
import http.server, signal, subprocess, sys
arguments = sys.argv
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
open({pids!r}, "a").write(f"{{child.pid}}\\n")
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def launch_of(tmp_path: Path, script: str, timeout_s: float = 30.0) -> Launch:
    """Return a launch whose interpreter runs a script, whatever it is asked to run."""
    (tmp_path / "health").write_text("ok")
    (tmp_path / "script.py").write_text(script)
    python = tmp_path / "python"
    run = f'cd {tmp_path}; exec {sys.executable} {tmp_path / "script.py"} "$@"'
    python.write_text(f"#!/bin/sh\n{run}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Launch(python, "m", "/store", "balanced", 256, timeout_s=timeout_s)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_servers_answer_and_end(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    launch = launch_of(tmp_path, SERVER.format(pids=str(pids)))
    with vllm_servers(launch, ["recompute", "progressive"]) as servers:
        assert list(servers) == ["recompute", "progressive"]
        for url in servers.values():
            with urllib.request.urlopen(f"{url}/health") as response:
                assert response.read() == b"ok"
        started = [int(line) for line in pids.read_text().split()]
        assert len(started) == 2
        assert all(is_running(pid) for pid in started)
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.02)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, "raise SystemExit('no such model')")
    with (
        pytest.raises(ConfigError, match=r"(?s)mode raw.*exit status 1.*no such model"),
        vllm_servers(launch, ["raw"]),
    ):
        pass


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, "import time; time.sleep(600)", timeout_s=0.5)
    with pytest.raises(ConfigError, match="no answer in time"), vllm_servers(launch, ["raw"]):
        pass


def test_only_modes_with_a_store_get_a_connector(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, "")
    assert "--kv-transfer-config" not in launch.command("recompute", 1)
    command = launch.command("int8", 1)
    connector = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert connector["kv_connector_extra_config"]["codec"] == "int8"
    assert connector["kv_load_failure_policy"] == "recompute"


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "nowhere", "m", "/store", "balanced", 256)
    with pytest.raises(ConfigError, match="make test-vllm"), vllm_servers(launch, ["raw"]):
        pass
