"""A model in two parts is the same model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from service.graph.fold import fold
from service.graph.parts import LARGE_ELEMENTS, copied, outline, serialised
from tests import graphs
from tests.bundles import table_model

WIDTH = 80
"""Its square is large."""


def wide_model(*, typed: bool = False) -> onnx.ModelProto:
    """y = (x W) normalised, with a large W; every field of the model that can be set is."""
    generator = np.random.default_rng(3)
    weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], name="product"),
        helper.make_node("BatchNormalization", ["h", "gamma", "beta", "mean", "var"], ["y"], epsilon=0.03, name="norm"),
    ]
    constants = {
        name: generator.uniform(0.5, 1.5, WIDTH).astype(np.float32) for name in ("gamma", "beta", "mean", "var")
    }
    model = graphs.model(nodes, constants, x=(TensorProto.FLOAT, ["batch", WIDTH]), y=["batch", WIDTH])
    if typed:
        large = helper.make_tensor("W", TensorProto.FLOAT, weight.shape, weight.ravel())
    else:
        large = numpy_helper.from_array(weight, "W")
    large.doc_string = "weights"
    model.graph.initializer.insert(0, large)
    model.graph.doc_string, model.producer_name, model.model_version = "a graph", "a test", 7
    entry = model.metadata_props.add()
    entry.key, entry.value = "key", "value"
    return model


MODELS = {
    "small": table_model(),
    "wide": wide_model(),
    "typed": wide_model(typed=True),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_what_is_serialised_in_parts_is_the_model(model: onnx.ModelProto) -> None:
    """Field by field, and the same for a reader that is no Python."""
    content = serialised(model)
    assert onnx.load_model_from_string(content) == copied(model)
    onnx.checker.check_model(content)
    assert sorted(tensor.name for tensor in copied(model).graph.initializer) == sorted(
        tensor.name for tensor in model.graph.initializer
    )


@given(st.lists(st.integers(0, 3 * LARGE_ELEMENTS), max_size=4))
def test_weights_of_any_size_arrive(sizes: list[int]) -> None:
    """Lengths are written in groups of seven bits."""
    arrays = {f"w{i}": np.arange(size, dtype=np.uint8) for i, size in enumerate(sizes)}
    model = graphs.model([helper.make_node("Identity", ["x"], ["y"])], arrays)
    read = onnx.load_model_from_string(serialised(model))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in read.graph.initializer}
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_an_outline_has_the_shapes_and_not_the_weights() -> None:
    model = wide_model()
    drawn = outline(model)
    assert len(drawn.SerializeToString()) < 4000 < len(model.SerializeToString())
    shapes = [
        {value.name: value.type for value in onnx.shape_inference.infer_shapes(it).graph.value_info}
        for it in (model, drawn)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0].keys() == {"h"}
    assert fold(model).folds[0].into == "product"


def test_shape_inference_is_not_given_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """It copies what it is given, and nobody is answered meanwhile."""
    infer, given_bytes = onnx.shape_inference.infer_shapes, []

    def noting(model: onnx.ModelProto, **how: bool) -> onnx.ModelProto:
        given_bytes.append(len(model.SerializeToString()))
        return infer(model, **how)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", noting)
    fold(wide_model())
    assert max(given_bytes) < 4000
