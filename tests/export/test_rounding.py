"""The bound on rounding holds for what really happens, and everything worse than rounding exceeds it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.rounding import analyse, flattened
from service.errors import Refused
from tests.export.zoo import ZOO, rows, settled


def norms(network: nn.Module) -> list[_BatchNorm]:
    return [part for part in network.modules() if isinstance(part, _BatchNorm)]


def outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return flattened(network(*inputs))


def farthest(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


@pytest.mark.parametrize("name", ZOO)
def test_pytorch_is_within_the_bound_of_the_exact_answer(name: str) -> None:
    """Computed in float32, no output of any network lies farther from float64 than its bound."""
    network, inputs = ZOO[name]()
    analysis = analyse(network, inputs)
    for output, exact, bound in zip(outputs(network, inputs), analysis.exact, analysis.bounds, strict=True):
        assert exact.dtype == torch.float64
        assert 0 < farthest(output, exact) <= bound


@pytest.mark.parametrize("name", ZOO)
def test_the_bound_is_near_what_really_happens(name: str) -> None:
    """Not more than 300 times the real error, or 3,000 with norms that some kernels compute as E[x**2] - E[x]**2."""
    network, inputs = ZOO[name]()
    analysis = analyse(network, inputs)
    for output, exact, bound in zip(outputs(network, inputs), analysis.exact, analysis.bounds, strict=True):
        assert bound <= (3000 if name == "other norms" else 300) * farthest(output, exact)


class Alone(nn.Module):
    """One operator."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


