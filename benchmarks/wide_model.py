"""How much a profile gains where the KV is narrower than the hidden state: a second model.

    python benchmarks/wide_model.py train FOLDER --text TEXT --minutes 12
    python benchmarks/wide_model.py measure FOLDER --json benchmarks/results/wide_model.json

The reference model has 256 K and V channels per layer at a hidden size of 256, and all its layers
together four times that: its KV is of low rank by construction, which flatters transforms that
join layers. This one has 128 at 384 (one KV head of 64), the same tokenizer, text and tasks, and
the loss of ``models/reference/train.py``, within so many minutes of CPU time. TEXT is the folder of
text that script prepares. The model's weights are not kept, its figures are. Both models are
measured alike: prefixes of 256 tokens, which is what the second one had time to learn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig

REFERENCE = Path(__file__).parents[1] / "models/reference"
sys.path.insert(0, str(REFERENCE))

import train as recipe  # noqa: E402 - beside the reference model, no package
from model import Decoder  # noqa: E402

from cachegen.bench.evaluate import run_evaluation  # noqa: E402
from cachegen.bench.report import environment, write_json  # noqa: E402
from cachegen.bench.workload import Sizes  # noqa: E402

CONFIG = LlamaConfig(
    **{
        **recipe.CONFIG.to_diff_dict(),
        "hidden_size": 384,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
    }
)
# Share of the time after which a phase ends at the latest.
UNTIL = {"copy": 0.5, "recall": 0.58, "mix-128": 0.68, "mix-256": 0.84, "mix-512": 1.0}
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "retrieval.json",
    "eval_text.txt",
    "calibration_text.txt",
)
CODECS = ("progressive:profile=true", "progressive:profile=false", "cachegen-lmcache")
SIZES = Sizes(
    texts=16,
    prefix_tokens=256,
    continuation_tokens=192,
    retrieval_prompts=8,
    calibration_contexts=64,
    calibration_prompts=32,
)


def train(text: Path | None, minutes: float) -> tuple[Decoder, dict[str, object]]:
    """Run the phases within so many minutes of CPU time; return the model and a record."""
    data = recipe.prepare(text)
    torch.manual_seed(recipe.SEED)
    model = Decoder(CONFIG)
    parameters = dict(model.named_parameters())
    embedding = parameters.pop("model.embed_tokens.weight")
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(
            [p for p in parameters.values() if p.dim() == 2],
            lr=0.02,
            momentum=0.95,
            weight_decay=0.01,
        ),
        torch.optim.AdamW([embedding], lr=0.012, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(
            [p for p in parameters.values() if p.dim() == 1],
            lr=0.002,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full = [group["lr"] for group in groups]
    phases = [phase for phase in recipe.PHASES if phase.name in UNTIL]
    phases[-1] = replace(phases[-1], last_rate=0.02)
    begin, step, record = time.process_time(), 0, {}
    budget = 60 * minutes
    for phase in phases:
        recent: list[float] = []
        phase_begin, first = (time.process_time() - begin) / budget, step
        while True:
            spent = (time.process_time() - begin) / budget
            if spent >= UNTIL[phase.name] or (
                len(recent) >= 20 and np.mean(recent[-20:]) >= phase.until
            ):
                break
            done = (spent - phase_begin) / max(UNTIL[phase.name] - phase_begin, 1e-6)
            rate = phase.rate + (phase.last_rate - phase.rate) * done
            rate *= min(1.0, (step + 1) / recipe.WARMUP_STEPS)
            for group, most in zip(groups, full, strict=True):
                group["lr"] = rate * most
            ids, positions, targets, is_answer = recipe.batch(phase, step, data)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids, positions)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            answers = losses[is_answer].mean()
            words = losses[~is_answer].mean() if phase.text else torch.zeros(())
            model.zero_grad()
            (words + recipe.ANSWER_WEIGHT * answers if phase.text else answers).backward()
            for optimizer in optimizers:
                optimizer.step()
            hits = logits[is_answer].argmax(-1) == targets[is_answer]
            recent.append(hits.float().mean().item())
            step += 1
            if step % 20 == 0:
                print(
                    f"{phase.name} step {step} {spent * minutes:.1f} min: text {words.item():.3f} "
                    f"right {np.mean(recent[-20:]):.3f}",
                    flush=True,
                )
        record[phase.name] = {
            "steps": step - first,
            "right": round(float(np.mean(recent[-20:])), 4) if recent else None,
        }
    return model, {"cpu_minutes": round((time.process_time() - begin) / 60, 2), "phases": record}


def export(model: Decoder, folder: Path, record: dict[str, object]) -> None:
    """Write a folder that transformers and ``cachegen eval`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(REFERENCE / name, folder / name)
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(CONFIG.to_json_string(use_diff=True))
    generation = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=False)
    (folder / "generation_config.json").write_text(generation.to_json_string(use_diff=True))
    (folder / "training.json").write_text(json.dumps(record, indent=1))


def measure(folder: Path) -> dict[str, Any]:
    """Evaluate both models on the same kinds of prompts; keep what is compared."""
    results = {}
    for name, path in (("reference", REFERENCE), ("wide", folder)):
        result = run_evaluation(str(path), CODECS, sizes=SIZES)
        kept = ("model", "prefix_tokens", "texts", "uncompressed", "bd_rates", "cpu_seconds")
        rows = [
            {key: value for key, value in row.items() if not key.endswith(("_text", "_prompt"))}
            for row in result["rows"]
        ]
        results[name] = {key: result[key] for key in kept} | {"rows": rows}
        results[name]["model"]["hidden"] = int(
            json.loads((path / "config.json").read_text())["hidden_size"]
        )
        results[name]["model"]["name"] = name
    results["wide"]["training"] = json.loads((folder / "training.json").read_text())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("train", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="what models/reference/train.py trained on")
    parser.add_argument("--minutes", type=float, default=12.0, help="of CPU time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.verb == "train":
        model, record = train(arguments.text, arguments.minutes)
        export(model, arguments.folder, record)
        print(json.dumps(record))
        return
    results = measure(arguments.folder)
    for name, result in results.items():
        for rate in result["bd_rates"]:
            print(name, rate["curve"], rate["peer"], rate["quality"], rate["percent"])
    if arguments.json:
        words = ["python", "benchmarks/wide_model.py", "measure", "FOLDER", "--json"]
        write_json(arguments.json, results | environment([*words, arguments.json.name]))


if __name__ == "__main__":
    main()
