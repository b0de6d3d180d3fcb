"""The ``exporter`` command: counters of connectors and the state of a store, for Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachegen.cli import config
from cachegen.cli.common import console
from cachegen.errors import ConfigError
from cachegen.units import parse_seconds


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command()(exporter)


def exporter(
    store: Annotated[
        str | None, typer.Option(help="URL of a store to watch; default: that of the settings.")
    ] = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="Folder where connectors leave their counters.")
    ] = None,
    config_file: config.ConfigOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9402,
    list_every: Annotated[str, typer.Option(help="How often the store is listed.")] = "5min",
    once: Annotated[bool, typer.Option("--once", help="Print the metrics and end.")] = False,
) -> None:
    """Serve requests, hits, tokens, bytes, times and failures by reason under /metrics."""
    from cachegen.connectors.exporter import MetricsServer, StoreWatch, read_snapshots
    from cachegen.connectors.metrics import render
    from cachegen.store import open_store

    loaded = config.load(config_file, None, store=store)
    folder = snapshots or (Path(loaded.metrics_folder) if loaded.metrics_folder else None)
    if loaded.store is None and folder is None:
        raise ConfigError("what to export", got="nothing", expected="--store or --snapshots")
    watch = None
    if loaded.store is not None:
        watch = StoreWatch(open_store(loaded.store), list_every_s=parse_seconds(list_every))

    def collect() -> str:
        text = "" if folder is None else render(read_snapshots(folder))
        return text + ("" if watch is None else watch.render())

    if once:
        console.print(collect(), markup=False, highlight=False, soft_wrap=True, end="")
        return
    server = MetricsServer(collect, host=host, port=port)
    console.print(f"http://{host}:{server.port}/metrics")
    try:
        server.run()
    finally:
        server.close()
