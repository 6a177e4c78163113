"""The training loop: from tensors to the weights that did best on rows they did not learn from.

1. The same seed gives the same weights, bit for bit, on one machine: every draw comes from a seeded generator, and
   torch computes in one thread, so that sums have one order.
2. No training batch has one row: BatchNorm cannot normalise it. A row left over joins the batch before it.
3. Weights and running statistics are kept together, from the epoch whose validation loss in eval mode was lowest. So
   what is kept was judged as it will be served.
4. An epoch is kept only once the running statistics are learned: while more than `TRUSTED` of them is still their
   initial mean 0 and variance 1, eval mode is not the network that trained. PyTorch does not correct for it.
5. The standardising BatchNorm does not train at all: it has the exact statistics of the training rows from the start.
6. In training a small share of categories is replaced by index 0, so that a category nobody saw, which is served as
   'missing', gets an embedding that was learned and not one that was drawn.

Rule 4 in figures: the share is (1 - momentum)^steps, so with momentum 0.1 it takes 66 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.compose import make_column_transformer
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, r2_score, roc_auc_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor, nn

from export.networks import TabularNet, TabularNetConfig, embedding_size
from export.options import Task, TrainingOptions
from service.errors import Refused, WrongCall
from service.signature import (
    MISSING_INDEX,
    CategoricalFeature,
    ClassTarget,
    ContinuousFeature,
    Feature,
    Target,
)

TRUSTED = 1e-3
"""The largest share of the initial values that kept running statistics may hold."""

HEADLINE: Mapping[Task, str] = {"binary": "AUC", "multiclass": "accuracy", "regression": "R2"}
"""The metric that is shown after each epoch."""

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Rows with their answers."""

    inputs: tuple[Tensor, ...]
    """The graph's inputs in its order: `continuous: float32[B, N]`, `categorical: int64[B, M]`."""
    answers: Tensor
    """int64[B], the index of the class; or float64[B], the number."""

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """How an epoch went."""

    number: int
    """Counted from 1."""
    steps: int
    """Training batches so far; each updated the running statistics once."""
    initial_weight: float
    """The share of the running statistics still held by their initial values; 0 where there are none."""
    training_loss: float
    validation_loss: float
    metrics: Metrics
    """On the validation rows, in eval mode."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """The kept weights, in a network in eval mode, and the epoch they are from."""

    network: TabularNet
    kept: Epoch
    epochs: int


def examples(encoded: Mapping[str, NDArray[Any]], answers: NDArray[Any], rows: NDArray[np.int64]) -> Examples:
    """The `rows` of an encoded table."""
    return Examples(
        inputs=tuple(torch.from_numpy(array[rows]) for array in encoded.values()),
        answers=torch.from_numpy(answers[rows]),
    )


def joined(one: Examples, other: Examples) -> Examples:
    """The rows of both."""
    inputs = zip(one.inputs, other.inputs, strict=True)
    return Examples(inputs=tuple(torch.cat(pair) for pair in inputs), answers=torch.cat([one.answers, other.answers]))


def configure(
    features: Sequence[Feature], target: Target, training: Examples, options: TrainingOptions
) -> TabularNetConfig:
    """The network for these features and this target."""
    cardinalities = tuple(len(f.categories) + 1 for f in features if isinstance(f, CategoricalFeature))
    n_continuous = sum(isinstance(feature, ContinuousFeature) for feature in features)
    return TabularNetConfig(
        n_continuous=n_continuous,
        cardinalities=cardinalities,
        embedding_sizes=tuple(map(embedding_size, cardinalities)),
        outputs=len(target.classes) if isinstance(target, ClassTarget) else 1,
        target=target.kind,
        hidden=options.hidden,
        dropout=options.dropout,
        norm=options.norm,
        standardise_eps=standardise_eps(training.inputs[0]) if n_continuous else 1e-5,
    )


def standardise_eps(continuous_BN: Tensor) -> float:
    """PyTorch's eps, or a thousandth of the smallest variance: a column in a large unit is standardised like any."""
    return min(1e-5, 1e-3 * float(continuous_BN.double().var(dim=0).min()))


