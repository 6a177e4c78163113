"""The training loop: its batches, its seed, and that what it keeps is what it measured in eval mode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export import training
from export.batchnorm import PyTorchMomentum, RunningStatistics, batch_statistics, updated
from export.networks import TabularNet, TabularNetConfig
from export.options import Norm, TrainingOptions
from export.training import TRUSTED, Epoch, Examples, batches, finished, keeps, masked, measured, train
from service.errors import Refused, WrongCall

CONFIG = TabularNetConfig(
    n_continuous=3, cardinalities=(5,), embedding_sizes=(4,), outputs=2, hidden=(12, 6), dropout=0.2
)
OPTIONS = TrainingOptions(seed=4, epochs=6, batch_size=16, patience=3, learning_rate=0.01)


def examples(n: int = 81, *, seed: int = 1, target: str = "classes") -> Examples:
    """Rows in which every feature matters, and one that is odd in number: 81 = 5 batches of 16 and a row left over."""
    random = torch.Generator().manual_seed(seed)
    continuous = torch.randn(n, 3, generator=random) * torch.tensor([3.0, 0.2, 40.0]) + torch.tensor([9.0, -1.0, 500.0])
    categorical = torch.randint(1, 5, (n, 1), generator=random)
    score = (continuous[:, 0] - 9) / 3 + (continuous[:, 1] + 1) / 0.2 - (continuous[:, 2] - 500) / 40
    score = score + torch.tensor([0.0, 2.0, -2.0, 1.0, -1.0])[categorical[:, 0]]
    answers = (score > 0).long() if target == "classes" else 7000 + 90 * score.double()
    return Examples(inputs=(continuous, categorical), answers=answers)


def epoch(number: int, loss: float, initial_weight: float = 0.0) -> Epoch:
    return Epoch(
        number=number,
        steps=5 * number,
        initial_weight=initial_weight,
        training_loss=0.5,
        validation_loss=loss,
        metrics={},
    )


# Batches


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(2, 70), st.randoms(use_true_random=False))
def test_every_row_is_in_one_batch_and_no_batch_has_one_row(n_rows: int, batch_size: int, random: Any) -> None:
    """Batches are full but for the last, which has two rows or more; together they are the permutation."""
    permutation = random.sample(range(n_rows), n_rows)
    made = batches(n_rows, batch_size, permutation)
    assert list(itertools.chain.from_iterable(made)) == permutation
    assert all(len(batch) == batch_size for batch in made[:-1])
    assert 2 <= len(made[-1]) <= batch_size + 1


@pytest.mark.parametrize(("n_rows", "batch_size"), [(1, 8), (0, 8), (8, 1)])
def test_a_batch_of_one_row_is_refused_where_it_cannot_be_avoided(n_rows: int, batch_size: int) -> None:
    """One row in all, or batches of one row."""
    with pytest.raises(WrongCall, match="batch of one row"):
        batches(n_rows, batch_size, range(n_rows))


@pytest.mark.parametrize("n_rows", [33, 34])
def test_batchnorm_never_trains_on_one_row(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row left over joins the batch before it; every row is seen once in an epoch."""
    seen: list[int] = []
    scores = TabularNet.scores

    def watched(self: TabularNet, *inputs: Tensor) -> Tensor:
        if self.training:
            seen.append(len(inputs[0]))
        return scores(self, *inputs)

    monkeypatch.setattr(TabularNet, "scores", watched)
    train(CONFIG, examples(n_rows), examples(20, seed=2), replace(OPTIONS, epochs=1))
    assert seen == ([16, 17] if n_rows == 33 else [16, 16, 2])


# The seed


