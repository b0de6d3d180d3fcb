"""The simulation as a chart and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachegen.bench.report import format_cell, load_pyplot, save_figure, write_atomically
from cachegen.bench.simulation import COLUMNS

_COLOURS = {
    "cachegen": "#ee6677",
    "cachegen-rule": "#ee8866",
    "fixed": "#bbbbbb",
    "hybrid": "#4477aa",
    "deadline": "#228833",
    "best possible": "#222222",
}
_LABELS = {
    "cachegen": "cachegen: paper's rule, its levels",
    "cachegen-rule": "paper's rule, our steps",
    "fixed": "fixed quality",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } code { background: #f3f3f3; padding: 0 .2rem; }
"""


def plot_simulation(result: dict[str, Any], path: Path) -> None:
    """Draw the overview. Raises: ConfigError without matplotlib or for a bad path."""
    save_figure(_overview(result), path)


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the report. result: what ``run_simulation`` returned, or its JSON.

    Raises: ConfigError without matplotlib or for a bad path.
    """
    sections = [
        ("Result", _result_text(result) + _table(result["policies"], result["best_possible"])),
        ("Overview", _image(_overview(result))),
        ("Waiting and quality", _image(_distributions(result))),
        ("By model", "".join(_model_section(entry) for entry in result["by_model"])),
        ("By SLO", _image(_by_slo(result)) if result["by_slo"] else "<p>One SLO for all.</p>"),
        ("Links", _image(_links(result)) + _links_text(result)),
        ("Segments", _image(_segments(result)) + _segments_text(result)),
        ("Assumptions", _assumptions(result)),
        ("How it was made", _provenance(result)),
    ]
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Streaming simulation</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>Streaming under deadlines: simulation</h1>\n{body}\n</body></html>\n"
    )
    write_atomically(path, page.encode())


def _overview(result: dict[str, Any]) -> Any:
    pyplot = load_pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13.5, 4.3))
    _violation_bars(left, result["by_model"])
    _frontier(middle, result)
    _cumulative(right, result, "regret")
    right.set_xscale("symlog", linthresh=0.1, linscale=1.5)
    right.set_xlim(-0.02, 12)
    ticks = (0, 0.05, 0.1, 0.5, 1, 5)
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.axvline(1.0, color="#cccccc", linewidth=0.8)
    right.set_xlabel("regret per trace (0: best possible, 1: paper's rule)")
    right.set_title("distance from the best possible")
    figure.tight_layout()
    return figure


def _violation_bars(axes: Any, entries: Sequence[dict[str, Any]]) -> None:
    policies = [row["policy"] for row in entries[0]["policies"]]
    width = 0.8 / len(policies)
    for place, policy in enumerate(policies):
        heights = [100 * _row(entry["policies"], policy)["slo_violation_rate"] for entry in entries]
        at = [index + (place - (len(policies) - 1) / 2) * width for index in range(len(entries))]
        bars = axes.bar(at, heights, width, color=_colour(policy), label=_label(policy))
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(entries)), [_heading(entry) for entry in entries])
    axes.set_ylabel("SLO violations, %")
    axes.set_title("SLO violations")


def _heading(entry: dict[str, Any]) -> str:
    if "model" in entry:
        return str(entry["model"])
    low, high = entry["slo_s"]
    return f"{low:g} to {high:g} s"


def _frontier(axes: Any, result: dict[str, Any]) -> None:
    for policy, points in result["frontiers"].items():
        ordered = sorted(points, key=lambda point: float(point["setting"]))
        rates = [100 * point["slo_violation_rate"] for point in ordered]
        errors = [point["distortion_mean"] for point in ordered]
        axes.plot(rates, errors, "o", color=_colour(policy), markersize=4, label=_label(policy))
    for row in result["policies"]:
        if row["policy"] not in result["frontiers"]:
            point = 100 * row["slo_violation_rate"], row["distortion_mean"]
            axes.plot(*point, "s", color=_colour(row["policy"]), label=_label(row["policy"]))
    best = result["best_possible"]
    point = 100 * best["slo_violation_rate"], best["distortion_mean"]
    axes.plot(*point, "*", color=_colour("best possible"), markersize=11, label="best possible")
    axes.set_xlim(0, None)
    axes.set_ylim(0, 1.25 * max(row["distortion_mean"] for row in result["policies"]))
    axes.set_xlabel("SLO violations, %")
    axes.set_ylabel("mean relative distortion")
    axes.set_title("violations against distortion")
    axes.legend(fontsize=8, loc="upper left")


def _cumulative(axes: Any, result: dict[str, Any], quantity: str) -> None:
    """Draw one line for each policy: the share of requests or traces at or below a value."""
    for policy, shown in result["distributions"].items():
        values = shown[quantity]
        shares = [100 * index / max(len(values) - 1, 1) for index in range(len(values))]
        pairs = [pair for pair in zip(values, shares, strict=True) if pair[0] is not None]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), color=_colour(policy), label=_label(policy))
    axes.set_ylim(0, 101)
    axes.set_ylabel("% of traces" if quantity == "regret" else "% of requests")
    axes.grid(True, color="#eeeeee")


def _distributions(result: dict[str, Any]) -> Any:
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    _cumulative(left, result, "ttft_over_slo")
    left.set_xlim(0, 3)
    left.axvline(1.0, color="#222222", linewidth=0.8, linestyle=":")
    left.set_xlabel("time to first token over SLO")
    left.legend(fontsize=8, loc="lower right")
    _cumulative(right, result, "distortion")
    right.set_xscale("symlog", linthresh=1e-3)
    right.set_xlim(0, 1.05)
    right.set_xlabel("relative distortion at the deadline (1: nothing there)")
    figure.tight_layout()
    return figure


def _by_slo(result: dict[str, Any]) -> Any:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(10.5, 3.8))
    _violation_bars(axes, result["by_slo"])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def _links(result: dict[str, Any]) -> Any:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    for example in result["trace_examples"]:
        axes.step(example["times_s"], example["mbit_per_s"], where="post", label=example["name"])
    axes.set_yscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("Mbit/s")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _segments(result: dict[str, Any]) -> Any:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.8))
    segments = result["segments"]
    name = f"one {segments['table']} object, steps"
    axes.plot(*zip(*segments["steps"], strict=True), "o-", color=_colour("deadline"), label=name)
    axes.plot(
        *zip(*segments["cachegen_levels"], strict=True),
        "s",
        color=_colour("cachegen"),
        label="cachegen, one object each",
    )
    axes.set_yscale("log")
    axes.set_xlim(0, None)
    axes.set_xlabel("billed bits per value")
    axes.set_ylabel("relative distortion")
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _image(figure: Any) -> str:
    """Return a figure as an image tag that holds the drawing itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    load_pyplot().close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="" src="data:image/svg+xml;base64,{data}"></p>'


