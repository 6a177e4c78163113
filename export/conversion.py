"""A PyTorch network in eval mode as an ONNX model, with its BatchNorm kept and frozen.

1. The network is refused unless all of it is in eval mode and every BatchNorm has running statistics to freeze. The
   usual exporters look at the root's `training` flag only, or ignore it, and say nothing of missing statistics.
2. The network is never touched: everything happens on a deep copy.
3. Every BatchNorm that the exporter translated is one BatchNormalization node, frozen, with the very numbers of its
   module. The exporter's own optimiser would fold them into their neighbours (`optimize=True`, its default), and what
   is folded cannot be audited; folding is done when the model is loaded.
4. The same network gives the same bytes, and none of them tells where it was made: stack traces go, the path of each
   node's module stays (`service.graph.scan.LAYER_KEY`).

What comes out is checked for all of this; a fault of the exporter is a refusal like a fault of the network.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from service.bundle import Extent, LayerSummary
from service.errors import Refused, first_line
from service.graph.scan import LAYER_KEY, scan

OPSET = 18
"""What the exporter's operators are written in: asking for another one sends the model through a version converter.
BatchNormalization has been the same since 15, and every runtime of the last years reads 18."""

BATCH_AXIS = "batch"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A network as ONNX, checked."""

    model: onnx.ModelProto
    layers: tuple[LayerSummary, ...]
    """The BatchNorm layers of the graph, in the order of the network's modules."""
    unused: tuple[str, ...]
    """BatchNorm layers that are not in the graph, because eval mode never calls them or nobody uses their output."""


def convert(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    wrapped: str = "",
) -> Converted:
    """Convert a network to ONNX.

    Args:
        module: in eval mode; not changed.
        inputs: sample rows for each argument of `forward`, with the batch axis first; not changed. Only their shapes
            beyond that axis and their dtypes matter.
        input_names, output_names: how the graph calls its inputs and its (flattened) outputs.
        wrapped: the path of the network proper inside `module`; layers are named from there.

    Raises:
        Refused: part of the network is in training mode, running statistics are missing or not usable, the network
            cannot be traced with a batch of any length, or the ONNX model is not what rule 3 promises.
    """
    parts = [(_short(path, wrapped), part) for path, part in module.named_modules()]
    norms = {path: part for path, part in parts if isinstance(part, _BatchNorm)}
    _require_eval(parts)
    _require_statistics(parts, norms)
    traced, program = _traced(module, inputs, input_names, output_names)
    paths = _layer_paths(module, wrapped)
    model = _tidied(program.model, paths)
    _require_batch_axes(model)
    used = _checked_layers(norms, model, _translated(traced, paths))
    return Converted(
        model=model,
        layers=tuple(summary(path, norm) for path, norm in used.items()),
        unused=tuple(path for path in norms if path not in used),
    )


