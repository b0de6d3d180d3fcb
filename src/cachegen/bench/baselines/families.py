"""Which peers there are by name, and the operating points that make up each one's curve.

A name is a family of points, ``NAME`` or, for a codec of the registry with settings of one's own,
``NAME:key=value,...``. ``h2o+NAME`` puts a family on top of token eviction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cachegen.bench.baselines.base import Peer
from cachegen.bench.baselines.cachegen_lmcache import CacheGenLMCachePeer
from cachegen.bench.baselines.codec import (
    CURVE_POINTS,
    CodecPeer,
    SlopeCuts,
    named_levels,
    whole_objects,
)
from cachegen.bench.baselines.h2o import H2OPeer
from cachegen.bench.baselines.int8_zstd import Int8ZstdPeer
from cachegen.bench.baselines.kivi import KiviPeer
from cachegen.bench.baselines.kvtc import KvtcModel, KvtcPeer
from cachegen.bench.baselines.turboquant import TurboQuantPeer
from cachegen.chunk import DEFAULT_CHUNK_TOKENS, KVChunk
from cachegen.codec.base import Codec
from cachegen.codec.cachegen import CacheGenCodec
from cachegen.codec.fit import fit_basis
from cachegen.codec.grading import CacheGenConfig
from cachegen.codec.registry import CODECS, get_codec
from cachegen.errors import ConfigError
from cachegen.profile import Profile

LEVELS = (1, 2, 3)
# Base bins of the paper's setting; thirds of depth halve and stretch them by 1.5.
PAPER_BINS = (6, 8, 12, 16, 24, 32, 48)
KIVI_BITS = (2, 4)
TURBOQUANT_BITS = (2, 3, 4)
KVTC_RATIOS = (8, 16, 32)
H2O_SHARES = (0.25, 0.5, 0.75)
H2O_INNER_SHARE = 0.5


@dataclass(frozen=True)
class Calibration:
    """What calibrated peers are fitted to; never text that is evaluated on.

    contexts: 16-bit KV of texts, each from position 0. profile: for codecs of the registry that
    take one; None lets ``progressive`` fit one: with ``fit``, which has the model, or without
    knowing what errors do, to the contexts alone.
    """

    contexts: tuple[KVChunk, ...]
    profile: Profile | None = None
    fit: Callable[[], Profile] | None = None

    @cached_property
    def kvtc(self) -> KvtcModel:
        """Fitted once, on first use."""
        return KvtcModel.fit(self.contexts)

    @cached_property
    def progressive(self) -> Profile:
        """The given profile, or one that is fitted on first use."""
        if self.profile is not None:
            return self.profile
        return self.fit() if self.fit is not None else fit_basis(self.contexts)

    def chunks(self, chunk_tokens: int) -> list[KVChunk]:
        """Return the contexts in chunks."""
        return [chunk for context in self.contexts for chunk in context.split(chunk_tokens)]


def build(
    names: Sequence[str], calibration: Calibration, *, chunk_tokens: Sequence[int] = ()
) -> list[Peer]:
    """Build the peers of families, in order.

    chunk_tokens: sizes for codecs that work in chunks, 256 by default; each size is a family of its
        own, ``NAME@SIZE``, if there are several. Peers with a size of their own are built once, and
        so is what goes on top of eviction, in chunks of 256 tokens if that is one of the sizes.
    Raises: ConfigError for an unknown name or setting; whatever calibration raises.
    """
    check_names(names)
    sizes = tuple(chunk_tokens) or (DEFAULT_CHUNK_TOKENS,)
    peers: list[Peer] = []
    for name in names:
        chunked = _is_chunked(name)
        once = (DEFAULT_CHUNK_TOKENS if DEFAULT_CHUNK_TOKENS in sizes else sizes[0],)
        for size in sizes if chunked and not name.startswith("h2o+") else once:
            family = f"{name}@{size}" if chunked and len(sizes) > 1 else name
            peers += _family(name, family, calibration, size)
    return peers


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown or repeated names and malformed settings, before anything is loaded.

    Raises: ConfigError.
    """
    if not names or len(set(names)) < len(names):
        raise ConfigError("codecs", got=list(names), expected="one or more different names")
    for name in names:
        plain, _, settings = name.removeprefix("h2o+").partition(":")
        registered = any(codec.name == plain for codec in CODECS)
        if not registered and (settings or plain not in NAMES):
            known = sorted({*NAMES, *(codec.name for codec in CODECS)})
            raise ConfigError("codec", got=name, expected=f"one of {', '.join(known)}, h2o+NAME")
        _settings(settings)


def _is_chunked(name: str) -> bool:
    plain = name.removeprefix("h2o+").partition(":")[0]
    return plain in _CHUNKED or any(codec.name == plain for codec in CODECS)


def _family(name: str, family: str, calibration: Calibration, size: int) -> list[Peer]:
    if name.startswith("h2o+"):
        inner = _family(name.removeprefix("h2o+"), family, calibration, size)
        return [H2OPeer(H2O_INNER_SHARE, inner=peer, family=family) for peer in inner]
    if name in _CHUNKED:
        return _CHUNKED[name](family, calibration, size)
    if name in _WHOLE:
        return _WHOLE[name](family, calibration)
    plain, _, settings = name.partition(":")
    return [_of_registry(plain, settings, family, calibration, size)]


