"""Write the tables of the README from the committed results; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from cachegen.bench.report import demo_link, demo_markdown, format_cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"

VARIANT_COLUMNS = (
    ("codec", "codec", ""),
    ("level", "level", ""),
    ("tables", "tables", ""),
    ("delta", "delta", ""),
    ("billed_bits_per_value", "billed bits/value", ".2f"),
    ("side_share", "side information", ".0%"),
    ("states_bits_per_value", "of it lane states", ".3f"),
    ("kl_nats", "KL, nats/token", ".1e"),
    ("top1_agreement", "top-1", ".3f"),
    ("retrieval_accuracy", "retrieval", ".3f"),
)


def provenance(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"Measured {result['date']} on {hardware['cores']} cores of {hardware['cpu']}, "
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, with `{result['command']}`."
    )


def demo_section(result: dict[str, Any]) -> str:
    head = (
        f"{result['prompt_tokens']} prompt tokens ({result['prefix_tokens']} from the store) "
        f"{demo_link(result)}; {result['continuation_tokens']} teacher-forced tokens, "
        f"{result['questions']} questions."
    )
    return f"{head}\n\n{demo_markdown(result)}\n\n{provenance(result)}"


def variants_section(result: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(heading for _, heading, _ in VARIANT_COLUMNS) + " |"]
    lines.append("|---|---|---|---|" + "---:|" * (len(VARIANT_COLUMNS) - 4))
    for row in result["rows"]:
        share = row["side_bits_per_value"] / row["billed_bits_per_value"]
        row = {**row, "side_share": share}
        cells = [format_cell(row[key], spec) for key, _, spec in VARIANT_COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + provenance(result)


def peers_section(result: dict[str, Any]) -> str:
    lines = ["| codec | point | bits/value | side | KL, nats/token | top-1 | retrieval | needle |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in result["rows"]:
        tasks = [row["tasks"][name]["accuracy"] for name in ("retrieval", "needle")]
        cells = [
            row["family"],
            row["label"],
            format(row["billed_bits_per_value"], ".2f"),
            format(row["side_bits_per_value"], ".2f"),
            format(row["kl_nats"], ".1e"),
            format(row["top1_agreement"], ".3f"),
            *(format(accuracy, ".2f") for accuracy in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    uncompressed = {name: result["uncompressed"][name] for name in ("retrieval", "needle")}
    scores = ", ".join(f"{name} {task['accuracy']:.2f}" for name, task in uncompressed.items())
    head = (
        f"{result['texts']} texts of {result['prefix_tokens']} tokens, chunks of "
        f"{result['chunk_tokens'][0]}; uncompressed: {scores}."
    )
    return head + "\n\n" + "\n".join(lines) + "\n\n" + provenance(result)


def rendered(readme: str) -> str:
    sections = {
        "demo": demo_section(json.loads((RESULTS / "demo.json").read_text())),
        "variants": variants_section(json.loads((RESULTS / "cachegen_variants.json").read_text())),
    }
    sections["peers"] = peers_section(json.loads((RESULTS / "evaluation.json").read_text()))
    for name, text in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(
            pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme, flags=re.S
        )
        if count != 1:
            sys.exit(f"README.md has {count} sections named {name}, expected 1")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = rendered(before)
    if parser.parse_args().check:
        if before != after:
            sys.exit("README.md does not show the committed results: run scripts/readme_tables.py")
        return
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
