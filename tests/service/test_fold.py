"""A folded model computes what it computed before, each refusal has a sentence, and nothing else is touched.

Numbers in which every term matters: eps beside the variance, gamma and means far from 1 and 0 but at most 14 standard
deviations away, no two axes equal, and no attribute at its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.graph.fold import MOST_ROUNDING, Fold, Folded, fold
from service.graph.scan import LAYER_KEY
from service.runtime import OnnxRuntime, place
from tests import graphs
from tests.graphs import EPS

Array = NDArray[Any]
VECTORS = ("gamma", "beta", "mean", "var")
Constants = dict[str, Array]
node = helper.make_node


def numbers(*shape: int, dtype: Any = np.float32) -> Array:
    """Between 0.2 and 1, of either sign, and always the same for a shape."""
    generator = np.random.default_rng([7, *shape])
    signs = generator.choice([-1, 1], shape)
    return np.asarray(signs * generator.uniform(0.2, 1, shape), dtype=dtype)


def statistics(channels: int, name: str = "norm", dtype: Any = np.float32) -> Constants:
    """The vectors of a BatchNormalization: gamma in 1.5 to 2.5, mean in 2 to 3, var in 0.02 to 0.09, all unequal."""
    generator = np.random.default_rng([11, channels, *name.encode()])
    signs = generator.choice([-1, 1], (3, channels))
    vectors = {
        "gamma": signs[0] * generator.uniform(1.5, 2.5, channels),
        "beta": signs[1] * generator.uniform(1, 3, channels),
        "mean": signs[2] * generator.uniform(2, 3, channels),
        "var": generator.uniform(0.02, 0.09, channels),
    }
    return {f"{name}.{what}": np.asarray(values, dtype=dtype) for what, values in vectors.items()}


def vectors(channels: int) -> list[NDArray[np.float64]]:
    """gamma, beta, mean and var of `norm`."""
    return [values.astype(np.float64) for values in statistics(channels).values()]


def batchnorm(x: str, y: str, name: str = "norm", **attributes: Any) -> onnx.NodeProto:
    inputs = [x, *(f"{name}.{what}" for what in VECTORS)]
    return node("BatchNormalization", inputs, [y], name, epsilon=EPS, **attributes)


def answers(model: onnx.ModelProto, x: Array) -> Array:
    """Of the graph as it stands: onnxruntime would fold some of it by itself."""
    return OnnxRuntime(model.SerializeToString(), place("cpu"), threads=1, optimisation="none").run([x])[0]


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def constants_of(model: onnx.ModelProto) -> Constants:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def folded(model: onnx.ModelProto) -> Folded:
    """The model folded; what comes out is valid, and what went in is as it was."""
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    result = fold(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model, full_check=True)
    return result


def assert_same(model: onnx.ModelProto, result: onnx.ModelProto, x: Array) -> None:
    """Up to rounding: some dozen sums and products of float32, of numbers some ten times as large as the answers.

    Whoever forgets eps, the term closest to nothing, is off by a fifth.
    """
    want, got = answers(model, x), answers(result, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=500 * 2**-24 * np.abs(want).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A graph around one BatchNormalization called `norm`, and what becomes of it."""

    nodes: Sequence[onnx.NodeProto]
    constants: Constants
    x: Sequence[int]
    left: str
    """The operators of the folded graph."""
    side: Literal["before", "after"] = "before"
    opset: int = 17
    batch: Literal["any", "fixed"] = "any"

    def model(self) -> onnx.ModelProto:
        x = (TensorProto.FLOAT, [self.x[0] if self.batch == "fixed" else "batch", *self.x[1:]])
        y = [None] * (2 if {"Gemm", "MatMul"} & set(self.left.split()) else len(self.x))
        return graphs.model(self.nodes, self.constants, opset=self.opset, x=x, y=y)

    def sample(self) -> Array:
        return 2 + numbers(*self.x)


def before(
    operator: str,
    x: Sequence[int],
    weight: Sequence[int],
    channels: int,
    *,
    bias: Sequence[int] | None = None,
    **attributes: Any,
) -> Case:
    """A layer with its own bias, then BatchNormalization."""
    constants = {"weight": numbers(*weight), **statistics(channels)}
    inputs = ["x", "weight"]
    if bias is not None:
        constants["bias"] = 3 * numbers(*bias)
        inputs.append("bias")
    layer = node(operator, inputs, ["h"], "layer", **attributes)
    return Case(nodes=[layer, batchnorm("h", "y")], constants=constants, x=x, left=operator)


def after(
    operator: str,
    x: Sequence[int],
    weight: Sequence[int],
    channels: int,
    *,
    bias: Sequence[int] | None = None,
    **attributes: Any,
) -> Case:
    """BatchNormalization behind an activation, then a layer with its own bias."""
    case = before(operator, x, weight, channels, bias=bias, **attributes)
    layer = node(operator, ["n", *case.nodes[0].input[1:]], ["y"], "layer", **attributes)
    nodes = [node("LeakyRelu", ["x"], ["h"], "activation", alpha=0.3), batchnorm("h", "n"), layer]
    return Case(nodes=nodes, constants=case.constants, x=x, left=f"LeakyRelu {operator}", side="after")


def with_add(*, bias: Sequence[int], side: Literal["before", "after"], bias_first: bool = False) -> Case:
    """MatMul and Add around BatchNormalization."""
    channels = 4 if side == "before" else 5
    constants = {"weight": numbers(5, 4), "bias": 3 * numbers(*bias), **statistics(channels)}

    def matmul_and_add(x: str, y: str) -> list[onnx.NodeProto]:
        summands = ["bias", "product"] if bias_first else ["product", "bias"]
        return [node("MatMul", [x, "weight"], ["product"], "layer"), node("Add", summands, [y], "add")]

    nodes = (
        [*matmul_and_add("x", "h"), batchnorm("h", "y")]
        if side == "before"
        else [batchnorm("x", "n"), *matmul_and_add("n", "y")]
    )
    return Case(nodes=nodes, constants=constants, x=[7, 5], left="MatMul Add", side=side)


