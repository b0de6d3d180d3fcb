"""Commands on stores: ``put``, ``get``, ``ls``, ``rm``, ``du``, ``gc`` and ``verify``."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
)
from rich.table import Table

from cachegen.cli.common import JsonOption, OutOption, console, errors
from cachegen.errors import ConfigError, CorruptError
from cachegen.units import format_size, parse_seconds, parse_size

if TYPE_CHECKING:
    from cachegen.cli.objects import Finding
    from cachegen.store import Entry, Store

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="redis://..., s3://..., file:///folder or a folder.")
]
PrefixOption = Annotated[str, typer.Option("--prefix", help="Only names that begin so.")]
ProfileOption = Annotated[Path | None, typer.Option(help="Profile, to decode with it.")]
_STREAM_BYTES = 1 << 20


def register(cli: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (put, get, ls, rm, du, gc, verify):
        cli.command()(command)


def put(
    store: StoreArgument,
    files: Annotated[list[Path], typer.Argument(help="Files; objects or anything else.")],
    name: Annotated[
        str | None,
        typer.Option(help="Name in the store; default: an object's key or the file's."),
    ] = None,
    if_absent: Annotated[
        bool, typer.Option("--if-absent", help="Leave values alone that are there already.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Store files."""
    if name is not None and len(files) > 1:
        raise ConfigError("--name", got=f"{len(files)} files", expected="one")
    rows = []
    with _opened(store) as opened:
        total = sum(path.stat().st_size for path in files)
        with _bytes_bar("storing", total) as bar:
            for path in files:
                data = path.read_bytes()
                target = name or _name_of(path, data)
                stored = True
                if if_absent:
                    stored = _creating(opened).put_if_absent(target, data)
                else:
                    opened.put(target, data)
                bar.advance(bar.task_ids[0], len(data))
                rows.append({"name": target, "bytes": len(data), "stored": stored})
    for row in rows:
        note = "" if row["stored"] else " (there already)"
        console.print(f"{row['name']}  {row['bytes']:,} bytes{note}", soft_wrap=True)
    _write(json_file, {"stored": rows})


def get(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(help="Name in the store.")],
    output: OutOption,
    json_file: JsonOption = None,
) -> None:
    """Read a value into a file."""
    from cachegen.bench.report import write_atomically
    from cachegen.store import StreamingStore

    with _opened(store) as opened, _bytes_bar("reading", None) as bar:
        if isinstance(opened, StreamingStore):
            slices = opened.get_stream(name, slice_bytes=_STREAM_BYTES)
            data = None if slices is None else _joined(slices, bar)
        else:
            data = opened.get(name)
    if data is None:
        raise ConfigError(
            "name in the store", got=name, expected="one that is there", remedy="see cachegen ls"
        )
    write_atomically(output, data)
    console.print(f"{output}: {len(data):,} bytes")
    _write(json_file, {"name": name, "file": output.name, "bytes": len(data)})


def ls(
    store: StoreArgument,
    prefix: PrefixOption = "",
    limit: Annotated[int, typer.Option(help="Names to show at most; JSON has all.")] = 1000,
    json_file: JsonOption = None,
) -> None:
    """List names, sizes and last uses."""
    entries = sorted(_entries(store, prefix), key=lambda entry: entry.name)
    now_s = time.time()
    for entry in entries[:limit]:
        console.print(
            f"{entry.size_bytes:>12,}  {_age(now_s - entry.used_s):>6}  {entry.name}",
            soft_wrap=True,
            highlight=False,
        )
    if len(entries) > limit:
        console.print(f"... and {len(entries) - limit:,} more")
    console.print(f"{len(entries):,} values, {format_size(_sum(entries))}")
    rows = [
        {"name": entry.name, "bytes": entry.size_bytes, "used": round(entry.used_s, 3)}
        for entry in entries
    ]
    _write(json_file, {"values": rows, "bytes": _sum(entries)})


