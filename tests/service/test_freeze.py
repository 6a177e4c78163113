"""A file in training mode is frozen when its statistics are provably learned, and else refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.errors import Refused
from service.graph.freeze import Frozen, FrozenLayer, freeze
from service.graph.scan import LAYER_KEY, scan
from service.runtime import OnnxRuntime, place
from tests import graphs
from tests.graphs import BETA, EPS, GAMMA, MEAN, VAR, batchnorm_answer

Array = NDArray[Any]
MOMENTUM = 0.7
"""Of the old value. MEAN and VAR of `tests.graphs` could not be of fewer than 11 updates: 0.7**11 = 0.0198 < 0.02."""


def training_norm(x: str = "x", y: str = "y", name: str = "norm", *, opset: int = 17, **more: Any) -> onnx.NodeProto:
    """A BatchNormalization in training mode, as each opset writes it."""
    attributes: dict[str, Any] = {"epsilon": EPS, "momentum": MOMENTUM, **more}
    outputs = [y, f"{name}.mean_out", f"{name}.var_out"]
    if opset >= 14:
        attributes["training_mode"] = 1
    else:
        outputs += [f"{name}.saved_mean", f"{name}.saved_var"]
    return helper.make_node("BatchNormalization", [x, "gamma", "beta", "mean", "var"], outputs, name=name, **attributes)


def constants(*, mean: Array = MEAN, var: Array = VAR) -> dict[str, Array]:
    return {"gamma": GAMMA, "beta": BETA, "mean": mean, "var": var}


def training_model(*, opset: int = 17, mean: Array = MEAN, var: Array = VAR, **attributes: Any) -> onnx.ModelProto:
    return graphs.model([training_norm(opset=opset, **attributes)], constants(mean=mean, var=var), opset=opset)


def frozen(model: onnx.ModelProto) -> Frozen:
    """The model frozen; what comes out is valid and healthy, and what went in is as it was."""
    before = model.SerializeToString(deterministic=True)
    result = freeze(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model, full_check=True)
    assert scan(result.model).faults == ()
    return result


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(Refused) as caught:
        freeze(model)
    return str(caught.value)


@pytest.mark.parametrize("opset", [6, 7, 9, 13, 14, 15, 17, 20])
def test_a_trained_layer_is_frozen_in_every_opset(opset: int) -> None:
    """Whatever way the file asks for the statistics of the batch, it no longer does."""
    result = frozen(training_model(opset=opset))
    assert result.layers == (FrozenLayer(layer="norm", channels=3, least_updates=11),)
    assert result.dropouts == 0
    (node,) = result.model.graph.node
    assert list(node.output) == ["y"]
    assert sorted(attribute.name for attribute in node.attribute) == [
        "epsilon",
        *(["is_test"] if opset == 6 else []),
        "momentum",
    ]


@pytest.mark.parametrize("opset", [6, 14, 17])
def test_the_mode_is_enough(opset: int) -> None:
    """No output beyond Y, and momentum at its default: 0.9**38 = 0.0182 < 0.02 < 0.9**37."""
    model = graphs.batchnorm_model(training=True, opset=opset)
    del model.graph.node[0].output[1:]
    assert frozen(model).layers == (FrozenLayer(layer="norm", channels=3, least_updates=38),)


def test_it_answers_with_its_running_statistics() -> None:
    """The numbers of NumPy in float64, whoever stands beside a row."""
    runtime = OnnxRuntime(frozen(training_model()).model.SerializeToString(), place("cpu"), threads=1)
    x = np.random.default_rng(5).normal(3, 1, (6, 3)).astype(np.float32)
    # scale and shift of up to 300 nearly cancel: a few roundings of numbers that large
    np.testing.assert_allclose(runtime.run([x])[0], batchnorm_answer(x), rtol=0, atol=10 * 2**-24 * 300)


def test_the_layer_is_named_by_its_module_path() -> None:
    model = training_model()
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = LAYER_KEY, "blocks.0.norm"
    assert frozen(model).layers[0].layer == "blocks.0.norm"


def test_statistics_of_the_batch_are_no_outputs_any_more() -> None:
    model = training_model()
    for name in ("norm.mean_out", "norm.var_out"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]))
    model.graph.value_info.append(helper.make_tensor_value_info("norm.mean_out", TensorProto.FLOAT, [3]))
    graph = frozen(model).model.graph
    assert [value.name for value in graph.output] == ["y"]
    assert not graph.value_info


def dropout_model(opset: int, *, training: Array | str | None, mask: bool = False) -> onnx.ModelProto:
    """A trained BatchNormalization, then Dropout; `training` is a constant, or the name of an input of the graph."""
    if opset <= 6:
        drop = helper.make_node("Dropout", ["n"], ["d", "mask"], "drop", ratio=0.4)
        values = constants()
    else:
        mode = training if isinstance(training, str) else "training"
        inputs = ["n", "ratio", *([] if training is None else [mode])]
        drop = helper.make_node("Dropout", inputs, ["d", "mask"], "drop")
        values = {**constants(), "ratio": np.array(0.4, np.float32)}
        if isinstance(training, np.ndarray):
            values["training"] = training
    nodes = [training_norm(y="n", opset=opset), drop, helper.make_node("Neg", ["d"], ["y"])]
    model = graphs.model(nodes, values, opset=opset)
    if isinstance(training, str):
        model.graph.input.append(helper.make_tensor_value_info(training, TensorProto.BOOL, []))
    if mask:
        kind = TensorProto.FLOAT if opset < 10 else TensorProto.BOOL
        model.graph.output.append(helper.make_tensor_value_info("mask", kind, ["batch", 3]))
    return model


@pytest.mark.parametrize("opset", [6, 12, 17])
def test_dropout_is_put_in_inference(opset: int) -> None:
    """And its second output stays what others may take."""
    result = frozen(dropout_model(opset, training=np.array(True), mask=opset > 6))
    assert result.dropouts == 1
    drop = result.model.graph.node[1]
    assert list(drop.input) == (["n"] if opset == 6 else ["n", "ratio"])
    assert list(drop.output) == ["d", "mask"]


@pytest.mark.parametrize("training", [None, np.array(False)])
def test_dropout_in_inference_is_left_alone(training: Array | None) -> None:
    model = dropout_model(17, training=training)
    result = frozen(model)
    assert result.dropouts == 0
    assert result.model.graph.node[1] == model.graph.node[1]


def test_dropout_alone_needs_no_proof() -> None:
    result = frozen(graphs.dropout_model(training=True))
    assert (result.layers, result.dropouts) == ((), 1)


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["batch", 3])
    return helper.make_graph(list(nodes), "body", [], [output])


def branching(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    plain = helper.make_node("Identity", ["x"], ["w"])
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=body(*nodes), else_branch=body(plain))
    return graphs.model([branch], {"condition": np.array(True), **constants()})


def test_the_body_of_an_if_is_frozen_too() -> None:
    result = frozen(branching(training_norm(y="z", name="deep")))
    assert [layer.layer for layer in result.layers] == ["deep"]


def test_a_function_is_frozen_with_what_its_caller_gives() -> None:
    inner = helper.make_node(
        "BatchNormalization", ["a", "g", "b", "m", "v"], ["c", "d", "e"], momentum=MOMENTUM, training_mode=1
    )
    function = helper.make_function(
        "custom", "Norm", ["a", "g", "b", "m", "v"], ["c"], [inner], [helper.make_opsetid("", 17)]
    )
    model = graphs.model(
        [helper.make_node("Norm", ["x", "gamma", "beta", "mean", "var"], ["y"], domain="custom")], constants()
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("custom", 1))
    (layer,) = frozen(model).layers
    assert layer.least_updates == 11


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@settings(deadline=None)
@given(momentum=st.floats(0.01, 0.99), updates=st.integers(0, 60), batch=st.floats(0, 1e-6))
def test_never_more_updates_than_there_were(dtype: Any, momentum: float, updates: int, batch: float) -> None:
    """Whatever the batches were and however each update was rounded, the proof does not exceed the truth."""
    var = np.ones(1, dtype)
    for _ in range(updates):
        var = (dtype(momentum) * var + dtype(1 - momentum) * dtype(batch)).astype(dtype)
    values = {what: np.ones(1, dtype) for what in ("gamma", "beta", "mean")}
    model = graphs.model(
        [training_norm(momentum=momentum)],
        {**values, "var": var},
        x=(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", 1]),
    )
    try:
        (layer,) = freeze(model).layers
    except Refused:
        return
    assert 2 <= layer.least_updates <= updates


def test_one_channel_is_enough() -> None:
    """0.7**5 < 0.2 < 0.7**4; one that happens to have variance 1 or mean 0 is no reason against it."""
    result = frozen(training_model(mean=np.array([0, 7, 5], np.float32), var=np.array([3, 0.2, 1], np.float32)))
    assert result.layers[0].least_updates == 5


def test_rounding_proves_nothing() -> None:
    """Five updates of float16 with empty batches: momentum and each product are rounded, and it is still five."""
    for momentum in np.linspace(0.3, 0.99, 1000):
        var = np.ones(1, np.float16)
        for _ in range(5):
            var *= np.float16(momentum)
        values = {what: np.ones(1, np.float16) for what in ("gamma", "beta", "mean")}
        x = (TensorProto.FLOAT16, ["batch", 1])
        model = graphs.model([training_norm(momentum=float(momentum))], {**values, "var": var}, x=x)
        assert freeze(model).layers[0].least_updates == 5


def computed_statistics() -> onnx.ModelProto:
    model = graphs.batch_statistics_model()
    norm = model.graph.node[-1]
    norm.attribute.append(helper.make_attribute("training_mode", 1))
    norm.output.extend(["m", "v"])
    return model


def used_statistics(*, inside: bool) -> onnx.ModelProto:
    norm = training_norm(y="n")
    if inside:
        model = branching(training_norm(y="z", name="deep"))
        then = next(attribute.g for attribute in model.graph.node[0].attribute if attribute.name == "then_branch")
        then.node[0].output[1] = "z2"
        then.node.append(helper.make_node("Add", ["z", "z2"], ["sum"]))
        then.output[0].name = "sum"
        return model
    return graphs.model([norm, helper.make_node("Sub", ["n", "norm.mean_out"], ["y"])], constants())


def given_statistics() -> onnx.ModelProto:
    """The body of an If gives the batch's mean to the graph around it."""
    norm = training_norm(y="z", name="deep")
    branch = body(norm)
    branch.output.append(helper.make_tensor_value_info("deep.mean_out", TensorProto.FLOAT, [3]))
    other = body(helper.make_node("Identity", ["x"], ["w"]))
    other.node.append(helper.make_node("Identity", ["mean"], ["u"]))
    other.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [3]))
    node = helper.make_node("If", ["condition"], ["y", "m"], then_branch=branch, else_branch=other)
    return graphs.model([node], {"condition": np.array(True), **constants()})


