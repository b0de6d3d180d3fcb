"""Deadlines of callers: how long the store calls made in a block of code may take.

>>> with deadline(0.5):  # doctest: +SKIP
...     store.get(name)  # raises StoreTimeoutError after half a second at the latest
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from cachegen.errors import ConfigError, StoreTimeoutError

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

# The monotonic time at which the innermost, hence earliest, deadline ends.
_EXPIRES_AT: ContextVar[float] = ContextVar("cachegen_deadline", default=math.inf)


@contextmanager
def deadline(timeout_s: float | None) -> Iterator[None]:
    """Bound all store calls of this block, together, by timeout_s; None sets no bound.

    A deadline in a deadline can only be earlier. It holds for the thread that sets it; a call
    handed to another thread takes it along with ``carry_deadline``.
    Raises: ConfigError if timeout_s is not a number; store calls raise StoreTimeoutError.
    """
    if timeout_s is not None and math.isnan(timeout_s):
        raise ConfigError("deadline in seconds", got=timeout_s, expected="a number or None")
    with deadline_at(math.inf if timeout_s is None else time.monotonic() + timeout_s):
        yield


@contextmanager
def deadline_at(at_s: float) -> Iterator[None]:
    """Bound all store calls of this block by an instant of ``time.monotonic``."""
    token = _EXPIRES_AT.set(min(at_s, _EXPIRES_AT.get()))
    try:
        yield
    finally:
        _EXPIRES_AT.reset(token)


def expires_at_s() -> float:
    """Return the instant of ``time.monotonic`` at which the deadline ends, inf without one."""
    return _EXPIRES_AT.get()


def remaining_s() -> float | None:
    """Return the seconds left until the deadline, 0.0 when it has passed, None without one."""
    at = _EXPIRES_AT.get()
    return None if at == math.inf else max(0.0, at - time.monotonic())


def check_deadline(what: str) -> None:
    """Raise StoreTimeoutError, naming what, if the deadline has passed."""
    if remaining_s() == 0.0:
        raise late(what)


def late(what: str) -> StoreTimeoutError:
    """Make the error of a call that took too long."""
    return StoreTimeoutError(
        what,
        got="no answer before the deadline",
        remedy="raise the deadline or the timeout of the store, or look at the link to it",
    )


def carry_deadline(call: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Wrap call so that it keeps the deadline of this thread when another thread runs it."""
    at_s = _EXPIRES_AT.get()

    def carried(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with deadline_at(at_s):
            return call(*args, **kwargs)

    return carried
