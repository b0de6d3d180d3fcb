"""The policies by name, for the command line, the fetcher and the simulator."""

from __future__ import annotations

from collections.abc import Callable

from cachegen.errors import ConfigError
from cachegen.stream.deadline import DeadlinePolicy
from cachegen.stream.hybrid import HybridPolicy
from cachegen.stream.plan import Policy
from cachegen.stream.rules import CachegenPolicy, FixedPolicy

__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "CachegenPolicy",
    "DeadlinePolicy",
    "FixedPolicy",
    "HybridPolicy",
    "get_policy",
]

POLICIES: dict[str, Callable[[], Policy]] = {
    "cachegen": CachegenPolicy,
    "fixed": FixedPolicy,
    "deadline": DeadlinePolicy,
    "hybrid": HybridPolicy,
}
DEFAULT_POLICY = "deadline"


def get_policy(name: str) -> Policy:
    """Return the policy of that name with default settings. Raises: ConfigError."""
    if name not in POLICIES:
        raise ConfigError("policy", got=name, expected=f"one of {', '.join(POLICIES)}")
    return POLICIES[name]()
