"""Why an ONNX model does not answer as the network does: each cause is told apart, and the first layer is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.conversion import convert
from export.diagnosis import diagnose, layer_differences
from service.errors import Refused
from tests.export.test_parity import BranchesOnBatchSize
from tests.export.zoo import ZOO, converted, rows, settled

NAME = "convolutional, after the activation"

Spoil = Callable[[onnx.ModelProto], None]


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def spoilt(spoil: Spoil, name: str = NAME) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(converted(name).model)
    spoil(model)
    return model


def put(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))


def keras_eps(model: onnx.ModelProto) -> None:
    for node in nodes(model):
        next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-3


def another_step(model: onnx.ModelProto) -> None:
    """What the TorchScript exporter does to a network that it traces in training mode: one step of the averages."""
    put(model, nodes(model)[1].input[3], lambda mean_C: mean_C * 0.9 + 0.1 * 5)


def never_trained(model: onnx.ModelProto) -> None:
    put(model, nodes(model)[0].input[3], np.zeros_like)
    put(model, nodes(model)[0].input[4], np.ones_like)


def training_mode(model: onnx.ModelProto) -> None:
    node = nodes(model)[0]
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    node.output.extend(["mean_out", "var_out"])


def computed_statistics(model: onnx.ModelProto) -> None:
    node = nodes(model)[0]
    node.name = "/model/norm"
    del node.metadata_props[:]
    model.graph.node.insert(0, onnx.helper.make_node("Abs", [node.input[4]], ["var_of_the_batch"]))
    node.input[4] = "var_of_the_batch"


def another_head(model: onnx.ModelProto) -> None:
    put(model, [node for node in model.graph.node if node.op_type == "Gemm"][-1].input[2], lambda bias: bias + 1)


@pytest.mark.parametrize(
    ("spoil", "verdict", "sentence"),
    [
        (keras_eps, "eps differs", "layer '2' has eps .* in the network and 0.001 in the file"),
        (another_step, "statistics differ", "layer '5' has another running_mean .* first .* differs is '5'"),
        (never_trained, "statistics missing", "layer '2' has mean 0 and variance 1 in the file"),
        (training_mode, "the file is in training mode", r"'2' is in training mode .* 'evalmode freeze'"),
        (computed_statistics, "statistics missing", "'/model/norm' has no constant running_var"),
        (another_head, "unexplained", "all 2 BatchNorm layers agree, so it is what comes after"),
    ],
)
def test_each_cause_has_its_verdict(spoil: Spoil, verdict: str, sentence: str) -> None:
    """Told by the file and the network alone, with the layer and the figures."""
    import re

    network, inputs = ZOO[NAME]()
    diagnosis = diagnose(network, spoilt(spoil), inputs)
    assert diagnosis.verdict == verdict
    assert re.search(sentence, diagnosis.sentence), diagnosis.sentence


def test_the_reference_in_train_mode_is_the_usual_cause() -> None:
    """The file is right: the network it is held against normalises with the batch (onnxruntime issue 4589)."""
    network, inputs = ZOO[NAME]()
    before = copy.deepcopy(network.state_dict())
    network.train()
    diagnosis = diagnose(network, converted(NAME).model, inputs)
    assert diagnosis.verdict == "the reference was in train mode"
    assert "call .eval() first" in diagnosis.sentence
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_same_network_is_equal_or_noise() -> None:
    network, inputs = ZOO[NAME]()
    assert diagnose(network, converted(NAME).model, inputs).verdict in ("equal", "just noise")


def test_code_that_branches_on_the_batch_size() -> None:
    inputs = (rows(7, 5),)
    network = settled(BranchesOnBatchSize(), *inputs)
    model = convert(network, inputs, input_names=["x"], output_names=["y"]).model
    assert diagnose(network, model, inputs).verdict == "code branches on the batch size"


def test_every_layer_is_judged_by_its_own_rounding() -> None:
    """A layer over large values is allowed more than one over small ones; both agree here."""
    network, inputs = ZOO["dense, large values"]()
    layers = layer_differences(network, converted("dense, large values").model, inputs)
    assert [layer.layer for layer in layers] == [
        p for p, part in network.named_modules() if isinstance(part, _BatchNorm)
    ]
    assert not any(layer.diverges for layer in layers)
    assert all(layer.allowed > 0 for layer in layers)


def test_another_function_is_refused() -> None:
    """Two outputs against one cannot be compared."""
    network, inputs = ZOO[NAME]()
    two = nn.Sequential(network)
    model = spoilt(lambda model: model.graph.output.append(onnx.helper.make_empty_tensor_value_info("extra")))
    with pytest.raises(Refused, match="has 1 outputs, the ONNX model 2"):
        diagnose(two, model, inputs)