def summary(path: str, norm: _BatchNorm) -> LayerSummary:
    """A BatchNorm layer in figures.

    Args:
        norm: with running statistics; not changed.
    """
    mean_C, var_C = _statistics(norm)
    count = None if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    return LayerSummary(
        layer=path,
        channels=norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        num_batches_tracked=count,
        affine=norm.affine,
        running_mean=_extent(mean_C),
        running_var=_extent(var_C),
        initial_weight=_initial_weight(norm.momentum, count),
    )


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """running_mean and running_var of a layer that passed `_require_statistics`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _extent(values_C: Tensor) -> Extent:
    return Extent(smallest=float(values_C.min()), largest=float(values_C.max()))


def _initial_weight(momentum: float | None, count: int | None) -> float | None:
    """The share of mean 0 and variance 1 in the running statistics; a cumulative average forgets them at once."""
    if count is None:
        return None
    if momentum is None:
        return 0.0 if count else 1.0
    return float((1 - momentum) ** count)


def _short(path: str, wrapped: str) -> str:
    return "" if path == wrapped else path.removeprefix(f"{wrapped}.")


# May we?


def _require_eval(parts: Sequence[tuple[str, nn.Module]]) -> None:
    training = [(path or "the network itself", part) for path, part in parts if part.training]
    if training:
        named = ", ".join(f"'{path}' ({type(part).__name__})" for path, part in training[:5])
        more = f" and {len(training) - 5} more" if len(training) > 5 else ""
        raise Refused(
            f"in training mode: {named}{more}; put the whole network in eval mode with .eval(), as the last thing "
            "before the export"
        )


def _require_statistics(parts: Sequence[tuple[str, nn.Module]], norms: Mapping[str, _BatchNorm]) -> None:
    for path, part in parts:
        if any(is_lazy(value) for value in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            raise Refused(f"layer '{path}' has no shape yet; load its weights, or run the network, before the export")
    for path, norm in norms.items():
        if norm.running_mean is None or norm.running_var is None:
            raise Refused(
                f"BatchNorm layer '{path}' has no running statistics (track_running_stats=False): in eval mode too it "
                "normalises with the statistics of each batch; give it statistics measured on training data"
            )
        for name, values_C in zip(("running_mean", "running_var"), _statistics(norm), strict=True):
            if not torch.isfinite(values_C).all():
                raise Refused(f"BatchNorm layer '{path}' has a {name} that is not finite; measure its statistics again")
        _, var_C = _statistics(norm)
        if float(var_C.min()) < 0:
            raise Refused(
                f"BatchNorm layer '{path}' has a negative running_var ({float(var_C.min()):g}); measure it again"
            )


# Do it


def _traced(
    module: nn.Module, inputs: Sequence[Tensor], input_names: Sequence[str], output_names: Sequence[str]
) -> tuple[torch.fx.Graph, torch.onnx.ONNXProgram]:
    """The graph of ATen operators that the exporter translated, and its translation."""
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                copy.deepcopy(module).cpu().requires_grad_(False),
                tuple(_two_rows(tensor) for tensor in inputs),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=_for_arguments(module, [{0: batch} for _ in inputs]),
                verbose=False,
            )
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        reason = first_line(_root(error))
        raise Refused(f"PyTorch cannot trace the network with a batch of any length: {reason}") from error
    assert program is not None
    assert program.exported_program is not None  # it is there with dynamo=True
    outputs = len(program.model.graph.outputs)
    if outputs != len(output_names):
        raise Refused(f"the network has {outputs} output(s); {len(output_names)} name(s) were given for them")
    return program.exported_program.graph, program


def _for_arguments(module: nn.Module, shapes: Sequence[dict[int, object]]) -> tuple[object, ...]:
    """One entry for each argument of `forward`; `*arguments` are one entry, a tuple of all that it takes."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:named], tuple(shapes[named:]))


def _two_rows(tensor: Tensor) -> Tensor:
    """At least two rows: recurrent and attention layers take an axis of one for a constant when they are traced."""
    tensor = tensor.detach().cpu()
    return tensor[:4].clone() if tensor.shape[0] >= 2 else torch.cat([tensor, tensor])


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's remarks on its own dependencies are not for whoever exports; what matters is checked here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root(error: BaseException) -> Exception:
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, Exception) else Exception(str(error))


def _layer_paths(module: nn.Module, wrapped: str) -> dict[str, str]:
    """For every path of every module the one to name it by: a module that is used twice has several."""
    first = {part: _short(path, wrapped) for path, part in module.named_modules()}
    return {path: first[part] for path, part in module.named_modules(remove_duplicate=False)}


def _translated(graph: torch.fx.Graph, paths: Mapping[str, str]) -> Counter[str]:
    """How often each layer's BatchNorm stands in what the exporter translated; dead code is no longer in it."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and "batch_norm" in str(node.target):
            scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            found[_layer(scopes, paths)] += 1
    return found


def _layer(scopes: Sequence[str], paths: Mapping[str, str]) -> str:
    """The innermost scope that is a module of the network; '' is the network itself."""
    return next((paths[scope] for scope in reversed(scopes) if scope in paths), "")


def _tidied(exported: onnx_ir.Model, paths: Mapping[str, str]) -> onnx.ModelProto:
    """The model with its constants computed, its nodes named for their modules and the exporter's notes gone.

    Constants are computed, and nothing else: for `affine=False` the exporter writes eight nodes that make gamma = 1 and
    beta = 0 from the shape of the input. Its rewrite rules would fold BatchNorm as well.
    """
    onnxscript.optimizer.fold_constants(exported)
    RemoveUnusedNodesPass()(exported)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(exported)
    RemoveUnusedOpsetsPass()(exported)
    model = onnx_ir.to_proto(exported)
    model.doc_string = model.graph.doc_string = ""
    for noted in (model, model.graph):
        del noted.metadata_props[:]
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer)
    for value in values:
        value.doc_string = ""
        del value.metadata_props[:]
    for graph in _graphs(model.graph):
        taken: Counter[str] = Counter()
        for node in graph.node:
            _name_for_its_layer(node, paths, taken)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its If, Loop and Scan nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _graphs(body)


def _name_for_its_layer(node: onnx.NodeProto, paths: Mapping[str, str], taken: Counter[str]) -> None:
    """Replace the exporter's notes on a node by the path of its module, and name it for that."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    layer = _layer(ast.literal_eval(notes.get(_SCOPES_KEY, "[]")), paths)
    name = f"{layer}/{node.op_type}" if layer else node.op_type
    taken[name] += 1
    node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
    node.doc_string = ""
    del node.metadata_props[:]
    if layer:
        node.metadata_props.add(key=LAYER_KEY, value=layer)