def _table(rows: Sequence[dict[str, Any]], best: dict[str, Any] | None = None) -> str:
    heads = "".join(f"<th>{html.escape(heading)}</th>" for _, heading, _ in COLUMNS)
    lines = []
    for row in rows:
        cells = (format_cell(row[key], spec) for key, _, spec in COLUMNS)
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    if best:
        late, left = f"{best['slo_violation_rate']:.1%}", f"{best['distortion_mean']:.4f}"
        shown = ("best possible", late, "-", "-", "-", left, "0.000", "-")
        lines.append("".join(f"<td>{cell}</td>" for cell in shown))
    return f"<table><tr>{heads}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _model_section(entry: dict[str, Any]) -> str:
    return f"<h3>{html.escape(entry['model'])}</h3>{_table(entry['policies'])}"


def _result_text(result: dict[str, Any]) -> str:
    sentences = []
    for rule, shown in result["shows"].items():
        equal, pairs = shown["at_equal_violations"], shown["where_rule_is_in_time"]
        text = (
            f"Against {html.escape(_label(rule))}: <code>deadline</code> violates the SLO "
            f"{shown['violation_ratio']:.2f} times as often and leaves "
            f"{shown['distortion_ratio']:.2f} times the mean distortion. "
        )
        if shown["median_regret"] is not None:
            text += f"Median regret {shown['median_regret']:.3f}. "
        if equal:
            text += (
                f"At equal violations (or the rule's fewest, {equal['rule_violation_rate']:.1%}, "
                f"where deadline has {equal['deadline_violation_rate']:.1%}): distortion "
                f"{equal['deadline_distortion']:.4f} against {equal['rule_distortion']:.4f}. "
            )
        if pairs:
            text += (
                f"Of the {pairs['requests']} requests for which the rule is in time, deadline is "
                f"late for {pairs['deadline_late']:.1%}; distortion on them "
                f"{pairs['deadline_distortion']:.4f} against {pairs['rule_distortion']:.4f}."
            )
        sentences.append(f"<p>{text}</p>")
    return "".join(sentences)


