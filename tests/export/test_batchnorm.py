"""The oracle against torch, onnxruntime, exact rational arithmetic and finite differences.

No tolerance here is a chosen constant. Eval is compared within `eval_error_bound`, training within `TrainErrors`,
whose derivation stands beside it. Shapes: N samples, C channels, S the axes of positions; n = N times the positions.
"""

import ast
import doctest
import importlib
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, checker, helper

from export import batchnorm
from export.batchnorm import (
    BatchStatistics,
    CumulativeAverage,
    KerasMomentum,
    PyTorchMomentum,
    RunningStatistics,
    UpdateRule,
    backward_eval,
    backward_train,
    batch_statistics,
    eval_error_bound,
    forward_eval,
    forward_train,
    updated,
)

Array: TypeAlias = NDArray[np.float64]
Floats: TypeAlias = NDArray[np.floating[Any]]

SHAPES = [(7, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 4, 5, 7)]
EPS = 0.03  # beside variances near 0.05, so that forgetting it changes y by a quarter
MOMENTUM = 0.27
GAMMA_C = np.array([1.7, -0.6, 2.3])
BETA_C = np.array([-4.0, 0.8, 3.1])
RUNNING = RunningStatistics(
    mean_C=np.array([-2.5, 4.75, 10.6]), var_C=np.array([0.05, 0.07, 0.04]), num_batches_tracked=5
)
AFFINE = list(itertools.product([GAMMA_C, None], [BETA_C, None]))

ranks = pytest.mark.parametrize("shape", SHAPES, ids=["NC", "NCL", "NCHW", "NCDHW"])
affine = pytest.mark.parametrize(
    ("gamma_C", "beta_C"), AFFINE, ids=["gamma and beta", "gamma", "beta", "neither gamma nor beta"]
)
precisions = pytest.mark.parametrize("dtype", [np.float64, np.float32])


# The data and the tolerance


def sample(shape: tuple[int, ...], *, seed: int = 0, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """Draw x with channel means far from 0 and variances near 0.05, rounded to `dtype`."""
    mean, std = np.array([-3.0, 5.0, 11.0]), np.array([0.2, 0.25, 0.22])
    per_channel = (1, 3, *[1] * (len(shape) - 2))
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (mean.reshape(per_channel) + std.reshape(per_channel) * noise).astype(dtype)


def gradient(shape: tuple[int, ...], *, dtype: type[np.floating[Any]] = np.float64) -> Floats:
    """Draw dy with a mean far from 0, so that leaving its mean in dx shows."""
    return (0.7 + np.random.default_rng(99).standard_normal(shape)).astype(dtype)


def rows(x_NCS: Floats) -> Array:
    """Return x_nC, the channels last and everything else one axis."""
    return np.moveaxis(np.asarray(x_NCS, dtype=np.float64), 1, -1).reshape(-1, x_NCS.shape[1])


def rounded(values: Floats | None, dtype: type[np.floating[Any]]) -> Floats | None:
    """Round a parameter that may be absent to `dtype`: the number that a computation in `dtype` really has."""
    return None if values is None else values.astype(dtype)


def running_in(dtype: type[np.floating[Any]]) -> RunningStatistics:
    """Round RUNNING to `dtype`, for the same reason."""
    return RunningStatistics(
        mean_C=RUNNING.mean_C.astype(dtype).astype(np.float64),
        var_C=RUNNING.var_C.astype(dtype).astype(np.float64),
        num_batches_tracked=RUNNING.num_batches_tracked,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainErrors:
    """First-order bounds on the rounding errors of one training step computed with unit roundoff u, times 2.

    A sum of n terms in any order, with the division and up to 7 more roundings around it, brings factors within 1 - c
    and 1 + c, c = g(n + 8), g(k) = k * u / (1 - k * u) (Higham 2002, sections 3.1 and 4.2). So the errors are, with
    |.|_n for the mean of absolute values over n:

        mean_C      |x|_n * c
        var_C       var * c, and 2 * mean_C_error**2: the deviations from a wrong mean are too large
        std_C       half the relative error of var + eps: half = var_C_error / (2 * (var + eps))
        xhat_nC     mean_C_error / std, and |xhat| * (half + c)
        y_nC        |gamma| * xhat_error, and c * (|gamma * xhat| + |gamma * mean| / std + |beta|): the cancellation of
                    scale and shift
        dbeta_C     n * |dy|_n * c
        dgamma_C    n * (|dy| * xhat_error)_n, and n * |dy * xhat|_n * c
        dx_nC       |gamma| / std times: (half + c) * (|dy| + |mean(dy)| + |xhat * mean(dy * xhat)|), and
                    dbeta_error / n, and |xhat| * dgamma_error / n, and xhat_error * |mean(dy * xhat)|

    Times 2 because both sides of a comparison round. What is of second order is c times smaller than what is here, and
    less than the roundings counted too many.
    """

    mean_C: Array
    var_C: Array
    y_nC: Array
    dx_nC: Array
    dgamma_C: Array
    dbeta_C: Array

    @classmethod
    def of(
        cls,
        x_NCS: Floats,
        *,
        gamma_C: Floats | None = None,
        beta_C: Floats | None = None,
        dy_NCS: Floats | None = None,
        dtype: type[np.floating[Any]] = np.float64,
    ) -> Self:
        """Evaluate the bounds above."""
        x_nC = rows(x_NCS)
        n = len(x_nC)
        dy_nC = np.zeros_like(x_nC) if dy_NCS is None else rows(dy_NCS)
        gamma: Floats | float = 1.0 if gamma_C is None else gamma_C
        beta: Floats | float = 0.0 if beta_C is None else beta_C
        u = float(np.finfo(dtype).eps) / 2
        c = (n + 8) * u / (1 - (n + 8) * u)

        mean, var = x_nC.mean(axis=0), x_nC.var(axis=0)
        std = np.sqrt(var + EPS)
        xhat = (x_nC - mean) / std
        scale = np.abs(gamma) / std
        correlation = np.abs((dy_nC * xhat).mean(axis=0))

        mean_error = c * np.abs(x_nC).mean(axis=0)
        var_error = c * var + 2 * mean_error**2
        half = var_error / (2 * (var + EPS))
        xhat_error = mean_error / std + np.abs(xhat) * (half + c)
        y_error = np.abs(gamma) * xhat_error + c * (scale * (np.abs(x_nC - mean) + np.abs(mean)) + np.abs(beta))
        dbeta_error = n * c * np.abs(dy_nC).mean(axis=0)
        dgamma_error = (np.abs(dy_nC) * xhat_error).sum(axis=0) + n * c * np.abs(dy_nC * xhat).mean(axis=0)
        dx_error = scale * (
            (half + c) * (np.abs(dy_nC) + np.abs(dy_nC.mean(axis=0)) + np.abs(xhat) * correlation)
            + dbeta_error / n
            + np.abs(xhat) * dgamma_error / n
            + xhat_error * correlation
        )
        return cls(
            mean_C=2 * mean_error,
            var_C=2 * var_error,
            y_nC=2 * y_error,
            dx_nC=2 * dx_error,
            dgamma_C=2 * dgamma_error,
            dbeta_C=2 * dbeta_error,
        )


def assert_within(got: Floats, want: Floats, tolerance: Floats | float) -> None:
    """Compare element by element, each with its own tolerance."""
    assert got.shape == want.shape
    error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    tolerances = np.broadcast_to(tolerance, error.shape)
    worst = np.unravel_index(int(np.argmax(error - tolerances)), error.shape) if error.size else ()
    assert (error <= tolerances).all(), f"off by {error[worst]} at {worst}; the tolerance is {tolerances[worst]}"


# torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from starting a pool of threads for a few hundred numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensor(values: Floats | None, *, requires_grad: bool = False) -> torch.Tensor | None:
    """Copy an array that may be absent into a tensor of the same dtype."""
    return None if values is None else torch.tensor(values, requires_grad=requires_grad)


def torch_gradients(y: torch.Tensor, dy_NCS: Floats, *leaves: torch.Tensor | None) -> list[Floats]:
    """Return what autograd finds at the leaves; an empty array stands for a leaf that is absent."""
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], torch.tensor(dy_NCS)))
    return [np.empty(0) if leaf is None else next(found).numpy() for leaf in leaves]


