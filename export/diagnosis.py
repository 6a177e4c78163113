"""Why does an ONNX model not answer as the network does? A verdict, and the first BatchNorm at which they part.

The questions are asked in this order, and the first that explains the difference is the verdict:

    the file is in training mode          a node of the graph asks for the statistics of the batch
    statistics missing                    the graph computes its running statistics, or they are mean 0 and variance 1
    the reference was in train mode       the file is the network in eval mode; the network it was held against is not
    eps differs                           with the file's eps the network answers as the file does
    statistics differ                     with the file's vectors the network answers as the file does
    code branches on the batch size       only batches of some sizes differ
    just noise                            the difference is rounding
    unexplained                           the layers say where to look

Every BatchNorm of the network is watched, in PyTorch and in ONNX, and judged by the float error of that very layer: its
output is made an output of both, and `export.rounding` bounds it like any other.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from export import parity
from export.copying import copied
from export.rounding import analyse, flattened
from service.errors import Refused, first_line
from service.graph.scan import LAYER_KEY, scan
from service.numerics import largest_difference
from service.runtime import OnnxRuntime, place

Verdict = Literal[
    "equal",
    "the file is in training mode",
    "statistics missing",
    "the reference was in train mode",
    "eps differs",
    "statistics differ",
    "code branches on the batch size",
    "just noise",
    "unexplained",
]

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_VECTORS = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}
"""The inputs of a BatchNormalization node, and what PyTorch calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """How far the outputs of one BatchNorm layer are apart, and how far rounding may take them."""

    layer: str
    difference: float
    allowed: float

    @property
    def diverges(self) -> bool:
        return not self.difference <= self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found; `sentence` says it with its figures."""

    verdict: Verdict
    sentence: str
    layers: tuple[LayerDifference, ...] = ()
    """In the order in which the network runs them; empty where they cannot be told apart in the file."""

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that diverges."""
        return next((layer for layer in self.layers if layer.diverges), None)


def diagnose(module: nn.Module, model: onnx.ModelProto, inputs: Sequence[Tensor]) -> Diagnosis:
    """Compare a network, in the mode in which it is, with an ONNX model that is said to be the same.

    Args:
        module, inputs: not changed.
        model: with its weights inside; not changed.

    Raises:
        Refused: one of the two fails on these rows, or they have different numbers of inputs or outputs.
    """
    evaluated = copied(module).eval()
    names = _output_names(evaluated, model, inputs)
    found = scan(model)
    if fault := next((fault for fault in found.faults if _is_about_the_mode(fault)), None):
        return Diagnosis(
            verdict="the file is in training mode",
            sentence=f"{fault}; export the network again in eval mode, or try 'evalmode freeze' on the file",
        )
    if found.faults:
        return Diagnosis(verdict="statistics missing", sentence=f"{found.faults[0]}; see rule BN002")
    measured = parity.measure(evaluated, model, inputs, names)
    reason = parity.refusal(measured)
    if reason is None:
        return _equal_to_eval_mode(module, evaluated, inputs, measured)
    layers = layer_differences(evaluated, model, inputs)
    where = _first_sentence(layers)
    for verdict, changed, said in _explanations(evaluated, model):
        if parity.refusal(parity.measure(changed, model, inputs, names)) is None:
            return Diagnosis(verdict=verdict, sentence=f"{said}{where}", layers=layers)
    if "batches of" in reason:
        return Diagnosis(verdict="code branches on the batch size", sentence=reason, layers=layers)
    return Diagnosis(verdict="unexplained", sentence=f"{reason}{where}", layers=layers)


def _is_about_the_mode(fault: str) -> bool:
    """By what is said of the layer, which may itself be called `/model/norm`."""
    return "' is in training mode" in fault or "' is in a mode" in fault


def layer_differences(
    module: nn.Module, model: onnx.ModelProto, inputs: Sequence[Tensor]
) -> tuple[LayerDifference, ...]:
    """The outputs of every BatchNorm in PyTorch and in ONNX, in the order in which the network runs them.

    Args:
        module: in eval mode; not changed.

    Returns:
        Nothing where the file's BatchNorm nodes are not the network's one by one.
    """
    tapped = _Tapped(module)
    torch_gave = [tensor.numpy() for tensor in _taps(tapped, inputs)]
    pairs = _paired(tapped.calls, model)
    if pairs is None:
        return ()
    onnx_gave = _tapped_onnx(model, [node.output[0] for node in pairs], inputs)
    bounds = analyse(tapped, inputs).bounds
    return tuple(
        LayerDifference(layer=layer, difference=largest_difference(one, other), allowed=2 * bound)
        for layer, one, other, bound in zip(tapped.calls, torch_gave, onnx_gave, bounds, strict=False)
    )


