"""Find every BatchNormalization of an ONNX model and say whether it is frozen.

    Y = scale * (X - input_mean) / sqrt(input_var + epsilon) + B

A node is frozen when input_mean and input_var are constants of the graph and nothing asks for the batch's statistics.
How a file asks for them differs by opset (ONNX operators BatchNormalization-6, -7, -9, -14, -15):

    opset <= 6     attribute is_test = 0 (its default)
    opset 7 to 13  any output beyond Y
    opset >= 14    attribute training_mode = 1; then there are two outputs beyond Y

`torch.nn.BatchNorm*(track_running_stats=False)` needs a rule of its own: the exported node looks frozen in every
attribute, but its inputs 3 and 4 are computed from the batch by the graph.

Pure: a model goes in, facts come out, nothing is changed. Functions are inlined first, so that a BatchNormalization
inside one is judged with the inputs its caller gave it; the bodies of If, Loop and Scan are walked with the constants
of the scopes around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

LAYER_KEY = "evalmode.layer"
"""Node metadata that `evalmode export` writes: the path of the module in the PyTorch network."""

DEFAULT_EPSILON = 1e-5  # of every version of the operator
_AI_ONNX = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNorm:
    """One BatchNormalization node, and why it is not frozen (empty: it is)."""

    layer: str
    """Module path where the file knows it, else the node's name or output."""
    epsilon: float
    running_mean: NDArray[Any] | None
    """float[channels]; None when it is not a constant."""
    running_var: NDArray[Any] | None
    faults: tuple[str, ...]

    @property
    def channels(self) -> int | None:
        return None if self.running_var is None else int(self.running_var.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What `scan` found in a model."""

    batchnorms: tuple[BatchNorm, ...]
    faults: tuple[str, ...]
    """Everything that keeps the model from being served, one sentence each; those of `batchnorms` included."""


def scan(model: onnx.ModelProto) -> Scan:
    """Find all BatchNormalization nodes, and all that makes an answer depend on the batch by construction.

    Args:
        model: with its weights inside; not changed.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in _AI_ONNX), 1)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    batchnorms: list[BatchNorm] = []
    faults: list[str] = []
    for node, constants in walk(model.graph, {}):
        if node.domain not in _AI_ONNX:
            continue
        if node.op_type == "BatchNormalization":
            found = _batchnorm(node, opset, constants)
            batchnorms.append(found)
            faults.extend(f"BatchNormalization '{found.layer}' {fault}" for fault in found.faults)
        elif node.op_type == "Dropout" and (fault := _dropout_fault(node, opset, constants)):
            faults.append(f"Dropout '{layer_of(node)}' {fault}")
    return Scan(batchnorms=tuple(batchnorms), faults=tuple(faults))


def layer_of(node: onnx.NodeProto) -> str:
    """The module path if the exporter left it, else the node's own name, else its output's."""
    for entry in node.metadata_props:
        if entry.key == LAYER_KEY:
            return str(entry.value)
    return str(node.name or (node.output[0] if node.output else node.op_type))


Constants = Mapping[str, onnx.TensorProto]


def walk(graph: onnx.GraphProto, outer: Constants) -> Iterator[tuple[onnx.NodeProto, Constants]]:
    """Every node with the constants it sees: initializers and Constant nodes of its own graph and those around it."""
    constants = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _AI_ONNX and (tensor := _attribute(node, "value")) is not None:
            constants[node.output[0]] = tensor.t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    for node in graph.node:
        yield node, constants
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type in _GRAPH_ATTRIBUTES else ():
                # what the body computes or takes under a name hides an outer constant of that name
                hidden = {value.name for value in body.input} | {name for inner in body.node for name in inner.output}
                yield from walk(body, {name: tensor for name, tensor in constants.items() if name not in hidden})


_GRAPH_ATTRIBUTES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _batchnorm(node: onnx.NodeProto, opset: int, constants: Constants) -> BatchNorm:
    faults: list[str] = []
    extra = [name for name in node.output[1:] if name]
    if opset >= 14 and _integer(node, "training_mode", 0):
        faults.append("is in training mode (training_mode=1): it would normalise with the statistics of the batch")
    elif opset <= 6 and not _integer(node, "is_test", 0):
        faults.append("is in training mode (is_test=0): it would normalise with the statistics of the batch")
    elif extra:
        faults.append(f"is in training mode: it has outputs beyond Y ({', '.join(extra)})")
    mean, var = (_constant(node, position, constants) for position in (3, 4))
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            faults.append(f"has no constant {name}: the graph computes it, so an answer depends on the batch")
        elif not np.isfinite(value.astype(np.float64)).all():
            faults.append(f"has a {name} that is not finite")
    if var is not None and (var < 0).any():
        faults.append(f"has a negative running_var ({float(var.min()):g})")
    epsilon = _attribute(node, "epsilon")
    return BatchNorm(
        layer=layer_of(node),
        epsilon=DEFAULT_EPSILON if epsilon is None else epsilon.f,
        running_mean=mean,
        running_var=var,
        faults=tuple(faults),
    )


def _dropout_fault(node: onnx.NodeProto, opset: int, constants: Constants) -> str | None:
    if opset <= 6:
        return None if _integer(node, "is_test", 0) else "is in training mode (is_test=0): its answers are random"
    if opset < 12 or len(node.input) < 3 or not node.input[2]:
        return None
    training_mode = _constant(node, 2, constants)
    if training_mode is None:
        return "is in a mode that the graph computes; export the network in eval mode"
    return "is in training mode: its answers are random" if training_mode.any() else None


def _constant(node: onnx.NodeProto, position: int, constants: Constants) -> NDArray[Any] | None:
    # looked up by input position: exporters alias equal tensors, so a name says nothing about what a tensor is
    name = node.input[position] if len(node.input) > position else ""
    if name not in constants or constants[name].data_type == onnx.TensorProto.STRING:
        return None
    return numpy_helper.to_array(constants[name])


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.i