def rm(
    store: StoreArgument,
    names: Annotated[list[str] | None, typer.Argument(help="Names to delete.")] = None,
    prefix: PrefixOption = "",
    yes: Annotated[bool, typer.Option("--yes", help="Delete what --prefix finds.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Delete values by name, or with --prefix and --yes all that begin so."""
    if bool(names) == bool(prefix):
        raise ConfigError("what to delete", got=names or "nothing", expected="names or --prefix")
    doomed = list(names or (entry.name for entry in _entries(store, prefix)))
    if prefix and not yes:
        console.print(f"{len(doomed):,} values would be deleted; pass --yes to do it")
        _write(json_file, {"deleted": [], "would_delete": doomed})
        return
    with _opened(store) as opened:
        for name in _tracked(doomed, "deleting"):
            opened.delete(name)
    console.print(f"{len(doomed):,} deleted")
    _write(json_file, {"deleted": doomed})


def du(store: StoreArgument, prefix: PrefixOption = "", json_file: JsonOption = None) -> None:
    """Show bytes, values and last use of each namespace (model, rank, chunk size)."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    latest: dict[str, float] = {}
    for entry in _entries(store, prefix):
        namespace = entry.name.partition("/")[0]
        counts[namespace] += 1
        sizes[namespace] += entry.size_bytes
        latest[namespace] = max(latest.get(namespace, 0.0), entry.used_s)
    table = Table()
    for heading, justify in (("namespace", "left"), ("values", "right"), ("bytes", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("last use", justify="right")
    now_s = time.time()
    for namespace, size_bytes in sizes.most_common():
        shown = namespace if len(namespace) <= 20 else f"{namespace[:16]}..."
        cells = (f"{counts[namespace]:,}", format_size(size_bytes))
        table.add_row(shown, *cells, f"{_age(now_s - latest[namespace])} ago")
    console.print(table)
    console.print(f"{counts.total():,} values, {format_size(sizes.total())}")
    rows = [
        {
            "namespace": namespace,
            "values": counts[namespace],
            "bytes": size,
            "used": latest[namespace],
        }
        for namespace, size in sizes.most_common()
    ]
    _write(json_file, {"namespaces": rows, "bytes": sizes.total(), "values": counts.total()})


def gc(
    store: StoreArgument,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Delete what was not used for so long: 7d.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Delete the least recently used beyond this: 50GiB."),
    ] = None,
    broken: Annotated[
        bool, typer.Option("--broken", help="Read everything and delete what is damaged.")
    ] = False,
    prefix: PrefixOption = "",
    yes: Annotated[bool, typer.Option("--yes", help="Delete; otherwise only say what.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Delete what is old, too much or broken; without --yes only show what that would be."""
    from cachegen.cli.objects import BROKEN, Checker, Doomed, doomed_entries

    if older_than is None and keep is None and not broken:
        raise ConfigError(
            "what to collect", got="nothing", expected="--older-than, --keep, --broken"
        )
    older_than_s = None if older_than is None else parse_seconds(older_than)
    keep_bytes = None if keep is None else parse_size(keep)
    entries = _entries(store, prefix)
    with _opened(store) as opened:
        doomed: list[Doomed] = []
        if broken:
            checker = Checker(opened)
            for entry in _tracked(entries, "checking"):
                if checker.check(entry.name).state == BROKEN:
                    doomed.append(Doomed(entry, "broken"))
        gone = {item.entry.name for item in doomed}
        rest = [entry for entry in entries if entry.name not in gone]
        doomed += doomed_entries(
            rest, now_s=time.time(), older_than_s=older_than_s, keep_bytes=keep_bytes
        )
        if yes:
            for item in _tracked(doomed, "deleting"):
                opened.delete(item.entry.name)
    reasons = Counter(item.reason for item in doomed)
    freed = format_size(_sum(item.entry for item in doomed))
    why = ", ".join(f"{count:,} for {reason}" for reason, count in reasons.items()) or "nothing"
    verb = "deleted" if yes else "would be deleted; pass --yes to do it"
    console.print(f"{len(doomed):,} of {len(entries):,} values, {freed}, {verb} ({why})")
    rows = [
        {"name": item.entry.name, "bytes": item.entry.size_bytes, "reason": item.reason}
        for item in doomed
    ]
    _write(json_file, {"deleted" if yes else "would_delete": rows, "values": len(entries)})


def verify(
    target: Annotated[
        str, typer.Argument(metavar="OBJECT", help="A .cgen object, or a store to check whole.")
    ],
    profile: ProfileOption = None,
    max_bytes: Annotated[int, typer.Option(help="Refuse to decode to more than this.")] = 1 << 30,
    prefix: PrefixOption = "",
    json_file: JsonOption = None,
) -> None:
    """Check every checksum and decode: one object or a whole store; exit 2 if anything is wrong."""
    from cachegen.profile import Profile

    loaded = Profile.load(profile) if profile else None
    if _is_store(target):
        _verify_store(target, loaded, max_bytes, prefix, json_file)
    else:
        _verify_file(Path(target), loaded, max_bytes, json_file)


def _verify_file(path: Path, profile: Any, max_bytes: int, json_file: Path | None) -> None:
    from cachegen.codec.registry import decode
    from cachegen.codec.summary import summarize

    data = path.read_bytes()
    summary = summarize(data)
    decoded = summary.header.profile is None or profile is not None
    if decoded:
        decode(data, profile=profile, max_decoded_bytes=max_bytes)
    how = "decodes" if decoded else "checksums right (pass --profile to decode it too)"
    console.print(f"{path}: sound, {how}")
    _write(json_file, {"file": path.name, "sound": True, "decoded": decoded})


def _verify_store(
    url: str, profile: Any, max_bytes: int, prefix: str, json_file: Path | None
) -> None:
    from cachegen.cli.objects import BROKEN, Checker

    entries = _entries(url, prefix)
    with _opened(url) as opened:
        checker = Checker(opened, profile=profile, max_decoded_bytes=max_bytes)
        findings: list[Finding] = [
            checker.check(entry.name) for entry in _tracked(entries, "checking")
        ]
    states = Counter(finding.state for finding in findings)
    for finding in findings:
        if finding.state == BROKEN:
            console.print(f"broken: {finding.name}: {finding.detail}", soft_wrap=True, markup=False)
    listed = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    console.print(f"{len(findings):,} values: {listed or 'none'}")
    rows = [
        {"name": item.name, "bytes": item.size_bytes, "state": item.state, "detail": item.detail}
        for item in findings
    ]
    _write(json_file, {"values": rows, "states": dict(states), "sound": not states[BROKEN]})
    if states[BROKEN]:
        raise CorruptError(
            "store",
            got=f"{states[BROKEN]} broken values",
            remedy="cachegen gc --broken --yes deletes them",
        )


# -- shared ---------------------------------------------------------------------------------------


@contextmanager
def _opened(url: str) -> Iterator[Store]:
    from cachegen.store import open_store

    store = open_store(url)
    try:
        yield store
    finally:
        close = getattr(store, "close", None)
        if close is not None:
            close()


def _entries(url: str, prefix: str) -> list[Entry]:
    from cachegen.cli.objects import catalog

    with _opened(url) as opened, errors.status("listing"):
        return list(catalog(opened).entries(prefix))


def _is_store(target: str) -> bool:
    from cachegen.store.ledger import MARKER

    return ":" in target.partition("/")[0] or os.path.exists(os.path.join(target, MARKER))


def _creating(store: Store) -> Any:
    from cachegen.store import CreatingStore

    if not isinstance(store, CreatingStore):
        raise ConfigError("store", got=type(store).__name__, expected="one that can create")
    return store


def _name_of(path: Path, data: bytes) -> str:
    from cachegen.codec.container import read_header
    from cachegen.errors import FormatError

    try:
        key = read_header(data, max_decoded_bytes=1 << 62).key
    except FormatError:
        key = None
    return path.name if key is None else key.name


def _joined(slices: Iterable[memoryview], bar: Progress) -> bytes:
    parts = []
    for part in slices:
        parts.append(part)
        bar.advance(bar.task_ids[0], len(part))
    return b"".join(parts)


def _bytes_bar(text: str, total: int | None) -> Progress:
    bar = _bar(TextColumn(text), BarColumn(), DownloadColumn())
    bar.add_task(text, total=total)
    return bar


def _bar(*columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


def _tracked(items: Iterable[Any], text: str) -> Iterator[Any]:
    held = list(items)
    with _bar(TextColumn(text), BarColumn(), MofNCompleteColumn()) as bar:
        yield from bar.track(held, total=len(held))


def _age(seconds: float) -> str:
    for size_s, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _sum(entries: Iterable[Entry]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _write(path: Path | None, content: dict[str, Any]) -> None:
    from cachegen.bench.report import write_json

    if path is not None:
        write_json(path, content)