def between(
    *nodes: onnx.NodeProto, x: Sequence[int], width: int, left: str, constants: Constants | None = None
) -> Case:
    """BatchNormalization, then nodes from `n` to `f`, then a Gemm with `width` inputs."""
    last = node("Gemm", ["f", "weight", "bias"], ["y"], "layer", transB=1, alpha=0.7, beta=1.3)
    weights = {"weight": numbers(3, width), "bias": numbers(3), **statistics(x[1]), **(constants or {})}
    return Case(nodes=[batchnorm("x", "n"), *nodes, last], constants=weights, x=x, left=left, side="after")


CASES: Mapping[str, Case] = {
    "conv 1-D": before("Conv", [2, 3, 11], [4, 3, 5], 4, pads=[1, 2], strides=[2]),
    "conv 2-D with bias": before("Conv", [2, 3, 9, 8], [5, 3, 4, 2], 5, bias=[5], pads=[1, 0, 2, 1], dilations=[2, 3]),
    "conv 3-D": before("Conv", [2, 3, 5, 6, 7], [4, 3, 2, 3, 1], 4, bias=[4], pads=[1, 0, 2, 1, 3, 0]),
    "conv with groups": before("Conv", [2, 6, 9], [4, 3, 5], 4, bias=[4], group=2),
    "conv by depth": before("Conv", [2, 3, 9, 7], [6, 1, 4, 2], 6, group=3, auto_pad="SAME_UPPER"),
    "transposed conv 1-D": before("ConvTranspose", [2, 3, 7], [3, 4, 5], 4, bias=[4], strides=[2], pads=[1, 2]),
    "transposed conv 2-D with groups": before(
        "ConvTranspose", [2, 6, 5, 4], [6, 2, 3, 5], 4, group=2, strides=[2, 3], output_padding=[1, 2]
    ),
    "transposed conv 2-D with 3 groups and bias": before(
        "ConvTranspose", [2, 6, 5, 4], [6, 4, 3, 5], 12, bias=[12], group=3, strides=[2, 3], pads=[1, 0, 0, 1]
    ),
    "transposed conv 3-D": before("ConvTranspose", [2, 3, 4, 5, 6], [3, 4, 1, 2, 3], 4, strides=[2, 1, 3]),
    "gemm": before("Gemm", [7, 5], [5, 4], 4, alpha=0.7),
    "gemm, weights transposed": before("Gemm", [7, 5], [4, 5], 4, bias=[4], transB=1, alpha=0.7, beta=1.3),
    "gemm with a scalar bias": before("Gemm", [7, 5], [5, 4], 4, bias=[], alpha=0.7, beta=1.3),
    "gemm with a bias of one": before("Gemm", [7, 5], [5, 4], 4, bias=[1], beta=1.3),
    "gemm with a row as bias": before("Gemm", [7, 5], [5, 4], 4, bias=[1, 4], beta=1.3),
    "gemm with a bias for each row": before("Gemm", [7, 5], [5, 4], 4, bias=[7, 1], beta=1.3),
    "gemm whose bias counts nothing": before("Gemm", [7, 5], [5, 4], 4, bias=[4], beta=0.0),
    "gemm, input transposed": before("Gemm", [5, 7], [4, 5], 4, bias=[4], transA=1, transB=1, beta=1.3),
    "matmul": replace(before("MatMul", [7, 5], [5, 4], 4), left="MatMul Add"),
    "matmul and add": with_add(bias=[4], side="before"),
    "matmul and add, bias first": with_add(bias=[1, 4], side="before", bias_first=True),
    "matmul and add a scalar": with_add(bias=[], side="before"),
    "after conv 1-D": after("Conv", [2, 3, 11], [4, 3, 5], 3, strides=[2]),
    "after conv 2-D with bias": after("Conv", [2, 3, 9, 8], [5, 3, 4, 2], 3, bias=[5], dilations=[2, 3]),
    "after conv 3-D": after("Conv", [2, 3, 5, 6, 7], [4, 3, 2, 3, 1], 3, bias=[4], auto_pad="VALID"),
    "after conv with groups": after("Conv", [2, 6, 9], [4, 3, 5], 6, bias=[4], group=2),
    "after conv by depth": after("Conv", [2, 3, 9, 7], [6, 1, 4, 2], 3, group=3, pads=[0, 0, 0, 0]),
    "after gemm": after("Gemm", [7, 5], [5, 4], 5, alpha=0.7),
    "after gemm, weights transposed": after("Gemm", [7, 5], [4, 5], 5, bias=[4], transB=1, alpha=0.7, beta=1.3),
    "after gemm with a scalar bias": after("Gemm", [7, 5], [5, 4], 5, bias=[], alpha=0.7, beta=1.3),
    "after gemm with a bias for each row": after("Gemm", [7, 5], [5, 4], 5, bias=[7, 1], alpha=0.7, beta=1.3),
    "after matmul": replace(after("MatMul", [7, 5], [5, 4], 5), left="LeakyRelu MatMul Add"),
    "after matmul and add": with_add(bias=[4], side="after"),
    "after matmul and add, bias first": with_add(bias=[1, 4], side="after", bias_first=True),
    "after matmul and add a scalar": with_add(bias=[], side="after"),
    "through identity and dropout to the layer before": Case(
        nodes=[
            node("Gemm", ["x", "weight"], ["h"], "layer", alpha=0.7),
            node("Identity", ["h"], ["i"]),
            node("Dropout", ["i", "ratio", "training"], ["d"]),
            batchnorm("d", "y"),
        ],
        constants={
            "weight": numbers(5, 4),
            "ratio": np.array(0.4, np.float32),
            "training": np.array(False),
            **statistics(4),
        },
        x=[7, 5],
        left="Gemm Identity Dropout",
    ),
    "through identity and dropout to the layer after": between(
        node("Identity", ["n"], ["i"]), node("Dropout", ["i"], ["f"]), x=[7, 5], width=5, left="Identity Dropout Gemm"
    ),
    "through flatten": between(node("Flatten", ["n"], ["f"], axis=-3), x=[2, 3, 4, 5], width=60, left="Flatten Gemm"),
    "through flatten of two axes": between(
        node("Flatten", ["n"], ["f"], axis=1), x=[7, 5], width=5, left="Flatten Gemm"
    ),
    "through reshape to [-1, features]": between(
        node("Reshape", ["n", "shape"], ["f"]),
        x=[2, 3, 4, 5],
        width=60,
        left="Reshape Gemm",
        constants={"shape": np.array([-1, 60])},
    ),
    "through reshape to [0, -1]": between(
        node("Reshape", ["n", "shape"], ["f"]),
        x=[2, 3, 4, 5],
        width=60,
        left="Reshape Gemm",
        constants={"shape": np.array([0, -1])},
    ),
    "through reshape to [2, -1] of a batch of 2": replace(
        between(
            node("Reshape", ["n", "shape"], ["f"]),
            x=[2, 3, 4, 5],
            width=60,
            left="Reshape Gemm",
            constants={"shape": np.array([2, -1])},
        ),
        batch="fixed",
    ),
    "through concat": between(
        node("Sin", ["x"], ["a"]),
        node("Gemm", ["x", "other"], ["b"]),
        node("Concat", ["a", "n", "b"], ["f"], axis=-1),
        x=[7, 5],
        width=14,
        left="Sin Gemm Concat Gemm",
        constants={"other": numbers(5, 4)},
    ),
    "through concat to a conv": Case(
        nodes=[
            node("Sin", ["x"], ["s"]),
            batchnorm("x", "n"),
            node("Concat", ["s", "n"], ["f"], axis=1),
            node("Conv", ["f", "weight"], ["y"], "layer", strides=[2]),
        ],
        constants={"weight": numbers(4, 6, 5), **statistics(3)},
        x=[2, 3, 11],
        left="Sin Concat Conv",
        side="after",
    ),
    "the oldest opset": replace(before("Conv", [2, 3, 11], [4, 3, 5], 4, bias=[4], strides=[2]), opset=7),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folded_layer_computes_what_two_did(name: str) -> None:
    """The node is gone, the operators of the layers are as they were, and so is every answer."""
    case = CASES[name]
    model = case.model()
    result = folded(model)
    assert result.folds == (Fold(layer="norm", into="layer", side=case.side, kept_because=None),)
    assert operators(result.model) == case.left.split()
    assert_same(model, result.model, case.sample())
    assert not any("norm" in name for name in constants_of(result.model)), "left behind"


def test_before_as_written_in_the_textbook() -> None:
    """The same numbers from NumPy in float64, apart from any engine."""
    case = CASES["gemm, weights transposed"]
    gamma, beta, mean, var = vectors(4)
    x = case.sample()
    h = 0.7 * x.astype(np.float64) @ case.constants["weight"].T + 1.3 * case.constants["bias"]
    want = gamma * (h - mean) / np.sqrt(var + EPS) + beta
    got = answers(fold(case.model()).model, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=100 * 2**-24 * np.abs(want).max())


def test_after_as_written_in_the_textbook() -> None:
    """The same numbers from NumPy in float64, apart from any engine."""
    case = CASES["after gemm, weights transposed"]
    gamma, beta, mean, var = vectors(5)
    x = case.sample().astype(np.float64)
    n = gamma * (np.where(x < 0, 0.3 * x, x) - mean) / np.sqrt(var + EPS) + beta
    want = 0.7 * n @ case.constants["weight"].T + 1.3 * case.constants["bias"]
    got = answers(fold(case.model()).model, case.sample())
    np.testing.assert_allclose(got, want, rtol=0, atol=100 * 2**-24 * np.abs(want).max())


# What is kept, and why


def kept(model: onnx.ModelProto, layer: str = "norm") -> str:
    """The reason; a model in which nothing was folded comes out as it went in."""
    result = folded(model)
    (reason,) = (entry.kept_because for entry in result.folds if entry.layer == layer)
    assert reason is not None
    if all(entry.into is None for entry in result.folds):
        assert result.model == model
    return reason


def dense(
    *nodes: onnx.NodeProto, constants: Constants | None = None, x: Sequence[Any] = ("batch", 4), y: int = 2
) -> onnx.ModelProto:
    """Nodes from `x` to `y` with a `weight` of 4 by 4, a `bias`, and the statistics of `norm` for 4 channels."""
    weights = {"weight": numbers(4, 4), "bias": numbers(4), **statistics(4)}
    return graphs.model(nodes, {**weights, **(constants or {})}, x=(TensorProto.FLOAT, x), y=[None] * y)


def gemm(x: str, y: str, weight: str = "weight", **attributes: Any) -> onnx.NodeProto:
    return node("Gemm", [x, weight, "bias"], [y], "layer", transB=1, **attributes)


def with_output(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in names)
    return model


def with_input(model: onnx.ModelProto, name: str, *shape: int) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return model


def without(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """With inputs of the graph in the place of these constants."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    for tensor in model.graph.initializer:
        if tensor.name in names:
            with_input(model, tensor.name, *tensor.dims)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def inside_an_if() -> onnx.ModelProto:
    def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["batch", 4])
        return helper.make_graph(list(nodes), "body", [], [output])

    then = body(gemm("x", "h"), batchnorm("h", "z"))
    other = body(node("Identity", ["x"], ["w"]))
    branch = node("If", ["condition"], ["y"], "choice", then_branch=then, else_branch=other)
    return dense(branch, constants={"condition": np.array(True)})


def old_opset() -> onnx.ModelProto:
    case = before("Conv", [2, 3, 11], [4, 3, 5], 4, strides=[2])
    case.nodes[1].attribute.append(helper.make_attribute("is_test", 1))
    return replace(case, opset=6).model()


def by_position() -> onnx.ModelProto:
    """Statistics for each channel and position: attribute spatial of opset 7."""
    case = before("Gemm", [7, 5], [5, 4], 4, bias=[4], beta=1.3)
    case.nodes[1].attribute.append(helper.make_attribute("spatial", 0))
    return replace(case, opset=7).model()


def in_float16(
    factor: float, *, of: str, side: Literal["before", "after"] = "before", means: float = 1
) -> onnx.ModelProto:
    """A layer of float16 beside BatchNormalization, one of whose four channels is `factor` times as large."""
    values = {"weight": numbers(4, 4), "bias": numbers(4), **statistics(4)}
    values[f"norm.{of}"][1] *= factor
    values["norm.mean"] *= means
    nodes = [gemm("x", "h"), batchnorm("h", "y")] if side == "before" else [batchnorm("x", "n"), gemm("n", "y")]
    model = graphs.model(
        nodes,
        {name: value.astype(np.float16) for name, value in values.items()},
        x=(TensorProto.FLOAT16, ["batch", 4]),
        y=["batch", 4],
    )
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def in_bfloat16() -> onnx.ModelProto:
    model = dense(gemm("x", "h"), batchnorm("h", "y"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).ravel().tolist()
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, list(tensor.dims), values))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def padded(**attributes: Any) -> onnx.ModelProto:
    return after("Conv", [2, 3, 11], [4, 3, 5], 3, **attributes).model()


def with_means_at(deviations: float) -> onnx.ModelProto:
    """BatchNormalization, then Gemm; the third channel's mean is so many standard deviations from 0."""
    _, _, mean, var = vectors(4)
    mean[2] = -deviations * np.sqrt(var[2] + EPS)
    return dense(batchnorm("x", "n"), gemm("n", "y"), constants={"norm.mean": mean.astype(np.float32)})


def flattened(
    operator: str, inputs: Sequence[str], *, x: Sequence[Any], shape: Sequence[int], **more: Any
) -> onnx.ModelProto:
    middle = node(operator, inputs, ["f"], "middle", **more)
    constants = {"wide": numbers(24, 2), **({"shape": np.array(shape)} if operator == "Reshape" else {})}
    last = node("Gemm", ["f", "wide"], ["y"], "layer")
    return dense(batchnorm("x", "n"), middle, last, x=x, constants=constants)


def negative_variance() -> onnx.ModelProto:
    return dense(
        gemm("x", "h"), batchnorm("h", "y"), constants={"norm.var": np.array([0.1, -0.2, 0.3, 0.4], np.float32)}
    )


RELU = node("Relu", ["x"], ["h"], "activation")
SIN = node("Sin", ["n"], ["y"], "wave")

KEPT: Mapping[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    # of the node itself
    "not frozen": (
        lambda: dense(
            gemm("x", "h"),
            node("BatchNormalization", [*batchnorm("h", "y").input], ["y", "m", "v"], "norm", training_mode=1),
        ),
        "it is not frozen: it is in training mode (training_mode=1)",
    ),
    "statistics not usable": (negative_variance, "it is not frozen: it has a negative running_var (-0.2)"),
    "statistics of the batch": (
        graphs.batch_statistics_model,
        "the graph computes it, so an answer depends on the batch; it has no constant running_var: ",
    ),
    "in a body": (inside_an_if, "it sits in the body of If 'choice'"),
    "operators of before opset 7": (old_opset, "the file is of opset 6"),
    "statistics by position": (by_position, "it has statistics for each position (spatial=0)"),
    "gamma is given": (
        lambda: without(dense(gemm("x", "h"), batchnorm("h", "y")), "norm.gamma"),
        "its gamma is not a constant of the graph",
    ),
    "beta can be given": (
        lambda: with_input(dense(gemm("x", "h"), batchnorm("h", "y")), "norm.beta", 4),
        "its beta is not a constant of the graph",
    ),
    "no number left": (
        lambda: dense(
            gemm("x", "h"), batchnorm("h", "y"), constants={"norm.gamma": np.array([1, np.inf, 2, 3], np.float32)}
        ),
        "gamma / sqrt(var + eps) or beta is not finite",
    ),
    # of the layer before
    "nothing before": (lambda: dense(batchnorm("x", "n"), SIN), "before it, there is no layer; "),
    "no layer before": (
        lambda: dense(RELU, batchnorm("h", "n"), SIN),
        "before it, Relu 'activation' has no weights to take it up; after it, Sin 'wave' has no weights to take it up",
    ),
    "the layer before is used twice": (
        lambda: dense(gemm("x", "h"), batchnorm("h", "n"), node("Add", ["h", "n"], ["y"], "sum")),
        "before it, the output of Gemm 'layer' is used 2 times; ",
    ),
    "the layer before is an output": (
        lambda: with_output(dense(gemm("x", "h"), batchnorm("h", "y")), "h"),
        "before it, the output of Gemm 'layer' is an output of the graph; ",
    ),
    "weight is given": (
        lambda: without(dense(gemm("x", "h"), batchnorm("h", "y")), "weight"),
        "before it, the weight of Gemm 'layer' is not a constant of the graph",
    ),
    "bias is given": (
        lambda: without(dense(gemm("x", "h"), batchnorm("h", "y")), "bias"),
        "before it, the bias of Gemm 'layer' is not a constant of the graph",
    ),
    "weights of another type": (in_bfloat16, "before it, the weight of Gemm 'layer' is of type BFLOAT16"),
    "three axes": (
        lambda: dense(node("MatMul", ["x", "weight"], ["h"], "layer"), batchnorm("h", "y"), x=("batch", 4, 4), y=3),
        "before it, the output of MatMul 'layer' is not known to have two axes",
    ),
    "a product of many matrices": (
        lambda: dense(
            node("MatMul", ["x", "many"], ["h"], "layer"),
            batchnorm("h", "y"),
            x=(3, 7, 5),
            y=3,
            constants={"many": numbers(3, 5, 4), **statistics(7)},
        ),
        "before it, the weight of MatMul 'layer' has the shape [3, 5, 4]",
    ),
    "a bias that widens": (
        lambda: dense(
            node("MatMul", ["x", "thin"], ["p"], "layer"),
            node("Add", ["p", "bias"], ["h"]),
            batchnorm("h", "y"),
            constants={"thin": numbers(4, 1)},
        ),
        "before it, MatMul 'layer' has 1 outputs for 4 channels",
    ),
    "weights too large": (lambda: in_float16(2e4, of="gamma"), "would not be finite: float16 ends at 6.55e+04"),
    "bias too large": (lambda: in_float16(1e4, of="mean"), "would not be finite: float16 ends at 6.55e+04"),
    "weights too small": (
        lambda: in_float16(1e-6, of="gamma"),
        "would fall below 6.1e-05, the smallest normal float16",
    ),
    "weights too large, after": (
        lambda: in_float16(2e4, of="gamma", side="after", means=0),
        "after it, the weights of Gemm 'layer' would not be finite: float16 ends at 6.55e+04",
    ),
    "weights too small, after": (
        lambda: in_float16(1e-6, of="gamma", side="after"),
        "after it, the weights of Gemm 'layer' would fall below 6.1e-05, the smallest normal float16",
    ),
    # of the layer after
    "nothing after": (lambda: dense(RELU, batchnorm("h", "y")), "after it, its output is an output of the graph"),
    "an output before the layer after": (
        lambda: with_output(dense(batchnorm("x", "n"), gemm("n", "y")), "n"),
        "after it, its output is an output of the graph",
    ),
    "two layers after": (
        lambda: dense(batchnorm("x", "n"), gemm("n", "a"), gemm("n", "b"), node("Add", ["a", "b"], ["y"])),
        "after it, its output is used 2 times",
    ),
    "nobody after": (
        lambda: dense(RELU, batchnorm("h", "n"), node("Sin", ["h"], ["y"])),
        "after it, its output is used by nothing",
    ),
    "handed on twice": (
        lambda: dense(
            batchnorm("x", "n"), node("Identity", ["n"], ["i"], "hand"), gemm("i", "a"), node("Add", ["i", "a"], ["y"])
        ),
        "after it, the output of Identity 'hand' is used 2 times",
    ),
    "padding": (lambda: padded(pads=[0, 2]), "after it, Conv 'layer' pads its input with zeros"),
    "automatic padding": (lambda: padded(auto_pad="SAME_LOWER"), "after it, Conv 'layer' pads its input with zeros"),
    "a transposed convolution": (
        lambda: after("ConvTranspose", [2, 3, 7], [3, 4, 5], 3, strides=[2]).model(),
        "after it, ConvTranspose 'layer' adds up fewer products at its borders than inside",
    ),
    "a transposed input": (
        lambda: dense(
            batchnorm("x", "n"),
            node("Gemm", ["n", "wide"], ["y"], "layer", transA=1),
            x=(3, 4),
            constants={"wide": numbers(3, 2)},
        ),
        "after it, Gemm 'layer' transposes its input",
    ),
    "a right operand": (
        lambda: dense(batchnorm("x", "n"), node("MatMul", ["weight", "n"], ["y"], "layer"), x=(4, 4)),
        "after it, the weight of MatMul 'layer' is not a constant of the graph",
    ),
    "a bias": (
        lambda: dense(batchnorm("x", "n"), node("Gemm", ["weight", "weight", "n"], ["y"], "layer"), x=(4, 4)),
        "after it, the bias of Gemm 'layer' is not a constant of the graph",
    ),
    "channels on another axis": (
        lambda: dense(batchnorm("x", "n"), node("MatMul", ["n", "weight"], ["y"], "layer"), x=("batch", 4, 4), y=3),
        "after it, MatMul 'layer' takes an input that is not known to have two axes",
    ),
    "rounding": (
        lambda: with_means_at(MOST_ROUNDING - 0.9),
        "after it, rounding would grow 16.1 times: channel 2 has mean -",
    ),
    "Dropout that drops": (
        lambda: dense(
            batchnorm("x", "n"),
            node("Dropout", ["n", "", "training"], ["d"], "drop"),
            gemm("d", "y"),
            constants={"training": np.array(True)},
        ),
        "after it, Dropout 'drop' has no weights to take it up",
    ),
    "positions not known": (
        lambda: flattened("Flatten", ["n"], x=["batch", 4, None], shape=[], axis=1),
        "after it, Flatten 'middle' is not known to put each channel's positions side by side",
    ),
    "flattened elsewhere": (
        lambda: flattened("Flatten", ["n"], x=[2, 4, 24], shape=[], axis=2),
        "after it, Flatten 'middle' is not known to put",
    ),
    "reshaped otherwise": (
        lambda: flattened("Reshape", ["n", "shape"], x=[3, 4, 8], shape=[-1, 24]),
        "after it, Reshape 'middle' is not known to put",
    ),
    "reshaped into other rows": (
        lambda: flattened("Reshape", ["n", "shape"], x=[3, 4, 8], shape=[4, -1]),
        "after it, Reshape 'middle' is not known to put",
    ),
    "widths not known": (
        lambda: dense(
            node("NonZero", ["x"], ["pairs"]),
            node("Cast", ["pairs"], ["a"], to=TensorProto.FLOAT),
            batchnorm("x", "n"),
            node("Concat", ["a", "n"], ["f"], "side", axis=1),
            node("MatMul", ["f", "weight"], ["y"], "layer"),
            x=(2, 4),
        ),
        "after it, Concat 'side' is not known to put channels of known number side by side",
    ),
    "one below the other": (
        lambda: dense(
            batchnorm("x", "n"),
            node("Concat", ["x", "n"], ["f"], "side", axis=0),
            node("MatMul", ["f", "weight"], ["y"]),
        ),
        "after it, Concat 'side' is not known to put channels of known number side by side",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_says_why(name: str) -> None:
    build, sentence = KEPT[name]
    assert sentence in kept(build())


@pytest.mark.parametrize(
    ("nodes", "constants", "sentence"),
    [
        (
            [gemm("x", "h"), batchnorm("h", "y")],
            {"norm.beta": numbers(5)},
            "its vectors differ in length: [4], [5], [4], [4]",
        ),
        ([gemm("x", "h"), batchnorm("h", "y")], statistics(5), "Gemm 'layer' has 4 outputs for 5 channels"),
        ([batchnorm("x", "n"), gemm("n", "y")], statistics(5), "Gemm 'layer' has 4 inputs for 5 channels"),
        ([node("Conv", ["x", "odd"], ["h"], "layer", group=2), batchnorm("h", "y")], {}, "has the shape [3, 1, 1]"),
    ],
)
def test_what_cannot_be_run_is_kept(nodes: Sequence[onnx.NodeProto], constants: Constants, sentence: str) -> None:
    """Lengths that do not fit each other are for the engine to refuse; here they stop nothing."""
    result = fold(dense(*nodes, constants={**constants, "odd": numbers(3, 1, 1)}, x=(None, None)))
    assert sentence in str(result.folds[0].kept_because)


def test_means_are_folded_up_to_the_limit() -> None:
    """1 + |mean| / std just below it."""
    model = with_means_at(MOST_ROUNDING - 1.1)
    result = folded(model)
    assert result.folds[0].side == "after"
    assert_same(model, result.model, 2 + numbers(7, 4))


def test_one_small_weight_is_no_reason() -> None:
    """Below the smallest normal float16 it is rounded no more than its neighbours are."""
    model = in_float16(1, of="gamma")
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight).copy()
    values[1, 2] = 7e-5
    weight.CopyFrom(numpy_helper.from_array(values, "weight"))
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full(4, 0.2, np.float16), "norm.gamma"))
    result = folded(model)
    assert result.folds[0].into == "layer"
    assert 0 < np.abs(constants_of(result.model)["weight.folded"]).min() < np.finfo(np.float16).tiny


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float16, 2**-11), (np.float32, 2**-24), (np.float64, 2**-50)])
def test_weights_are_rounded_once(dtype: Any, rtol: float) -> None:
    """To their own dtype, and computed in float64, however many nodes went into them."""
    values = {"weight": numbers(5, 4), "bias": numbers(4), **statistics(4), **statistics(4, "second")}
    values = {name: value.astype(dtype) for name, value in values.items()}
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        node("Gemm", ["x", "weight", "bias"], ["h"], alpha=0.7),
        batchnorm("h", "i"),
        batchnorm("i", "y", "second"),
    ]
    model = graphs.model(nodes, values, x=(element, [None, 5]), y=[None, 4])
    model.graph.output[0].type.tensor_type.elem_type = element
    got = constants_of(folded(model).model)
    eps = float(np.float32(EPS))
    weight, bias, *norms = (value.astype(np.float64) for value in values.values())
    for gamma, beta, mean, var in (norms[:4], norms[4:]):
        scale = gamma / np.sqrt(var + eps)
        weight, bias = weight * scale, scale * (bias - mean) + beta
    for name, want in (("weight.folded", weight), ("bias.folded", bias)):
        assert got[name].dtype == dtype
        np.testing.assert_allclose(got[name].astype(np.float64), want, rtol=rtol, atol=0)


