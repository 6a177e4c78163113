"""Weights that an ONNX file keeps in other files: where they lie, and the model with them brought inside.

`torch.onnx.export` writes `model.onnx.data` beside `model.onnx` by default. Nothing here opens a file: what a location
names is looked up in the bytes that the bundle read, so a location can reach nothing outside the bundle.

Source: ONNX IR specification, "External Tensor Data" (keys location, offset, length).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx


def locations(model: onnx.ModelProto) -> list[str]:
    """The files named by the model's tensors, each once, sorted."""
    return sorted({_entries(tensor).get("location", "") for tensor in _external(model.graph)})


def brought_inside(model: onnx.ModelProto, contents: Mapping[str, bytes]) -> onnx.ModelProto:
    """A copy of the model with every tensor's data inside it.

    Args:
        model: not changed.
        contents: the bytes of every file in `locations(model)`.

    Raises:
        ValueError: a tensor's part lies beyond the end of its file.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in _external(copy.graph):
        entries = _entries(tensor)
        content = contents[entries["location"]]
        start = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(len(content) - start)))
        if start < 0 or length < 0 or start + length > len(content):
            raise ValueError(
                f"tensor '{tensor.name}' is bytes {start} to {start + length} of '{entries['location']}', "
                f"which has {len(content)}; the file is cut short"
            )
        tensor.raw_data = content[start : start + length]
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return copy


def _external(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from (tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                yield attribute.t
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _external(body)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
