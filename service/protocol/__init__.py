"""One file per wire: a body becomes a `Request` that fits the model, the model's outputs become an `Answer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from service.repository import Live
from service.signature import Accepted

JSON = b"application/json"
OCTET_STREAM = b"application/octet-stream"


class Body(NamedTuple):
    """What a client sent, uncompressed."""

    content: bytes
    json_bytes: int | None = None
    """How many of them are JSON, where binary tensors follow; None: all."""


class Answer(NamedTuple):
    """What a client gets with status 200."""

    content: bytes
    json_bytes: int | None = None
    """How many of them are JSON, where binary tensors follow; None: all."""


class Request(Protocol):
    """What every wire makes of a body: rows that fit, and how to answer them."""

    @property
    def accepted(self) -> Accepted: ...

    @property
    def timeout_s(self) -> float | None:
        """How long the caller waits; None: as long as it takes."""
        ...

    def render(self, outputs: Sequence[NDArray[Any]]) -> Answer:
        """
        Args:
            outputs: one array per output of the model, with this request's rows.
        """
        ...


Parse = Callable[[Live, Body], Request]
"""
Raises:
    BadRequest: the body is malformed, or does not fit the model.
"""
