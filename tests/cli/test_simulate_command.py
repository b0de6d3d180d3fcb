from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachegen.cli.main import cli
from cachegen.errors import ConfigError

COLUMNS = ("slo_violation_rate", "ttft_mean_s", "ttft_p95_s", "distortion_mean", "regret")


def simulate(*words: str) -> object:
    return CliRunner().invoke(cli, ["simulate", *words], catch_exceptions=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result, report and chart of one trace with everything in it."""
    folder = tmp_path_factory.mktemp("simulation")
    pytest.importorskip("matplotlib")
    files = ("--json", "a.json", "--html", "a.html", "--plot", "a.png")
    paths = [str(folder / word) if word.startswith("a.") else word for word in files]
    result = simulate("--traces", "1", "--seed", "5", "--requests", "2", *paths)
    assert result.exit_code == 0 and "deadline" in result.output  # type: ignore[attr-defined]
    return folder


def test_json_has_a_row_for_each_policy(whole: Path) -> None:
    result = json.loads((whole / "a.json").read_text())
    names = ["cachegen", "cachegen-rule", "fixed", "hybrid", "deadline"]
    assert [row["policy"] for row in result["policies"]] == names
    for row in result["policies"]:
        assert all(isinstance(row[column], float) for column in COLUMNS)
    assert (result["traces"], result["seed"], result["slo_s"]) == (1, 5, [0.5, 4.0])
    assert [entry["model"] for entry in result["by_model"]] == ["mistral-7b", "llama-3.1-70b"]
    assert {"hardware", "versions", "date", "command"} <= set(result)
    assert result["segments"]["measured"]["model"] == "reference"
    assert set(result["frontiers"]) == {"cachegen", "cachegen-rule", "deadline"}
    shown = result["shows"]["cachegen"]
    assert shown["violation_ratio"] >= 0 and shown["where_rule_is_in_time"]["requests"] > 0


def test_the_report_needs_nothing_else(whole: Path) -> None:
    page = (whole / "a.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("data:image/svg+xml;base64,") >= 4
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    for stated in ("reference model", "H100-class", "Poisson", "Median regret", "lower bound"):
        assert stated in page
    assert (whole / "a.png").read_bytes().startswith(b"\x89PNG")


def test_recorded_traces_and_one_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.csv").write_text("0, 800\n5, 4000\n9, 300\n")
    path = tmp_path / "a.json"
    options = ("--trace-file", str(tmp_path / "*.csv"), "--policy", "deadline", "--slo", "1")
    page = tmp_path / "a.html"
    files = ("--json", str(path), "--html", str(page))
    result = simulate(*options, "--model", "mistral-7b", *files)
    assert result.exit_code == 0  # type: ignore[attr-defined]
    assert "One SLO for all" in page.read_text()
    content = json.loads(path.read_text())
    # CacheGen's rule always runs: regret is measured against it.
    assert [row["policy"] for row in content["policies"]] == ["cachegen", "deadline"]
    assert content["slo_s"] == 1.0 and content["frontiers"] == {} and content["by_slo"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "gpt"),
        ("--policy", "best"),
        ("--slo", "0"),
        ("--traces", "0"),
        ("--table", "none"),
        ("--worst-distortion", "1e-9"),
    ],
)
def test_bad_settings_are_named(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        simulate("--traces", "1", *words)


def test_a_pattern_without_files() -> None:
    with pytest.raises(FileNotFoundError):
        simulate("--trace-file", "/nowhere/*.csv")
