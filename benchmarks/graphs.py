"""Graphs of any size, by hand: what they compute does not matter, and how long it takes does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def dense(widths: Sequence[int]) -> onnx.ModelProto:
    """Gemm and ReLU; layers of the same shape share one weight."""
    generator = np.random.default_rng(1)
    shapes = sorted(set(itertools.pairwise(widths)))
    weights = {f"w{a}x{b}": generator.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32) for a, b in shapes}
    nodes, name = [], "x"
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        nodes += [
            helper.make_node("MatMul", [name, f"w{a}x{b}"], [f"h{layer}"]),
            helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]),
        ]
        name = f"r{layer}"
    nodes.append(helper.make_node("Identity", [name], ["y"]))
    return _model(nodes, ["batch", widths[0]], ["batch", widths[-1]], weights)


def pooled() -> onnx.ModelProto:
    """The mean of each channel: as little computing as an image allows."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    return _model(nodes, ["batch", 3, 224, 224], ["batch", 3], {})


def _model(
    nodes: Sequence[onnx.NodeProto],
    x: Sequence[str | int],
    y: Sequence[str | int],
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
