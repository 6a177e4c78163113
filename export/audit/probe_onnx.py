"""What a sample shows when an ONNX model runs: what reaches each BatchNormalization, and whether company matters.

The model runs as it is, without onnxruntime's rewriting, and with the inputs of its BatchNormalization nodes as outputs
beside its own. Nodes inside the bodies of If, Loop and Scan are not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import onnx
import onnx.inliner
import torch
from torch import Tensor, nn

from export.audit.facts import Observed, Seen
from export.audit.probe import Watched, company_of, padded_share, seen_of
from service.errors import Refused, first_line
from service.graph.scan import layer_of
from service.runtime import OnnxRuntime, place

_TOLERANCE = 1e-3
"""Of the largest output: float32 sums in another order; what mixes rows moves them by more."""


def probe_onnx(model: onnx.ModelProto, inputs: Sequence[Tensor]) -> Observed:
    """Run the model on rows.

    Args:
        model: with its weights inside; not changed.
        inputs: rows for each input of the graph, in its order; not changed.

    Raises:
        Refused: the model cannot be loaded, or fails on the rows.
    """
    flat = onnx.inliner.inline_local_functions(model) if model.functions else model
    nodes = [node for node in flat.graph.node if node.op_type == "BatchNormalization"]
    graph_inputs = {value.name for value in flat.graph.input}
    taps = [name for name in dict.fromkeys(node.input[0] for node in nodes) if name not in graph_inputs]
    try:
        graph = _Graph(_tapped(flat, taps), own_outputs=len(flat.graph.output))
        outputs = graph(*inputs)
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise Refused(f"the model fails on the sample: {first_line(error)}") from error
    given = dict(zip(graph.names, inputs, strict=True))
    reaching = {**given, **dict(zip(taps, graph.tapped, strict=True))}
    padded = max((padded_share(tensor) for tensor in inputs), default=0.0)
    seen = {
        layer_of(node): _seen(layer_of(node), reaching[node.input[0]], node.input[0] in given, padded) for node in nodes
    }
    return Observed(
        seen=tuple(found for found in seen.values() if found is not None),
        company=company_of(graph, inputs, outputs, _TOLERANCE),
    )


def _tapped(model: onnx.ModelProto, taps: Sequence[str]) -> onnx.ModelProto:
    """The model with these values as outputs behind its own."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    own = {value.name for value in model.graph.output}
    for name in taps:
        if name in own:  # an output may be given once only
            tapped.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}/tap"]))
        value = f"{name}/tap" if name in own else name
        tapped.graph.output.append(
            onnx.helper.make_tensor_value_info(value, types.get(name, onnx.TensorProto.FLOAT), None)
        )
    return tapped


@final
class _Graph(nn.Module):
    """An ONNX model, called like a network; what it computed at its taps is kept."""

    def __init__(self, model: onnx.ModelProto, *, own_outputs: int) -> None:
        super().__init__()
        self._runtime = OnnxRuntime(model.SerializeToString(), place("cpu"), threads=1, optimisation="none")
        self._own = own_outputs
        self.names = [spec.name for spec in self._runtime.inputs]
        self.tapped: list[Tensor] = []

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        if len(rows) != len(self.names):
            raise ValueError(f"it takes {len(self.names)} inputs, {len(rows)} were given")
        arrays = [row.numpy().astype(spec.dtype) for row, spec in zip(rows, self._runtime.inputs, strict=True)]
        outputs = [torch.from_numpy(output) for output in self._runtime.run(arrays)]
        self.tapped = outputs[self._own :]
        return tuple(outputs[: self._own])


def _seen(layer: str, x: Tensor, raw: bool, padded: float) -> Seen | None:
    if x.ndim < 2 or not x.numel() or not x.is_floating_point():
        return None
    x_NCS = x.double().reshape(x.shape[0], x.shape[1], -1)
    pivot_C = torch.nan_to_num(x_NCS.mean((0, 2)), posinf=0.0, neginf=0.0)
    away_NCS = x_NCS - pivot_C[:, None]
    watched = Watched(
        layer=layer,
        pivot_C=pivot_C,
        values_per_row=x_NCS.shape[2],
        raw=raw,
        sequence=x.ndim == 3,
        padded_share=padded_share(x) if x.ndim == 3 else 0.0,
        means_NC=[away_NCS.mean(2)],
        squares_NC=[away_NCS.square().mean(2)],
        weights_N=[torch.full((len(x_NCS),), float(x_NCS.shape[2]), dtype=torch.float64)],
    )
    return seen_of(watched, padded)
