"""Every BatchNormalization is found, wherever it hides, and judged by the rule of its opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.graph.scan import LAYER_KEY, scan
from tests import graphs
from tests.graphs import BETA, EPS, GAMMA, MEAN, VAR, batchnorm_model


@pytest.mark.parametrize("opset", [6, 7, 9, 13, 14, 15, 17, 20])
def test_a_frozen_layer_is_healthy_in_every_opset(opset: int) -> None:
    found = scan(batchnorm_model(opset=opset))
    assert found.faults == ()
    (layer,) = found.batchnorms
    assert layer.layer == "norm"
    assert layer.channels == 3
    assert layer.epsilon == pytest.approx(EPS)
    np.testing.assert_array_equal(layer.running_mean, MEAN)
    np.testing.assert_array_equal(layer.running_var, VAR)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (batchnorm_model(opset=6, training=True), "(is_test=0)"),
        (batchnorm_model(opset=7, extra_outputs=("m", "v", "sm", "sv")), "outputs beyond Y"),
        (batchnorm_model(opset=13, extra_outputs=("m",)), "outputs beyond Y"),
        (batchnorm_model(opset=14, training=True), "(training_mode=1)"),
        (batchnorm_model(opset=17, training=True), "(training_mode=1)"),
    ],
)
def test_training_mode_is_seen_in_every_opset(model: onnx.ModelProto, sentence: str) -> None:
    """How a file asks for the statistics of the batch changed three times; each way is known."""
    (fault,) = scan(model).faults
    assert sentence in fault


def test_the_layer_is_named_by_its_module_path() -> None:
    """The name in a sentence is the one in the engineer's code, where the exporter left it."""
    model = batchnorm_model(training=True)
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = LAYER_KEY, "blocks.0.norm"
    assert scan(model).faults[0].startswith("BatchNormalization 'blocks.0.norm' is in training mode")


def test_statistics_computed_from_the_batch_are_seen() -> None:
    """No attribute says training, but mean and variance come from the input: both are named."""
    first, second = scan(graphs.batch_statistics_model()).faults
    assert "no constant running_mean" in first
    assert "no constant running_var" in second


def test_constants_may_be_nodes_and_may_be_handed_through() -> None:
    """Exporters also write statistics as Constant nodes, and share equal ones through Identity."""
    nodes = [
        helper.make_node("Constant", [], ["mean"], value=numpy_helper.from_array(MEAN)),
        helper.make_node("Identity", ["var"], ["same_var"]),
        helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "same_var"], ["y"], epsilon=EPS),
    ]
    assert scan(graphs.model(nodes, {"gamma": GAMMA, "beta": BETA, "var": VAR})).faults == ()


def branch(node: onnx.NodeProto, *initializers: onnx.TensorProto) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["batch", 3])
    return helper.make_graph([node], "branch", [], [output], list(initializers))


@pytest.mark.parametrize("training", [False, True])
def test_the_body_of_an_if_is_walked(training: bool) -> None:
    """With the constants of the graph around it: a frozen layer there is healthy, a training one is not."""
    attributes: dict[str, Any] = {"training_mode": 1} if training else {}
    outputs = ["z", "m", "v"] if training else ["z"]
    inside = helper.make_node(
        "BatchNormalization", ["x", "gamma", "beta", "mean", "var"], outputs, "deep", **attributes
    )
    plain = helper.make_node("Identity", ["x"], ["w"])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch(inside), else_branch=branch(plain))
    constants = {"condition": np.array(True), "gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR}
    faults = scan(graphs.model([node], constants)).faults
    assert len(faults) == int(training)
    assert all("'deep'" in fault for fault in faults)


def test_a_name_computed_inside_a_body_hides_the_constant_outside() -> None:
    """Otherwise batch statistics inside a branch would pass for the constant of the same name outside."""
    reduce = helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0)
    norm = helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["z"], "deep")
    body = branch(norm)
    body.node.insert(0, reduce)
    plain = helper.make_node("Identity", ["x"], ["w"])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=body, else_branch=branch(plain))
    constants = {"condition": np.array(True), "gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR}
    (fault,) = scan(graphs.model([node], constants)).faults
    assert "no constant running_mean" in fault


@pytest.mark.parametrize("statistics", ["constant", "computed"])
def test_a_function_is_judged_with_what_its_caller_gives(statistics: str) -> None:
    """Inside a function the statistics are only names; whether they are constants is the caller's doing."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    body = helper.make_node("BatchNormalization", ["a", "g", "b", "m", "v"], ["c"], epsilon=EPS)
    function = helper.make_function("custom", "Norm", ["a", "g", "b", "m", "v"], ["c"], [body], opsets[:1])
    nodes = [helper.make_node("Norm", ["x", "gamma", "beta", "mean", "var"], ["y"], domain="custom")]
    constants = {"gamma": GAMMA, "beta": BETA, "mean": MEAN, "var": VAR}
    if statistics == "computed":
        del constants["mean"]
        nodes.insert(0, helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=0))
    model = graphs.model(nodes, constants)
    model.functions.append(function)
    model.opset_import.append(opsets[1])
    found = scan(model)
    assert len(found.batchnorms) == 1
    assert len(found.faults) == (1 if statistics == "computed" else 0)


def test_the_model_is_not_changed() -> None:
    model = batchnorm_model(training=True)
    before = model.SerializeToString()
    scan(model)
    assert model.SerializeToString() == before
