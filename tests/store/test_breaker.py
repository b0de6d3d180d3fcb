from collections.abc import Callable, Iterator

import pytest

from cachegen.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from cachegen.store import BreakerPolicy, BreakerStore, MemoryStore, RetryPolicy, deadline
from cachegen.store.breaker import Breaker
from cachegen.store.retry import Retrier

WHERE = "the remote"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def fail(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def down() -> StoreUnavailableError:
    return StoreUnavailableError("connection", reason="refused")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(BreakerPolicy(failures=3, pause_s=10, cap_s=35), clock=clock)


def break_it(breaker: Breaker, times: int = 3) -> None:
    for _ in range(times):
        with pytest.raises(StoreUnavailableError):
            breaker.run(fail(down()), WHERE)


def test_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    break_it(breaker, 2)
    assert breaker.run(lambda: 7, WHERE) == 7
    break_it(breaker, 2)
    assert breaker.state == "closed"
    break_it(breaker, 1)
    assert breaker.state == "open"
    with pytest.raises(StoreUnavailableError, match="the remote") as caught:
        breaker.run(lambda: 7, WHERE)
    assert caught.value.reason == "circuit_open"


def test_one_probe_after_the_pause_closes_it(breaker: Breaker, clock: Clock) -> None:
    break_it(breaker)
    clock.now_s += 10
    assert breaker.state == "half_open"

    def probe() -> int:
        with pytest.raises(StoreUnavailableError) as caught:  # a second call beside the probe
            breaker.run(lambda: 0, WHERE)
        assert caught.value.reason == "circuit_open"
        return 7

    assert breaker.run(probe, WHERE) == 7
    assert breaker.state == "closed"
    break_it(breaker, 2)
    assert breaker.state == "closed"


def test_probes_that_fail_double_the_pause_up_to_the_cap(breaker: Breaker, clock: Clock) -> None:
    break_it(breaker)
    for pause_s in (10, 20, 35, 35):
        clock.now_s += 0.79 * pause_s
        assert breaker.state == "open"
        clock.now_s += 0.21 * pause_s
        break_it(breaker, 1)
    assert breaker.stats()["opened"] == 5


def test_what_is_not_the_stores_fault_does_not_count(breaker: Breaker, clock: Clock) -> None:
    for error in (ConfigError("name"), KeyError("x"), StoreFullError("disk"), StoreError("odd")):
        for _ in range(4):
            with pytest.raises(type(error)):
                breaker.run(fail(error), WHERE)
    assert breaker.state == "closed"

    def late_at_once() -> None:
        clock.now_s += 0.001
        raise StoreTimeoutError("answer")

    def late() -> None:
        clock.now_s += 0.5
        raise StoreTimeoutError("answer")

    for call, state in ((late_at_once, "closed"), (late, "open")):
        for _ in range(3):
            with pytest.raises(StoreTimeoutError):
                breaker.run(call, WHERE)
        assert breaker.state == state


def test_an_interrupted_probe_leaves_the_next_one_a_chance(breaker: Breaker, clock: Clock) -> None:
    break_it(breaker)
    clock.now_s += 10
    with pytest.raises(KeyboardInterrupt):
        breaker.run(fail(KeyboardInterrupt()), WHERE)  # type: ignore[arg-type]
    assert breaker.run(lambda: 7, WHERE) == 7


def test_counts_by_reason(breaker: Breaker) -> None:
    breaker.run(lambda: 1, WHERE)
    break_it(breaker)
    with pytest.raises(StoreUnavailableError):
        breaker.run(lambda: 1, WHERE)
    stats = breaker.stats()
    assert (stats["calls"], stats["failures"], stats["refused"]) == (5, 3, 1)
    assert (stats["failures.refused"], stats["opened"]) == (3, 1)
    assert (stats["state.open"], stats["state.closed"], stats["state.half_open"]) == (1, 0, 0)


def test_failures_in_the_middle_of_a_stream_count() -> None:
    class Streaming(MemoryStore):
        def get_stream(
            self, name: str, *, slice_bytes: int, begin: int = 0, end: int | None = None
        ) -> Iterator[memoryview]:
            yield memoryview(b"abc")
            raise StoreUnavailableError("connection", reason="reset")

    store = BreakerStore(Streaming(), BreakerPolicy(failures=2, pause_s=10))
    for _ in range(2):
        stream = store.get_stream("a", slice_bytes=3)
        assert stream is not None and next(stream) == b"abc"
        with pytest.raises(StoreUnavailableError):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    assert store.stats()["failures.reset"] == 2
    # The end of an iterator is a success of its own, so failures were never in a row.
    assert store.breaker.state == "closed"


def test_abilities_that_the_store_lacks_are_named() -> None:
    class Least:
        def put(self, name: str, data: object) -> None: ...
        def get(self, name: str) -> None: ...
        def get_range(self, name: str, begin: int, end: int) -> None: ...
        def exists(self, names: list[str]) -> list[bool]:
            return [False for _ in names]

        def delete(self, name: str) -> None: ...

    store = BreakerStore(Least())  # type: ignore[arg-type]
    assert store.exists(["a"]) == [False]
    for call in (
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_stream("a", []),
        lambda: store.get_ranges("a", []),
        lambda: store.get_stream("a", slice_bytes=1),
        lambda: store.names(),
        lambda: store.entries(),
        lambda: store.used_bytes(),
    ):
        with pytest.raises(ConfigError, match="Least"):
            call()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BreakerPolicy(failures=0),
        lambda: BreakerPolicy(pause_s=0),
        lambda: BreakerPolicy(pause_s=9, cap_s=1),
        lambda: RetryPolicy(attempts=0),
        lambda: RetryPolicy(base_s=2, cap_s=1),
        lambda: RetryPolicy(budget_ratio=-1),
    ],
)
def test_policies_that_cannot_work(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="policy"):
        wrong()


