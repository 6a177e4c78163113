"""A model in two parts: its large weights, and everything else.

Protobuf copies, serialises and parses a model in one call beside which no other thread of Python runs, and so do onnx's
shape inference and its checker: for 300 MB that is a quarter of a second, one, or two, in which nobody is answered.
What is here goes weight by weight, with pauses. Shape inference does not look at large weights, so it gets the rest
alone.

Source: Protocol Buffers, "Encoding": messages one behind another are merged, their repeated fields joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import helper

LARGE_ELEMENTS = 4096
"""Of a weight that says nothing about shapes."""

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def is_large(tensor: onnx.TensorProto) -> bool:
    return bool(math.prod(tensor.dims) >= LARGE_ELEMENTS)


def without_large(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that lacks its large initializers."""
    rest = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.number != _GRAPH:
            _copy(rest, field, value)
    rest.graph.SetInParent()
    for field, value in model.graph.ListFields():
        if field.number != _INITIALIZER:
            _copy(rest.graph, field, value)
    rest.graph.initializer.extend(tensor for tensor in model.graph.initializer if not is_large(tensor))
    return rest


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """`CopyFrom`, with the large initializers behind the others."""
    copy = without_large(model)
    for tensor in filter(is_large, model.graph.initializer):
        copy.graph.initializer.append(tensor)
    return copy


def outline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model in which each large initializer is an input of its name, type and shape."""
    rest = without_large(model)
    inputs = {value.name for value in model.graph.input}
    for tensor in filter(is_large, model.graph.initializer):
        if tensor.name not in inputs:
            rest.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return rest


def serialised(model: onnx.ModelProto) -> bytes:
    """`model.SerializeToString()`, with its large initializers behind the others."""
    large = [part for tensor in model.graph.initializer if is_large(tensor) for part in _initializer(tensor)]
    return b"".join((without_large(model).SerializeToString(), *large))


def _initializer(tensor: onnx.TensorProto) -> Iterator[bytes]:
    """A model that has nothing but this initializer."""
    head, data = _tensor(tensor)
    size = len(head) + len(data)
    begin = _begin(_INITIALIZER, size)
    yield _begin(_GRAPH, len(begin) + size) + begin + head
    yield data


def _tensor(tensor: onnx.TensorProto) -> tuple[bytes, bytes]:
    if not tensor.HasField("raw_data"):
        return tensor.SerializeToString(), b""
    head = onnx.TensorProto()
    for field, value in tensor.ListFields():
        if field.number != _RAW_DATA:
            _copy(head, field, value)
    data = tensor.raw_data
    return head.SerializeToString() + _begin(_RAW_DATA, len(data)), data


def _begin(field_number: int, size: int) -> bytes:
    """Of a field that has so many bytes."""
    return _varint(field_number << 3 | 2) + _varint(size)


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _copy(to: onnx.ModelProto | onnx.GraphProto | onnx.TensorProto, field: object, value: object) -> None:
    name = field.name  # type: ignore[attr-defined]
    if isinstance(value, str | bytes | int | float):
        setattr(to, name, value)
    elif hasattr(value, "ListFields"):
        getattr(to, name).CopyFrom(value)
    else:
        getattr(to, name).extend(value)