# made here, because an operator that makes them would be watched as well
WEIGHT, BIAS, KERNEL = (rows(*shape, mean=0.1, std=1.0, seed=5) for shape in ((9, 30), (9,), (1, 1, 7)))

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: torch.nn.functional.linear(x, WEIGHT.type_as(x), BIAS.type_as(x)),
    "matmul": lambda x: x @ WEIGHT.T.type_as(x),
    "convolution": lambda x: torch.conv1d(x[:, None], KERNEL.type_as(x)),
    "transposed": lambda x: torch.conv_transpose1d(x[:, None], KERNEL.type_as(x)),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1),
    "cumulative sum": lambda x: x.cumsum(1),
    "average pool": lambda x: torch.nn.functional.avg_pool1d(x[:, None], 7, 2),
    "adaptive pool": lambda x: torch.nn.functional.adaptive_avg_pool2d(x.reshape(-1, 1, 5, 6), 4),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: (x * 9).log_softmax(1),
    "layer norm": lambda x: torch.layer_norm(x, [30]),
    "group norm": lambda x: torch.group_norm(x[:, :, None], 5),
    "instance norm": lambda x: torch.nn.functional.instance_norm(x[:, None]),
    "sum of two": lambda x: x + x.flip(1),
    "product in place": lambda x: x.clone().mul_(0.3),
    "sum in place, in a view": lambda x: x.clone().transpose(0, 1).add_(0.1),
    "quotient": lambda x: 1 / x,
    "root": lambda x: x.abs().sqrt(),
    "gelu": torch.nn.functional.gelu,
    "constant": lambda x: x.new_full((len(x), 2), 0.1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_alone_is_within_its_bound(name: str) -> None:
    """No line of the table hides behind another: a bound of 0 would not hold, and none is absurdly wide."""
    network, inputs = Alone(OPERATORS[name]).eval(), (rows(50, 30, mean=1.0, std=2.0),)
    analysis = analyse(network, inputs)
    exact, (bound,) = analysis.exact[0], analysis.bounds
    assert 0 < farthest(outputs(network, inputs)[0], exact) <= bound
    assert bound < 2e-3 * float(exact.abs().max())


def test_what_only_moves_numbers_is_exact() -> None:
    """Views, choices and comparisons bring no error; what is left is the smallest number there is."""
    network = nn.Sequential(nn.Unflatten(1, (5, 6)), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Dropout()).eval()
    assert analyse(network, (rows(7, 30),)).bounds[0] < 1e-36


def ignore_eps(norm: _BatchNorm) -> None:
    norm.eps = 0.0


def eps_of_another_framework(norm: _BatchNorm) -> None:
    norm.eps *= 1.01


def gammas_swapped(norm: _BatchNorm) -> None:
    norm.weight.data = norm.weight.data.flip(0)


def one_mean_off(norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean[0] += 0.01 * norm.running_var[0].sqrt()


def variance_unbiased_twice(norm: _BatchNorm) -> None:
    assert norm.running_var is not None
    norm.running_var *= 64 / 63


def statistics_of_the_batch(norm: _BatchNorm) -> None:
    norm.train()


FAULTS: list[Callable[[_BatchNorm], None]] = [
    ignore_eps,
    eps_of_another_framework,
    gammas_swapped,
    one_mean_off,
    variance_unbiased_twice,
    statistics_of_the_batch,
]
FAULTY = [
    "dense, before the activation",
    "dense, after the activation",
    "dense, deep",
    "dense, large values",
    "convolutional, before the activation",
    "convolutional, after the activation",
    "residual",
]


@pytest.mark.parametrize("name", FAULTY)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_layer_is_more_than_rounding(fault: Callable[[_BatchNorm], None], name: str) -> None:
    """One layer slightly wrong moves the outputs by more than ten times what parity allows, twice the bound."""
    network, inputs = ZOO[name]()
    bounds = analyse(network, inputs).bounds
    faulty = copy.deepcopy(network)
    fault(next(norm for norm in norms(faulty) if norm.affine))
    for right, wrong, bound in zip(outputs(network, inputs), outputs(faulty, inputs), bounds, strict=True):
        assert farthest(right, wrong) > 10 * 2 * bound


def test_the_bound_knows_the_condition_of_a_layer() -> None:
    """A mean of 10,000 std costs four digits, and the bound says so, by the term |gamma| |mean| / std * u."""
    bounds = {}
    for ratio in (10.0, 1e4):
        inputs = (rows(64, 5, mean=0.1 * ratio, std=0.1),)
        network = settled(nn.Sequential(nn.BatchNorm1d(5)), *inputs)
        bounds[ratio] = analyse(network, inputs).bounds[0]
    assert 300 < bounds[1e4] / bounds[10.0] < 3000


def test_the_network_and_the_generator_are_not_changed() -> None:
    """Neither weights, statistics and modes nor the global random state."""
    network, inputs = ZOO["residual"]()
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    analyse(network, inputs)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert not any(part.training for part in network.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_bound_is_the_same_each_time() -> None:
    """It goes into the passport, and the same checkpoint gives the same bundle."""
    network, inputs = ZOO["attention"]()
    assert analyse(network, inputs).bounds == analyse(network, inputs).bounds


class OddlyTyped(nn.Module):
    """Asks for float32 by name, works in place, and returns an index beside a number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros(x.shape, dtype=torch.float32)
        y += x.float() * torch.tensor([0.1, 0.2, 0.3])
        y[:, 0].mul_(3)
        return y.sigmoid_(), y.argmax(1)


def test_float64_reaches_code_that_names_its_types() -> None:
    """The exact answer is float64 throughout; an integer output must be equal, so its bound is 0."""
    inputs = (rows(7, 3),)
    analysis = analyse(OddlyTyped().eval(), inputs)
    number, index = outputs(OddlyTyped(), inputs)
    assert analysis.exact[0].dtype == torch.float64
    assert 0 < farthest(number, analysis.exact[0]) <= analysis.bounds[0] < 1e-4
    assert torch.equal(index, analysis.exact[1])
    assert analysis.bounds[1] == 0.0


def test_half_precision_has_a_wider_bound() -> None:
    """float16 rounds 8192 times more coarsely than float32."""
    network, inputs = ZOO["dense, before the activation"]()
    narrow, narrow_inputs = copy.deepcopy(network).half(), tuple(tensor.half() for tensor in inputs)
    full, half = analyse(network, inputs), analyse(narrow, narrow_inputs)
    assert half.bounds[0] > 1000 * full.bounds[0]
    assert farthest(outputs(narrow, narrow_inputs)[0], half.exact[0]) <= half.bounds[0]


class WritesIntoItsOwn(nn.Module):
    """Makes a tensor in float32 and fills it in place, as padding by hand does."""

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros(x.shape[0], 6)
        made[:, :5] = x
        made[:, 5].copy_(x.sum(1))
        return made * 3


def test_a_tensor_that_the_network_makes_is_exact_too() -> None:
    """Widened only when it is read, what was written into it would be lost, and the bound as large as the answer."""
    x = rows(7, 5)
    analysis = analyse(WritesIntoItsOwn(), (x,))
    wanted = WritesIntoItsOwn()(x).double()
    assert float((analysis.exact[0] - wanted).abs().max()) <= analysis.bounds[0]
    assert analysis.bounds[0] < 1e-3  # of answers near 45


class KeepsAFloat(nn.Module):
    """Keeps a tensor that is no buffer, and writes into it: no float64 copy of the network has it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.copy_(x)
        return self.kept * 2


def test_writing_into_what_is_kept_is_refused() -> None:
    with pytest.raises(Refused, match="writes into a float32 tensor that it keeps between runs"):
        analyse(KeepsAFloat(), (rows(7, 5),))
