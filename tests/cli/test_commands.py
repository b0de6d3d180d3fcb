"""The command line as a user meets it: files in, files out, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cachegen.cli.main import app
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.kvfile import load_kv, save_kv


@dataclass(frozen=True)
class Result:
    stdout: str
    stderr: str


def run(*arguments: object, code: int = 0) -> Result:
    """Run the command in this process, with everything a terminal would show."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["cachegen", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        app()
    assert stopped.value.code == code, out.getvalue() + err.getvalue()
    return Result(out.getvalue(), err.getvalue())


@pytest.fixture
def kv_file(tmp_path: Path, make_kv) -> Path:
    path = tmp_path / "kv.safetensors"
    save_kv(path, make_kv(tokens=64), token_ids=range(64), model_name="synthetic")
    return path


@pytest.mark.parametrize(
    "settings",
    [
        ("--codec", "raw"),
        ("--codec", "lossless"),
        ("--codec", "int8"),
        ("--codec", "progressive"),
        ("--codec", "cachegen", "--level", "1", "--delta", "anchor", "--tables", "parametric"),
    ],
)
def test_encode_inspect_verify_decode(kv_file: Path, tmp_path: Path, settings) -> None:
    obj, back, report = tmp_path / "x.cgen", tmp_path / "back.safetensors", tmp_path / "i.json"
    made = tmp_path / "e.json"
    assert "bits/value" in run("encode", kv_file, "-o", obj, *settings, "--json", made).stdout
    assert json.loads(made.read_text())["bytes"] == obj.stat().st_size
    shown = run("inspect", obj, "--json", report).stdout
    assert settings[1] in shown
    content = json.loads(report.read_text())
    assert content["bytes"] == obj.stat().st_size
    parts = sum(
        group["payload_bytes"] + group["side_bytes"] + group["states_bytes"]
        for group in content["groups"]
    )
    assert 0 <= content["bytes"] - content["header_bytes"] - parts <= 3 * content["segments"]
    assert "sound" in run("verify", obj).stdout
    run("decode", obj, "-o", back, "--json", made)
    assert json.loads(made.read_text())["tokens"] == 64
    original, decoded = load_kv(kv_file).chunk, load_kv(back).chunk
    assert decoded.geometry == original.geometry
    gap = original.to_array().astype(np.float32) - decoded.to_array().astype(np.float32)
    assert np.abs(gap).mean() < 0.5 * np.abs(original.to_array().astype(np.float32)).mean()


def test_profile_is_needed_and_used(kv_file: Path, tmp_path: Path) -> None:
    codec = CacheGenCodec(level=1)
    profile, obj = tmp_path / "p.safetensors", tmp_path / "x.cgen"
    codec.fit_profile([load_kv(kv_file).chunk]).save(profile)
    run("encode", kv_file, "-o", obj, "--level", "1", "--tables", "profile", "--profile", profile)
    assert "pass --profile" in run("verify", obj).stdout
    assert "decodes" in run("verify", obj, "--profile", profile).stdout
    result = run("decode", obj, "-o", tmp_path / "b.safetensors", code=2)
    assert "profile" in result.stderr
    run("decode", obj, "-o", tmp_path / "b.safetensors", "--profile", profile)


def bad_inputs(tmp_path: Path, kv_file: Path) -> dict[str, tuple[list[object], int]]:
    obj = tmp_path / "good.cgen"
    run("encode", kv_file, "-o", obj)
    data = obj.read_bytes()
    files = {
        "empty": b"",
        "foreign": b"PK\x03\x04" + bytes(64),
        "truncated": data[:-40],
        "header-only": data[:30],
        "flipped": data[:200] + bytes([data[200] ^ 4]) + data[201:],
        "version": data[:4] + b"\x09" + data[5:],
        "length": data[:8] + b"\xff\xff\xff\x7f" + data[12:],
        "trailing": data + b"x",
    }
    calls: dict[str, tuple[list[object], int]] = {}
    for name, content in files.items():
        (tmp_path / f"{name}.cgen").write_bytes(content)
        calls[f"verify-{name}"] = (["verify", tmp_path / f"{name}.cgen"], 2)
        calls[f"decode-{name}"] = (
            ["decode", tmp_path / f"{name}.cgen", "-o", tmp_path / "out.safetensors"],
            2,
        )
    out = tmp_path / "out.safetensors"
    calls["missing"] = (["verify", tmp_path / "none.cgen"], 2)
    calls["folder"] = (["verify", tmp_path], 2)
    calls["codec"] = (["encode", kv_file, "-o", out, "--codec", "zip"], 2)
    calls["level"] = (["encode", kv_file, "-o", out, "--level", "7"], 2)
    calls["setting"] = (["encode", kv_file, "-o", out, "--codec", "int8", "--level", "1"], 2)
    calls["not-kv"] = (["encode", obj, "-o", out], 2)
    calls["no-folder"] = (["encode", kv_file, "-o", tmp_path / "no/where.cgen"], 2)
    calls["too-big"] = (["decode", obj, "-o", out, "--max-bytes", "100"], 2)
    calls["bandwidth"] = (["demo", "--bandwidth", "fast"], 2)
    calls["no-command"] = (["compress"], 2)
    return calls


def test_bad_input(kv_file: Path, tmp_path: Path) -> None:
    calls = bad_inputs(tmp_path, kv_file)
    before = sorted(tmp_path.iterdir())
    for name, (arguments, code) in calls.items():
        result = run(*arguments, code=code)
        assert "Traceback" not in result.stderr, name
        if name != "no-command":
            assert result.stderr.startswith("error: "), name
            assert len(result.stderr.strip().splitlines()) == 1, name
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_write_leaves_nothing(kv_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken.cgen"
    target.mkdir()
    run("encode", kv_file, "-o", target, code=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_help_and_version() -> None:
    for command in ("demo", "capture", "encode", "decode", "inspect", "verify"):
        assert command in run("--help").stdout
    assert json.loads(run("version").stdout)["format"] == 1


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("cachegen")
    result = subprocess.run(
        [command, "verify", "no-such-file.cgen"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr == "error: no such file: no-such-file.cgen\n"


def test_named_qualities(kv_file: Path, tmp_path: Path) -> None:
    obj, out = tmp_path / "x.cgen", tmp_path / "back.safetensors"
    run("encode", kv_file, "-o", obj, "--codec", "progressive")
    truth = load_kv(kv_file).chunk.to_array().astype(np.float32)
    errors = []
    for quality in ("lossless-in-practice", "balanced", "small"):
        run("decode", obj, "-o", out, "--quality", quality)
        decoded = load_kv(out).chunk.to_array().astype(np.float32)
        errors.append(float(np.square(decoded - truth).mean()))
    assert errors == sorted(errors)
    assert "quality" in run("decode", obj, "-o", out, "--quality", "best", code=2).stderr
