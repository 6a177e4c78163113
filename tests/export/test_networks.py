"""What the reference networks promise; how BatchNorm itself behaves in them is tested beside the oracle."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from export.batchnorm import RunningStatistics, eval_error_bound, forward_eval
from export.conversion import convert
from export.networks import ConvNet, ConvNetConfig, Served, TabularNet, TabularNetConfig, embedding_size
from export.options import Norm
from service.errors import Refused

Network = TypeVar("Network", bound=nn.Module)

NORMS: tuple[Norm, ...] = ("before", "after", "none")

norms = pytest.mark.parametrize("norm", NORMS)
feature_kinds = pytest.mark.parametrize(
    ("n_continuous", "cardinalities"), [(3, (4, 6)), (3, ()), (0, (4, 6))], ids=["both", "continuous", "categorical"]
)
targets = pytest.mark.parametrize(
    ("target", "outputs"), [("classes", 2), ("classes", 5), ("number", 1)], ids=["binary", "multiclass", "number"]
)


def tabular(**changes: Any) -> TabularNet:
    """A network in eval mode with no attribute at its default, and running statistics that are far from 0 and 1."""
    values: dict[str, Any] = {
        "n_continuous": 3,
        "cardinalities": (4, 6),
        "outputs": 2,
        "hidden": (7, 5),
        "dropout": 0.4,
        "norm_momentum": 0.27,
        "norm_eps": 0.03,
        "standardise_eps": 0.02,
    }
    values |= changes
    values.setdefault("embedding_sizes", tuple(map(embedding_size, values["cardinalities"])))
    return stirred(TabularNet(TabularNetConfig.model_validate(values)))


def convolutional(norm: Norm) -> ConvNet:
    return stirred(
        ConvNet(ConvNetConfig(channels=2, widths=(3, 5), outputs=4, norm=norm, norm_eps=0.03, norm_momentum=0.27))
    )


def stirred(network: Network) -> Network:
    """The network with weights and running statistics drawn from a seed, in eval mode."""
    random = torch.Generator().manual_seed(11)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            low, high = (0.3, 0.9) if name.endswith("running_var") else (-0.8, 0.8)
            value.uniform_(low, high, generator=random)
    return network.eval().requires_grad_(False)


def rows(n_continuous: int, cardinalities: tuple[int, ...], n: int = 9) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(12)
    continuous = 5 + 3 * torch.randn((n, n_continuous), generator=random)
    columns = [torch.randint(0, cardinality, (n,), generator=random) for cardinality in cardinalities]
    return (*([continuous] if n_continuous else []), *([torch.stack(columns, dim=1)] if columns else []))


@feature_kinds
@targets
@norms
def test_a_network_gives_one_row_of_answers_for_each_row_of_what_there_is(
    n_continuous: int, cardinalities: tuple[int, ...], target: str, outputs: int, norm: Norm
) -> None:
    """Any kind of feature may be absent, for every task and every place of BatchNorm."""
    network = tabular(n_continuous=n_continuous, cardinalities=cardinalities, target=target, outputs=outputs, norm=norm)
    answers = network(*rows(n_continuous, cardinalities))
    assert answers.shape == (9, outputs)
    assert bool(answers.isfinite().all())


@pytest.mark.parametrize("index", range(5))
def test_every_feature_counts(index: int) -> None:
    """A change in any one column, continuous or categorical, changes the answer."""
    network, (continuous, categorical) = tabular(), rows(3, (4, 6))
    before = network(continuous, categorical)
    changed = continuous.clone(), categorical.clone()
    if index < 3:
        changed[0][:, index] += 0.5
    else:
        changed[1][:, index - 3] = (changed[1][:, index - 3] + 1) % (4, 6)[index - 3]
    assert bool((network(*changed) != before).any(dim=1).all())


@pytest.mark.parametrize(
    ("norm", "layers"),
    [
        ("before", ["Linear", "BatchNorm1d", "ReLU", "Dropout"]),
        ("after", ["Linear", "ReLU", "BatchNorm1d", "Dropout"]),
        ("none", ["Linear", "ReLU", "Dropout"]),
    ],
)
def test_batchnorm_stands_where_it_was_asked_for(norm: Norm, layers: list[str]) -> None:
    """'before' and 'after' are seen from the activation; the settings of the layers are those of the configuration."""
    network = tabular(norm=norm)
    assert [type(layer).__name__ for layer in network.blocks[0].children()] == layers
    hidden = [module for path, module in network.named_modules() if path.endswith(".norm")]
    assert [(module.eps, module.momentum, module.num_features) for module in hidden] == (
        [] if norm == "none" else [(0.03, 0.27, 7), (0.03, 0.27, 5)]
    )
    biases = [path for path, _ in network.blocks.named_parameters() if path.endswith("linear.bias")]
    assert len(biases) == (0 if norm == "before" else 2)  # a bias before BatchNorm would be subtracted again


@pytest.mark.parametrize(("norm", "place"), [("before", 1), ("after", 2)])
def test_a_convolution_has_its_batchnorm_there_too(norm: Norm, place: int) -> None:
    """The order of layers is the same in a convolutional block."""
    for block in convolutional(norm).blocks:
        assert isinstance(list(block.children())[place], nn.BatchNorm2d)


@pytest.mark.parametrize("size", [(2, 2), (8, 5), (9, 16)])
@norms
def test_a_convolutional_network_takes_images_of_any_size(norm: Norm, size: tuple[int, int]) -> None:
    """Height and width are averaged away."""
    assert convolutional(norm)(torch.randn(3, 2, *size)).shape == (3, 4)


def test_standardisation_is_the_exact_statistics_of_the_rows() -> None:
    """Mean and unbiased variance in float64, rounded once; then eval mode is the oracle's formula over raw values."""
    network = tabular(cardinalities=())
    x = np.random.default_rng(3).normal([4e4, -3.0, 0.002], [700.0, 2.0, 5e-4], (57, 3)).astype(np.float32)
    network.measure(torch.from_numpy(x))
    norm = network.standardise
    assert norm is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(norm.running_mean.numpy(), wide.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(norm.running_var.numpy(), wide.var(axis=0, ddof=1).astype(np.float32))
    assert int(norm.num_batches_tracked or 0) == 1
    assert norm.momentum is None  # the cumulative average of this one batch: nothing initial is left
    running = RunningStatistics(
        mean_C=norm.running_mean.double().numpy(), var_C=norm.running_var.double().numpy(), num_batches_tracked=1
    )
    want = forward_eval(wide, running, gamma_C=None, beta_C=None, eps=0.02)
    bound = eval_error_bound(wide, running, gamma_C=None, beta_C=None, eps=0.02)
    assert (np.abs(norm(torch.from_numpy(x)).numpy() - want) <= bound).all()


def test_a_number_is_in_the_targets_own_unit() -> None:
    """Scores are in standard deviations from the training mean; the answer is not, and nothing outside converts it."""
    network = tabular(target="number", outputs=1)
    network.set_unit(mean=-310.0, scale=45.0)
    inputs = rows(3, (4, 6))
    torch.testing.assert_close(network(*inputs), network.scores(*inputs) * 45.0 - 310.0, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_continuous": 0, "cardinalities": ()}, "at least one feature"),
        ({"embedding_sizes": (3,)}, "2 cardinalities, but 1 embedding sizes"),
        ({"outputs": 1}, "two outputs"),
        ({"target": "number", "outputs": 2}, "one output"),
        ({"cardinalities": (4, 1)}, "greater than or equal to 2"),
        ({"dropout": 1.0}, "less than 1"),
        ({"hiden": (3,)}, "Extra inputs"),
    ],
)
def test_a_configuration_that_means_no_network_is_refused(changes: dict[str, Any], complaint: str) -> None:
    """Also one with an unknown key: a checkpoint of another version is not half understood."""
    with pytest.raises(ValidationError, match=complaint):
        tabular(**changes)


