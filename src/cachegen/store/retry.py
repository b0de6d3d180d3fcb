"""Trying again: with jitter, within the deadline, and only while retries stay rare."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cachegen.errors import ConfigError, StoreTimeoutError, StoreUnavailableError
from cachegen.store.clock import remaining_s

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and after what pauses a call is tried again.

    attempts: calls in all, the first included. base_s, cap_s: the n-th pause is drawn evenly
        from 0 to min(cap_s, base_s * 2**n), so that clients that fail together spread out.
    budget_ratio: retries per call in the long run; a store that is down is not hit with a
        multiple of its load. budget_calls: retries that may come in one burst.
    Raises: ConfigError for values that cannot work.
    """

    attempts: int = 4
    base_s: float = 0.05
    cap_s: float = 1.0
    budget_ratio: float = 0.2
    budget_calls: int = 20

    def __post_init__(self) -> None:
        sound = self.attempts >= 1 and 0 <= self.base_s <= self.cap_s
        if not (sound and self.budget_ratio >= 0 and self.budget_calls >= 0):
            raise ConfigError("retry policy", got=self, expected="attempts >= 1, base_s <= cap_s")


class Retrier:
    """Runs calls by a policy; one of them serves all threads of a store."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._lock = threading.Lock()
        self._budget = float(policy.budget_calls)
        self._random = random.Random()
        self._counts: Counter[str] = Counter()

    def run(
        self,
        call: Callable[[], _Result],
        *,
        is_safe: Callable[[StoreUnavailableError], bool] = lambda error: True,
    ) -> _Result:
        """Return what call returns, trying again after a StoreUnavailableError.

        is_safe: whether the call may be repeated after that error.
        Raises: the last error as soon as another try is not safe, not in the budget, or would
            begin after the deadline.
        """
        with self._lock:
            self._budget = min(
                self._budget + self.policy.budget_ratio, float(self.policy.budget_calls)
            )
        failure: StoreUnavailableError | None = None
        for attempt in range(self.policy.attempts):
            try:
                return call()
            except StoreTimeoutError:
                if failure is None:
                    raise
                break  # a retry that is cut short says less than the try before it
            except StoreUnavailableError as error:
                failure = error
            if attempt + 1 == self.policy.attempts:
                break
            pause_s = self._random.uniform(
                0, min(self.policy.cap_s, self.policy.base_s * 2**attempt)
            )
            left_s = remaining_s()
            is_late = left_s is not None and pause_s >= left_s
            if is_late or not is_safe(failure) or not self._spend(failure.reason):
                break
            time.sleep(pause_s)
        assert failure is not None
        raise failure

    def stats(self) -> dict[str, int]:
        """Return the retries so far, in all and by reason."""
        with self._lock:
            return dict(self._counts)

    def _spend(self, reason: str) -> bool:
        with self._lock:
            if self._budget < 1:
                self._counts["retries_refused"] += 1
                return False
            self._budget -= 1
            self._counts["retries"] += 1
            self._counts[f"retries.{reason}"] += 1
            return True
