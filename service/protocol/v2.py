"""The Open Inference Protocol, version 2, over REST with JSON bodies.

Source: kserve/open-inference-protocol, `specification/protocol/inference_rest.md`.

    {"id": "42", "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
    {"model_name": "m", "model_version": "1", "id": "42",
     "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [0.1, 0.9]}]}

Data may be flat or nested. The wire is strict: an integer out of range is refused and never wrapped, a boolean is not a
number, a string is not a number. `id` is echoed only if it was given. Not finite outputs are null.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import (
    BadRequest,
    DatatypeMismatch,
    OutOfRange,
    ShapeMismatch,
    UnknownTensor,
    WrongType,
    clipped,
)
from service.protocol.json import parsed
from service.repository import Live
from service.signature import Accepted, Signature, TensorSpec, accept_tensors

PLATFORM = "onnx_onnxv1"
EXTENSIONS = ("model_repository",)
MAX_ELEMENTS = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """An inference request that fits the model."""

    live: Live
    accepted: Accepted
    outputs: tuple[int, ...]
    """Positions of the outputs asked for, in the order asked."""
    id: str | None

    def render(self, outputs: Sequence[NDArray[Any]]) -> bytes:
        """The response body.

        Args:
            outputs: one array per output of the model, with this request's rows.
        """
        said: dict[str, object] = {"model_name": self.live.name, "model_version": self.live.version}
        if self.id is not None:
            said["id"] = self.id
        specs = self.live.admitted.signature.outputs
        said["outputs"] = [_rendered(specs[i], outputs[i]) for i in self.outputs]
        return orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)


def _rendered(spec: TensorSpec, array: NDArray[Any]) -> dict[str, object]:
    flat = array.reshape(-1)
    data = flat.tolist() if array.dtype.kind == "O" else np.ascontiguousarray(flat)
    return {"name": spec.name, "shape": list(array.shape), "datatype": spec.datatype, "data": data}


def parse(live: Live, body: bytes) -> InferRequest:
    """
    Raises:
        BadRequest: the body is not JSON, not an inference request, or does not fit the model.
    """
    request = parsed(body)
    if not isinstance(request, dict):
        raise WrongType(what="the body", got=request, want="one JSON object with 'inputs'")
    signature = live.admitted.signature
    identifier = request.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise WrongType(what="'id'", got=identifier, want="a string")
    return InferRequest(
        live=live,
        accepted=accept_tensors(signature, _tensors(signature, request.get("inputs"))),
        outputs=_requested(signature, request.get("outputs")),
        id=identifier,
    )


def metadata(live: Live) -> dict[str, object]:
    """The answer of `GET /v2/models/{m}`, and under `evalmode` what only this server knows."""
    admitted = live.admitted
    passport = admitted.bundle.passport
    return {
        "name": live.name,
        "versions": [live.version],
        "platform": PLATFORM,
        "inputs": [spec.model_dump() for spec in admitted.signature.inputs],
        "outputs": [spec.model_dump() for spec in admitted.signature.outputs],
        "evalmode": {
            "provider": admitted.runtime.provider,
            "batchnorm_layers": len(admitted.batchnorms),
            "folded": {found.layer: found.into for found in admitted.folds if found.into},
            "kept": {found.layer: found.kept_because for found in admitted.folds if not found.into},
            "golden": {
                "rows": admitted.golden_rows,
                "differences": {figure.name: figure.difference for figure in admitted.golden},
                "tolerances": {figure.name: figure.bound for figure in admitted.golden},
            }
            if admitted.golden
            else None,
            "independence": admitted.independence.model_dump(),
            "max_batch_rows": admitted.max_batch_rows,
            "run_ms": round(admitted.run_s * 1e3, 4),
            "features": [feature.model_dump() for feature in admitted.signature.features]
            if admitted.signature.features is not None
            else None,
            "target": admitted.signature.target.model_dump() if admitted.signature.target else None,
            "card": passport.card if passport else None,
        },
    }


def _tensors(signature: Signature, inputs: object) -> dict[str, NDArray[Any]]:
    specs = {spec.name: spec for spec in signature.inputs}
    if not isinstance(inputs, list):
        raise WrongType(what="'inputs'", got=inputs, want="a list of tensors")
    tensors: dict[str, NDArray[Any]] = {}
    for position, tensor in enumerate(inputs):
        if not isinstance(tensor, dict):
            raise WrongType(what=f"'inputs[{position}]'", got=tensor, want="an object with name, shape, datatype, data")
        name = tensor.get("name")
        if not isinstance(name, str):
            raise WrongType(what=f"the name of 'inputs[{position}]'", got=name, want="a string")
        if name not in specs:
            raise UnknownTensor(kind="input", tensor=name, tensors=specs)
        if name in tensors:
            raise BadRequest(f"input '{name}' is given twice; send it once")
        tensors[name] = _tensor(specs[name], tensor)
    return tensors


def _tensor(spec: TensorSpec, tensor: Mapping[str, object]) -> NDArray[Any]:
    if tensor.get("datatype") != spec.datatype:
        raise DatatypeMismatch(tensor=spec.name, got=tensor.get("datatype"), want=spec.datatype)
    if spec.datatype == "FP16":
        raise BadRequest(f"input '{spec.name}' is FP16, which has no JSON form in this protocol; export it in float32")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(axis) is int and axis >= 0 for axis in shape):
        raise WrongType(what=f"the shape of input '{spec.name}'", got=shape, want="a list of non-negative integers")
    count = math.prod(shape)
    if count > MAX_ELEMENTS or len(shape) > 32:
        raise ShapeMismatch(tensor=spec.name, got=f"{len(shape)} axes and {count} elements", want=str(list(spec.shape)))
    data = tensor.get("data")
    if not isinstance(data, list):
        raise WrongType(what=f"the data of input '{spec.name}'", got=data, want="a list of values")
    flat = _flat(spec.name, data, shape)
    if len(flat) != count:
        raise ShapeMismatch(
            tensor=spec.name, got=f"{len(flat)} values for shape {shape}", want=f"{count} for that shape"
        )
    return _array(spec, flat).reshape(shape)


def _flat(name: str, data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Nested lists as one flat list, row-major; what is flat already is handed through."""
    for depth, axis in enumerate(shape[1:], start=1):
        nested = [isinstance(item, list) for item in data]
        if not any(nested):
            if depth > 1:
                raise ShapeMismatch(
                    tensor=name, got=f"data nested {depth} deep", want=f"flat data, or nested {len(shape)} deep"
                )
            return data
        if not all(nested) or any(len(item) != axis for item in data):
            raise ShapeMismatch(
                tensor=name, got="ragged data", want=f"lists of {axis} at depth {depth}, as its shape says"
            )
        data = list(itertools.chain.from_iterable(data))
    return data