# Several nodes


def test_before_is_preferred() -> None:
    """Where both layers would do, the one whose rounding does not grow."""
    model = dense(gemm("x", "h"), batchnorm("h", "n"), node("Gemm", ["n", "weight"], ["y"], "next"))
    result = folded(model)
    assert [(entry.into, entry.side) for entry in result.folds] == [("layer", "before")]
    assert_same(model, result.model, numbers(7, 4))


@pytest.mark.parametrize(
    ("nodes", "sides"),
    [
        ([gemm("x", "a"), batchnorm("a", "b", "first"), batchnorm("b", "y", "second")], ["before", "before"]),
        ([batchnorm("x", "a", "first"), batchnorm("a", "b", "second"), gemm("b", "y")], ["after", "after"]),
        ([batchnorm("x", "a", "first"), gemm("a", "b"), batchnorm("b", "y", "second")], ["after", "before"]),
    ],
)
def test_nodes_in_a_row_go_into_one_layer(nodes: Sequence[onnx.NodeProto], sides: Sequence[str]) -> None:
    """One after the other, whichever of them stands in the way of the rest."""
    model = dense(*nodes, constants={**statistics(4, "first"), **statistics(4, "second")})
    result = folded(model)
    assert [(entry.layer, entry.side) for entry in result.folds] == list(zip(["first", "second"], sides, strict=True))
    assert operators(result.model) == ["Gemm"]
    assert set(constants_of(result.model)) == {"weight.folded", "bias.folded", *(f"norm.{what}" for what in VECTORS)}
    assert_same(model, result.model, 2 + numbers(7, 4))