def _first_sentence(layers: Sequence[LayerDifference]) -> str:
    """Where the two part, to be put behind a reason."""
    if not layers:
        return ""
    first = next((layer for layer in layers if layer.diverges), None)
    if first is None:
        return f"; all {len(layers)} BatchNorm layers agree, so it is what comes after the last of them"
    return (
        f"; the first BatchNorm that differs is '{first.layer}', by {first.difference:.3g} where rounding explains "
        f"{first.allowed:.3g}"
    )


def _equal_to_eval_mode(
    module: nn.Module, evaluated: nn.Module, inputs: Sequence[Tensor], measured: parity.Parity
) -> Diagnosis:
    """The file is right. Was the network that it was held against in eval mode?"""
    worst = max((difference.largest for difference in measured.differences), default=0.0)
    allowed = 2 * max(measured.bounds.values(), default=0.0)
    training = [
        path or "the network itself" for path, part in module.named_modules() if part.training and _has_modes(part)
    ]
    if training:
        duplicate = copy.deepcopy(module)
        try:
            apart = max(
                largest_difference(one, other)
                for one, other in zip(
                    parity.torch_outputs(duplicate, inputs), parity.torch_outputs(evaluated, inputs), strict=True
                )
            )
            by = f"by up to {apart:.3g}" if apart else ""
        except ValueError as error:  # "Expected more than 1 value per channel when training"
            by = f"(on these rows it fails: {first_line(error)})"
        if by:
            return Diagnosis(
                verdict="the reference was in train mode",
                sentence=(
                    f"the file is the network in eval mode (within {worst:.3g}; rounding explains {allowed:.3g}); the "
                    f"network it is held against has '{training[0]}' in training mode and differs {by}; call .eval() "
                    "first"
                ),
            )
    if worst == 0.0:
        return Diagnosis(verdict="equal", sentence="the file and the network give the same bits on these rows")
    return Diagnosis(
        verdict="just noise",
        sentence=f"the file and the network differ by {worst:.3g}; rounding explains up to {allowed:.3g}",
    )


def _has_modes(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) or (isinstance(part, _DropoutNd) and part.p > 0)


