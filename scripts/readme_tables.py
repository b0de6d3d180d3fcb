"""Write the tables of the README from the committed results; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from cachegen.bench.report import demo_link, demo_markdown, format_cell
from cachegen.bench.serving_report import COLUMNS as SERVING_COLUMNS
from cachegen.bench.serving_report import cells as serving_cells
from cachegen.bench.serving_report import link_words
from cachegen.chunk import DEFAULT_CHUNK_TOKENS

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


PEERS_OF_CHUNKS = (
    ("cachegen-lmcache", "CacheGen as LMCache sets it"),
    ("cachegen-paper", "CacheGen as the paper sets it"),
    ("cachegen-paper{}, framing not billed", "the same, nothing billed but symbols and scales"),
    ("kvtc", "KVTC"),
)
PROFILE_NAMES = {"false": "no", "true": "yes"}


def peers_section(result: dict[str, Any]) -> str:
    """Show the rows of 256-token chunks, and of peers without a choice of chunk size.

    What lies on top of token eviction is in the headline and in the file.
    """
    heads = ("codec", "point", "bits/value", "side", "KL, text", "KL, answers", "top-1")
    tasks = [task for task in result["uncompressed"] if task not in result["unmeasured_tasks"]]
    lines = ["| " + " | ".join([*heads, *tasks]) + " |"]
    lines.append("|---|---|" + "---:|" * (len(heads) - 2 + len(tasks)))
    for row in result["rows"]:
        family, _, size = row["family"].partition("@")
        if size not in ("", str(DEFAULT_CHUNK_TOKENS)) or family.startswith("h2o+"):
            continue
        scores = [_accuracy(row["tasks"][name]) for name in tasks]
        cells = [
            family,
            row["label"],
            format(row["billed_bits_per_value"], ".2f"),
            format(row["side_bits_per_value"], ".2f"),
            format(row["kl_nats"], ".1e"),
            format(row["answer_kl_nats"], ".1e"),
            format(row["top1_agreement"], ".3f"),
            *scores,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    scores = ", ".join(f"{name} {_accuracy(result['uncompressed'][name])}" for name in tasks)
    left_out = " and ".join(
        f"{name} ({result['uncompressed'][name]['accuracy']:.0%} right)"
        for name in result["unmeasured_tasks"]
    )
    head = (
        f"{result['texts']} texts of {result['prefix_tokens']} tokens, chunks of "
        f"{DEFAULT_CHUNK_TOKENS}. Uncompressed: {scores}"
    )
    head += f"; the model cannot do {left_out}, which is not measured." if left_out else "."
    return head + "\n\n" + "\n".join(lines) + "\n\n" + provenance(result)


def _accuracy(score: dict[str, Any]) -> str:
    low = min(score["interval"][0], score["prompt_interval"][0])
    return f"{score['accuracy']:.2f} (from {low:.2f})"


def bd_section(result: dict[str, Any]) -> str:
    """Show bytes at equal KL against the peers, for every chunk size, with intervals."""
    heads = ["chunk", "profile", "KL", *(heading for _, heading in PEERS_OF_CHUNKS)]
    lines = ["| " + " | ".join(heads) + " |", "|---:|---|---|" + "---:|" * len(PEERS_OF_CHUNKS)]
    rates = {(rate["curve"], rate["peer"], rate["quality"]): rate for rate in result["bd_rates"]}
    several = len(result["chunk_tokens"]) > 1
    for size in sorted(result["chunk_tokens"]):
        end = f"@{size}" if several else ""
        for profile, shown in PROFILE_NAMES.items():
            for quality, where in (("text", "text"), ("answers", "answers")):
                cells = [str(size), shown, where]
                for peer, _ in PEERS_OF_CHUNKS:
                    name = peer.format(end) if "{}" in peer else peer + end * (peer != "kvtc")
                    rate = rates.get((f"progressive:profile={profile}{end}", name, quality))
                    cells.append(_rate(rate))
                lines.append("| " + " | ".join(cells) + " |")
    head = (
        "Bytes at equal KL against a peer (BD-rate): mean over the common range, 95 % interval "
        "over prompts, and the worst place in the range."
    )
    above = [
        entry
        for entry in result["claims"]["never_above"]
        if entry["peer"].startswith(("cachegen-lmcache", "cachegen-paper")) and not entry["holds"]
    ]
    count = sum(
        entry["peer"].startswith(("cachegen-lmcache", "cachegen-paper"))
        for entry in result["claims"]["never_above"]
    )
    said = (
        f"In none of {count} comparisons with CacheGen the curve is above the peer's anywhere."
        if not above
        else f"In {len(above)} of {count} comparisons with CacheGen the curve is above the peer's "
        "somewhere: "
        + ", ".join(
            f"{entry['curve']} against {entry['peer']} ({entry['quality']}, "
            f"{entry['worst_percent']:+.0f} %)"
            for entry in above
        )
        + "."
    )
    return f"{head}\n\n" + "\n".join(lines) + f"\n\n{said}"


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None or rate["percent"] is None:
        return "-"
    low, high = rate["interval"]
    return (
        f"{rate['percent']:+.0f} % ({low:+.0f} to {high:+.0f}), worst {rate['worst_percent']:+.0f}"
    )


def headline_section(result: dict[str, Any]) -> str:
    """Say how far below 8-bit quantisation, and how small what is lossless in practice."""
    end = f"@{DEFAULT_CHUNK_TOKENS}" if len(result["chunk_tokens"]) > 1 else ""
    names = {f"progressive:profile={key}": words for key, words in _PROFILE_WORDS.items()}
    found = {
        (entry["family"].removesuffix(end), entry["strict"]): entry
        for entry in result["claims"]["headline"]
    }
    lines = [
        "| against 8-bit quantisation, at most 2 % lost | retrieval and next-token accuracy | and "
        "top-1 agreement |",
        "|---|---:|---:|",
    ]
    for eviction, words in (("", "alone"), ("h2o+", "on top of H2O, half the tokens")):
        for name, profile in names.items():
            pair = [found.get((eviction + name, strict)) for strict in (False, True)]
            if any(pair):
                lines.append(f"| {profile}, {words} | {_times(pair[0])} | {_times(pair[1])} |")
    said = []
    for entry in result["claims"]["lossless"]:
        family = entry["family"].removesuffix(end)
        if family not in names or "@" in family:
            continue
        for key, words in (("named", "the named level"), ("smallest", "the smallest point")):
            point = entry[key]
            if point:
                said.append(
                    f"{words} {names[family]} {point['ratio_vs_16bit']:.1f}x "
                    f"({point['bits_per_value']:.2f} bits/value)"
                )
        crossing = entry["ratio_at_largest_kl"]
        if crossing:
            said.append(f"KL 0.01 on the curve {names[family]} at {crossing:.1f}x")
    profile_bytes = max(
        entry["calibration_bytes"]
        for entry in result["claims"]["lossless"]
        if entry["family"].startswith("progressive")
    )
    lossless = (
        "Lossless in practice (KL at most 0.01, scores within noise), against 16 bit: "
        + "; ".join(said)
        + f". The profile itself has {profile_bytes / 1e6:.2f} MB, once per model."
    )
    return "\n".join(lines) + "\n\n" + lossless


_PROFILE_WORDS = {"false": "without a profile", "true": "with one"}


def _times(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["point"] is None:
        return "no point"
    return (
        f"{entry['times_smaller_than_8_bit']:.1f}x smaller "
        f"({entry['beyond_the_headline']:.1f} times CacheGen's 4.3x)"
    )


def serving_section(result: dict[str, Any]) -> str:
    heads = [heading for _, heading, _ in SERVING_COLUMNS]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(serving_cells(row)) + " |" for row in result["rows"]]
    tokens = max(result["prompt_tokens"])
    head = (
        f"{result['prompts']} prompts of {tokens} tokens, {result['repeats']} repeats, over a "
        f"{link_words(result)}; times in ms, medians with 95 % intervals."
    )
    return f"{head}\n\n" + "\n".join(lines) + f"\n\n{provenance(result)}"


def rendered(readme: str) -> str:
    sections = {
        "demo": demo_section(json.loads((RESULTS / "demo.json").read_text())),
        "variants": variants_section(json.loads((RESULTS / "cachegen_variants.json").read_text())),
    }
    evaluation = json.loads((RESULTS / "evaluation.json").read_text())
    sections["peers"] = peers_section(evaluation)
    sections["rates"] = bd_section(evaluation)
    sections["headline"] = headline_section(evaluation)
    sections["serving"] = serving_section(json.loads((RESULTS / "serving.json").read_text()))
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
