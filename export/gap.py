"""Is the gap between training and evaluation in the running statistics? The same rows under four choices of them.

    of each batch   train mode, but without dropout
    as stored       the moving averages in the network: eval mode
    de-biased       the same without what is left of mean 0 and variance 1:  r = (1 - momentum)^n,
                    mean' = mean / (1 - r),  var' = (var - r) / (1 - r)
    of all rows     the exact statistics of these rows, layer after layer (`export.calibration`)

How far a layer's stored statistics (s) are from those of the data (d) is the divergence of one normal distribution from
the other, the mean over its channels:

    KL = (var_d / var_s - 1 - ln(var_d / var_s) + (mean_d - mean_s)^2 / var_s) / 2

What the difference says, in this order:

    fine            no layer is farther off than `NOTICEABLE`
    not converged   more than 1 % of the initial values is left, and de-biasing brings the worst layer to half or less
    dropout         with dropout on, the stored statistics are right: dropout stands before a BatchNorm, and widens in
                    training what reaches it (Li et al. 2018, arXiv 1801.05134)
    noisy           what an average over 1 / momentum batches is off by chance
    drifted         a layer that sees the rows themselves, before any weights, is off: they are unlike those of training
    stale           the weights have moved on since the averages were taken; or, where no layer sees the rows
                    themselves, the rows are unlike those of training

KL of two normal distributions: Kullback, Information Theory and Statistics, 1959, section 9.1. The noise of a moving
average: its weights have the sum of squares m / (2 - m), so it is worth (2 - m) / m batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from export.calibration import Calibrated, Vector, applied, calibrate
from export.copying import copied
from export.rounding import flattened
from export.subject import Data
from export.watching import Moments, Reaching, run_exactly
from service.errors import WrongCall

NOTICEABLE = 0.02
"""A mean that is off by 0.2 standard deviations, or a variance by a third."""

NOTICED_WEIGHT = 0.01
_ROWS_AT_ONCE = 1024

Verdict = Literal["fine", "not converged", "dropout", "noisy", "drifted", "stale"]

TRAIN, STORED, DEBIASED, FULL = "of each batch", "as stored", "de-biased", "of all rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What the network scores with one choice of statistics."""

    name: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGap:
    """How far a layer's stored statistics are from those of the data."""

    layer: str
    divergence: float
    """KL, the mean over the channels, in nats."""
    mean_shift: float
    """The median over the channels of |mean_d - mean_s| / std_d."""
    variance_ratio: float
    """The median over the channels of var_s / var_d."""
    sees_rows: bool
    """No weights stand between the network's inputs and this layer."""
    initial_weight: float
    """The share of mean 0 and variance 1 in the stored statistics, by the layer's own count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The four figures, the layers, and what they say."""

    variants: tuple[Variant, ...]
    layers: tuple[LayerGap, ...]
    """In the order of the network."""
    verdict: Verdict
    sentence: str
    rows: int
    batch_size: int

    @property
    def worst(self) -> tuple[LayerGap, ...]:
        """The layers that carry the gap, the worst first."""
        ranked = sorted(self.layers, key=lambda layer: layer.divergence, reverse=True)
        return tuple(layer for layer in ranked if layer.divergence > NOTICEABLE)