def torch_batch_norm(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    running: RunningStatistics | None = None,
) -> torch.Tensor:
    """Run torch's own BatchNorm: in training mode without running statistics, in eval mode with them."""
    if running is None:
        return torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    mean, var = torch.tensor(running.mean_C).to(x.dtype), torch.tensor(running.var_C).to(x.dtype)
    return torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS)


@ranks
@affine
@precisions
def test_training_forward_and_backward_are_torchs(
    shape: tuple[int, ...], gamma_C: Array | None, beta_C: Array | None, dtype: type[np.floating[Any]]
) -> None:
    """In training mode y, dx, dgamma and dbeta are torch's, within the rounding errors of both."""
    x_NCS, dy_NCS = sample(shape, dtype=dtype), gradient(shape, dtype=dtype)
    gamma, beta = rounded(gamma_C, dtype), rounded(beta_C, dtype)
    want_x, want_gamma, want_beta = (tensor(values, requires_grad=True) for values in (x_NCS, gamma, beta))
    assert want_x is not None
    want_y = torch_batch_norm(want_x, want_gamma, want_beta)
    want_dx, want_dgamma, want_dbeta = torch_gradients(want_y, dy_NCS, want_x, want_gamma, want_beta)

    y_NCS = forward_train(x_NCS, eps=EPS, gamma_C=gamma, beta_C=beta)
    gradients = backward_train(dy_NCS, x_NCS, eps=EPS, gamma_C=gamma)

    errors = TrainErrors.of(x_NCS, gamma_C=gamma, beta_C=beta, dy_NCS=dy_NCS, dtype=dtype)
    assert_within(rows(want_y.detach().numpy()), rows(y_NCS), errors.y_nC)
    assert_within(rows(want_dx), rows(gradients.dx_NCS), errors.dx_nC)
    if gamma is not None:
        assert_within(want_dgamma, gradients.dgamma_C, errors.dgamma_C)
    if beta is not None:
        assert_within(want_dbeta, gradients.dbeta_C, errors.dbeta_C)


