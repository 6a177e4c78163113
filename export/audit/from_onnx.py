"""The facts in an ONNX model. No torch.

Modes are judged by `service.graph.scan`, whatever the opset; what it leaves out is read here from the same nodes, in
the same order: gamma, beta, momentum, and what stands before and behind a node. Functions are inlined, the bodies of
If, Loop and Scan are walked, and a constant is looked up by its place among a node's inputs, never by its name.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

from export.audit.facts import Array, DropoutBefore, Facts, FeaturesLast, LiveDropout, NormFacts
from service.graph.scan import BatchNorm, layer_of, scan

DEFAULT_MOMENTUM = 0.9
"""Of every version of the operator; it weighs the old value."""

_AI_ONNX = ("", "ai.onnx")
_FOLDED_KEY = "pkg.onnxscript.rewriter.rule_name"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_OTHER_NORMS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LRN")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PASSED = (
    "Identity", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
    "Softplus", "Mish", "Clip", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Squeeze",
    "Unsqueeze", "Transpose", "Cast", "DequantizeLinear", "QuantizeLinear", "Mul", "Add", "Sub", "Div",
)  # fmt: skip
_FEATURES_LAST = ("MatMul", "Gather", "LayerNormalization")
_ACTIVATIONS = (
    "Identity",
    "Relu",
    "LeakyRelu",
    "Elu",
    "Gelu",
    "Sigmoid",
    "Tanh",
    "HardSwish",
    "Add",
    "Dropout",
    "Clip",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scope:
    """What a node sees: constants and producers of its own graph and of those around it."""

    constants: Mapping[str, onnx.TensorProto]
    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, tuple[onnx.NodeProto, ...]]

    def constant(self, node: onnx.NodeProto, position: int) -> NDArray[Any] | None:
        name = node.input[position] if len(node.input) > position else ""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def producer(self, node: onnx.NodeProto, position: int = 0) -> onnx.NodeProto | None:
        return self.producers.get(node.input[position]) if len(node.input) > position else None


def read_onnx(model: onnx.ModelProto) -> Facts:
    """The facts.

    Args:
        model: with its weights inside; not changed.
    """
    found = scan(model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in _AI_ONNX), 1)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    nodes = [(node, scope) for node, scope in _walk(model.graph, _Scope(constants={}, producers={}, consumers={}))]
    places = [(node, scope) for node, scope in nodes if node.op_type == "BatchNormalization" and _is_onnx(node)]
    layers = [batchnorm.layer for batchnorm in found.batchnorms]
    norms = [
        _norm(node, scope, batchnorm, opset) for (node, scope), batchnorm in zip(places, found.batchnorms, strict=True)
    ]
    ratios = {layer_of(node): _ratio(node, scope) for node, scope in nodes if node.op_type == "Dropout"}
    return Facts(
        source="onnx",
        norms=tuple(norms),
        live_dropouts=tuple(_live_dropouts(found.faults, ratios)),
        dropouts_before=tuple(
            dropout
            for layer, (node, scope) in zip(layers, places, strict=True)
            if (dropout := _dropout(layer, node, scope))
        ),
        other_norms=Counter(node.op_type for node, _ in nodes if node.op_type in _OTHER_NORMS),
        features_last=tuple(_features_last(model, layers, places)),
        folded=tuple(_folded(node for node, _ in nodes)),
        opset=opset,
    )


def _is_onnx(node: onnx.NodeProto) -> bool:
    return node.domain in _AI_ONNX


def _walk(graph: onnx.GraphProto, outer: _Scope) -> Iterator[tuple[onnx.NodeProto, _Scope]]:
    """Every node with what it sees, in the order of `scan`."""
    constants = {**outer.constants, **{tensor.name: tensor for tensor in graph.initializer}}
    producers = {**outer.producers, **{name: node for node in graph.node for name in node.output if name}}
    consumers: dict[str, tuple[onnx.NodeProto, ...]] = dict(outer.consumers)
    for node in graph.node:
        for name in node.input:
            consumers[name] = (*consumers.get(name, ()), node)
        value = _attribute(node, "value")
        if node.op_type == "Constant" and value is not None:
            constants[node.output[0]] = value.t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    scope = _Scope(constants=constants, producers=producers, consumers=consumers)
    for node in graph.node:
        yield node, scope
        for attribute in node.attribute:
            if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                continue
            for body in (attribute.g, *attribute.graphs):
                hidden = {value.name for value in body.input} | {name for inner in body.node for name in inner.output}
                yield from _walk(
                    body,
                    _Scope(
                        constants={name: tensor for name, tensor in constants.items() if name not in hidden},
                        producers={name: inner for name, inner in producers.items() if name not in hidden},
                        consumers=consumers,
                    ),
                )


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _norm(node: onnx.NodeProto, scope: _Scope, batchnorm: BatchNorm, opset: int) -> NormFacts:
    gamma, beta = scope.constant(node, 1), scope.constant(node, 2)
    mean, var = batchnorm.running_mean, batchnorm.running_var
    momentum = _attribute(node, "momentum")
    old_weight = DEFAULT_MOMENTUM if momentum is None else momentum.f
    before, behind = scope.producer(node), [n for name in node.output[:1] for n in scope.consumers.get(name, ())]
    quantised = (before is not None and before.op_type == "DequantizeLinear") or any(
        consumer.op_type == "QuantizeLinear" for consumer in behind
    )
    return NormFacts(
        layer=batchnorm.layer,
        kind=node.op_type,
        mean_C=_vector(mean),
        var_C=_vector(var),
        gamma_C=_vector(gamma),
        beta_C=_vector(beta),
        dtype="float32" if var is None else str(var.dtype),
        weights_dtype="float32" if gamma is None else str(gamma.dtype),
        # the attributes are float32: 7 digits of what was meant
        eps=float(f"{batchnorm.epsilon:.7g}"),
        # 1 is what exporters write for a cumulative average, and for a layer in eval mode: it says nothing
        momentum=float(f"{1 - old_weight:.6g}") if old_weight < 1 else None,
        training=any(fault.startswith("is in training mode") for fault in batchnorm.faults),
        computed=tuple(name for name, values in (("running_mean", mean), ("running_var", var)) if values is None),
        quantised="kept" if quantised else "",
    )


def _vector(values: NDArray[Any] | None) -> Array | None:
    return None if values is None else values.astype(np.float64).reshape(-1)


def _live_dropouts(faults: tuple[str, ...], ratios: Mapping[str, float]) -> Iterator[LiveDropout]:
    for fault in faults:
        if named := re.fullmatch(r"Dropout '(.*?)' (is in .*)", fault, re.DOTALL):
            yield LiveDropout(layer=named[1], p=ratios.get(named[1]), why=f"it {named[2]}")


def _ratio(node: onnx.NodeProto, scope: _Scope) -> float:
    """What share a Dropout drops: an attribute until opset 11, then an input; 0.5 where it does not say."""
    ratio, attribute = scope.constant(node, 1), _attribute(node, "ratio")
    return float(ratio) if ratio is not None else attribute.f if attribute is not None else 0.5


def _dropout(layer: str, norm: onnx.NodeProto, scope: _Scope) -> DropoutBefore | None:
    """The nearest Dropout before a node, with one weighted operator between at most."""
    between: tuple[str, ...] = ()
    node = scope.producer(norm)
    for _ in range(64):  # a chain is short; a cycle is no model
        if node is None:
            return None
        if node.op_type == "Dropout":
            p = _ratio(node, scope)
            return DropoutBefore(dropout=layer_of(node), norm=layer, p=p, between=between) if p > 0 else None
        if node.op_type in _WEIGHTED:
            if any(step in _WEIGHTED for step in between):
                return None
            between = (*between, node.op_type)
        elif node.op_type not in _PASSED:
            return None
        elif node.op_type in ("Add", "Mul", "Sub", "Div") and not _with_constant(node, scope):
            between = (*between, node.op_type)
        node = _first_computed(node, scope)
    return None


def _with_constant(node: onnx.NodeProto, scope: _Scope) -> bool:
    return any(name in scope.constants for name in node.input)


def _first_computed(node: onnx.NodeProto, scope: _Scope) -> onnx.NodeProto | None:
    return next(
        (scope.producers[name] for name in node.input if name in scope.producers and name not in scope.constants), None
    )


def _features_last(
    model: onnx.ModelProto, layers: list[str], places: list[tuple[onnx.NodeProto, _Scope]]
) -> Iterator[FeaturesLast]:
    suspects = [
        (layer, node, producer)
        for layer, (node, scope) in zip(layers, places, strict=True)
        if (producer := _unmoved_producer(node, scope)) is not None
    ]
    if not suspects:
        return
    shapes = _shapes(model)
    for layer, node, producer in suspects:
        shape = shapes.get(node.input[0], ())
        if len(shape) >= 3:
            yield FeaturesLast(layer=layer, producer=f"{producer.op_type} '{layer_of(producer)}'", shape=shape)


def _unmoved_producer(node: onnx.NodeProto, scope: _Scope) -> onnx.NodeProto | None:
    """What computed a node's input, if that puts features last and nothing in between moved an axis."""
    before = scope.producer(node)
    for _ in range(16):
        if before is None or before.op_type in _FEATURES_LAST:
            return before
        if before.op_type not in _ACTIVATIONS:
            return None
        before = _first_computed(before, scope)
    return None


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # a model that is larger than protobuf allows, or that inference cannot read: no shapes known
        return {}
    return {
        value.name: tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    }


def _folded(nodes: Iterator[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        rule = notes.get(_FOLDED_KEY, "")
        if re.search(r"batch_?norm", rule, re.IGNORECASE):
            yield _path(notes) or layer_of(node), rule


def _path(notes: Mapping[str, str]) -> str:
    """The path of the module that the exporter wrote down."""
    try:
        scopes = ast.literal_eval(notes.get(_SCOPES_KEY, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return next((str(scope) for scope in reversed(scopes) if scope), "") if isinstance(scopes, list) else ""
