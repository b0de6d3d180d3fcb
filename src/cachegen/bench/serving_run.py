"""What ``cachegen bench`` runs: settings, prompts, the store and the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cachegen.errors import ConfigError
from cachegen.profile import Profile
from cachegen.store.base import Store
from cachegen.store.limit import RateLimitedStore, parse_bandwidth
from cachegen.store.memory import MemoryStore
from cachegen.store.open import open_store

if TYPE_CHECKING:
    from cachegen.bench.serving import Load

ENGINES = ("hf", "vllm")
DEFAULT_BANDWIDTH = "100Mbps"
FOLLOW_UP_TOKENS = 96
CALIBRATION_FILES = ("calibration_text.txt", "calibration_prompts.txt")
CALIBRATION_TOKENS = 1 << 15
# Below this many parameters threads wait for each other longer than they compute.
SMALL_MODEL = 50_000_000

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """See ``cachegen bench --help``. store None: in memory; bandwidth None: no limit then.

    servers: ``MODE=URL`` of running vLLM servers, whose store and quality are their own.
    vllm_python: instead, the interpreter to start a server of every mode with.
    """

    engine: str
    model: str
    modes: tuple[str, ...]
    quality: str
    profile: Path | None
    store: str | None
    bandwidth: str | None
    latency_s: float
    prompt_files: tuple[Path, ...]
    prompts: int
    prompt_tokens: int
    turns: int
    repeats: int
    output_tokens: int
    chunk_tokens: int
    servers: tuple[str, ...] = ()
    vllm_python: Path | None = None


def check_engine(name: str) -> None:
    """Refuse an unknown engine. Raises: ConfigError."""
    if name not in ENGINES:
        raise ConfigError("engine", got=name, expected=" or ".join(ENGINES))


def run_bench(settings: Settings, *, progress: Progress = lambda text: None) -> dict[str, Any]:
    """Load model and prompts, serve them in every mode and return the result, JSON-able.

    Raises: ConfigError for settings that do not go together or prompts too short or too long.
    """
    import torch

    from cachegen.bench.hf_engine import HfEngine, Mode
    from cachegen.bench.report import environment
    from cachegen.bench.serving import run_serving
    from cachegen.hf.load import load_model

    check_engine(settings.engine)
    if settings.engine == "vllm":
        return _run_vllm(settings, progress)
    for name in settings.modes:
        if name != "progressive+profile":
            Mode.of(name, quality=settings.quality, profile=None)
    progress("loading the model")
    model, tokenizer = load_model(settings.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if parameters < SMALL_MODEL:
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        load = make_load(settings, tokenizer, int(model.config.max_position_embeddings))
        profile = None
        if "progressive+profile" in settings.modes:
            profile = _profile(settings, model, tokenizer, progress)
        modes = {
            name: Mode.of(name, quality=settings.quality, profile=profile)
            for name in settings.modes
        }
        engine = HfEngine(model, settings.model, open_link(settings), modes, settings.chunk_tokens)
        try:
            result = run_serving(engine, settings.modes, load, progress=progress)
        finally:
            for name in settings.modes:
                engine.forget(name)
            engine.close()
    link = settings.bandwidth or (None if settings.store else DEFAULT_BANDWIDTH)
    return {
        "engine": settings.engine,
        "model": {"name": Path(settings.model).name, "parameters": int(parameters)},
        "threads": 1 if parameters < SMALL_MODEL else threads,
        "store": settings.store.partition("://")[0] if settings.store else "memory",
        "bandwidth_bytes_per_s": parse_bandwidth(link) if link else None,
        "latency_s": settings.latency_s,
        "chunk_tokens": settings.chunk_tokens,
        "quality": settings.quality,
        "profile_bytes": sum(a.nbytes for a in profile.arrays.values()) if profile else None,
        **result,
        **environment(),
    }


def _run_vllm(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Serve through running servers, or start them. Raises: ConfigError."""
    from cachegen.bench.report import environment
    from cachegen.bench.serving import run_serving
    from cachegen.bench.vllm_engine import VllmEngine, parse_servers
    from cachegen.bench.vllm_servers import Launch, vllm_servers
    from cachegen.hf.load import load_model

    starts = settings.vllm_python is not None
    if starts and (settings.servers or settings.bandwidth or settings.latency_s):
        raise ConfigError(
            "servers that the benchmark starts",
            got="--server, --bandwidth or --latency-ms",
            expected="neither; they read the store over the link that its URL leads to",
        )
    model, tokenizer = load_model(settings.model)
    load = make_load(settings, tokenizer, int(model.config.max_position_embeddings))
    parameters = model.num_parameters()
    del model
    with ExitStack() as stack:
        if settings.vllm_python is not None:
            store = settings.store or stack.enter_context(
                TemporaryDirectory(prefix="cachegen-bench-store-")
            )
            launch = Launch(
                settings.vllm_python,
                settings.model,
                store,
                settings.quality,
                settings.chunk_tokens,
                options=("--enforce-eager",),
            )
            progress(f"starting {len(settings.modes)} vLLM servers: minutes on a slow machine")
            servers = stack.enter_context(vllm_servers(launch, settings.modes))
        else:
            servers = parse_servers(settings.servers)
        result = run_serving(VllmEngine(servers), list(servers), load, progress=progress)
    shown = (settings.store or "folder").partition("://")[0]
    return {
        "engine": settings.engine,
        "model": {"name": Path(settings.model).name, "parameters": parameters},
        "store": shown if starts else "the servers' own",
        "bandwidth_bytes_per_s": None,
        "latency_s": 0.0,
        "chunk_tokens": settings.chunk_tokens,
        "quality": settings.quality if starts else None,
        **result,
        **environment(),
    }


