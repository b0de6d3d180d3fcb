"""Who a model is under vLLM: ranks, adapters and weights never share names."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from cachegen.connectors import vllm_model
from cachegen.connectors.vllm_model import all_ranks, lora_digest, shard_heads, slice_rope
from cachegen.errors import UnsupportedModelError

MODEL = Path(__file__).parents[2] / "models" / "reference"
LAYERS, HEADS = 4, 2


class Model:
    """What the connector asks of vLLM's ModelConfig."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.model, self.revision, self.quantization = str(folder), None, None
        self.dtype = torch.bfloat16
        self.use_mla = self.is_hybrid = self.has_noops = self.is_encoder_decoder = False
        self.hf_text_config = LlamaConfig.from_pretrained(MODEL)
        vars(self).update(changes)

    def get_total_num_kv_heads(self) -> int:
        return HEADS

    def get_head_size(self) -> int:
        return 64

    def get_layers_start_end_indices(self, parallel: Any) -> tuple[int, int]:
        stages = parallel.pipeline_parallel_size
        stage = parallel.rank // parallel.tensor_parallel_size % stages
        return LAYERS * stage // stages, LAYERS * (stage + 1) // stages


def config(
    folder: Path, *, tensor: int = 1, stages: int = 1, cache: str = "auto", **model: Any
) -> Any:
    parallel = Space(tensor_parallel_size=tensor, pipeline_parallel_size=stages, rank=0)
    return Space(
        model_config=Model(folder, **model),
        parallel_config=parallel,
        cache_config=Space(cache_dtype=cache, block_size=16),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path / name)
    return tmp_path


def namespaces(made: Any, chunk_tokens: int = 256) -> list[bytes]:
    return [rank.namespace for rank in all_ranks(made, chunk_tokens=chunk_tokens)]


def test_ranks_cover_the_model_and_share_nothing(folder: Path) -> None:
    ranks = all_ranks(config(folder, tensor=2, stages=2), chunk_tokens=256)
    assert [(rank.layers, rank.heads) for rank in ranks] == [
        ((0, 2), (0, 1)),
        ((0, 2), (1, 2)),
        ((2, 4), (0, 1)),
        ((2, 4), (1, 2)),
    ]
    assert all(rank.geometry.layers == 2 and rank.geometry.kv_heads == 1 for rank in ranks)
    seen = set()
    for tensor, stages in ((1, 1), (2, 1), (1, 2), (2, 2)):
        seen.update(namespaces(config(folder, tensor=tensor, stages=stages)))
    assert len(seen) == 1 + 2 + 2 + 4


def test_ranks_are_the_same_in_every_process(folder: Path) -> None:
    assert namespaces(config(folder, tensor=2)) == namespaces(config(folder, tensor=2))


def test_every_difference_makes_another_namespace(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-64:] = bytes(64)
    (other / "model.safetensors").write_bytes(data)
    scaled = LlamaConfig.from_pretrained(MODEL)
    scaled.rope_parameters = {"rope_theta": 5000.0, "rope_type": "default"}
    different = [
        namespaces(config(folder))[0],
        namespaces(config(folder), chunk_tokens=128)[0],
        namespaces(config(folder, cache="float16"))[0],
        namespaces(config(folder, dtype=torch.float16))[0],
        namespaces(config(folder, quantization="fp8"))[0],
        namespaces(config(folder, hf_text_config=scaled))[0],
        namespaces(config(other))[0],
    ]
    for one, two in itertools.combinations(different, 2):
        assert one != two


def test_heads_of_shards() -> None:
    assert [shard_heads(8, shard, 4) for shard in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    # Fewer heads than shards: each head on several ranks, which then hold the same values.
    assert [shard_heads(2, shard, 4) for shard in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


def test_rope_is_that_of_the_model() -> None:
    rope = vllm_model.rope_of(LlamaConfig.from_pretrained(MODEL))
    assert rope is not None
    assert rope.layer_kinds == (0,) * LAYERS
    assert len(rope.frequencies[0]) == 32
    assert rope.frequencies[0][1] == pytest.approx(100_000 ** (-1 / 32))
    assert slice_rope(rope, (1, 3)).layer_kinds == (0, 0)


def test_models_without_rope_or_with_one_that_depends_on_length() -> None:
    assert vllm_model.rope_of(GPT2Config(n_layer=2, n_head=2, n_embd=32)) is None
    dynamic = LlamaConfig.from_pretrained(MODEL)
    dynamic.rope_parameters = {"rope_theta": 1e5, "rope_type": "dynamic", "factor": 2.0}
    assert vllm_model.rope_of(dynamic) is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"cache": "fp8"}, "kv_cache_dtype=fp8"),
        ({"cache": "turboquant_4bit"}, "kv_cache_dtype=turboquant_4bit"),
        ({"use_mla": True}, "MLA"),
        ({"is_hybrid": True}, "not attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    folder: Path, changes: dict[str, Any], name: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        all_ranks(config(folder, **changes), chunk_tokens=256)


def test_several_kinds_of_cache_are_refused() -> None:
    class FullAttentionSpec: ...

    class MambaSpec: ...

    def groups(*specs: object) -> Any:
        return Space(kv_cache_groups=[Space(kv_cache_spec=spec) for spec in specs])

    vllm_model.check_groups(groups(FullAttentionSpec()))
    with pytest.raises(UnsupportedModelError, match="KV cache groups: got 2"):
        vllm_model.check_groups(groups(FullAttentionSpec(), MambaSpec()))
    with pytest.raises(UnsupportedModelError, match="MambaSpec"):
        vllm_model.check_groups(groups(MambaSpec()))


def test_adapters_are_told_apart_by_content(tmp_path: Path) -> None:
    requests = []
    for name, content in (("a", b"1"), ("b", b"2"), ("copy of a", b"1")):
        home = tmp_path / name
        home.mkdir()
        (home / "adapter_config.json").write_text("{}")
        (home / "adapter_model.safetensors").write_bytes(content)
        requests.append(Space(lora_name=name, lora_path=str(home)))
    a, b, copy = (lora_digest(request) for request in requests)
    assert a != b
    assert a == copy
    assert lora_digest(None) == b""
    with pytest.raises(FileNotFoundError):
        lora_digest(Space(lora_path=str(tmp_path)))
