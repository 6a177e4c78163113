"""One file per wire: bytes to a `Request` that fits the model, the model's outputs to bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from service.repository import Live
from service.signature import Accepted


class Request(Protocol):
    """What every wire makes of a body: rows that fit, and how to answer them."""

    @property
    def accepted(self) -> Accepted: ...

    def render(self, outputs: Sequence[NDArray[Any]]) -> bytes:
        """The body of the answer.

        Args:
            outputs: one array per output of the model, with this request's rows.
        """
        ...


Parse = Callable[[Live, bytes], Request]
"""
Raises:
    BadRequest: the body is malformed, or does not fit the model.
"""
