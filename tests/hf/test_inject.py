"""A model that continues from stored KV answers as one that prefilled the prompt itself."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tiny import FAMILIES, SLIDING, WINDOW, answer_of, prompt_of
from transformers import DynamicCache

from cachegen import hf
from cachegen.chunk import KVChunk, LayerKV
from cachegen.errors import ConfigError, GeometryError, UnsupportedModelError
from cachegen.hf.rope import rotate
from cachegen.kvfile import load_kv, save_kv
from cachegen.types import KVDtype

NEW = 20
PROMPT = 40


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_equals_full_prefill(model_of, family):
    model, prompt = model_of(family), prompt_of(PROMPT)
    want = answer_of(model, prompt, NEW)
    entry = hf.capture(model, [prompt], keep_all=True)[0]
    for prefix in (1, WINDOW - 1, WINDOW, 29, PROMPT - 1):
        kv = entry.kv.slice_tokens(0, prefix)
        assert hf.generate(model, [prompt], kv, max_new_tokens=NEW, do_sample=False) == [want]


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_is_diverse_and_a_wrong_injection_changes_it(model_of, family):
    model, prompt = model_of(family), prompt_of(PROMPT)
    want = answer_of(model, prompt, NEW)
    assert len(set(want)) >= 4
    kv = hf.capture(model, [prompt], keep_all=True)[0].kv.slice_tokens(0, 30)

    def answer(chunk):
        return hf.generate(model, [prompt], chunk, max_new_tokens=NEW, do_sample=False)[0]

    def changed(change):
        return replace(kv, layers=tuple(LayerKV(*change(x.keys, x.values)) for x in kv.layers))

    # Pairs of K and V may be stored in any order: positions are in K. So these break pairs.
    assert answer(changed(lambda k, v: (np.roll(k, 1, axis=0), v))) != want
    assert answer(changed(lambda k, v: (np.r_[k[16:], k[:16]], v))) != want
    assert answer(changed(lambda k, v: (k, v * 0.5))) != want
    assert answer(changed(lambda k, v: (k * 0, v))) != want
    if kv.rope is None:
        # One token is missing, so that the tokens after the prefix are one position off.
        assert answer(replace(kv.slice_tokens(1, 30), first_position=0)) != want
    else:
        assert answer(turned(kv, 5)) != want
    other = hf.capture(model, [prompt_of(30, seed=1)], keep_all=True)[0].kv
    assert answer(other) != want


def turned(kv, positions):
    """The chunk as if its tokens were some positions further on."""
    spec = replace(kv.rope, attention_scale=(1.0,) * len(kv.rope.attention_scale))
    layers = []
    for index, layer in enumerate(kv.layers):
        keys = layer.keys.astype(np.float64).transpose(1, 0, 2)
        keys = rotate(keys, np.full(kv.tokens, positions), spec, index).transpose(1, 0, 2)
        layers.append(LayerKV(keys.astype(layer.keys.dtype), layer.values))
    return replace(kv, layers=tuple(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_through_file_and_chunks(model_of, family, tmp_path):
    model, prompt = model_of(family), prompt_of(PROMPT)
    want = answer_of(model, prompt, NEW)
    entry = hf.capture(model, [prompt[:35]])[0]
    save_kv(tmp_path / "kv.safetensors", entry.kv, token_ids=entry.token_ids)
    kv = load_kv(tmp_path / "kv.safetensors").chunk
    assert kv.rope == entry.kv.rope
    pieces = kv.split(16)
    assert [piece.tokens for piece in pieces] == [16, 16, 3]
    for prefix in (kv, pieces, KVChunk.concat(pieces)):
        assert hf.generate(model, [prompt], prefix, max_new_tokens=NEW, do_sample=False) == [want]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_prompts_with_own_prefixes(model_of, family):
    model = model_of(family)
    prompts = [prompt_of(n, seed=n) for n in (40, 17, 31, 28)]
    prefixes = [30, 7, 30, 27]
    entries = hf.capture(model, prompts, keep_all=True)
    caches = [
        hf.inject(model, entry.kv.slice_tokens(0, n))
        for entry, n in zip(entries, prefixes, strict=True)
    ]
    answers = hf.generate(model, prompts, caches, max_new_tokens=NEW, do_sample=False)
    assert answers == [answer_of(model, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_many_questions_after_one_prefix(model_of, family):
    model, prefix = model_of(family), prompt_of(30)
    prompts = [prefix + prompt_of(3 + seed % 4, seed=seed) for seed in range(32)]
    kv = hf.capture(model, [prefix])[0].kv
    before = [(layer.keys.copy(), layer.values.copy()) for layer in kv.layers]
    cache = hf.inject(model, kv)
    answers = hf.generate(model, prompts, cache, max_new_tokens=4, do_sample=False)
    assert answers == [answer_of(model, prompt, 4) for prompt in prompts]
    assert answers == hf.generate(model, prompts, cache, max_new_tokens=4, do_sample=False)
    assert cache.get_seq_length() == 30
    for layer, (keys, values) in zip(kv.layers, before, strict=True):
        np.testing.assert_array_equal(layer.keys, keys)
        np.testing.assert_array_equal(layer.values, values)


def test_injected_cache_owns_its_memory(model_of):
    model = model_of("llama")
    kv = hf.capture(model, [prompt_of(20)])[0].kv
    cache = hf.inject(model, kv)
    before = cache.layers[0].keys.clone()
    cache.layers[1].keys.zero_()
    assert kv.layers[1].keys.any()
    kv.layers[0].keys[:] = 7
    assert torch.equal(cache.layers[0].keys, before)


def test_clone_shares_tensors_and_state_stays_apart(model_of):
    model = model_of("gemma3")
    cache = hf.inject(model, hf.capture(model, [prompt_of(20)])[0].kv)
    twin = hf.clone(cache)
    assert twin.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    model(input_ids=torch.tensor([[5, 6]]), past_key_values=twin)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (22, 20)
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, 20, WINDOW - 1]
    with pytest.raises(GeometryError, match="batch"):
        hf.clone(hf.clone(cache, batch=2), batch=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_suffix_gives_the_logits_of_the_whole_prompt(model_of, family):
    model, prompt = model_of(family), prompt_of(PROMPT)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([prompt])).logits[0, 25:]
    cache = hf.inject(model, hf.capture(model, [prompt[:25]])[0].kv)
    for suffix in (prompt[25:], [prompt[25:], [9] * 15]):
        got = hf.forward_suffix(model, cache, suffix)[0]
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    assert cache.get_seq_length() == 25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_injected_cache_equals_the_models_own_bit_for_bit(family, dtype, tmp_path):
    model, prompt = tiny.build(family, dtype=dtype), prompt_of(30)
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]), past_key_values=own)
    entry = hf.capture(model, [prompt])[0]
    assert entry.kv.geometry.dtype is KVDtype.of(dtype)
    save_kv(tmp_path / "kv.safetensors", entry.kv)
    for kv in (entry.kv, load_kv(tmp_path / "kv.safetensors").chunk):
        cache = hf.inject(model, kv)
        for got, want in zip(cache.layers, own.layers, strict=True):
            assert type(got) is type(want)
            assert got.keys.dtype == dtype
            assert torch.equal(got.keys, want.keys)
            assert torch.equal(got.values, want.values)
            assert got.get_seq_length() == want.get_seq_length()
            assert got.get_mask_sizes(5) == want.get_mask_sizes(5)


def test_values_are_converted_to_the_models_dtype(model_of):
    model, prompt = model_of("llama"), prompt_of(20)
    kv = hf.capture(model, [prompt])[0].kv
    half = KVChunk.from_layers(
        [LayerKV(x.keys.astype(np.float16), x.values.astype(np.float16)) for x in kv.layers]
    )
    cache = hf.inject(model, half)
    assert cache.layers[0].keys.dtype == torch.float32
    want = half.layers[0].keys.astype(np.float32)
    np.testing.assert_array_equal(cache.layers[0].keys[0].permute(1, 0, 2).numpy(), want)


def test_read_only_chunks_can_be_injected(model_of):
    model, prompt = model_of("llama"), prompt_of(20)
    kv = hf.capture(model, [prompt])[0].kv
    for layer in kv.layers:
        layer.keys.flags.writeable = False
    hf.inject(model, kv)


def test_eos_ends_an_answer(model_of):
    model, prompt = model_of("llama"), prompt_of(PROMPT)
    want = answer_of(model, prompt, NEW)
    kv = hf.capture(model, [prompt[:20]])[0].kv
    end = want[5]
    got = hf.generate(
        model,
        [prompt, prompt[:-1]],
        kv,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=end,
    )
    assert got[0] == want[: want.index(end) + 1]


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_that_lacks_tokens_is_refused(model_of, family):
    model, prompt = model_of(family), prompt_of(PROMPT)
    kv = hf.capture(model, [prompt])[0].kv
    with pytest.raises(GeometryError, match=r"tokens held by layer 0.*keep_all"):
        hf.inject(model, kv.slice_tokens(0, 35))


def test_chunks_that_do_not_fit_are_refused(model_of):
    model, prompt = model_of("llama"), prompt_of(PROMPT)
    kv = hf.capture(model, [prompt])[0].kv
    with pytest.raises(GeometryError, match=r"first position.*got 10.*expected 0"):
        hf.inject(model, kv.slice_tokens(10, 20))
    with pytest.raises(GeometryError, match="first position"):
        hf.inject(model, kv.split(10)[::-1])
    with pytest.raises(GeometryError, match="at least one"):
        hf.inject(model, [])
    with pytest.raises(GeometryError, match=r"kv_heads.*got 2.*expected 1"):
        hf.inject(model_of("llama_mqa"), kv)
    with pytest.raises(GeometryError, match=r"prefix.*got 40.*expected fewer"):
        hf.generate(model, [prompt], kv)
    with pytest.raises(GeometryError, match="prefixes"):
        hf.generate(model, [prompt], [hf.inject(model, kv.slice_tokens(0, 9))] * 2)
    with pytest.raises(GeometryError, match="suffix"):
        hf.forward_suffix(model, hf.inject(model, kv), [[[1]]])


def test_keys_of_another_rope_are_refused(model_of):
    kv = hf.capture(model_of("llama"), [prompt_of(9)])[0].kv
    other = tiny.build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UnsupportedModelError, match="RoPE"):
        hf.inject(other, kv)


@pytest.mark.parametrize("argument", ["num_beams", "past_key_values", "return_dict_in_generate"])
def test_arguments_that_do_not_go_with_it_are_refused(model_of, argument):
    model, prompt = model_of("llama"), prompt_of(9)
    kv = hf.capture(model, [prompt[:5]])[0].kv
    with pytest.raises(ConfigError, match=argument):
        hf.generate(model, [prompt], kv, **{argument: 4})


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_capture_and_inject_on_a_gpu(family):
    if not torch.cuda.is_available():
        if os.environ.get("CACHEGEN_REQUIRE_CUDA") == "1":
            pytest.fail("CACHEGEN_REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("needs a CUDA device")
    model, prompt = tiny.build(family).to("cuda"), prompt_of(PROMPT)
    ids = torch.tensor([prompt], device="cuda")
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
    )[0, PROMPT:].tolist()
    kv = hf.capture(model, [prompt[:30]])[0].kv
    cache = hf.inject(model, kv)
    assert cache.layers[0].keys.device.type == "cuda"
    assert hf.generate(model, [prompt], cache, max_new_tokens=NEW, do_sample=False) == [want]


def test_planes_are_the_cache(model_of):
    """What an encoder on a device reads is what a capture copies."""
    model, prompt = model_of("llama"), prompt_of(PROMPT)
    kv = hf.capture(model, [prompt], keep_all=True)[0].kv
    cache = hf.inject(model, kv)
    part = kv.slice_tokens(8, 20)
    owners = {layer.keys.untyped_storage().data_ptr() for layer in cache.layers}
    for (keys, values), layer in zip(hf.planes(cache, 8, 20), part.layers, strict=True):
        assert keys.untyped_storage().data_ptr() in owners
        assert torch.equal(keys, torch.from_numpy(layer.keys))
        assert torch.equal(values, torch.from_numpy(layer.values))
    with pytest.raises(GeometryError):
        hf.planes(cache, 8, kv.tokens + 1)
    sliding = model_of(SLIDING[0])
    with pytest.raises(GeometryError):
        hf.planes(hf.inject(sliding, hf.capture(sliding, [prompt])[0].kv), 0, 4)


def test_a_reserved_cache_is_filled_by_the_decoder(model_of):
    """What decoders write to the views is what inject makes of the decoded chunk."""
    from cachegen.codec.raw import RawCodec
    from cachegen.codec.registry import decode

    model, prompt = model_of("llama"), prompt_of(PROMPT)
    kv = hf.capture(model, [prompt], keep_all=True)[0].kv.slice_tokens(0, 30)
    cache, views = hf.reserve(model, 30)
    for begin in (0, 16):
        part = kv.slice_tokens(begin, min(begin + 16, 30))
        rows = slice(begin, begin + part.tokens)
        out = [(keys[rows], values[rows]) for keys, values in views]
        assert decode(RawCodec().encode(part), out=out) is None
    suffix = torch.tensor(prompt[30:])
    got = hf.forward_suffix(model, cache, suffix)
    assert torch.equal(got, hf.forward_suffix(model, hf.inject(model, kv), suffix))
    with pytest.raises(UnsupportedModelError):
        hf.reserve(model_of(SLIDING[0]), 30)
