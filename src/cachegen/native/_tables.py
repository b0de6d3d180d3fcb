"""Frequency tables in the form that the extension codes with."""

from __future__ import annotations

from cachegen.native import _checks, _core
from cachegen.native._checks import Models, Symbols


class Tables:
    """The models of a segment as alias tables, ready to code.

    freqs: (N, A) uint16, each row summing to 4096, 2 <= A <= 32. escapes: (N,) uint8 with the
    escape index of each model or 255 for none, or None if no model has one.
    Raises: CorruptError if the numbers are wrong (they may come from an object), GeometryError if
    the arrays are.
    """

    def __init__(self, freqs: Models, escapes: Symbols | None = None) -> None:
        self.freqs, self.escapes = _checks.check_tables(freqs, escapes)
        self.count, self.alphabet = self.freqs.shape
        self._core = _core.Tables(self.freqs, self.escapes)
