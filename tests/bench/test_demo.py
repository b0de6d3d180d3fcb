"""The main job, end to end, on the reference model: smaller than the demo, the same code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachegen.bench import demo, prompts
from cachegen.bench.coding import find_profile
from cachegen.bench.report import demo_link, demo_markdown, plot_demo, write_json
from cachegen.errors import InputError
from cachegen.store.memory import MemoryStore
from cachegen.stream.traces import Trace

MODEL = Path(__file__).parents[2] / "models/reference"
KEYS = [
    "mode",
    "bytes",
    "billed_bits_per_value",
    "ratio_vs_16bit",
    "encode_s",
    "network_s",
    "decode_s",
    "ttft_s",
    "e2e_s",
    "tokens_per_s",
    "top1_agreement",
    "kl_nats",
    "retrieval_accuracy",
]


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "CONTINUATIONS", 1)
        patch.setattr(prompts, "RETRIEVAL_PROMPTS", 1)
        patch.setattr(demo, "REPEATS", 1)
        modes = ("recompute", "raw", "int8", "cachegen", "progressive balanced")
        setup = demo.Setup(rate_bytes_per_s=50e6, slo_s=20.0)
        return demo.run_demo(str(MODEL), setup, modes=modes)


def test_rows(result) -> None:
    rows = {row["mode"]: row for row in result["rows"]}
    for row in rows.values():
        assert set(KEYS) <= set(row)
        assert 0 < row["ttft_s"] < row["e2e_s"]
        assert row["retrieval_accuracy"] >= 0.9
    assert result["prompt_tokens"] >= 1000
    assert rows["recompute"]["top1_agreement"] == 1
    assert rows["raw"]["top1_agreement"] >= 0.99
    assert rows["int8"]["ratio_vs_16bit"] >= 1.9
    assert rows["int8"]["top1_agreement"] >= 0.99
    assert rows["cachegen"]["ratio_vs_16bit"] > rows["int8"]["ratio_vs_16bit"]
    assert rows["cachegen"]["kl_nats"] < 0.1


def test_a_deadline_adds_a_row(result) -> None:
    row = result["rows"][-1]
    assert row["mode"] == "adaptive deadline"
    assert row["slo_met"] and row["ttft_s"] <= result["slo_s"] == 20.0
    assert sum(row["reasons"].values()) == len(row["chunk_bytes"]) == 4
    assert row["kl_nats"] < 0.1


def test_stores_policies_and_traces(tmp_path: Path) -> None:
    """The paper's rule over a changing link, in a store that is given."""
    store = MemoryStore()
    trace = Trace("step", (0.0, 0.02, 100.0), (20e6, 4e6))
    setup = demo.Setup(store=store, trace=trace, slo_s=20.0, policy="cachegen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "CONTINUATIONS", 1)
        patch.setattr(prompts, "RETRIEVAL_PROMPTS", 1)
        patch.setattr(demo, "REPEATS", 1)
        result = demo.run_demo(str(MODEL), setup, modes=("int8",))
    assert result["trace"] == "step" and result["bandwidth_bytes_per_s"] == pytest.approx(4.0032e6)
    assert [row["mode"] for row in result["rows"]] == ["int8", "adaptive cachegen"]
    assert len(list(store.names())) == 4 + 3 * 4


def test_profiles(tmp_path: Path) -> None:
    assert find_profile(MODEL, "none") is None
    assert find_profile(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        find_profile(MODEL, str(tmp_path / "none.safetensors"))
    assert demo_link({"bandwidth_bytes_per_s": None}) == "from the store as it is"


def test_reports(result, tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", result)
    again = json.loads((tmp_path / "demo.json").read_text())
    assert {"hardware", "versions", "date", "command"} <= set(again)
    assert demo_markdown(again).count("\n") == 1 + len(again["rows"])
    pytest.importorskip("matplotlib")
    plot_demo(again, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_prompts_and_modes(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match=r"short\.txt"):
        demo.run_demo(str(MODEL), prompt_file=short)
    with pytest.raises(InputError, match="modes"):
        demo.run_demo(str(MODEL), modes=("zip",))
    with pytest.raises(FileNotFoundError):
        demo.run_demo(str(tmp_path / "none"))
