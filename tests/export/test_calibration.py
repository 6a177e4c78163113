"""Running statistics are the exact ones of the data: for any batches, in any order, at any depth, in any process."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from export.batchnorm import batch_statistics
from export.calibration import Calibrated, applied, calibrate, plan, shard
from service.errors import Refused, WrongCall
from tests.export.zoo import ZOO, Residual, rows, settled

SAME = 1e-12
"""Relative: 10,000 times float64's unit roundoff, for sums of thousands of terms through a few layers."""


def mlp(depth: int = 3, *, dropout: float = 0.4, seed: int = 5) -> nn.Module:
    """Blocks of Linear, BatchNorm, ReLU and Dropout over 5 features with means far from 0."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide in (5, *[7] * (depth - 1)):
        layers += [nn.Linear(wide, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(7, 3))


class Parallel(nn.Module):
    """Two branches and a join: the branches are one level, the join the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.join(torch.cat([self.a(x).relu_(), self.b(-x)], 1))
        return answer


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def assert_same(one: Calibrated, other: Calibrated) -> None:
    assert [layer.layer for layer in one.layers] == [layer.layer for layer in other.layers]
    for a, b in zip(one.layers, other.layers, strict=True):
        np.testing.assert_allclose(a.mean_C, b.mean_C, rtol=SAME, atol=SAME * float(np.sqrt(b.var_C.max())))
        np.testing.assert_allclose(a.var_C, b.var_C, rtol=SAME, atol=SAME * float(b.var_C.max()))
        assert a.count == b.count


# What it promises


@pytest.mark.parametrize(
    "name", ["dense, after the activation", "convolutional, after the activation", "residual", "transposed"]
)
def test_eval_mode_then_answers_what_train_mode_would_for_all_data_as_one_batch(name: str) -> None:
    """The definition: so the variance is the population's."""
    network, inputs = ZOO[name]()
    calm = applied(network.double(), calibrate(network, inputs))
    wide = [tensor.double() for tensor in inputs]
    training = copy.deepcopy(calm)
    for norm in norms(training):
        norm.train()
    with torch.no_grad():
        torch.testing.assert_close(calm(*wide), training(*wide), rtol=1e-9, atol=1e-9)


def test_each_layer_is_what_numpy_finds_behind_calibrated_layers() -> None:
    """Written apart: the layers one by one, in float64."""
    network, x = mlp(), rows(23, 5)
    found = calibrate(network, [x])
    h = x.double().numpy()
    for i, layer in zip((0, 4, 8), found.layers, strict=True):
        linear, norm = network[i], network[i + 1]  # type: ignore[index]
        h = h @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
        exact = batch_statistics(h)
        np.testing.assert_allclose(layer.mean_C, exact.mean_C, rtol=1e-12)
        np.testing.assert_allclose(layer.var_C, exact.var_C, rtol=1e-12)
        assert layer.count == 23
        h = np.maximum((h - exact.mean_C) / np.sqrt(exact.var_C + norm.eps), 0)


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 40), seed=st.integers(0, 10_000), count=st.integers(2, 37))
def test_batches_and_order_do_not_matter(batch_size: int, seed: int, count: int) -> None:
    """Any batch size, any order, any size of the last batch: the same statistics to 1e-12."""
    network, x = mlp(), rows(count, 5, seed=seed)
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    in_one = calibrate(network, [x])
    in_batches = calibrate(network, [shuffled], batch_size=batch_size, memory_bytes=0)
    assert (in_one.passes, in_batches.passes) == (1, 3)
    assert_same(in_one, in_batches)


@pytest.mark.parametrize("name", ZOO)
def test_one_pass_is_as_many_passes_as_there_are_levels(name: str) -> None:
    """Every architecture: what fits in memory is measured in one pass, with the same result."""
    if "10,000 std" in name:
        pytest.skip("its own rounding is 10,000 times as large")
    network, inputs = ZOO[name]()
    assert_same(calibrate(network, inputs), calibrate(network, inputs, batch_size=4, memory_bytes=0))


