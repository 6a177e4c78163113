"""How large an answer will be is known by one that was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from service.answer_size import measured
from service.runtime import OnnxRuntime, place
from service.signature import Accepted


def model(y: Sequence[str | int], *kinds: str) -> ModelProto:
    """Of x: [batch, 3, height, width]."""
    names = ["x", *(f"t{i}" for i in range(len(kinds) - 1)), "y"]
    nodes = [helper.make_node(kind, [names[i]], [names[i + 1]]) for i, kind in enumerate(kinds)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, y)
    graph = helper.make_graph(nodes, "graph", [x], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def accepted(rows: int, side: int) -> Accepted:
    return Accepted((np.ones((rows, 3, side, side), np.float32),), rows)


@pytest.mark.parametrize(
    ("network", "answer_bytes"),
    [
        (model(["batch", 3], "GlobalAveragePool", "Flatten"), 5 * 3 * 4),
        (model(["batch", 3, "height", "width"], "Relu"), 5 * 3 * 200 * 200 * 4),
    ],
    ids=["a class for each image, of whatever size", "an image for each"],
)
def test_it_is_that_of_the_answer(network: ModelProto, answer_bytes: int) -> None:
    """Of a sample of another size, too."""
    runtime = OnnxRuntime(network.SerializeToString(), place("cpu"))
    size = measured(runtime, accepted(2, 4))
    asked = accepted(5, 200)
    assert size.guess_bytes(asked) == answer_bytes == sum(output.nbytes for output in runtime.run(asked.tensors))