def _output_names(module: nn.Module, model: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[str]:
    """The graph's outputs, which must be as many as the network's."""
    names = [value.name for value in model.graph.output]
    try:
        outputs = parity.torch_outputs(module, inputs)
    except Exception as error:  # the network's own code may raise anything
        raise Refused(f"the network fails on these rows: {first_line(error)}") from error
    constants = {tensor.name for tensor in model.graph.initializer}
    takes = [value.name for value in model.graph.input if value.name not in constants]
    for what, network, graph in (("outputs", len(outputs), len(names)), ("inputs", len(inputs), len(takes))):
        if network != graph:
            raise Refused(f"the network has {network} {what}, the ONNX model {graph}: they are not the same function")
    return names


# What would explain the difference


def _explanations(module: nn.Module, model: onnx.ModelProto) -> list[tuple[Verdict, nn.Module, str]]:
    """The network with what the file has in place of its own: eps alone, then the vectors as well."""
    norms = {path: part for path, part in module.named_modules() if isinstance(part, _BatchNorm)}
    nodes = _paired(list(norms), model) if len(norms) == len(_nodes(model)) else None
    if nodes is None:
        return []
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    other_eps, other_vectors = copy.deepcopy(module), copy.deepcopy(module)
    eps_said = vectors_said = initial_said = ""
    for path, node in zip(norms, nodes, strict=True):
        eps = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
        norm = norms[path]
        if np.float32(eps) != np.float32(norm.eps):
            eps_said = eps_said or f"layer '{path}' has eps {norm.eps:g} in the network and {eps:g} in the file"
            for changed in (other_eps, other_vectors):
                part = changed.get_submodule(path)
                assert isinstance(part, _BatchNorm)
                part.eps = float(eps)
        if name := _copy_vectors(node, other_vectors.get_submodule(path), constants):
            vectors_said = vectors_said or f"layer '{path}' has another {name} in the file than in the network"
        if _is_initial(node, constants) and not _is_initial_module(norm):
            initial_said = initial_said or f"layer '{path}' has mean 0 and variance 1 in the file: never trained"
    found: list[tuple[Verdict, nn.Module, str]] = []
    if eps_said:
        found.append(("eps differs", other_eps, eps_said))
    if initial_said:
        found.append(("statistics missing", other_vectors, initial_said))
    elif vectors_said:
        found.append(("statistics differ", other_vectors, vectors_said))
    return found


def _is_initial(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    mean_C, var_C = (constants.get(node.input[position]) for position in (3, 4))
    return mean_C is not None and var_C is not None and not mean_C.any() and bool((var_C == 1).all())


def _is_initial_module(norm: _BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return True
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


def _copy_vectors(node: onnx.NodeProto, norm: nn.Module, constants: Mapping[str, NDArray[Any]]) -> str | None:
    """Give a layer the vectors of a node; returns the first that was different."""
    different: str | None = None
    for position, name in _VECTORS.items():
        own = getattr(norm, name)
        theirs = constants.get(node.input[position])
        if own is None or theirs is None or theirs.shape != tuple(own.shape):
            continue
        theirs_C = torch.from_numpy(theirs.copy()).to(own.dtype)
        if not torch.equal(own.detach(), theirs_C):
            # running statistics are named before gamma and beta: they are the likelier fault
            different = name if different is None or name.startswith("running") else different
            with torch.no_grad():
                own.copy_(theirs_C)
    return different


# Taps


@final
class _Tapped(nn.Module):
    """A network whose BatchNorm outputs are outputs as well, in the order in which they were computed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.network = module
        self.calls: list[str] = []
        """The layers of the outputs, as of the last call."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        taken: list[tuple[str, Tensor]] = []
        hooks = [
            part.register_forward_hook(lambda _module, _args, output, path=path: taken.append((path, output)))
            for path, part in self.network.named_modules()
            if isinstance(part, _BatchNorm)
        ]
        try:
            outputs = flattened(self.network(*inputs))
        finally:
            for hook in hooks:
                hook.remove()
        self.calls = [path for path, _ in taken]
        return (*(tensor.clone() for _, tensor in taken), *outputs)


def _taps(tapped: _Tapped, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = tapped(*inputs)
    return [tensor.detach().cpu() for tensor in outputs[: len(tapped.calls)]]


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def _paired(layers: Sequence[str], model: onnx.ModelProto) -> list[onnx.NodeProto] | None:
    """The node of each layer: by the path that an exporter left, else one after the other; None if they do not pair."""
    nodes = _nodes(model)
    if len(nodes) != len(layers):
        return None
    by_path = {path: node for node in nodes if (path := _path(node))}
    if len(by_path) == len(nodes) and set(by_path) == set(layers):
        return [by_path[layer] for layer in layers]
    return nodes


def _path(node: onnx.NodeProto) -> str:
    notes = {entry.key: entry.value for entry in node.metadata_props}
    if LAYER_KEY in notes:
        return str(notes[LAYER_KEY])
    try:
        scopes = [scope for scope in ast.literal_eval(notes.get(_SCOPES_KEY, "[]")) if scope]
    except (SyntaxError, ValueError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""  # the last scope is the operator's


def _tapped_onnx(model: onnx.ModelProto, values: Sequence[str], inputs: Sequence[Tensor]) -> list[NDArray[Any]]:
    """What the graph computes under these names."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    known = {value.name for value in tapped.graph.output}
    floats = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    for value in values:
        if value not in known:
            dtype = floats.get(value) or _parameter_type(model, value)
            tapped.graph.output.append(onnx.helper.make_tensor_value_info(value, dtype, None))
    runtime = OnnxRuntime(tapped.SerializeToString(), place("cpu"), threads=1, optimisation="none")
    outputs = dict(
        zip(
            [spec.name for spec in runtime.outputs],
            runtime.run([tensor.detach().cpu().numpy() for tensor in inputs]),
            strict=True,
        )
    )
    return [outputs[value] for value in values]


def _parameter_type(model: onnx.ModelProto, value: str) -> int:
    """The type of a BatchNormalization's output is that of its scale in float32 networks."""
    node = next(node for node in _nodes(model) if node.output[0] == value)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return int(types.get(node.input[1], onnx.TensorProto.FLOAT))
