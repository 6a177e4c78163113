"""What is exported is eval mode, with every BatchNorm kept, and what cannot be is refused in a sentence."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.functional import dropout

from export.conversion import OPSET, Converted, convert
from service.errors import Refused
from service.graph.scan import LAYER_KEY, scan
from tests.export.zoo import IMAGES, ZOO, Tabular, converted, convolutional, dense, rows, settled, tabular_inputs


def exported(network: nn.Module, *inputs: Tensor, outputs: int = 1) -> Converted:
    return convert(
        network,
        inputs,
        input_names=[f"x{i}" for i in range(len(inputs))],
        output_names=[f"y{i}" for i in range(outputs)],
    )


def norm_at(network: nn.Module, path: str) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = network.get_submodule(path)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    return norm


def operators(converted: Converted) -> list[str]:
    return [node.op_type for node in converted.model.graph.node]


def test_nodes_hold_the_very_numbers_of_their_modules() -> None:
    """Every BatchNorm is one frozen node, found by its module's path, with each vector and eps bit for bit."""
    network, _ = ZOO["convolutional, after the activation"]()
    model = converted("convolutional, after the activation").model
    found = {norm.layer: norm for norm in scan(model).batchnorms}
    assert list(found) == ["2", "5"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            norm = norm_at(network, node.metadata_props[0].value)
            vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            for tensor, vector in zip(node.input[1:], vectors, strict=True):
                assert vector is not None
                assert np.array_equal(constants[tensor], vector.detach().numpy())
            assert found[node.metadata_props[0].value].epsilon == np.float32(norm.eps)


def test_nothing_is_folded_and_nothing_is_computed_from_shapes() -> None:
    """A graph is its layers: one node each, dropout gone, gamma and beta of `affine=False` as constants."""
    assert operators(converted("dense, before the activation")) == [
        "BatchNormalization",
        *["Gemm", "BatchNormalization", "Relu"] * 2,
        "Gemm",
        "Softmax",
    ]


def test_summaries_are_of_the_layers_as_trained() -> None:
    """Path, figures and the weight of the initial statistics; `affine` is the network's, not the graph's."""
    first, *_, last = converted("dense, before the activation").layers
    assert (first.layer, first.channels, first.affine) == ("0", 5, False)
    assert (last.layer, last.channels, last.affine, last.momentum) == ("6", 16, True, 0.1)
    network = nn.Sequential(nn.BatchNorm1d(5, momentum=0.25), nn.BatchNorm1d(5, momentum=None), nn.BatchNorm1d(5))
    for _ in range(3):
        network(rows(4, 5))
    norm_at(network, "2").running_mean = torch.tensor([2.5, 3.5, 4.5, 5.5, 6.5])
    one, two, three = exported(network.eval(), rows(4, 5)).layers
    assert (one.num_batches_tracked, one.initial_weight) == (3, 0.75**3)
    assert (two.momentum, two.initial_weight) == (None, 0.0)
    assert (three.running_mean.smallest, three.running_mean.largest) == (2.5, 6.5)
    assert 0.729 < three.running_var.smallest < three.running_var.largest


def test_several_inputs_outputs_and_a_shared_layer() -> None:
    """A BatchNorm that is called twice under two names is two nodes of one layer; inputs share the batch axis."""
    inputs = tabular_inputs()
    network = settled(Tabular(), *inputs)
    found = convert(network, inputs, input_names=["continuous", "categorical"], output_names=["hidden", "value"])
    edge = (*found.model.graph.input, *found.model.graph.output)
    assert [value.name for value in edge] == ["continuous", "categorical", "hidden", "value"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in edge} == {"batch"}
    assert [norm.layer for norm in scan(found.model).batchnorms] == ["standardise", "norm", "norm"]
    assert [layer.layer for layer in found.layers] == ["standardise", "norm"]


class Auxiliary(nn.Module):
    """A layer for training only, one whose output nobody uses, and one that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.training_only, self.idle, self.used = (nn.BatchNorm1d(5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        output: Tensor = self.training_only(x) if self.training else self.used(x)
        return output


def test_layers_that_the_graph_has_no_use_for_are_named() -> None:
    """They are missing from the graph, and said to be."""
    found = exported(settled(Auxiliary(), rows(7, 5)), rows(7, 5))
    assert [layer.layer for layer in found.layers] == ["used"]
    assert found.unused == ("training_only", "idle")


def test_the_network_is_bit_for_bit_what_it_was() -> None:
    """Weights, statistics, counters, modes, hooks, gradients and flags; and the caller's rows."""
    network = settled(dense(before_activation=False), rows(7, 5))
    calls: list[int] = []
    norm = norm_at(network, "3")
    hook = norm.register_forward_hook(lambda *_: calls.append(1))
    norm.weight.grad = torch.ones_like(norm.weight)
    before = copy.deepcopy(network.state_dict())
    parts = [(path, id(part), part.training) for path, part in network.named_modules()]
    parameters = [(path, id(value), value.requires_grad, value.device) for path, value in network.named_parameters()]
    x = rows(7, 5)
    exported(network, x)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].numpy().tobytes() == before[name].numpy().tobytes() for name in after)
    assert parts == [(path, id(part), part.training) for path, part in network.named_modules()]
    assert parameters == [(p, id(value), value.requires_grad, value.device) for p, value in network.named_parameters()]
    assert norm_at(network, "0").affine is False
    assert hook.id in norm._forward_hooks
    assert torch.equal(norm.weight.grad, torch.ones_like(norm.weight))
    assert torch.equal(x, rows(7, 5))


