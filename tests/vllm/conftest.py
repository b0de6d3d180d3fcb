"""Live tests with a real vLLM: ``make test-vllm``. Without vLLM nothing here is collected.

Engines run inside the test process, one after another: starting one takes seconds then, and tests
can reach into the store. ``test_processes.py`` runs vLLM the way a server does.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

_SPEC = importlib.util.find_spec("vllm")
# This folder itself may look like a package of that name, but it has no __init__.py.
if _SPEC is None or _SPEC.origin is None:
    collect_ignore_glob = ["test_*.py"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.update(ENVIRONMENT)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="session")
def baseline() -> object:
    """What vLLM answers without a connector; computed once per prompt."""
    from engines import BASELINE

    return BASELINE
