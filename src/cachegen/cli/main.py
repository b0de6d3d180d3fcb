"""The ``cachegen`` command. Errors are one line with a remedy; exit 2: bad input, 1: failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cachegen.cli import (
    advise,
    bench,
    config,
    demo,
    doctor,
    evaluate,
    explain,
    exporter,
    profiles,
    simulate,
    store,
)
from cachegen.cli.common import JsonOption, ModelArgument, OutOption, console, errors, model_folder
from cachegen.errors import CacheGenError, InputError

cli = typer.Typer(
    help="Store and move the KV caches of language models as small bitstreams.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def app() -> None:
    """Run the command line; turn errors into one line and an exit code."""
    try:
        cli()
    except InputError as error:
        _fail(error, 2)
    except CacheGenError as error:
        _fail(error, 1)
    except FileNotFoundError as error:
        _fail(f"no such file: {error.filename or error}", 2)
    except IsADirectoryError as error:
        _fail(f"{error.filename} is a folder; pass a file", 2)
    except OSError as error:
        _fail(f"{error.filename or 'I/O'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: object, code: int) -> None:
    errors.print(
        f"[bold red]error:[/] {str(message).replace('[', '(').replace(']', ')')}", soft_wrap=True
    )
    sys.exit(code)


def _write_json(path: Path | None, **content: object) -> None:
    from cachegen.bench.report import write_json

    if path is not None:
        write_json(path, content)


def _status(text: str) -> Any:
    return errors.status(text)


@cli.command()
def capture(
    model: ModelArgument,
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt.")],
    output: OutOption,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    json_file: JsonOption = None,
) -> None:
    """Prefill a prompt and write each layer's K and V to a safetensors file."""
    text = prompt_file.read_text(encoding="utf-8")
    with _status("loading libraries") as status:
        import torch

        from cachegen.hf.capture import capture as capture_kv
        from cachegen.hf.load import load_model
        from cachegen.kvfile import save_kv
        from cachegen.types import KVDtype

        stored = KVDtype.of(dtype)
        status.update("loading the model")
        loaded, tokenizer = load_model(model_folder(model), dtype=torch.float32)
        ids = tokenizer(text)["input_ids"]
        status.update(f"prefilling {len(ids)} tokens")
        entry = capture_kv(loaded, [ids])[0]
        kv = entry.kv.astype(stored)
        save_kv(output, kv, token_ids=entry.token_ids, model_name=entry.model_name)
    console.print(f"{output}: {kv.tokens} tokens, {kv.size_bytes:,} bytes of {stored.label}")
    _write_json(
        json_file, file=output.name, tokens=kv.tokens, bytes=kv.size_bytes, dtype=stored.label
    )


@cli.command()
def encode(
    kv_file: Annotated[Path, typer.Argument(help="What `cachegen capture` wrote.")],
    output: OutOption,
    codec: Annotated[
        str, typer.Option(help="raw, lossless, int8, cachegen or progressive.")
    ] = "cachegen",
    level: Annotated[int | None, typer.Option(help="cachegen: 1 (smallest) to 3.")] = None,
    delta: Annotated[str | None, typer.Option(help="cachegen: none or anchor.")] = None,
    tables: Annotated[
        str | None, typer.Option(help="cachegen: chunk, profile or parametric.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Profile that cachegen calibrate made, or with tables of the cachegen codec."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Encode a captured KV cache into one object."""
    from cachegen.bench.report import write_atomically
    from cachegen.codec.registry import get_codec
    from cachegen.kvfile import load_kv

    settings: dict[str, Any] = {"level": level, "delta": delta, "tables": tables}
    settings = {name: value for name, value in settings.items() if value is not None}
    if profile is not None:
        settings["profile"] = _load_profile(profile)
    chosen = get_codec(codec, **settings)
    with _status("encoding"):
        chunk = load_kv(kv_file).chunk
        data = chosen.encode(chunk)
        write_atomically(output, data)
    bits, ratio = 8 * len(data) / chunk.value_count, chunk.size_bytes / len(data)
    console.print(f"{output}: {len(data):,} bytes, {bits:.3f} bits/value, ratio {ratio:.2f}")
    _write_json(
        json_file,
        file=output.name,
        codec=chosen.config(),
        tokens=chunk.tokens,
        bytes=len(data),
        billed_bits_per_value=bits,
        ratio=ratio,
    )


@cli.command()
def decode(
    object_file: Annotated[Path, typer.Argument(help="A .cgen object.")],
    output: OutOption,
    profile: Annotated[Path | None, typer.Option(help="Profile the object names.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept an object that ends early.")
    ] = False,
    quality: Annotated[
        str | None,
        typer.Option(help="progressive: lossless-in-practice, balanced or small; default: all."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(help="Refuse to decode to more than this.")] = 1 << 30,
    json_file: JsonOption = None,
) -> None:
    """Decode an object into a safetensors file of K and V."""
    from cachegen.codec.container import read_header
    from cachegen.codec.levels import prefix_bytes
    from cachegen.codec.registry import decode as decode_object
    from cachegen.kvfile import save_kv

    with _status("decoding"):
        data = object_file.read_bytes()
        if quality is not None:
            data = data[: prefix_bytes(read_header(data, max_decoded_bytes=max_bytes), quality)]
        chunk = decode_object(
            data,
            allow_partial=allow_partial or quality is not None,
            profile=_load_profile(profile) if profile else None,
            max_decoded_bytes=max_bytes,
        )
        save_kv(output, chunk)
    console.print(f"{output}: {chunk.tokens} tokens, {chunk.size_bytes:,} bytes")
    _write_json(
        json_file,
        file=output.name,
        tokens=chunk.tokens,
        bytes=chunk.size_bytes,
        object_bytes_read=len(data),
    )


def _load_profile(path: Path) -> Any:
    from cachegen.profile import Profile

    return Profile.load(path)


@cli.command()
def inspect(
    object_file: Annotated[Path, typer.Argument(help="A .cgen object.")],
    json_file: JsonOption = None,
) -> None:
    """Show geometry, codec, segments and billed bits/value by layer and K/V."""
    from cachegen.bench.report import write_json
    from cachegen.cli.show import print_summary
    from cachegen.codec.summary import summarize

    summary = summarize(object_file.read_bytes())
    print_summary(summary, console)
    if json_file:
        write_json(json_file, summary.to_json())


@cli.command()
def version() -> None:
    """Print the version, the format version and the instruction set in use."""
    from cachegen import __version__, native
    from cachegen.codec.container import VERSION

    content = {"cachegen": __version__, "format": VERSION, "isa": native.isa()}
    console.print(json.dumps(content))


demo.register(cli)
profiles.register(cli)
store.register(cli)
config.register(cli)
doctor.register(cli)
explain.register(cli)
exporter.register(cli)
evaluate.register(cli)
simulate.register(cli)
bench.register(cli)
advise.register(cli)