@pytest.mark.parametrize("norm", ["before", "after", "none"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(norm: Norm) -> None:
    """Whatever was drawn before and however many threads torch had; another seed gives others."""
    config = CONFIG.model_copy(update={"norm": norm})
    states = []
    for seed, disturbance in ((4, 1), (4, 2), (5, 1)):
        torch.manual_seed(disturbance)
        torch.set_num_threads(disturbance)
        try:
            trained = train(config, examples(), examples(40, seed=2), replace(OPTIONS, seed=seed))
        finally:
            assert torch.get_num_threads() == disturbance
            torch.set_num_threads(1)
        states.append(trained.network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_training_leaves_the_callers_generator_alone() -> None:
    """What the caller draws next is what it would have been."""
    torch.manual_seed(8)
    want = torch.rand(3)
    torch.manual_seed(8)
    train(CONFIG, examples(), examples(40, seed=2), replace(OPTIONS, epochs=1))
    assert torch.equal(torch.rand(3), want)


# What is kept


def test_what_is_kept_is_what_was_measured() -> None:
    """Weights and running statistics of the kept epoch: in eval mode they give its validation loss again."""
    told: list[Epoch] = []
    validation = examples(40, seed=2)
    options = replace(OPTIONS, epochs=60, patience=8, learning_rate=0.05)
    trained = train(CONFIG, examples(), validation, options, on_epoch=told.append)
    assert not any(module.training for module in trained.network.modules())
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(trained.network(*validation.inputs), validation.answers)
    assert loss.item() == trained.kept.validation_loss
    assert trained.kept.validation_loss == min(e.validation_loss for e in told if e.initial_weight <= TRUSTED)
    assert trained.kept.number < trained.epochs == len(told) < 60  # it stopped early, and went back
    norm = trained.network.get_submodule("blocks.0.norm")
    assert int(norm.num_batches_tracked) == trained.kept.steps  # type: ignore[arg-type]  # a buffer


def test_training_goes_on_until_running_statistics_are_learned() -> None:
    """With 5 batches an epoch and momentum 0.1 that is epoch 14, the first after 66 batches, whatever the loss."""
    told: list[Epoch] = []
    options = replace(OPTIONS, epochs=40, patience=1, learning_rate=0.2)
    trained = train(CONFIG, examples(80), examples(40, seed=2), options, on_epoch=told.append)
    assert trained.kept.number >= 14
    assert trained.kept.initial_weight == pytest.approx(0.9**trained.kept.steps)
    assert min(e.validation_loss for e in told[:13]) < trained.kept.validation_loss  # or this test shows nothing
    without = train(
        CONFIG.model_copy(update={"norm": "none"}), examples(80), examples(40, seed=2), replace(options, epochs=13)
    )
    assert without.kept.initial_weight == 0.0


@pytest.mark.parametrize(
    ("kept", "new", "keep"),
    [
        (None, epoch(1, 0.9, 0.6), True),
        (epoch(1, 0.1, 0.6), epoch(2, 0.9, 0.4), True),  # neither is learned: the later one is nearer
        (epoch(1, 0.1, 0.6), epoch(2, 0.9), True),  # the first that is learned
        (epoch(2, 0.9), epoch(3, 0.8), True),
        (epoch(2, 0.9), epoch(3, 0.9), False),  # the first of equals
        (epoch(2, 0.9), epoch(3, 1.0), False),
    ],
)
def test_an_epoch_is_kept_when_it_is_learned_and_better(kept: Epoch | None, new: Epoch, keep: bool) -> None:
    """As a table: what was kept, what came, whether it takes its place."""
    assert keeps(kept, new) is keep


def test_patience_is_counted_from_the_epoch_that_is_kept() -> None:
    """With patience 3 the epochs 5, 6 and 7 may still beat epoch 4, and there is no eighth."""
    assert [finished(epoch(4, 0.5), number, 3) for number in (4, 6, 7, 8)] == [False, False, True, True]


def test_running_statistics_move_by_the_oracles_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a whole training run, from what reached the layer; the standardising layer stands still."""
    reached: list[np.ndarray[Any, Any]] = []
    standardised: list[bool] = []

    def watch(self: TabularNet, *inputs: Tensor) -> Tensor:
        if self.training:
            handle = self.get_submodule("blocks.0.norm").register_forward_pre_hook(
                lambda _, x: reached.append(x[0].detach().double().numpy())
            )
            standardised.append(self.get_submodule("standardise").training)
        result = scores(self, *inputs)
        if self.training:
            handle.remove()
        return result

    scores = TabularNet.scores
    monkeypatch.setattr(TabularNet, "scores", watch)
    known = examples()
    trained = train(CONFIG, known, examples(40, seed=2), replace(OPTIONS, epochs=2))
    running = RunningStatistics(mean_C=np.zeros(12), var_C=np.ones(12), num_batches_tracked=0)
    for x in reached:
        running = updated(running, batch_statistics(x), PyTorchMomentum(momentum=0.1))
    norm = trained.network.get_submodule("blocks.0.norm")
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # each of 10 updates rounds a few times, relative to the largest value that went in
    tolerance = 10 * 8 * 2**-24 * max(float(np.square(x).max()) for x in reached)
    np.testing.assert_allclose(norm.running_mean.numpy(), running.mean_C, rtol=0, atol=tolerance)
    np.testing.assert_allclose(norm.running_var.numpy(), running.var_C, rtol=0, atol=tolerance)
    assert len(reached) == 10
    assert not any(standardised)
    first = trained.network.standardise
    assert first is not None
    assert first.running_mean is not None
    np.testing.assert_array_equal(first.running_mean.numpy(), known.inputs[0].double().mean(dim=0).float().numpy())


def test_a_column_in_a_large_unit_is_standardised_like_any() -> None:
    """A tonne where a gram is meant: eps follows the smallest variance, so that no column drowns in it."""
    known = examples()
    small = Examples(inputs=(known.inputs[0] * 1e-6, known.inputs[1]), answers=known.answers)
    variances = small.inputs[0].double().var(dim=0)
    eps = training.standardise_eps(small.inputs[0])
    assert float((variances / (variances + eps)).min()) > 0.998
    assert training.standardise_eps(known.inputs[0]) == 1e-5


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    """With a sentence that names the epoch and what to change."""
    known = examples(target="number")
    with pytest.raises(Refused, match=r"not a finite number any more in epoch \d+; try a smaller --learning-rate"):
        train(
            CONFIG.model_copy(update={"target": "number", "outputs": 1, "norm": "none"}),
            known,
            examples(40, seed=2, target="number"),
            replace(OPTIONS, learning_rate=1e20),
        )


# Missing categories


def test_categories_are_hidden_at_the_rate_asked_for() -> None:
    """Only categories, only by index 0, and the rows themselves are not changed."""
    random = torch.Generator().manual_seed(3)
    continuous, categorical = torch.ones(5000, 2), torch.full((5000, 3), 4)
    shown = masked((continuous, categorical), 3, 0.1, random)
    assert torch.equal(shown[0], continuous)
    assert bool((categorical == 4).all())
    assert set(shown[1].flatten().tolist()) == {0, 4}
    share = float((shown[1] == 0).double().mean())
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 15000) ** 0.5  # four standard errors


def test_the_embedding_of_missing_is_learned() -> None:
    """Index 0 never occurs in these rows, yet its embedding moves; without masking it only decays."""

    def moved(mask_rate: float) -> float:
        embeddings = []
        for epochs in (1, 6):
            options = replace(OPTIONS, epochs=epochs, mask_rate=mask_rate, weight_decay=0.0)
            # the kept epoch is the last one, because the statistics are not learned by then
            network = train(CONFIG, examples(), examples(40, seed=2), options).network
            embeddings.append(network.state_dict()["embeddings.0.weight"][0])
        return float((embeddings[0] - embeddings[1]).abs().max())

    assert moved(0.1) > 0.01
    assert moved(0.0) == 0.0


# How good it is


def test_it_learns() -> None:
    """Classes and numbers, from every feature, far better than the constant answer."""
    for target, metric in (("classes", "AUC"), ("number", "R2")):
        config = CONFIG.model_copy(update={} if target == "classes" else {"target": "number", "outputs": 1})
        known, validation, test = (examples(n, seed=s, target=target) for n, s in ((400, 1), (100, 2), (200, 3)))
        trained = train(config, known, validation, replace(OPTIONS, epochs=40, patience=10))
        found = measured(test.answers.numpy(), training.predictions(trained.network, test.inputs))
        assert found[metric] > 0.9
        others = training.baselines(training.joined(known, validation), test, config)
        constant = others["majority" if target == "classes" else "mean"]
        assert constant[metric] == pytest.approx(0.5 if target == "classes" else 0.0, abs=0.05)


@pytest.mark.parametrize(
    ("answers", "predicted", "want"),
    [
        ([0, 0, 1, 1], [[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]], {"AUC": 0.75, "accuracy": 0.5}),
        ([0, 1, 2], [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8]], {"accuracy": 2 / 3}),
        ([1.0, 2.0, 6.0], [2.0, 2.0, 4.0], {"R2": 1 - 5 / 14, "RMSE": (5 / 3) ** 0.5}),
    ],
)
def test_metrics_are_what_they_are_called(
    answers: Sequence[float], predicted: Sequence[Any], want: dict[str, float]
) -> None:
    """By hand: AUC is the share of pairs in the right order."""
    found = measured(np.array(answers), np.array(predicted))
    assert {name: found[name] for name in want} == pytest.approx(want)


def test_log_loss_of_the_constant_answer_is_its_entropy() -> None:
    """The baselines see training and validation rows, and know nothing of the test rows."""
    known, test = examples(200), examples(100, seed=3)
    share = float((known.answers == 1).double().mean())
    there = float((test.answers == 1).double().mean())
    found = training.baselines(known, test, CONFIG)["majority"]
    assert found["log loss"] == pytest.approx(-there * np.log(share) - (1 - there) * np.log(1 - share))
