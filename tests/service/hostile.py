"""ONNX files that nobody means well with: small, and each asks for something that must not be given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import graphs

Make = Callable[[], bytes]
REFUSED: dict[str, tuple[Make, str]] = {}
"""By name: how it is made, and what its refusal says."""

ENDLESS = 2**62


def _refused(says: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        REFUSED[make.__name__] = (make, says)
        return make

    return keep


def model(nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto] = ()) -> onnx.ModelProto:
    made = graphs.model(nodes, {})
    made.graph.initializer.extend(constants)
    return made


def constant(name: str, value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value), name)


def declared(name: str, *dims: int, raw_data: bytes | None = None) -> onnx.TensorProto:
    """A tensor that says how large it is, and is not."""
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    if raw_data is not None:
        tensor.raw_data = raw_data
    return tensor


def added(*nodes: onnx.NodeProto, constants: Sequence[onnx.TensorProto] = ()) -> bytes:
    """What these nodes make as `z`, however large, is summed up and added to x."""
    total = helper.make_node("ReduceSum", ["z"], ["total"], keepdims=0)
    return bytes(model([*nodes, total, helper.make_node("Add", ["x", "total"], ["y"])], constants).SerializeToString())


@_refused("TensorProto")
def dimensions_without_data() -> bytes:
    return bytes(model([helper.make_node("Add", ["x", "w"], ["y"])], [declared("w", 2**40)]).SerializeToString())


@_refused("too small for the declared shape")
def dimensions_with_little_data() -> bytes:
    weight = declared("w", 2**40, raw_data=b"1234")
    return bytes(model([helper.make_node("Add", ["x", "w"], ["y"])], [weight]).SerializeToString())


@_refused("overflow")
def dimensions_that_overflow() -> bytes:
    weight = declared("w", 2**62, 2**62, raw_data=b"1234")
    return bytes(model([helper.make_node("Add", ["x", "w"], ["y"])], [weight]).SerializeToString())


@_refused("Negative dimension")
def negative_dimensions() -> bytes:
    return bytes(
        model([helper.make_node("Add", ["x", "w"], ["y"])], [declared("w", -3, raw_data=b"")]).SerializeToString()
    )


@_refused("topologically sorted")
def a_circle_of_nodes() -> bytes:
    nodes = [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Relu", ["y"], ["b"])]
    return bytes(model(nodes).SerializeToString())


def _functions(bodies: Sequence[Sequence[str]]) -> bytes:
    """Functions F0, F1, ... that call those of these names one after the other."""
    made = model([helper.make_node("F0", ["x"], ["y"], domain="f")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for number, calls in enumerate(bodies):
        nodes = [
            helper.make_node(call, [f"t{i}"], [f"t{i + 1}"], domain="f" if call.startswith("F") else "")
            for i, call in enumerate(calls)
        ]
        made.functions.append(helper.make_function("f", f"F{number}", ["t0"], [f"t{len(calls)}"], nodes, opsets))
    made.opset_import.append(opsets[1])
    return bytes(made.SerializeToString())


@_refused("recursive")
def a_circle_of_functions() -> bytes:
    return _functions([["F1"], ["F0"]])


@_refused("nodes, functions written out")
def functions_that_multiply() -> bytes:
    return _functions([*([f"F{i + 1}"] * 2 for i in range(40)), ["Relu"]])


@_refused("cannot be parsed")
def graphs_nested_deeply() -> bytes:
    body = graphs.mixing_model().graph.SerializeToString()
    for _ in range(1000):
        attribute = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH).SerializeToString()
        node = b"\x22\x02If" + _field(5, attribute + _field(6, body))
        body = _field(1, node)
    return bytes(model([]).SerializeToString() + _field(7, body))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, left = b"", len(content)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    return bytes([number << 3 | 2]) + length + bytes([left]) + content


@_refused("not a registered function")
def an_operator_of_its_own() -> bytes:
    made = model([helper.make_node("ReadsFiles", ["x"], ["y"], domain="evil")])
    made.opset_import.append(helper.make_opsetid("evil", 1))
    return bytes(made.SerializeToString())


def _loop(*, start: str, keeps: bool) -> bytes:
    flag = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("v", "w", "kept")]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["v"], ["w"]),
            helper.make_node("Identity", ["v"], ["kept"]),
        ],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flag, ends[0]],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), *ends[1 : 3 if keeps else 2]],
    )
    outputs = ["end", "z"] if keeps else ["z"]
    loop = helper.make_node("Loop", ["times", "yes", start], outputs, body=body)
    return added(loop, constants=[constant("times", ENDLESS), constant("yes", True), constant("one", np.float32(1))])


@_refused("did not come to an end")
def a_loop_without_end() -> bytes:
    return _loop(start="x", keeps=False)


@_refused("did not come to an end")
def a_loop_of_constants_without_end() -> bytes:
    return _loop(start="one", keeps=False)


@_refused("")
def a_loop_that_keeps_everything() -> bytes:
    return _loop(start="x", keeps=True)


@_refused("failed on a batch of 1")
def constants_of_100_gb() -> bytes:
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    node = helper.make_node("ConstantOfShape", ["shape"], ["z"], value=one)
    return added(node, constants=[constant("shape", [25 * 10**9])])


@_refused("")
def a_range_of_8_gb() -> bytes:
    nodes = [
        helper.make_node("Range", ["from", "to", "step"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["z"], to=TensorProto.FLOAT),
    ]
    return added(*nodes, constants=[constant("from", 0), constant("to", 10**9), constant("step", 1)])


@_refused("failed on a batch of 1")
def tiles_of_40_gb() -> bytes:
    node = helper.make_node("Tile", ["w", "times"], ["z"])
    return added(node, constants=[constant("w", np.ones(1000, np.float32)), constant("times", [10**7])])


@_refused("failed on a batch of 1")
def an_outer_sum_of_4_tb() -> bytes:
    weights = [constant("a", np.ones((10**6, 1), np.float32)), constant("b", np.ones((1, 10**6), np.float32))]
    return added(helper.make_node("Add", ["a", "b"], ["z"]), constants=weights)


@_refused("asks for more memory than is free")
def rows_of_4_tb() -> bytes:
    made = graphs.mixing_model()
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    return bytes(made.SerializeToString())


@_refused("is random")
def noise() -> bytes:
    return bytes(graphs.random_model().SerializeToString())


@_refused("single static assignment")
def a_name_twice() -> bytes:
    return bytes(model([helper.make_node(kind, ["x"], ["y"]) for kind in ("Relu", "Abs")]).SerializeToString())


@_refused("no constant running_mean")
def statistics_of_text() -> bytes:
    text = [
        onnx.TensorProto(name=name, data_type=8, dims=[3], string_data=[b"\xff", b"a", b"b"])
        for name in ("mean", "var")
    ]
    others = [constant(name, np.ones(3, np.float32)) for name in ("gamma", "beta")]
    node = helper.make_node("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], ["y"])
    return bytes(model([node], [*others, *text]).SerializeToString())


@_refused(r"BatchNormalization 'a\x1b[2J\nnet/1  ready\r' is in training mode")
def a_name_that_a_terminal_obeys() -> bytes:
    return bytes(graphs.batchnorm_model(training=True, name="a\x1b[2J\nnet/1  ready\r").SerializeToString())


@_refused("cannot be parsed")
def no_model_at_all() -> bytes:
    return bytes(range(256)) * 100