def batches(n_rows: int, batch_size: int, permutation: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of each training batch, in the order of `permutation`.

    Args:
        n_rows: at least 2.
        batch_size: at least 2.
        permutation: of the row numbers 0 to n_rows - 1; not changed.

    Returns:
        Batches of `batch_size` rows, the last of 2 to `batch_size` + 1.

    >>> [batch.tolist() for batch in batches(7, 3, [6, 5, 4, 3, 2, 1, 0])]
    [[6, 5, 4], [3, 2, 1, 0]]

    Raises:
        WrongCall: n_rows or batch_size is less than 2.
    """
    if min(n_rows, batch_size) < 2:
        raise WrongCall(f"{n_rows} row(s) in batches of {batch_size}: BatchNorm cannot train on a batch of one row")
    starts = range(0, n_rows, batch_size)
    if n_rows % batch_size == 1 and n_rows > batch_size:
        starts = starts[:-1]
    return np.split(np.asarray(permutation, dtype=np.int64), list(starts[1:]))


def masked(inputs: tuple[Tensor, ...], n_categorical: int, rate: float, random: torch.Generator) -> tuple[Tensor, ...]:
    """`inputs` with a share `rate` of the categories replaced by 'missing'; not changed themselves."""
    if not n_categorical or not rate:
        return inputs
    *others, categorical_BM = inputs
    hidden_BM = torch.rand(categorical_BM.shape, generator=random) < rate
    return (*others, categorical_BM.masked_fill(hidden_BM, MISSING_INDEX))


def train(
    config: TabularNetConfig,
    training: Examples,
    validation: Examples,
    options: TrainingOptions,
    *,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Trained:
    """Train a network and keep its best weights.

    Args:
        training, validation: not changed.
        on_epoch: is told after each epoch how it went.

    Raises:
        Refused: the loss is not finite.
        WrongCall: there are fewer than two training rows.
    """
    with _reproducible(options.seed):
        network = TabularNet(config)
        if network.standardise is not None:
            network.measure(training.inputs[0])
        if config.target == "number":
            network.set_unit(mean=float(training.answers.mean()), scale=float(training.answers.std()))
        return _fitted(network, training, validation, options, on_epoch)


def _fitted(
    network: TabularNet,
    training: Examples,
    validation: Examples,
    options: TrainingOptions,
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    random = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.AdamW(_decayed(network, options.weight_decay), lr=options.learning_rate, fused=True)
    n_categorical = len(network.config.cardinalities)
    kept: Epoch | None = None
    state: dict[str, Tensor] = {}
    number = steps = 0
    while number < options.epochs and not (kept and finished(kept, number, options.patience)):
        number += 1
        total = 0.0
        _train_mode(network)
        permutation = torch.randperm(len(training), generator=random).numpy()
        for rows in map(torch.from_numpy, batches(len(training), options.batch_size, permutation)):
            inputs = masked(tuple(tensor[rows] for tensor in training.inputs), n_categorical, options.mask_rate, random)
            loss = _loss(network, network.scores(*inputs), training.answers[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch says nothing of its types
            optimiser.step()
            steps += 1
            total += loss.item() * len(rows)
        network.eval()
        with torch.no_grad():
            scores_BK = network.scores(*validation.inputs)
            validation_loss = _loss(network, scores_BK, validation.answers).item()
        if not math.isfinite(total + validation_loss):
            raise Refused(
                f"the loss is not a finite number any more in epoch {number}; "
                f"try a smaller --learning-rate than {options.learning_rate:g}"
            )
        epoch = Epoch(
            number=number,
            steps=steps,
            initial_weight=_initial_weight(network.config, steps),
            training_loss=total / len(training),
            validation_loss=validation_loss,
            metrics=measured(validation.answers.numpy(), predictions(network, validation.inputs)),
        )
        if keeps(kept, epoch):
            kept, state = epoch, {key: value.clone() for key, value in network.state_dict().items()}
        on_epoch(epoch)
    assert kept is not None  # there is at least one epoch, and the first is kept
    network.load_state_dict(state)
    return Trained(network=network.eval(), kept=kept, epochs=number)


def keeps(kept: Epoch | None, epoch: Epoch) -> bool:
    """Whether an epoch's weights are kept in the place of those kept so far: rules 3 and 4."""
    return kept is None or kept.initial_weight > TRUSTED or epoch.validation_loss < kept.validation_loss


def finished(kept: Epoch, number: int, patience: int) -> bool:
    """Whether `patience` epochs have gone by since the one that is kept."""
    return number - kept.number >= patience


def _initial_weight(config: TabularNetConfig, steps: int) -> float:
    return 0.0 if config.norm == "none" or not config.hidden else float((1 - config.norm_momentum) ** steps)


def _train_mode(network: TabularNet) -> None:
    network.train()
    if network.standardise is not None:
        network.standardise.eval()


def _loss(network: TabularNet, scores_BK: Tensor, answers_B: Tensor) -> Tensor:
    """Cross-entropy, or the squared error in standard deviations of the target."""
    if network.config.target == "classes":
        return nn.functional.cross_entropy(scores_BK, answers_B)
    wanted_B = (answers_B - network.get_buffer("target_mean")) / network.get_buffer("target_scale")
    return nn.functional.mse_loss(scores_BK[:, 0], wanted_B.float())


def _decayed(network: TabularNet, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: only matrices are decayed; to pull a gamma or a bias to zero would change what it is for."""
    parameters = list(network.parameters())
    return [
        {"params": [value for value in parameters if value.ndim >= 2], "weight_decay": weight_decay},
        {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
    ]


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Torch with a seed and one thread; both are afterwards as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


# How good it is


def predictions(network: TabularNet, inputs: tuple[Tensor, ...]) -> NDArray[np.float64]:
    """What a network in eval mode answers: probabilities [B, K], or numbers [B].

    Args:
        network: in eval mode; its mode is not changed.
    """
    with torch.no_grad():
        answers_BK = network(*inputs).double()
        if network.config.target == "classes":
            answers_BK = answers_BK.softmax(dim=1)
        array: NDArray[np.float64] = answers_BK.numpy()
    return array if network.config.target == "classes" else array[:, 0]


def measured(answers: NDArray[Any], predicted: NDArray[np.float64]) -> Metrics:
    """How near predictions come: AUC, accuracy and log loss for two classes, R2 and RMSE for numbers.

    Args:
        answers: [B], class indices or numbers.
        predicted: [B, K] probabilities, or [B] numbers.
    """
    if predicted.ndim == 1:
        return {
            "R2": float(r2_score(answers, predicted)),
            "RMSE": float(root_mean_squared_error(answers, predicted)),
        }
    classes = range(predicted.shape[1])
    auc = {"AUC": float(roc_auc_score(answers, predicted[:, 1]))} if len(classes) == 2 else {}
    return auc | {
        "accuracy": float(accuracy_score(answers, predicted.argmax(axis=1))),
        "log loss": float(log_loss(answers, predicted, labels=list(classes))),
    }


def baselines(known: Examples, test: Examples, config: TabularNetConfig) -> dict[str, Metrics]:
    """What is reached without a network: by a linear model, and by always giving the same answer.

    Args:
        known: the rows to learn from; for a fair comparison training and validation rows, because the network saw both.
        test: the rows to measure on.
    """
    number = config.target == "number"
    linear = LinearRegression() if number else LogisticRegression(max_iter=2000)
    constant = DummyRegressor() if number else DummyClassifier(strategy="prior")
    prepared = [
        (StandardScaler(), slice(0, config.n_continuous)),
        (OneHotEncoder(handle_unknown="ignore"), slice(config.n_continuous, None)),
    ]
    columns = make_column_transformer(*prepared[not config.n_continuous : 2 if config.cardinalities else 1])
    models = {
        "linear regression" if number else "logistic regression": make_pipeline(columns, linear),
        "mean" if number else "majority": constant,
    }
    found: dict[str, Metrics] = {}
    for name, model in models.items():
        model.fit(_matrix(known), known.answers.numpy())
        predicted = model.predict(_matrix(test)) if number else model.predict_proba(_matrix(test))
        found[name] = measured(test.answers.numpy(), predicted)
    return found


def _matrix(rows: Examples) -> NDArray[np.float64]:
    return np.hstack([tensor.double().numpy() for tensor in rows.inputs])