def test_independent_layers_share_a_pass() -> None:
    """Found by following the data, through an in-place operator as well."""
    x = rows(6, 4)
    assert plan(Parallel(), [x]).levels == (("a", "b"), ("join",))
    images = rows(4, 6, 5, 5)
    block = nn.ModuleDict({"main": nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), "short": nn.BatchNorm2d(6)})

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.block["main"](x) + self.block["short"](x)
            return answer

    assert plan(Shortcut(), [images]).levels == (("block.main.1", "block.short"),)
    assert len(plan(nn.Sequential(Residual(6), Residual(6)), [images]).levels) == 4


def test_the_network_is_bit_for_bit_what_it_was() -> None:
    """Modes, hooks and buffers too, also where it fails in the middle."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.second(self.first(x))
            return answer

    network = Fails().train()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(Refused, match="the network fails on these rows"):
        calibrate(network, [rows(8, 5)])
    assert network.training
    assert all(not part._forward_pre_hooks for part in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_is_applied_is_all_that_changes() -> None:
    """Modes and gradients stay; the count of batches stays, or becomes 1, so that no batch replaces everything."""
    network = mlp().train()
    network[1].num_batches_tracked.fill_(17)  # type: ignore[index]
    network[5].momentum = None  # type: ignore[index]
    calm = applied(network, calibrate(network, [rows(30, 5)]))
    assert calm.training
    assert [int(norm.num_batches_tracked) for norm in norms(calm) if norm.num_batches_tracked is not None] == [17, 1, 1]
    for key, value in network.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(calm.state_dict()[key], value)
    assert all(parameter.requires_grad for parameter in calm.parameters())


def test_layers_without_statistics_get_them() -> None:
    """track_running_stats=False: the one way out (notes, F6)."""
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
    found = calibrate(network, [rows(9, 5)])
    assert found.layers[0].old_mean_C is None
    (norm,) = norms(applied(network, found).eval())
    assert norm.track_running_stats
    assert norm.running_var is not None
    np.testing.assert_allclose(norm.running_var.numpy(), found.layers[0].var_C, rtol=1e-6)
    assert norms(network)[0].running_mean is None


def test_half_precision() -> None:
    """Measured in float64; what float16 cannot hold is refused and not infinite."""
    network = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), rows(9, 5)).half()
    calm = applied(network, calibrate(network, [rows(9, 5).half()]))
    assert norms(calm)[0].running_var.dtype == torch.float16  # type: ignore[union-attr]
    with pytest.raises(Refused, match="layer '1' has a running_var too large for float16"):
        applied(network, calibrate(network, [rows(9, 5).half() * 5000]))


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    calibrate(mlp(), [rows(10, 5)], batch_size=4, memory_bytes=0, on_progress=lambda *at: told.append(at))
    assert told == [(i, 9) for i in range(1, 10)]


# What it refuses


class FeedsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(self.norm(x).relu())
        return answer


@pytest.mark.parametrize(
    ("network", "inputs", "sentence"),
    [
        (mlp(), [rows(0, 5)], "no rows"),
        (Parallel(), [rows(4, 4), rows(3, 4)], "different numbers of rows"),
        (nn.Linear(5, 2), [rows(4, 5)], "no BatchNorm layer"),
        (FeedsItself(), [rows(4, 5)], "layer 'norm' runs 2 times and its later input depends on its earlier output"),
        (mlp(), [rows(1, 5)], "layer '1' sees a single value in each channel"),
        (mlp(), [rows(4, 5) * torch.inf], "layer '1' is reached by NaN or infinity"),
        (mlp(), [rows(4, 6)], "the network fails on these rows"),
    ],
)
def test_what_cannot_be_measured(network: nn.Module, inputs: list[Tensor], sentence: str) -> None:
    with pytest.raises((Refused, WrongCall), match=sentence):
        calibrate(network, inputs)


# What the usual tool does on the same data (notes, facts 7, F3, F7, F10, F14)


def loader(x: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def test_sorted_data() -> None:
    """One class per batch: the average of the batches' variances knows nothing of what lies between them."""
    x = torch.cat([rows(50, 4, mean=-5.0, std=1.0), rows(50, 4, mean=5.0, std=1.0, seed=2)])
    usual, exact = nn.BatchNorm1d(4), x.double().var(0, correction=0)
    update_bn(loader(x, 50), nn.Sequential(usual))
    assert usual.running_var is not None
    assert float(usual.running_var.max()) < 2  # of 26
    (layer,) = calibrate(nn.Sequential(nn.BatchNorm1d(4)), [x], batch_size=50, memory_bytes=0).layers
    np.testing.assert_allclose(layer.var_C, exact.numpy(), rtol=1e-12)


