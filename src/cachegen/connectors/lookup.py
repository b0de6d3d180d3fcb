"""Asking the store which chunks of a prompt it holds, without keeping a scheduler waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cachegen.connectors.adapter import names_of, reason_of
from cachegen.connectors.coding import Coding
from cachegen.connectors.metrics import Counters
from cachegen.settings import Settings
from cachegen.store.base import Store
from cachegen.store.clock import deadline
from cachegen.store.keys import chain_digests
from cachegen.stream.outcome import Reason

logger = logging.getLogger("vllm.cachegen")

# A scheduler waits no longer than this for an answer, once for each request.
FIRST_WAIT_S = 0.003


@dataclass(frozen=True)
class Seed:
    """What besides the tokens decides a request's KV.

    lora: digest of the adapter. tenant: salt. multimodal: hashes of images and the like.
    """

    lora: bytes = b""
    tenant: bytes = b""
    multimodal: tuple[bytes, ...] = ()

    def chains(self, tokens: Sequence[int], chunk_tokens: int) -> list[bytes]:
        """Return the chain digests of all whole chunks."""
        return chain_digests(
            tokens,
            chunk_tokens=chunk_tokens,
            lora=self.lora,
            tenant=self.tenant,
            multimodal=self.multimodal,
        )


@dataclass
class Question:
    """A look-up under way or answered.

    chunks: how many chunks from the front every rank's store holds, None until known.
    asked_s: when the scheduler first wanted to know.
    """

    tokens: Sequence[int]
    seed: Seed
    chains: list[bytes] = field(default_factory=list)
    chunks: int | None = None
    reason: str | None = None
    asked_s: float | None = None
    known: threading.Event = field(default_factory=threading.Event)

    @property
    def waited_s(self) -> float:
        """Seconds since the scheduler first wanted to know."""
        return 0.0 if self.asked_s is None else time.monotonic() - self.asked_s


class Lookup:
    """Answers how much of a prompt is stored; namespaces: of all ranks."""

    def __init__(
        self,
        store: Store,
        coding: Coding,
        *,
        namespaces: Sequence[bytes],
        settings: Settings,
        counters: Counters,
    ) -> None:
        self._store = store
        self._label = coding.label
        self._namespaces = list(namespaces)
        self._settings = settings
        self._counters = counters
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(4, "cachegen-lookup")

    def ask(self, tokens: Sequence[int], seed: Seed) -> Question:
        """Begin a look-up of a prompt."""
        question = Question(tokens, seed)
        self._counters.add("requests_total")
        self._counters.add("looked_up_tokens_total", len(tokens))
        if len(tokens) < self._settings.chunk_tokens:
            self._settle(question, 0, "short")
        else:
            self._threads.submit(self._run, question)
        return question

    def answer(self, question: Question) -> int | None:
        """Return how many chunks can be loaded, None while unknown; 0 once it took too long.

        Waits a moment the first time: a near store answers sooner than the engine makes a step in
        vain, and threads that look up need Python's lock, which a busy engine hardly lets go.
        """
        if question.asked_s is None:
            question.asked_s = time.monotonic()
            question.known.wait(FIRST_WAIT_S)
        if question.chunks is None and question.waited_s > self._settings.slo_s:
            self._settle(question, 0, Reason.LATE.value)
        return question.chunks

    def close(self) -> None:
        """Stop; waits for no store."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, question: Question) -> None:
        try:
            chains = question.seed.chains(question.tokens, self._settings.chunk_tokens)
            question.chains = chains
            ranks = len(self._namespaces)
            names = [
                name for chain in chains for name in names_of(self._namespaces, chain, self._label)
            ]
            with deadline(self._settings.slo_s):
                present = self._store.exists(names)
            count = 0
            while count < len(chains) and all(present[count * ranks : (count + 1) * ranks]):
                count += 1
            self._settle(question, count, Reason.MISSING.value)
        except Exception as error:
            logger.warning("look-up of a prompt: %s", error)
            self._settle(question, 0, reason_of(error))

    def _settle(self, question: Question, chunks: int, reason: str) -> None:
        """Give the answer, unless there is one: the first counts."""
        with self._lock:
            if question.chunks is not None:
                return
            question.chunks = chunks
            question.reason = None if chunks else reason
            question.known.set()
        if chunks:
            self._counters.add("request_hits_total")
            self._counters.add("hit_tokens_total", chunks * self._settings.chunk_tokens)
        else:
            self._counters.add("request_misses_total", reason=reason)
