"""Starts the vLLM servers that a serving benchmark compares, one for each mode, and ends them.

Nothing of vLLM is imported: its interpreter is another program. Every server is a process group of
its own, so that ending it ends the engine's processes, too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachegen.errors import ConfigError

# The mode without a connector.
RECOMPUTE = "recompute"
HOST = "127.0.0.1"
END_TIMEOUT_S = 20.0
POLL_S = 0.25
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Launch:
    """How servers are started.

    python: an interpreter whose environment has vLLM and this package. model: a folder or a name.
    store: URL of the store of all modes; their keys differ. quality: of ``progressive`` objects.
    options: more arguments for every server. timeout_s: for all of them to answer.
    """

    python: Path
    model: str
    store: str
    quality: str
    chunk_tokens: int
    options: tuple[str, ...] = ()
    timeout_s: float = 900.0

    def command(self, mode: str, port: int) -> list[str]:
        """Return the command line of a mode's server."""
        program = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        address = ["--host", HOST, "--port", str(port), "--model", self.model]
        # A hit of the engine's own cache would hide the store.
        command = [*program, *address, "--no-enable-prefix-caching", *self.options]
        if mode == RECOMPUTE:
            return command
        connector = {
            "kv_connector": "CacheGenConnector",
            "kv_connector_module_path": "cachegen.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": self.extra_config(mode),
        }
        return [*command, "--kv-transfer-config", json.dumps(connector)]

    def extra_config(self, mode: str) -> dict[str, Any]:
        """Return the connector's settings of a mode: the name of a codec, or ``lossless``."""
        return {
            "store": self.store,
            "codec": mode,
            "quality": self.quality,
            "chunk_tokens": self.chunk_tokens,
            # A benchmark measures loads, however long they take, and the same bytes every time.
            "slo_s": 120.0,
            "policy": "fixed",
            "profile": "none",
        }


@contextmanager
def vllm_servers(launch: Launch, modes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start a server for each mode and yield their URLs; behind the block all have ended.

    Raises: ConfigError with the end of its log if a server ends or does not answer in time.
    """
    if not launch.python.is_file():
        raise ConfigError(
            "Python with vLLM",
            got=str(launch.python),
            expected="an interpreter",
            remedy="make test-vllm sets up .venv-vllm/bin/python on x86-64 Linux",
        )
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cachegen-bench-")))
        servers: list[_Server] = []
        for mode in modes:
            port = _free_port()
            server = _Server(mode, port, logs / f"{len(servers)}.log", launch.command(mode, port))
            stack.callback(server.end)
            servers.append(server)
        end_s = time.monotonic() + launch.timeout_s
        for server in servers:
            server.wait_until_ready(end_s)
        yield {server.mode: server.url for server in servers}


class _Server:
    def __init__(self, mode: str, port: int, log: Path, command: Sequence[str]) -> None:
        self.mode, self.url = mode, f"http://{HOST}:{port}"
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_until_ready(self, end_s: float) -> None:
        """Wait until the server answers. Raises: ConfigError."""
        while not self._answers():
            code = self._process.poll()
            if code is not None or time.monotonic() > end_s:
                tail = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
                raise ConfigError(
                    f"vLLM server of mode {self.mode}",
                    got="no answer in time" if code is None else f"exit status {code}",
                    expected="a server that answers",
                    remedy=f"its log ends with:\n{tail}",
                )
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False  # not yet

    def end(self) -> None:
        """End the server and what it started: politely, then for good."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The group may outlive its first process: signal it in any case.
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait(END_TIMEOUT_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
