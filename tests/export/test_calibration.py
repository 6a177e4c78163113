"""Running statistics are the exact ones of the data: for any batches, in any order, at any depth, in any process."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn.functional import relu
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


class Dense(nn.Module):
    """DenseNet: each layer takes all that was before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for channels in (3, 5, 7)])
        self.convs = nn.ModuleList([nn.Conv2d(channels, 2, 1) for channels in (3, 5, 7)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(relu(norm(x)))], 1)
        return x


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def assert_same(one: Calibrated, other: Calibrated) -> None:
    assert [layer.layer for layer in one.layers] == [layer.layer for layer in other.layers]
    for a, b in zip(one.layers, other.layers, strict=True):
        np.testing.assert_allclose(a.mean_C, b.mean_C, rtol=SAME, atol=SAME * float(np.sqrt(b.var_C.max())))
        np.testing.assert_allclose(a.var_C, b.var_C, rtol=SAME, atol=SAME * float(b.var_C.max()))
        assert a.count == b.count


# What it promises


@pytest.mark.parametrize("name", ZOO)
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
    assert plan(Dense(), [rows(4, 3, 5, 5)]).levels == (("norms.0",), ("norms.1",), ("norms.2",))


def into_a_part(x: Tensor, normalised: Tensor) -> Tensor:
    made = torch.zeros(len(x), 5)
    made[:, :3].copy_(normalised[:, :3])
    return x * made


def without_a_result(x: Tensor, normalised: Tensor) -> Tensor:
    made = torch.zeros(len(x), 5)
    torch._foreach_add_([made], [normalised])
    return x * made


class Hidden(nn.Module):
    """The second layer depends on the first in a way that is not seen in the modules; both are called by keyword."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.BatchNorm1d(5), nn.BatchNorm1d(5), way

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.second(input=self.way(x, self.first(input=x)))
        return answer


@pytest.mark.parametrize(
    "way",
    [
        lambda x, normalised: x * normalised.abs().gt(-1).sum().sign().item(),
        lambda x, normalised: x * ((normalised > 0).long() / 3),
        into_a_part,
        without_a_result,
    ],
)
def test_dependence_is_found_where_the_data_go(way: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Into integers, parts and Python numbers, after which all that comes may depend on it."""
    x = rows(11, 5)
    assert plan(Hidden(way), [x]).levels == (("first",), ("second",))
    assert_same(calibrate(Hidden(way), [x]), calibrate(Hidden(way), [x], batch_size=4, memory_bytes=0))


def test_weights_are_no_values_of_a_row() -> None:
    """30 sums and 30 normalised ones, in float64, and three times 30 for measuring them."""
    assert plan(nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30)), [rows(6, 20)]).bytes_per_row == 5 * 30 * 8


def test_a_layer_at_two_places_has_the_statistics_of_both() -> None:
    """Where none of them depends on the other."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            answer: Tensor = self.norm(one) - self.norm(other)
            return answer

    one, other = rows(9, 5), rows(9, 5, mean=-1.0, seed=4)
    found = calibrate(Siamese(), [one, other], batch_size=4)
    exact = batch_statistics(torch.cat([one, other]).double().numpy())
    assert (found.passes, found.layers[0].count) == (1, 18)
    np.testing.assert_allclose(found.layers[0].mean_C, exact.mean_C, rtol=1e-12)
    np.testing.assert_allclose(found.layers[0].var_C, exact.var_C, rtol=1e-12)


class WritesIntoItsOwn(nn.Module):
    """Fills a tensor that it makes, in float32 as torch makes it, and divides whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        filled = torch.zeros(len(x), 5)
        filled[:, :3] = x[:, :3]
        filled[:, 3:] += x[:, 3:] * (torch.arange(2) / 2)
        answer: Tensor = self.norm(filled)
        return answer


def test_what_a_network_writes_into_its_own_tensor_is_measured() -> None:
    x = rows(9, 5)
    (layer,) = calibrate(WritesIntoItsOwn(), [x]).layers
    exact = batch_statistics((x.double() * torch.tensor([1, 1, 1, 0, 0.5])).numpy())
    np.testing.assert_allclose(layer.mean_C, exact.mean_C, rtol=1e-12)
    np.testing.assert_allclose(layer.var_C, exact.var_C, rtol=1e-12)


