"""How far one chunk of a request has come, and what of it the policy is shown."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from cachegen.stream.outcome import CAME, FetchedChunk, Reason
from cachegen.stream.partial import ObjectState, curve_of, curve_of_versions
from cachegen.stream.plan import ChunkCurve, ChunkState, Step


class Stage(enum.Enum):
    """How far a chunk has come."""

    LOADING = enum.auto()
    READY = enum.auto()  # no more will be read of it; waits for the decoder
    DECODING = enum.auto()
    DECODED = enum.auto()  # waits for its turn to be delivered
    LOST = enum.auto()  # cannot be loaded, but may be recomputed
    RECOMPUTING = enum.auto()
    RESOLVED = enum.auto()


@dataclass(eq=False)
class ChunkProgress:
    """One chunk of a request.

    versions: the objects that may serve it. choices: those of them that the store has, coarsest
    first, one for each step of a curve of separate objects.
    is_chosen: the policy has asked for some of it.
    request_s, began_s, arrived_s: when the request began, its first read was sent, and its last
        bytes came.
    error: why no more of it was read, although what there was is used.
    """

    index: int
    versions: tuple[ObjectState, ...]
    stage: Stage = Stage.LOADING
    version: int = 0
    is_chosen: bool = False
    choices: tuple[int, ...] = ()
    curve: ChunkCurve | None = None
    request_s: float = 0.0
    began_s: float = math.inf
    arrived_s: float = 0.0
    item: FetchedChunk | None = None
    error: Exception | None = None

    @property
    def object(self) -> ObjectState:
        """The object that is read for this chunk."""
        return self.versions[self.version]

    @property
    def level(self) -> Step | None:
        """The best step that is here, or None."""
        if len(self.versions) > 1:
            entry = self.object
            whole = self.is_chosen and not entry.left_bytes
            return Step(entry.have_bytes, 0.0) if whole else None
        if self.curve is None:
            return None
        steps = [step for step in self.curve.steps if step.end_bytes <= self.object.have_bytes]
        return steps[-1] if steps else None

    @property
    def is_complete(self) -> bool:
        """True if there is nothing better to be read."""
        level = self.level
        if level is None or len(self.versions) > 1 or self.curve is None:
            return level is not None
        return level.end_bytes >= self.curve.steps[-1].end_bytes

    @property
    def decoded_bytes(self) -> int | None:
        """Bytes of KV that it decodes to; None while that is not known."""
        header = self.object.header
        return None if header is None else header.decoded_bytes

    def learn_curve(self, quality: str | None) -> None:
        """Set the curve as soon as all headers are known. Raises: ConfigError for the quality."""
        if self.curve is not None or any(
            entry.header is None and not entry.missing for entry in self.versions
        ):
            return
        found = [(i, entry.header) for i, entry in enumerate(self.versions) if entry.header]
        if len(self.versions) == 1:
            self.curve = curve_of(found[0][1], quality)
            return
        found.sort(key=lambda pair: pair[1].object_bytes)
        self.choices = tuple(index for index, _ in found)
        self.curve = curve_of_versions([header for _, header in found])

    def fetched_chunk(
        self, reason: Reason, error: Exception | None = None, *, data: bytes = b""
    ) -> FetchedChunk:
        """Describe what became of it."""
        header = self.object.header
        level = self.level if reason in CAME else None
        return FetchedChunk(
            index=self.index,
            key=self.object.key,
            reason=reason,
            data=data,
            version=self.version,
            read_bytes=level.end_bytes if level else 0,
            object_bytes=header.object_bytes if header else 0,
            distortion=level.distortion if level else None,
            network_s=max(0.0, self.arrived_s - self.began_s),
            arrived_s=max(0.0, self.arrived_s - self.request_s),
            profile=header.profile if header else None,
            begin_token=self.curve.begin_token if self.curve else 0,
            tokens=self.curve.tokens if self.curve else 0,
            decoded_bytes=header.decoded_bytes if header else 0,
            error=error or self.error,
        )

    def view(self, assumed: ChunkCurve) -> ChunkState:
        """Describe the chunk to a policy; assumed is its curve while its own is not known.

        What is whole counts as decoded: decoding in time is the fetcher's care. The first bytes,
        read for the header, are not counted before the policy has asked for the chunk.
        """
        curve = self.curve or assumed
        if self.stage is Stage.LOST:
            return ChunkState(replace(curve, steps=()))
        if self.stage is Stage.RECOMPUTING:
            return ChunkState(curve)
        if self.stage is not Stage.LOADING:
            # Nothing can be done about it any more, as about one that was recomputed.
            return ChunkState(curve, recomputed=True)
        have = self.object.have_bytes if self.is_chosen else 0
        if curve.separate:
            level = self.choices.index(self.version) if self.is_chosen else None
            return ChunkState(curve, have, have, level=level)
        return ChunkState(curve, have, have)
