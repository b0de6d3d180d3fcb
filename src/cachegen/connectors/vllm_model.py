"""The identity of a model under vLLM: what of its KV every rank holds, and what it depends on.

Everything is taken from the configuration, so that the scheduler knows the names of the objects of
all ranks, and each worker those of its own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachegen.codec.container import VERSION
from cachegen.errors import ConfigError, UnsupportedModelError
from cachegen.settings import Settings, load_settings
from cachegen.store.keys import namespace_digest
from cachegen.types import Geometry, KVDtype, RopeSpec

logger = logging.getLogger("vllm.cachegen")

_PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "half", "float")


@dataclass(frozen=True)
class Rank:
    """The KV of one worker. layers, heads: half-open ranges of the whole model."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    geometry: Geometry
    rope: RopeSpec | None
    namespace: bytes


def all_ranks(vllm_config: Any, *, chunk_tokens: int) -> list[Rank]:
    """Describe every rank, pipeline stages outermost.

    Raises: UnsupportedModelError for a model or a setting that the connector does not know;
        FileNotFoundError without weights to identify the model by.
    """
    check_supported(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    fingerprint = fingerprint_of(vllm_config)
    dtype = cache_dtype(vllm_config)
    rope = rope_of(model.hf_text_config)
    total_heads = int(model.get_total_num_kv_heads())
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    head_dim = int(model.get_head_size())
    ranks = []
    for stage in range(stages):
        layers = stage_layers(vllm_config, stage)
        for shard in range(tensor):
            heads = shard_heads(total_heads, shard, tensor)
            geometry = Geometry(
                layers[1] - layers[0], heads[1] - heads[0], head_dim, head_dim, dtype
            )
            own = None if rope is None else slice_rope(rope, layers)
            namespace = namespace_digest(
                weights_fingerprint=fingerprint,
                dtype=dtype,
                rope=own,
                geometry=geometry,
                layer_range=layers,
                head_range=heads,
                chunk_tokens=chunk_tokens,
                format_version=VERSION,
            )
            ranks.append(Rank(layers, heads, geometry, own, namespace))
    return ranks


def check_supported(vllm_config: Any) -> None:
    """Raise UnsupportedModelError, by name, for what the connector cannot store."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    refusals = (
        (
            cache.cache_dtype not in _PLAIN_CACHE_DTYPES,
            f"kv_cache_dtype={cache.cache_dtype}",
            "auto, float16, bfloat16 or float32",
        ),
        (bool(getattr(model, "use_mla", False)), "MLA", "a cache of keys and values"),
        (
            bool(getattr(model, "is_hybrid", False)) or bool(getattr(model, "has_noops", False)),
            "layers that are not attention",
            "attention in every layer",
        ),
        (
            bool(getattr(model, "is_encoder_decoder", False)),
            "an encoder-decoder",
            "a decoder",
        ),
        (
            getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1) > 1
            or getattr(vllm_config.parallel_config, "prefill_context_parallel_size", 1) > 1,
            "context parallelism",
            "whole contexts on every rank",
        ),
    )
    for refused, got, expected in refusals:
        if refused:
            raise UnsupportedModelError("vLLM model or cache", got=got, expected=expected)


def check_groups(kv_cache_config: Any) -> None:
    """Raise UnsupportedModelError unless all layers share one table of plain attention blocks."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedModelError(
            "KV cache groups",
            got=f"{len(groups)}",
            expected="one",
            remedy="hybrid models (SSM, mixed windows) are not stored",
        )
    kind = type(groups[0].kv_cache_spec).__name__
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec"):
        raise UnsupportedModelError(
            "KV cache of the layers", got=kind, expected="FullAttentionSpec"
        )


def cache_dtype(vllm_config: Any) -> KVDtype:
    """Return the element type of the cache."""
    name = vllm_config.cache_config.cache_dtype
    alias = {"half": "float16", "float": "float32"}
    if name == "auto":
        return KVDtype.of(vllm_config.model_config.dtype)
    return KVDtype.of(alias.get(name, name))


def stage_layers(vllm_config: Any, stage: int) -> tuple[int, int]:
    """Return the layers [begin, end) of a pipeline stage, as vLLM deals them out."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    view = copy.copy(parallel)
    object.__setattr__(view, "rank", stage * parallel.tensor_parallel_size)
    begin, end = model.get_layers_start_end_indices(view)
    return int(begin), int(end)


def shard_heads(total: int, shard: int, shards: int) -> tuple[int, int]:
    """Return the KV heads [begin, end) of a tensor-parallel rank; few heads are replicated."""
    if total >= shards:
        own = total // shards
        return shard * own, (shard + 1) * own
    head = shard // (shards // total)
    return head, head + 1


def rank_index(vllm_config: Any) -> int:
    """Return which of ``all_ranks`` this worker is."""
    parallel = vllm_config.parallel_config
    size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    return int(parallel.rank) % int(size)


def slice_rope(rope: RopeSpec, layers: tuple[int, int]) -> RopeSpec:
    """Return the RoPE of some layers of a model."""
    return RopeSpec(
        rope.frequencies,
        rope.attention_scale,
        rope.layer_kinds[layers[0] : layers[1]],
        rope.interleaved,
    )


def rope_of(config: Any) -> RopeSpec | None:
    """Measure the RoPE of a model from its transformers configuration.

    Returns: None where there is none, where it depends on the length of the prompt, or where
        transformers does not know the model: keys are stored as rotated then, which is right but
        larger.
    """
    try:
        from cachegen.hf.twin import rope_of_config

        return rope_of_config(config)
    except Exception as error:  # whatever a model's own code raises
        logger.warning("RoPE of the model is not known: %s", error)
        return None


def fingerprint_of(vllm_config: Any) -> bytes:
    """Identify the weights that vLLM serves, by the files they come from.

    Raises: FileNotFoundError if there are none on this machine.
    """
    from cachegen.hf.fingerprint import weights_fingerprint

    model = vllm_config.model_config
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(model.model, revision=model.revision, local_files_only=True)
        )
    digest = hashlib.sha256(weights_fingerprint(folder))
    # The same files give other KV when they are quantised on the way or run in another dtype.
    for part in (model.quantization, str(model.dtype)):
        digest.update(f"|{part}".encode())
    return digest.digest()


def lora_digest(lora_request: Any) -> bytes:
    """Identify a request's LoRA adapter by its files; empty without one.

    Raises: FileNotFoundError if its folder holds none.
    """
    if lora_request is None:
        return b""
    folder = Path(lora_request.lora_path)
    paths = sorted(
        p for p in folder.glob("adapter_*") if p.suffix in (".json", ".safetensors", ".bin")
    )
    if not paths:
        raise FileNotFoundError(f"no adapter files in {folder}")
    digest = hashlib.sha256(b"cachegen lora 1\0")
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def settings_of(extra_config: dict[str, Any]) -> Settings:
    """Read the settings. Raises: ConfigError."""
    settings = load_settings(extra_config)
    for note in settings.notes:
        logger.warning("setting without effect: %s", note)
    if settings.save_tail:
        logger.warning("setting without effect: save_tail: vLLM's chunks are saved whole")
    if not settings.store or settings.store.startswith("memory:"):
        raise ConfigError(
            "store",
            got=settings.store,
            expected="a URL that several processes can reach",
            remedy="vLLM's scheduler and workers may be processes of their own: redis://, s3:// "
            "or file:///folder in kv_connector_extra_config",
        )
    return settings
