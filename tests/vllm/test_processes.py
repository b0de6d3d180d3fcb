"""What one engine saved another one hits: other processes, through each kind of store."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import (
    BASELINE,
    CHUNK,
    HANG_S,
    MODEL,
    Answer,
    Baseline,
    check_same,
    engine,
    text_tokens,
    wait_until,
)

TEXT = text_tokens()
PROMPTS = [TEXT[700 * i : 700 * i + 560 + 90 * i] for i in range(4)]
HITS = [len(prompt) // CHUNK * CHUNK for prompt in PROMPTS]
# Of one call of a remote store; far longer than any takes.
TIMEOUT = "timeout=100s"

BASELINE.plan(PROMPTS)


def serve(store: str, folder: Path, *, rounds: int = 1, ranks: int = 1) -> dict[str, object]:
    """Run a vLLM of several processes over the prompts; returns its answers and metrics."""
    job, out = folder / "job.json", folder / "out.json"
    job.write_text(
        json.dumps(
            {
                "model": str(MODEL),
                "store": store,
                "prompts": PROMPTS,
                "out": str(out),
                "rounds": rounds,
                "objects": ranks * sum(HITS) // CHUNK,
                "tensor_parallel_size": ranks,
            }
        )
    )
    script = Path(__file__).with_name("serve_once.py")
    done = subprocess.run(
        [sys.executable, str(script), str(job)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=2 * HANG_S,
    )
    assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no redis-server on this machine")
    port = free_port()
    server = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    wait_until(lambda: listens(port))
    yield f"redis://127.0.0.1:{port}?{TIMEOUT}", server
    server.kill()
    server.wait(20)


@pytest.fixture
def s3_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("moto")
    import boto3

    # In a process of its own: vLLM walks through every loaded module, Flask's among them.
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: listens(port))
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="chunks")
    yield f"s3://chunks/kv?endpoint={endpoint}&region=us-east-1&{TIMEOUT}"
    server.kill()
    server.wait(20)


@pytest.fixture(scope="module")
def want(baseline: Baseline) -> list[Answer]:
    return baseline(PROMPTS)


def test_a_server_saves_and_another_process_hits(tmp_path: Path, want: list[Answer]) -> None:
    store = str(tmp_path / "store")
    result = serve(store, tmp_path, rounds=2)
    first, second = result["answers"]
    assert [a["tokens"] for a in first] == [list(a.tokens) for a in want]
    assert [a["tokens"] for a in second] == [list(a.tokens) for a in want]
    assert [a["cached"] for a in first] == [0] * len(PROMPTS)
    assert [a["cached"] for a in second] == HITS
    # Counters of scheduler and worker reach vLLM's own metrics.
    assert result["metrics"]['vllm:cachegen_hit_tokens""'] == sum(HITS)
    assert result["metrics"]['vllm:cachegen_loaded_tokens""'] == sum(HITS)
    assert result["metrics"]['vllm:cachegen_request_misses"missing"'] == len(PROMPTS)
    with engine(store) as other:
        answers = other.ask(PROMPTS)
    check_same(answers, want)
    assert [a.cached_tokens for a in answers] == HITS


def test_two_ranks_share_no_key(tmp_path: Path, want: list[Answer]) -> None:
    store = tmp_path / "store"
    result = serve(str(store), tmp_path, rounds=2, ranks=2)
    first, second = (
        [Answer(tuple(a["tokens"]), (), a["cached"]) for a in answers]
        for answers in result["answers"]
    )
    check_same(first, want)
    check_same(second, want)
    assert [a.cached_tokens for a in first] == [0] * len(PROMPTS)
    assert [a.cached_tokens for a in second] == HITS
    # Every chunk is there once for each rank, under a namespace of the rank's own.
    names = [path.name.split("+") for path in (store / "objects").rglob("*") if path.is_file()]
    namespaces = sorted({name[0] for name in names})
    assert len(namespaces) == 2
    assert len(names) == 2 * sum(HITS) // CHUNK
    ranks = [{name[1] for name in names if name[0] == space} for space in namespaces]
    assert ranks[0] == ranks[1]
    # An engine that is not split finds nothing of theirs.
    with engine(str(store)) as whole:
        assert [a.cached_tokens for a in whole.ask(PROMPTS)] == [0] * len(PROMPTS)


def test_redis(redis_url: tuple[str, subprocess.Popen[bytes]], want: list[Answer]) -> None:
    url, server = redis_url
    with engine(url) as first:
        check_same(first.ask(PROMPTS), want)
        first.settle()
        assert first.counted("saved_chunks_total") == sum(HITS) // CHUNK
    with engine(url) as second:
        answers = second.ask(PROMPTS)
        check_same(answers, want)
        assert [a.cached_tokens for a in answers] == HITS, second.scheduler._counters.snapshot()
        # The server dies under the engine: requests go on without it.
        server.kill()
        server.wait(20)
        check_same(second.ask(PROMPTS), want)
        assert second.counted("request_misses_total", "store_error") + second.counted(
            "request_misses_total", "store_timeout"
        ) + second.counted("request_misses_total", "late") == len(PROMPTS)


def test_s3(s3_url: str, want: list[Answer]) -> None:
    with engine(s3_url) as first:
        check_same(first.ask(PROMPTS), want)
        first.settle()
        assert first.counted("saved_chunks_total") == sum(HITS) // CHUNK
    with engine(s3_url) as second:
        answers = second.ask(PROMPTS)
        check_same(answers, want)
        assert [a.cached_tokens for a in answers] == HITS