@settings(deadline=None)
@given(
    config=st.builds(
        TabularNetConfig,
        norm=st.sampled_from(NORMS),
        norm_momentum=st.floats(0.01, 1),
        norm_eps=st.floats(1e-7, 1),
        n_continuous=st.integers(1, 4),
        cardinalities=st.just((4, 6)),
        embedding_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        outputs=st.integers(2, 5),
        target=st.just("classes"),
        hidden=st.lists(st.integers(1, 9), max_size=3).map(tuple),
        dropout=st.floats(0, 0.9),
        standardise_eps=st.floats(1e-12, 1),
    )
)
def test_json_holds_a_configuration(config: TabularNetConfig) -> None:
    """What is read is what was written, and it builds a network with the same state."""
    again = TabularNetConfig.model_validate_json(config.model_dump_json())
    assert again == config
    shapes = [{key: value.shape for key, value in TabularNet(c).state_dict().items()} for c in (config, again)]
    assert shapes[0] == shapes[1]


@norms
@targets
def test_what_is_served_is_probabilities_or_the_value(norm: Norm, target: str, outputs: int) -> None:
    """Probabilities are the softmax of the logits and sum to 1; a number goes through untouched."""
    network = tabular(norm=norm, target=target, outputs=outputs)
    served, inputs = Served(network).eval(), rows(3, (4, 6))
    answers, logits = served(*inputs), network(*inputs)
    if target == "number":
        assert served.output_names == ("value",)
        assert torch.equal(answers, logits)
    else:
        assert served.output_names == ("probabilities",)
        exponentials = torch.exp(logits.double())
        want = exponentials / exponentials.sum(dim=1, keepdim=True)
        # a softmax of K terms makes about K + 3 roundings, and the exponent |logit| of them
        tolerance = float(logits.abs().max() + outputs + 3) * 2**-23
        assert float((answers - want).abs().max()) <= tolerance


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (tabular(), rows(3, (4, 6))),
        (tabular(n_continuous=0, target="number", outputs=1), rows(0, (4, 6))),
        pytest.param(tabular(cardinalities=(), norm="after"), rows(3, ()), marks=pytest.mark.slow),
        pytest.param(convolutional("after"), (torch.randn(4, 2, 8, 6),), marks=pytest.mark.slow),
    ],
    ids=["both", "categorical, number", "continuous, after", "convolutional"],
)
def test_the_served_form_can_be_exported(network: TabularNet | ConvNet, inputs: tuple[Tensor, ...]) -> None:
    """With one input or two; every BatchNorm of the network is a node of the graph."""
    served = Served(network).eval()
    names = [f"input_{i}" for i in range(len(inputs))]
    converted = convert(served, inputs, input_names=names, output_names=served.output_names)
    found = [layer.layer for layer in converted.layers]
    want = [path for path, part in served.named_modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert found == want
    assert converted.unused == ()


def test_the_served_form_is_exported_in_eval_mode_only() -> None:
    """One layer left in training mode, deep inside, and the export refuses."""
    network = tabular()
    served = Served(network).eval()
    network.blocks[1].train()
    with pytest.raises(Refused, match=r"network\.blocks\.1"):
        convert(served, rows(3, (4, 6)), input_names=["a", "b"], output_names=served.output_names)


def test_embeddings_start_small_beside_the_standardised_numbers() -> None:
    """Before training, categories are a tenth of a standard deviation apart."""
    torch.manual_seed(1)
    config = TabularNetConfig(n_continuous=0, cardinalities=(4000,), embedding_sizes=(9,), outputs=2)
    weight = TabularNet(config).state_dict()["embeddings.0.weight"]
    assert float(weight.std()) == pytest.approx(0.1, abs=4 * 0.1 / (2 * weight.numel()) ** 0.5)  # four standard errors


def test_embedding_sizes_grow_with_the_categories_and_end() -> None:
    """From 2 categories on there are at least 2 numbers, and never more than 50."""
    sizes = [embedding_size(cardinality) for cardinality in range(2, 5000)]
    assert sizes[0] == 2
    assert max(sizes) == 50
    assert all(one <= other for one, other in itertools.pairwise(sizes))