def open_link(settings: Settings) -> Store:
    """Open the store, behind a token bucket unless a real one was named without a bandwidth."""
    inner: Store = open_store(settings.store) if settings.store else MemoryStore()
    if settings.store and settings.bandwidth is None and not settings.latency_s:
        return inner
    rate = parse_bandwidth(settings.bandwidth or DEFAULT_BANDWIDTH)
    return RateLimitedStore(inner, rate, burst_bytes=0, latency_s=settings.latency_s)


def make_load(settings: Settings, tokenizer: Any, longest: int) -> Load:
    """Cut prompts and conversations out of texts; conversations begin with a prompt each.

    Raises: ConfigError if a text is too short, or a prompt too long for the model.
    """
    from cachegen.bench.serving import Load
    from cachegen.hf.load import begin_and_text

    if settings.prompt_files:
        texts = [path.read_text(encoding="utf-8") for path in settings.prompt_files]
        prompts = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        spare: list[int] = [token for prompt in prompts for token in prompt[1:]]
    else:
        path = Path(settings.model).expanduser() / "eval_text.txt"
        if not path.is_file():
            raise ConfigError(
                "prompts", got=f"no {path.name} with the model", remedy="pass --prompt-file"
            )
        begin, ids = begin_and_text(tokenizer, path.read_text(encoding="utf-8"))
        span = settings.prompt_tokens - len(begin)
        if span < 1 or settings.prompts < 1 or span * settings.prompts >= len(ids):
            raise ConfigError(
                f"tokens of {path.name}",
                got=len(ids),
                expected=f"more than {settings.prompts} x {span}",
                remedy="ask for fewer or shorter prompts",
            )
        prompts = [
            (*begin, *ids[index * span : (index + 1) * span]) for index in range(settings.prompts)
        ]
        spare = ids[span * settings.prompts :]
    follow_ups = max(0, settings.turns - 1)
    added = follow_ups * (FOLLOW_UP_TOKENS + settings.output_tokens)
    for prompt in prompts:
        room = longest - settings.output_tokens - added
        if not settings.chunk_tokens < len(prompt) <= room:
            raise ConfigError(
                "prompt",
                got=f"{len(prompt)} tokens",
                expected=f"{settings.chunk_tokens + 1} to {room}",
                remedy="other prompts, fewer turns or smaller chunks",
            )
    conversations = []
    for index, prompt in enumerate(prompts if settings.turns else ()):
        turns = [prompt]
        for turn in range(follow_ups):
            place = (index * follow_ups + turn) * FOLLOW_UP_TOKENS % max(1, len(spare) - 1)
            turns.append(tuple((spare * 2)[place : place + FOLLOW_UP_TOKENS]))
        conversations.append(tuple(turns))
    return Load(tuple(prompts), tuple(conversations), settings.output_tokens, settings.repeats)


def _profile(settings: Settings, model: Any, tokenizer: Any, progress: Progress) -> Profile:
    """Load the profile, or fit one to the calibration text that comes with the model."""
    from cachegen.bench.calibrate import calibrate
    from cachegen.hf.load import begin_and_text

    if settings.profile is not None:
        return Profile.load(settings.profile)
    folder = Path(settings.model).expanduser()
    files = [folder / name for name in CALIBRATION_FILES if (folder / name).is_file()]
    if not files:
        raise ConfigError(
            "profile", got=None, expected=f"--profile or a {CALIBRATION_FILES[0]} with the model"
        )
    progress("fitting a profile")
    begin: list[int] = []
    texts = []
    for path in files:
        begin, ids = begin_and_text(tokenizer, path.read_text(encoding="utf-8"))
        texts.append(ids)
    return calibrate(model, texts, begin=begin, tokens=CALIBRATION_TOKENS)