_JSON_TYPES: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "booleans"),
    "i": (frozenset({int}), "integers"),
    "u": (frozenset({int}), "integers"),
    "f": (frozenset({int, float}), "numbers"),
    "O": (frozenset({str}), "strings"),
}


def _array(spec: TensorSpec, values: list[Any]) -> NDArray[Any]:
    """Values of one JSON type as an array of the tensor's dtype; nothing is rounded to fit, nothing wraps."""
    allowed, plural = _JSON_TYPES[spec.dtype.kind]
    if not allowed.issuperset(map(type, values)):
        i = next(i for i, value in enumerate(values) if type(value) not in allowed)
        raise WrongType(what=f"value {i} of input '{spec.name}'", got=values[i], want=f"{plural} ({spec.datatype})")
    if spec.dtype.kind == "O":
        return np.array(values, dtype=np.object_)
    low, high = _limits(spec.dtype)
    if spec.dtype.kind in "iuf" and values and not (low <= min(values) and max(values) <= high):
        i = next(i for i, value in enumerate(values) if not low <= value <= high)
        raise OutOfRange(
            what=f"value {i} of input '{spec.name}'",
            got=clipped(str(values[i]), 40),
            want=f"{spec.datatype} from {low} to {high}",
        )
    return np.array(values, dtype=spec.dtype)


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    match dtype.kind:
        case "i" | "u":
            return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        case "f":
            return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
        case _:
            return 0, 1


def _requested(signature: Signature, outputs: object) -> tuple[int, ...]:
    names = [spec.name for spec in signature.outputs]
    if outputs is None:
        return tuple(range(len(names)))
    if not isinstance(outputs, list):
        raise WrongType(what="'outputs'", got=outputs, want="a list of objects with a name")
    positions = []
    for position, output in enumerate(outputs):
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            raise WrongType(what=f"'outputs[{position}]'", got=output, want="an object with a name")
        if name not in names:
            raise UnknownTensor(kind="output", tensor=name, tensors=names)
        positions.append(names.index(name))
    return tuple(positions)
