"""Gathering settings: flag over environment over file over default.

Flags are what an engine passes on (vLLM's ``kv_connector_extra_config``). The environment has
``CACHEGEN_SLO_S`` and the like. The file is YAML or JSON; ``CACHEGEN_CONFIG_FILE`` names it.
LMCache's names are understood in all three (lmcache.py). A name that nobody knows is an error.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cachegen.errors import ConfigError
from cachegen.settings import lmcache
from cachegen.settings.lmcache import Said
from cachegen.settings.model import NAMES, Settings, read

ENV_PREFIX = "CACHEGEN_"
CONFIG_FILE = "CACHEGEN_CONFIG_FILE"
# Variables with our prefix that are no settings of a connector.
_OTHER_VARIABLES = frozenset(
    f"{ENV_PREFIX}{name}"
    for name in ("CONFIG_FILE", "ISA", "DEVICE", "KERNEL", "SANITIZE", "REQUIRE_CUDA", "X")
)
_Level = dict[str, Said]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Gather settings: flag over environment over file over default.

    flags: by name, ours or LMCache's (``chunk_size`` or ``lmcache.chunk_size``); values as JSON
        has them or as text.
    file: YAML or JSON; None for the one that CACHEGEN_CONFIG_FILE or LMCACHE_CONFIG_FILE names.
    environ: instead of the environment of this process.
    Raises: ConfigError for an unknown name or a bad value, FileNotFoundError.
    """
    variables = os.environ if environ is None else environ
    chosen = file or variables.get(CONFIG_FILE) or variables.get(lmcache.CONFIG_FILE)
    levels = (
        _flag_level(flags or {}),
        _environment_level(variables),
        _file_level(Path(chosen)) if chosen else {},
    )
    return _combine(levels)


def _flag_level(flags: Mapping[str, Any]) -> _Level:
    level = {}
    for key, value in flags.items():
        name = key.removeprefix("lmcache.")
        _check_known(name, f"flag {key}")
        level[name] = Said(value, f"flag: {key}", 0)
    return level


def _environment_level(variables: Mapping[str, str]) -> _Level:
    level: _Level = {}
    for variable, value in sorted(variables.items()):
        source = f"environment: {variable}"
        if variable.startswith(ENV_PREFIX) and variable not in _OTHER_VARIABLES:
            name = variable.removeprefix(ENV_PREFIX).lower()
            _check_known(name, f"environment variable {variable}", prefix=ENV_PREFIX)
            level[name] = Said(value, source, 1)
        elif variable.startswith(lmcache.ENV_PREFIX) and variable != lmcache.CONFIG_FILE:
            name = variable.removeprefix(lmcache.ENV_PREFIX).lower()
            if name in lmcache.NAMES:
                level.setdefault(name, Said(value, source, 1))
            elif close := difflib.get_close_matches(name, lmcache.NAMES, 1, cutoff=0.85):
                # LMCache reads more than is its configuration; only what looks like a slip fails.
                raise ConfigError(
                    f"environment variable {variable}",
                    got="a name that is not known",
                    remedy=f"did you mean {lmcache.ENV_PREFIX}{close[0].upper()}?",
                )
    return level


def _file_level(path: Path) -> _Level:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"configuration file {path}", got=text, expected="YAML") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"configuration file {path}",
            got=type(content).__name__,
            expected="names and values, such as 'slo_s: 1.0'",
        )
    level = {}
    for key, value in content.items():
        _check_known(str(key), f"name {key!r} in {path}")
        level[str(key)] = Said(value, f"file: {path}: {key}", 2)
    return level


def _check_known(name: str, what: str, *, prefix: str = "") -> None:
    if name in NAMES or name in lmcache.NAMES:
        return
    close = difflib.get_close_matches(name, [*NAMES, *lmcache.NAMES], 1)
    shown = prefix + (close[0].upper() if prefix and close else close[0] if close else "")
    raise ConfigError(
        what,
        got="a name that is not known",
        expected=None if close else "one of " + ", ".join(NAMES),
        remedy=f"did you mean {shown}?" if close else None,
    )


def _combine(levels: Iterable[_Level]) -> Settings:
    said: _Level = {}
    for level in levels:
        said = level | said  # what is there already is from a stronger level
    values = {name: entry for name, entry in said.items() if name in NAMES}
    foreign = {name: entry for name, entry in said.items() if name not in NAMES}
    notes: list[str] = []
    for name, entry in lmcache.translate(foreign, notes).items():
        ours = values.get(name)
        if ours is None or entry.rank < ours.rank:
            values[name] = entry
        else:
            notes.append(f"{entry.source} has no effect: {name} is set by {ours.source}")
    return Settings(
        **{name: read(name, entry.value, entry.source) for name, entry in values.items()},
        sources={name: entry.source for name, entry in values.items()},
        notes=tuple(notes),
    )
