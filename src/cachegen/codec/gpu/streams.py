"""The directories of many rANS bodies at once, checked before a kernel sees anything of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.errors import CacheGenError
from cachegen.native.cuda import plan

Ints = NDArray[np.int64]
LANES = 32
MAX_STREAM_STEPS = 1 << 24
# Steps of a warp's share of a segment that is not rANS.
PLAIN_STEPS = 1024


class UnsoundError(CacheGenError):
    """Something in an object is not sound; decoding it on the CPU says what."""


def require(sound: bool | np.bool_, what: str) -> None:
    """Raise UnsoundError unless sound."""
    if not sound:
        raise UnsoundError(what)


def rans_streams(
    words: NDArray[np.uint32],
    address: np.uint64,
    bodies: NDArray[np.int64],
    may_escape: NDArray[np.bool_],
) -> tuple[NDArray[Any], Ints, Ints]:
    """Parse the directories of S rANS bodies of one object.

    words: the object as 32-bit words. address: of its first byte. bodies: (S, 6), for each body its
    first byte, its length in bytes, tokens, channels, digit shift, and the owner of its streams.
    may_escape: (S,) whether its models have escapes.
    Returns: the streams (STREAM) of all bodies in order, how many each has, their steps R.
    Raises: UnsoundError.
    """
    begin, length, tokens, channels, shift, owner = bodies.T
    places = -(-tokens // LANES)
    steps = places * channels
    require(bool((steps > 0).all() and (length >= 4).all()), "rANS body")
    spacing = words[begin // 4].astype(np.int64)
    require(bool((spacing >= 1).all() and (spacing <= MAX_STREAM_STEPS).all()), "steps per stream")
    counts = -(-steps // spacing)
    require(bool((length >= 4 + 8 * counts).all()), "rANS directory")
    segment = np.repeat(np.arange(len(begin)), counts)
    ends = np.cumsum(counts)
    index = np.arange(len(segment)) - (ends - counts)[segment]
    entry = begin[segment] // 4 + 1 + 2 * index
    word_count = words[entry].astype(np.int64)
    escape_count = words[entry + 1].astype(np.int64)
    first = index * spacing[segment]
    last = np.minimum(first + spacing[segment], steps[segment])
    place = first // channels[segment]
    lanes = -(-(tokens[segment] - place) // places[segment])
    raw = 4 * shift[segment] * (last - first)
    size = 4 * lanes + raw + 2 * word_count + escape_count
    padding = -size % 4
    total = np.cumsum(size + padding)
    before = total - size - padding
    start = before - before[(ends - counts)[segment]] + (begin + 4 + 8 * counts)[segment]
    finish = start + size + padding
    require(bool((finish[ends - 1] == begin + length).all()), "rANS body")
    require(bool((finish <= (begin + length)[segment]).all()), "rANS body")
    require(bool((may_escape[segment] | (escape_count == 0)).all()), "escape bytes")
    tails = words[finish // 4 - 1]
    mask = np.where(padding > 0, ~((np.int64(1) << (8 * (4 - padding))) - 1) & 0xFFFFFFFF, 0)
    require(not np.any(tails & mask.astype(np.uint32)), "padding")
    streams = np.zeros(len(segment), plan.STREAM)
    streams["base"] = address + start.astype(np.uint64)
    streams["raw"] = 4 * lanes
    streams["words"] = 4 * lanes + raw
    streams["word_count"] = word_count
    streams["escapes"] = 4 * lanes + raw + 2 * word_count
    streams["escape_count"] = escape_count
    streams["begin_step"], streams["end_step"] = first, last
    streams["lanes"] = lanes
    streams["owner"], streams["first"] = owner[segment], index
    return streams, counts, spacing


def plain_streams(tokens: int, channels: int, owner: int, spacing: int) -> NDArray[Any]:
    """Share the steps of a segment without rANS out to warps, ``spacing`` steps each."""
    places = -(-tokens // LANES)
    steps = places * channels
    begin = np.arange(0, steps, spacing)
    streams = np.zeros(len(begin), plan.STREAM)
    streams["lanes"] = -(-(tokens - begin // channels) // places)
    streams["begin_step"] = begin
    streams["end_step"] = np.minimum(begin + spacing, steps)
    streams["owner"] = owner
    streams["first"] = np.arange(len(begin))
    return streams
