"""The advisor: sums that can be checked by hand, sources that are named, verdicts that turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachegen.bench import advise
from cachegen.bench.advise import GPUS, MODELS, WAYS, Figure, Machine, Model
from cachegen.cli.main import cli
from cachegen.errors import ConfigError

BITS = {way: Figure(bits, "here", False) for way, bits in zip(WAYS, (16, 8, 4, 2), strict=True)}
MODEL = Model("tiny", 2, 4, 8, 16, 1e6)
SPEEDS = Machine(
    Figure(1e12, "here", False), Figure(0.001, "here", False), Figure(1e9, "here", True)
)


def test_by_hand() -> None:
    row = advise.advise(MODEL, SPEEDS, BITS, link_gbps=0.001, prompt_tokens=512, latency_s=0.01)
    values = 2 * 2 * 4 * 8 * 512
    assert row.sizes_bytes == {
        "raw": 2 * values,
        "int8": values,
        "cachegen": values // 2,
        **{"progressive": values // 4},
    }
    transfer, decode = 8 * values / 1e6, 2 * values / 1e9
    assert row.ttft_s["int8"] == pytest.approx(0.011 + transfer + decode / 2)
    assert row.ttft_s["recompute"] == pytest.approx((2e6 * 512 + 2 * 2 * 16 * 512**2) / 1e12)
    assert row.best == "recompute"
    assert "loading loses" in advise.verdict(row)


def test_at_the_break_even_link_both_take_as_long() -> None:
    model, gpu = MODELS["mistral-7b"], GPUS["h200"]
    speeds, bits = advise.machine(model, gpu), BITS
    first = advise.advise(model, speeds, bits, link_gbps=1, prompt_tokens=9400)
    for way in WAYS:
        link = first.break_even_gbps[way]
        assert link is not None
        row = advise.advise(model, speeds, bits, link_gbps=link, prompt_tokens=9400)
        assert row.ttft_s[way] == pytest.approx(row.ttft_s["recompute"])
    slow = Machine(speeds.prefill_flops, speeds.token_s, Figure(1e6, "here", True))
    row = advise.advise(model, slow, bits, link_gbps=1, prompt_tokens=9400)
    assert set(row.break_even_gbps.values()) == {None}
    fast = advise.advise(model, speeds, bits, link_gbps=100, prompt_tokens=9400)
    assert fast.best == "progressive"
    assert "load with progressive" in advise.verdict(fast)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "results_folder", lambda: tmp_path)
    assert advise.sizes()["int8"].value == 8.125
    assert not advise.sizes()["progressive"].is_estimate
    model, gpu = MODELS["mistral-7b"], GPUS["h200"]
    assert advise.machine(model, gpu).prefill_flops.is_estimate
    rows = [
        {"family": "progressive:profile=false", "billed_bits_per_value": 3.0, "kl_nats": 0.001},
        {"family": "progressive:profile=false", "billed_bits_per_value": 2.0, "kl_nats": 0.009},
        {"family": "progressive:profile=false", "billed_bits_per_value": 1.0, "kl_nats": 0.02},
        {"family": "cachegen-paper", "billed_bits_per_value": 2.5, "kl_nats": 0.01},
        {"family": "cachegen-lmcache", "billed_bits_per_value": 5.0, "kl_nats": 0.001},
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}))
    assert advise.sizes()["progressive"].value == 2.0
    assert advise.sizes(0.002)["progressive"].value == 3.0
    assert advise.sizes()["cachegen"].value == 2.5
    with pytest.raises(ConfigError, match="KL"):
        advise.sizes(1e-6)
    measured = {
        "device": "NVIDIA H200",
        "models": [{"model": "mistral-7b", "prefill_flops": 6e14, "token_s": 0.004}],
        "rows": [
            {"kernel": "decode", "codec": "progressive", "chunks": 16, "output_gb_per_s": 600.0},
            {"kernel": "decode", "codec": "progressive", "chunks": 1, "output_gb_per_s": 100.0},
        ],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(measured))
    speeds = advise.machine(model, gpu, gpus=2)
    assert (speeds.prefill_flops.value, speeds.token_s.value) == (1.2e15, 0.002)
    assert speeds.decode_bytes_per_s == Figure(1.2e12, "gpu.json", False)
    assert advise.machine(model, GPUS["a100"]).prefill_flops.is_estimate


def test_command(tmp_path: Path) -> None:
    out, chart = tmp_path / "advice.json", tmp_path / "advice.png"
    options = ["--model", "Mistral-7B", "--gpu", "h200", "--bandwidth", "3Gbps"]
    done = CliRunner().invoke(cli, ["advise", *options, "--json", str(out), "--plot", str(chart)])
    assert done.exit_code == 0, done.output
    assert "estimate" in done.output and "break-even" in done.output
    content = json.loads(out.read_text())
    assert content["rows"][0]["link_gbps"] == 3.0 and content["hardware"]
    assert chart.stat().st_size > 1000
    assert CliRunner().invoke(cli, ["advise", "--model", "none"]).exit_code != 0
    bad = CliRunner().invoke(cli, ["advise", "--model", "mistral-7b", "--bandwidth", "x"])
    assert bad.exit_code != 0