def test_every_node_is_reported_in_the_order_of_the_graph() -> None:
    inside = inside_an_if()
    first, last = batchnorm("y", "b", "first"), batchnorm("s", "z", "last")
    inside.graph.node.extend([first, node("Sin", ["b"], ["s"]), last])
    inside.graph.node.insert(0, batchnorm("x", "unused", "zeroth"))
    inside.graph.output[0].name = "z"
    for name in ("zeroth", "first", "last"):
        inside.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in statistics(4, name).items())
    assert [entry.layer for entry in folded(inside).folds] == ["zeroth", "norm", "first", "last"]


# Names, and what else uses a tensor


def test_weights_that_others_use_stay() -> None:
    """Two layers with one weight and one bias: each goes on with its own numbers."""
    one, other = gemm("x", "h"), node("Gemm", ["x", "weight", "bias"], ["g"], "other", transB=1)
    model = dense(one, other, batchnorm("h", "n"), node("Mul", ["n", "g"], ["y"]))
    result = folded(model)
    assert result.folds[0].into == "layer"
    np.testing.assert_array_equal(constants_of(result.model)["weight"], numbers(4, 4))
    np.testing.assert_array_equal(constants_of(result.model)["bias"], numbers(4))
    assert_same(model, result.model, numbers(7, 4))