# Is it what was promised?


def _require_batch_axes(model: onnx.ModelProto) -> None:
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            axes = [axis.dim_param or str(axis.dim_value) for axis in value.type.tensor_type.shape.dim]
            if axes[:1] != [BATCH_AXIS]:
                raise Refused(
                    f"{kind} '{value.name}' has the shape [{', '.join(axes)}], which does not begin with a batch of "
                    "any length: the network's code fixes the number of rows, or does not give one row per sample"
                )


def _checked_layers(
    norms: Mapping[str, _BatchNorm], model: onnx.ModelProto, translated: Counter[str]
) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of the graph, each found there as often as it was called, with its own numbers."""
    onnx.checker.check_model(model, full_check=True)
    found = scan(model)
    if found.faults:
        raise Refused(f"the exported graph cannot be served: {found.faults[0]}{_more(found.faults)}")
    nodes = Counter(_layer_of(node) for node in _normalisations(model))
    if nodes != translated:
        layer = min(set((nodes - translated) + (translated - nodes)))
        raise Refused(
            f"BatchNorm layer '{layer}' runs {translated[layer]} time(s) in the network, but the exported graph has "
            f"{nodes[layer]} BatchNormalization node(s) for it: the exporter did not keep them"
        )
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    _claim(norms, model, constants)
    used = {_layer_of(node) for node in _normalisations(model)}
    layers = {path: norm for path, norm in norms.items() if path in used}
    for node in _normalisations(model):
        path = _layer_of(node)
        if path in layers and (wrong := _difference(node, layers[path], constants)):
            raise Refused(f"BatchNorm layer '{path}' has another {wrong} in the exported graph than in the network")
    return layers


def _claim(norms: Mapping[str, _BatchNorm], model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """Give a node that came from `nn.functional.batch_norm` to the layer whose statistics it was called with."""
    for node in _normalisations(model):
        if _layer_of(node) in norms or not {*node.input[3:5]} <= constants.keys():
            continue
        statistics = [constants[name].tobytes() for name in node.input[3:5]]
        owners = [
            path
            for path, norm in norms.items()
            if statistics == [vector_C.detach().cpu().numpy().tobytes() for vector_C in _statistics(norm)]
        ]
        if len(owners) == 1:
            del node.metadata_props[:]
            node.metadata_props.add(key=LAYER_KEY, value=owners[0])
            node.name = f"{owners[0]}/{node.op_type}"


def _normalisations(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from (node for graph in _graphs(model.graph) for node in graph.node if node.op_type == "BatchNormalization")


def _layer_of(node: onnx.NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == LAYER_KEY), "")


def _difference(node: onnx.NodeProto, norm: _BatchNorm, constants: Mapping[str, NDArray[Any]]) -> str | None:
    """The first of its vectors, or eps, in which a node is not its module, bit for bit."""
    mean_C, var_C = _statistics(norm)
    gamma_C, beta_C = (norm.weight, norm.bias) if norm.affine else (torch.ones_like(var_C), torch.zeros_like(var_C))
    wanted = {"gamma": gamma_C, "beta": beta_C, "running_mean": mean_C, "running_var": var_C}
    for tensor, (name, vector_C) in zip(node.input[1:], wanted.items(), strict=True):
        if constants[tensor].tobytes() != vector_C.detach().cpu().numpy().tobytes():
            return name
    eps = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
    return None if np.float32(eps) == np.float32(norm.eps) else "eps"


def _more(items: Sequence[object]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