def with_frozen(mean: Array) -> onnx.ModelProto:
    """A trained layer in training mode, then one in inference."""
    second = helper.make_node("BatchNormalization", ["h", "gamma", "beta", "bad", "var"], ["y"], "second")
    return graphs.model([training_norm(y="h", name="first"), second], {**constants(), "bad": mean})


def in_bfloat16() -> onnx.ModelProto:
    model = training_model()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).tolist()
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, [3], values))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def near(value: float) -> Array:
    return np.array([7, value, 3], dtype=np.float32)


NEW = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
AFTER_ONE_UPDATE = (np.float32(MOMENTUM) * np.ones(3) + 0.3 * np.array([4, 0, 9])).astype(np.float32)

REFUSALS: Mapping[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "nothing to freeze": (
        graphs.batchnorm_model,
        "nothing in the model is in training mode; it can be served as it is",
    ),
    "no BatchNormalization at all": (graphs.mixing_model, "nothing in the model is in training mode"),
    "statistics of the batch": (computed_statistics, "never learned (track_running_stats=False); calibrate"),
    "bfloat16": (in_bfloat16, "has a running_var of bfloat16, whose rounding is not known here"),
    "infinite mean": (lambda: training_model(mean=near(np.inf)), "not finite"),
    "variance that is not a number": (lambda: training_model(var=near(np.nan)), "not finite"),
    "negative variance": (lambda: training_model(var=near(-0.01)), "negative running_var (-0.01)"),
    "never updated": (
        lambda: training_model(mean=NEW["mean"], var=NEW["var"]),
        "still has the mean 0 and variance 1 of a new layer",
    ),
    "one update": (lambda: training_model(var=AFTER_ONE_UPDATE), "its smallest running_var is 0.7, which 1 update(s)"),
    "large variances": (lambda: training_model(var=near(2)), "nothing proves that the statistics of Batch"),
    "momentum 0": (lambda: training_model(momentum=0.0), "has momentum 0; only between 0 and 1"),
    "momentum 1": (lambda: training_model(momentum=1.0), "has momentum 1; only between 0 and 1"),
    "the batch's mean is used": (lambda: used_statistics(inside=False), "what BatchNormalization 'norm' finds in the"),
    "the batch's mean is used in a body": (lambda: used_statistics(inside=True), "'deep' finds in the batch ('z2')"),
    "the batch's mean leaves a body": (given_statistics, "'deep' finds in the batch ('deep.mean_out')"),
    "another layer is not usable": (
        lambda: with_frozen(near(np.inf)),
        "'second' has a running_mean that is not finite",
    ),
    "Dropout in a computed mode": (lambda: dropout_model(17, training="mode"), "in a mode that the graph computes"),
    "unusable, and not in training": (
        lambda: graphs.batchnorm_model(mean=near(np.inf)),
        "cannot be frozen: BatchNormalization 'norm' has a running_mean that is not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_its_reason(name: str) -> None:
    build, sentence = REFUSALS[name]
    assert sentence in refusal(build())


def test_the_refusal_of_a_new_layer_beside_a_trained_one() -> None:
    """One that was never updated is not excused by the others."""
    second = training_norm("h", "y", "second")
    second.input[3], second.input[4] = "zero", "one"
    model = graphs.model(
        [training_norm(y="h", name="first"), second], {**constants(), "zero": NEW["mean"], "one": NEW["var"]}
    )
    assert "'second' still has the mean 0 and variance 1" in refusal(model)


def test_a_variance_of_zero_proves_what_its_dtype_can_tell() -> None:
    """A dead channel's variance falls for ever; below the smallest normal float32, 2**-126, it may be flushed to 0."""
    (layer,) = frozen(training_model(var=near(0))).layers
    assert layer.least_updates == int(np.ceil(126 * np.log(2) / -np.log(MOMENTUM)))


@pytest.mark.parametrize(("var", "learned"), [(1.3, False), (0.7, False), (0.3, True)])
def test_no_layer_speaks_for_another(var: float, learned: bool) -> None:
    """A trained backbone says nothing about the head that was put on it: 0.9**12 < 0.3 <= 0.9**11."""
    first, second = training_norm(y="h", name="first"), training_norm("h", "y", "second", momentum=0.9)
    second.input[4] = "var2"
    graph = graphs.model([first, second], {**constants(), "var2": np.full(len(MEAN), var, np.float32)})
    if learned:
        assert [layer.least_updates for layer in frozen(graph).layers] == [11, 12]
    else:
        with pytest.raises(Refused, match="statistics of BatchNormalization 'second' were learned"):
            freeze(graph)
