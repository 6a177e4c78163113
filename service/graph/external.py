"""Weights that an ONNX file keeps in other files: where they lie, and the model with them brought inside.

`torch.onnx.export` writes `model.onnx.data` beside `model.onnx` by default. Nothing here opens a file: what a location
names is looked up in the bytes that the bundle read, so a location can reach nothing outside the bundle.

Rule 1: tensors are found by what the format says that a message may hold, not by a list of places kept here. Of one
        that is forgotten, onnxruntime opens the file itself, in the working directory.

Source: ONNX IR specification, "External Tensor Data" (keys location, offset, length).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from google.protobuf.message import Message

MOST_BYTES = 2**31 - 1
"""Of a model with its weights inside: what a protobuf message holds."""


def locations(model: onnx.ModelProto) -> list[str]:
    """The files named by the model's tensors, each once, sorted."""
    return sorted({_entries(tensor).get("location", "") for tensor in _external(model)})


def brought_inside(model: onnx.ModelProto, contents: Mapping[str, bytes]) -> onnx.ModelProto:
    """A copy of the model with every tensor's data inside it.

    Args:
        model: not changed.
        contents: the bytes of every file in `locations(model)`.

    Raises:
        ValueError: a tensor's part lies beyond the end of its file, or all parts together are too large for a model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    left_bytes = MOST_BYTES - model.ByteSize()
    for tensor in _external(copy):
        entries = _entries(tensor)
        content = contents[entries.get("location", "")]
        start = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(len(content) - start)))
        if start < 0 or length < 0 or start + length > len(content):
            raise ValueError(
                f"tensor '{tensor.name}' is bytes {start} to {start + length} of '{entries['location']}', "
                f"which has {len(content)}; the file is cut short"
            )
        left_bytes -= length
        if left_bytes < 0:  # many tensors may name one part
            raise ValueError(f"the model with its weights inside has more than {MOST_BYTES} bytes")
        tensor.raw_data = content[start : start + length]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return copy


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model, wherever it stands, whose data lie elsewhere."""
    left: list[Message] = [model]
    while left:
        message = left.pop()
        if isinstance(message, onnx.TensorProto):
            if message.data_location == onnx.TensorProto.EXTERNAL:
                yield message
            continue
        for field, value in message.ListFields():
            if field.message_type is not None and field.message_type.full_name in _HOLDERS:
                left += [value] if isinstance(value, Message) else value


def _holders() -> frozenset[str]:
    """The kinds of messages in a model that are tensors or may have some inside."""
    kinds: dict[str, set[str]] = {}
    left: list[Any] = [onnx.ModelProto.DESCRIPTOR]
    while left:
        kind = left.pop()
        if kind.full_name not in kinds:
            inside = [field.message_type for field in kind.fields if field.message_type is not None]
            kinds[kind.full_name] = {it.full_name for it in inside}
            left += inside
    holders = {onnx.TensorProto.DESCRIPTOR.full_name}
    while more := {kind for kind, inside in kinds.items() if inside & holders} - holders:
        holders |= more
    return frozenset(holders)


_HOLDERS = _holders()


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
