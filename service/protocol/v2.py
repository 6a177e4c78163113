"""Inference requests and answers of the Open Inference Protocol, version 2, over REST, in JSON and in binary.

Sources: kserve/open-inference-protocol, `specification/protocol/inference_rest.md`; for binary tensors
triton-inference-server, `docs/protocol/extension_binary_data.md`.

    {"id": "42", "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
    {"model_name": "m", "model_version": "1", "id": "42",
     "outputs": [{"name": "y", "shape": [1, 2], "datatype": "FP32", "data": [0.1, 0.9]}]}

Rule 1: data may be flat or nested. One sample may come without its batch axis, and its answer goes without it too.
Rule 2: binary tensors follow the JSON in the order in which they stand in it, without padding; none may be left over.
Rule 3: `id` is echoed only if it was given. Outputs that are not finite are null in JSON, and themselves in binary.
Rule 4: what a request says and this server cannot do is refused, never ignored; parameters of others' are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import (
    ABSENT,
    BadRequest,
    DatatypeMismatch,
    MalformedBinary,
    NeedsBinary,
    ShapeMismatch,
    UnknownTensor,
    WrongType,
)
from service.protocol import Answer, Body
from service.protocol.elements import (
    check_count,
    fault_among,
    from_bytes,
    from_floats,
    from_json,
    from_numbers,
    text_of,
    to_bytes,
    to_json,
)
from service.protocol.json import BINARY_FOR_NAN, check_keys, parsed
from service.protocol.large_json import LARGE_BYTES, Flawed, parsed_large
from service.repository import Live
from service.signature import Accepted, Signature, TensorSpec, accept_tensors, fits

MAX_ELEMENTS = 2**31
MAX_EMPTY = 2**16
"""So many elements a tensor without any may have beside its axis of no length: a body of a few bytes says any number of
such rows, and the model computes an answer for each."""
MAX_AXES = 32

BINARY_SIZE = "binary_data_size"
BINARY_OUTPUT = "binary_data"
BINARY_OUTPUTS = "binary_data_output"
TIMEOUT_US = "timeout"


class Wanted(NamedTuple):
    """An output that was asked for."""

    position: int
    """Among the model's outputs."""
    binary: bool


class InferRequest(NamedTuple):
    """An inference request that fits the model."""

    live: Live
    accepted: Accepted
    outputs: tuple[Wanted, ...] | None
    """In the order asked; None: all, in JSON, with their batch axis."""
    batched: bool
    """The request has a batch axis, so its answer has one."""
    id: str | None = None
    timeout_s: float | None = None

    def render(self, outputs: Sequence[NDArray[Any]]) -> Answer:
        """The response body.

        Args:
            outputs: one array per output of the model, with this request's rows.
        """
        said: dict[str, object] = {"model_name": self.live.name, "model_version": self.live.version}
        if self.id is not None:
            said["id"] = self.id
        specs = self.live.admitted.signature.outputs
        if self.outputs is None:
            said["outputs"] = [_in_json(spec, array) for spec, array in zip(specs, outputs, strict=True)]
            return orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY), None
        tensors: list[dict[str, object]] = []
        blobs: list[bytes] = []
        for position, binary in self.outputs:
            array = outputs[position]
            if not self.batched:
                array = array.reshape(array.shape[1:])
            if binary:
                blobs.append(to_bytes(array))
                tensors.append(_in_binary(specs[position], array, len(blobs[-1])))
            else:
                tensors.append(_in_json(specs[position], array))
        said["outputs"] = tensors
        head = orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)
        return (b"".join((head, *blobs)), len(head)) if blobs else (head, None)


def _in_json(spec: TensorSpec, array: NDArray[Any]) -> dict[str, object]:
    return {"name": spec.name, "shape": array.shape, "datatype": spec.datatype, "data": to_json(array)}


def _in_binary(spec: TensorSpec, array: NDArray[Any], size: int) -> dict[str, object]:
    parameters = {BINARY_SIZE: size}
    return {"name": spec.name, "shape": array.shape, "datatype": spec.datatype, "parameters": parameters}


