"""The gap between training and evaluation: four choices of statistics, and what their difference says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.calibration import applied, calibrate
from export.gap import NOTICEABLE, Gap, answers, initial_weight, measured_gap, metrics
from export.subject import Data
from service.errors import Refused, WrongCall
from tests.export.zoo import rows


class Net(nn.Module):
    """`raw` sees the rows themselves, `hidden` what weights made of them."""

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.raw, self.mix = nn.BatchNorm1d(5, momentum=momentum), nn.Linear(5, 8)
        self.hidden, self.head = nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.hidden(self.mix(self.raw(x)).relu()))
        return answer


X = torch.cat([rows(200, 5, mean=m, std=2.0, seed=s) for s, m in enumerate((-2.0, 1.0, 5.0))])
CLASSES = torch.arange(3).repeat_interleave(200)
DATA = Data(inputs=(X,), targets=CLASSES, source="here")


def trained(steps: int, *, momentum: float = 0.1, rate: float = 0.02, batch: int = 60, seed: int = 0) -> Net:
    network, generator = Net(momentum), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(network.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randperm(len(X), generator=generator)[:batch]
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(network(X[chosen]), CLASSES[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return network


def gap_of(network: nn.Module, data: Data = DATA, **options: int) -> Gap:
    return measured_gap(network, data, batch_size=options.get("batch_size", 60))


def value(gap: Gap, name: str, metric: str = "log loss") -> float:
    return next(variant.metrics[metric] for variant in gap.variants if variant.name == name)


# Verdicts: each sick case differs from the healthy one in one thing


def test_a_well_trained_network_is_fine() -> None:
    gap = gap_of(trained(400))
    assert (gap.verdict, gap.worst) == ("fine", ())
    assert [variant.name for variant in gap.variants] == ["of each batch", "as stored", "de-biased", "of all rows"]
    assert abs(value(gap, "as stored") - value(gap, "of all rows")) < 0.01


def test_too_few_steps_are_not_converged() -> None:
    """Momentum 0.01 for 40 steps: two thirds of mean 0 and variance 1 are left; de-biasing brings the metric back."""
    gap = gap_of(trained(40, momentum=0.01, rate=1e-4))
    assert gap.verdict == "not converged"
    assert "66.9% of their initial values" in gap.sentence
    assert gap.worst[0].layer in gap.sentence
    assert abs(value(gap, "de-biased") - value(gap, "of all rows")) < 0.1 * abs(
        value(gap, "as stored") - value(gap, "of all rows")
    )


def test_weights_that_moved_on_are_stale() -> None:
    """The layer that sees the rows is right, the one behind weights is not."""
    network = trained(400)
    with torch.no_grad():
        network.mix.weight.mul_(2.5)
    gap = gap_of(network)
    assert gap.verdict == "stale"
    assert [layer.layer for layer in gap.worst] == ["hidden"]


def test_other_rows_are_drifted() -> None:
    """What sees the rows themselves is off: nothing about the network would mend that."""
    gap = gap_of(trained(400), Data(inputs=(X * 3 + 4,), targets=CLASSES, source="there"))
    assert gap.verdict == "drifted"
    assert "unlike those of training" in gap.sentence


def test_dropout_before_batchnorm_is_named_as_the_reason() -> None:
    """What reached the layer in training was wider: with dropout on, the stored statistics are right (notes, F14)."""
    network = trained(400)
    network.mix = nn.Sequential(nn.Dropout(0.5), network.mix)  # type: ignore[assignment]
    for seed in range(100):
        chosen = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:60]
        network.train()(X[chosen])
    gap = gap_of(network)
    assert gap.verdict == "dropout"
    assert [layer.layer for layer in gap.worst] == ["hidden"]
    assert "gathered with dropout on" in gap.sentence


def test_dropout_behind_the_last_batchnorm_is_not_the_reason() -> None:
    """It never reaches a layer's statistics, whatever else is wrong with them."""
    network = trained(400)
    with torch.no_grad():
        network.mix.weight.mul_(2.5)
    network.head = nn.Sequential(nn.Dropout(0.5), network.head)  # type: ignore[assignment]
    assert gap_of(network).verdict == "stale"


def test_settled_layers_hold_nothing_of_their_initial_values() -> None:
    """A count of batches says nothing about statistics that were measured exactly."""
    network = trained(20)
    assert all(layer.initial_weight > 0.1 for layer in gap_of(network).layers)
    found = measured_gap(network, DATA, settled=frozenset({"raw", "hidden"}))
    assert [layer.initial_weight for layer in found.layers] == [0.0, 0.0]


def test_an_average_of_too_few_rows_is_noisy() -> None:
    """Momentum 0.9 over batches of 8: what is stored is little more than the last batch."""
    gap = gap_of(trained(300, momentum=0.9, rate=1e-4, batch=8), batch_size=8)
    assert gap.verdict == "noisy"