def test_a_layer_used_twice_is_folded_where_it_is_normalised() -> None:
    """Two nodes of one layer, each before a BatchNormalization of its own."""
    nodes = [
        node("MatMul", ["x", "weight"], ["a"], "one"),
        node("MatMul", ["x", "weight"], ["b"], "two"),
        batchnorm("a", "c", "first"),
        batchnorm("b", "d", "second"),
        node("Mul", ["c", "d"], ["y"]),
    ]
    model = dense(*nodes, constants={**statistics(4, "first"), **statistics(4, "second")})
    result = folded(model)
    assert [entry.into for entry in result.folds] == ["one", "two"]
    assert "weight" not in constants_of(result.model)
    assert_same(model, result.model, numbers(7, 4))


def test_one_tensor_can_be_many_things() -> None:
    """Exporters give equal tensors one name: a mean is a bias and a beta, a var a gamma, and two norms share all."""
    same = dict(zip(("gamma", "beta", "mean", "var"), ("var", "mean", "mean", "var"), strict=True))
    inputs = [f"norm.{same[what]}" for what in VECTORS]
    nodes = [
        node("Gemm", ["x", "weight", "norm.mean"], ["a"], "one", transB=1),
        node("BatchNormalization", ["a", *inputs], ["b"], "first", epsilon=EPS),
        node("Gemm", ["b", "weight", "norm.mean"], ["c"], "two", transB=1),
        node("LeakyRelu", ["c"], ["d"], alpha=0.3),
        node("BatchNormalization", ["d", *inputs], ["e"], "second", epsilon=EPS),
        node("Sub", ["e", "norm.mean"], ["y"]),
    ]
    model = dense(*nodes)
    result = folded(model)
    assert [entry.into for entry in result.folds] == ["one", None]
    np.testing.assert_array_equal(constants_of(result.model)["norm.mean"], statistics(4)["norm.mean"])
    assert_same(model, result.model, numbers(7, 4))


