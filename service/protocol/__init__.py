"""One file per wire: a body becomes a `Request` that fits the model, the model's outputs become an `Answer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from service.repository import Live
from service.signature import Accepted

JSON = b"application/json"
OCTET_STREAM = b"application/octet-stream"


Body = bytes | memoryview
"""What came; a view only where binary tensors follow the JSON."""

Answer = tuple[bytes, int | None]
"""The body of an answer, and how many of its bytes are JSON, where binary tensors follow; None: all."""


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


Parse = Callable[[Live, Body, int | None], Request]
"""What came for a model, uncompressed, and how many of its bytes are JSON, where binary tensors follow; None: all.

Raises:
    BadRequest: the body is malformed, or does not fit the model.
"""
