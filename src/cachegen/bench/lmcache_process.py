"""What ``speed_lmcache`` runs with an interpreter that has LMCache: encode, decode, time.

Imports nothing of this package, which need not be installed there. Arguments: a folder with
kv.bin, LMCache's name of the model, [layers, tokens, heads, head size]. Reads words from standard
input, answers each with a line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until standard input ends."""
    # Whatever the libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder, model, (layers, tokens, heads, dim) = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.naive_serde import CreateSerde

    torch.set_num_threads(1)
    metadata = LMCacheMetadata(
        model_name=model,
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(layers, 2, tokens, heads, dim),
    )
    engine = LMCacheEngineConfig.from_defaults(chunk_size=tokens)
    serializer, deserializer = CreateSerde("cachegen", metadata, engine)
    data = bytearray((Path(folder) / "kv.bin").read_bytes())
    shape = (2, layers, tokens, heads * dim)
    kv = torch.frombuffer(data, dtype=torch.bfloat16).reshape(shape)

    def wrapped(tensor: Any) -> Any:
        description = MemoryObjMetadata(
            shape=tensor.shape,
            dtype=tensor.dtype,
            address=-1,
            phy_size=tensor.numel() * tensor.element_size(),
            ref_count=-1,
            fmt=MemoryFormat.KV_2LTD,
        )
        return TensorMemoryObj(raw_data=tensor, metadata=description, parent_allocator=None)

    # The first call compiles; few tokens are enough for that.
    few = wrapped(kv[:, :, : min(16, tokens)].contiguous())
    deserializer.deserialize(serializer.serialize(few))
    encoded: Any = None
    for line in sys.stdin:
        word = line.strip()
        begin = time.process_time()
        answer: dict[str, Any]
        if word == "encode":
            encoded = serializer.serialize(wrapped(kv))
            seconds = time.process_time() - begin
            answer = {"seconds": seconds, "bytes": len(encoded.byte_array)}
        elif word == "decode":
            decoded = deserializer.deserialize(encoded).tensor
            seconds = time.process_time() - begin
            error = (decoded.float() - kv.float()).abs().max() / kv.float().abs().max()
            answer = {"seconds": seconds, "error": float(error)}
        else:
            answer = {name: importlib.metadata.version(name) for name in ("lmcache", "numba")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