def test_what_a_body_uses_stays() -> None:
    """A branch takes statistics and weight from the graph around it: there they stay."""
    model = inside_an_if()
    last = batchnorm("g", "z")
    last.name = "last"
    model.graph.node.extend([node("Gemm", ["y", "weight"], ["g"], "top", alpha=0.7), last])
    model.graph.output[0].name = "z"
    result = folded(model)
    assert [entry.into for entry in result.folds] == [None, "top"]
    assert_same(model, result.model, numbers(7, 4))


def test_new_names_are_new() -> None:
    """Also to a body, where they would hide what is outside."""
    model = inside_an_if()
    then = next(attribute.g for attribute in model.graph.node[0].attribute if attribute.name == "then_branch")
    then.node[0].output[0] = then.node[1].input[0] = "weight.folded.2"
    nodes = [node("Gemm", ["y", "weight", "bias"], ["g"], "top", alpha=0.7), batchnorm("g", "n", "last")]
    model.graph.node.extend([*nodes, node("Add", ["n", "weight.folded"], ["z"])])
    model.graph.output[0].name = "z"
    values = {"weight.folded": numbers(4), **statistics(4, "last")}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    result = folded(model)
    assert result.folds[1].into == "top"
    assert "weight.folded.3" in constants_of(result.model)
    assert_same(model, result.model, numbers(7, 4))


