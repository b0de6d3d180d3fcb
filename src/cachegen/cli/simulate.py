"""The ``simulate`` command: policies against links, beside the best possible schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachegen.cli.common import JsonOption, console, errors


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command(name="simulate")(simulate)


def simulate(
    traces: Annotated[int, typer.Option(help="Number of seeded cloud traces.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of traces and requests.")] = 0,
    slo: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="SLO of all; default: 0.5 to 4 s.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Geometry, once for each; default mistral-7b and llama-3.1-70b."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="cachegen, fixed, deadline, hybrid or cachegen-rule; default all."),
    ] = None,
    trace_file: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Recorded traces: Mahimahi, or seconds and Mbit/s."),
    ] = None,
    table: Annotated[
        str, typer.Option(help="Measured segments: progressive or progressive-profile.")
    ] = "progressive",
    worst_distortion: Annotated[
        float, typer.Option(help="Nothing coarser than this is handed over; 1: any pass 0.")
    ] = 0.1,
    requests: Annotated[int, typer.Option(help="Requests on each trace.")] = 6,
    prefill_share: Annotated[
        float | None,
        typer.Option(help="Share of the machine for one prefill; default: 0.2 to 1, by trace."),
    ] = None,
    json_file: JsonOption = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report, one file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help="Draw a chart.")] = None,
) -> None:
    """Simulate streaming under deadlines: violations, waiting, distortion, regret."""
    from cachegen.bench.report import write_json
    from cachegen.bench.simulation import Settings, print_simulation, run_simulation
    from cachegen.bench.simulation_report import plot_simulation, write_report
    from cachegen.stream.scenario import DEFAULT_MODELS, Workload
    from cachegen.stream.simulate import DEFAULT_POLICIES
    from cachegen.stream.traces import cloud_traces, load_traces

    settings = Settings(
        models=tuple(dict.fromkeys(model or DEFAULT_MODELS)),
        policies=tuple(dict.fromkeys(policy or DEFAULT_POLICIES)),
        seed=seed,
        table=table,
        worst_distortion=worst_distortion,
        workload=Workload(slo_s=slo, requests=requests, prefill_share=prefill_share),
        # Without a choice of policies the whole picture is wanted.
        frontiers=not policy,
    )
    links = load_traces(trace_file) if trace_file else cloud_traces(traces, seed)
    with errors.status("simulating") as status:
        result = run_simulation(settings, links, progress=status.update)
    print_simulation(result, console)
    if json_file:
        write_json(json_file, result)
    if html_file:
        write_report(result, html_file)
        console.print(f"report: {html_file}")
    if plot:
        plot_simulation(result, plot)
        console.print(f"chart: {plot}")
