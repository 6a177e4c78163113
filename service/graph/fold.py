"""Merge each frozen BatchNormalization into the layer before or after it: the same function, without the node.

    y = gamma * (x - mean) / std + beta                   std = sqrt(var + eps)
      = scale * x + shift                                 scale = gamma / std,  shift = beta - scale * mean

    before   x = W z + b   =>   y = (scale * W) z + (scale * (b - mean) + beta)
    after    z = W y + b   =>   z = (W * scale) x + (b + W shift)

Before, each output of W has its scale; after, each input. Both are exact in real numbers, as long as W sees nothing but
y (a convolution that pads sees zeros beside it). In floating point they differ:

    before   x is off by the rounding of the sum W z + b, and y by scale times that, folded or not: the same order.
    after    x - mean loses nothing when |mean| is large beside std; W x and W shift, which nearly cancel, keep the
             rounding of numbers that large. Hence MOST_ROUNDING.

1. What is folded is what `scan` calls frozen, at the top level of the graph. Functions are inlined first.
2. A tensor is found by its position at a node and never by its name, and none is changed in place: exporters give
   equal tensors one name, and the mean of a fresh BatchNormalization can be the bias of a layer elsewhere.
3. Everything is computed in float64 and rounded once, to the dtype of the layer's weights, however many
   BatchNormalizations go into one layer.
4. The names of the graph's inputs and outputs stay, and so does what the surviving nodes say of their modules.

Legend: W_GOIK has G groups, O outputs and I inputs of each group, K positions of the kernel; C channels.

Source: ONNX operators BatchNormalization-15, Conv-22, ConvTranspose-22, Gemm-13, MatMul-13. The operators before
opset 7 broadcast by other rules; files that old are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, final

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.graph.parts import copied, outline
from service.graph.scan import LAYER_KEY, BatchNorm, layer_of, scan

__all__ = ["MOST_ROUNDING", "Fold", "Folded", "fold"]

MOST_ROUNDING = 16.0
"""How many times the rounding of the layer after may grow; where it would grow more, the node is kept.

Unfolded, the layer multiplies its weights by (x - mean) / std, which is about 1; folded, by x / std, which is up to
1 + |mean| / std. Rounding is a share of what is rounded, so it grows by that factor. 16 = 2**4: at most 4 of float32's
24 bits; the 20 that are left are a relative 1e-6.

Measured, 32 inputs and 16 outputs, |mean| / std of 15, 64 and 1024: 10, 50 and 900 times the rounding of an engine that
computes x - mean. One that computes scale * x + shift, as onnxruntime does on a CPU, has lost a third of that already.
"""

_OLDEST_OPSET = 7
_SEPARATE_INITIALIZERS = 4  # the IR version from which on an initializer need not be an input
_AI_ONNX = ("", "ai.onnx")
_DTYPES: Mapping[int, np.dtype[Any]] = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.DOUBLE: np.dtype(np.float64),
}

Array: TypeAlias = NDArray[np.float64]
Shape: TypeAlias = tuple[int | None, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What became of one BatchNormalization."""

    layer: str
    """Its module path where the file knows it, else the node's name or output."""
    into: str | None
    """The layer that now does its work; None: it was kept."""
    side: Literal["before", "after"] | None
    """Where that layer stands."""
    kept_because: str | None
    """The rest of the sentence "kept because …"; None: it was folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A model without the BatchNormalizations that its layers took up."""

    model: onnx.ModelProto
    folds: tuple[Fold, ...]
    """One for every BatchNormalization, in the order of the graph."""


def fold(model: onnx.ModelProto) -> Folded:
    """Fold every BatchNormalization that can be, into the layer before it where both would do.

    Args:
        model: valid, with its weights inside; not changed.
    """
    graph = _Graph(model)
    found = [(node, owner) for node, owner in _walk(graph.nodes) if _is(node, "BatchNormalization")]
    facts = scan(graph.model).batchnorms
    folds: dict[int, Fold] = {}
    waiting = list(range(len(found)))
    while waiting:
        with np.errstate(all="ignore"):  # what is not finite is looked for, and refused in a sentence
            folds |= {i: _folded(graph, *found[i], facts[i]) for i in waiting}
        kept = [i for i in waiting if folds[i].into is None]
        if len(kept) == len(waiting):
            break
        waiting = kept  # what was in the way may be gone now
    return Folded(model=graph.finished(), folds=tuple(folds[i] for i in range(len(found))))