def test_constants_may_be_nodes_and_may_be_handed_through() -> None:
    """They go with the last node that used them; those that were unused before are not touched."""
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(numbers(4, 4))),
        node("Identity", ["norm.mean"], ["m"]),
        node("Identity", ["norm.var"], ["v"]),
        node("MatMul", ["x", "w"], ["h"], "layer"),
        node("BatchNormalization", ["h", "norm.gamma", "norm.beta", "m", "v"], ["n"], "norm", epsilon=EPS),
        node("Add", ["n", "m"], ["y"]),
    ]
    model = dense(*nodes)
    result = folded(model)
    assert operators(result.model) == ["Identity", "MatMul", "Add", "Add"]
    assert set(constants_of(result.model)) == {"weight", "bias", "norm.mean", "w.folded", "h.bias.folded"}
    assert_same(model, result.model, numbers(7, 4))


def test_modules_and_values_are_still_named() -> None:
    """The layer says whose it is, inputs and outputs are as they were, and no value is described that is gone."""

    def of(module: str, one: onnx.NodeProto) -> onnx.NodeProto:
        entry = one.metadata_props.add()
        entry.key, entry.value = LAYER_KEY, module
        return one

    matmul = of("blocks.0.linear", node("MatMul", ["x", "weight"], ["h"]))
    norm = of("blocks.0.norm", batchnorm("h", "n"))
    model = dense(matmul, norm, node("Relu", ["n"], ["r"]), node("Neg", ["r"], ["y"]))
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("h", "n", "r")
    )
    result = folded(model)
    assert result.folds == (Fold(layer="blocks.0.norm", into="blocks.0.linear", side="before", kept_because=None),)
    product, add, *_ = result.model.graph.node
    assert product.metadata_props == add.metadata_props == matmul.metadata_props
    assert [value.name for value in result.model.graph.value_info] == ["n", "r"]
    assert result.model.graph.input == model.graph.input
    assert result.model.graph.output == model.graph.output