def _of_registry(
    name: str, settings: str, family: str, calibration: Calibration, size: int
) -> CodecPeer:
    """Build one codec.

    The setting ``profile=true`` or ``false`` says whether it gets the profile, default for
    ``progressive``. A method ``operating_points`` of the codec, see ``Cuts``, says how its
    objects are cut; otherwise ``progressive`` is cut by slope, others are read whole.
    """
    parsed = _settings(settings)
    if parsed.pop("profile", name == "progressive"):
        fitted = calibration.progressive if name == "progressive" else calibration.profile
        parsed["profile"] = fitted
    codec = get_codec(name, **parsed)
    is_nested = name == "progressive"
    nested = SlopeCuts(CURVE_POINTS) if is_nested else whole_objects
    cuts = getattr(codec, "operating_points", nested)
    names = named_levels if is_nested else None
    return CodecPeer(codec, family=family, chunk_tokens=size, cuts=cuts, names=names)


def _settings(text: str) -> dict[str, Any]:
    """Read ``key=value,...``; a value is JSON where it can be, else text."""
    settings: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError("codec setting", got=item, expected="key=value")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _codecs(codecs: Sequence[tuple[str, Codec]], family: str, size: int) -> list[Peer]:
    return [
        CodecPeer(codec, family=family, label=label, chunk_tokens=size) for label, codec in codecs
    ]


def _raw(family: str, calibration: Calibration, size: int) -> list[Peer]:
    return _codecs([("", get_codec("raw"))], family, size)


def _int8(family: str, calibration: Calibration, size: int) -> list[Peer]:
    codecs = [("plain", get_codec("int8", entropy=False)), ("entropy", get_codec("int8"))]
    return _codecs(codecs, family, size)


def _cachegen(tables: str) -> Callable[[str, Calibration, int], list[Peer]]:
    def levels(family: str, calibration: Calibration, size: int) -> list[Peer]:
        codecs: list[tuple[str, Codec]] = [
            (f"level {level}", CacheGenCodec(level=level, tables=tables)) for level in LEVELS
        ]
        return _codecs(codecs, family, size)

    return levels


def _cachegen_paper(family: str, calibration: Calibration, size: int) -> list[Peer]:
    """Anchor deltas, thirds of depth, tables from calibration (CacheGen, sections 5.1 and 5.2)."""
    chunks = calibration.chunks(size)
    if not chunks:
        raise ConfigError("calibration contexts", got=0, expected="at least one")
    layers = chunks[0].geometry.layers
    codecs: list[tuple[str, Codec]] = []
    for bins in PAPER_BINS:
        grading = CacheGenConfig.from_bins([bins] * layers, [bins] * layers)
        profile = CacheGenCodec(grading=grading, delta="anchor").fit_profile(chunks)
        codec = CacheGenCodec(grading=grading, delta="anchor", tables="profile", profile=profile)
        codecs.append((f"{bins} bins", codec))
    return _codecs(codecs, family, size)


def _lmcache(family: str, calibration: Calibration, size: int) -> list[Peer]:
    return [CacheGenLMCachePeer(level, family=family, chunk_tokens=size) for level in LEVELS]


def _int8_zstd(family: str, calibration: Calibration) -> list[Peer]:
    return [Int8ZstdPeer(family=family)]


def _kivi(family: str, calibration: Calibration) -> list[Peer]:
    return [KiviPeer(bits, family=family) for bits in KIVI_BITS]


def _kivi_whole(family: str, calibration: Calibration) -> list[Peer]:
    return [KiviPeer(bits, family=family, window_tokens=0) for bits in KIVI_BITS]


def _turboquant(family: str, calibration: Calibration) -> list[Peer]:
    return [TurboQuantPeer(bits, family=family) for bits in TURBOQUANT_BITS]


def _kvtc(family: str, calibration: Calibration) -> list[Peer]:
    return [KvtcPeer(calibration.kvtc, ratio, family=family) for ratio in KVTC_RATIOS]


def _kvtc_whole(family: str, calibration: Calibration) -> list[Peer]:
    return [
        KvtcPeer(calibration.kvtc, ratio, family=family, window_tokens=0) for ratio in KVTC_RATIOS
    ]


def _h2o(family: str, calibration: Calibration) -> list[Peer]:
    return [H2OPeer(share, family=family) for share in H2O_SHARES]


_CHUNKED: dict[str, Callable[[str, Calibration, int], list[Peer]]] = {
    "raw": _raw,
    "int8": _int8,
    "cachegen": _cachegen("parametric"),
    "cachegen-chunk": _cachegen("chunk"),
    "cachegen-paper": _cachegen_paper,
    "cachegen-lmcache": _lmcache,
}
_WHOLE: dict[str, Callable[[str, Calibration], list[Peer]]] = {
    "int8-zstd": _int8_zstd,
    "kivi": _kivi,
    "kivi-no-window": _kivi_whole,
    "turboquant": _turboquant,
    "kvtc": _kvtc,
    "kvtc-no-window": _kvtc_whole,
    "h2o": _h2o,
}
NAMES = (*_CHUNKED, *_WHOLE)
