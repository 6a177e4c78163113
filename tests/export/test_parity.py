"""The ONNX model is the network in eval mode, within rounding, and what is not is told apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.conversion import convert
from export.parity import LEVELS, Difference, Parity, measure, refusal, torch_outputs, train_eval_divergence
from export.rounding import analyse
from service.errors import Refused
from service.numerics import largest_difference
from service.runtime import OnnxRuntime, place
from tests.export.zoo import ZOO, Tabular, converted, dense, rows, settled, tabular_inputs

SAME = onnx.helper.make_model(
    onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 5])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 5])],
    ),
    opset_imports=[onnx.helper.make_opsetid("", 18)],
    ir_version=10,
)
"""y = x"""

# A conversion takes a second: those whose layers another one has, or whose layers are not ours, wait for more time.
SLOW = {"dense, wide", "dense, deep", "dense, large values", "dense, tiny values", "attention", "other norms"}
NETWORKS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ZOO]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_equals_its_eval_mode(name: str) -> None:
    """At batch 1, 2, 3 and all rows, at each optimisation level, within twice the rounding of this network."""
    network, inputs = ZOO[name]()
    parity = measure(network, converted(name).model, inputs, ["y"])
    assert refusal(parity) is None
    assert {d.batch_size for d in parity.differences} == {1, 2, 3, len(inputs[0])}
    assert {d.level for d in parity.differences} == set(LEVELS)
    assert max(d.largest for d in parity.differences) > 0  # something was compared


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_itself_is_within_the_bound_of_the_exact_answer(name: str) -> None:
    """The other half of the promise: onnxruntime, fusions and all, is as near to float64 as PyTorch must be."""
    network, inputs = ZOO[name]()
    analysis = analyse(network, inputs)
    (got,) = OnnxRuntime(converted(name).model.SerializeToString(), place("cpu"), threads=1).run([inputs[0].numpy()])
    assert largest_difference(got, analysis.exact[0].numpy()) <= analysis.bounds[0]


@pytest.mark.parametrize("name", ["dense, before the activation", "convolutional, after the activation"])
def test_train_mode_is_far_outside(name: str) -> None:
    """What BatchNorm would do with the batch's statistics is more than 1,000 times what rounding explains."""
    network, inputs = ZOO[name]()
    divergence = train_eval_divergence(network, inputs)
    assert divergence is not None
    (bound,) = analyse(network, inputs).bounds
    assert divergence[0] > 1000 * 2 * bound


def test_divergence_is_unknown_without_a_batch_or_without_batchnorm() -> None:
    """One row has no statistics in train mode; a network without BatchNorm has no second mode."""
    network, (x,) = ZOO["dense, before the activation"]()
    assert train_eval_divergence(network, (x[:1],)) is None
    assert train_eval_divergence(nn.Sequential(nn.Linear(5, 2)).eval(), (x,)) is None
    assert not any(part.training for part in network.modules())


def test_several_inputs_and_outputs_have_their_own_figures() -> None:
    """Each output has its bound, its differences and its tolerance for the passport, which is twice the bound."""
    inputs = tabular_inputs()
    network = settled(Tabular(), *inputs)
    names = ["hidden", "value"]
    model = convert(network, inputs, input_names=["continuous", "categorical"], output_names=names).model
    parity = measure(network, model, inputs, names)
    assert refusal(parity) is None
    assert list(parity.tolerances) == names
    assert all(parity.tolerances[name].absolute == 2 * parity.bounds[name] for name in names)
    assert len(parity.figures) == 2 * (2 + len(LEVELS))
    assert all(figure.difference <= figure.bound for figure in parity.figures)


def changed(model: onnx.ModelProto, position: int, scale: float) -> onnx.ModelProto:
    """The model with one input vector of its last BatchNormalization scaled."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name = [node for node in copy.graph.node if node.op_type == "BatchNormalization"][-1].input[position]
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * scale).astype(np.float32), name))
    return copy


@pytest.mark.parametrize("position", [1, 2, 3, 4], ids=["gamma", "beta", "running_mean", "running_var"])
def test_a_changed_vector_is_refused(position: int) -> None:
    """One per mille off in one vector of one layer is not rounding."""
    network, inputs = ZOO["dense, after the activation"]()
    model = changed(converted("dense, after the activation").model, position, 1.001)
    sentence = refusal(measure(network, model, inputs, ["y"]))
    assert sentence is not None
    assert "output 'y' of the ONNX model" in sentence
    assert "rounding explains at most" in sentence


class BranchesOnBatchSize(nn.Module):
    """The fix that is no fix for "Expected more than 1 value per channel"."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(x) if x.shape[0] != 1 else x
        return output


def test_code_that_branches_on_the_batch_size_is_found() -> None:
    """It exports without a word; a lone row then gets another answer than PyTorch's."""
    inputs = (rows(7, 5),)
    network = settled(BranchesOnBatchSize(), *inputs)
    model = convert(network, inputs, input_names=["x"], output_names=["y"]).model
    sentence = refusal(measure(network, model, inputs, ["y"]))
    assert sentence is not None
    assert "only batches of 1 are wrong" in sentence


