"""Every error this library raises by name.

The tree::

    CacheGenError
    ├── InputError (also ValueError)      the caller's input is wrong; the CLI exits with 2
    │   ├── ConfigError                   a setting has a value that cannot work
    │   ├── GeometryError                 layers, heads, tokens or head dimensions do not fit
    │   ├── DtypeError                    an element type that KV caches do not have
    │   ├── NonFiniteError                NaN or Inf in K or V, where the codec cannot keep them
    │   ├── UnknownCodecError             no codec of that name or id
    │   ├── UnsupportedModelError         a model or cache kind that cannot be captured
    │   ├── ProfileError                  a profile is missing, damaged or of another model
    │   ├── KeyMismatchError              the object is sound but belongs to another key
    │   └── FormatError                   the bytes are not a sound object
    │       ├── MagicError                not an object of this library at all
    │       ├── VersionError              a format version this build does not read
    │       ├── TruncatedError            bytes are missing at the end
    │       ├── ChecksumError             a checksum does not match its bytes
    │       ├── LimitError                a length or count is beyond its cap
    │       └── CorruptError              fields contradict each other or the coded data
    ├── FileWriteError (also OSError)     a file could not be written; the CLI exits with 1
    └── StoreError                        a store failed; the CLI exits with 1
        ├── StoreFullError                quota or disk is exhausted
        ├── StoreReadOnlyError            the store cannot be written
        ├── StoreTimeoutError             the store did not answer before the deadline
        └── StoreUnavailableError         the store cannot be reached, or fails too often

A key that is not in a store is no error: ``Store.get`` returns ``None``. A path that does
not exist is the builtin ``FileNotFoundError``.
"""

from __future__ import annotations


class CacheGenError(Exception):
    """Base of all errors: says what is wrong, what was got, what was expected and the remedy.

    what: the quantity or thing that is wrong, such as ``"head dimension"``.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        parts = []
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        text = f"{what}: {', '.join(parts)}" if parts else what
        super().__init__(f"{text}; {remedy}" if remedy else text)


class InputError(CacheGenError, ValueError):
    """The caller's input is wrong."""


class ConfigError(InputError):
    """A setting has a value that cannot work."""


class GeometryError(InputError):
    """Layers, heads, tokens or head dimensions do not fit."""


class DtypeError(InputError):
    """An element type that KV caches do not have here."""


class NonFiniteError(InputError):
    """K or V holds NaN, Inf or a magnitude that cannot be quantised."""


class UnknownCodecError(InputError):
    """No codec of that name or id."""


class UnsupportedModelError(InputError):
    """A model, or a kind of cache, that cannot be captured or injected."""


class ProfileError(InputError):
    """A profile is missing, damaged or belongs to another model."""


class KeyMismatchError(InputError):
    """The object is sound but was stored under another key."""


class FormatError(InputError):
    """The bytes are not a sound object of this library."""


class MagicError(FormatError):
    """The bytes do not begin with the magic number."""


class VersionError(FormatError):
    """The object has a format version that this build does not read."""


class TruncatedError(FormatError):
    """Bytes are missing at the end of the object."""


class ChecksumError(FormatError):
    """A checksum does not match the bytes it covers."""


class LimitError(FormatError):
    """A length or a count is beyond the cap of the format or of the caller."""


class CorruptError(FormatError):
    """Fields contradict each other, or the coded data contradicts its header."""


class FileWriteError(CacheGenError, OSError):
    """A file could not be written; an older one of that name is as it was."""


class StoreError(CacheGenError):
    """A store could not do what was asked.

    reason: one word for counters and log lines, such as ``"refused"`` or ``"reset"``; the
        class's own if None.
    """

    reason = "failed"

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(what, got=got, expected=expected, remedy=remedy)
        if reason is not None:
            self.reason = reason


class StoreFullError(StoreError):
    """The quota of a store, or the disk under it, is exhausted."""

    reason = "full"


class StoreReadOnlyError(StoreError):
    """The store cannot be written."""

    reason = "read_only"


class StoreTimeoutError(StoreError):
    """The store did not answer before the deadline; never taken for a missing name."""

    reason = "timeout"


class StoreUnavailableError(StoreError):
    """The store cannot be reached, breaks off, or fails so often that it is left alone."""

    reason = "unavailable"