def test_a_last_batch_of_one_image() -> None:
    """It weighs as much as the hundred before it."""
    x = torch.cat([rows(100, 3, 4, 4, mean=0.0), rows(1, 3, 4, 4, mean=1000.0)])
    usual = nn.BatchNorm2d(3)
    update_bn(loader(x, 100), nn.Sequential(usual))
    assert usual.running_mean is not None
    assert float(usual.running_mean.min()) > 450
    (layer,) = calibrate(nn.Sequential(nn.BatchNorm2d(3)), [x]).layers
    assert np.all(np.abs(layer.mean_C - 1000 / 101) < 0.1)


def test_no_data() -> None:
    """The usual tool leaves mean 0 and variance 1 and says nothing."""
    usual = settled(nn.Sequential(nn.BatchNorm1d(5)), rows(9, 5))
    update_bn(loader(rows(0, 5), 4), usual)
    assert torch.equal(norms(usual)[0].running_var, torch.ones(5))  # type: ignore[arg-type]
    with pytest.raises(WrongCall, match="no rows"):
        calibrate(usual, [rows(0, 5)])


def test_small_batches_in_a_deep_network() -> None:
    """Measured behind layers that normalise by the batch, the last layer sees something else than in eval mode."""
    network, x = mlp(6, dropout=0.0), rows(512, 5)
    usual = copy.deepcopy(network)
    update_bn(loader(x, 4), usual)
    last_input: list[Tensor] = []

    def normalised_variance(it: nn.Module) -> float:
        last = norms(it)[-1]
        hook = last.register_forward_pre_hook(lambda _, args: last_input.append(args[0]))
        with torch.no_grad():
            it.eval()(x)
        hook.remove()
        assert last.running_var is not None
        return float((last_input[-1].var(0, correction=0) / (last.running_var + last.eps)).mean())

    assert abs(normalised_variance(usual) - 1) > 0.1
    assert abs(normalised_variance(applied(network, calibrate(network, [x]))) - 1) < 1e-3


def test_dropout_is_off() -> None:
    """update_bn calls model.train(), and gathers the statistics with dropout on; inference has it off."""
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
    x = rows(4000, 5)
    usual = copy.deepcopy(network)
    update_bn(loader(x, 4000), usual)
    (layer,) = calibrate(network, [x]).layers
    assert float(norms(usual)[0].running_var.mean()) > 100 * layer.var_C.mean()  # type: ignore[union-attr]
    np.testing.assert_allclose(layer.var_C, x.double().var(0, correction=0).numpy(), rtol=1e-12)


# Several processes

PROGRAM = """
import sys, torch
from torch import distributed
from export.calibration import calibrate, shard
from tests.export.test_calibration import mlp
from tests.export.zoo import rows
distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
count, memory = int(sys.argv[1]), int(sys.argv[2])
found = calibrate(mlp(), shard([rows(count, 5)], rank, world), batch_size=4, memory_bytes=memory)
torch.save({layer.layer: (layer.mean_C, layer.var_C, layer.count) for layer in found.layers}, f"{sys.argv[3]}/{rank}")
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "memory_bytes"), [(23, 2**30), (23, 0), (1 + 2 * 8, 0)])
def test_two_processes_are_one(count: int, memory_bytes: int, tmp_path: Path) -> None:
    """Each has its own rows, not as many and not in as many batches; both get what one process gets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", PROGRAM, str(count), str(memory_bytes), str(tmp_path)]
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=50) for process in started] == [0, 0]
    alone = calibrate(mlp(), [rows(count, 5)])
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=False)
        for layer in alone.layers:
            mean_C, var_C, seen = found[layer.layer]
            np.testing.assert_allclose(mean_C, layer.mean_C, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(var_C, layer.var_C, rtol=1e-12)
            assert seen == layer.count


def test_shards_are_a_division() -> None:
    x = rows(7, 2)
    parts = [shard([x], rank, 3)[0] for rank in range(3)]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == sorted(x[:, 0].tolist())
