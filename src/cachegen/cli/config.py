"""The ``config show`` command: every setting, its value, and where that is from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cachegen.cli.common import JsonOption, console
from cachegen.errors import ConfigError

if TYPE_CHECKING:
    from cachegen.settings import Settings

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings; default: CACHEGEN_CONFIG_FILE's."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, as a flag; several times."),
]

config = typer.Typer(help="Settings of connectors.", no_args_is_help=True)


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.add_typer(config, name="config")


@config.command()
def show(
    config_file: ConfigOption = None, settings: SetOption = None, json_file: JsonOption = None
) -> None:
    """Print each setting with its source: flag over environment over file over default."""
    from cachegen.bench.report import write_json
    from cachegen.settings.model import NAMES
    from cachegen.store.open import redact

    loaded = load(config_file, settings)
    table = Table()
    for heading in ("setting", "value", "source"):
        table.add_column(heading, overflow="fold")
    values = loaded.config()
    if loaded.store is not None:
        values["store"] = redact(loaded.store)
    for name in NAMES:
        shown = "-" if values[name] is None else str(values[name])
        table.add_row(name, shown, loaded.source(name))
    console.print(table)
    for note in loaded.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if json_file:
        rows = {name: {"value": values[name], "source": loaded.source(name)} for name in NAMES}
        write_json(json_file, {"settings": rows, "notes": list(loaded.notes)})
    check(loaded)


def load(config_file: Path | None, flags: Sequence[str] | None, **more: Any) -> Settings:
    """Gather settings of a command; more: flags of its own, None for one that was not given."""
    from cachegen.settings import load_settings

    said: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
    for flag in flags or ():
        name, equals, value = flag.partition("=")
        if not equals:
            raise ConfigError("--set", got=flag, expected="NAME=VALUE")
        said[name] = value
    return load_settings(said, file=config_file)


def check(settings: Settings) -> None:
    """Check what can be checked without a model or a store. Raises: ConfigError and others."""
    from cachegen.connectors.adapter import policy_of
    from cachegen.connectors.coding import Coding
    from cachegen.profile import Profile

    policy_of(settings, Coding.choose(settings.quality, codec=settings.codec))
    if settings.profile not in ("auto", "none"):
        Profile.load(settings.profile)
