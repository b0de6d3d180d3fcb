"""KV chunks: the KV cache of a run of tokens, whatever layout it came in.

A *chunk* is the KV of a run of tokens, all layers. A *plane* is one layer's K or V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cachegen.errors import DtypeError, GeometryError
from cachegen.types import MAX_TOKENS, Array, Geometry, KVDtype, RopeSpec

DEFAULT_CHUNK_TOKENS = 256
CACHE_LINE = 64


@dataclass(frozen=True, eq=False)
class LayerKV:
    """K and V of one layer for the tokens that it holds.

    keys: (T_l, H, key_dim); values: (T_l, H, value_dim); same dtype, any strides.
    begin: index in the chunk of the first token held; a sliding-window layer holds only the
        tokens [begin, begin + T_l) of the chunk, every other layer all of them.
    """

    keys: Array
    values: Array
    begin: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens held."""
        return int(self.keys.shape[0])

    @property
    def end(self) -> int:
        """Index in the chunk after the last token held."""
        return self.begin + self.tokens

    def plane(self, *, is_value: bool) -> Array:
        """Return V or K, (T_l, H, D)."""
        return self.values if is_value else self.keys


@dataclass(frozen=True, eq=False)
class KVChunk:
    """The KV cache of a run of tokens, all layers of one rank.

    layers: L entries, see LayerKV. tokens: T of the run. first_position: position of token 0.
    rope: the RoPE that K was rotated with, or None if unknown or absent.
    Build one with ``from_array``, ``from_keys_values`` or ``from_layers``; none of them copies.
    """

    layers: tuple[LayerKV, ...]
    tokens: int
    geometry: Geometry
    first_position: int = 0
    rope: RopeSpec | None = None
    # The array (L, 2, T, H, D) that layers are views of, where there is one.
    _array: Array | None = field(default=None, repr=False)

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[LayerKV],
        *,
        tokens: int | None = None,
        first_position: int = 0,
        rope: RopeSpec | None = None,
    ) -> KVChunk:
        """Build a chunk from per-layer arrays; layers may hold fewer tokens than the chunk.

        Raises: GeometryError, DtypeError.
        """
        if not layers:
            raise GeometryError("layers", got=0, expected="at least one")
        keys, values = layers[0].keys, layers[0].values
        if keys.ndim != 3 or values.ndim != 3:
            raise GeometryError(
                "axes of K and V of a layer",
                got=(keys.ndim, values.ndim),
                expected="3 each: (T, H, D)",
            )
        geometry = Geometry(
            layers=len(layers),
            kv_heads=int(keys.shape[1]),
            key_dim=int(keys.shape[2]),
            value_dim=int(values.shape[2]),
            dtype=KVDtype.of(keys.dtype),
        )
        if tokens is None:
            tokens = max(layer.end for layer in layers)
        if not 1 <= tokens <= MAX_TOKENS:
            raise GeometryError("tokens", got=tokens, expected=f"1 to {MAX_TOKENS}")
        for index, layer in enumerate(layers):
            want_k = (layer.tokens, geometry.kv_heads, geometry.key_dim)
            want_v = (layer.tokens, geometry.kv_heads, geometry.value_dim)
            if layer.keys.shape != want_k or layer.values.shape != want_v:
                raise GeometryError(
                    f"shape of layer {index}",
                    got=(layer.keys.shape, layer.values.shape),
                    expected=(want_k, want_v),
                    remedy="all layers of a chunk have the same heads and dimensions",
                )
            if {KVDtype.of(layer.keys.dtype), KVDtype.of(layer.values.dtype)} != {geometry.dtype}:
                raise DtypeError(
                    f"dtype of layer {index}",
                    got=(layer.keys.dtype, layer.values.dtype),
                    expected=geometry.dtype.label,
                )
            if layer.begin < 0 or layer.end > tokens:
                raise GeometryError(
                    f"token range of layer {index}",
                    got=(layer.begin, layer.end),
                    expected=f"within 0 to {tokens}",
                )
        if first_position < 0:
            raise GeometryError("first position", got=first_position, expected="0 or more")
        return cls(tuple(layers), tokens, geometry, first_position, rope)

    @classmethod
    def from_array(
        cls, kv: object, *, first_position: int = 0, rope: RopeSpec | None = None
    ) -> KVChunk:
        """Build a chunk from one array or tensor (L, 2, T, H, D), LMCache's layout; no copy."""
        array = as_numpy(kv)
        if array.ndim != 5 or array.shape[1] != 2:
            raise GeometryError("KV array", got=array.shape, expected="(L, 2, T, H, D)")
        layers = [LayerKV(pair[0], pair[1]) for pair in array]
        chunk = cls.from_layers(layers, first_position=first_position, rope=rope)
        return replace(chunk, _array=array)

    @classmethod
    def from_keys_values(
        cls, keys: object, values: object, *, first_position: int = 0, rope: RopeSpec | None = None
    ) -> KVChunk:
        """Build a chunk from keys and values, each (L, H, T, D), arrays or tensors; no copy."""
        k, v = as_numpy(keys), as_numpy(values)
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise GeometryError("K and V", got=(k.shape, v.shape), expected="(L, H, T, D) each")
        layers = [
            LayerKV(a.transpose(1, 0, 2), b.transpose(1, 0, 2)) for a, b in zip(k, v, strict=True)
        ]
        return cls.from_layers(layers, first_position=first_position, rope=rope)

    @property
    def value_count(self) -> int:
        """Number of K and V values held, the denominator of billed bits/value."""
        per_token = self.geometry.kv_heads * (self.geometry.key_dim + self.geometry.value_dim)
        return per_token * sum(layer.tokens for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """Bytes of the values held, in the chunk's own dtype."""
        return self.value_count * self.geometry.dtype.size_bytes

    @property
    def is_uniform(self) -> bool:
        """True if every layer holds all tokens, so that one array can hold the chunk."""
        return all(layer.begin == 0 and layer.tokens == self.tokens for layer in self.layers)

    def to_array(self) -> Array:
        """Return one array (L, 2, T, H, D), without a copy if the chunk was built from one.

        Raises: GeometryError if layers hold different tokens, or K and V differ in dimension.
        """
        if not self.is_uniform or self.geometry.key_dim != self.geometry.value_dim:
            raise GeometryError(
                "layout (L, 2, T, H, D)",
                got="layers with different token ranges, or K and V of different dimension",
                expected="a uniform chunk",
                remedy="read chunk.layers instead",
            )
        if self._array is not None:
            return self._array
        shape = (len(self.layers), 2, *self.layers[0].keys.shape)
        array = aligned_empty(shape, self.geometry.dtype.numpy)
        for target, layer in zip(array, self.layers, strict=True):
            target[0], target[1] = layer.keys, layer.values
        return array

    def slice_tokens(self, begin: int, end: int) -> KVChunk:
        """Return the tokens [begin, end) as a chunk of its own; no copy."""
        if not 0 <= begin < end <= self.tokens:
            raise GeometryError(
                "token slice", got=(begin, end), expected=f"non-empty within 0 to {self.tokens}"
            )
        layers = []
        for layer in self.layers:
            low = min(max(begin, layer.begin), end)
            high = max(low, min(end, layer.end))
            rows = slice(max(0, low - layer.begin), max(0, high - layer.begin))
            # A layer that holds none of these tokens is empty at the end of the slice.
            offset = low - begin if high > low else end - begin
            layers.append(LayerKV(layer.keys[rows], layer.values[rows], offset))
        return replace(
            self,
            layers=tuple(layers),
            tokens=end - begin,
            first_position=self.first_position + begin,
            _array=None if self._array is None else self._array[:, :, begin:end],
        )

    def split(self, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> list[KVChunk]:
        """Cut into chunks of chunk_tokens; the last one may be shorter. No copy."""
        if chunk_tokens < 1:
            raise GeometryError("chunk size", got=chunk_tokens, expected="at least 1 token")
        return [
            self.slice_tokens(begin, min(begin + chunk_tokens, self.tokens))
            for begin in range(0, self.tokens, chunk_tokens)
        ]

    def astype(self, dtype: KVDtype) -> KVChunk:
        """Return the chunk in another dtype, rounded to nearest even; itself if it is the same."""
        if dtype is self.geometry.dtype:
            return self
        layers = tuple(
            LayerKV(_cast(layer.keys, dtype), _cast(layer.values, dtype), layer.begin)
            for layer in self.layers
        )
        geometry = replace(self.geometry, dtype=dtype)
        return replace(self, layers=layers, geometry=geometry, _array=None)

    @classmethod
    def concat(cls, chunks: Sequence[KVChunk]) -> KVChunk:
        """Join consecutive chunks of one run; copies.

        Raises: GeometryError if geometries differ, positions have a gap, or a layer's held
            tokens are not one contiguous range.
        """
        if not chunks:
            raise GeometryError("chunks", got=0, expected="at least one")
        head = chunks[0]
        offset = 0
        for chunk in chunks:
            if chunk.geometry != head.geometry:
                raise GeometryError("geometry", got=chunk.geometry, expected=head.geometry)
            if chunk.first_position != head.first_position + offset:
                raise GeometryError(
                    "first position of a chunk",
                    got=chunk.first_position,
                    expected=head.first_position + offset,
                    remedy="pass consecutive chunks in order",
                )
            offset += chunk.tokens
        layers = []
        for index in range(head.geometry.layers):
            begin: int | None = None
            end = offset = 0
            parts: list[LayerKV] = []
            for chunk in chunks:
                layer = chunk.layers[index]
                if layer.tokens:
                    if begin is None:
                        begin = offset + layer.begin
                    elif offset + layer.begin != end:
                        raise GeometryError(
                            f"tokens held by layer {index}",
                            got=f"a gap at {end}",
                            expected="one contiguous range",
                        )
                    end = offset + layer.end
                    parts.append(layer)
                offset += chunk.tokens
            if not parts:
                empty = head.layers[index]
                layers.append(LayerKV(empty.keys[:0], empty.values[:0], offset))
                continue
            layers.append(
                LayerKV(
                    np.concatenate([part.keys for part in parts]),
                    np.concatenate([part.values for part in parts]),
                    begin or 0,
                )
            )
        return replace(head, layers=tuple(layers), tokens=offset, _array=None)


def _cast(array: Array, dtype: KVDtype) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy)


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Allocate an array, values undefined, that begins where a cache line does, as torch's do.

    NumPy's own begin anywhere; then most rows end in the middle of a line, and storing them takes
    twice as long.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -memory.__array_interface__["data"][0] % CACHE_LINE
    aligned: Array = memory[begin : begin + size].view(dtype).reshape(shape)
    return aligned


def as_numpy(tensor: object) -> Array:
    """View a NumPy array or a CPU torch tensor as NumPy without a copy.

    A bfloat16 tensor becomes an ``ml_dtypes.bfloat16`` array over the same memory.
    Raises: DtypeError for other element types, GeometryError for other objects.
    """
    if isinstance(tensor, np.ndarray):
        KVDtype.of(tensor.dtype)
        return tensor
    if type(tensor).__module__.partition(".")[0] == "torch":
        t: Any = tensor
        dtype = KVDtype.of(t.dtype)
        t = t.detach().cpu()
        if dtype is KVDtype.BFLOAT16:
            import torch

            bits: Array = t.view(torch.uint16).numpy()
            return bits.view(dtype.numpy)
        array: Array = t.numpy()
        return array
    raise GeometryError(
        "KV tensor", got=type(tensor).__name__, expected="a numpy array or a torch tensor"
    )


def as_torch(array: Array) -> Any:
    """View a NumPy array of a KV dtype as a torch tensor without a copy. Needs torch."""
    import torch

    if KVDtype.of(array.dtype) is KVDtype.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
