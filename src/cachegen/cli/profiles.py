"""Commands about a model's statistics: ``calibrate`` and ``analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cachegen.cli.common import (
    JsonOption,
    ModelArgument,
    OutOption,
    console,
    errors,
    model_folder,
)
from cachegen.errors import ConfigError

TextOption = Annotated[list[Path], typer.Option(help="Text file; may be given several times.")]
TokensOption = Annotated[int, typer.Option(help="Tokens of text to use at most.")]
ContextOption = Annotated[int, typer.Option(help="Tokens of one context.")]


def register(cli: typer.Typer) -> None:
    """Add the commands to the command line."""
    cli.command()(calibrate)
    cli.command()(analyze)


def calibrate(
    model: ModelArgument,
    text: TextOption,
    output: OutOption,
    tokens: TokensOption = 16_384,
    context: ContextOption = 1024,
    group_layers: Annotated[
        int | None,
        typer.Option(help="Layers one transform joins: 1, 2, 4 or 8; default: by the width."),
    ] = None,
    joint: Annotated[
        str | None, typer.Option(help="K and V in one transform (kv, default), or apart.")
    ] = None,
    components: Annotated[
        float, typer.Option(help="Share of each transform's components to keep.")
    ] = 1.0,
    sensitivity: Annotated[
        bool, typer.Option(help="Weigh errors by gradients of the model's predictions.")
    ] = True,
) -> None:
    """Fit a profile to text: means and bases that make objects of this model much smaller."""
    if joint not in (None, "kv", "apart"):
        raise ConfigError("--joint", got=joint, expected="kv or apart")
    contents = [path.read_text(encoding="utf-8") for path in text]
    if not output.parent.is_dir():
        raise ConfigError("folder", got=output.parent, expected="a folder", remedy="create it")
    with errors.status("loading libraries") as status:
        from cachegen.bench.calibrate import calibrate as fit
        from cachegen.codec.fit import choose_groups
        from cachegen.hf.load import begin_and_text, load_model
        from cachegen.hf.models import geometry_of

        loaded, tokenizer = load_model(model_folder(model))
        groups = choose_groups(geometry_of(loaded), layers=group_layers, joint=joint != "apart")
        tokenized = [begin_and_text(tokenizer, content) for content in contents]
        name = Path(model).name
        profile = fit(
            loaded,
            [ids for _, ids in tokenized],
            model_name=name,
            tokens=tokens,
            context=context,
            begin=tokenized[0][0],
            groups=groups,
            sensitivity=sensitivity,
            components=components,
            progress=status.update,
        )
        profile.save(output)
    refusal = profile.meta.get("no_sensitivity")
    if sensitivity and refusal:
        console.print(f"errors are weighed alike: {refusal}")
    console.print(
        f"{output}: {output.stat().st_size:,} bytes, {len(groups)} groups, "
        f"{profile.meta['calibration_tokens']} tokens, digest {profile.digest.hex()[:16]}"
    )


def analyze(
    model: ModelArgument,
    text: TextOption,
    tokens: TokensOption = 4096,
    context: ContextOption = 1024,
    json_file: JsonOption = None,
) -> None:
    """Show how alike neighbouring tokens are: lag-1 correlation of keys and values per layer."""
    content = _read(text)
    with errors.status("loading libraries"):
        from cachegen.bench.calibrate import captured_contexts, token_redundancy
        from cachegen.bench.report import environment, write_json
        from cachegen.hf.load import begin_and_text, load_model

        loaded, tokenizer = load_model(model_folder(model))
        begin, ids = begin_and_text(tokenizer, content)
        chunks = list(captured_contexts(loaded, ids, tokens=tokens, context=context, begin=begin))
        if not chunks:
            raise ConfigError("text", got=f"{len(ids)} tokens", expected=f"at least {context}")
        rows = token_redundancy(chunks)
    table = Table(title="lag-1 correlation of centred channels (share of energy in the mean)")
    names = ("key_before_rope", "key", "value")
    for heading in ("layer", "K before RoPE", "K as cached", "V"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [
            f"{row[f'{name}_lag1']:.3f} ({row[f'{name}_mean_share']:.0%})"
            if f"{name}_lag1" in row
            else "-"
            for name in names
        ]
        table.add_row(str(int(row["layer"])), *cells)
    console.print(table)
    if json_file:
        write_json(json_file, {"layers": rows, **environment()})


def _read(files: list[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in files)
