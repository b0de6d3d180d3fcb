"""The guard that compares instructions per symbol with the committed figures."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _script():
    path = ROOT / "scripts/instruction_guard.py"
    spec = importlib.util.spec_from_file_location("instruction_guard", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


guard = _script()
OUTPUT = "compiler GNU 12.2.0\nscalar decode_32 58200 2048\navx512 decode_32 2512 2048\n"


def test_parses_what_the_program_prints() -> None:
    result = guard.parse(OUTPUT)
    assert result["compiler"] == {"name": "GNU", "version": "12.2.0"}
    assert guard.by_loop(result)["avx512", "decode_32"] == 2512 / 2048
    assert [row["instructions_per_symbol"] for row in result["rows"]] == [28.418, 1.2266]


@pytest.mark.parametrize(
    "output",
    ["scalar decode_32 58200 2048", "compiler GNU 12.2.0\nscalar decode_32 0 2048"],
)
def test_refuses_other_output(output: str) -> None:
    with pytest.raises(ValueError):
        guard.parse(output)


@pytest.mark.parametrize(
    ("instructions", "complaints"), [(2000, 0), (2512, 0), (2637, 0), (2638, 1)]
)
def test_complains_above_five_percent(instructions: int, complaints: int) -> None:
    result = guard.parse(OUTPUT.replace("2512", str(instructions)))
    assert len(guard.problems(result, guard.parse(OUTPUT))) == complaints


def test_an_instruction_set_may_be_missing_but_no_loop() -> None:
    both, first = guard.parse(OUTPUT), guard.parse(OUTPUT.rpartition("avx512")[0])
    assert guard.problems(first, both) == []
    assert "no figure" in guard.problems(both, first)[0]
    renamed = copy.deepcopy(both)
    renamed["rows"][0]["kernel"] = "decode_other"
    assert [text.partition(":")[0] for text in guard.problems(renamed, both)] == [
        "scalar decode_32",
        "scalar decode_other",
    ]


@pytest.mark.parametrize(
    ("compiler", "same"), [("GNU 12.9.1", True), ("GNU 13.2.0", False), ("Clang 12.2.0", False)]
)
def test_compares_one_major_version_of_one_compiler(compiler: str, same: bool) -> None:
    other = guard.parse(OUTPUT.replace("GNU 12.2.0", compiler))
    assert guard.same_compiler(other, guard.parse(OUTPUT)) == same


def test_committed_figures_have_every_instruction_set() -> None:
    committed = json.loads(guard.BASELINE.read_text())
    assert {row["isa"] for row in committed["rows"]} == {"scalar", "avx2", "avx512"}
    assert guard.problems(committed, committed) == []
