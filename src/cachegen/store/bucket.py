"""Buckets of S3, Google Cloud Storage and Azure, and what their failures are called."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from cachegen.errors import ConfigError, StoreError, StoreUnavailableError
from cachegen.store.base import check_name
from cachegen.store.clock import deadline, late

_STATUS = re.compile(r"status code: (\d{3})")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")
# What the client says of a broken connection, and the word for it.
_BROKEN = (
    ("refused", re.compile(r"ConnectionRefused|Connection refused")),
    ("unresolved", re.compile(r"dns error|failed to lookup address")),
    ("certificate", re.compile(r"certificate")),
    ("reset", re.compile(r"ConnectionReset|BrokenPipe|connection closed|ChannelClosed|Canceled")),
    (
        "short",
        re.compile(r"IncompleteMessage|IncompleteBody|UnexpectedEof|end of file|Interrupted"),
    ),
    ("protocol", re.compile(r"Parse\(|invalid HTTP|Decode")),
    ("unreachable", re.compile(r"NetworkUnreachable|HostUnreachable|No route")),
)
_STORES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
# Reasons after which the server has certainly not done what was asked.
NOT_DONE = frozenset({"refused", "unresolved", "unreachable", "slow_down"})


@dataclass(frozen=True)
class Bucket:
    """Where objects are kept.

    kind: ``"s3"``, ``"gs"`` or ``"az"``. name: of the bucket or container. prefix: path in it.
    options: configuration of obstore by its names, such as ``endpoint``, ``region``,
        ``access_key_id``, ``account_name``; what is missing comes from the environment as the
        clouds' own tools read it (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``).
    allow_http: True for an endpoint without TLS.
    """

    kind: str
    name: str
    prefix: str = ""
    options: dict[str, str] = field(default_factory=dict, repr=False)
    allow_http: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _STORES or not self.name:
            raise ConfigError(
                "bucket", got=(self.kind, self.name), expected="s3, gs or az and a name"
            )
        if self.prefix:
            check_name(self.prefix)

    @property
    def where(self) -> str:
        """The bucket as messages name it, without credentials."""
        return f"{self.kind}://{self.name}" + (f"/{self.prefix}" if self.prefix else "")

    def open(self, timeout_s: float) -> Any:
        """Return obstore's object for it; nothing is connected. Raises: ConfigError."""
        try:
            return _STORES[self.kind](
                self.name,
                prefix=self.prefix or None,
                client_options={
                    "allow_http": self.allow_http,
                    "connect_timeout": timedelta(seconds=timeout_s),
                    # A stream may take longer than a call; the deadline ends both.
                    "timeout": timedelta(days=1),
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
                **self.options,
            )
        except UnknownConfigurationKeyError as error:
            raise ConfigError("option of the store URL", got=_first_line(error)) from None
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"bucket {self.where}", got=_first_line(error)) from None


class MissingError(StoreError):
    """There is no such object; never leaves a store."""


class TakenError(StoreError):
    """There is such an object already; never leaves a store."""


@contextmanager
def named_errors(where: str, timeout_s: float) -> Iterator[None]:
    """Bound a block by timeout_s and turn what obstore raises into named errors.

    where: the bucket as messages name it, without credentials.
    Raises: MissingError, TakenError, StoreTimeoutError, StoreUnavailableError, StoreError.
    """
    with deadline(timeout_s):
        try:
            yield
        except StoreError:
            raise
        except TimeoutError as error:
            raise late(f"answer of {where}") from error
        except (BaseError, OSError, asyncio.CancelledError) as error:
            raise _named(error, where) from error


def _named(error: BaseException, where: str) -> StoreError:
    text, whole = _first_line(error), str(error)
    if _NO_BUCKET.search(whole):
        return StoreError(
            f"bucket {where}",
            got="no such bucket",
            remedy="create it or correct the URL",
            reason="no_bucket",
        )
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return MissingError(f"object in {where}", got=text)
    if isinstance(error, AlreadyExistsError):
        return TakenError(f"object in {where}", got=text)
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return StoreError(
            f"login at {where}",
            got=text,
            remedy="check the credentials and the rights on the bucket",
            reason="denied",
        )
    if isinstance(error, PreconditionError):
        return StoreError(
            f"object in {where}", got="another version while it was read", reason="changed"
        )
    status = status_of(error)
    if status is not None and status < 500 and status != 429:
        return StoreError(f"request to {where}", got=text, reason="rejected")
    if status is not None:
        reason = "slow_down" if status in (429, 503) else "server_error"
        return StoreUnavailableError(f"request to {where}", got=text, reason=reason)
    if "TimedOut" in whole or "operation timed out" in whole:
        return late(f"answer of {where}")
    for reason, pattern in _BROKEN:
        if pattern.search(whole):
            return StoreUnavailableError(f"connection to {where}", got=text, reason=reason)
    return StoreUnavailableError(f"connection to {where}", got=text)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of obstore tells of, None if it tells none."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:300]
