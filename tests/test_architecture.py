"""The shape of the code: imports flow one way, importing is inert, engines stay in their folder."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cachegen

SOURCE = Path(cachegen.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A part may import the parts named here, and itself.
BASE = {"errors", "types", "chunk", "units", "atomic"}
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "units": {"errors"},
    "atomic": {"errors"},
    "chunk": {"errors", "types"},
    "settings": BASE,
    "kvfile": BASE,
    "native": BASE,
    "profile": BASE | {"native"},
    "codec": BASE | {"native", "profile"},
    "store": BASE,
    "hf": BASE | {"kvfile"},
    "stream": BASE | {"native", "profile", "codec", "store"},
    "connectors": BASE | {"native", "profile", "codec", "store", "stream", "hf", "settings"},
}
EVERYTHING = set(ALLOWED) | {"bench"}
ALLOWED["bench"] = EVERYTHING - {"bench"}
ALLOWED["cli"] = EVERYTHING

ENGINES = {
    "transformers": "hf",
    "vllm": "connectors",
    "sglang": "connectors",
    "lmcache": "bench",
}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports outside of ``if TYPE_CHECKING``."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "cachegen" and len(parts) > 1 and parts[1] in ALLOWED:
            assert parts[1] == part or parts[1] in ALLOWED[part], f"{path.name} imports {name}"
        if parts[0] in ENGINES:
            assert part == ENGINES[parts[0]], f"{path.name} imports {name}"
        assert parts[0] not in ("pickle", "marshal", "shelve"), f"{path.name} imports {name}"


def test_the_extension_has_one_importer() -> None:
    for path in FILES:
        if any("native._core" in name for name in imports_of(path)):
            assert part_of(path) == "native"


def test_front_door() -> None:
    assert len(cachegen.__all__) <= 12
    assert cachegen.__all__ == sorted(cachegen.__all__)
    for name in cachegen.__all__:
        assert getattr(cachegen, name).__doc__
    with pytest.raises(AttributeError):
        _ = cachegen.no_such_name


def test_import_is_inert() -> None:
    script = """
import json, os, sys, threading

class Watched(dict):
    reads = []
    def __getitem__(self, key):
        Watched.reads.append(key)
        return super().__getitem__(key)
    def get(self, key, default=None):
        Watched.reads.append(key)
        return super().get(key, default)

os.environ = Watched(os.environ)
import cachegen
heavy = [name for name in ("torch", "transformers", "vllm", "numpy") if name in sys.modules]
# An editable installation has an import hook that reads a setting of its own.
reads = [key for key in Watched.reads if not key.startswith("SKBUILD")]
print(json.dumps([heavy, threading.active_count(), reads]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [[], 1, []]


def test_codecs_work_without_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import numpy as np, cachegen\n"
        "kv = np.ones((1, 2, 8, 1, 4), np.float16)\n"
        "chunk = cachegen.KVChunk.from_array(kv)\n"
        "for name in ('raw', 'int8', 'cachegen'):\n"
        "    data = cachegen.get_codec(name).encode(chunk)\n"
        "    assert cachegen.decode(data).to_array().shape == kv.shape\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_files_stay_short() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path.name
