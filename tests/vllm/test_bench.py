"""``cachegen bench --engine vllm``: it starts its servers, measures hits, and ends them again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engines import CHUNK, REFERENCE

PROGRAM = "from cachegen.cli.main import app; app()"
PROMPT = 1100


def test_a_server_of_its_own(tmp_path: Path) -> None:
    out, store = tmp_path / "out.json", tmp_path / "store"
    arguments = ["bench", "--engine", "vllm", "--start-servers", sys.executable]
    arguments += ["--model", str(REFERENCE), "--store", str(store), "--json", str(out)]
    # One mode: a second server would cost this test as much again.
    arguments += ["--mode", "progressive", "--output-tokens", "4", "--repeats", "2"]
    arguments += ["--prompts", "1", "--prompt-tokens", str(PROMPT), "--turns", "2"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["hit_rate"] == PROMPT // CHUNK * CHUNK / PROMPT
    assert 0 < row["bytes_per_hit_token"] < bytes_per_token() / 5
    assert row["network_s"]["median"] > 0
    # The second turn of a conversation hits what the first one left.
    assert [turn["hit_rate"] > 0.5 for turn in row["turns"]] == [False, True]
    left = subprocess.run(["pgrep", "-f", str(store)], capture_output=True, text=True)
    assert left.stdout == ""


def bytes_per_token() -> float:
    """Return the bytes of a token's K and V in 16 bits."""
    config = json.loads((REFERENCE / "config.json").read_text(encoding="utf-8"))
    dim = config["head_dim"]
    return 2.0 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * dim
