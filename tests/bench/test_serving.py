"""The serving benchmark: what an engine loads, saves and never saves again; what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rich.console import Console
from typer.testing import CliRunner

from cachegen.bench.hf_engine import HfEngine, Mode
from cachegen.bench.serving import Load, Served, median_interval, run_serving
from cachegen.bench.serving_report import plot_serving, print_serving
from cachegen.bench.serving_run import Settings, check_engine, make_load, open_link, run_bench
from cachegen.cli.main import cli
from cachegen.errors import ConfigError
from cachegen.store.limit import RateLimitedStore
from cachegen.store.memory import MemoryStore

MODEL = Path(__file__).parents[2] / "models/reference"
SETTINGS = Settings(
    engine="hf",
    model=str(MODEL),
    modes=("recompute", "raw", "progressive"),
    quality="balanced",
    profile=None,
    store=None,
    bandwidth="1Gbps",
    latency_s=0.0,
    prompt_files=(),
    prompts=1,
    prompt_tokens=300,
    turns=2,
    repeats=2,
    output_tokens=4,
    chunk_tokens=64,
)


class Counting(MemoryStore):
    """A store that counts what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def put(self, name: str, data: Any) -> None:
        self.written.append(name)
        super().put(name, data)


@pytest.fixture
def engine(tiny_model: Any) -> HfEngine:
    modes = {
        name: Mode.of(name, quality="balanced", profile=None)
        for name in ("recompute", "raw", "int8", "cachegen", "progressive")
    }
    return HfEngine(tiny_model, "tiny", Counting(), modes, chunk_tokens=32)


@pytest.fixture
def prompt(tiny: Any) -> list[int]:
    return list(tiny.prompt_of(101, seed=3))


def test_raw_answers_as_recomputing_does_and_hits_from_the_second_time(
    engine: HfEngine, prompt: list[int]
) -> None:
    plain = engine.serve("recompute", prompt, output_tokens=6)
    first = engine.serve("raw", prompt, output_tokens=6)
    again = engine.serve("raw", prompt, output_tokens=6)
    assert (plain.hit_tokens, first.hit_tokens, again.hit_tokens) == (0, 0, 96)
    assert plain.output_ids == first.output_ids
    # 16 bits a value: a tie of a random model may fall the other way, most tokens agree.
    same = sum(a == b for a, b in zip(plain.output_ids, again.output_ids, strict=True))
    assert same >= 4
    assert again.read_bytes > 0 < again.network_s
    for served in (plain, first, again):
        assert 0 < served.ttft_s <= served.e2e_s
        assert len(served.output_ids) == 6


@pytest.mark.parametrize("mode", ["raw", "int8", "cachegen", "progressive"])
def test_what_was_loaded_is_never_saved_again(
    engine: HfEngine, prompt: list[int], mode: str
) -> None:
    store: Any = engine.store
    engine.serve(mode, prompt, output_tokens=2)
    assert len(store.written) == 3
    engine.serve(mode, prompt, output_tokens=2)
    assert len(store.written) == 3
    # The next turn: 96 tokens hit, the 36 new ones and what was generated fill one chunk more.
    longer = [*prompt, *prompt[:30]]
    assert engine.serve(mode, longer, output_tokens=2).hit_tokens == 96
    assert len(store.written) == len(set(store.written)) == 4
    assert engine.serve(mode, longer, output_tokens=2).hit_tokens == 128
    engine.forget(mode)
    assert engine.serve(mode, prompt, output_tokens=2).hit_tokens == 0


def test_generated_tokens_are_stored_for_the_next_turn(engine: HfEngine, prompt: list[int]) -> None:
    served = engine.serve("raw", prompt[:60], output_tokens=8)
    turn = [*prompt[:60], *served.output_ids, *prompt[60:70]]
    assert engine.serve("raw", turn, output_tokens=2).hit_tokens == 64


def test_a_whole_prompt_is_never_loaded(engine: HfEngine, prompt: list[int]) -> None:
    engine.serve("raw", prompt[:65], output_tokens=1)
    assert engine.serve("raw", prompt[:64], output_tokens=1).hit_tokens == 32


def test_a_lost_chunk_is_computed(engine: HfEngine, prompt: list[int]) -> None:
    engine.serve("raw", prompt, output_tokens=1)
    store: Any = engine.store
    store.delete(store.written[1])
    assert engine.serve("raw", prompt, output_tokens=1).hit_tokens == 32


def test_quality_of_modes(engine: HfEngine, prompt: list[int]) -> None:
    ids = [*prompt, *prompt]
    assert engine.quality("recompute", ids)["kl_nats"] == 0
    assert engine.quality("raw", ids)["kl_nats"] < engine.quality("cachegen", ids)["kl_nats"]
    assert engine.quality("raw", ids)["bits_per_value"] > 16
    assert engine.quality("int8", ids)["bits_per_value"] < 16


