"""The ``explain`` command: why a prompt hits or misses in a store."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachegen.cli import config
from cachegen.cli.common import JsonOption, ModelArgument, console, errors, model_folder
from cachegen.errors import ConfigError, FormatError
from cachegen.types import KVDtype

if TYPE_CHECKING:
    from cachegen.cli.identity import Serving
    from cachegen.settings import Settings
    from cachegen.store import Store

_HEADER_BYTES = 1 << 16
_MAX_OTHERS = 8
# Time to try other ways of serving the model, each of which measures its identity anew.
_SEARCH_S = 15.0


def register(cli: typer.Typer) -> None:
    """Add the command to the command line."""
    cli.command()(explain)


@dataclass(frozen=True)
class ChunkState:
    """One chunk of the prompt. names: one per rank; present: which of them the store has.

    other_codecs: names of the same tokens, coded otherwise.
    """

    index: int
    begin: int
    end: int
    names: tuple[str, ...]
    present: tuple[bool, ...]
    other_codecs: tuple[str, ...] = ()

    @property
    def is_hit(self) -> bool:
        """True if every rank has its object."""
        return all(self.present)


def explain(
    model: ModelArgument,
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt.")],
    store: Annotated[
        str | None, typer.Option(help="URL of the store; default: that of the settings.")
    ] = None,
    config_file: config.ConfigOption = None,
    settings: config.SetOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the served model; default: its configuration's.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share a layer.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages of layers.")] = 1,
    cache_salt: Annotated[str, typer.Option(help="The request's cache_salt.")] = "",
    lora: Annotated[Path | None, typer.Option(help="Folder of the request's adapter.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Say chunk by chunk what a store has of a prompt, and what comes near where it has nothing."""
    from cachegen.bench.report import write_json

    loaded = config.load(config_file, settings, store=store)
    if loaded.store is None:
        raise ConfigError("store", got="none", expected="a URL", remedy="pass --store")
    text = prompt_file.read_text(encoding="utf-8")
    with errors.status("loading libraries") as status:
        from cachegen.cli.identity import Serving, model_dtype, namespaces_of, read_tokens
        from cachegen.store import open_store

        folder = model_folder(model)
        label = KVDtype.of(dtype).label if dtype else model_dtype(folder)
        tokens = read_tokens(folder, text)
        serving = Serving(folder, label, loaded.chunk_tokens, tensor_parallel, pipeline_parallel)
        status.update("identifying the model")
        namespaces = namespaces_of(serving)
        status.update("asking the store")
        opened = open_store(loaded.store)
        chunks = look_up(opened, tokens, namespaces, loaded, salt=cache_salt, lora=lora)
        others = near_misses(opened, serving, namespaces) if not _all_hit(chunks) else []
    hits = leading_hits(chunks)
    _print(chunks, hits, tokens=len(tokens), settings=loaded)
    verdict = explain_first_miss(chunks, hits, others)
    console.print(verdict, soft_wrap=True, markup=False)
    for other in others:
        console.print(f"  {other}", soft_wrap=True, markup=False, highlight=False)
    if json_file:
        rows = [
            {"chunk": chunk.index, "tokens": [chunk.begin, chunk.end], "names": chunk.names}
            | {"present": chunk.present, "other_codecs": chunk.other_codecs}
            for chunk in chunks
        ]
        write_json(
            json_file,
            {
                "tokens": len(tokens),
                "hit_tokens": hits * loaded.chunk_tokens,
                "namespaces": [namespace.hex() for namespace in namespaces],
                "chunks": rows,
                "verdict": verdict,
                "others": others,
            },
        )


def look_up(
    store: Store,
    tokens: Sequence[int],
    namespaces: Sequence[bytes],
    settings: Settings,
    *,
    salt: str = "",
    lora: Path | None = None,
) -> list[ChunkState]:
    """Ask a store for every chunk of a prompt, under the names that the connector uses.

    Raises: ConfigError, UnknownCodecError, StoreError, FileNotFoundError.
    """
    import json
    from types import SimpleNamespace

    from cachegen.connectors import vllm_model
    from cachegen.connectors.adapter import names_of
    from cachegen.connectors.coding import Coding
    from cachegen.connectors.lookup import Seed
    from cachegen.store import CatalogStore

    coding = Coding.choose(settings.quality, codec=settings.codec)
    parts = (settings.tenant, salt)
    adapter = None if lora is None else SimpleNamespace(lora_path=str(lora))
    seed = Seed(
        lora=vllm_model.lora_digest(adapter),
        tenant=json.dumps(parts).encode() if any(parts) else b"",
    )
    size = settings.chunk_tokens
    chains = seed.chains(tokens, size)
    names = [tuple(names_of(namespaces, chain, coding.label)) for chain in chains]
    flat = store.exists([name for group in names for name in group])
    chunks = []
    for index, group in enumerate(names):
        present = tuple(flat[index * len(group) : (index + 1) * len(group)])
        coded_otherwise: list[str] = []
        if not all(present) and isinstance(store, CatalogStore):
            folder = group[0].rpartition("/")[0] + "/"
            coded_otherwise = [entry.name for entry in store.entries(folder)]
        chunks.append(
            ChunkState(
                index,
                index * size,
                (index + 1) * size,
                group,
                present,
                tuple(name for name in coded_otherwise if name not in group),
            )
        )
    return chunks


