"""A plain serving loop on Hugging Face transformers: load what is stored, compute the rest, save.

One request at a time. Saving happens after the answer and outside its times; a chunk that was
loaded is never saved again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cachegen.bench.quality import compare, continuation
from cachegen.bench.serving import Clock, Served
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec import gpu
from cachegen.codec.base import Codec
from cachegen.codec.container import VERSION
from cachegen.codec.registry import decode, get_codec
from cachegen.errors import ConfigError
from cachegen.hf.capture import capture, chunk_of
from cachegen.hf.fingerprint import weights_fingerprint
from cachegen.hf.inject import inject, planes
from cachegen.hf.models import attention_windows
from cachegen.hf.rope import rope_spec
from cachegen.profile import Profile, require_profile
from cachegen.store.base import Store
from cachegen.store.keys import chain_digests, chunk_keys, namespace_digest
from cachegen.stream.fetch import Fetcher
from cachegen.types import ChunkKey, KVDtype, RopeSpec

RECOMPUTE = "recompute"
MODES = (RECOMPUTE, "raw", "int8", "cachegen", "progressive", "progressive+profile")
STORED_DTYPE = KVDtype.BFLOAT16
# Tokens at the end of a prompt that quality is measured on, teacher-forced.
QUALITY_TOKENS = 128


@dataclass(frozen=True)
class Mode:
    """How a mode stores. codec: None to recompute. quality: how much of objects is read."""

    codec: Codec | None
    quality: str | None = None

    @classmethod
    def of(cls, name: str, *, quality: str, profile: Profile | None) -> Mode:
        """Build a mode by name. Raises: ConfigError for another name, or without a profile."""
        if name not in MODES:
            raise ConfigError("mode", got=name, expected=f"one of {', '.join(MODES)}")
        if name == RECOMPUTE:
            return cls(None)
        plain, _, with_profile = name.partition("+")
        if plain != "progressive":
            return cls(get_codec(plain))
        if with_profile and profile is None:
            raise ConfigError(
                "profile of mode progressive+profile",
                got=None,
                expected="a profile of the model",
                remedy="pass --profile, see cachegen calibrate",
            )
        return cls(get_codec(plain, profile=profile if with_profile else None), quality)


@dataclass
class HfEngine:
    """Serves requests with a transformers model and a store.

    model: in eval mode. model_path: folder or name, for the fingerprint. store: shared by all
    modes, whose objects have names of their own. salt: keeps runs on one store apart.
    """

    model: Any
    model_path: str
    store: Store
    modes: dict[str, Mode]
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    salt: bytes = field(default_factory=lambda: os.urandom(16))

    def __post_init__(self) -> None:
        self.rope: RopeSpec | None = rope_spec(self.model)
        self._namespace = self._digest_namespace()
        self._stored: dict[str, set[str]] = {name: set() for name in self.modes}
        self._fetcher = Fetcher(self.store, find_profile=self._find_profile)

    def serve(self, mode: str, token_ids: Sequence[int], *, output_tokens: int) -> Served:
        """Load the longest stored prefix, prefill the rest, generate greedily, save."""
        setting = self.modes[mode]
        clock = Clock()
        chunks: list[KVChunk] = []
        read_bytes, network_s, decode_s = 0, 0.0, 0.0
        if setting.codec is not None:
            keys = self.keys(setting.codec, token_ids, leave=1)
            found = self.store.exists([key.name for key in keys])
            hits = found.index(False) if False in found else len(found)
            for item in self._fetcher.request(keys[:hits], quality=setting.quality):
                if item.chunk is None:
                    break
                chunks.append(item.chunk)
                read_bytes += item.read_bytes
                network_s += item.network_s
                decode_s += item.decode_s
        cache = inject(self.model, chunks) if chunks else None
        hit_tokens = sum(chunk.tokens for chunk in chunks)
        ttft_s, ids, cache = self._generate(cache, token_ids[hit_tokens:], output_tokens, clock)
        e2e_s = clock.elapsed_s()
        if setting.codec is not None:
            self._save(mode, setting.codec, [*token_ids, *ids[:-1]], cache, hit_tokens)
        return Served(
            len(token_ids), hit_tokens, read_bytes, network_s, decode_s, ttft_s, e2e_s, tuple(ids)
        )

    def close(self) -> None:
        """End the threads that fetch."""
        self._fetcher.close()

    def forget(self, mode: str) -> None:
        """Delete what this run has stored in the mode."""
        for name in sorted(self._stored[mode]):
            self.store.delete(name)
        self._stored[mode].clear()

    def quality(self, mode: str, token_ids: Sequence[int]) -> dict[str, float]:
        """Compare a continuation after the coded prefix with the uncompressed model's.

        The last tokens of the prompt are the continuation; the prefix is what came before them,
        encoded and read as the mode does. The bits are billed for the prefix.
        """
        setting = self.modes[mode]
        prefix = max(1, len(token_ids) - QUALITY_TOKENS)
        kv = capture(self.model, [list(token_ids[:prefix])])[0].kv
        values = kv.value_count
        if setting.codec is None:
            return {"kl_nats": 0.0, "top1_agreement": 1.0, "bits_per_value": 0.0}
        size, decoded = 0, []
        for chunk in kv.astype(STORED_DTYPE).split(self.chunk_tokens):
            data = at_quality(setting.codec.encode(chunk), setting.quality)
            size += len(data)
            decoded.append(
                decode(
                    data,
                    allow_partial=setting.quality is not None,
                    profile=getattr(setting.codec, "profile", None),
                )
            )
        reference = continuation(self.model, kv, token_ids)
        other = continuation(self.model, KVChunk.concat(decoded), token_ids)
        agreement = compare(reference, other)
        return {
            "kl_nats": agreement.kl_nats,
            "top1_agreement": agreement.top1,
            "bits_per_value": 8 * size / values,
        }

    def keys(self, codec: Codec, token_ids: Sequence[int], *, leave: int) -> list[ChunkKey]:
        """Return the keys of the whole chunks of a prompt, at least ``leave`` tokens left over."""
        whole = (len(token_ids) - leave) // self.chunk_tokens * self.chunk_tokens
        chains = chain_digests(
            list(token_ids[:whole]), chunk_tokens=self.chunk_tokens, tenant=self.salt
        )
        return chunk_keys(self._namespace, chains, codec.config())

    def _find_profile(self, digest: bytes) -> Profile:
        for setting in self.modes.values():
            profile = getattr(setting.codec, "profile", None)
            if profile is not None and profile.digest == digest:
                return require_profile(profile, digest)
        return require_profile(None, digest)

    @torch.no_grad()
    def _generate(
        self, cache: Any, token_ids: Sequence[int], output_tokens: int, clock: Clock
    ) -> tuple[float, list[int], Any]:
        ids, ttft_s, answer = list(token_ids), 0.0, []
        for index in range(output_tokens):
            inputs = torch.tensor([ids], device=self.model.device)
            output = self.model(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            ids = [int(output.logits[0, -1].argmax())]
            answer += ids
            if index == 0:
                ttft_s = clock.elapsed_s()
        return ttft_s, answer, cache

    def _save(
        self, mode: str, codec: Codec, token_ids: Sequence[int], cache: Any, loaded_tokens: int
    ) -> None:
        """Store the whole chunks that were computed, not loaded."""
        keys = self.keys(codec, token_ids, leave=0)
        first = loaded_tokens // self.chunk_tokens
        if len(keys) <= first:
            return
        on_gpu = self.model.device.type == "cuda" and self.model.dtype == torch.bfloat16
        on_gpu &= all(window is None for window in attention_windows(self.model))
        kv = None if on_gpu else chunk_of(self.model, cache, rope=self.rope)
        for index, key in enumerate(keys[first:], first):
            begin, end = index * self.chunk_tokens, (index + 1) * self.chunk_tokens
            if kv is None:
                part = gpu.DeviceChunk(planes(cache, begin, end), None, begin, self.rope)
                data = gpu.encode(codec, part, key=key)
            else:
                data = codec.encode(kv.slice_tokens(begin, end).astype(STORED_DTYPE), key=key)
            self.store.put(key.name, data)
            self._stored[mode].add(key.name)

    def _digest_namespace(self) -> bytes:
        kv = capture(self.model, [[0]])[0].kv
        geometry = kv.geometry
        folder = os.path.isdir(os.path.expanduser(self.model_path))
        return namespace_digest(
            weights_fingerprint=weights_fingerprint(self.model_path if folder else self.model),
            dtype=STORED_DTYPE,
            rope=self.rope,
            geometry=geometry,
            layer_range=(0, geometry.layers),
            head_range=(0, geometry.kv_heads),
            chunk_tokens=self.chunk_tokens,
            format_version=VERSION,
        )


def at_quality(data: bytes, quality: str | None) -> bytes:
    """Return the prefix of an object that a quality reads; all of it for None."""
    from cachegen.codec.container import read_header
    from cachegen.codec.levels import prefix_bytes

    if quality is None:
        return data
    return data[: prefix_bytes(read_header(data, max_decoded_bytes=1 << 62), quality)]