def measured_gap(network: nn.Module, data: Data, *, batch_size: int = 32, settled: frozenset[str] = frozenset()) -> Gap:
    """Judge a network's running statistics on rows with answers.

    Args:
        network: in any mode; not changed.
        batch_size: of training; for the first figure.
        settled: layers whose statistics were measured exactly, so that no count of batches speaks about them.

    Raises:
        Refused: the network has no BatchNorm to measure, or the rows do not fit it.
        WrongCall: the answers do not fit the outputs.
    """
    evaluated = copied(network).cpu().eval()
    full = calibrate(evaluated, data.inputs)
    weights = {
        path: 0.0 if path in settled else initial_weight(norm)
        for path, norm in evaluated.named_modules()
        if isinstance(norm, _BatchNorm)
    }
    debiased = _debiased(evaluated, weights)
    answered = {TRAIN: _answers_in_train_mode(evaluated, data.inputs, batch_size)} if len(data.targets) > 1 else {}
    answered |= {
        STORED: answers(evaluated, data.inputs),
        DEBIASED: answers(debiased, data.inputs),
        FULL: answers(applied(evaluated, full), data.inputs),
    }
    probabilities = gives_probabilities(answered[STORED])  # decided once, so that all rows of the table mean the same
    first = _see_rows(evaluated, data.inputs)
    layers = _layers(evaluated, full, weights, first)
    verdict = _verdict(
        layers,
        debiased=_layers(debiased, full, weights, first),
        with_dropout=_divergences(evaluated, _moments(evaluated, data.inputs, dropout=True)),
        without_dropout=_divergences(evaluated, _moments(evaluated, data.inputs, dropout=False)),
        network=evaluated,
        rows=len(data.targets),
        batch_size=batch_size,
    )
    return Gap(
        variants=tuple(
            Variant(name=name, metrics=metrics(got, data.targets, probabilities=probabilities))
            for name, got in answered.items()
        ),
        layers=layers,
        verdict=verdict,
        sentence=_sentence(verdict, layers),
        rows=len(data.targets),
        batch_size=batch_size,
    )


def initial_weight(norm: _BatchNorm) -> float:
    """The share of mean 0 and variance 1 in a layer's running statistics: (1 - momentum)^n; 0 where it has no count.

    A file from before PyTorch counted batches has n = 0 beside statistics that are trained.
    """
    if norm.momentum is None or norm.num_batches_tracked is None or norm.running_mean is None:
        return 0.0
    assert norm.running_var is not None
    count = int(norm.num_batches_tracked)
    is_initial = not norm.running_mean.any() and bool((norm.running_var == 1).all())
    return float((1 - norm.momentum) ** count) if count or is_initial else 0.0


def gives_probabilities(output: Tensor) -> bool:
    """Whether answers are probabilities and not logits: none is negative, and rows of several sum to 1."""
    columns = output.double().reshape(len(output), -1)
    if columns.shape[1] == 1:
        return bool(((columns >= 0) & (columns <= 1)).all())
    return bool((columns >= 0).all()) and torch.allclose(columns.sum(1), torch.ones(()).double(), atol=1e-3)


def metrics(output: Tensor, targets: Tensor, *, probabilities: bool | None = None) -> dict[str, float]:
    """How good answers are: accuracy and log loss for classes, the root of the mean squared error for numbers.

    Args:
        output: float[N, K], logits or probabilities of K classes; float[N] or float[N, 1], a logit, a probability or a
            number; or float[N, ...] numbers.
        probabilities: whether they are; None asks `gives_probabilities`.
        targets: int64[N] or int64[N, 1], the class; or float[N, ...], the number.

    Raises:
        WrongCall: there is not one answer for each output.
    """
    output = output.double()
    if targets.is_floating_point():
        if output.numel() != targets.numel():
            raise WrongCall(f"targets have the shape {list(targets.shape)}, the output {list(output.shape)}")
        return {"RMSE": float((output.reshape(targets.shape) - targets.double()).square().mean().sqrt())}
    targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    if output.shape[0] != targets.shape[0] or targets.ndim != 1 or output.ndim > 2:
        raise WrongCall(
            f"targets have the shape {list(targets.shape)}, the output {list(output.shape)}; integers are classes, one "
            "for each row of [N, classes]; save numbers as floats"
        )
    columns = output.reshape(len(output), -1)
    if probabilities is None:
        probabilities = gives_probabilities(output)
    if columns.shape[1] == 1:
        yes = columns[:, 0] if probabilities else columns[:, 0].sigmoid()
        columns = torch.stack([1 - yes, yes], 1)
    elif not probabilities:
        columns = columns.softmax(1)
    if int(targets.min()) < 0 or int(targets.max()) >= columns.shape[1]:
        raise WrongCall(
            f"targets run from {int(targets.min())} to {int(targets.max())}; classes are 0 to {columns.shape[1] - 1}"
        )
    chosen = columns[torch.arange(len(columns)), targets].clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "accuracy": float((columns.argmax(1) == targets).double().mean()),
        "log loss": float(-chosen.log().mean()),
    }


