"""The ``advise`` command: is loading KV over a link faster than recomputing it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cachegen.cli.common import JsonOption, console
from cachegen.units import parse_bandwidth


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command(name="advise")(advise)


def advise(
    model: Annotated[str, typer.Option(help="Such as mistral-7b or llama-3.1-70b.")],
    gpu: Annotated[str, typer.Option(help="Such as h200, a100 or l4.")] = "h200",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the link, such as 3Gbps; default: 1 to 100 Gbit/s.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens to load or to prefill.")] = 9400,
    max_kl: Annotated[
        float | None, typer.Option(help="KL in nats/token that sizes may stand for; default 0.01.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Sizes of progressive with a profile of the model.")
    ] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Say when loading a prompt's KV beats recomputing it, from measured or stated constants."""
    from cachegen.bench import advise as advisor
    from cachegen.bench.report import environment, write_json

    chosen = advisor.find("model", advisor.MODELS, model)
    device = advisor.find("GPU", advisor.GPUS, gpu)
    bits = advisor.sizes(advisor.DEFAULT_MAX_KL_NATS if max_kl is None else max_kl, profile=profile)
    speeds = advisor.machine(chosen, device, gpus=gpus)
    links = [parse_bandwidth(bandwidth) * 8e-9] if bandwidth else list(advisor.DEFAULT_LINKS_GBPS)
    rows = [
        advisor.advise(chosen, speeds, bits, link_gbps=link, prompt_tokens=prompt_tokens)
        for link in links
    ]
    table = Table(title=f"{chosen.name}, {prompt_tokens} tokens: seconds to the first token")
    table.add_column("link, Gbit/s", justify="right")
    for way in ("recompute", *advisor.WAYS):
        table.add_column(way, justify="right")
    for row in rows:
        cells = [f"{row.ttft_s[way]:.3f}" for way in ("recompute", *advisor.WAYS)]
        table.add_row(f"{row.link_gbps:g}", *cells)
    even = [rows[0].break_even_gbps[way] for way in advisor.WAYS]
    table.add_section()
    table.add_row("break-even", "", *("never" if link is None else f"{link:.2f}" for link in even))
    console.print(table)
    for row in rows:
        console.print(f"{row.link_gbps:g} Gbit/s: {advisor.verdict(row)}", soft_wrap=True)
    figures = {
        "prefill FLOP/s": speeds.prefill_flops,
        "one token, s": speeds.token_s,
        "decoded bytes/s": speeds.decode_bytes_per_s,
        **{f"bits/value of {way}": figure for way, figure in bits.items()},
    }
    for name, figure in figures.items():
        label = "estimate: " if figure.is_estimate else ""
        console.print(f"{name}: {figure.value:.4g} ({label}{figure.source})", soft_wrap=True)
    if json_file:
        content = advisor.to_json(chosen, device, speeds, bits, rows)
        write_json(json_file, {**content, **environment()})
    if plot:
        advisor.plot(chosen, speeds, bits, prompt_tokens=prompt_tokens, path=plot)
        console.print(f"chart: {plot}")