def leading_hits(chunks: Sequence[ChunkState]) -> int:
    """Return how many chunks from the front are there: what comes after a gap is of no use."""
    hits = 0
    while hits < len(chunks) and chunks[hits].is_hit:
        hits += 1
    return hits


def explain_first_miss(chunks: Sequence[ChunkState], hits: int, others: Sequence[str] = ()) -> str:
    """Say in a sentence why loading stops where it does."""
    if not chunks:
        return "the prompt is shorter than a chunk, and only whole chunks are stored"
    if hits == len(chunks):
        return "all whole chunks are there"
    chunk = chunks[hits]
    if any(chunk.present):
        missing = [rank for rank, there in enumerate(chunk.present) if not there]
        return f"chunk {chunk.index}: ranks {missing} have not saved their part, or it was dropped"
    if chunk.other_codecs:
        return (
            f"chunk {chunk.index} is there, but coded otherwise: quality or codec of the settings "
            "differ from the writer's"
        )
    if hits:
        later = sum(other.is_hit for other in chunks[hits:])
        more = f"; {later} later ones are there but unreachable: it was dropped" if later else ""
        return (
            f"chunk {chunk.index} is absent although {hits} before it are there: the prompts "
            f"differ in tokens {chunk.begin} to {chunk.end}, or nobody has saved that far{more}"
        )
    if others:
        return "nothing of this prompt is there; the store holds"
    return "nothing of this prompt is there, and nothing else in the store comes near"


def near_misses(store: Store, serving: Serving, namespaces: Sequence[bytes]) -> list[str]:
    """Describe the namespaces of a store and how they differ from the one that was asked for."""
    from cachegen.cli.identity import likely_variants, namespaces_of
    from cachegen.cli.objects import is_object_name
    from cachegen.store import CatalogStore

    if not isinstance(store, CatalogStore):
        return []
    counts: dict[str, int] = defaultdict(int)
    samples: dict[str, str] = {}
    for entry in store.entries():
        if is_object_name(entry.name):
            namespace = entry.name.partition("/")[0]
            counts[namespace] += 1
            samples.setdefault(namespace, entry.name)
    if not counts:
        return []
    own = {namespace.hex() for namespace in namespaces}
    foreign = set(counts) - own
    known: dict[str, str] = {}
    give_up = time.monotonic() + _SEARCH_S
    for variant in likely_variants(serving) if foreign else ():
        for candidate in namespaces_of(variant):
            known.setdefault(candidate.hex(), f"this model with {serving.differs(variant)}")
        if foreign <= known.keys() or time.monotonic() > give_up:
            break
    lines = []
    for namespace, count in sorted(counts.items(), key=lambda item: -item[1])[:_MAX_OTHERS]:
        if namespace in own:
            what = "this model as asked for, but other prompts, tenants, salts or adapters"
        else:
            what = known.get(namespace) or _described(store, samples[namespace])
        lines.append(f"{namespace[:16]}: {count:,} chunks of {what}")
    if len(counts) > _MAX_OTHERS:
        lines.append(f"... and {len(counts) - _MAX_OTHERS} other namespaces")
    return lines


def _described(store: Store, name: str) -> str:
    """Describe the model behind a namespace by the header of one of its objects."""
    from cachegen.codec.container import read_header

    data = store.get_range(name, 0, _HEADER_BYTES)
    try:
        header = read_header(data or b"", max_decoded_bytes=1 << 62)
    except FormatError as error:
        return f"something that cannot be read ({error.what})"
    shape = header.geometry
    return (
        f"other weights, RoPE or ranks: {shape.layers} layers, {shape.kv_heads} KV heads of "
        f"{shape.key_dim}, {shape.dtype.label}, chunks of {header.tokens} tokens"
    )


def _all_hit(chunks: Sequence[ChunkState]) -> bool:
    return bool(chunks) and all(chunk.is_hit for chunk in chunks)


def _print(chunks: Sequence[ChunkState], hits: int, *, tokens: int, settings: Any) -> None:
    for chunk in chunks:
        if chunk.is_hit:
            state = "hit" if chunk.index < hits else "there, but after a gap"
        elif any(chunk.present):
            state = f"{sum(chunk.present)} of {len(chunk.present)} ranks"
        else:
            state = "coded otherwise" if chunk.other_codecs else "absent"
        name = chunk.names[0]
        short = "/".join(part[:12] for part in name.split("/"))
        console.print(
            f"chunk {chunk.index:>3}  tokens {chunk.begin:>6}-{chunk.end:<6} {state:<22} {short}",
            highlight=False,
            soft_wrap=True,
        )
    size = settings.chunk_tokens
    console.print(
        f"{tokens:,} tokens, {len(chunks)} whole chunks of {size}: {hits * size:,} tokens hit"
    )