def test_the_same_network_gives_the_same_bytes_and_no_paths() -> None:
    """Nothing of the machine or the moment is in the file; the module's path is, on each node."""
    network, inputs = ZOO["dense, before the activation"]()
    content = converted("dense, before the activation").model.SerializeToString()
    again = convert(network, inputs[:1], input_names=["x"], output_names=["y"]).model
    assert again.SerializeToString() == content
    assert not re.search(rb"/[a-z]+/|\.py|site-packages|stack_trace|class_hierarchy|Sequential", content)
    for node in again.graph.node:
        assert [entry.key for entry in node.metadata_props] == [LAYER_KEY]
        assert node.name == f"{node.metadata_props[0].value}/{node.op_type}"


def test_any_runtime_of_the_last_years_can_load_it() -> None:
    """Opset and IR version are stated, and valid as onnx's full check has it."""
    model = converted("dense, before the activation").model
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET >= 17
    assert model.ir_version <= 10
    onnx.checker.check_model(model, full_check=True)


def test_one_sample_row_is_enough() -> None:
    """Attention takes an axis of one for a constant when it is traced; the batch axis is of any length all the same."""
    network, (x,) = ZOO["attention"]()
    model = convert(network, (x[:1],), input_names=["x"], output_names=["y"]).model
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_exporter_is_silent_and_only_for_that_time(capfd: pytest.CaptureFixture[str]) -> None:
    """Warnings are errors in these tests, so this one is about what is printed and what is left switched off."""
    exported(nn.BatchNorm1d(5).eval(), rows(7, 5))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


# Refusals: what is done to a sound network, and what is then said


def with_part_in_training(network: nn.Sequential) -> nn.Module:
    network[3].train()
    return network


def with_all_in_training(network: nn.Sequential) -> nn.Module:
    return network.train()


def without_statistics(network: nn.Sequential) -> nn.Module:
    network[0] = nn.BatchNorm1d(5, track_running_stats=False).eval()
    return network


def with_lost_statistics(network: nn.Sequential) -> nn.Module:
    norm_at(network, "0").running_var = None
    return network


def with_nan(network: nn.Sequential) -> nn.Module:
    norm_at(network, "0").running_mean = torch.tensor([1, 2, torch.nan, 4, 5])
    return network


def with_infinity(network: nn.Sequential) -> nn.Module:
    norm_at(network, "0").running_var = torch.tensor([1, 2, torch.inf, 4, 5])
    return network


def with_negative_variance(network: nn.Sequential) -> nn.Module:
    norm_at(network, "0").running_var = torch.tensor([1, 2, 3, 4, -0.05])
    return network


def with_a_lazy_layer(network: nn.Sequential) -> nn.Module:
    network[0] = nn.LazyBatchNorm1d().eval()
    return network


class Then(nn.Module):
    """The network, and one thing more to its output."""

    def __init__(self, network: nn.Module, more: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network = network
        self.more = more

    def forward(self, x: Tensor) -> object:
        return self.more(self.network(x))


def test_layers_of_a_wrapped_network_keep_their_names() -> None:
    """A wrapper that adds a softmax is no part of the network that people know."""
    network = settled(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), rows(7, 5))
    wrapper = Then(network, lambda y: torch.softmax(y, 1)).eval()
    found = convert(wrapper, (rows(7, 5),), input_names=["x"], output_names=["y"], wrapped="network")
    assert [layer.layer for layer in found.layers] == ["0"]
    assert [node.name for node in found.model.graph.node] == ["0/BatchNormalization", "1/Gemm", "Softmax"]
    wrapper.training = True
    with pytest.raises(Refused, match="in training mode: 'the network itself' \\(Then\\);"):
        convert(wrapper, (rows(7, 5),), input_names=["x"], output_names=["y"], wrapped="network")


