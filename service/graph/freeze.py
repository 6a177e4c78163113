"""Freeze a file that was exported in training mode, if its running statistics are provably trained.

    running_var after one update = momentum * running_var + (1 - momentum) * batch_var
    running_var after n updates >= momentum**n                    from 1, because no batch_var is negative
    n >= ln(running_var) / ln(momentum)

`momentum` is ONNX's: the weight of the OLD value. A file in training mode holds running statistics, but nothing in it
says whether they were ever learned. A network fresh from its constructor has mean 0 and variance 1, and the TorchScript
exporter, which runs the network that it exports in training mode, moves them once, with its dummy input. So the
smallest variance of each layer is asked how many updates it took at least, and a few are not enough.

1. Every running_mean and running_var is a constant, finite and not negative, and no layer still has mean 0 and
   variance 1 throughout.
2. Each layer proves `MANY_UPDATES` by its own variances. None speaks for another: a new head may stand on a trained
   backbone, and gamma and beta may be drawn.
3. What the batch computed (the outputs beyond Y) is taken by no node; as outputs of the graph it is dropped.
4. What comes out is frozen by the rules of `scan`, and Dropout is in inference.

Not provable from a file: that the last update was not the exporter's. A network that was trained and then exported in
training mode comes out with one update too many, of weight 1 - momentum.

Source: ONNX operators BatchNormalization-6, -7, -9, -14, -15 and Dropout-6, -12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import numpy_helper

from service.errors import Refused, listing
from service.graph.scan import BatchNorm, Constants, scan, walk

__all__ = ["Frozen", "FrozenLayer", "freeze"]

DEFAULT_MOMENTUM = 0.9  # of every version of the operator
MANY_UPDATES = 5
"""More than summaries, shape probes and exporters make: a new network that was printed has seen one or two batches."""
_LAST_WITH_IS_TEST = 6
_ROUNDINGS = 3  # of an update in the dtype of the statistics: momentum itself, the product, the sum
_ATTRIBUTE_EPS = 2.0**-23  # an attribute is a float32, whatever the statistics are
_AI_ONNX = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenLayer:
    """One BatchNormalization that was in training mode."""

    layer: str
    """Its module path where the file knows it, else the node's name or output."""
    channels: int
    least_updates: int
    """How many training steps its smallest variance proves; 0 when none is below 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A model in inference mode that was in training mode."""

    model: onnx.ModelProto
    layers: tuple[FrozenLayer, ...]
    dropouts: int
    """How many Dropout nodes were in training mode."""


def freeze(model: onnx.ModelProto) -> Frozen:
    """Put every BatchNormalization and Dropout of a model into inference mode.

    Args:
        model: valid, with its weights inside; not changed.

    Raises:
        Refused: nothing is in training mode; or the statistics are computed from the batch, unusable, still initial, or
            not provably learned; or the graph uses what a batch computed; or something else keeps it from being served.
    """
    frozen = onnx.ModelProto()
    frozen.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    opset = next((entry.version for entry in frozen.opset_import if entry.domain in _AI_ONNX), 1)
    nodes = [(node, constants) for node, constants in walk(frozen.graph, {}) if node.domain in _AI_ONNX]
    norms = [node for node, _ in nodes if node.op_type == "BatchNormalization"]
    training = [(node, fact) for node, fact in zip(norms, scan(frozen).batchnorms, strict=True) if _trains(node, opset)]
    dropouts = [node for node, constants in nodes if node.op_type == "Dropout" and _drops(node, opset, constants)]
    used = set(_used(frozen.graph))
    for node, fact in training:
        _require_statistics(node, fact, used)

    _drop_batch_statistics(frozen.graph, {name for node, _ in training for name in node.output[1:]})
    for node, _ in training:
        del node.output[1:]
    for node in (*(node for node, _ in training), *dropouts):
        _put_in_inference(node, opset)

    if faults := scan(frozen).faults:
        raise Refused(f"the model cannot be frozen: {'; '.join(faults)}")
    if not training and not dropouts:
        raise Refused("nothing in the model is in training mode; it can be served as it is")
    layers = tuple(_learned(node, fact) for node, fact in training)
    for layer, (_, fact) in zip(layers, training, strict=True):
        _require_many_updates(layer, fact)
    return Frozen(model=frozen, layers=layers, dropouts=len(dropouts))


# May we?


