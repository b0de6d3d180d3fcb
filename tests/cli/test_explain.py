"""``explain`` on the reference model, with a store that holds what its connector would save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_commands import run

from cachegen.cli.identity import Serving, _stage, likely_variants, namespaces_of, read_tokens
from cachegen.connectors.adapter import names_of
from cachegen.connectors.coding import Coding
from cachegen.connectors.lookup import Seed
from cachegen.store import LocalStore

MODEL = str(Path(__file__).parents[2] / "models" / "reference")
TEXT = (Path(MODEL) / "demo_prompt.txt").read_text(encoding="utf-8")
SERVING = Serving(MODEL, "bfloat16", 64)
LABEL = Coding.choose("balanced").label


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return read_tokens(MODEL, TEXT)


@pytest.fixture(scope="module")
def namespaces() -> list[bytes]:
    return namespaces_of(SERVING)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "s")


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def save(
    store: LocalStore, namespaces: list[bytes], tokens: list[int], **seed: Any
) -> list[list[str]]:
    """Save stand-ins for all whole chunks. Returns: the names by chunk."""
    chains = Seed(**seed).chains(tokens, 64)
    names = [names_of(namespaces, chain, LABEL) for chain in chains]
    for group in names:
        for name in group:
            store.put(name, b"chunk")
    return names


def explained(store: LocalStore, prompt: Path, tmp_path: Path, *more: object) -> Any:
    report = tmp_path / "e.json"
    arguments = ("explain", MODEL, "--prompt-file", prompt, "--store", store.path)
    run(*arguments, "--set", "chunk_tokens=64", "--json", report, *more)
    return json.loads(report.read_text())


def test_hits_and_gaps(store, prompt, tmp_path, tokens, namespaces) -> None:
    names = save(store, namespaces, tokens)
    report = explained(store, prompt, tmp_path)
    assert report["hit_tokens"] == 64 * len(names) == len(tokens) // 64 * 64
    assert report["verdict"] == "all whole chunks are there"
    assert [chunk["names"] for chunk in report["chunks"]] == names
    store.delete(names[3][0])
    report = explained(store, prompt, tmp_path)
    assert report["hit_tokens"] == 3 * 64
    assert "chunk 3 is absent although 3 before it" in report["verdict"]
    assert f"{len(names) - 4} later ones" in report["verdict"]


def test_other_prompts_and_tenants(store, prompt, tmp_path, tokens, namespaces) -> None:
    report = explained(store, prompt, tmp_path)
    assert "nothing else in the store comes near" in report["verdict"]
    save(store, namespaces, tokens, tenant=b'["", "alice"]')
    report = explained(store, prompt, tmp_path)
    assert report["hit_tokens"] == 0
    assert "other prompts, tenants, salts or adapters" in report["others"][0]
    report = explained(store, prompt, tmp_path, "--cache-salt", "alice")
    assert report["hit_tokens"] == len(tokens) // 64 * 64
    prompt.write_text(TEXT[:600] + "Something else. " + TEXT[600:], encoding="utf-8")
    report = explained(store, prompt, tmp_path, "--cache-salt", "alice")
    assert 0 < report["hit_tokens"] < len(tokens) // 2
    assert "differ in tokens" in report["verdict"]
    prompt.write_text("short", encoding="utf-8")
    assert "shorter than a chunk" in explained(store, prompt, tmp_path)["verdict"]


def test_another_codec(store, prompt, tmp_path, tokens, namespaces) -> None:
    for group in save(store, namespaces, tokens):
        store.put(group[0].rpartition("/")[0] + "/" + "ab" * 8, b"other")
        store.delete(group[0])
    report = explained(store, prompt, tmp_path)
    assert "chunk 0 is there, but coded otherwise" in report["verdict"]
    assert len(report["chunks"][0]["other_codecs"]) == 1


def test_one_of_two_ranks(store, prompt, tmp_path, tokens) -> None:
    ranks = namespaces_of(Serving(MODEL, "bfloat16", 64, tensor_parallel=2))
    assert len(set(ranks)) == 2
    names = save(store, ranks, tokens)
    report = explained(store, prompt, tmp_path, "--tensor-parallel", 2)
    assert report["hit_tokens"] == 64 * len(names)
    store.delete(names[0][1])
    report = explained(store, prompt, tmp_path, "--tensor-parallel", 2)
    assert "chunk 0: ranks [1] have not saved" in report["verdict"]


def test_other_ways_to_serve_the_model_are_recognised(
    store, prompt, tmp_path, tokens, make_kv, namespaces
) -> None:
    from cachegen import ChunkKey, get_codec

    save(store, namespaces_of(Serving(MODEL, "float16", 64)), tokens)
    key = ChunkKey(bytes(32), bytes(32), bytes(32))
    store.put(key.name, get_codec("int8").encode(make_kv(layers=3, tokens=32), key=key))
    report = explained(store, prompt, tmp_path)
    assert report["verdict"] == "nothing of this prompt is there; the store holds"
    assert "this model with dtype float16 instead of bfloat16" in report["others"][0]
    assert "3 layers, 2 KV heads of 16, bfloat16, chunks of 32 tokens" in report["others"][1]


def test_names_depend_on_how_a_model_is_served(namespaces) -> None:
    seen = {namespace for namespace in namespaces}
    for variant in (
        Serving(MODEL, "float16", 64),
        Serving(MODEL, "bfloat16", 128),
        Serving(MODEL, "bfloat16", 64, tensor_parallel=2),
        Serving(MODEL, "bfloat16", 64, pipeline_parallel=2),
    ):
        ranks = set(namespaces_of(variant))
        assert not ranks & seen
        seen |= ranks
    assert len(seen) == 1 + 1 + 1 + 2 + 2
    variants = list(likely_variants(SERVING))
    assert len(set(variants)) == len(variants) and SERVING not in variants


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(4, 2, [2, 2]), (32, 4, [8, 8, 8, 8]), (7, 3, [2, 3, 2]), (11, 4, [3, 3, 3, 2])],
)
def test_stages_as_vllm_deals_them_out(layers: int, stages: int, counts: list[int]) -> None:
    ranges = [_stage(layers, stage, stages) for stage in range(stages)]
    assert [end - begin for begin, end in ranges] == counts
    assert ranges[0][0] == 0 and ranges[-1][1] == layers


def test_bad_input(prompt, tmp_path) -> None:
    for arguments in (
        ("explain", MODEL, "--prompt-file", prompt),
        ("explain", tmp_path, "--prompt-file", prompt, "--store", tmp_path / "s"),
        ("explain", MODEL, "--prompt-file", tmp_path / "none", "--store", tmp_path / "s"),
        ("explain", MODEL, "--prompt-file", prompt, "--store", tmp_path / "s", "--dtype", "int3"),
    ):
        result = run(*arguments, code=2)
        assert result.stderr.strip().startswith("error: "), arguments
