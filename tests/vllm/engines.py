"""vLLM engines for tests: started, asked, compared with a baseline, and ended.

Nothing here depends on how fast the machine is: deadlines are so long that only a hang exceeds
them, but in a test about deadlines, which sets its own (``Engine.load_deadline``).
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from cachegen.connectors.vllm import CacheGenConnector
from vllm import LLM, SamplingParams

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
BLOCK = 128
CHUNK = 256
# Two logits closer than this may change places when a step groups its tokens otherwise.
ROUNDING_NATS = 1e-3
# What takes longer than this hangs.
HANG_S = 400.0


def _served_model() -> Path:
    """Link the files that make up the model: vLLM reads every .safetensors as weights."""
    folder = Path(tempfile.mkdtemp(prefix="cachegen-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in REFERENCE.iterdir():
        if path.name == "model.safetensors" or path.suffix == ".json":
            (folder / path.name).symlink_to(path)
    return folder


MODEL = _served_model()


@dataclass(frozen=True)
class Answer:
    """Generated tokens, and for each the log-probabilities of the two best."""

    tokens: tuple[int, ...]
    best_two: tuple[tuple[float, float], ...]
    cached_tokens: int


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, **options: Any) -> None:
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "seed": 0,
        }
        self.llm = LLM(str(MODEL), **{**defaults, **options})

    def ask(
        self, prompts: Sequence[Any], max_tokens: int = 16, *, loads: bool = True, lora: Any = None
    ) -> list[Answer]:
        """Generate greedily after each prompt, all at once.

        loads: False to compute everything. lora: a LoRARequest for all of them.
        """
        greedy = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            logprobs=2,
            ignore_eos=True,
            extra_args=None if loads else {"kv_transfer_params": {"cachegen.load": False}},
        )
        inputs = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
        outputs = self.llm.generate(inputs, greedy, use_tqdm=False, lora_request=lora)
        return [answer_of(out) for out in outputs]

    @property
    def scheduler(self) -> CacheGenConnector:
        """The connector of the scheduler."""
        return self.core.scheduler.connector

    @property
    def worker(self) -> CacheGenConnector:
        """The connector of the worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self.llm.llm_engine.engine_core.engine_core

    def counted(self, name: str, reason: str | None = None) -> float:
        """Return a counter of the connector, both sides together."""
        sides = (self.scheduler._counters, self.worker._counters)
        return sum(side.get(name, reason=reason) for side in sides)

    def preemptions(self) -> float:
        """How often vLLM preempted a request."""
        found = [m for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"]
        return sum(metric.value for metric in found)

    def settle(self) -> None:
        """Wait until everything that was handed over is saved."""
        saver = self.worker._worker._saver
        wait_until(lambda: not saver._backlog_bytes)

    @contextmanager
    def load_deadline(self, seconds: float) -> Iterator[None]:
        """End loads that begin meanwhile after so many seconds; look-ups keep their own time."""
        tracker = self.scheduler._scheduler.tracker
        usual = tracker._settings
        tracker._settings = replace(usual, slo_s=seconds)
        try:
            yield
        finally:
            tracker._settings = usual

    def close(self) -> None:
        """End the engine, so that another one can start in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


@contextmanager
def engine(store: str | None = None, **options: Any) -> Iterator[Engine]:
    """Start an engine, with the connector if there is a store; extra settings go to the connector.

    role, quality, codec and the like: of the connector; everything else: of vLLM.
    """
    names = ("quality", "codec", "profile", "chunk_tokens", "save_decode", "policy")
    extra = {name: options.pop(name) for name in names if name in options}
    role = options.pop("role", "kv_both")
    if store is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "CacheGenConnector",
            "kv_connector_module_path": "cachegen.connectors.vllm",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "store": store,
                "quality": "lossless",
                "slo_s": HANG_S,
                **extra,
            },
        }
    made = Engine(**options)
    try:
        yield made
    finally:
        made.close()


class Baseline:
    """Answers without a connector, remembered.

    Modules say with ``plan`` what they will ask, so that one engine answers all of it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], int], Answer] = {}
        self._planned: dict[tuple[tuple[int, ...], int], None] = {}

    def plan(self, prompts: Sequence[Sequence[int]], max_tokens: int = 16) -> None:
        """Take note of prompts that will be asked."""
        self._planned.update(dict.fromkeys((tuple(prompt), max_tokens) for prompt in prompts))

    def __call__(self, prompts: Sequence[Sequence[int]], max_tokens: int = 16) -> list[Answer]:
        """Return the answers; starts an engine if one of them is not known."""
        keys = [(tuple(prompt), max_tokens) for prompt in prompts]
        if any(key not in self._known for key in keys):
            self.plan(prompts, max_tokens)
            with engine() as plain:
                for length in {key[1] for key in self._planned}:
                    asked = [key for key in self._planned if key[1] == length]
                    answers = plain.ask([key[0] for key in asked], length)
                    self._known.update(zip(asked, answers, strict=True))
            self._planned.clear()
        return [self._known[key] for key in keys]


BASELINE = Baseline()


def answer_of(output: Any) -> Answer:
    """Read the tokens and the best two log-probabilities off an output of vLLM."""
    completion = output.outputs[0]
    best_two = []
    for entry in completion.logprobs:
        ordered = sorted((item.logprob for item in entry.values()), reverse=True)
        best_two.append((ordered[0], ordered[1]))
    return Answer(tuple(completion.token_ids), tuple(best_two), output.num_cached_tokens or 0)


def check_same(got: Sequence[Answer], want: Sequence[Answer]) -> int:
    """Compare greedy answers with the baseline's.

    From the first token that differs on a text goes its own way; it may differ only where the
    baseline's best two were within rounding. Returns: how many answers did.
    """
    assert len(got) == len(want)
    ties = 0
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        if one.tokens == other.tokens:
            continue
        differs = [a != b for a, b in zip(one.tokens, other.tokens, strict=True)].index(True)
        first, second = other.best_two[differs]
        assert first - second < ROUNDING_NATS, (
            f"answer {number} differs at token {differs}, where the baseline's best two are "
            f"{first - second:.4f} nats apart: {one.tokens} is not {other.tokens}"
        )
        ties += 1
    return ties


def text_tokens() -> list[int]:
    """Return the reference model's evaluation text as tokens."""
    from transformers import AutoTokenizer

    text = (REFERENCE / "eval_text.txt").read_text(encoding="utf-8")
    tokens: list[int] = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return tokens


def mixed_prompts() -> list[list[int]]:
    """Return 50 prompts: shared prefixes, borders of chunks and blocks, shorter than a block."""
    text = text_tokens()
    borders = [1, 5, 31, 127, 128, 129, 255, 256, 257, 258, 383, 384, 385]
    borders += [511, 512, 513, 640, 767, 768, 769, 1023, 1024, 1025, 1300]
    prompts = [text[:length] for length in borders]
    rng = np.random.default_rng(11)
    while len(prompts) < 50:
        shared = int(rng.choice([64, 128, 200, 256, 300, 512, 600, 768]))
        begin, own = int(rng.integers(2000, 20000)), int(rng.integers(1, 300))
        prompts.append(text[:shared] + text[begin : begin + own])
    return prompts


def hits_expected(prompts: Sequence[Sequence[int]]) -> int:
    """Return the tokens that a full store holds of these prompts, one left to compute in each."""
    return sum(min(len(p) // CHUNK * CHUNK, len(p) - 1) for p in prompts)


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until a condition holds; a hang is an error."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)