class OfSome(nn.Module):
    """A layer that sees a part of the rows: none, in some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(x[x[:, 0] > 2.8])
        return answer


def test_a_layer_that_a_batch_does_not_reach() -> None:
    """It adds nothing, and no NaN."""
    x = rows(20, 5)
    x = x[x[:, 0].argsort(descending=True)]
    assert 2 < int((x[:, 0] > 2.8).sum()) < 18
    assert_same(calibrate(OfSome(), [x]), calibrate(OfSome(), [x], batch_size=1, memory_bytes=0))


class FailsInTheMiddle(nn.Module):
    """Between its layers, once a value is above 100: which the first two rows do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if (x > 100).any():
            raise ValueError("above 100")
        answer: Tensor = self.second(hidden)
        return answer


FAILING = torch.cat([rows(7, 5), torch.full((1, 5), 101.0)])


def everything(network: nn.Module) -> list[object]:
    """State in bytes, modes, gradients and hooks."""
    return [
        {key: value.numpy().tobytes() for key, value in network.state_dict().items()},
        [part.training for part in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [(*part._forward_pre_hooks, *part._forward_hooks) for part in network.modules()],
    ]


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
@pytest.mark.parametrize("x", [FAILING[:7], FAILING])
def test_the_network_is_bit_for_bit_what_it_was(x: Tensor, memory_bytes: int) -> None:
    """Also where it fails in the middle."""
    network = FailsInTheMiddle().train()
    network.second.eval()
    network.first.requires_grad_(False)
    before = everything(network)
    if x is FAILING:
        with pytest.raises(Refused, match="the network fails on these rows: above 100"):
            calibrate(network, [x], batch_size=3, memory_bytes=memory_bytes)
    else:
        calm = applied(network, calibrate(network, [x], batch_size=3, memory_bytes=memory_bytes))
        assert everything(calm)[1:] == before[1:]
    assert everything(network) == before


def test_what_is_never_called_is_named_and_left_alone() -> None:
    """A spare BatchNorm, and InstanceNorm, which has running statistics of another meaning."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.instance, self.norm = nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3)
            self.spare = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.norm(self.instance(x))
            return answer

    network = Spare()
    found = calibrate(network, [rows(8, 3, 6)])
    assert ([layer.layer for layer in found.layers], found.unused) == (["norm"], ("spare",))
    calm = applied(network, found).state_dict()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, calm[key])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


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


def test_statistics_of_another_network() -> None:
    with pytest.raises(WrongCall, match="no BatchNorm '1' of 7 channels"):
        applied(nn.Sequential(nn.Linear(5, 1), nn.BatchNorm1d(1)), calibrate(mlp(), [rows(9, 5)]))


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


class OnlyInCompany(nn.Module):
    """Code that branches on the number of rows (notes, F9)."""

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.norm, self.other, self.alone = nn.BatchNorm1d(5), nn.BatchNorm1d(5), alone

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(x) if (len(x) == 1) == self.alone else x
        answer: Tensor = self.other(hidden)
        return answer


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.kept = nn.BatchNorm1d(5), torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        self.kept += x.sum(0)
        answer: Tensor = self.norm(x + self.kept)
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
        (mlp(), [], "no rows"),
        (OnlyInCompany(), [rows(4, 5)], "layer 'norm' runs 0 times for a batch of 1 and 1 times for the first two"),
        (OnlyInCompany(alone=True), [rows(4, 5)], "layer 'norm' runs 1 times for a batch of 1 and 0 times for the fi"),
        (Keeps(), [rows(4, 5)], "writes into a float32 tensor that it keeps"),
        (nn.Sequential(nn.LazyBatchNorm1d()), [rows(4, 5)], "lazy layers that never saw a row"),
    ],
)
def test_what_cannot_be_measured(network: nn.Module, inputs: list[Tensor], sentence: str) -> None:
    with pytest.raises((Refused, WrongCall), match=sentence):
        calibrate(network, inputs, batch_size=3, memory_bytes=0)


def test_a_batch_has_rows() -> None:
    with pytest.raises(WrongCall, match="a batch of 0 rows"):
        calibrate(mlp(), [rows(4, 5)], batch_size=0)


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


def test_a_failure_in_the_middle() -> None:
    """The usual tool leaves the network in train mode, its momentum lost and its statistics reset."""
    usual = FailsInTheMiddle().eval()
    before = everything(usual)
    with pytest.raises(ValueError, match="above 100"):
        update_bn(loader(FAILING, 8), usual)
    assert usual.training
    assert [norm.momentum for norm in norms(usual)] == [None, None]
    ours = FailsInTheMiddle().eval()
    with pytest.raises(Refused, match="above 100"):
        calibrate(ours, [FAILING])
    assert everything(ours)[1:] == before[1:]
    assert [norm.momentum for norm in norms(ours)] == [0.1, 0.1]


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

Divided = Callable[[Tensor, int], Tensor]
SHARDS: dict[str, tuple[int, int, Divided, int]] = {
    "one pass": (23, 2**30, lambda x, rank: shard([x], rank, 2)[0], 1),
    "a pass for each level": (23, 0, lambda x, rank: shard([x], rank, 2)[0], 3),
    "one batch more": (17, 0, lambda x, rank: shard([x], rank, 2)[0], 3),
    "no rows": (23, 2**30, lambda x, rank: x[: 23 * rank], 3),
    "a single row": (23, 2**30, lambda x, rank: x[:1] if rank else x[1:], 1),
}
"""How many rows, the memory, what each process gets of them, and the passes: inside one only where all can."""


def run_as_one_of_two(folder: str) -> None:
    """What each process does; `test_two_processes_are_one` starts them."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank = distributed.get_rank()
    found: dict[str, object] = {}
    for name, (count, memory_bytes, divided, _) in SHARDS.items():
        share = divided(rows(count, 5), rank)
        got = calibrate(mlp(), [share], batch_size=4, memory_bytes=memory_bytes)
        found[name] = (
            got.rows,
            got.passes,
            {layer.layer: (layer.mean_C, layer.var_C, layer.count) for layer in got.layers},
        )
    broken = {"its rows do not fit": rows(8, 6), "above 100": FAILING, "nothing at all": rows(0, 5)}
    for name, share in broken.items():
        for memory_bytes in (2**30, 0):
            mine = share if rank or name == "nothing at all" else FAILING[:7]
            try:
                calibrate(FailsInTheMiddle(), [mine], batch_size=2, memory_bytes=memory_bytes)
            except (Refused, WrongCall) as error:
                found[f"{name}, {memory_bytes}"] = str(error)
    torch.save(found, f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; they start once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    program = f"from tests.export.test_calibration import run_as_one_of_two; run_as_one_of_two({str(folder)!r})"
    started = [
        subprocess.Popen([sys.executable, "-c", program], env={**environment, "RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=50) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDS)
def test_two_processes_are_one(name: str, two_processes: list[dict[str, Any]]) -> None:
    """Each has its own rows, not as many, not in as many batches, or none; both get what one process gets."""
    count, _, _, wanted_passes = SHARDS[name]
    alone = calibrate(mlp(), [rows(count, 5)])
    for found in two_processes:
        total, passes, layers = found[name]
        assert (total, passes) == (count, wanted_passes)
        for layer in alone.layers:
            mean_C, var_C, seen = layers[layer.layer]
            np.testing.assert_allclose(mean_C, layer.mean_C, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(var_C, layer.var_C, rtol=1e-12)
            assert seen == layer.count


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [2**30, 0])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("its rows do not fit", "the network fails on these rows"),
        ("above 100", "the network fails on these rows: above 100"),
        ("nothing at all", "there are no rows"),
    ],
)
def test_where_one_process_fails_all_do(
    name: str, sentence: str, memory_bytes: int, two_processes: list[dict[str, Any]]
) -> None:
    """With the same sentence, and nobody waits: not before the first pass, and not inside one."""
    first, second = (found[f"{name}, {memory_bytes}"] for found in two_processes)
    assert first == second
    assert first.startswith(sentence)


def test_shards_are_a_division() -> None:
    x = rows(7, 2)
    parts = [shard([x], rank, 3)[0] for rank in range(3)]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == sorted(x[:, 0].tolist())


# Where a layer computes, and not where it is called


class Turned(nn.BatchNorm1d):
    """A BatchNorm for [N, L, C], as sequence models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.first
        called = nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-5
        )
        answer: Tensor = self.second(called.relu())
        return answer


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_a_layer_that_turns_its_input_is_measured_on_what_it_normalises(memory_bytes: int) -> None:
    """Also where both axes are equally long, and nothing else would show."""
    x = rows(9, 4, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    (layer,) = calibrate(nn.Sequential(Turned(4)), [x], memory_bytes=memory_bytes, batch_size=2).layers
    np.testing.assert_allclose(layer.mean_C, x.double().mean((0, 1)).numpy(), rtol=1e-12)
    assert layer.count == 36


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_a_layer_that_a_function_uses_is_measured(memory_bytes: int) -> None:
    """Were it not, the layers behind it would be measured behind stale statistics, and nobody would say so."""
    x = rows(12, 5)
    found = calibrate(ByFunction(), [x], memory_bytes=memory_bytes, batch_size=5)
    assert [layer.layer for layer in found.layers] == ["first", "second"]
    assert (found.unused, found.passes) == ((), 1 if memory_bytes else 2)
    behind = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).relu()
    np.testing.assert_allclose(found.layers[1].mean_C, behind.double().mean(0).numpy(), rtol=1e-5)
