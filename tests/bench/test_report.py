"""What result files say of where they come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cachegen.bench.report import environment


@pytest.mark.parametrize(
    ("called", "told"),
    [
        ("/usr/bin/cachegen demo --json out.json", "cachegen demo --json out.json"),
        ("-c demo --json out.json", "cachegen demo --json out.json"),
        ("benchmarks/link.py --json a/b.json", "python benchmarks/link.py --json a/b.json"),
        ("{here}/benchmarks/link.py", "python benchmarks/link.py"),
        (
            "/usr/bin/cachegen eval {here}/model --reuse /elsewhere/a.json",
            "cachegen eval model --reuse a.json",
        ),
    ],
)
def test_a_command_names_no_folder_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, called: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", called.format(here=Path.cwd()).split())
    assert environment()["command"] == told


def test_a_command_may_be_given() -> None:
    assert environment(["python", "x.py"])["command"] == "python x.py"