def parse(live: Live, body: Body, json_bytes: int | None = None) -> InferRequest:
    """
    Args:
        json_bytes: how many bytes of the body are JSON; None: all. 0: none, it is a raw binary request.

    Raises:
        BadRequest: the body is malformed, is not an inference request, or does not fit the model.
    """
    if json_bytes == 0:
        return _raw_request(live, body)
    text = bytes(body[:json_bytes]) if json_bytes is not None or isinstance(body, memoryview) else body
    blobs = _NO_BLOBS if json_bytes is None else memoryview(body)[json_bytes:]
    if len(text) >= LARGE_BYTES:
        kinds = {spec.name: spec.dtype.kind for spec in live.admitted.signature.inputs if spec.datatype != "FP16"}
        if (large := parsed_large(text, kinds)) is not None:
            return _careful(live, large, _Blobs(blobs))
    request = parsed(text, for_nan=BINARY_FOR_NAN)
    if not blobs and (plain := _plain(live, text, request)) is not None:
        return plain
    check_keys(text, request)
    return _careful(live, request, _Blobs(blobs))


def _plain(live: Live, text: bytes, request: Any) -> InferRequest | None:
    """What most callers send, read in one go: every input once, in order, as flat floats that fit, and nothing else.

    Returns:
        None for any other request. It may be as good, or have a fault that somebody must find the words for.
    """
    rows_of = live.admitted.signature.float_rows
    try:
        inputs = request["inputs"]
        identifier = request.get("id")
        # each colon belongs to a key that is looked at here, so there is no other, and none of them twice
        if text.count(b":") != len(request) + 4 * len(inputs) or rows_of is None:
            return None
        if len(request) > 1 and (len(request) > 2 or type(identifier) is not str):
            return None
        tensors: list[NDArray[Any]] = []
        rows = inputs[0]["shape"][0]
        for (name, row), tensor in zip(rows_of, inputs, strict=True):
            data, shape = tensor["data"], tensor["shape"]
            if (
                tensor["name"] != name
                or tensor["datatype"] != "FP32"
                or shape != [rows, *row]
                or rows < 1
                or not _INTEGERS.issuperset(map(type, shape))
                or not _NUMBERS.issuperset(map(type, data))
            ):
                return None
            tensors.append(from_floats(data).reshape(shape))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError):
        return None
    return InferRequest(live, Accepted(tuple(tensors), rows), None, True, identifier)


def _careful(live: Live, request: Any, blobs: _Blobs) -> InferRequest:
    """Any request that fits; or what is wrong with it, in words."""
    if type(request) is not dict:
        raise WrongType(what="the body", got=request, want="one JSON object with 'inputs'")
    identifier = request.get("id")
    if identifier is not None and type(identifier) is not str:
        raise WrongType(what="'id'", got=identifier, want="a string")
    signature = live.admitted.signature
    parameters = _parameters(request, "the request")
    accepted, batched = _accepted(signature, _tensors(signature, request.get("inputs", ABSENT), blobs))
    return InferRequest(
        live=live,
        accepted=accepted,
        outputs=_requested(signature, request.get("outputs"), _flag(parameters, BINARY_OUTPUTS, "the request")),
        batched=batched,
        id=identifier,
        timeout_s=_timeout_s(parameters),
    )


