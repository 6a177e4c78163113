"""The wire for people: one JSON object of named features in, a label with its probabilities out.

    POST /predict, or /models/{m}/predict
    {"age_in_years": 35, "purpose": "radio/television", ...}
    {"label": "good", "probabilities": {"bad": 0.2, "good": 0.8}, "model": "credit", "version": "1"}

A regression answers `"value"` in place of label and probabilities. A category that training never saw is served as
'missing', and the answer says so in `"served_as_missing"`. Probabilities are the exact values of the graph's float32
output, written as 64-bit numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from numpy.typing import NDArray

from service.errors import BadRequest, NotFinite
from service.protocol import Answer, Body
from service.protocol.json import NULL_FOR_MISSING, check_keys, parsed
from service.repository import Live
from service.signature import Accepted, ClassTarget


class PredictRequest(NamedTuple):
    """A sample that fits the model."""

    live: Live
    accepted: Accepted

    def answer(self, outputs: Sequence[NDArray[Any]]) -> dict[str, object]:
        """What the caller is told.

        Args:
            outputs: the model's only output, with one row.

        Raises:
            NotFinite: the network overflowed on this sample.
        """
        row: list[float] = outputs[0][0].tolist()
        if not math.isfinite(sum(row)):  # float32 values cannot overflow the float64 of their sum
            raise NotFinite
        target = self.live.admitted.signature.target
        said: dict[str, object]
        if isinstance(target, ClassTarget):
            said = {
                "label": target.classes[row.index(max(row))],
                "probabilities": dict(zip(target.classes, row, strict=True)),
            }
        else:
            said = {"value": row[0]}
        said |= {"model": self.live.name, "version": self.live.version}
        if self.accepted.served_as_missing:
            said["served_as_missing"] = self.accepted.served_as_missing
        return said

    @property
    def timeout_s(self) -> None:
        """This wire has none: a caller waits as long as it takes."""

    def render(self, outputs: Sequence[NDArray[Any]]) -> Answer:
        """The response body."""
        return orjson.dumps(self.answer(outputs)), None


def parse(live: Live, body: Body, json_bytes: int | None = None) -> PredictRequest:
    """
    Args:
        json_bytes: None; nothing but JSON comes this way.

    Raises:
        BadRequest: the body is not JSON, does not fit, or the model has no named features.
    """
    if live.reader is None:
        raise BadRequest(
            f"model '{live.name}' takes tensors, not named features; call POST /v2/models/{live.name}/infer"
        )
    text = bytes(body)
    sample = parsed(text, for_nan=NULL_FOR_MISSING)
    check_keys(text, sample)
    return PredictRequest(live, live.reader.accept(sample))
