"""Fetching chunks from a store: network, decoding and delivery overlap, and deadlines hold.

A ``Fetcher`` owns a few threads and serves any number of requests; the same code serves the demo,
the benchmarks and the engines. What is read next is a policy's choice (``plan.py``).

>>> with Fetcher(store) as fetcher:  # doctest: +SKIP
...     for item in fetcher.request(keys, deadline_s=0.5, policy=policy):
...         print(item.index, item.reason, item.chunk)

Source: CacheGen (SIGCOMM'24), section 6, "KV streamer": transmission of a chunk is pipelined with
the decoding of the one before it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from cachegen.chunk import KVChunk
from cachegen.codec.registry import decode as decode_object
from cachegen.errors import ConfigError, ProfileError
from cachegen.profile import Profile
from cachegen.stream.bandwidth import BandwidthEstimator
from cachegen.stream.callbacks import Callbacks, Decode, Progress, Source
from cachegen.stream.outcome import FetchedChunk, FetchReport
from cachegen.stream.plan import Policy
from cachegen.stream.policies import FixedPolicy
from cachegen.stream.pool import Pool
from cachegen.stream.reading import Keys
from cachegen.stream.request import RequestState
from cachegen.stream.speeds import PrefillSpeed, SpeedLearner, Speeds

DEFAULT_READERS = 4
DEFAULT_DECODERS = 2
DEFAULT_HELD_BYTES = 256 << 20
# Encoded bytes per second, before the first chunk was decoded.
DECODE_GUESS_BYTES_PER_S = 20e6
PREFILL_GUESS = PrefillSpeed(token_s=1e-3, deviation=1.0)


class FetchHandle:
    """A request under way. Iterating yields every chunk in order, each once it is decided.

    As a context manager it cancels on leaving. Methods may be called from any thread.
    """

    def __init__(self, pool: Pool, state: RequestState, heard: threading.Condition) -> None:
        self._pool = pool
        self._state = state
        self._heard = heard

    @property
    def is_over(self) -> bool:
        """True once everything is decided and no callback runs any more."""
        with self._heard:
            return self._state.is_over

    def cancel(self) -> None:
        """Give up what has not come; returns at once, a callback that runs ends by itself."""
        self._pool.cancel(self._state)

    def wait(self, timeout_s: float | None = None) -> FetchReport | None:
        """Wait until the request is over. Returns: the report, or None if the time was up."""
        with self._heard:
            self._heard.wait_for(lambda: self._state.is_over, timeout_s)
            return self._state.report() if self._state.is_over else None

    def report(self) -> FetchReport:
        """Return how the chunks came out so far, in order; those undecided are not in it."""
        with self._heard:
            return self._state.report()

    def __iter__(self) -> Iterator[FetchedChunk]:
        index = 0
        while True:
            with self._heard:
                while len(self._state.items) <= index and not self._state.is_over:
                    self._heard.wait()
                if index >= len(self._state.items):
                    return
                item = self._state.items[index]
            yield item
            index += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Fetcher:
    """Fetches from one store, for many requests at once.

    source: the store; read by ``readers`` threads. Threads start with the first request and are
        daemons: one that hangs in the store is replaced, and given up at the end.
    decoders: threads that decode, deliver and recompute.
    held_bytes: bound on encoded bytes in memory or under way, over all requests.
    find_profile: returns the profile of a digest, or raises ProfileError.
    bandwidth, speeds: what is known of link and machine; they learn from every request.
    """

    def __init__(
        self,
        source: Source,
        *,
        readers: int = DEFAULT_READERS,
        decoders: int = DEFAULT_DECODERS,
        held_bytes: int = DEFAULT_HELD_BYTES,
        find_profile: Callable[[bytes], Profile] | None = None,
        bandwidth: BandwidthEstimator | None = None,
        speeds: SpeedLearner | None = None,
    ) -> None:
        for name, value in (("readers", readers), ("decoders", decoders), ("bytes", held_bytes)):
            if value < 1:
                raise ConfigError(f"{name} of a fetcher", got=value, expected="at least 1")
        self.bandwidth = bandwidth or BandwidthEstimator()
        self.speeds = speeds or SpeedLearner(Speeds(PREFILL_GUESS, DECODE_GUESS_BYTES_PER_S))
        self._find_profile = find_profile
        self._pool = Pool(
            source,
            readers=readers,
            decoders=decoders,
            held_bytes=held_bytes,
            bandwidth=self.bandwidth,
            speeds=self.speeds,
        )

    def request(
        self,
        keys: Keys,
        *,
        policy: Policy | None = None,
        deadline_s: float | None = None,
        quality: str | None = None,
        deliver: Callable[[FetchedChunk], None] | None = None,
        direct: Callable[[FetchedChunk], None] | None = None,
        recompute: Callable[[FetchedChunk], KVChunk | None] | None = None,
        fence: Callable[[], bool] | None = None,
        decode: Decode | None = None,
        progress: Progress | None = None,
    ) -> FetchHandle:
        """Start fetching chunks; returns at once.

        keys: in order of their tokens; for a chunk that several objects can serve, all their keys.
        policy: None reads every chunk in order. quality: nothing beyond this named quality is read.
        deadline_s: seconds from now. What is whole and decoded by then is handed over; the request
            is over then, but for a callback that runs.
        deliver: called with each chunk that came, one at a time, in order of tokens.
        direct: instead of deliver; gets the encoded ``data`` and decodes them itself, straight to
            where they belong. What it raises counts as a failed decode.
        recompute: prefills a chunk once all before it are delivered, and may return its KV. Without
            it, nothing behind a chunk that does not come is fetched.
        fence: asked before each of these calls; False ends the request, nothing is called any more.
        decode: instead of the registry's decode. progress: called often, with the report so far.
        All callbacks run in threads of the fetcher.
        Raises: ConfigError for settings that exclude each other, or after ``close``.
        """
        if deliver is not None and direct is not None:
            raise ConfigError("callbacks", got="deliver and direct", expected="one of them")
        if deadline_s is not None and math.isnan(deadline_s):
            raise ConfigError("deadline in seconds", got=deadline_s, expected="a number or None")
        now_s = time.monotonic()
        state = RequestState(
            keys,
            policy or FixedPolicy(),
            now_s=now_s,
            decode_cost=self._pool.decode_cost,
            deadline_s=math.inf if deadline_s is None else now_s + deadline_s,
            quality=quality,
            can_recompute=recompute is not None,
            delivers=deliver is not None or direct is not None,
            decodes=direct is None,
        )
        calls = Callbacks(decode or self._decode, deliver, direct, recompute, fence, progress)
        heard = self._pool.add(state, calls)
        if heard is None:
            raise ConfigError("fetcher", got="closed", expected="open", remedy="make a new one")
        return FetchHandle(self._pool, state, heard)

    def stats(self) -> dict[str, int]:
        """Return counters since it was built, such as ``{"requests": 2, "chunks.loaded": 8}``."""
        with self._pool.lock:
            return dict(self._pool.counts)

    def close(self) -> None:
        """Cancel all requests and end the threads; one that hangs in the store is left behind."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode(self, data: bytes, item: FetchedChunk) -> KVChunk:
        """Decode with the codec that the object names."""
        profile = None
        if item.profile is not None:
            if self._find_profile is None:
                raise ProfileError(
                    "profile",
                    got="none",
                    expected=item.profile.hex(),
                    remedy="pass find_profile to the fetcher",
                )
            profile = self._find_profile(item.profile)
        return decode_object(data, key=item.key, allow_partial=True, profile=profile)
