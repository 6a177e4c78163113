"""Small ONNX models by hand, with numbers in which every term matters: eps beside the variance, means far from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 3
EPS = 0.03
MEAN = np.array([5.0, -3.0, 40.0], dtype=np.float32)
VAR = np.array([0.05, 0.02, 0.09], dtype=np.float32)
GAMMA = np.array([1.7, -0.6, 2.5], dtype=np.float32)
BETA = np.array([0.4, 3.0, -1.1], dtype=np.float32)


def batchnorm_answer(x: NDArray[Any]) -> NDArray[np.float64]:
    """What `batchnorm_model()` should answer, written apart from it.

    Args:
        x: float[batch, 3].
    """
    return GAMMA * (x.astype(np.float64) - MEAN) / np.sqrt(VAR.astype(np.float64) + EPS) + BETA


def batchnorm_model(
    *,
    training: bool = False,
    opset: int = 17,
    mean: NDArray[Any] = MEAN,
    var: NDArray[Any] = VAR,
    extra_outputs: Sequence[str] = (),
    name: str = "norm",
) -> onnx.ModelProto:
    """`y = BatchNormalization(x)` for x: float32[batch, 3]; frozen unless asked otherwise."""
    outputs = ["y", *extra_outputs]
    attributes: dict[str, Any] = {"epsilon": EPS}
    if training and opset >= 14:
        attributes["training_mode"] = 1
        outputs = outputs if extra_outputs else ["y", "mean_out", "var_out"]
    if opset <= 6:
        attributes["is_test"] = 0 if training else 1
    node = helper.make_node(
        "BatchNormalization", ["x", "gamma", "beta", "mean", "var"], outputs, name=name, **attributes
    )
    return model([node], {"gamma": GAMMA, "beta": BETA, "mean": mean, "var": var}, opset=opset)


def batch_statistics_model() -> onnx.ModelProto:
    """Looks frozen in every attribute, but mean and variance are computed from the batch: track_running_stats=False."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "centred"], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["var"], axes=[0], keepdims=0),
        helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["y"], epsilon=EPS, name="norm"),
    ]
    return model(nodes, {"gamma": GAMMA, "beta": BETA})


def mixing_model() -> onnx.ModelProto:
    """No BatchNormalization at all, and yet it mixes rows: y = x - mean of the batch."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    return model(nodes, {})


def size_model() -> onnx.ModelProto:
    """Does not look at the neighbours, but at how many there are: y = x * (1 + rows)."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        helper.make_node("Cast", ["shape"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "rows"], ["scaled"]),
        helper.make_node("Add", ["x", "scaled"], ["y"]),
    ]
    return model(nodes, {})


def random_model() -> onnx.ModelProto:
    """Adds noise to every answer."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["y"]),
    ]
    return model(nodes, {})


def dropout_model(*, training: bool) -> onnx.ModelProto:
    """A Dropout whose third input says which mode it is in."""
    node = helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")
    constants = {"ratio": np.array(0.5, dtype=np.float32), "training": np.array(training)}
    return model([node], constants)


def embedding_model() -> onnx.ModelProto:
    """An embedding, y = table[x]; an index outside it is the caller's mistake. x: int64[batch, 1], y: [batch, 1, 3]."""
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    return model([node], {"table": table}, x=(TensorProto.INT64, ["batch", 1]), y=["batch", 1, 3])


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
    *,
    opset: int = 17,
    x: tuple[int, Sequence[Any]] = (TensorProto.FLOAT, ["batch", CHANNELS]),
    y: Sequence[Any] = ("batch", CHANNELS),
) -> onnx.ModelProto:
    """A model with the input `x` and the output `y: float32`."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", x[0], list(x[1]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(y))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
