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
from cachegen.codec.basis import plain_basis, planes_of_group
from cachegen.codec.container import read_header
from cachegen.codec.progressive import ProgressiveCodec, spread_of
from cachegen.store.open import open_store
from cachegen.stream.fetch import Fetcher
from cachegen.stream.policies import DeadlinePolicy
from cachegen.types import ChunkKey

CHUNKS = 4


def measured_distortion(true: KVChunk, decoded: KVChunk, data: bytes) -> float:
    """What the object's table promises, measured: weighted squared error over squared spread."""
    header, basis, error = read_header(data), plain_basis(true), 0.0
    for group, factor in zip(basis.groups, basis.error_weights(), strict=True):
        for layer, is_value in planes_of_group(group):
            planes = (chunk.layers[layer].plane(is_value=is_value) for chunk in (true, decoded))
            left, right = (plane.astype(np.float64) for plane in planes)
            weight = basis.value_weight if is_value else 1.0
            error += factor * float(np.square(weight * (left - right)).sum())
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
