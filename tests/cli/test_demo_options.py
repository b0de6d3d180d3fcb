"""Options of the demo: traces in words and in files, and what is refused before a model loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachegen.cli.demo import read_trace
from cachegen.cli.main import cli
from cachegen.errors import ConfigError

CliRunner = pytest.importorskip("typer.testing").CliRunner


def test_traces_in_words() -> None:
    trace = read_trace("100Mbps:200ms,10Mbps")
    assert trace.rate_at(0.1) == (12.5e6, 0.2)
    assert trace.rate_at(0.3)[0] == 1.25e6
    assert read_trace("1Gbps").rate_at(50.0)[0] == 125e6
    with pytest.raises(ConfigError, match="for how long"):
        read_trace("100Mbps,10Mbps")
    with pytest.raises(ConfigError):
        read_trace("100Mbps:soon,10Mbps")


def test_traces_in_files(tmp_path: Path) -> None:
    path = tmp_path / "cell.txt"
    path.write_text("0 100\n1 10\n2 10\n")
    assert read_trace(str(path)).rate_at(1.5)[0] == 1.25e6
    with pytest.raises(FileNotFoundError):
        read_trace(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "options",
    [
        ["--policy", "best"],
        ["--slo", "soon"],
        ["--bandwidth", "fast"],
        ["--trace", "100Mbps,10Mbps"],
        ["--store", "gopher://x"],
        ["--profile", "/nonexistent/profile.safetensors"],
    ],
)
def test_bad_options_end_at_once(options: list[str]) -> None:
    result = CliRunner().invoke(cli, ["demo", *options])
    assert result.exit_code != 0
    assert result.exception is not None
