"""Levels people can name: how many bytes of a ``progressive`` object a quality needs.

A level is a byte range: changing it never re-encodes. The segment table says how much squared error
is left after each segment; a curve measured through a model turns that into KL divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cachegen.codec.basis import MEASURED_VALUE_WEIGHT
from cachegen.codec.container import SIDE
from cachegen.codec.header import Header
from cachegen.codec.progressive import ProgressiveCodec, spread_of, weight_of
from cachegen.errors import ConfigError

# KL to the uncompressed model, nats/token, that a named level stays within.
NAMED = {"lossless-in-practice": 0.01, "balanced": 0.03, "small": 0.1}
DEFAULT_QUALITY = "balanced"


@dataclass(frozen=True)
class QualityCurve:
    """KL in nats/token that distortion d leads to: ``text * d + answers * d ** power``.

    Keeps what was measured on the reference model within the names (decision 0012). On running text
    the KL grows with the distortion; at answers that depend on single tokens of the prefix it rises
    steeply once those cannot be told apart. Relative distortion: the error left, as weighted by the
    encoder, over the squared spread of the chunk's centred values.
    """

    text: float
    answers: float
    power: float

    def kl(self, relative_distortion: float) -> float:
        """Return the expected KL."""
        d = max(relative_distortion, 0.0)
        return self.text * d + self.answers * math.pow(d, self.power)


# Wider than the envelope: without a profile nothing is known of the model.
PLAIN_CURVE = QualityCurve(0.078, 2.0, 3.4)
PROFILE_CURVE = QualityCurve(0.075, 190.0, 3.5)
MEASURED_CURVE = QualityCurve(0.066, 3.6e5, 9.5)


def curve_of(header: Header) -> QualityCurve:
    """Return the curve for an object: of no profile, a plain one, or one with measured weights."""
    if header.profile is None:
        return PLAIN_CURVE
    return MEASURED_CURVE if weight_of(header) == MEASURED_VALUE_WEIGHT else PROFILE_CURVE


def relative_distortions(header: Header) -> list[tuple[int, float]]:
    """Return (prefix bytes, relative distortion) of every prefix that decodes, shortest first.

    Raises: ConfigError for an object of another codec.
    """
    if header.codec_id != ProgressiveCodec.codec_id:
        raise ConfigError(
            "codec of the object",
            got=header.codec_id,
            expected=f"{ProgressiveCodec.codec_id} (progressive)",
            remedy="other codecs have one quality: read the whole object",
        )
    scale = max(header.value_count * spread_of(header) ** 2, 1e-30)
    left = [0.0] * len(header.groups)
    points = []
    for index, segment in enumerate(header.segments):
        if segment.kind == SIDE:
            continue
        left[segment.group] = segment.distortion
        following = header.segments[index + 1 :]
        if not following or following[0].pass_index > 0:
            points.append((segment.offset + segment.length, math.fsum(left) / scale))
    return points


def prefix_bytes(
    header: Header,
    quality: str | None = DEFAULT_QUALITY,
    *,
    bits_per_value: float | None = None,
    budget_bytes: int | None = None,
) -> int:
    """Return how many bytes of an object to read for a quality.

    quality: a name of ``NAMED``: the shortest prefix whose expected KL is within it, or the whole
        object. bits_per_value, budget_bytes: instead of a name, the longest prefix within them.
    Raises: ConfigError for an unknown name, or a budget that does not hold every pass 0.
    """
    points = relative_distortions(header)
    if bits_per_value is not None:
        budget_bytes = int(bits_per_value * header.value_count / 8)
    if budget_bytes is not None:
        fitting = [size for size, _ in points if size <= budget_bytes]
        if not fitting:
            raise ConfigError(
                "budget",
                got=f"{budget_bytes} bytes",
                expected=f"at least {points[0][0]}",
                remedy="recompute this chunk, or allow more bytes",
            )
        return fitting[-1]
    if quality not in NAMED:
        raise ConfigError("quality", got=quality, expected=f"one of {', '.join(NAMED)}")
    curve = curve_of(header)
    for size, distortion in points:
        if curve.kl(distortion) <= NAMED[quality]:
            return size
    return points[-1][0]