def branches_on_values(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else y * 2


REFUSALS: list[tuple[Callable[[nn.Sequential], nn.Module], str]] = [
    (with_part_in_training, r"^in training mode: '3' \(ReLU\); put the whole network in eval mode with \.eval\(\)"),
    (with_all_in_training, r"'the network itself' \(Sequential\), '0' \(BatchNorm1d\).* and 7 more;"),
    (without_statistics, r"layer '0' has no running statistics \(track_running_stats=False\)"),
    (with_lost_statistics, r"layer '0' has no running statistics"),
    (with_nan, r"layer '0' has a running_mean that is not finite"),
    (with_infinity, r"layer '0' has a running_var that is not finite"),
    (with_negative_variance, r"layer '0' has a negative running_var \(-0\.05\)"),
    (with_a_lazy_layer, r"layer '0' has no shape yet"),
    (lambda network: Then(network, lambda y: y.mean(0)).eval(), r"output 'y0' has the shape \[3\]"),
    (lambda network: Then(network, lambda y: y.reshape(4, 3)).eval(), r"has the shape \[4, .*fixes the number of rows"),
    (lambda network: Then(network, lambda y: dropout(y, training=True)).eval(), r"cannot be served: Dropout .* random"),
    (lambda network: Then(network, branches_on_values).eval(), r"^PyTorch cannot trace the network"),
    (lambda network: Then(network, lambda y: torch.stack([y, y]).unbind()).eval(), r"2 output\(s\); 1 name"),
]


@pytest.mark.parametrize(("spoil", "sentence"), REFUSALS)
def test_refusals(spoil: Callable[[nn.Sequential], nn.Module], sentence: str) -> None:
    """Each is one sentence that names the layer or tensor, and what to do."""
    network = nn.Sequential(*settled(dense(before_activation=True), rows(7, 5)).children()).eval()
    with pytest.raises(Refused, match=sentence) as refused:
        exported(spoil(network), rows(7, 5))
    assert "\n" not in str(refused.value)


def folding_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.onnx.export` does unless told otherwise."""
    original = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: original(*args, **{**options, "optimize": True}))


def test_an_exporter_that_folds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 3 holds against the exporter itself: by default it folds BatchNorm away, and would say nothing."""
    folding_exporter(monkeypatch)
    with pytest.raises(Refused, match=r"layer '1' runs 1 time\(s\) in the network, but the exported graph has 0"):
        exported(settled(convolutional(before_activation=True), IMAGES), IMAGES)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "eps"])
def test_an_exporter_that_changes_a_number_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of one channel is enough."""
    original = torch.onnx.export

    def changing(module: nn.Module, *args: object, **options: object) -> object:
        norm = module.get_submodule("0")
        if name == "eps":
            norm.eps = float(np.nextafter(np.float32(norm.eps), np.float32(1)))  # type: ignore[arg-type,assignment]
        else:
            vector = getattr(norm, name)
            vector[1] = torch.nextafter(vector[1], torch.tensor(10.0))
        return original(module, *args, **options)  # type: ignore[arg-type]

    network = settled(nn.Sequential(nn.BatchNorm1d(5)), rows(7, 5))
    monkeypatch.setattr(torch.onnx, "export", changing)
    said = {"weight": "gamma", "bias": "beta"}.get(name, name)
    with pytest.raises(Refused, match=f"layer '0' has another {said} in the exported graph"):
        exported(network, rows(7, 5))


class CallsByFunction(nn.Module):
    """Its first BatchNorm holds the statistics, and a function uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.first
        called = nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, 0.1, norm.eps
        )
        answer: Tensor = self.second(called)
        return answer


def test_a_layer_that_is_used_by_function_is_known_by_its_statistics() -> None:
    """Its node is named for the layer and held against its vectors, like any other."""
    network = CallsByFunction()
    for seed in range(30):
        network(rows(16, 5, seed=seed))
    found = convert(network.eval(), [rows(9, 5)], input_names=["x"], output_names=["y"])
    assert [layer.layer for layer in found.layers] == ["first", "second"]
    assert found.unused == ()
