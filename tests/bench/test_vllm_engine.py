"""The engine that talks to vLLM servers, against a server that behaves as one with a connector."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cachegen.bench.vllm_engine import VllmEngine, parse_servers
from cachegen.errors import ConfigError, StoreError

PREFIX_S = 0.05


class Server(ThreadingHTTPServer):
    """Answers 7 for every token; remembers prompts by salt, and counts like the connector."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored: dict[str, list[int]] = {}
        self.loaded = 0
        self.asked: list[dict[str, Any]] = []
        self.silent = False
        # Chunks copied, and requests of one token until they are stored.
        self.staged = 0
        self.nudges_wanted = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            body = json.dumps({"data": [{"id": "tiny"}]})
        else:
            tokens = self.server.loaded
            body = (
                "# HELP cachegen_loaded_tokens_total x\n"
                f'vllm:cachegen_loaded_tokens_total{{engine="0"}} {tokens}.0\n'
                f'vllm:cachegen_loaded_bytes_total{{engine="0"}} {4 * tokens}\n'
                f'vllm:cachegen_network_seconds_total{{engine="0"}} {tokens / 1000}\n'
                'vllm:num_requests_running{engine="0"} 3\n'
                f"vllm:cachegen_staged_chunks_total {self.server.staged}\n"
                "vllm:cachegen_settled_chunks_total "
                f"{self.server.staged if self.server.nudges_wanted <= 0 else 0}\n"
            )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        if "stream" not in request:
            self.server.nudges_wanted -= 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")
            return
        known = self.server.stored.get(request["cache_salt"], [])
        if known == request["prompt"][: len(known)]:
            self.server.loaded += len(known)
        self.server.stored[request["cache_salt"]] = request["prompt"][:-1]
        self.send_response(200)
        self.end_headers()
        time.sleep(PREFIX_S)
        ids = None if self.server.silent else [7]
        for _ in range(request["max_tokens"]):
            event = {"choices": [{"text": "a", "token_ids": ids}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def engine(server: Server) -> VllmEngine:
    url = f"http://127.0.0.1:{server.server_port}"
    return VllmEngine(parse_servers([f"progressive={url}/"]), settle_s=0.5)


def test_tokens_times_and_hits(engine: VllmEngine, server: Server) -> None:
    first = engine.serve("progressive", [1, 2, 3, 4], output_tokens=3)
    assert first.output_ids == (7, 7, 7)
    assert PREFIX_S < first.ttft_s <= first.e2e_s < 5
    assert (first.prompt_tokens, first.hit_tokens, first.read_bytes) == (4, 0, 0)
    again = engine.serve("progressive", [1, 2, 3, 4], output_tokens=1)
    assert (again.hit_tokens, again.read_bytes) == (3, 12)
    assert again.network_s == pytest.approx(0.003)
    assert again.decode_s == 0  # a counter the server does not have
    engine.forget("progressive")
    assert engine.serve("progressive", [1, 2, 3, 4], output_tokens=1).hit_tokens == 0
    sent = server.asked[0]
    assert (sent["model"], sent["temperature"], sent["ignore_eos"]) == ("tiny", 0, True)
    assert engine.quality("progressive", [1]) == {}


def test_an_answer_is_over_when_its_chunks_are_stored(engine: VllmEngine, server: Server) -> None:
    server.staged, server.nudges_wanted = 2, 2
    engine.serve("progressive", [1, 2], output_tokens=1)
    nudges = [asked for asked in server.asked if "stream" not in asked]
    assert len(nudges) == 2
    assert all(n["kv_transfer_params"]["cachegen.save"] is False for n in nudges)
    server.nudges_wanted = 1 << 30
    with pytest.raises(StoreError, match=r"0 chunks in 0\.5 s"):
        engine.serve("progressive", [1, 2], output_tokens=1)


def test_an_answer_without_token_ids_is_an_error(engine: VllmEngine, server: Server) -> None:
    server.silent = True
    with pytest.raises(StoreError, match="token_ids"):
        engine.serve("progressive", [1, 2], output_tokens=1)


def test_what_is_refused() -> None:
    assert parse_servers(["a=http://x:1/", "b=https://y"]) == {"a": "http://x:1", "b": "https://y"}
    for pairs in ([], ["http://x"], ["a=ftp://x"]):
        with pytest.raises(ConfigError, match="server"):
            parse_servers(pairs)
    with pytest.raises(ConfigError, match="that answers"):
        VllmEngine({"raw": "http://127.0.0.1:9"})