def _links_text(result: dict[str, Any]) -> str:
    lowest, *_, highest = result["trace_mean_mbit_per_s"]
    return (
        f"<p>{result['traces']} traces; their means range from {lowest:,.0f} to {highest:,.0f} "
        "Mbit/s. Of requests that load at the same time the one with the earliest deadline gets "
        "three quarters of the link, whatever the policy; the rest is shared equally.</p>"
    )


def _segments_text(result: dict[str, Any]) -> str:
    segments = result["segments"]
    measured = segments["measured"]
    return (
        f"<p>Table <code>{html.escape(segments['table'])}</code>: "
        f"{html.escape(segments['text'])}. Measured on the {measured['model']} model over "
        f"{measured['chunks']} chunks of {measured['chunk_tokens']} tokens, {measured['date']}; "
        f"distortion is the {segments['unit']}. Bits per value carry over to a geometry by its "
        "number of values; between measured points bytes and distortion are taken as linear. A "
        "small model's keys and values are not a large one's: the sizes are stated, not promised. "
        "CacheGen's levels are the best of the paper's and of LMCache's at each size. Nothing "
        f"coarser than distortion {result['worst_distortion']:g} counts as usable.</p>"
    )


def _assumptions(result: dict[str, Any]) -> str:
    work = result["workload"]
    slo = result["slo_s"]
    slo_text = f"{slo:g} s" if isinstance(slo, (int, float)) else f"{slo[0]:g} to {slo[1]:g} s"
    low, high = work["prefill_over_slo"]
    share = result["models"][0]["prefill_share"]
    share_text = (
        f"One request gets {share:.0%} of the machine for prefill"
        if isinstance(share, (int, float))
        else f"One request gets {share[0]:.0%} to {share[1]:.0%} of the machine for prefill, "
        "log-uniform over the traces"
    )
    lines = [f"{model['name']}: {model['text']}." for model in result["models"]]
    lines += [
        f"{share_text}, and requests do not wait for each other there; the link is shared. "
        "Prefill times scatter by 5 % around the formula, and the planner starts with a guess that "
        "is off by about 15 %.",
        f"{work['requests']} requests on each trace, Poisson arrivals every {work['gap_s']:g} s on "
        f"average, SLO {slo_text}. Contexts are such that prefilling them takes {low:g} to "
        f"{high:g} times the SLO, in chunks of {result['chunk_tokens']} tokens.",
        f"First byte after {1000 * work['latency_s']:g} ms; decoding at "
        f"{work['decode_bytes_per_s'] / 1e9:g} GB/s of coded bytes.",
        "A recomputed chunk counts as distortion 0, a chunk with nothing usable as 1; a late "
        "request counts with what was usable at its deadline.",
        "The best possible schedule knows the trace and the true prefill times, decodes at once, "
        "sees no latency and may divide the link freely among requests: a lower bound.",
    ]
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _provenance(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"<p>{result['date']}, <code>{html.escape(result['command'])}</code>, seed "
        f"{result['seed']}, cachegen {versions['cachegen']}, Python {versions['python']}, "
        f"{hardware['cores']} cores of {html.escape(hardware['cpu'])}.</p>"
    )


def _row(rows: Sequence[dict[str, Any]], policy: str) -> dict[str, Any]:
    return next(row for row in rows if row["policy"] == policy)


def _colour(policy: str) -> str:
    return _COLOURS.get(policy, "#aa3377")


def _label(policy: str) -> str:
    return _LABELS.get(policy, policy)
