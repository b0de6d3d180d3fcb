"""The way of what was encoded to the host: sizes first, then the bytes in one copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cachegen.codec.gpu.batch import LANES, MAX_GRID_SHARE, WARPS
from cachegen.codec.gpu.encode_batch import MAX_WARPS, CodedSegment, EncodeBatch
from cachegen.codec.header import padded
from cachegen.native.cuda import encode_plan, plan
from cachegen.native.cuda.device import Device


class Results:
    """What the kernels of a batch found, on the host.

    image: the results. upload, work: addresses of the batch's buffers.
    """

    def __init__(
        self, batch: EncodeBatch, image: NDArray[np.uint8], upload: int, work: int
    ) -> None:
        self.batch = batch
        self._image = image
        self._places = upload, work, work + batch.job.results_offset

    def array(self, address: np.uint64, dtype: Any, count: int) -> NDArray[Any]:
        """Return numbers of the results."""
        begin = int(address ^ plan.RESULTS)
        size = count * np.dtype(dtype).itemsize
        return self._image[begin : begin + size].view(dtype)

    def structs(self, address: np.uint64, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """Return an array of structs of the results."""
        return self.array(address, dtype, count)

    def resolve(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return where addresses of the batch's plan lie."""
        resolved: NDArray[np.uint64] = plan.resolve(addresses, *self._places)
        return resolved

    def streams(self, coded: CodedSegment) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return words and escapes (S, 2) of a segment's streams, and their padded sizes (S,)."""
        counts = (
            self.array(coded.counts, "<u4", 2 * len(coded.runs)).reshape(-1, 2).astype(np.int64)
        )
        steps = (coded.runs["end_step"] - coded.runs["begin_step"]).astype(np.int64)
        sizes = 4 * coded.runs["lanes"].astype(np.int64) + 4 * coded.raw * steps
        sizes += 2 * counts[:, 0] + counts[:, 1]
        return counts, sizes + -sizes % 4

    def measure(self, coded: CodedSegment) -> int:
        """Return the size of a segment's rANS body."""
        return 4 + 8 * len(coded.runs) + int(self.streams(coded)[1].sum())


class Collector:
    """Lays segments out in one buffer, has the device fill it, and hands out their bytes."""

    def __init__(self, device: Device, record: NDArray[Any], stream: Any) -> None:
        self._device = device
        self._record = record  # addresses of the batch's structs, real ones
        self._stream = stream
        self._size = 0
        self._spans: list[NDArray[Any]] = []
        self._plain: list[NDArray[Any]] = []
        self._tokens: list[tuple[int, NDArray[Any]]] = []
        self._directories: list[tuple[int, NDArray[np.uint32]]] = []
        self._image: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def reserve(self, size_bytes: int) -> int:
        """Return the offset of so many bytes."""
        offset = self._size
        self._size += padded(size_bytes)
        return offset

    def plain(
        self,
        what: int,
        owner: int,
        size_bytes: int,
        *,
        pass_index: int = 0,
        bits: int = 0,
        tokens: NDArray[Any] | None = None,
    ) -> int:
        """Ask for symbols without entropy coding, or for rows; returns their offset."""
        offset = self.reserve(size_bytes)
        row = np.zeros(1, encode_plan.PLAIN)
        row["to"], row["what"], row["owner"] = offset, what, owner
        row["pass"], row["bits"] = pass_index, bits
        if tokens is not None:
            row["count"] = len(tokens)
            self._tokens.append((len(self._plain), tokens))
        self._plain.append(row)
        return offset

    def copy(self, address: np.uint64, size_bytes: int, results: Results) -> int:
        """Ask for bytes of the batch's workspace; returns their offset."""
        offset = self.reserve(size_bytes)
        span = np.zeros(int(size_bytes > 0), encode_plan.SPAN)
        span["from"], span["to"], span["size"] = address, offset, size_bytes
        span["from"] = results.resolve(span["from"])
        self._spans.append(span)
        return offset

    def coded(self, coded: CodedSegment, results: Results) -> int:
        """Ask for a rANS body; returns its offset."""
        runs = coded.runs
        counts, sizes = results.streams(coded)
        head = 4 + 8 * len(runs)
        offset = self.reserve(head + int(sizes.sum()))
        self._directories.append(
            (offset, np.concatenate([[coded.spacing], counts.ravel()]).astype("<u4"))
        )
        steps = (runs["end_step"] - runs["begin_step"]).astype(np.int64)
        at = offset + head + np.cumsum(sizes) - sizes
        words, escapes = counts[:, 0], counts[:, 1]
        word_from = runs["words"] + (2 * (runs["word_room"] - words)).astype(np.uint64)
        escape_from = runs["escapes"] + (runs["escape_room"] - escapes).astype(np.uint64)
        parts = (
            (runs["states"], 4 * runs["lanes"].astype(np.int64)),
            (runs["raw"], 4 * coded.raw * steps),
            (word_from, 2 * words),
            (escape_from, escapes),
        )
        for source, size in parts:
            spans = np.zeros(len(runs), encode_plan.SPAN)
            spans["from"], spans["to"], spans["size"] = results.resolve(source), at, size
            self._spans.append(spans[size > 0])
            at = at + size
        return offset

    def fetch(self) -> None:
        """Have the device fill the buffer and copy it to the host."""
        device, stream = self._device, self._stream
        out = device.allocate(max(self._size, 1), stream)
        device.zero(out.address, max(self._size, 1), stream)
        job = plan.Plan()
        base = np.uint64(out.address)
        if self._spans:
            spans = np.concatenate(self._spans)
            spans["to"] += base
            spans["from"] |= plan.ABSOLUTE
            spans["to"] |= plan.ABSOLUTE
            one = self._record.copy()
            one["items"] = job.structs(encode_plan.SPAN, spans)
            one["count"] = len(spans)
            one["extra"] = warps = min(-(-len(spans) // WARPS) * WARPS, MAX_WARPS)
            job.launch("copy_spans", warps // WARPS, one)
        if self._plain:
            rows = np.concatenate(self._plain)
            rows["to"] = (rows["to"] + base) | plan.ABSOLUTE
            for index, tokens in self._tokens:
                rows["tokens"][index] = job.upload.add(tokens)
            one = self._record.copy()
            one["items"] = job.structs(encode_plan.PLAIN, rows)
            one["extra"] = share = max(1, MAX_GRID_SHARE // len(rows))
            job.launch("write_plain", share * len(rows), one)
        upload = device.allocate(job.upload_bytes, stream)
        image, launches = job.finish(upload.address, 0)
        device.upload(upload.address, image, stream)
        for launch in launches:
            device.launch(*launch, stream)
        self._image = device.download(out.address, max(self._size, 1), stream)
        for offset, directory in self._directories:
            self._image[offset : offset + directory.nbytes] = directory.view(np.uint8)

    def bytes(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes of the buffer."""
        return self._image[offset : offset + size_bytes].tobytes()


__all__ = ["LANES", "Collector", "Results"]
