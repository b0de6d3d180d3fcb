"""The near side of ``test_real_link.py``: runs inside the namespace, prints what happened as JSON.

Usage: real_link_client.py URL LINK RATE DEADLINE_S DROP_AT_S
"""

from __future__ import annotations

import json
import sys
import threading
import time

import ml_dtypes
import numpy as np

from cachegen.bench.shaped_link import ShapedLink
from cachegen.chunk import KVChunk
from cachegen.codec.basis import VALUE_WEIGHT
from cachegen.codec.container import read_header
from cachegen.codec.progressive import ProgressiveCodec, spread_of
from cachegen.store.open import open_store
from cachegen.stream.fetch import Fetcher
from cachegen.stream.policies import DeadlinePolicy
from cachegen.types import ChunkKey

CHUNKS = 4


def measured_distortion(true: KVChunk, decoded: KVChunk, data: bytes) -> float:
    """What the object's table promises, measured: weighted squared error over squared spread."""
    error = 0.0
    for left, right in zip(true.layers, decoded.layers, strict=True):
        for plane, other, weight in (
            (left.keys, right.keys, 1.0),
            (left.values, right.values, VALUE_WEIGHT),
        ):
            difference = plane.astype(np.float64) - other.astype(np.float64)
            error += float(np.square(weight * difference).sum())
    header = read_header(data)
    return error / (header.value_count * spread_of(header) ** 2)


def main() -> None:
    url, name, rate, deadline_s, drop_at_s = (*sys.argv[1:3], *map(float, sys.argv[3:]))
    link, store = ShapedLink.existing(name), open_store(url)
    rng = np.random.default_rng(11)
    shape = (8, 2, CHUNKS * 256, 4, 64)
    spread = np.exp(rng.normal(-0.5, 0.7, (8, 2, 1, 4, 64)))
    kv = rng.normal(0, 1, shape) * spread + rng.normal(0, 2, spread.shape)
    chunks = KVChunk.from_array(kv.astype(ml_dtypes.bfloat16)).split(256)
    keys = [ChunkKey(b"n" * 32, bytes([index]) * 32, b"c" * 32) for index in range(CHUNKS)]
    objects = [
        ProgressiveCodec().encode(chunk, key=key) for key, chunk in zip(keys, chunks, strict=True)
    ]
    for key, data in zip(keys, objects, strict=True):
        store.put(key.name, data)
    dropped_at = []

    def drop(began: float) -> None:
        link.shape(rate / 10)
        dropped_at.append(time.monotonic() - began)

    with Fetcher(store) as fetcher:
        calm = fetcher.request(keys).wait()  # learns what link and decoder do
        steady = fetcher.request(keys, policy=DeadlinePolicy(), deadline_s=deadline_s).wait()
        began = time.monotonic()
        timer = threading.Timer(drop_at_s, drop, (began,))
        timer.start()
        report = fetcher.request(keys, policy=DeadlinePolicy(), deadline_s=deadline_s).wait()
        ended = time.monotonic()
        timer.join()
    print(
        json.dumps(
            {
                "object_bytes": [len(data) for data in objects],
                "calm_s": calm.seconds,
                "calm": dict(calm.reasons),
                "steady_distortion": [item.distortion for item in steady.chunks],
                "steady_s": steady.seconds,
                "seconds": ended - began,
                "dropped_at_s": dropped_at[0],
                "reasons": dict(report.reasons),
                "read_bytes": [item.read_bytes for item in report.chunks],
                "wire_bytes": report.wire_bytes,
                "distortion": [item.distortion for item in report.chunks],
                "measured": [
                    measured_distortion(chunks[item.index], item.chunk, objects[item.index])
                    for item in report.chunks
                    if item.chunk is not None
                ],
            }
        )
    )


main()
