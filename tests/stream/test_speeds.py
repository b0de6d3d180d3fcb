from __future__ import annotations

import math
import random

import pytest

from cachegen.errors import ConfigError
from cachegen.stream.speeds import PrefillSpeed, SpeedLearner, Speeds

TRUE = PrefillSpeed(1e-4, 2e-9)


def test_prefill_grows_with_the_context() -> None:
    assert TRUE.seconds(0, 1000) == pytest.approx(0.1 + 2e-9 * 1000 * 500)
    first, second = TRUE.seconds(0, 4000), TRUE.seconds(4000, 4000)
    assert second > first
    assert TRUE.seconds(0, 8000) == pytest.approx(first + second)


def test_risk_of_a_prefill() -> None:
    speed = PrefillSpeed(1e-4, deviation=0.1)
    assert speed.probability_late(1.0, 1.0) == pytest.approx(0.5)
    assert speed.probability_late(1.0, 1.2) == pytest.approx(0.023, abs=1e-3)
    assert speed.probability_late(0.0, 0.0) == 0.0
    sure = PrefillSpeed(1e-4, deviation=0.0)
    assert (sure.probability_late(1.0, 1.0), sure.probability_late(1.0, 0.99)) == (0.0, 1.0)


@pytest.mark.parametrize("settings", [(0.0, 0.0), (1.0, -1.0), (math.nan, 0.0), (1.0, math.inf)])
def test_speeds_that_cannot_be_are_refused(settings: tuple[float, float]) -> None:
    with pytest.raises(ConfigError):
        PrefillSpeed(*settings)


def test_decode_speed_has_to_be_positive() -> None:
    with pytest.raises(ConfigError):
        Speeds(None, 0.0)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_both_speeds_are_learned(factor: float) -> None:
    guess = PrefillSpeed(TRUE.token_s * factor, TRUE.pair_s * factor, deviation=0.3)
    learner = SpeedLearner(Speeds(guess, 1e6))
    random_ = random.Random(3)
    for _ in range(300):
        begin = random_.randrange(0, 200_000, 1000)
        seconds = TRUE.seconds(begin, 1000) * math.exp(random_.gauss(0.0, 0.05))
        learner.observe_prefill(begin, 1000, seconds)
        learner.observe_decode(10**7, 10**7 / 5e8)
    learned = learner.speeds()
    assert learned.prefill is not None
    for begin in (0, 50_000, 150_000):
        expected = TRUE.seconds(begin, 1000)
        assert learned.prefill.seconds(begin, 1000) == pytest.approx(expected, rel=0.1)
    assert 0.02 <= learned.prefill.deviation < 0.15
    assert learned.decode_bytes_per_s == pytest.approx(5e8, rel=0.05)


def test_one_observation_outweighs_the_guess() -> None:
    learner = SpeedLearner(Speeds(PrefillSpeed(1e-4, 0.0), 1e9))
    learner.observe_prefill(0, 1000, 0.2)  # twice as slow as guessed
    prefill = learner.speeds().prefill
    assert prefill is not None and 1.5e-4 < prefill.token_s < 2e-4


def test_a_machine_that_cannot_prefill_learns_only_decoding() -> None:
    learner = SpeedLearner(Speeds(None, 1e9))
    learner.observe_prefill(0, 100, 1.0)
    assert learner.speeds().prefill is None