@ranks
@affine
@precisions
def test_eval_forward_and_backward_are_torchs(
    shape: tuple[int, ...], gamma_C: Array | None, beta_C: Array | None, dtype: type[np.floating[Any]]
) -> None:
    """In eval mode y, dx, dgamma and dbeta are torch's; y within the derived bound of either computation."""
    x_NCS, dy_NCS = sample(shape, dtype=dtype), gradient(shape, dtype=dtype)
    gamma, beta, running = rounded(gamma_C, dtype), rounded(beta_C, dtype), running_in(dtype)
    want_x, want_gamma, want_beta = (tensor(values, requires_grad=True) for values in (x_NCS, gamma, beta))
    assert want_x is not None
    want_y = torch_batch_norm(want_x, want_gamma, want_beta, running=running)
    want_dx, want_dgamma, want_dbeta = torch_gradients(want_y, dy_NCS, want_x, want_gamma, want_beta)

    y_NCS = forward_eval(x_NCS, running, eps=EPS, gamma_C=gamma, beta_C=beta)
    gradients = backward_eval(dy_NCS, x_NCS, running, eps=EPS, gamma_C=gamma)

    theirs, ours = (
        eval_error_bound(x_NCS, running, eps=EPS, gamma_C=gamma, beta_C=beta, dtype=precision)
        for precision in (dtype, np.float64)
    )
    assert_within(want_y.detach().numpy(), y_NCS, theirs + ours)
    # Each term of a sum has at most 8 roundings of its own (see eval_error_bound), and the sum brings n. Twice, because
    # both sides round.
    n = len(rows(x_NCS))
    c = 2 * (n + 8) * float(np.finfo(dtype).eps) / 2
    xhat_nC = rows(forward_eval(x_NCS, running, eps=EPS))
    assert_within(want_dx, gradients.dx_NCS, c * np.abs(gradients.dx_NCS))
    if gamma is not None:
        assert_within(want_dgamma, gradients.dgamma_C, c * np.abs(rows(dy_NCS) * xhat_nC).sum(axis=0))
    if beta is not None:
        assert_within(want_dbeta, gradients.dbeta_C, c * np.abs(rows(dy_NCS)).sum(axis=0))


MODULES: dict[int, type[torch.nn.Module]] = {
    2: torch.nn.BatchNorm1d,
    3: torch.nn.BatchNorm1d,
    4: torch.nn.BatchNorm2d,
    5: torch.nn.BatchNorm3d,
}