def test_functions_are_inlined_first() -> None:
    """Inside one, statistics are only names; the caller's are folded."""
    body = [gemm("a", "c"), batchnorm("c", "d")]
    names = ["a", "weight", "bias", *(f"norm.{what}" for what in VECTORS)]
    function = helper.make_function("custom", "Block", names, ["d"], body, [helper.make_opsetid("", 17)])
    model = dense(node("Block", ["x", *names[1:]], ["y"], domain="custom"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("custom", 1))
    result = folded(model)
    assert result.folds[0].side == "before"
    assert_same(model, result.model, numbers(7, 4))


def test_files_of_the_third_ir_version_become_of_the_fourth() -> None:
    """There every initializer had to be an input of the graph as well; new ones are not."""
    nodes = [node("Constant", [], [name], value=numpy_helper.from_array(v)) for name, v in statistics(4).items()]
    weight = node("Constant", [], ["w"], value=numpy_helper.from_array(numbers(4, 4)))
    model = graphs.model(
        [*nodes, weight, node("MatMul", ["x", "w"], ["h"], "layer"), batchnorm("h", "y")],
        {},
        opset=8,
        x=(1, [None, 4]),
        y=[None, 4],
    )
    model.ir_version = 3
    result = folded(model)
    assert operators(result.model) == ["MatMul", "Add"]
    assert result.model.ir_version == 4
    assert_same(model, result.model, numbers(7, 4))


# For every network


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A chain of layers, BatchNormalizations and what may stand between, in float64, from and to 4 channels."""
    kinds = st.sampled_from(
        ["gemm", "matmul", "matmul and add", "norm", "norm", "relu", "sigmoid", "identity", "dropout"]
    )
    nodes: list[onnx.NodeProto] = []
    constants: Constants = {}
    width, last = 4, "x"
    for i, kind in enumerate(draw(st.lists(kinds, min_size=2, max_size=9))):
        to, wide, seed = f"t{i}", draw(st.integers(1, 5)), draw(st.integers(0, 99))
        shuffle = np.random.default_rng(seed).permutation
        if kind in ("gemm", "matmul", "matmul and add"):
            constants |= {f"w{i}": shuffle(numbers(width, wide, dtype=np.float64)), f"b{i}": shuffle(numbers(wide))}
            width = wide
        match kind:
            case "gemm":
                inputs = [last, f"w{i}", *([f"b{i}"] if seed % 2 else [])]
                nodes.append(node("Gemm", inputs, [to], alpha=0.7, beta=1.3))
            case "matmul":
                nodes.append(node("MatMul", [last, f"w{i}"], [to]))
            case "matmul and add":
                nodes += [node("MatMul", [last, f"w{i}"], [f"p{i}"]), node("Add", [f"b{i}", f"p{i}"], [to])]
            case "norm":
                values = statistics(width, f"n{i}")
                values[f"n{i}.gamma"] *= 0.2  # a chain of them should not grow without end
                constants |= {name: shuffle(value) for name, value in values.items()}
                nodes.append(batchnorm(last, to, f"n{i}"))
            case "relu" | "sigmoid" | "identity" | "dropout":
                nodes.append(node(kind.capitalize(), [last], [to]))
        last = to
        if draw(st.integers(0, 9)) == 0:
            nodes.append(node("Add", [last, last], [f"{last}.twice"]))
            last = f"{last}.twice"
    nodes.append(node("Identity", [last], ["y"]))
    constants = {name: value.astype(np.float64) for name, value in constants.items()}
    model = graphs.model(nodes, constants, x=(TensorProto.DOUBLE, ["batch", 4]), y=["batch", width])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


@settings(max_examples=150, deadline=None)
@given(networks())
def test_any_chain_computes_what_it_did(model: onnx.ModelProto) -> None:
    """Whatever stands beside whatever; in float64, where a difference that is not rounding cannot hide."""
    result = folded(model)
    x = numbers(7, 4, dtype=np.float64) + 2
    want = answers(model, x)
    np.testing.assert_allclose(answers(result.model, x), want, rtol=0, atol=1e-10 * (1 + np.abs(want).max()))
    left = sum(name == "BatchNormalization" for name in operators(result.model))
    assert left == sum(entry.into is None for entry in result.folds)
    assert len(result.folds) == sum(name == "BatchNormalization" for name in operators(model))
    again = folded(result.model)
    assert again.model == result.model, "what can be folded is folded at once"