class Standardises(nn.Module):
    """BatchNorm by hand, with the statistics of the batch, in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 0.03).sqrt()


def test_a_network_that_mixes_its_batch_is_refused_by_name() -> None:
    """The ONNX model agrees with PyTorch here; that the answer depends on the batch is the fault."""
    inputs = (rows(7, 5),)
    model = convert(Standardises().eval(), inputs, input_names=["x"], output_names=["y"]).model
    sentence = refusal(measure(Standardises().eval(), model, inputs, ["y"]))
    assert sentence is not None
    assert "the network mixes its batch" in sentence


class Random(nn.Module):
    """Noise that no mode switches off."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_randomness_is_not_taken_for_rounding() -> None:
    """PyTorch against itself is the first thing compared: the bound of a random network would allow its randomness."""
    sentence = refusal(measure(Random().eval(), SAME, (rows(7, 5),), ["y"]))
    assert sentence is not None
    assert "is random" in sentence


def test_an_answer_that_is_not_finite_is_refused() -> None:
    """NaN equals nothing, so it must not become a golden output."""
    network, (x,) = ZOO["dense, after the activation"]()
    poisoned = x.clone()
    poisoned[3, 1] = torch.inf
    sentence = refusal(measure(network, converted("dense, after the activation").model, (poisoned,), ["y"]))
    assert sentence is not None
    assert "not finite" in sentence


class NeedsThreeRows(nn.Module):
    """Fails where training never went."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 3:
            raise IndexError("no third row")
        return x


def test_failing_at_some_batch_size_is_refused() -> None:
    """An exception of the network's own code is a sentence too."""
    with pytest.raises(Refused, match="PyTorch fails on a batch of 1: no third row"):
        measure(NeedsThreeRows().eval(), SAME, (rows(7, 5),), ["y"])


def test_one_row_is_enough() -> None:
    """Batches of 2 and 3 are then made of that row."""
    network, (x,) = ZOO["dense, after the activation"]()
    parity = measure(network, converted("dense, after the activation").model, (x[:1],), ["y"])
    assert refusal(parity) is None
    assert {d.batch_size for d in parity.differences} == {1, 2, 3}


EQUAL = Parity(
    bounds={"y": 1e-6},
    torch_errors={"y": 1e-7},
    largest={"y": 5.0},
    torch_batch_effects={"y": 2e-6},
    differences=tuple(
        Difference(output="y", batch_size=size, level=level, largest=2e-6) for size in (1, 5) for level in LEVELS
    ),
    not_finite=(),
    random=(),
)


def with_difference(largest: float, *, batch_sizes: set[int], levels: set[str]) -> Parity:
    return dataclasses.replace(
        EQUAL,
        differences=tuple(
            dataclasses.replace(d, largest=largest) if d.batch_size in batch_sizes and d.level in levels else d
            for d in EQUAL.differences
        ),
    )


JUDGED = {
    "is not finite": dataclasses.replace(EQUAL, not_finite=("y",)),
    "is random": dataclasses.replace(EQUAL, random=("y",)),
    "is 1.1e-06 away from the same network in float64": dataclasses.replace(EQUAL, torch_errors={"y": 1.1e-6}),
    "the network mixes its batch": dataclasses.replace(EQUAL, torch_batch_effects={"y": 2.1e-6}),
    "is 0.5 away from PyTorch": with_difference(0.5, batch_sizes={1, 5}, levels=set(LEVELS)),
    "only batches of 1 are wrong": with_difference(0.5, batch_sizes={1}, levels=set(LEVELS)),
    "only at optimisation 'basic', 'all'": with_difference(0.5, batch_sizes={1, 5}, levels={"basic", "all"}),
    "is nan away": with_difference(float("nan"), batch_sizes={1, 5}, levels=set(LEVELS)),
    "is inf away": with_difference(float("inf"), batch_sizes={1, 5}, levels=set(LEVELS)),
}


def test_exactly_the_allowed_is_allowed() -> None:
    """One bound from the exact answer, two between two answers."""
    assert refusal(EQUAL) is None


@pytest.mark.parametrize("said", JUDGED)
def test_judging_needs_no_engine(said: str) -> None:
    """Figures in, sentence out: each fault has its own."""
    sentence = refusal(JUDGED[said])
    assert sentence is not None
    assert "'y'" in sentence
    assert said in sentence


def test_torch_outputs_follow_the_modules_mode() -> None:
    """Nothing is switched behind the caller's back."""
    network = settled(dense(before_activation=True), rows(9, 5))
    first, again = (torch_outputs(network, (rows(9, 5),))[0] for _ in range(2))
    assert np.array_equal(first, again)
    network.train()
    assert not np.array_equal(first, torch_outputs(network, (rows(9, 5),))[0])


def test_a_tolerance_as_large_as_the_answer_says_nothing() -> None:
    """A variance near 0 behind values far from it: rounding decides the answer, and equality within it is refused."""
    network = nn.Sequential(nn.BatchNorm1d(5)).eval()
    network.get_buffer("0.running_mean").fill_(3.0)
    network.get_buffer("0.running_var").fill_(1e-14)
    network[0].eps = 1e-14  # type: ignore[assignment]
    x = torch.full((4, 5), 3.0)
    model = convert(network, [x], input_names=["x"], output_names=["y"]).model
    sentence = refusal(measure(network, model, [x + 4.8e-7], ["y"]))
    assert sentence is not None
    assert "rounding alone may move PyTorch's output 'y' by" in sentence