def _trains(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a BatchNormalization asks for the statistics of the batch, by the rule of its opset."""
    if opset <= _LAST_WITH_IS_TEST:
        return not _integer(node, "is_test")
    return any(node.output[1:]) or bool(_integer(node, "training_mode"))


def _drops(node: onnx.NodeProto, opset: int, constants: Constants) -> bool:
    """Whether a Dropout is in training mode for good; a mode that the graph computes is not."""
    if opset <= _LAST_WITH_IS_TEST:
        return not _integer(node, "is_test")
    mode = node.input[2] if len(node.input) > 2 else ""
    return mode in constants and bool(numpy_helper.to_array(constants[mode]).any())


def _require_statistics(node: onnx.NodeProto, fact: BatchNorm, used: set[str]) -> None:
    """There are statistics to freeze, and nobody needs those of the batch.

    Args:
        used: every name that a node takes.
    """
    layer = f"BatchNormalization '{fact.layer}'"
    if fact.running_mean is None or fact.running_var is None:
        raise Refused(
            f"{layer} has no running statistics to freeze: the statistics were never learned "
            "(track_running_stats=False); calibrate the network and export it again"
        )
    if taken := [name for name in node.output[1:] if name in used]:
        raise Refused(
            f"the graph computes with what {layer} finds in the batch ({listing(taken)}); "
            "export the network in eval mode"
        )


def _learned(node: onnx.NodeProto, fact: BatchNorm) -> FrozenLayer:
    """What the usable statistics of a layer prove.

    Raises:
        Refused: they were never updated, or can prove nothing.
    """
    layer = f"BatchNormalization '{fact.layer}'"
    mean, var = fact.running_mean, fact.running_var
    assert mean is not None
    assert var is not None
    if (mean == 0).all() and (var == 1).all():
        raise Refused(f"{layer} still has the mean 0 and variance 1 of a new layer; it was never updated")
    if var.dtype.kind != "f":
        raise Refused(f"{layer} has a running_var of {var.dtype}, whose rounding is not known here")
    momentum = _attribute(node, "momentum")
    old_weight = DEFAULT_MOMENTUM if momentum is None else momentum.f
    if not 0 < old_weight < 1:
        raise Refused(
            f"{layer} has momentum {old_weight:g}; only between 0 and 1 does a variance prove how often it was updated"
        )
    return FrozenLayer(layer=fact.layer, channels=int(var.size), least_updates=_least_updates(var, old_weight))


def _least_updates(var: NDArray[Any], momentum: float) -> int:
    """How many updates the smallest variance proves, none of them larger than their rounding allows."""
    limits = np.finfo(var.dtype)
    smallest = max(float(var.min()), float(limits.tiny))  # below it, a variance may have been flushed to 0
    unit = max(float(limits.eps), _ATTRIBUTE_EPS) / 2
    return max(0, math.ceil(math.log(smallest) / math.log(momentum * (1 - unit) ** _ROUNDINGS)))


def _require_many_updates(layer: FrozenLayer, fact: BatchNorm) -> None:
    """A layer that learned is told from one that saw a stray forward pass or two.

    Raises:
        Refused: its variances do not prove `MANY_UPDATES`.
    """
    if layer.least_updates < MANY_UPDATES:
        assert fact.running_var is not None
        raise Refused(
            f"nothing proves that the statistics of BatchNormalization '{layer.layer}' were learned: its smallest "
            f"running_var is {float(fact.running_var.min()):.4g}, which {max(layer.least_updates, 1)} update(s) of a "
            f"new layer could leave; {MANY_UPDATES} are wanted, because exporters and summaries make one or two; "
            "export the network again in eval mode"
        )


# Rewrite


def _put_in_inference(node: onnx.NodeProto, opset: int) -> None:
    _keep(node.attribute, lambda attribute: attribute.name not in ("is_test", "training_mode"))
    if opset <= _LAST_WITH_IS_TEST:
        node.attribute.append(onnx.helper.make_attribute("is_test", 1))
    elif node.op_type == "Dropout":
        del node.input[2:]


def _drop_batch_statistics(graph: onnx.GraphProto, names: set[str]) -> None:
    """Take the batch's statistics out of what the graph gives and says of its values."""
    _keep(graph.output, lambda value: value.name not in names)
    _keep(graph.value_info, lambda value: value.name not in names)


def _used(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name that a node takes, or that a body gives to the node around it."""
    for node in graph.node:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from (value.name for value in body.output)
                yield from _used(body)


T = TypeVar("T")


def _keep(entries: MutableSequence[T], wanted: Callable[[T], bool]) -> None:
    for i in reversed(range(len(entries))):
        if not wanted(entries[i]):
            del entries[i]


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _integer(node: onnx.NodeProto, name: str) -> int:
    """An attribute whose default is 0."""
    attribute = _attribute(node, name)
    return 0 if attribute is None else attribute.i