def _folded(graph: _Graph, node: onnx.NodeProto, owner: onnx.NodeProto | None, fact: BatchNorm) -> Fold:
    norm = _read(graph, node, owner, fact)
    if isinstance(norm, str):
        return Fold(layer=fact.layer, into=None, side=None, kept_because=norm)
    before = _into_before(graph, norm)
    if isinstance(before, _Merge):
        return Fold(layer=fact.layer, into=before.apply(graph), side="before", kept_because=None)
    after = _into_after(graph, norm)
    if isinstance(after, _Merge):
        return Fold(layer=fact.layer, into=after.apply(graph), side="after", kept_because=None)
    return Fold(layer=fact.layer, into=None, side=None, kept_because=f"before it, {before}; after it, {after}")


# Pattern: the node and what it computes


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Norm:
    """A BatchNormalization that may be folded, as numbers."""

    node: onnx.NodeProto
    gamma_C: Array
    beta_C: Array
    mean_C: Array
    std_C: Array

    @property
    def scale_C(self) -> Array:
        return self.gamma_C / self.std_C

    @property
    def shift_C(self) -> Array:
        return self.beta_C - self.scale_C * self.mean_C


def _read(graph: _Graph, node: onnx.NodeProto, owner: onnx.NodeProto | None, fact: BatchNorm) -> _Norm | str:
    if fact.faults:
        return f"it is not frozen: it {'; it '.join(fact.faults)}"
    if owner is not None:
        return f"it sits in the body of {_called(owner)}"
    if graph.opset < _OLDEST_OPSET:
        return f"the file is of opset {graph.opset}; its operators broadcast by other rules than those of today"
    if not _integer(node, "spatial", 1):
        return "it has statistics for each position (spatial=0)"
    vectors = []
    for what, name in zip(("gamma", "beta", "running_mean", "running_var"), node.input[1:5], strict=True):
        if not graph.is_constant(name):
            return f"its {what} is not a constant of the graph"
        vectors.append(graph.array(name))
    if len({vector.shape for vector in vectors}) > 1:
        return f"its vectors differ in length: {', '.join(str(list(vector.shape)) for vector in vectors)}"
    gamma_C, beta_C, mean_C, var_C = vectors
    norm = _Norm(node=node, gamma_C=gamma_C, beta_C=beta_C, mean_C=mean_C, std_C=np.sqrt(var_C + fact.epsilon))
    finite = np.isfinite(norm.scale_C).all() and np.isfinite(norm.shift_C).all()
    return norm if finite else "gamma / sqrt(var + eps) or beta is not finite"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A layer z = W y + b with constants for W and b, whatever its operator."""

    node: onnx.NodeProto
    add: onnx.NodeProto | None
    """The Add behind a MatMul whose constant is b."""
    weight: str
    W_GOIK: Array
    b: Array
    """What is added, broadcast against [..., outputs]."""
    alpha: float
    """Gemm's: the factor before W y."""

    @property
    def outputs(self) -> int:
        return int(self.W_GOIK.shape[0] * self.W_GOIK.shape[1])

    @property
    def inputs(self) -> int:
        return int(self.W_GOIK.shape[0] * self.W_GOIK.shape[2])