def answers(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The first output for every row, in eval mode.

    Args:
        network: in any mode; not changed.
    """
    evaluated = copy.deepcopy(network).eval()
    with torch.no_grad():
        parts = [
            flattened(evaluated(*(tensor[start : start + _ROWS_AT_ONCE] for tensor in inputs)))[0]
            for start in range(0, len(inputs[0]), _ROWS_AT_ONCE)
        ]
    return torch.cat(parts)


def _answers_in_train_mode(network: nn.Module, inputs: Sequence[Tensor], batch_size: int) -> Tensor:
    """Rows in a seeded order, so that a sorted file makes batches like those of training; a single one is not left."""
    training = copy.deepcopy(network)
    for part in training.modules():
        if isinstance(part, _BatchNorm):
            part.train()
    rows = len(inputs[0])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    starts = list(range(0, rows, batch_size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    parts = [order[start:end] for start, end in zip(starts, [*starts[1:], rows], strict=True)]
    with torch.no_grad():
        try:
            got = torch.cat([flattened(training(*(tensor[part] for tensor in inputs)))[0] for part in parts])
        except ValueError as error:  # "Expected more than 1 value per channel when training"
            raise WrongCall(f"train mode takes batches of 2 rows at least, and these are {rows}") from error
    in_place = torch.empty_like(got)
    in_place[order] = got
    return in_place


def _debiased(network: nn.Module, weights: Mapping[str, float]) -> nn.Module:
    duplicate = copy.deepcopy(network)
    with torch.no_grad():
        for path, r in weights.items():
            norm = duplicate.get_submodule(path)
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and 0 < r < 1:
                assert norm.running_var is not None
                norm.running_mean.div_(1 - r)
                norm.running_var.sub_(r).div_(1 - r).clamp_min_(0)
    return duplicate


def _see_rows(network: nn.Module, inputs: Sequence[Tensor]) -> frozenset[str]:
    """The layers whose input does not depend on any weight."""
    duplicate = copy.deepcopy(network).requires_grad_(True)
    found: set[str] = set()

    def look(path: str, x: Tensor) -> None:
        if not x.requires_grad:
            found.add(path)

    for path, norm in duplicate.named_modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(
                lambda _norm, args, kwargs, path=path: look(path, args[0] if args else kwargs["input"]),
                with_kwargs=True,
            )
    with torch.enable_grad():
        duplicate(*(tensor[:2].detach() for tensor in inputs))
    return frozenset(found)


def _layers(
    network: nn.Module, full: Calibrated, weights: Mapping[str, float], first: frozenset[str]
) -> tuple[LayerGap, ...]:
    found = []
    for layer in full.layers:
        norm = network.get_submodule(layer.layer)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is None or norm.running_var is None:
            continue
        mean_s, var_s, eps = *_stored(norm), norm.eps
        mean_d, var_d = layer.mean_C, layer.var_C
        found.append(
            LayerGap(
                layer=layer.layer,
                divergence=_divergence((mean_d, var_d + eps), (mean_s, var_s + eps)),
                mean_shift=float(np.median(np.abs(mean_d - mean_s) / np.sqrt(var_d + eps))),
                variance_ratio=float(np.median((var_s + eps) / (var_d + eps))),
                sees_rows=layer.layer in first,
                initial_weight=weights[layer.layer],
            )
        )
    return tuple(found)


def _stored(norm: _BatchNorm) -> tuple[Vector, Vector]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean_C, var_C = (v.detach().double().numpy() for v in (norm.running_mean, norm.running_var))
    return mean_C, np.maximum(var_C, 0)


def _divergence(d: tuple[Vector, Vector], s: tuple[Vector, Vector]) -> float:
    """KL of the data (mean, var + eps) from what is stored, the mean over the channels.

    eps is what the layer itself adds, so a channel that is dead in both is equal in both.
    """
    (mean_d, var_d), (mean_s, var_s) = d, s
    return float(np.mean((var_d / var_s - 1 - np.log(var_d / var_s) + (mean_d - mean_s) ** 2 / var_s) / 2))


def _moments(network: nn.Module, inputs: Sequence[Tensor], *, dropout: bool) -> dict[str, Moments]:
    """What reaches each layer, with stored statistics and dropout on or off; nothing where there is no dropout."""
    live = copy.deepcopy(network).double()
    dropouts = [part for part in live.modules() if isinstance(part, _DropoutNd) and part.p > 0]
    found: dict[str, Moments] = {}
    if not dropouts:
        return found
    for part in dropouts:
        part.train(dropout)

    def take(path: str, x: Tensor) -> None:
        found[path] = found[path].merged(Moments.of(x)) if path in found else Moments.of(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for start in range(0, len(inputs[0]), _ROWS_AT_ONCE):
            run_exactly(live, [tensor[start : start + _ROWS_AT_ONCE] for tensor in inputs], Reaching(live, take))
    return found


def _divergences(network: nn.Module, moments: Mapping[str, Moments]) -> list[float]:
    found = []
    for path, seen in moments.items():
        norm = network.get_submodule(path)
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None:
            mean_s, var_s = _stored(norm)
            data = (seen.mean_C.numpy(), (seen.m2_C / seen.count).numpy() + norm.eps)
            found.append(_divergence(data, (mean_s, var_s + norm.eps)))
    return found


def _verdict(
    layers: Sequence[LayerGap],
    *,
    debiased: Sequence[LayerGap],
    with_dropout: Sequence[float],
    without_dropout: Sequence[float],
    network: nn.Module,
    rows: int,
    batch_size: int,
) -> Verdict:
    worst = max((layer.divergence for layer in layers), default=0.0)
    if not worst > NOTICEABLE:
        return "fine"
    better = max(layer.divergence for layer in debiased)
    if max(layer.initial_weight for layer in layers) > NOTICED_WEIGHT and better <= worst / 2:
        return "not converged"
    if with_dropout and max(with_dropout) <= max(without_dropout) / 2:
        return "dropout"
    momenta = [norm.momentum for norm in network.modules() if isinstance(norm, _BatchNorm) and norm.momentum]
    m = max(momenta, default=0.1)
    noise = m / ((2 - m) * batch_size) + 1 / rows  # of the mean in variances, and half of it of the log variance
    if worst <= 4 * noise:
        return "noisy"
    return "drifted" if any(layer.sees_rows and layer.divergence > NOTICEABLE for layer in layers) else "stale"


def _sentence(verdict: Verdict, layers: Sequence[LayerGap]) -> str:
    if verdict == "fine":
        return "the stored statistics are those of these rows, in every layer"
    worst = max(layers, key=lambda layer: layer.divergence)
    off = (
        f"layer '{worst.layer}' is the farthest off: its means by {worst.mean_shift:.2g} standard deviations, its "
        f"variances by a factor of {_factor(worst.variance_ratio)} (medians over the channels)"
    )
    says = {
        "not converged": (
            f"the statistics still hold {worst.initial_weight:.1%} of their initial values; train longer, or run "
            "'evalmode calibrate'"
        ),
        "dropout": (
            "they were gathered with dropout on, which widens what reaches the layer, and are used with it off; run "
            "'evalmode calibrate', or keep dropout behind the last BatchNorm"
        ),
        "drifted": (
            "a layer that sees the rows themselves is off, so they are unlike those of training: look for another "
            "preprocessing, population or resolution before anything else"
        ),
        "noisy": "the averages are over too few rows; train on with a smaller momentum, or run 'evalmode calibrate'",
        "stale": (
            "the weights have moved on since the averages were taken, batches were not mixed well, or these rows are "
            "unlike those of training; run 'evalmode calibrate', and look at the metric"
        ),
    }
    return f"{off}; {says[verdict]}"


def _factor(ratio: float) -> str:
    return f"{max(ratio, 1 / ratio):.3g}" if 0 < ratio < math.inf else "infinity"
