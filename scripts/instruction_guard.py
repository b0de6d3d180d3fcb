"""Compare instructions per symbol of the hot loops with the committed figures; ``--check`` fails.

Builds ``csrc/bench/instructions.cpp`` and runs it. ``--write`` replaces the committed figures.
Exact counts of one compiler: with another major version there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cachegen.bench.report import environment, write_json

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/guard"
BASELINE = ROOT / "benchmarks/results/instructions.json"
MOST_GROWTH = 0.05
CANNOT_COUNT = 77  # exit status of the program


def build() -> Path:
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-DCACHEGEN_DRIVER=ON"]
    target = ["--target", "cachegen_instructions"]
    for command in (
        [*configure, "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", BUILD, "--parallel", "2", *target],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\ncould not build the instruction counter")
    return BUILD / "cachegen_instructions"


def parse(output: str) -> dict[str, Any]:
    """Read what the program prints: the compiler, and a row for each loop."""
    head, *lines = output.splitlines()
    word, name, version = head.split()
    if word != "compiler":
        raise ValueError(f"the first line is {head!r}, expected: compiler NAME VERSION")
    rows = []
    for line in lines:
        isa, kernel, instructions, symbols = line.split()
        count = int(instructions)
        if count <= 0:
            raise ValueError(f"{isa} {kernel} has {count} instructions, expected some")
        rows.append(
            {
                "isa": isa,
                "kernel": kernel,
                "instructions": count,
                "symbols": int(symbols),
                "instructions_per_symbol": round(count / int(symbols), 4),
            }
        )
    return {"compiler": {"name": name, "version": version}, "rows": rows}


def by_loop(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (row["isa"], row["kernel"]): row["instructions"] / row["symbols"] for row in result["rows"]
    }


def same_compiler(result: dict[str, Any], baseline: dict[str, Any]) -> bool:
    def major(compiler: dict[str, str]) -> tuple[str, str]:
        return compiler["name"], compiler["version"].partition(".")[0]

    return major(result["compiler"]) == major(baseline["compiler"])


def problems(result: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Compare loop by loop; instruction sets that this machine lacks are left out."""
    new, old = by_loop(result), by_loop(baseline)
    measured = {isa for isa, _ in new}
    found = []
    for loop in sorted(new.keys() | {loop for loop in old if loop[0] in measured}):
        name = " ".join(loop)
        if loop not in new:
            found.append(f"{name}: is gone; committed is {old[loop]:.3f}")
        elif loop not in old:
            found.append(f"{name}: {new[loop]:.3f}, and no figure is committed")
        elif new[loop] > old[loop] * (1 + MOST_GROWTH):
            growth = new[loop] / old[loop] - 1
            found.append(f"{name}: {new[loop]:.3f} instead of {old[loop]:.3f} ({growth:+.1%})")
    return found


def print_table(result: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    old = by_loop(baseline) if baseline else {}
    print(f"instructions per symbol, {' '.join(result['compiler'].values())}")
    for loop, count in by_loop(result).items():
        before = f"{old[loop]:10.3f} {count / old[loop] - 1:+8.1%}" if loop in old else ""
        print(f"{loop[0]:8}{loop[1]:20}{count:10.3f}{before}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="fail if a loop grew by over 5%%")
    action.add_argument("--write", action="store_true", help="replace the committed figures")
    arguments = parser.parse_args()

    done = subprocess.run([build()], capture_output=True, text=True)
    if done.returncode == CANNOT_COUNT:
        print(f"skipped: {done.stdout.strip()}")
        return
    if done.returncode:
        sys.exit(
            f"{done.stdout}{done.stderr}\nthe instruction counter ended with {done.returncode}"
        )
    result = parse(done.stdout)
    if arguments.write:
        print_table(result, None)
        command = ["python", "scripts/instruction_guard.py", "--write"]
        write_json(BASELINE, {**environment(command), **result})
        return
    baseline = json.loads(BASELINE.read_text())
    if not same_compiler(result, baseline):
        print_table(result, None)
        print(f"not compared: committed is {' '.join(baseline['compiler'].values())}")
        return
    print_table(result, baseline)
    missing = {row["isa"] for row in baseline["rows"]} - {row["isa"] for row in result["rows"]}
    if missing:
        print(f"not compared, as this machine lacks it: {', '.join(sorted(missing))}")
    if found := problems(result, baseline):
        advice = "Make the loops shorter again, or commit new figures: make guard-write"
        sys.exit("\n".join([f"more than {MOST_GROWTH:.0%} over the figures:", *found, advice]))


if __name__ == "__main__":
    main()
