"""A file that PyTorch itself exports in training mode is rescued, and one that never learned is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from service.errors import Refused
from service.graph.fold import fold
from service.graph.freeze import freeze
from service.runtime import OnnxRuntime, place
from tests.export.zoo import rows

SAMPLE = rows(16, 5, seed=2)


def new_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.BatchNorm1d(5, eps=0.03),
        nn.Linear(5, 7),
        nn.BatchNorm1d(7, eps=0.03, momentum=0.2),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(7, 4),
        nn.ReLU(),
        nn.BatchNorm1d(4, eps=0.03),
        nn.Linear(4, 3),
    )


def trained_network(steps: int = 25) -> nn.Sequential:
    network = new_network().train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(steps):
        batch = rows(32, 5, seed=step)
        loss = (network(batch) - batch[:, :3] ** 2).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network


def in_training_mode(network: nn.Module, file: Path, *, any_batch: bool = True) -> onnx.ModelProto:
    """What the TorchScript exporter writes of a network in training mode; it moves the network's statistics once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is old, and that tracing changes a counter
        torch.onnx.export(
            network,
            (SAMPLE,),
            str(file),
            dynamo=False,
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}} if any_batch else None,
        )
    return onnx.load_model(file)


def answers(model: onnx.ModelProto, x: Tensor) -> NDArray[Any]:
    return OnnxRuntime(model.SerializeToString(), place("cpu"), threads=1).run([x.numpy()])[0]


def test_a_trained_network_is_rescued(tmp_path: Path) -> None:
    """Frozen, it answers as PyTorch does in eval mode; folded as well, and then nothing of BatchNorm is left."""
    network = trained_network()
    model = in_training_mode(network, tmp_path / "model.onnx")
    result = freeze(model)
    onnx.checker.check_model(result.model, full_check=True)
    assert [layer.channels for layer in result.layers] == [5, 7, 4]
    assert all(layer.least_updates <= 26 for layer in result.layers)
    assert max(layer.least_updates for layer in result.layers) >= 10
    assert result.dropouts == 1

    x = rows(9, 5, seed=99)
    with torch.no_grad():
        want = network.eval()(x).numpy()
    tolerance = (
        200 * 2**-24 * float(np.abs(want).max())
    )  # some dozen sums of float32 in a row, 4 of its bits for folding
    np.testing.assert_allclose(answers(result.model, x), want, rtol=0, atol=tolerance)

    folded = fold(result.model)
    assert [entry.side for entry in folded.folds] == ["after", "before", "after"]
    assert "BatchNormalization" not in {node.op_type for node in folded.model.graph.node}
    np.testing.assert_allclose(answers(folded.model, x), want, rtol=0, atol=tolerance)


def test_the_file_holds_the_statistics_that_the_exporter_moved(tmp_path: Path) -> None:
    """One update more than the training made, of the exporter's sample: what no file can tell."""
    network = trained_network()
    norm = network[2]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_var is not None
    before = norm.running_var.clone()
    model = in_training_mode(network, tmp_path / "model.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not torch.equal(norm.running_var, before)
    np.testing.assert_array_equal(constants["2.running_var"], norm.running_var.numpy())


def test_a_new_network_is_refused_though_the_exporter_moved_its_statistics(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nothing proves that the statistics"):
        freeze(in_training_mode(new_network().train(), tmp_path / "model.onnx"))


def test_statistics_that_are_not_tracked_cannot_be_frozen(tmp_path: Path) -> None:
    """The exporter writes what computes them from the batch, and can for a batch of one length only."""
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)).train()
    with pytest.raises(Refused, match=r"never learned \(track_running_stats=False\)"):
        freeze(in_training_mode(network, tmp_path / "model.onnx", any_batch=False))
