"""What a scheduler knows of its requests: what to load, what to save, and when to hold blocks.

Free of any engine: a connector feeds it the engine's events and passes its plans to the workers.

Which tokens have their KV in the cache after a step follows from two numbers: those that the step
reaches, and those whose ids are known. A token's KV is computed in the step after it was sampled,
so a token with a known id that a step reaches is right in the cache when that step ends, also under
asynchronous scheduling and with rejected drafts.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cachegen.connectors.adapter import LoadJob, Piece, SaveJob
from cachegen.connectors.lookup import Lookup, Question, Seed
from cachegen.connectors.metrics import Counters
from cachegen.errors import ConfigError
from cachegen.settings import Settings

# Chains of chunks that were handed over for saving; more than an engine's cache ever holds.
MAX_REMEMBERED = 1 << 17
# Then a chunk that the store still lacks is handed over once more: a save may have been dropped.
RETRY_S = 30.0


@dataclass
class Step:
    """A request's share of a step.

    block_ids: all of its blocks, or with is_more those that were added to them.
    computed: tokens with KV before the step; scheduled: tokens that it computes.
    """

    request_id: str
    block_ids: Sequence[int]
    computed: int
    scheduled: int
    is_more: bool = False


@dataclass(frozen=True)
class Plan:
    """What workers do in a step.

    released: requests whose blocks are free once saves are copied. given_blocks: those that were
        given to requests since the step before; no other block that is whole is written to.
    """

    loads: tuple[LoadJob, ...] = ()
    saves: tuple[SaveJob, ...] = ()
    cancelled: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    given_blocks: frozenset[int] = frozenset()


@dataclass
class _Track:
    request_id: str
    tokens: Sequence[int]
    prompt_tokens: int
    seed: Seed
    question: Question | None
    saves: bool = True
    block_ids: list[int] = field(default_factory=list)
    local_tokens: int = 0
    chains: list[bytes] = field(default_factory=list)
    next_save: int = 0
    # Chunks from this one on are not tried again for this request.
    barred: int | None = None
    loading: tuple[Piece, ...] = ()


class Tracker:
    """Follows requests from arrival to end.

    loads, saves: False to load or to save nothing; ``saves`` may be changed at any time.
    is_exact: whether what is loaded equals what was saved; if not, blocks that it fills are never
        saved.
    """

    def __init__(
        self,
        lookup: Lookup,
        *,
        block_tokens: int,
        settings: Settings,
        counters: Counters,
        loads: bool,
        saves: bool,
        is_exact: bool,
    ) -> None:
        if settings.chunk_tokens % block_tokens:
            raise ConfigError(
                "chunk size in tokens",
                got=settings.chunk_tokens,
                expected=f"a multiple of the engine's block size, {block_tokens}",
                remedy="set chunk_tokens or the engine's block size",
            )
        self._lookup = lookup
        self._block_tokens = block_tokens
        self._settings = settings
        self._counters = counters
        self._loads = loads
        self.saves = saves
        self._is_exact = is_exact
        self._tracks: dict[str, _Track] = {}
        self._inexact_blocks: set[int] = set()
        self._handed_over: OrderedDict[bytes, float] = OrderedDict()
        self._new_loads: list[LoadJob] = []
        self._end_saves: list[SaveJob] = []
        self._cancelled: list[str] = []
        self._released: list[str] = []

    def add(
        self,
        request_id: str,
        tokens: Sequence[int],
        seed: Seed,
        *,
        loads: bool = True,
        saves: bool = True,
    ) -> None:
        """Take in a request and begin its look-up.

        tokens: a live view that grows. loads, saves: False to load or to save nothing of it.
        """
        if request_id not in self._tracks and (loads or saves):
            prompt = list(tokens)
            question = self._lookup.ask(prompt, seed) if loads else None
            self._tracks[request_id] = _Track(
                request_id, tokens, len(prompt), seed, question, saves
            )

    def knows(self, request_id: str) -> bool:
        """True for a request that was added and has not ended."""
        return request_id in self._tracks

    def matched(self, request_id: str, local_tokens: int) -> int | None:
        """Return how many tokens beyond the engine's own can be loaded, None while unknown.

        local_tokens: found in the engine's own cache, whole blocks. At least one token of the
        request is left to compute.
        """
        track = self._tracks.get(request_id)
        if track is None:
            return 0
        track.local_tokens = local_tokens
        if track.question is None or not self._loads:
            return 0
        chunks = self._lookup.answer(track.question)
        if chunks is None:
            return None
        if track.barred is not None:
            chunks = min(chunks, track.barred)
        found = min(chunks * self._settings.chunk_tokens, len(track.tokens) - 1)
        beyond = found - local_tokens
        return beyond if beyond >= max(1, self._settings.min_hit_tokens) else 0

    def allocated(self, request_id: str, block_ids: Sequence[int], loaded_tokens: int) -> None:
        """Take note of the blocks a request got; loaded_tokens: to load, as ``matched`` said."""
        track = self._tracks.get(request_id)
        if track is None:
            return
        track.block_ids = list(block_ids)
        loaded: set[int] = set()
        for piece in track.loading:
            if track.barred is None or piece.index < track.barred:
                loaded.update(piece.block_ids)
        track.loading = ()
        # All blocks but those that a load has filled or another request shares are fresh.
        first = track.local_tokens // self._block_tokens
        fresh = set(track.block_ids[first:]) - (set() if loaded_tokens else loaded)
        self._inexact_blocks -= fresh
        if not loaded_tokens:
            return
        question = track.question
        assert question is not None
        begin, end = track.local_tokens, track.local_tokens + loaded_tokens
        track.loading = self._pieces(track, question.chains, begin, end)
        if not self._is_exact:
            for piece in track.loading:
                self._inexact_blocks.update(piece.block_ids)
        budget_s = max(0.0, self._settings.slo_s - question.waited_s)
        self._new_loads.append(LoadJob(request_id, track.loading, budget_s))
        # The wait before a second load, after a preemption, counts anew.
        question.asked_s = None

    def failed_blocks(self, block_ids: Iterable[int]) -> None:
        """Take note of blocks that a load left unfilled: they will be computed, not tried again."""
        failed = set(block_ids)
        if not failed:
            return
        self._inexact_blocks -= failed
        for track in self._tracks.values():
            for piece in track.loading:
                if failed.intersection(piece.block_ids):
                    track.barred = min(piece.index, track.barred or piece.index)
                    # What the store claims to hold cannot be loaded: save it again.
                    self._handed_over.pop(piece.chain, None)
                    if track.question is not None and track.question.chunks is not None:
                        track.question.chunks = min(track.question.chunks, piece.index)
                    break

    def plan(self, steps: Iterable[Step]) -> Plan:
        """Plan a step of the engine and forget what was pending."""
        saves = list(self._end_saves)
        given = {block for job in self._new_loads for p in job.pieces for block in p.block_ids}
        for step in steps:
            given.update(step.block_ids)
            track = self._tracks.get(step.request_id)
            if track is None:
                continue
            if step.is_more:
                track.block_ids.extend(step.block_ids)
                self._inexact_blocks.difference_update(step.block_ids)
            else:
                track.block_ids = list(step.block_ids)
            reached = min(step.computed + step.scheduled, self._worth_saving(track))
            pieces = self._due(track, reached)
            if pieces:
                saves.append(SaveJob(track.request_id, pieces))
        plan = Plan(
            tuple(self._new_loads),
            tuple(saves),
            tuple(self._cancelled),
            tuple(self._released),
            frozenset(given),
        )
        self._new_loads, self._end_saves = [], []
        self._cancelled, self._released = [], []
        return plan

    def finish(
        self, request_id: str, block_ids: Sequence[int], *, computed: int, is_complete: bool
    ) -> bool:
        """End a request.

        computed: tokens whose KV is in its blocks. is_complete: False for an aborted request,
            which is not worth saving.
        Returns: True if its blocks must stay until workers have copied what is still to be saved.
        """
        track = self._tracks.pop(request_id, None)
        if track is None:
            return False
        if track.loading:
            self._cancelled.append(request_id)
            return False
        if not is_complete:
            return False
        track.block_ids = list(block_ids)
        pieces = self._due(track, min(computed, self._worth_saving(track)))
        if not pieces:
            return False
        self._end_saves.append(SaveJob(request_id, pieces))
        self._released.append(request_id)
        return True

    def _worth_saving(self, track: _Track) -> int:
        """Return how many of a request's tokens may be saved."""
        return len(track.tokens) if self._settings.save_decode else track.prompt_tokens

    def _due(self, track: _Track, reached: int) -> tuple[Piece, ...]:
        """Return the chunks that are whole in the cache now and not yet saved."""
        whole = reached // self._settings.chunk_tokens
        if not (self.saves and track.saves) or whole <= track.next_save:
            return ()
        if len(track.chains) < whole:
            tokens = list(track.tokens[: whole * self._settings.chunk_tokens])
            track.chains = track.seed.chains(tokens, self._settings.chunk_tokens)
        found = 0
        if track.question is not None:
            found = track.question.chunks or 0
        begin = track.next_save * self._settings.chunk_tokens
        track.next_save = whole
        due = []
        for piece in self._pieces(track, track.chains, begin, whole * self._settings.chunk_tokens):
            if piece.index < found:
                continue
            if time.monotonic() - self._handed_over.get(piece.chain, -RETRY_S) < RETRY_S:
                continue
            if self._inexact_blocks.intersection(piece.block_ids):
                self._counters.add("skipped_saves_total", reason="lossy")
                continue
            self._remember(piece.chain)
            due.append(piece)
        return tuple(due)

    def _pieces(
        self, track: _Track, chains: Sequence[bytes], begin: int, end: int
    ) -> tuple[Piece, ...]:
        """Cut tokens [begin, end), begin at a block's border, into parts of chunks."""
        size, block = self._settings.chunk_tokens, self._block_tokens
        pieces = []
        for index in range(begin // size, -(-end // size)):
            low = max(begin, index * size) // block
            high = -(-min(end, (index + 1) * size) // block)
            ids = tuple(track.block_ids[low:high])
            pieces.append(Piece(index, chains[index], ids, low - index * size // block))
        return tuple(pieces)

    def _remember(self, chain: bytes) -> None:
        self._handed_over[chain] = time.monotonic()
        self._handed_over.move_to_end(chain)
        if len(self._handed_over) > MAX_REMEMBERED:
            self._handed_over.popitem(last=False)
