"""Weights that an ONNX file keeps in other files: where they lie, and the model with them brought inside.

`torch.onnx.export` writes `model.onnx.data` beside `model.onnx` by default. Nothing here opens a file: what a location
names is looked up in the bytes that the bundle read, so a location can reach nothing outside the bundle.

Source: ONNX IR specification, "External Tensor Data" (keys location, offset, length).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx

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
    nodes = [node for function in model.functions for node in function.node]
    for tensor in (*_of_graph(model.graph), *_of_nodes(nodes)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.initializer:
                    yield from _of_graph(body)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
