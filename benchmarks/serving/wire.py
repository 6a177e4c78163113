"""How one sample is asked for on each wire, and how any server's answer is read.

ROW      {"x": [0.1, ...]}                                   what people send to a server of their own
NAMED    {"age_in_years": 35, "purpose": "education", ...}   one sample by feature names
RAW      the tensor's bytes, little-endian, and nothing else
V2       Open Inference Protocol, JSON
BINARY   Open Inference Protocol with the binary tensor extension: a JSON header, then the tensor's bytes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"
JSON = "application/json"
OCTETS = "application/octet-stream"
OWN_HEADERS = {"server-timing": "queue;dur=0.011, compute;dur=0.182", "x-request-id": "b1526f12b757-1"}
"""What every answer of evalmode carries, as an example."""


class Wire(Enum):
    """A form of request; the module's docstring shows each."""

    ROW = auto()
    NAMED = auto()
    BATCH = auto()
    RAW = auto()
    V2 = auto()
    BINARY = auto()


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": JSON})


def request(wire: Wire, x: NDArray[np.float32], sample: Mapping[str, Any] | None = None) -> Request:
    """One sample on the wire. JSON has the digits of Python's own `x.tolist()`, as most callers send them.

    Args:
        x: one sample without a batch axis.
        sample: the same by feature names, for NAMED.
    """
    tensor: dict[str, Any] = {"name": "x", "shape": [1, *x.shape], "datatype": "FP32"}
    match wire:
        case Wire.ROW:
            return Request(_json({"x": x.ravel().tolist()}))
        case Wire.NAMED:
            return Request(_json(sample))
        case Wire.BATCH:
            return Request(_json({"batch": [x.ravel().tolist() if sample is None else sample]}))
        case Wire.RAW:
            return Request(_bytes(x), {"Content-Type": OCTETS})
        case Wire.V2:
            return Request(_json({"inputs": [tensor | {"data": x.ravel().tolist()}]}))
        case Wire.BINARY:
            inputs = [tensor | {"parameters": {"binary_data_size": x.nbytes}}]
            header = _json({"inputs": inputs, "outputs": [{"name": "y", "parameters": {"binary_data": True}}]})
            return Request(header + _bytes(x), {"Content-Type": OCTETS, HEADER_LENGTH: str(len(header))})


def constant(wire: Wire, model: str, y: NDArray[np.float32]) -> dict[str, Any]:
    """What the echo answers: evalmode's answer to one sample, with the headers that evalmode sends."""
    output: dict[str, Any] = {"name": "y", "shape": [1, len(y)], "datatype": "FP32"}
    said: dict[str, Any] = {"model_name": model, "model_version": "1"}
    headers = {"content-type": JSON, **OWN_HEADERS}
    match wire:
        case Wire.NAMED:
            values = dict(zip(("bad", "good"), y.tolist(), strict=True))
            body = _json({"label": "good", "probabilities": values, "model": model, "version": "1"})
        case Wire.BINARY:
            header = _json(said | {"outputs": [output | {"parameters": {"binary_data_size": y.nbytes}}]})
            headers |= {"content-type": OCTETS, HEADER_LENGTH.lower(): str(len(header))}
            body = header + _bytes(y)
        case _:
            body = _json(said | {"outputs": [output | {"data": [round(value, 7) for value in y.tolist()]}]})
    headers["content-length"] = str(len(body))
    return {"headers": headers, "body": body.hex()}


def numbers(response: httpx.Response) -> NDArray[np.float64]:
    """The numbers in an answer of any server, flat.

    Raises:
        ValueError: there are none where they should be.
    """
    if header_bytes := response.headers.get(HEADER_LENGTH):
        return np.frombuffer(response.content[int(header_bytes) :], dtype="<f4").astype(np.float64)
    match response.json():
        case {"probabilities": dict(by_class)} | [{"probabilities": dict(by_class)}]:
            return np.array(list(by_class.values()), dtype=np.float64)
        case {"outputs": [{"data": values}]} | {"y": values} | [*values]:
            return np.asarray(values, dtype=np.float64).ravel()
        case other:
            raise ValueError(f"no numbers in {str(other)[:200]}")


def _json(said: object) -> bytes:
    return json.dumps(said, separators=(",", ":")).encode()


def _bytes(x: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(x, dtype="<f4").tobytes()