class Scripted:
    """An engine whose times are known: mode "slow" takes twice as long."""

    def __init__(self) -> None:
        self.seen: dict[str, set[tuple[int, ...]]] = {"quick": set(), "slow": set()}
        self.order: list[str] = []

    def serve(self, mode: str, token_ids: Any, *, output_tokens: int) -> Served:
        self.order.append(mode)
        ids = tuple(token_ids)
        hit = 8 if ids in self.seen[mode] else 0
        self.seen[mode].add(ids)
        time_s = 2.0 if mode == "slow" else 1.0
        return Served(len(ids), hit, 4 * hit, 0.1, 0.2, time_s, 2 * time_s, (7,) * output_tokens)

    def forget(self, mode: str) -> None:
        self.seen[mode].clear()

    def quality(self, mode: str, token_ids: Any) -> dict[str, float]:
        return {"kl_nats": 0.5}


def test_figures_of_a_run() -> None:
    engine = Scripted()
    load = Load(((1,) * 16, (2,) * 16), (((1,) * 16, (3, 4)),), 4, 3)
    result = run_serving(engine, ["quick", "slow"], load)
    quick, slow = result["rows"]
    assert result["baseline"] == "quick"
    assert quick["ttft_s"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert slow["ttft_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert slow["e2e_s"]["median"] == 4.0
    assert slow["hit_rate"] == 0.5
    assert slow["bytes_per_hit_token"] == 4
    assert slow["output_tokens_per_s"] == 1.0
    assert slow["requests_per_s"] == 0.25
    assert slow["kl_nats"] == 0.5
    # A conversation starts with a document nobody has read, and grows by answers and questions.
    assert [turn["hit_rate"] for turn in slow["turns"]] == [0, 0]
    assert [turn["prompt_tokens"] for turn in slow["turns"]] == [16, 16 + 4 + 2]
    # Warm-up and filling: 3 each; then 3 repeats of 2 prompts, and 2 turns.
    assert engine.order.count("slow") == 3 + 6 + 2
    with pytest.raises(ConfigError):
        run_serving(engine, [], load)


def test_median_interval() -> None:
    values = np.random.default_rng(0).normal(5, 1, 101).tolist()
    interval = median_interval(values)
    assert interval["low"] < interval["median"] < interval["high"]
    assert interval["median"] == pytest.approx(5, abs=0.3)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_bench(SETTINGS)


def test_a_run_on_the_reference_model(result: dict[str, Any], tmp_path: Path) -> None:
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == list(SETTINGS.modes)
    assert rows["recompute"]["hit_rate"] == 0
    assert rows["raw"]["hit_rate"] == pytest.approx(256 / 300)
    assert rows["progressive"]["bytes_per_request"] < rows["raw"]["bytes_per_request"] / 2
    assert rows["progressive"]["turns"][1]["hit_rate"] > 0.5
    for row in rows.values():
        assert row["ttft_s"]["low"] <= row["ttft_s"]["median"] <= row["e2e_s"]["high"]
    for key in ("hardware", "versions", "date", "command"):
        assert key in result
    again = json.loads(json.dumps(result))
    out = tmp_path / "out"
    with out.open("w") as file:
        print_serving(again, Console(file=file, width=250))
    for word in ("progressive", "TTFT", "hit rate", "turn 2"):
        assert word in out.read_text()
    plot_serving(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_stores_and_links(tmp_path: Path) -> None:
    link = open_link(SETTINGS)
    assert isinstance(link, RateLimitedStore)
    assert link.rate_bytes_per_s == 125e6
    named = replace(SETTINGS, store=str(tmp_path), bandwidth=None)
    assert not isinstance(open_link(named), RateLimitedStore)
    assert isinstance(open_link(replace(named, bandwidth="1Mbps")), RateLimitedStore)


def test_prompts_and_turns() -> None:
    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *(len(word) for word in text.split())]}

    load = make_load(SETTINGS, Words(), 2048)
    assert [len(prompt) for prompt in load.prompts] == [300]
    assert [[len(turn) for turn in turns] for turns in load.conversations] == [[300, 96]]
    assert load.conversations[0][0] == load.prompts[0]
    for changes, longest in (
        ({"prompt_tokens": 10**6}, 2048),
        ({}, 320),
        ({"prompt_tokens": 60}, 2048),
    ):
        with pytest.raises(ConfigError):
            make_load(replace(SETTINGS, **changes), Words(), longest)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine"):
        check_engine("tgi")
    with pytest.raises(ConfigError, match="one of recompute"):
        run_bench(replace(SETTINGS, modes=("zip",)))
    with pytest.raises(ConfigError, match="profile"):
        Mode.of("progressive+profile", quality="small", profile=None)
    outcome = CliRunner().invoke(cli, ["bench", "--engine", "tgi"])
    assert isinstance(outcome.exception, ConfigError)