# -- retries --------------------------------------------------------------------------------------


class Flaky:
    """Fails so many times, then works."""

    def __init__(self, *errors: StoreError) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


QUICK = RetryPolicy(attempts=4, base_s=0, cap_s=0)


def test_tries_again_what_may_pass() -> None:
    retrier = Retrier(QUICK)
    call = Flaky(down(), StoreUnavailableError("x", reason="reset"))
    assert retrier.run(call) == "done"
    assert call.calls == 3
    assert retrier.stats() == {"retries": 2, "retries.refused": 1, "retries.reset": 1}


def test_gives_up_after_the_last_attempt() -> None:
    call = Flaky(*[down() for _ in range(9)])
    with pytest.raises(StoreUnavailableError):
        Retrier(QUICK).run(call)
    assert call.calls == 4


def test_other_errors_are_not_tried_again() -> None:
    for error in (StoreTimeoutError("x"), StoreFullError("x"), StoreError("x")):
        call = Flaky(error)
        with pytest.raises(type(error)):
            Retrier(QUICK).run(call)
        assert call.calls == 1


def test_a_retry_that_is_cut_short_reports_the_failure_before_it() -> None:
    call = Flaky(down(), StoreTimeoutError("late"))
    with pytest.raises(StoreUnavailableError) as caught:
        Retrier(QUICK).run(call)
    assert caught.value.reason == "refused"


def test_unsafe_calls_are_not_repeated() -> None:
    call = Flaky(StoreUnavailableError("x", reason="reset"), down())
    with pytest.raises(StoreUnavailableError):
        Retrier(QUICK).run(call, is_safe=lambda error: error.reason == "refused")
    assert call.calls == 1


def test_no_retry_begins_after_the_deadline() -> None:
    call = Flaky(*[down() for _ in range(9)])
    with deadline(0.0), pytest.raises(StoreUnavailableError):
        Retrier(RetryPolicy(attempts=9, base_s=0.1, cap_s=1)).run(call)
    assert call.calls == 1


def test_the_budget_bounds_retries_of_a_store_that_is_down() -> None:
    retrier = Retrier(RetryPolicy(attempts=4, base_s=0, cap_s=0, budget_ratio=0.1, budget_calls=5))
    calls = 0
    for _ in range(100):
        call = Flaky(*[down() for _ in range(9)])
        with pytest.raises(StoreUnavailableError):
            retrier.run(call)
        calls += call.calls
    # The burst of 5 and a tenth of the 100 calls, where unbounded it would be 300.
    assert 110 <= calls <= 116
    assert retrier.stats()["retries_refused"] > 80
