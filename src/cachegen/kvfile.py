"""KV caches in a file that every safetensors reader opens.

Tensors ``layers.{i}.keys`` (T_l, H, key_dim) and ``layers.{i}.values`` (T_l, H, value_dim) in
float16, bfloat16 or float32, and ``token_ids`` (T) int64 where known. Metadata: ``format``,
``version``, ``kv`` (JSON: tokens, first position, first token held per layer, model name, RoPE,
the caller's own entries) and ``crc32`` over ``kv`` and every tensor, which safetensors lacks.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cachegen.atomic import replacing
from cachegen.chunk import KVChunk, LayerKV
from cachegen.errors import (
    ChecksumError,
    CorruptError,
    GeometryError,
    InputError,
    LimitError,
    MagicError,
    TruncatedError,
    VersionError,
)
from cachegen.types import MAX_LAYERS, Array, RopeSpec

FORMAT_NAME = "cachegen-kv"
FORMAT_VERSION = "1"


@dataclass(frozen=True, eq=False)
class KVFile:
    """What a KV file holds.

    chunk: the KV. token_ids: T ids, or None if the file has none. model_name: or None if unknown.
    metadata: the entries that the caller of ``save_kv`` added.
    """

    chunk: KVChunk
    token_ids: tuple[int, ...] | None = None
    model_name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def save_kv(
    path: str | os.PathLike[str],
    chunk: KVChunk,
    *,
    token_ids: Sequence[int] | None = None,
    model_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a chunk to a safetensors file: whole or not at all, replacing an older file.

    chunk: any strides; rows are copied to be contiguous. token_ids: T integers.
    Raises: GeometryError if there are not T token ids. FileWriteError, which is an OSError, or
        FileNotFoundError, if the file cannot be written.
    """
    tensors: dict[str, Array] = {}
    for index, layer in enumerate(chunk.layers):
        tensors[f"layers.{index}.keys"] = np.ascontiguousarray(layer.keys)
        tensors[f"layers.{index}.values"] = np.ascontiguousarray(layer.values)
    if token_ids is not None:
        if len(token_ids) != chunk.tokens:
            raise GeometryError("token ids", got=len(token_ids), expected=chunk.tokens)
        tensors["token_ids"] = np.asarray(token_ids, dtype=np.int64)
    text = json.dumps(
        {
            "tokens": chunk.tokens,
            "first_position": chunk.first_position,
            "begins": [layer.begin for layer in chunk.layers],
            "model_name": model_name,
            "rope": _rope_to_json(chunk.rope),
            "metadata": dict(metadata or {}),
        }
    )
    header = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "kv": text,
        "crc32": _checksum(text, tensors),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            # It has the number of the system's error in its text alone.
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise OSError(str(error)) from error
            number = int(found[1])
            raise OSError(number, os.strerror(number), os.fspath(path)) from error


def load_kv(path: str | os.PathLike[str]) -> KVFile:
    """Read what ``save_kv`` wrote; arrays are (T_l, H, D) in the dtype that was saved.

    Raises: FileNotFoundError; MagicError if the file is not of this format; VersionError;
        TruncatedError; ChecksumError; LimitError; CorruptError if its fields contradict each other.
    """
    source = Path(path)
    if source.is_dir():
        raise IsADirectoryError(f"{source} is a directory, expected a KV file")
    try:
        with safe_open(source, framework="np") as file:
            header = file.metadata() or {}
            text = _check_header(header)
            tensors: dict[str, Array] = {
                name: file.get_tensor(name) for name in sorted(file.keys())
            }
    except (SafetensorError, KeyError) as error:
        raise _diagnose(source, error) from error
    if _checksum(text, tensors) != header.get("crc32"):
        raise ChecksumError(
            "checksum of the KV file",
            got=_checksum(text, tensors),
            expected=header.get("crc32"),
            remedy="the file is damaged: capture it again",
        )
    return _build(text, tensors)


def _check_header(header: Mapping[str, str]) -> str:
    if header.get("format") != FORMAT_NAME:
        raise MagicError(
            "safetensors format entry",
            got=header.get("format"),
            expected=FORMAT_NAME,
            remedy="pass a file that save_kv wrote",
        )
    if header.get("version") != FORMAT_VERSION:
        raise VersionError("KV file version", got=header.get("version"), expected=FORMAT_VERSION)
    if "kv" not in header:
        raise CorruptError("KV file header", got="no kv entry", expected="one")
    return header["kv"]


def _build(text: str, tensors: dict[str, Array]) -> KVFile:
    try:
        fields: dict[str, Any] = json.loads(text)
        begins = [int(begin) for begin in fields["begins"]]
        tokens, first = int(fields["tokens"]), int(fields["first_position"])
        rope = _rope_from_json(fields["rope"])
        name, extra = fields["model_name"], dict(fields["metadata"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError("KV file header", got=repr(error), expected="its fields") from error
    if len(begins) > MAX_LAYERS:
        raise LimitError("layers", got=len(begins), expected=f"at most {MAX_LAYERS}")
    expected = {f"layers.{i}.{side}" for i in range(len(begins)) for side in ("keys", "values")}
    if set(tensors) - {"token_ids"} != expected:
        raise CorruptError(
            "tensors of the KV file",
            got=f"{len(set(tensors) ^ (expected | {'token_ids'}))} missing or unknown names",
            expected=f"keys and values of {len(begins)} layers",
        )
    layers = [
        LayerKV(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"], begin)
        for i, begin in enumerate(begins)
    ]
    try:
        chunk = KVChunk.from_layers(layers, tokens=tokens, first_position=first, rope=rope)
    except InputError as error:
        raise CorruptError("KV file", got=str(error), expected="consistent layers") from error
    ids: tuple[int, ...] | None = None
    if "token_ids" in tensors:
        array = tensors["token_ids"]
        if array.shape != (tokens,) or array.dtype != np.int64:
            raise CorruptError(
                "token ids", got=(array.shape, array.dtype), expected=((tokens,), "int64")
            )
        ids = tuple(int(token) for token in array)
    return KVFile(chunk, ids, name, extra)


def _rope_to_json(rope: RopeSpec | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    return {
        "frequencies": [list(kind) for kind in rope.frequencies],
        "attention_scale": list(rope.attention_scale),
        "layer_kinds": list(rope.layer_kinds),
        "interleaved": rope.interleaved,
    }


def _rope_from_json(fields: dict[str, Any] | None) -> RopeSpec | None:
    if fields is None:
        return None
    return RopeSpec(
        frequencies=tuple(tuple(float(f) for f in kind) for kind in fields["frequencies"]),
        attention_scale=tuple(float(scale) for scale in fields["attention_scale"]),
        layer_kinds=tuple(int(kind) for kind in fields["layer_kinds"]),
        interleaved=bool(fields["interleaved"]),
    )


def _checksum(text: str, tensors: Mapping[str, Array]) -> str:
    """CRC-32 over the JSON and, in order of their names, each tensor's description and bytes."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        crc = zlib.crc32(f"{name} {array.dtype.name} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _diagnose(path: Path, error: Exception) -> InputError:
    """Say which way a file that the safetensors reader refused is broken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(9)
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        if head[8:9] not in (b"", b"{"):
            return MagicError("KV file", got="not a safetensors file", expected="one of save_kv")
        if len(head) < 9 or 8 + length > size:
            return TruncatedError("KV file", got=f"{size} bytes", expected=f"over {8 + length}")
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            end = 0
    if 8 + length + end > size:
        return TruncatedError("KV file", got=f"{size} bytes", expected=f"{8 + length + end}")
    return CorruptError("KV file", got=str(error), expected="a sound safetensors file")