def _layer(graph: _Graph, node: onnx.NodeProto) -> _Layer | str:
    """The layer of a Conv, ConvTranspose, Gemm or MatMul, or why there is none."""
    if not _is(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return f"{_called(node)} has no weights to take it up"
    weight = node.input[1]
    if not graph.is_constant(weight):
        return f"the weight of {_called(node)} is not a constant of the graph"
    if graph.data_type(weight) not in _DTYPES:
        return f"the weight of {_called(node)} is of type {TensorProto.DataType.Name(graph.data_type(weight))}"
    stored = graph.array(weight)
    convolves = _is(node, "Conv", "ConvTranspose")
    groups = _integer(node, "group", 1) if convolves else 1
    if stored.ndim != 2 if not convolves else stored.ndim < 3 or stored.shape[0] % groups:
        return f"the weight of {_called(node)} has the shape {list(stored.shape)}"
    add = _added(graph, node) if _is(node, "MatMul") else None
    bias = ""
    if add is not None:
        bias = next(name for name in add.input if graph.is_constant(name))
    elif len(node.input) > 2:
        bias = node.input[2]
    if bias and not graph.is_constant(bias):
        return f"the bias of {_called(node)} is not a constant of the graph"
    b = graph.array(bias) if bias else np.zeros(())
    return _Layer(
        node=node,
        add=add,
        weight=weight,
        W_GOIK=_ordered(node, stored, groups),
        b=b * _real(node, "beta", 1.0) if _is(node, "Gemm") else b,
        alpha=_real(node, "alpha", 1.0) if _is(node, "Gemm") else 1.0,
    )


def _added(graph: _Graph, matmul: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Add that gives a MatMul its bias: nobody else sees the product, and the other summand is a constant."""
    if graph.not_alone(matmul.output[0]):
        return None
    (user,) = graph.users[matmul.output[0]]
    constants = [name for name in user.input if graph.is_constant(name)]
    return user if _is(user, "Add") and len(constants) == 1 else None


def _inputs_first(node: onnx.NodeProto) -> bool:
    """Whether the weight is stored [inputs, outputs of a group, ...] and not [outputs, inputs of a group, ...]."""
    return _is(node, "ConvTranspose", "MatMul") or (_is(node, "Gemm") and not _integer(node, "transB", 0))


def _ordered(node: onnx.NodeProto, stored: Array, groups: int) -> Array:
    first, second, *kernel = stored.shape
    ordered = stored.reshape(groups, first // groups, second, int(np.prod(kernel)))
    return ordered.swapaxes(1, 2) if _inputs_first(node) else ordered


# Check: into the layer before


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Merge:
    """What to write where; made only when nothing speaks against it."""

    norm: _Norm
    layer: _Layer
    side: Literal["before", "after"]
    W_GOIK: Array
    b: Array

    def apply(self, graph: _Graph) -> str:
        """Rewrite the layer, take the node out, and name the layer."""
        into = layer_of(self.layer.node)
        graph.write(self.layer, self.W_GOIK, self.b)
        if self.side == "before":
            graph.remove_keeping_output(self.norm.node)
        else:
            graph.remove_keeping_input(self.norm.node)
        return into


def _into_before(graph: _Graph, norm: _Norm) -> _Merge | str:
    name = norm.node.input[0]
    while True:
        producer = graph.producers.get(name)
        if producer is None:
            return "there is no layer"
        if reason := graph.not_alone(name):
            return f"the output of {_called(producer)} {reason}"
        if not _hands_through(graph, producer):
            break
        name = producer.input[0]
    layer = _layer(graph, _matmul_of(graph, producer) or producer)
    if isinstance(layer, str):
        return layer
    if _is(layer.node, "MatMul") and graph.rank(name) != 2:
        return (
            f"the output of {_called(layer.node)} is not known to have two axes, and its channels are on the last one, "
            "where BatchNormalization has them on the second"
        )
    channels = norm.gamma_C.size
    if layer.outputs != channels:
        return f"{_called(layer.node)} has {layer.outputs} outputs for {channels} channels"
    groups, outputs = layer.W_GOIK.shape[:2]
    W_GOIK = layer.W_GOIK * norm.scale_C.reshape(groups, outputs, 1, 1)
    b = norm.scale_C * (layer.b - norm.mean_C) + norm.beta_C
    reason = _does_not_fit(graph, layer, W_GOIK, b, axes=(2, 3))
    return reason or _Merge(norm=norm, layer=layer, side="before", W_GOIK=W_GOIK, b=b)


def _matmul_of(graph: _Graph, add: onnx.NodeProto) -> onnx.NodeProto | None:
    """The MatMul whose bias an Add adds."""
    if not _is(add, "Add"):
        return None
    producers = [graph.producers[name] for name in add.input if name in graph.producers]
    return next((node for node in producers if _is(node, "MatMul") and _added(graph, node) is add), None)


# Check: into the layer after


def _into_after(graph: _Graph, norm: _Norm) -> _Merge | str:
    name = norm.node.output[0]
    scale_and_shift = np.stack([norm.scale_C, norm.shift_C])
    what = "its output"
    while True:
        if reason := graph.not_alone(name):
            return f"{what} {reason}"
        (node,) = graph.users[name]
        spread = _spread(graph, node, name, scale_and_shift)
        if spread is None:
            break
        if isinstance(spread, str):
            return spread
        name, scale_and_shift, what = node.output[0], spread, f"the output of {_called(node)}"
    layer = _layer(graph, node)
    if isinstance(layer, str):
        return layer
    if reason := _sees_other_values(graph, node, name):
        return f"{_called(node)} {reason}"
    scale_C, shift_C = scale_and_shift
    if layer.inputs != scale_C.size:
        return f"{_called(node)} has {layer.inputs} inputs for {scale_C.size} channels"
    rounding_C = 1 + np.abs(norm.mean_C) / norm.std_C
    if rounding_C.max() > MOST_ROUNDING:
        worst = int(rounding_C.argmax())
        return (
            f"rounding would grow {rounding_C[worst]:.3g} times: channel {worst} has mean {norm.mean_C[worst]:.3g} "
            f"and standard deviation {norm.std_C[worst]:.3g}"
        )
    groups, _, inputs, _ = layer.W_GOIK.shape
    W_GOIK = layer.W_GOIK * scale_C.reshape(groups, 1, inputs, 1)
    W_shift_O = (layer.W_GOIK * shift_C.reshape(groups, 1, inputs, 1)).sum(axis=(2, 3)).reshape(-1)
    b = layer.b + layer.alpha * W_shift_O
    reason = _does_not_fit(graph, layer, W_GOIK, b, axes=(1, 3))
    return reason or _Merge(norm=norm, layer=layer, side="after", W_GOIK=W_GOIK, b=b)


def _sees_other_values(graph: _Graph, node: onnx.NodeProto, name: str) -> str | None:
    """Why a layer would meet something beside y, or y along another axis."""
    if _is(node, "ConvTranspose"):
        return (
            "adds up fewer products at its borders than inside, so what BatchNormalization adds is no one number there"
        )
    if _is(node, "Conv"):
        if any(_integers(node, "pads")) or _text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "pads its input with zeros, which BatchNormalization would not have seen"
    elif _is(node, "Gemm"):
        if _integer(node, "transA", 0):
            return "transposes its input"
    elif graph.rank(name) != 2:
        return "takes an input that is not known to have two axes, so its channels may not be on the last one"
    return None


def _spread(
    graph: _Graph, node: onnx.NodeProto, name: str, scale_and_shift: NDArray[np.float64]
) -> NDArray[np.float64] | str | None:
    """Scale and shift of each channel of a node's output; a sentence if they cannot be known, None if it computes.

    Args:
        name: the input of `node` that has these channels on axis 1.
        scale_and_shift: float64[2, channels].
    """
    if _hands_through(graph, node):
        return scale_and_shift
    shape = graph.shapes.get(name)
    if _is(node, "Flatten", "Reshape"):
        sides = [side for side in (shape or ())[2:] if side is not None]
        positions = int(np.prod(sides))
        features = positions * scale_and_shift.shape[1]
        if shape is None or len(sides) != len(shape) - 2 or not _flattens(graph, node, shape, features):
            return f"{_called(node)} is not known to put each channel's positions side by side"
        return np.repeat(scale_and_shift, positions, axis=1)
    if _is(node, "Concat"):
        widths = [width for width in (_width(graph, part) for part in node.input) if width is not None]
        if shape is None or len(widths) != len(node.input) or _integer(node, "axis", 1) not in (1, 1 - len(shape)):
            return f"{_called(node)} is not known to put channels of known number side by side"
        start = sum(widths[: list(node.input).index(name)])
        whole = np.stack([np.ones(sum(widths)), np.zeros(sum(widths))])
        whole[:, start : start + scale_and_shift.shape[1]] = scale_and_shift
        return whole
    return None


def _width(graph: _Graph, name: str) -> int | None:
    shape = graph.shapes.get(name)
    return shape[1] if shape is not None and len(shape) > 1 else None


def _flattens(graph: _Graph, node: onnx.NodeProto, shape: Shape, features: int) -> bool:
    """Whether [N, C, ...] becomes [N, features], each row in its own order."""
    if _is(node, "Flatten"):
        return _integer(node, "axis", 1) in (1, 1 - len(shape))
    if not graph.is_constant(node.input[1]):
        return False
    match graph.array(node.input[1]).astype(int).tolist():
        case [_, second] if second == features:
            return True
        case [first, -1]:
            return first in (0, shape[0])
    return False


def _hands_through(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Identity, and Dropout in inference."""
    if _is(node, "Identity"):
        return True
    if not _is(node, "Dropout"):
        return False
    mode = node.input[2] if len(node.input) > 2 else ""
    return not mode or (graph.is_constant(mode) and not bool(graph.array(mode).any()))


def _does_not_fit(graph: _Graph, layer: _Layer, W_GOIK: Array, b: Array, *, axes: tuple[int, int]) -> str | None:
    """Why the dtype of the weights cannot hold the new ones.

    An entry below the smallest normal number is off by more than its share, but by less than the rounding of an entry
    that is normal: only a channel that has no such entry left loses digits.

    Args:
        axes: those of W_GOIK that lie within a channel.
    """
    dtype = _DTYPES[graph.data_type(layer.weight)]
    limits = np.finfo(dtype)
    if not (np.isfinite(W_GOIK.astype(dtype)).all() and np.isfinite(b.astype(dtype)).all()):
        return f"the weights of {_called(layer.node)} would not be finite: {dtype} ends at {limits.max:.3g}"
    old, new = (np.abs(values).max(axis=axes, initial=0) for values in (layer.W_GOIK, W_GOIK))
    if ((new > 0) & (new < limits.tiny) & (old >= limits.tiny)).any():
        return f"the weights of {_called(layer.node)} would fall below {limits.tiny:.3g}, the smallest normal {dtype}"
    return None


# Rewrite


@final
class _Graph:
    """The top level of a copy of a model while it is changed.

    `producers`, `users` and `outputs` always describe the graph as it is now.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = copied(onnx.inliner.inline_local_functions(model) if model.functions else model)
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in _AI_ONNX), 1)
        graph = self.model.graph
        self.outputs = {value.name for value in graph.output}
        self.shapes = _shapes(self.model)
        self.nodes = list(graph.node)
        self._given = _own_names(graph)
        self._names = set(_names(graph))
        overridable = {value.name for value in graph.input}
        self._constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in overridable}
        for node in self.nodes:
            if _is(node, "Constant") and (value := _attribute(node, "value")) is not None:
                self._constants[node.output[0]] = value.t
            elif _is(node, "Identity") and node.input[0] in self._constants:
                self._constants[node.output[0]] = self._constants[node.input[0]]
        self._made: dict[str, tuple[Array, int]] = {}
        self._freed: set[str] = set()
        self._index()

    def _index(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in _used(node):
                self.users.setdefault(name, []).append(node)

    def is_constant(self, name: str) -> bool:
        return name in self._made or name in self._constants

    def data_type(self, name: str) -> int:
        return self._made[name][1] if name in self._made else self._constants[name].data_type

    def array(self, name: str) -> Array:
        """The constant of that name, in float64; not to be changed."""
        if name in self._made:
            return self._made[name][0]
        return np.asarray(numpy_helper.to_array(self._constants[name]), dtype=np.float64)

    def rank(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def not_alone(self, name: str) -> str | None:
        """Why a tensor may not change its meaning, unless exactly one node takes it, once."""
        if name in self.outputs:
            return "is an output of the graph"
        users = self.users.get(name, [])
        if len(users) > 1:
            return f"is used {len(users)} times"
        return None if users else "is used by nothing"

    def write(self, layer: _Layer, W_GOIK: Array, b: Array) -> None:
        """Give a layer other constants."""
        node, data_type = layer.node, self.data_type(layer.weight)
        shape = self.array(layer.weight).shape
        stored = (W_GOIK.swapaxes(1, 2) if _inputs_first(node) else W_GOIK).reshape(shape)
        self._replace(node, 1, stored, data_type)
        if layer.add is not None:
            position = next(i for i, name in enumerate(layer.add.input) if self.is_constant(name))
            self._replace(layer.add, position, b, data_type)
        elif _is(node, "MatMul"):
            add = helper.make_node("Add", [self._fresh(f"{node.output[0]}.product"), ""], [node.output[0]])
            add.name = self._fresh(f"{node.name or node.output[0]}.add")
            add.metadata_props.extend(entry for entry in node.metadata_props if entry.key == LAYER_KEY)
            node.output[0] = add.input[0]
            self.nodes.insert(next(i for i, other in enumerate(self.nodes) if other is node) + 1, add)
            self._replace(add, 1, b, data_type)
        else:
            self._replace(node, 2, b, data_type)
            if _is(node, "Gemm"):
                _keep(node.attribute, lambda attribute: attribute.name != "beta")  # it is in b now
        self._index()

    def _replace(self, node: onnx.NodeProto, position: int, values: Array, data_type: int) -> None:
        while len(node.input) <= position:
            node.input.append("")
        old = node.input[position]
        name = old
        if old not in self._made:
            name = self._fresh(f"{old or node.output[0] + '.bias'}.folded")
            self._freed.add(old)
        self._made[name] = (values, data_type)
        node.input[position] = name

    def remove_keeping_output(self, norm: onnx.NodeProto) -> None:
        """Take a node out; what made its input makes its output now."""
        producer = self.producers[norm.input[0]]
        producer.output[0] = norm.output[0]
        self._remove(norm)

    def remove_keeping_input(self, norm: onnx.NodeProto) -> None:
        """Take a node out; what took its output takes its input now."""
        (user,) = self.users[norm.output[0]]
        user.input[list(user.input).index(norm.output[0])] = norm.input[0]
        self._remove(norm)

    def _remove(self, norm: onnx.NodeProto) -> None:
        self.nodes = [node for node in self.nodes if node is not norm]
        self._freed.update(norm.input[1:])
        self._index()

    def _fresh(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}.{count}"
        self._names.add(name)
        return name

    def finished(self) -> onnx.ModelProto:
        """The model, without the constants that folding left unused."""
        graph = self.model.graph
        self._prune()
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        _keep(graph.initializer, lambda tensor: tensor.name not in self._freed)
        for name, (values, data_type) in self._made.items():
            content = values.astype(_DTYPES[data_type].newbyteorder("<")).tobytes()
            graph.initializer.add(name=name, data_type=data_type, dims=values.shape, raw_data=content)
        gone = self._given - _own_names(graph)
        _keep(graph.value_info, lambda value: value.name not in gone)
        if self._made:
            self.model.ir_version = max(self.model.ir_version, _SEPARATE_INITIALIZERS)
        return self.model

    def _prune(self) -> None:
        """Drop the nodes that only handed on what is unused now; leave in `_freed` the initializers to drop."""
        waiting, unused = self._freed - {""}, set[str]()
        while waiting:
            name = waiting.pop()
            if name in self.users or name in self.outputs:
                continue
            unused.add(name)
            producer = self.producers.get(name)
            if producer is not None and not any(out in self.users or out in self.outputs for out in producer.output):
                self.nodes = [node for node in self.nodes if node is not producer]
                waiting.update(producer.input)
                self._index()
        self._freed = unused


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """What is known of the shapes; folding changes none of them."""
    graph = onnx.shape_inference.infer_shapes(outline(model), data_prop=True).graph
    return {
        value.name: tuple(
            side.dim_value if side.HasField("dim_value") else None for side in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _walk(
    nodes: Iterable[onnx.NodeProto], owner: onnx.NodeProto | None = None
) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto | None]]:
    """Every node with the node whose body it is in, in the order of `scan`."""
    for node in nodes:
        yield node, owner
        for body in _bodies(node):
            yield from _walk(body.node, node)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _used(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that a node takes, itself or in a body; a name of the body's own does no harm."""
    yield from (name for name in node.input if name)
    for body in _bodies(node):
        for inner in body.node:
            yield from _used(inner)
        yield from (value.name for value in body.output)


def _own_names(graph: onnx.GraphProto) -> set[str]:
    return {
        *(value.name for value in (*graph.input, *graph.output)),
        *(tensor.name for tensor in graph.initializer),
        *(name for node in graph.node for name in node.output),
    }


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name in a graph and its bodies, of tensors and of nodes."""
    yield from _own_names(graph)
    yield from (value.name for value in graph.value_info)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        yield from (node.name, *node.input)
        for body in _bodies(node):
            yield from _names(body)


def _keep(entries: MutableSequence[T], wanted: Callable[[T], bool]) -> None:
    for i in reversed(range(len(entries))):
        if not wanted(entries[i]):
            del entries[i]


def _is(node: onnx.NodeProto, *operators: str) -> bool:
    return node.domain in _AI_ONNX and node.op_type in operators


def _called(node: onnx.NodeProto) -> str:
    return f"{node.op_type} '{layer_of(node)}'"


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.i


def _real(node: onnx.NodeProto, name: str, default: float) -> float:
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.f


def _integers(node: onnx.NodeProto, name: str) -> Sequence[int]:
    attribute = _attribute(node, name)
    return () if attribute is None else attribute.ints


def _text(node: onnx.NodeProto, name: str, default: str) -> str:
    attribute = _attribute(node, name)
    return default if attribute is None else attribute.s.decode()
