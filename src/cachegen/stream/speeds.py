"""How fast this machine recomputes and decodes, learned while it does so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from cachegen.errors import ConfigError

_NORMAL = NormalDist()
LEAST_DEVIATION = 0.02


@dataclass(frozen=True)
class PrefillSpeed:
    """Time of a prefill: linear in the tokens, plus attention to the context before them.

    token_s: seconds per token. pair_s: seconds per token and token of its context.
    deviation: relative; how far a prediction is usually off.
    """

    token_s: float
    pair_s: float = 0.0
    deviation: float = 0.1

    def __post_init__(self) -> None:
        sound = math.isfinite(self.token_s) and math.isfinite(self.pair_s)
        if not (sound and self.token_s > 0 and self.pair_s >= 0 and self.deviation >= 0):
            raise ConfigError(
                "prefill speed",
                got=(self.token_s, self.pair_s, self.deviation),
                expected="seconds per token above 0, the others not negative",
            )

    def seconds(self, begin_token: int, tokens: int) -> float:
        """Return the expected time of the tokens [begin_token, begin_token + tokens)."""
        return self.token_s * tokens + self.pair_s * _pairs(begin_token, tokens)

    def probability_late(self, expected_s: float, seconds: float) -> float:
        """Return the probability that what should take expected_s takes longer than seconds."""
        if expected_s <= 0:
            return 0.0
        if self.deviation <= 0:
            return float(expected_s > seconds * (1 + 1e-9))
        return 1.0 - _NORMAL.cdf((seconds / expected_s - 1.0) / self.deviation)


@dataclass(frozen=True)
class Speeds:
    """Speeds of one machine. prefill: None where nothing can be recomputed."""

    prefill: PrefillSpeed | None
    decode_bytes_per_s: float

    def __post_init__(self) -> None:
        if not self.decode_bytes_per_s > 0:
            raise ConfigError("decode_bytes_per_s", got=self.decode_bytes_per_s, expected="above 0")


class SpeedLearner:
    """Learns both speeds from what was observed, starting from a guess.

    Prefill is a regression on tokens and pairs of tokens, in relative errors, so that a long chunk
    counts no more than a short one; the guess is worth ``prior_weight`` observations of its own
    size, and old observations fade by ``fading`` with each new one.
    """

    def __init__(self, guess: Speeds, *, prior_weight: float = 0.1, fading: float = 0.98) -> None:
        self._guess = guess
        self._fading = fading
        self._prior_weight = prior_weight
        self._gram = [prior_weight, 0.0, prior_weight]
        self._moment = [prior_weight, prior_weight]
        self._count = 0.0
        self._errors = 0.0
        self._decode_bytes = prior_weight * 1e6
        self._decode_s = self._decode_bytes / guess.decode_bytes_per_s

    def observe_prefill(self, begin_token: int, tokens: int, seconds: float) -> None:
        """Take in the time that recomputing [begin_token, begin_token + tokens) took."""
        guess = self._guess.prefill
        if guess is None or tokens <= 0 or seconds <= 0:
            return
        expected = self.speeds().prefill
        assert expected is not None
        miss = seconds / expected.seconds(begin_token, tokens) - 1.0
        linear = guess.token_s * tokens / seconds
        pairs = guess.pair_s * _pairs(begin_token, tokens) / seconds
        keep, prior = self._fading, self._prior_weight
        # What fades is the observations; the guess keeps its weight, so the system stays regular.
        for index, (product, base) in enumerate(
            ((linear * linear, prior), (linear * pairs, 0.0), (pairs * pairs, prior))
        ):
            self._gram[index] = (self._gram[index] - base) * keep + base + product
        for index, feature in enumerate((linear, pairs)):
            self._moment[index] = (self._moment[index] - prior) * keep + prior + feature
        self._count = self._count * keep + 1.0
        self._errors = self._errors * keep + miss * miss

    def observe_decode(self, size_bytes: int, seconds: float) -> None:
        """Take in the time that decoding so many bytes took."""
        if size_bytes > 0 and seconds > 0:
            self._decode_bytes = self._decode_bytes * self._fading + size_bytes
            self._decode_s = self._decode_s * self._fading + seconds

    def speeds(self) -> Speeds:
        """Return what is known now."""
        decode = self._decode_bytes / self._decode_s
        guess = self._guess.prefill
        if guess is None:
            return Speeds(None, decode)
        first, cross, second = self._gram
        determinant = first * second - cross * cross
        linear = (self._moment[0] * second - self._moment[1] * cross) / determinant
        pairs = (self._moment[1] * first - self._moment[0] * cross) / determinant
        # The deviation that was guessed is worth one observation.
        variance = (guess.deviation**2 + self._errors) / (1.0 + self._count)
        return Speeds(
            PrefillSpeed(
                guess.token_s * max(linear, 0.01),
                guess.pair_s * max(pairs, 0.0),
                max(math.sqrt(variance), LEAST_DEVIATION),
            ),
            decode,
        )


def _pairs(begin_token: int, tokens: int) -> float:
    """Return the pairs (token, token of its context or itself), halves being counted whole."""
    return tokens * (begin_token + tokens / 2)