@ranks
@pytest.mark.parametrize("momentum", [MOMENTUM, None], ids=["momentum", "cumulative"])
def test_running_statistics_follow_torchs_buffers(shape: tuple[int, ...], momentum: float | None) -> None:
    """After each of four training batches mean, variance and count are torch's buffers, and so is y in eval mode."""
    layer = MODULES[len(shape)](3, eps=EPS, momentum=momentum).double()
    torch_mean, torch_var, torch_count = (
        layer.get_buffer(name) for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    torch_mean.copy_(torch.tensor(RUNNING.mean_C))
    torch_var.copy_(torch.tensor(RUNNING.var_C))
    torch_count.fill_(RUNNING.num_batches_tracked)
    rule: UpdateRule = CumulativeAverage() if momentum is None else PyTorchMomentum(momentum=momentum)

    # An update carries the errors of old and new, with weights that sum to 1, and brings the 4 roundings of
    # (1 - weight) * old + weight * new. Twice, because both sides round.
    u, running, mean_tolerance, var_tolerance = 2.0**-53, RUNNING, np.zeros(3), np.zeros(3)
    for step in range(4):
        x_NCS = sample(shape, seed=step)
        batch, errors = batch_statistics(x_NCS), TrainErrors.of(x_NCS)
        mean_tolerance += errors.mean_C + 2 * 4 * u * (np.abs(running.mean_C) + np.abs(batch.mean_C))
        var_tolerance += errors.var_C * batch.count / (batch.count - 1)
        var_tolerance += 2 * 4 * u * (running.var_C + batch.unbiased_var_C)
        running = updated(running, batch, rule)
        layer.train()(torch.tensor(x_NCS))
        assert_within(torch_mean.numpy(), running.mean_C, mean_tolerance)
        assert_within(torch_var.numpy(), running.var_C, var_tolerance)
        assert running.num_batches_tracked == torch_count.item() == RUNNING.num_batches_tracked + step + 1

    x_NCS = sample(shape, seed=7)
    held = RunningStatistics(mean_C=torch_mean.numpy(), var_C=torch_var.numpy(), num_batches_tracked=9)
    want_y = layer.eval()(torch.tensor(x_NCS)).detach().numpy()
    assert_within(
        want_y, forward_eval(x_NCS, held, eps=EPS), 2 * eval_error_bound(x_NCS, held, eps=EPS, dtype=np.float64)
    )


def test_initial_statistics_are_those_of_a_new_torch_layer() -> None:
    """A layer that has seen nothing has mean 0, variance 1 and count 0."""
    layer, running = torch.nn.BatchNorm1d(3).double(), RunningStatistics.initial(3)
    assert running.mean_C.tolist() == layer.get_buffer("running_mean").tolist()
    assert running.var_C.tolist() == layer.get_buffer("running_var").tolist()
    assert running.num_batches_tracked == layer.get_buffer("num_batches_tracked").item()


def test_one_value_per_channel_is_refused_where_torch_refuses_it() -> None:
    """Training on one value per channel raises, as in torch; one sample with several positions does not."""
    one_value, several_positions = sample((1, 3, 1)), sample((1, 3, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        torch_batch_norm(torch.tensor(one_value), None, None)
    with pytest.raises(ValueError, match="n = 1 per channel"):
        forward_train(one_value, eps=EPS)
    torch_batch_norm(torch.tensor(several_positions), None, None)
    forward_train(several_positions, eps=EPS)


# onnxruntime


@pytest.fixture(scope="module")
def ort() -> Any:
    """Import onnxruntime with its reports to Microsoft off; it has no types."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


def run_onnx(
    ort: Any,
    x_NCS: Floats,
    running: RunningStatistics,
    *,
    gamma_C: Floats,
    beta_C: Floats,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> list[Floats]:
    """Run a graph of one BatchNormalization-15 in float32, its statistics initializers."""
    vectors = {"gamma": gamma_C, "beta": beta_C, "mean": running.mean_C, "var": running.var_C}
    node = helper.make_node("BatchNormalization", ["x", *vectors], outputs, epsilon=EPS, **attributes)
    graph = helper.make_graph(
        [node],
        "one_batchnorm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_NCS.shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, x_NCS.shape if name == "y" else [3])
            for name in outputs
        ],
        [helper.make_tensor(name, TensorProto.FLOAT, [3], values_C) for name, values_C in vectors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Floats] = session.run(list(outputs), {"x": x_NCS})
    return found


@ranks
def test_eval_is_onnxruntimes_within_the_bound(shape: tuple[int, ...], ort: Any) -> None:
    """What onnxruntime serves in float32 is the oracle's y, within the derived bound of float32."""
    x_NCS, running = sample(shape, dtype=np.float32), running_in(np.float32)
    gamma, beta = GAMMA_C.astype(np.float32), BETA_C.astype(np.float32)
    [y_NCS] = run_onnx(ort, x_NCS, running, gamma_C=gamma, beta_C=beta)
    want_NCS = forward_eval(x_NCS, running, eps=EPS, gamma_C=gamma, beta_C=beta)
    assert_within(y_NCS, want_NCS, eval_error_bound(x_NCS, running, eps=EPS, gamma_C=gamma, beta_C=beta))


@ranks
def test_onnx_training_mode_updates_by_the_keras_rule(shape: tuple[int, ...], ort: Any) -> None:
    """ONNX BatchNormalization-15 keeps momentum * old + (1 - momentum) * new, the variance biased, as Keras does."""
    x_NCS, running = sample(shape, dtype=np.float32), running_in(np.float32)
    gamma, beta = GAMMA_C.astype(np.float32), BETA_C.astype(np.float32)
    y_NCS, mean_C, var_C = run_onnx(
        ort,
        x_NCS,
        running,
        gamma_C=gamma,
        beta_C=beta,
        outputs=("y", "running_mean", "running_var"),
        training_mode=1,
        momentum=MOMENTUM,
    )
    batch, errors = batch_statistics(x_NCS), TrainErrors.of(x_NCS, gamma_C=gamma, beta_C=beta, dtype=np.float32)
    want = updated(running, batch, KerasMomentum(momentum=MOMENTUM))
    u = 2.0**-24  # times 5: the 4 roundings of the update, and momentum rounded to the float of an attribute
    assert_within(rows(y_NCS), rows(forward_train(x_NCS, eps=EPS, gamma_C=gamma, beta_C=beta)), errors.y_nC)
    assert_within(mean_C, want.mean_C, errors.mean_C + 5 * u * (np.abs(running.mean_C) + np.abs(batch.mean_C)))
    assert_within(var_C, want.var_C, errors.var_C + 5 * u * (running.var_C + batch.var_C))


# The rules against exact arithmetic: `statistics` sums rationals and rounds once


def exact(x_NCS: Floats, of: Callable[[list[float]], float]) -> Array:
    """Apply a function of the standard library's `statistics` to each channel."""
    return np.array([of(channel) for channel in rows(x_NCS).T.tolist()])


@pytest.mark.parametrize(
    ("rule", "of_variance", "weights"),
    [
        pytest.param(
            PyTorchMomentum(momentum=0.27),
            statistics.variance,
            [0.73**3, 0.27 * 0.73**2, 0.27 * 0.73, 0.27],
            id="pytorch",
        ),
        pytest.param(
            KerasMomentum(momentum=0.27), statistics.pvariance, [0.27**3, 0.73 * 0.27**2, 0.73 * 0.27, 0.73], id="keras"
        ),
        pytest.param(CumulativeAverage(), statistics.variance, [5 / 8, 1 / 8, 1 / 8, 1 / 8], id="cumulative"),
    ],
)
def test_three_updates_have_their_closed_form(
    rule: UpdateRule, of_variance: Callable[[list[float]], float], weights: list[float]
) -> None:
    """After three batches the statistics are a weighted sum of the first ones and the batches', with known weights."""
    seen = [sample((4, 3, 5, 2), seed=seed) for seed in range(3)]
    running = RUNNING
    for x_NCS in seen:
        running = updated(running, batch_statistics(x_NCS), rule)

    means = np.array([RUNNING.mean_C, *(exact(x_NCS, statistics.fmean) for x_NCS in seen)])
    variances = np.array([RUNNING.var_C, *(exact(x_NCS, of_variance) for x_NCS in seen)])
    errors = [TrainErrors.of(x_NCS) for x_NCS in seen]
    # Beside the errors of the batches: three updates of 4 roundings, and up to 8 in the closed form itself.
    u, n = 2.0**-53, 40
    mean_tolerance = sum(error.mean_C for error in errors) + 20 * u * np.abs(means).max(axis=0)
    var_tolerance = sum(error.var_C for error in errors) * n / (n - 1) + 20 * u * variances.max(axis=0)
    assert_within(running.mean_C, weights @ means, mean_tolerance)
    assert_within(running.var_C, weights @ variances, var_tolerance)


# Gradients against finite differences


@ranks
def test_training_gradients_are_finite_differences_of_the_forward(shape: tuple[int, ...]) -> None:
    """dx, dgamma and dbeta are what a small change of one number does to the loss sum(dy * y)."""
    x_NCS, dy_NCS = sample(shape), gradient(shape)
    gradients = backward_train(dy_NCS, x_NCS, eps=EPS, gamma_C=GAMMA_C)

    def loss(x: Floats, gamma_C: Floats, beta_C: Floats) -> float:
        return float((dy_NCS * forward_train(x, eps=EPS, gamma_C=gamma_C, beta_C=beta_C)).sum())

    y_error = TrainErrors.of(x_NCS, gamma_C=GAMMA_C, beta_C=BETA_C).y_nC
    # 2 for the change of y within a step, which is small beside y.
    loss_error = 2 * float((np.abs(rows(dy_NCS)) * y_error).sum())
    point = [np.asarray(x_NCS, dtype=np.float64), GAMMA_C, BETA_C]
    for position, want in enumerate([gradients.dx_NCS, gradients.dgamma_C, gradients.dbeta_C]):
        for index in np.ndindex(want.shape):
            got, tolerance = derivative(loss, point, position, index, loss_error)
            assert abs(got - want[index]) <= tolerance


@ranks
def test_eval_gradients_are_finite_differences_of_the_forward(shape: tuple[int, ...]) -> None:
    """With constant statistics too, dx, dgamma and dbeta are what a small change does to the loss sum(dy * y)."""
    x_NCS, dy_NCS = sample(shape), gradient(shape)
    gradients = backward_eval(dy_NCS, x_NCS, RUNNING, eps=EPS, gamma_C=GAMMA_C)

    def loss(x: Floats, gamma_C: Floats, beta_C: Floats) -> float:
        return float((dy_NCS * forward_eval(x, RUNNING, eps=EPS, gamma_C=gamma_C, beta_C=beta_C)).sum())

    bound = eval_error_bound(x_NCS, RUNNING, eps=EPS, gamma_C=GAMMA_C, beta_C=BETA_C, dtype=np.float64)
    y_NCS = forward_eval(x_NCS, RUNNING, eps=EPS, gamma_C=GAMMA_C, beta_C=BETA_C)
    # The rounding of y, and of the sum over it; 2 as above.
    loss_error = 2 * float((np.abs(dy_NCS) * (bound + dy_NCS.size * 2.0**-53 * np.abs(y_NCS))).sum())
    point = [np.asarray(x_NCS, dtype=np.float64), GAMMA_C, BETA_C]
    for position, want in enumerate([gradients.dx_NCS, gradients.dgamma_C, gradients.dbeta_C]):
        for index in np.ndindex(want.shape):
            got, tolerance = derivative(loss, point, position, index, loss_error)
            assert abs(got - want[index]) <= tolerance


def derivative(
    loss: Callable[..., float], point: list[Array], position: int, index: tuple[int, ...], loss_error: float
) -> tuple[float, float]:
    """Return a derivative extrapolated from two central differences (Richardson), and how far it may be off.

    The difference over h is off by a * h**2 + O(h**4). So the halved step is off by a third of what separates the two,
    which the extrapolation removes and the tolerance keeps; rounding adds loss_error / h, magnified by (4 * 2 + 1) / 3.
    """

    def difference(step: float) -> float:
        losses = []
        for sign in (1, -1):
            moved = [values.copy() for values in point]
            moved[position][index] += sign * step
            losses.append(loss(*moved))
        return (losses[0] - losses[1]) / (2 * step)

    step = 2.0**-10  # beside standard deviations near 0.2
    wide, narrow = difference(step), difference(step / 2)
    return (4 * narrow - wide) / 3, abs(narrow - wide) / 3 + 3 * loss_error / step


# Properties


unhurried = settings(deadline=None)  # a busy machine is not a failure


@st.composite
def batch_arrays(draw: st.DrawFn, *, least_rows: int = 2) -> Array:
    """Draw (N, C, L) with values that neither over- nor underflow where they are squared."""
    shape = draw(st.tuples(st.integers(least_rows, 6), st.integers(1, 4), st.integers(1, 3)))
    return draw(hnp.arrays(np.float64, shape, elements=st.floats(-100, 100).map(lambda value: round(value, 6))))


def statistics_for(x_NCS: Floats, seed: int) -> RunningStatistics:
    """Make up running statistics with as many channels as x."""
    random = np.random.default_rng(seed)
    channels: int = x_NCS.shape[1]
    return RunningStatistics(
        mean_C=random.normal(5, 3, channels), var_C=random.uniform(0.01, 0.1, channels), num_batches_tracked=2
    )


@unhurried
@given(x_NCS=batch_arrays())
def test_training_output_has_mean_beta_and_variance_gamma_squared_times_v_over_v_plus_eps(x_NCS: Array) -> None:
    """Whatever the batch, y has mean beta and variance gamma**2 * var / (var + eps) in each channel."""
    channels = x_NCS.shape[1]
    gamma_C, beta_C = np.linspace(-1.5, 2.5, channels), np.linspace(3, -4, channels)
    y_nC = rows(forward_train(x_NCS, eps=EPS, gamma_C=gamma_C, beta_C=beta_C))
    x_nC, y_error = rows(x_NCS), TrainErrors.of(x_NCS, gamma_C=gamma_C, beta_C=beta_C).y_nC

    var_C = exact(x_NCS, statistics.pvariance)
    want_var_C = gamma_C**2 * var_C / (var_C + EPS)
    # Errors of y move its mean by no more than their own mean, its variance by 2 * |y - mean| * error + error**2;
    # taking mean and variance of y rounds as it does for x.
    c = (len(x_nC) + 8) * 2.0**-53
    mean_error = y_error.mean(axis=0) + c * np.abs(y_nC).mean(axis=0)
    var_error = 2 * (np.abs(y_nC - beta_C) * y_error).mean(axis=0) + y_error.max(axis=0) ** 2 + 2 * c * want_var_C
    assert_within(y_nC.mean(axis=0), beta_C, mean_error)
    assert_within(y_nC.var(axis=0), want_var_C, var_error + 2 * mean_error**2)


@unhurried
@given(x_NCS=batch_arrays(least_rows=1), seed=st.integers(0, 9))
def test_a_row_in_eval_does_not_depend_on_its_neighbours(x_NCS: Array, seed: int) -> None:
    """In eval mode each sample gets, alone, the very bits that it gets in a batch."""
    running = statistics_for(x_NCS, seed)
    together = forward_eval(x_NCS, running, eps=EPS)
    alone = np.concatenate([forward_eval(row[np.newaxis], running, eps=EPS) for row in x_NCS])
    assert together.tobytes() == alone.tobytes()


@unhurried
@given(data=st.data(), x_NCS=batch_arrays(), seed=st.integers(0, 9))
def test_permuting_the_rows_permutes_the_outputs(data: st.DataObject, x_NCS: Array, seed: int) -> None:
    """No sample's place in the batch matters: to the bit in eval mode, to rounding in training mode."""
    order = data.draw(st.permutations(range(len(x_NCS))))
    running = statistics_for(x_NCS, seed)
    permuted_NCS = x_NCS[order]
    assert (
        forward_eval(permuted_NCS, running, eps=EPS).tobytes() == forward_eval(x_NCS, running, eps=EPS)[order].tobytes()
    )
    trained_NCS = forward_train(x_NCS, eps=EPS)[order]
    assert_within(rows(forward_train(permuted_NCS, eps=EPS)), rows(trained_NCS), TrainErrors.of(permuted_NCS).y_nC)


@unhurried
@given(x_NCS=batch_arrays())
def test_training_is_eval_with_the_statistics_of_the_batch(x_NCS: Array) -> None:
    """The two modes are one formula: they differ only in whose mean and variance they take."""
    batch = batch_statistics(x_NCS)
    of_batch = RunningStatistics(mean_C=batch.mean_C, var_C=batch.var_C, num_batches_tracked=1)
    assert forward_train(x_NCS, eps=EPS).tobytes() == forward_eval(x_NCS, of_batch, eps=EPS).tobytes()


@unhurried
@given(shape=st.sampled_from(SHAPES[1:]), seed=st.integers(0, 99))
def test_positions_count_as_samples(shape: tuple[int, ...], seed: int) -> None:
    """BatchNorm over (N, C, positions) is BatchNorm over (N * positions, C), the paper's section 3.2."""
    x_NCS = sample(shape, seed=seed)
    y_nC = forward_train(rows(x_NCS), eps=EPS, gamma_C=GAMMA_C, beta_C=BETA_C)
    assert (rows(forward_train(x_NCS, eps=EPS, gamma_C=GAMMA_C, beta_C=BETA_C)) == y_nC).all()


@unhurried
@given(x_NCS=batch_arrays(), steps=st.integers(1, 9))
def test_cumulative_average_of_equal_batches_is_their_mean(x_NCS: Array, steps: int) -> None:
    """From a layer that has seen nothing, the same batch again and again leaves its own mean and unbiased variance."""
    batch = batch_statistics(x_NCS)
    running = RunningStatistics.initial(x_NCS.shape[1])
    for _ in range(steps):
        running = updated(running, batch, CumulativeAverage())
    c = 4 * steps * 2.0**-53  # 4 roundings an update; the values given away have weight 0 from the first update on
    assert_within(running.mean_C, batch.mean_C, c * np.abs(batch.mean_C))
    assert_within(running.var_C, batch.unbiased_var_C, c * batch.unbiased_var_C)


@unhurried
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6))
def test_cumulative_average_is_the_plain_mean_of_the_batches(seeds: list[int]) -> None:
    """From a layer that has seen nothing, each batch weighs the same, the first as much as the last."""
    seen = [batch_statistics(sample((5, 3, 4), seed=seed)) for seed in seeds]
    running = RunningStatistics.initial(3)
    for batch in seen:
        running = updated(running, batch, CumulativeAverage())
    means = np.array([batch.mean_C for batch in seen])
    variances = np.array([batch.unbiased_var_C for batch in seen])
    c = (4 * len(seen) + len(seen) + 1) * 2.0**-53  # 4 roundings an update, and those of the plain mean
    assert_within(running.mean_C, means.mean(axis=0), c * np.abs(means).max(axis=0))
    assert_within(running.var_C, variances.mean(axis=0), c * variances.max(axis=0))


# The bound


def float32_forms(
    x_NC: Floats, running: RunningStatistics, *, gamma_C: Floats, beta_C: Floats
) -> dict[str, NDArray[np.float32]]:
    """Compute eval BatchNorm in float32 in each form that the bound promises to cover."""
    x, gamma, beta, mean, var = (
        np.asarray(values, dtype=np.float32) for values in (x_NC, gamma_C, beta_C, running.mean_C, running.var_C)
    )
    std = np.sqrt(var + np.float32(EPS))
    r = np.float32(1) / std
    scale = gamma * r
    shift = beta - mean * scale
    return {
        "unfused, divided": (x - mean) / std * gamma + beta,
        "unfused, multiplied": (x - mean) * r * gamma + beta,
        "unfused, scaled": (x - mean) * scale + beta,
        "scale and shift": x * scale + shift,
    }


def float32s(low: float, high: float) -> st.SearchStrategy[float]:
    """Draw numbers of float32 in a range, either sign, none so small that a product underflows."""
    positive = st.floats(low, high, width=32)
    return st.one_of(positive, positive.map(lambda value: -value), st.just(0.0))


@unhurried
@given(data=st.data())
def test_no_float32_form_leaves_the_bound(data: st.DataObject) -> None:
    """Whatever the numbers, every float32 form of eval BatchNorm is within the bound of the oracle."""
    vector = hnp.arrays(np.float32, 3, elements=float32s(2.0**-10, 2.0**10))
    x_NC = data.draw(hnp.arrays(np.float32, (4, 3), elements=float32s(2.0**-10, 2.0**10)))
    gamma_C, beta_C, mean_C = data.draw(vector), data.draw(vector), data.draw(vector)
    var_C = np.abs(data.draw(vector))
    running = RunningStatistics(mean_C=mean_C.astype(np.float64), var_C=var_C.astype(np.float64), num_batches_tracked=1)
    want_NC = forward_eval(x_NC, running, eps=EPS, gamma_C=gamma_C, beta_C=beta_C)
    bound, ours = (
        eval_error_bound(x_NC, running, eps=EPS, gamma_C=gamma_C, beta_C=beta_C, dtype=dtype)
        for dtype in (np.float32, np.float64)
    )
    for y_NC in float32_forms(x_NC, running, gamma_C=gamma_C, beta_C=beta_C).values():
        assert_within(y_NC, want_NC, bound + ours)


@pytest.mark.parametrize(
    ("term", "form", "mean", "spread", "gamma", "beta"),
    [
        ("scale * (x - mean)", "unfused, multiplied", 0.0, 3.0, 1.7, 0.0),
        ("scale * mean", "scale and shift", 1000.0, 0.01, 1.7, 0.0),
        ("beta", "scale and shift", 3.0, 0.2, 2.0**-22, 0.7),
    ],
)
def test_the_bound_needs_each_term_and_is_not_far_above_the_truth(
    term: str, form: str, mean: float, spread: float, gamma: float, beta: float
) -> None:
    """Where one term is nearly all of the bound, the float32 error comes within a factor of 3 of it."""
    random = np.random.default_rng(5)
    x_NC = (mean + spread * random.standard_normal((100, 500))).astype(np.float32)
    var_C = random.uniform(0.04, 0.08, 500).astype(np.float32)
    running = RunningStatistics(mean_C=np.full(500, mean), var_C=var_C.astype(np.float64), num_batches_tracked=1)
    gamma_C = (gamma * random.uniform(0.9, 1.1, 500)).astype(np.float32)
    beta_C = np.full(500, beta, dtype=np.float32)
    y_NC = float32_forms(x_NC, running, gamma_C=gamma_C, beta_C=beta_C)[form]
    want_NC = forward_eval(x_NC, running, eps=EPS, gamma_C=gamma_C, beta_C=beta_C)
    bound = eval_error_bound(x_NC, running, eps=EPS, gamma_C=gamma_C, beta_C=beta_C)
    assert_within(y_NC, want_NC, bound)
    share = float((np.abs(y_NC - want_NC) / bound).max())
    assert share > 1 / 3, f"the bound of {term} is loose: {share}"


def test_the_bound_sees_a_forgotten_eps() -> None:
    """What the bound is for: y without eps is out of it by a factor of more than ten thousand."""
    x_NC, running = sample((7, 3), dtype=np.float32), running_in(np.float32)
    bound = eval_error_bound(x_NC, running, eps=EPS)
    error = np.abs(forward_eval(x_NC, running, eps=EPS) - forward_eval(x_NC, running, eps=0.0))
    assert (error > 1e4 * bound).any()


# Values, refusals, and the room


def test_statistics_are_copies_that_stand_still() -> None:
    """The buffer that the statistics came from may change; they do not, and nobody can write to them."""
    buffer_C = np.ones(3)
    running = RunningStatistics(mean_C=buffer_C, var_C=buffer_C, num_batches_tracked=0)
    buffer_C[:] = 7
    assert running.mean_C.tolist() == running.var_C.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        running.mean_C[0] = 7


def test_arguments_are_not_changed() -> None:
    """Forward and backward leave x, dy, gamma and beta as they were."""
    given_arrays = [sample((5, 3, 4)), gradient((5, 3, 4)), GAMMA_C.copy(), BETA_C.copy()]
    before = [values.copy() for values in given_arrays]
    x, dy, gamma, beta = given_arrays
    forward_train(x, eps=EPS, gamma_C=gamma, beta_C=beta)
    forward_eval(x, RUNNING, eps=EPS, gamma_C=gamma, beta_C=beta)
    backward_train(dy, x, eps=EPS, gamma_C=gamma)
    backward_eval(dy, x, RUNNING, eps=EPS, gamma_C=gamma)
    assert all((now == then).all() for now, then in zip(given_arrays, before, strict=True))


def test_an_empty_batch_in_eval_gives_an_empty_answer() -> None:
    """No samples is a batch too, when nothing is computed from the batch."""
    assert forward_eval(np.empty((0, 3, 4)), RUNNING, eps=EPS).shape == (0, 3, 4)


X = sample((7, 3))
WRONG_CHANNELS = (
    "wanted (3,), one value for each channel of x_NCS; pass the vector of this layer, or move the channels of x_NCS to "
    "axis 1"
)


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "rank 1": (
        lambda: forward_eval(np.ones(3), RUNNING, eps=EPS),
        "x_NCS has shape (3,); wanted rank 2 to 5, from (N, C) to (N, C, D, H, W); reshape it so that axis 0 is the "
        "batch and axis 1 the channels",
    ),
    "rank 6": (
        lambda: batch_statistics(np.ones((2, 3, 1, 1, 1, 1))),
        "x_NCS has shape (2, 3, 1, 1, 1, 1); wanted rank 2 to 5, from (N, C) to (N, C, D, H, W); reshape it so that "
        "axis 0 is the batch and axis 1 the channels",
    ),
    "integers": (
        lambda: forward_train(np.ones((7, 3), dtype=np.int64), eps=EPS),
        "x_NCS has dtype int64; wanted a float dtype; convert it with .astype(np.float64)",
    ),
    "complex gamma": (
        lambda: forward_train(X, eps=EPS, gamma_C=np.ones(3, dtype=np.complex128)),
        "gamma_C has dtype complex128; wanted a float dtype; convert it with .astype(np.float64)",
    ),
    "gamma": (
        lambda: forward_train(X, eps=EPS, gamma_C=np.ones(4)),
        f"gamma_C has shape (4,); {WRONG_CHANNELS}",
    ),
    "beta": (
        lambda: forward_eval(X, RUNNING, eps=EPS, beta_C=np.ones((1, 3))),
        f"beta_C has shape (1, 3); {WRONG_CHANNELS}",
    ),
    "running statistics": (
        lambda: forward_eval(X, RunningStatistics.initial(7), eps=EPS),
        f"mean_C has shape (7,); {WRONG_CHANNELS}",
    ),
    "dy": (
        lambda: backward_train(X[1:], X, eps=EPS),
        "dy_NCS has shape (6, 3); wanted (7, 3), the shape of x_NCS; pass the gradient at the output for this x",
    ),
    "one value per channel": (
        lambda: batch_statistics(X[:1]),
        "x_NCS has shape (1, 3), that is n = 1 per channel; training wants 2 values or more, since with one y would be "
        "beta whatever x is; take a larger batch, or forward_eval for one sample",
    ),
    "count": (
        lambda: BatchStatistics(mean_C=np.ones(3), var_C=np.ones(3), count=1),
        "count is 1; wanted at least 2 values per channel, since one value has no variance; take a larger batch",
    ),
    "negative eps": (
        lambda: forward_eval(X, RUNNING, eps=-0.03),
        "eps is -0.03; wanted a finite number, 0 or more; pass the eps of the layer (PyTorch's default is 1e-5, "
        "Keras's 1e-3)",
    ),
    "eps not a number": (
        lambda: forward_train(X, eps=math.nan),
        "eps is nan; wanted a finite number, 0 or more; pass the eps of the layer (PyTorch's default is 1e-5, "
        "Keras's 1e-3)",
    ),
    "division by zero": (
        lambda: forward_train(np.array([[1.0, 4.0], [2.0, 4.0]]), eps=0.0),
        "var_C is 0 at channel 1 and so is eps; wanted var + eps > 0, since x is divided by its root; "
        "pass the eps of the layer",
    ),
    "two lengths": (
        lambda: RunningStatistics(mean_C=np.ones(3), var_C=np.ones(4), num_batches_tracked=1),
        "mean_C has shape (3,) and var_C (4,); wanted two vectors of one length, a value per channel; "
        "pass the statistics of one layer",
    ),
    "negative variance": (
        lambda: RunningStatistics(mean_C=np.ones(2), var_C=np.array([0.5, -0.25]), num_batches_tracked=1),
        "var_C is -0.25 at channel 1; wanted 0 or more, as a mean of squares is; "
        "recompute the statistics, or look for a mean in the place of a variance",
    ),
    "variance not a number": (
        lambda: RunningStatistics(mean_C=np.ones(2), var_C=np.array([math.nan, 0.5]), num_batches_tracked=1),
        "var_C is nan at channel 0; wanted 0 or more, as a mean of squares is; "
        "recompute the statistics, or look for a mean in the place of a variance",
    ),
    "negative number of batches": (
        lambda: RunningStatistics(mean_C=np.ones(3), var_C=np.ones(3), num_batches_tracked=-1),
        "num_batches_tracked is -1; wanted 0 or more; pass the number of training batches these statistics have seen",
    ),
    "statistics of another layer": (
        lambda: updated(RunningStatistics.initial(4), batch_statistics(X), CumulativeAverage()),
        "batch has 3 channels; wanted 4, as in the running statistics; pass the statistics of the same layer",
    ),
    "momentum above 1": (
        lambda: PyTorchMomentum(momentum=1.5),
        "momentum is 1.5; wanted 0 to 1; pass the momentum of the layer, or CumulativeAverage() for PyTorch's "
        "momentum=None",
    ),
    "momentum below 0": (
        lambda: KerasMomentum(momentum=-0.1),
        "momentum is -0.1; wanted 0 to 1; pass the momentum of the layer, or CumulativeAverage() for PyTorch's "
        "momentum=None",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_what_came_what_was_wanted_and_what_to_do(call: Callable[[], object], sentence: str) -> None:
    """Input without a meaning is refused with a sentence."""
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


def test_every_refusal_in_the_module_is_in_the_table() -> None:
    """No `raise` of the module goes without a row that reaches it."""
    reached = set()
    for call, _ in REFUSALS.values():
        with pytest.raises(ValueError, match="; ") as refusal:
            call()
        reached.add(refusal.traceback[-1].lineno + 1)
    tree = ast.parse(Path(batchnorm.__file__).read_text(encoding="utf-8"))
    assert reached == {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}


def test_the_oracle_knows_nothing_but_numpy() -> None:
    """The module imports NumPy and the standard library, so that it cannot repeat a mistake of torch's."""
    tree = ast.parse(Path(batchnorm.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"math", "dataclasses", "typing", "numpy", "numpy.typing"}


def test_the_examples_in_the_docstrings_run() -> None:
    """What a docstring shows is what happens."""
    failed, attempted = doctest.testmod(batchnorm)
    assert failed == 0
    assert attempted > 10