class _Blobs:
    """The bytes behind the JSON, handed out in order."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._taken = 0

    def take(self, name: str, size: object) -> memoryview:
        if type(size) is not int or size < 0:
            raise WrongType(what=f"'{BINARY_SIZE}' of input '{name}'", got=size, want="a number of bytes")
        left = len(self._content) - self._taken
        if size > left:
            raise MalformedBinary(f"input '{name}' declares {size} bytes, but {left} are left of the body")
        self._taken += size
        return self._content[self._taken - size : self._taken]

    def check_empty(self) -> None:
        if left := len(self._content) - self._taken:
            raise MalformedBinary(
                f"{left} bytes are left over after the tensors; each binary tensor needs '{BINARY_SIZE}' in its "
                "parameters, and the header Inference-Header-Content-Length is the length of the JSON alone"
            )


def _tensors(signature: Signature, inputs: object, blobs: _Blobs) -> dict[str, NDArray[Any]]:
    specs = {spec.name: spec for spec in signature.inputs}
    if type(inputs) is not list:
        raise WrongType(what="'inputs'", got=inputs, want="a list of tensors")
    if len(inputs) > len(specs) + _MOST_NAMED:
        raise BadRequest(f"'inputs' has {len(inputs)} tensors; the model takes {len(specs)}")
    tensors: dict[str, NDArray[Any]] = {}
    for position, tensor in enumerate(inputs):
        if type(tensor) is not dict:
            raise WrongType(what=f"'inputs[{position}]'", got=tensor, want="an object with name, shape, datatype, data")
        name = tensor.get("name", ABSENT)
        if type(name) is not str:
            raise WrongType(what=f"the name of 'inputs[{position}]'", got=name, want="a string")
        if name not in specs:
            raise UnknownTensor(kind="input", tensor=name, tensors=specs)
        if name in tensors:
            raise BadRequest(f"input '{name}' is given twice; send it once")
        tensors[name] = _tensor(specs[name], tensor, blobs)
    blobs.check_empty()
    return tensors


def _tensor(spec: TensorSpec, tensor: Mapping[str, Any], blobs: _Blobs) -> NDArray[Any]:
    datatype = tensor.get("datatype", ABSENT)
    if datatype != spec.datatype:
        raise DatatypeMismatch(tensor=spec.name, got=datatype, want=spec.datatype)
    shape = tensor.get("shape", ABSENT)
    if type(shape) is not list or not all(type(axis) is int and axis >= 0 for axis in shape):
        raise WrongType(what=f"the shape of input '{spec.name}'", got=shape, want="a list of non-negative integers")
    if len(shape) > MAX_AXES:  # so many are not even multiplied: that takes the square of their number
        raise ShapeMismatch(tensor=spec.name, got=f"{len(shape)} axes", want=str(list(spec.shape)))
    if math.prod([max(axis, 1) for axis in shape]) > (MAX_EMPTY if 0 in shape else MAX_ELEMENTS):
        too = "too large for a tensor without values" if 0 in shape else "too many elements"
        raise ShapeMismatch(tensor=spec.name, got=f"shape {shape}, {too}", want=str(list(spec.shape)))
    size = _parameters(tensor, f"input '{spec.name}'").get(BINARY_SIZE)
    data = tensor.get("data")
    if size is not None:
        if data is not None:
            raise BadRequest(f"input '{spec.name}' has both 'data' and '{BINARY_SIZE}'; send one of them")
        return from_bytes(spec, blobs.take(spec.name, size), shape)
    if type(data) is list:
        return from_json(spec, data, shape)
    if type(data) is Flawed:
        raise fault_among(spec, data.values, data.at)
    if type(data) is np.ndarray:
        check_count(spec, data.size, shape)
        return from_numbers(spec, data, shape)
    raise WrongType(
        what=f"the data of input '{spec.name}'",
        got=tensor.get("data", ABSENT),
        want=f"a list of values, or '{BINARY_SIZE}' beside it",
    )


def _accepted(signature: Signature, tensors: Mapping[str, NDArray[Any]]) -> tuple[Accepted, bool]:
    """The rows; and whether they came with a batch axis. Without one they are one sample."""
    row = {spec.name: spec.shape[1:] for spec in signature.inputs}
    batched = not tensors or not all(fits(array.shape, row[name]) for name, array in tensors.items())
    if not batched:
        tensors = {name: array[np.newaxis] for name, array in tensors.items()}
    return accept_tensors(signature, tensors), batched


def _requested(signature: Signature, outputs: object, binary_by_default: bool | None) -> tuple[Wanted, ...]:
    if outputs is None:
        wanted = _all_outputs(signature, binary=bool(binary_by_default))
    elif type(outputs) is list and len(outputs) > len(signature.outputs) + _MOST_NAMED:
        raise BadRequest(f"'outputs' has {len(outputs)} objects; the model has {len(signature.outputs)} outputs")
    elif type(outputs) is list:
        wanted = tuple(_one_requested(signature, i, output, binary_by_default) for i, output in enumerate(outputs))
    else:
        raise WrongType(what="'outputs'", got=outputs, want="a list of objects with a name")
    for position, binary in wanted:
        spec = signature.outputs[position]
        if spec.datatype == "FP16" and not binary:
            raise NeedsBinary(tensor=spec.name, datatype=spec.datatype, kind="output")
    if len({position for position, _ in wanted}) < len(wanted):
        raise BadRequest("an output is asked for twice; ask for it once")
    return wanted


def _all_outputs(signature: Signature, *, binary: bool = False) -> tuple[Wanted, ...]:
    return tuple(Wanted(i, binary) for i in range(len(signature.outputs)))


def _one_requested(signature: Signature, i: int, output: object, binary_by_default: bool | None) -> Wanted:
    if type(output) is not dict:
        raise WrongType(what=f"'outputs[{i}]'", got=output, want="an object with a name")
    name = output.get("name", ABSENT)
    if type(name) is not str:
        raise WrongType(what=f"the name of 'outputs[{i}]'", got=name, want="a string")
    names = [spec.name for spec in signature.outputs]
    if name not in names:
        raise UnknownTensor(kind="output", tensor=name, tensors=names)
    parameters = _parameters(output, f"output '{name}'")
    if "classification" in parameters:
        raise BadRequest(f"output '{name}' asks for 'classification', which this server does not do; rank the scores")
    binary = _flag(parameters, BINARY_OUTPUT, f"output '{name}'")
    return Wanted(names.index(name), bool(binary_by_default if binary is None else binary))


def _parameters(owner: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if type(parameters) is not dict:
        raise WrongType(what=f"'parameters' of {what}", got=parameters, want="an object")
    if len(parameters) > _MOST_PARAMETERS:
        raise BadRequest(f"'parameters' of {what} has {len(parameters)} entries; it takes {_MOST_PARAMETERS}")
    for name, value in parameters.items():
        if type(value) not in (str, int, float, bool):
            raise WrongType(what=f"parameter '{name}' of {what}", got=value, want="a string, a number or a boolean")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, what: str) -> bool | None:
    flag = parameters.get(name)
    if flag is not None and type(flag) is not bool:
        raise WrongType(what=f"parameter '{name}' of {what}", got=flag, want="true or false")
    return flag


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Microseconds, as Triton has it; 0 is none."""
    timeout_us = parameters.get(TIMEOUT_US, 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise WrongType(
            what=f"parameter '{TIMEOUT_US}' of the request", got=timeout_us, want="a whole number of microseconds"
        )
    return timeout_us / 1e6 or None


def _raw_request(live: Live, content: Body) -> InferRequest:
    """A body that is nothing but the elements of the only input: one row, and every output in binary."""
    signature = live.admitted.signature
    if len(signature.inputs) != 1:
        names = [spec.name for spec in signature.inputs]
        raise BadRequest(
            f"a raw binary request has one input, but model '{live.name}' takes {len(names)}; describe them in JSON, "
            "with its length in the header Inference-Header-Content-Length"
        )
    (spec,) = signature.inputs
    shape = _raw_shape(spec, len(content))
    if spec.dtype.kind == "O":
        array = np.array([text_of(spec, bytes(content))], dtype=np.object_).reshape(shape)
    else:
        array = from_bytes(spec, memoryview(content), shape)
    return InferRequest(
        live=live,
        accepted=accept_tensors(signature, {spec.name: array}),
        outputs=_all_outputs(signature, binary=True),
        batched=True,
    )


def _raw_shape(spec: TensorSpec, size: int) -> tuple[int, ...]:
    """The shape that so many bytes fill: one row, and at most one axis of a length that the signature leaves open."""
    shape = [max(spec.shape[0], 1), *spec.shape[1:]]
    if spec.dtype.kind == "O":
        if any(axis not in (-1, 1) for axis in shape):
            raise BadRequest(f"a raw binary request holds one element of BYTES; input '{spec.name}' takes {shape}")
        return tuple(1 for _ in shape)
    if shape.count(-1) > 1:
        raise BadRequest(
            f"input '{spec.name}' has shape {list(spec.shape)}, which the size of a raw binary request does not tell; "
            "describe it in JSON, with its length in the header Inference-Header-Content-Length"
        )
    if -1 in shape:
        step = spec.dtype.itemsize * math.prod(axis for axis in shape if axis != -1)
        shape[shape.index(-1)] = size // step if step else 0
    return tuple(shape)


_NO_PARAMETERS: Mapping[str, Any] = {}
_NO_BLOBS = memoryview(b"")
_MOST_NAMED = 10
"""In a list with so many more tensors than there are, each is looked at, so that the answer can name the one that is
wrong."""
_MOST_PARAMETERS = 100
_INTEGERS = frozenset({int})
_NUMBERS = frozenset({int, float})