def test_the_network_is_not_changed() -> None:
    network = trained(30)
    before = copy.deepcopy(network.state_dict())
    gap_of(network)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(not part._forward_pre_hooks for part in network.modules())


# The figures


def test_each_variant_is_what_it_says() -> None:
    """Stored: eval mode. Full data: eval mode with calibrated statistics. De-biased: the formula, by hand."""
    network = trained(40, momentum=0.05)
    gap = gap_of(network)
    assert value(gap, "as stored") == pytest.approx(metrics(answers(network, [X]), CLASSES)["log loss"])
    full = applied(network, calibrate(network, [X]))
    assert value(gap, "of all rows") == pytest.approx(metrics(answers(full, [X]), CLASSES)["log loss"])
    corrected, r = copy.deepcopy(network), 0.95**40
    for norm in (corrected.raw, corrected.hidden):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(norm.running_mean / (1 - r))
        norm.running_var.copy_((norm.running_var - r) / (1 - r))
    assert value(gap, "de-biased") == pytest.approx(metrics(answers(corrected, [X]), CLASSES)["log loss"], rel=1e-5)


def test_a_layers_divergence_is_that_of_two_normal_distributions() -> None:
    """Mean over the channels; written apart, with torch's own divergence of the data's normal from the stored one."""
    network = trained(8)
    layer = gap_of(network).layers[0]
    norm = network.raw
    assert norm.running_mean is not None
    assert norm.running_var is not None
    stored = torch.distributions.Normal(norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt())
    data = torch.distributions.Normal(X.double().mean(0), (X.double().var(0, correction=0) + norm.eps).sqrt())
    assert layer.divergence == pytest.approx(float(torch.distributions.kl_divergence(data, stored).mean()), rel=1e-6)
    assert layer.divergence > NOTICEABLE


def test_initial_weight() -> None:
    """(1 - momentum)^n; none for a cumulative average, and none for trained statistics without a count."""
    norm = nn.BatchNorm1d(2, momentum=0.1)
    assert norm.num_batches_tracked is not None
    assert initial_weight(norm) == 1.0
    norm.num_batches_tracked.fill_(30)
    assert initial_weight(norm) == pytest.approx(0.9**30)
    norm.num_batches_tracked.fill_(0)
    norm.running_mean = torch.tensor([3.0, 4.0])
    assert initial_weight(norm) == 0.0
    assert initial_weight(nn.BatchNorm1d(2, momentum=None)) == 0.0
    assert initial_weight(nn.BatchNorm1d(2, track_running_stats=False)) == 0.0


@pytest.mark.parametrize(
    ("output", "targets", "want"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 0], {"accuracy": 0.5, "log loss": (np.log1p(np.exp(-2)) + np.log1p(np.e)) / 2}),
        ([[0.8, 0.2], [0.4, 0.6]], [0, 0], {"accuracy": 0.5, "log loss": -(np.log(0.8) + np.log(0.4)) / 2}),
        ([0.8, 0.4], [1, 1], {"accuracy": 0.5, "log loss": -(np.log(0.8) + np.log(0.4)) / 2}),
        ([[3.0], [-1.0]], [1, 0], {"accuracy": 1.0, "log loss": (np.log1p(np.exp(-3)) + np.log1p(np.exp(-1))) / 2}),
        ([[0.8, 0.2], [0.4, 0.6]], [[0], [0]], {"accuracy": 0.5, "log loss": -(np.log(0.8) + np.log(0.4)) / 2}),
        ([[3.0], [-1.0]], [1.0, 1.0], {"RMSE": np.sqrt((4 + 4) / 2)}),
    ],
    ids=["logits", "probabilities", "one probability", "one logit", "a column of classes", "numbers"],
)
def test_metrics(output: list[object], targets: list[object], want: dict[str, float]) -> None:
    found = metrics(torch.tensor(output), torch.tensor(targets))
    assert found == {name: pytest.approx(figure) for name, figure in want.items()}


@pytest.mark.parametrize(
    ("output", "targets", "sentence"),
    [
        (torch.rand(4, 3), torch.rand(4, 2), r"targets have the shape \[4, 2\], the output \[4, 3\]"),
        (torch.rand(4, 3), torch.tensor([0, 1, 2, 3]), "targets run from 0 to 3; classes are 0 to 2"),
        (torch.rand(4, 3), torch.tensor([0, 1]), "integers are classes, one for each row"),
    ],
)
def test_answers_that_do_not_fit(output: Tensor, targets: Tensor, sentence: str) -> None:
    with pytest.raises(WrongCall, match=sentence):
        metrics(output, targets)


def test_a_network_without_batchnorm_has_no_gap() -> None:
    with pytest.raises(Refused, match="no BatchNorm layer"):
        gap_of(nn.Linear(5, 3))
