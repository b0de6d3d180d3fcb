"""Where a value comes from, what wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachegen.errors import ConfigError
from cachegen.settings import Settings, load_settings
from cachegen.settings.model import NAMES


def test_defaults_have_no_source() -> None:
    settings = load_settings(environ={})
    assert settings == Settings()
    assert {settings.source(name) for name in NAMES} == {"default"}
    assert settings.notes == ()


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("slo_s: 3\nquality: small\nchunk_tokens: 64\n")
    environ = {"CACHEGEN_SLO_S": "500ms", "CACHEGEN_QUALITY": "lossless", "OTHER": "x"}
    settings = load_settings({"slo_s": 0.25}, file=file, environ=environ)
    assert (settings.slo_s, settings.quality, settings.chunk_tokens) == (0.25, "lossless", 64)
    assert settings.policy == "deadline"
    assert settings.source("slo_s") == "flag: slo_s"
    assert settings.source("quality") == "environment: CACHEGEN_QUALITY"
    assert settings.source("chunk_tokens") == f"file: {file}: chunk_tokens"
    assert settings.source("policy") == "default"


@pytest.mark.parametrize("variable", ["CACHEGEN_CONFIG_FILE", "LMCACHE_CONFIG_FILE"])
def test_the_environment_names_the_file(tmp_path: Path, variable: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"store": "memory://", "save": False}))
    settings = load_settings(environ={variable: str(file)})
    assert settings.store == "memory://"
    assert settings.save is False
    with pytest.raises(FileNotFoundError):
        load_settings(environ={variable: str(tmp_path / "none.yaml")})


def test_every_setting_reads_as_text_and_survives_json() -> None:
    texts = {
        "store": "redis://h:1",
        "quality": "small",
        "codec": "int8",
        "profile": "/p.safetensors",
        "policy": "fixed",
        "slo_s": "1.5s",
        "chunk_tokens": "128",
        "save": "no",
        "save_decode": "off",
        "save_tail": "yes",
        "min_hit_tokens": "512",
        "tenant": "t",
        "load_threads": "8",
        "save_threads": "2",
        "backlog_bytes": "2GiB",
        "metrics_folder": "/m",
    }
    assert texts.keys() == set(NAMES)
    settings = load_settings(environ={f"CACHEGEN_{k.upper()}": v for k, v in texts.items()})
    assert settings.slo_s == 1.5 and settings.backlog_bytes == 2 << 30
    assert settings.save is False and settings.save_tail is True
    assert all(getattr(settings, name) != getattr(Settings(), name) for name in NAMES)
    assert Settings.from_config(json.loads(json.dumps(settings.config()))) == settings


def test_none_and_empty_unset_what_may_be_unset() -> None:
    for value in (None, "", "none"):
        assert load_settings({"store": value, "codec": value}, environ={}).store is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slo_s", 0),
        ("slo_s", "-1s"),
        ("slo_s", "soon"),
        ("slo_s", float("nan")),
        ("slo_s", True),
        ("chunk_tokens", 0),
        ("chunk_tokens", 1.5),
        ("chunk_tokens", "many"),
        ("chunk_tokens", float("inf")),
        ("save", "maybe"),
        ("save", 2),
        ("backlog_bytes", "1 parsec"),
        ("quality", ""),
        ("quality", ["small"]),
        ("store", {"a": 1}),
    ],
)
def test_bad_values_name_the_setting_and_the_source(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        load_settings({name: value}, environ={})
    assert f"flag: {name}" in str(caught.value)


def test_unknown_names_are_errors_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean quality"):
        load_settings({"qualitty": "small"}, environ={})
    with pytest.raises(ConfigError, match="did you mean CACHEGEN_SLO_S"):
        load_settings(environ={"CACHEGEN_SLO": "1"})
    with pytest.raises(ConfigError, match="did you mean LMCACHE_CHUNK_SIZE"):
        load_settings(environ={"LMCACHE_CHUNK_SIZ": "1"})
    with pytest.raises(ConfigError, match="one of store, quality"):
        load_settings({"zzz": 1}, environ={})
    file = tmp_path / "c.yaml"
    file.write_text("remote_ur: redis://h:1\n")
    with pytest.raises(ConfigError, match="did you mean remote_url"):
        load_settings(file=file, environ={})


def test_variables_that_are_no_settings_are_left_alone() -> None:
    environ = {"CACHEGEN_ISA": "avx2", "LMCACHE_LOG_LEVEL": "INFO", "LMCACHE_USE_EXPERIMENTAL": "1"}
    assert load_settings(environ=environ) == Settings()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [1\n", "a: \x00"])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="configuration file"):
        load_settings(file=file, environ={})


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert load_settings(file=file, environ={}) == Settings()


def test_lmcache_names_in_every_place(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(
        "chunk_size: 128\nlocal_cpu: true\nmax_local_cpu_size: 2\n"
        "local_disk: file:///cache dir\nmax_local_disk_size: 10\n"
        "remote_url: redis://host:6379\nremote_serde: cachegen\n"
        "save_decode_cache: true\nsave_unfull_chunk: true\nmin_retrieve_tokens: 300\n"
        "enable_p2p: false\ncache_policy: LRU\n"
    )
    settings = load_settings(file=file, environ={})
    assert settings.store == (
        f"tiered:memory://?quota={2 << 30}B,file:///cache%20dir?quota={10 << 30}B,redis://host:6379"
    )
    assert (settings.chunk_tokens, settings.codec) == (128, "cachegen")
    assert (settings.save_tail, settings.min_hit_tokens) == (True, 300)
    assert any("cache_policy has no effect" in note for note in settings.notes)
    environ = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_LOCAL_CPU": "false", "LMCACHE_LOCAL_DISK": ""}
    settings = load_settings({"lmcache.remote_serde": "naive"}, file=file, environ=environ)
    assert (settings.store, settings.chunk_tokens) == ("redis://host:6379", 64)
    assert settings.codec == "raw"
    assert settings.source("chunk_tokens") == "environment: LMCACHE_CHUNK_SIZE"


def test_ours_wins_over_lmcaches_at_the_same_place_but_not_from_below(tmp_path: Path) -> None:
    flags = {"store": "memory://", "remote_url": "redis://h:1"}
    settings = load_settings(flags, environ={})
    assert settings.store == "memory://"
    assert any("remote_url has no effect" in note for note in settings.notes)
    file = tmp_path / "c.yaml"
    file.write_text("store: memory://\nchunk_tokens: 16\n")
    environ = {"LMCACHE_REMOTE_URL": "redis://h:1", "LMCACHE_CHUNK_SIZE": "32"}
    settings = load_settings(file=file, environ=environ)
    assert (settings.store, settings.chunk_tokens) == ("redis://h:1", 32)


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ({"remote_url": "s3://bucket/a,b"}, "s3://bucket/a%2Cb"),
        ({"remote_url": "fs://host:0/mnt/kv"}, "file:///mnt/kv"),
        ({"remote_url": None}, None),
        ({"local_cpu": True}, f"memory://?quota={5 << 30}B"),
        ({"local_cpu": True, "max_local_cpu_size": 0}, None),
        ({"max_local_cpu_size": 0.5}, f"memory://?quota={1 << 29}B"),
        ({"local_disk": "/d"}, "file:///d"),
        ({"local_disk": False}, None),
    ],
)
def test_lmcaches_stores(said: dict[str, object], url: str | None) -> None:
    assert load_settings(said, environ={}).store == url


@pytest.mark.parametrize(
    "said",
    [
        {"remote_url": "lm://host:65432"},
        {"remote_url": "host:65432"},
        {"local_disk": "relative"},
        {"enable_pd": True},
        {"enable_blending": "yes"},
        {"enable_blending": "perhaps"},
        {"local_cpu": "perhaps"},
        {"local_cpu": True, "max_local_cpu_size": "big"},
    ],
)
def test_what_lmcache_can_and_we_cannot_is_an_error(said: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"flag: "):
        load_settings(said, environ={})
