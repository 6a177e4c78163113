"""BatchNorm in NumPy float64, in training and in eval: the oracle of the tests, written apart from torch.

    xhat_nC = (x_nC - mean_C) / std_C           std_C = sqrt(var_C + eps)
    y_nC    = gamma_C * xhat_nC + beta_C

    training: the statistics of the batch       mean_C = sum_n(x_nC) / n
                                                var_C  = sum_n((x_nC - mean_C)**2) / n
    eval: the running statistics, constants     mean_C = running.mean_C,  var_C = running.var_C

    running statistics after a batch            new = (1 - weight) * old + weight * (mean_C, kept_var_C)
        PyTorchMomentum(momentum)               weight = momentum,                      kept_var_C = var_C * n / (n - 1)
        CumulativeAverage()                     weight = 1 / (num_batches_tracked + 1), kept_var_C = var_C * n / (n - 1)
        KerasMomentum(momentum)                 weight = 1 - momentum,                  kept_var_C = var_C

    backward, dy_nC the gradient at y_nC        dbeta_C  = sum_n(dy_nC)
                                                dgamma_C = sum_n(dy_nC * xhat_nC)
        training                                dx_nC = gamma_C / std_C * (dy_nC - dbeta_C / n - xhat_nC * dgamma_C / n)
        eval                                    dx_nC = gamma_C / std_C * dy_nC

Shapes: N samples, C channels, S the zero to three axes of positions (none, L, HW or DHW). `x_NCS` is an array of rank 2
to 5 with the channels on axis 1; `x_nC` is the same numbers as n rows, one for each sample and position, because the
positions of a channel share its statistics (the paper's section 3.2). Vectors end in `_C`.

1. Arguments are never changed, and values hold copies: `module.running_mean.numpy()` is the buffer that the next
   training step overwrites.
2. Any float dtype comes in, and is exact in the float64 that goes out. Integers are refused.
3. `eps` and `momentum` have no default: each framework has its own, and the difference is what an oracle is asked for.
4. gamma=None is gamma = 1 and beta=None is beta = 0; their gradients are given all the same.

Sources: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, arXiv 1502.03167 (algorithms 1 and 2, section 3); PyTorch
`nn.BatchNorm1d/2d/3d`; Keras 3 `BatchNormalization`; ONNX `BatchNormalization-15`.
"""

import math
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BatchStatistics",
    "CumulativeAverage",
    "Gradients",
    "KerasMomentum",
    "PyTorchMomentum",
    "RunningStatistics",
    "UpdateRule",
    "backward_eval",
    "backward_train",
    "batch_statistics",
    "eval_error_bound",
    "forward_eval",
    "forward_train",
    "updated",
]

Array: TypeAlias = NDArray[np.float64]
Floats: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningStatistics:
    """The moving averages a BatchNorm layer keeps while it learns and normalises with in eval mode.

    Raises:
        ValueError: a vector is not a vector of floats, the lengths differ, a variance is negative or NaN, or the count
            of batches is negative.
    """

    mean_C: Array
    var_C: Array
    num_batches_tracked: int

    def __post_init__(self) -> None:
        """Copy what was given, after checking it."""
        _keep_statistics(self)
        if self.num_batches_tracked < 0:
            raise ValueError(
                f"num_batches_tracked is {self.num_batches_tracked}; wanted 0 or more; "
                "pass the number of training batches these statistics have seen"
            )

    @classmethod
    def initial(cls, channels: int) -> Self:
        """Mean 0, variance 1, no batch seen: where PyTorch and Keras begin."""
        return cls(mean_C=np.zeros(channels), var_C=np.ones(channels), num_batches_tracked=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchStatistics:
    """Mean and biased variance of one training batch, over `count` values in each channel (the equations' n).

    Raises:
        ValueError: as for `RunningStatistics`, or `count` is less than 2.
    """

    mean_C: Array
    var_C: Array
    count: int

    def __post_init__(self) -> None:
        """Copy what was given, after checking it."""
        _keep_statistics(self)
        if self.count < 2:
            raise ValueError(
                f"count is {self.count}; wanted at least 2 values per channel, since one value has no variance; "
                "take a larger batch"
            )

    @property
    def unbiased_var_C(self) -> Array:
        """The variance with Bessel's correction, n / (n - 1)."""
        return self.var_C * (self.count / (self.count - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PyTorchMomentum:
    """PyTorch: `momentum` is the weight of the NEW batch, whose variance is kept unbiased.

    Raises:
        ValueError: `momentum` is not in 0 to 1.
    """

    momentum: float

    def __post_init__(self) -> None:
        """Check the range."""
        _require_momentum(self.momentum)


@dataclass(frozen=True, slots=True)
class CumulativeAverage:
    """PyTorch's `momentum=None`: the plain average of all batches so far, each with its variance unbiased."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasMomentum:
    """Keras 3, and ONNX from opset 14: `momentum` is the weight of the OLD value; the batch variance is kept biased.

    Raises:
        ValueError: `momentum` is not in 0 to 1.
    """

    momentum: float

    def __post_init__(self) -> None:
        """Check the range."""
        _require_momentum(self.momentum)


UpdateRule: TypeAlias = PyTorchMomentum | CumulativeAverage | KerasMomentum


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """The gradients at the inputs of a BatchNorm: `dx_NCS` in the shape of x, the others one value per channel."""

    dx_NCS: Array
    dgamma_C: Array
    dbeta_C: Array


def batch_statistics(x_NCS: Floats) -> BatchStatistics:
    """Mean and biased variance of each channel over the batch and its positions.

    Raises:
        ValueError: x is not a float array of rank 2 to 5, or has fewer than 2 values per channel (as in torch).

    >>> batch = batch_statistics(np.array([[1.0, 10.0], [3.0, 10.0], [8.0, 40.0]]))
    >>> batch.mean_C.tolist(), batch.count
    ([4.0, 20.0], 3)
    >>> batch.var_C * 3, batch.unbiased_var_C * 2
    (array([ 26., 600.]), array([ 26., 600.]))
    """
    x_nC = _rows("x_NCS", x_NCS)
    n, _ = x_nC.shape
    if n < 2:
        raise ValueError(
            f"x_NCS has shape {np.shape(x_NCS)}, that is n = {n} per channel; training wants 2 values or more, since "
            "with one y would be beta whatever x is; take a larger batch, or forward_eval for one sample"
        )
    mean_C = x_nC.sum(axis=0) / n
    var_C = ((x_nC - mean_C) ** 2).sum(axis=0) / n
    return BatchStatistics(mean_C=mean_C, var_C=var_C, count=n)


def updated(running: RunningStatistics, batch: BatchStatistics, rule: UpdateRule) -> RunningStatistics:
    """The running statistics after one more training batch.

    Raises:
        ValueError: the two have different numbers of channels.

    >>> old = RunningStatistics(mean_C=np.array([8.0]), var_C=np.array([4.0]), num_batches_tracked=3)
    >>> batch = BatchStatistics(mean_C=np.array([0.0]), var_C=np.array([2.0]), count=2)
    >>> for rule in PyTorchMomentum(momentum=0.25), CumulativeAverage(), KerasMomentum(momentum=0.25):
    ...     new = updated(old, batch, rule)
    ...     print(new.mean_C, new.var_C, new.num_batches_tracked)
    [6.] [4.] 4
    [6.] [4.] 4
    [2.] [2.5] 4
    """
    if running.mean_C.shape != batch.mean_C.shape:
        raise ValueError(
            f"batch has {batch.mean_C.size} channels; wanted {running.mean_C.size}, as in the running statistics; "
            "pass the statistics of the same layer"
        )
    match rule:
        case PyTorchMomentum(momentum=momentum):
            weight, kept_var_C = momentum, batch.unbiased_var_C
        case CumulativeAverage():
            weight, kept_var_C = 1 / (running.num_batches_tracked + 1), batch.unbiased_var_C
        case KerasMomentum(momentum=momentum):
            weight, kept_var_C = 1 - momentum, batch.var_C
        case _:  # pragma: no cover
            assert_never(rule)
    return RunningStatistics(
        mean_C=(1 - weight) * running.mean_C + weight * batch.mean_C,
        var_C=(1 - weight) * running.var_C + weight * kept_var_C,
        num_batches_tracked=running.num_batches_tracked + 1,
    )


def forward_train(x_NCS: Floats, *, eps: float, gamma_C: Floats | None = None, beta_C: Floats | None = None) -> Array:
    """The output in training mode: x normalised with the statistics of its own batch, which `updated` then takes.

    Raises:
        ValueError: as `batch_statistics`; eps is negative, or 0 beside a variance of 0; gamma or beta does not fit x.

    >>> forward_train(np.array([[1.0], [7.0]]), eps=7.0, gamma_C=np.array([2.0]), beta_C=np.array([10.0])).tolist()
    [[8.5], [11.5]]
    """
    batch = batch_statistics(x_NCS)
    x_nC = _rows("x_NCS", x_NCS)
    gamma_C, beta_C = _affine(gamma_C, beta_C, x_nC)
    xhat_nC, _ = _normalised(x_nC, batch, eps)
    return _from_rows(gamma_C * xhat_nC + beta_C, np.shape(x_NCS))


def forward_eval(
    x_NCS: Floats,
    running: RunningStatistics,
    *,
    eps: float,
    gamma_C: Floats | None = None,
    beta_C: Floats | None = None,
) -> Array:
    """The output in eval mode: each value by itself, whatever stands beside it.

    Raises:
        ValueError: x is not a float array of rank 2 to 5; eps is negative, or 0 beside a variance of 0; the running
            statistics, gamma or beta do not fit x.

    >>> running = RunningStatistics(mean_C=np.array([4.0]), var_C=np.array([9.0]), num_batches_tracked=1)
    >>> forward_eval(np.array([[1.0]]), running, eps=7.0, gamma_C=np.array([2.0]), beta_C=np.array([10.0])).tolist()
    [[8.5]]
    """
    x_nC = _rows("x_NCS", x_NCS)
    gamma_C, beta_C = _affine(gamma_C, beta_C, x_nC)
    xhat_nC, _ = _normalised(x_nC, running, eps)
    return _from_rows(gamma_C * xhat_nC + beta_C, np.shape(x_NCS))


def backward_train(dy_NCS: Floats, x_NCS: Floats, *, eps: float, gamma_C: Floats | None = None) -> Gradients:
    """The gradients of `forward_train`: x also moves the mean and the variance it is normalised with.

    Hence dx has mean 0 in each channel: the layer does not see a constant that is added to its input.

    `dy_NCS` is the gradient of the loss at y; the other arguments are those of `forward_train`.

    Raises:
        ValueError: as `forward_train`; dy has not the shape of x.

    >>> gradients = backward_train(np.array([[2.0], [4.0]]), np.array([[1.0], [7.0]]), eps=7.0)
    >>> gradients.dbeta_C.tolist(), gradients.dgamma_C.tolist(), gradients.dx_NCS.tolist()
    ([6.0], [1.5], [[-0.109375], [0.109375]])
    """
    batch = batch_statistics(x_NCS)
    x_nC, dy_nC = _rows("x_NCS", x_NCS), _gradient_rows(dy_NCS, x_NCS)
    gamma_C, _ = _affine(gamma_C, None, x_nC)
    xhat_nC, std_C = _normalised(x_nC, batch, eps)
    dbeta_C = dy_nC.sum(axis=0)
    dgamma_C = (dy_nC * xhat_nC).sum(axis=0)
    dx_nC = gamma_C / std_C * (dy_nC - dbeta_C / batch.count - xhat_nC * dgamma_C / batch.count)
    return Gradients(dx_NCS=_from_rows(dx_nC, np.shape(x_NCS)), dgamma_C=dgamma_C, dbeta_C=dbeta_C)


def backward_eval(
    dy_NCS: Floats, x_NCS: Floats, running: RunningStatistics, *, eps: float, gamma_C: Floats | None = None
) -> Gradients:
    """The gradients of `forward_eval`: the statistics are constants, so dx is dy times the layer's scale.

    `dy_NCS` is the gradient of the loss at y; the other arguments are those of `forward_eval`.

    Raises:
        ValueError: as `forward_eval`; dy has not the shape of x.

    >>> running = RunningStatistics(mean_C=np.array([4.0]), var_C=np.array([9.0]), num_batches_tracked=1)
    >>> gradients = backward_eval(np.array([[2.0]]), np.array([[1.0]]), running, eps=7.0)
    >>> gradients.dbeta_C.tolist(), gradients.dgamma_C.tolist(), gradients.dx_NCS.tolist()
    ([2.0], [-1.5], [[0.5]])
    """
    x_nC, dy_nC = _rows("x_NCS", x_NCS), _gradient_rows(dy_NCS, x_NCS)
    gamma_C, _ = _affine(gamma_C, None, x_nC)
    xhat_nC, std_C = _normalised(x_nC, running, eps)
    return Gradients(
        dx_NCS=_from_rows(gamma_C / std_C * dy_nC, np.shape(x_NCS)),
        dgamma_C=(dy_nC * xhat_nC).sum(axis=0),
        dbeta_C=dy_nC.sum(axis=0),
    )


def eval_error_bound(
    x_NCS: Floats,
    running: RunningStatistics,
    *,
    eps: float,
    gamma_C: Floats | None = None,
    beta_C: Floats | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> Array:
    """How far the y of an eval BatchNorm computed in `dtype` may be from the exact one, element by element: a bound.

        bound = g(7) * |scale * (x - mean)| + g(4) * |scale * mean| + g(2) * |beta|
        scale = gamma / sqrt(var + eps),   g(k) = k * u / (1 - k * u),   u = 2**-24 for float32

    It holds for both forms in use, with r = 1 / sqrt(var + eps):

        unfused           y = (x - mean) * r * gamma + beta                      (the products in any order)
        scale and shift   y = x * scale + shift,  shift = beta - mean * scale    (onnxruntime, and torch on a CPU)

    Derivation. A product of k factors (1 + d) or 1 / (1 + d) with |d| <= u is 1 + t_k with |t_k| <= g(k), and
    g(j) + g(k) + g(j) * g(k) <= g(j + k) (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1).
    Each operation brings one factor, in brackets:

        r         eps rounded to the dtype (1) and the sum var + eps (1): no summand is negative, so the sum is off by
                  at most (1 + u)**2 and its root by 1 + u. Rounding the root (1) and the reciprocal (1): r * (1 + t_3).
        scale     one product more: scale' = scale * (1 + t_4).
        unfused   the difference (1), r (3), two products (2), the last sum (1):
                  y' = scale * (x - mean) * (1 + t_7) + beta * (1 + t_1).
        scale and shift
                  y' = (x * scale' * (1 + t_1) + (beta - mean * scale' * (1 + t_1)) * (1 + t_1)) * (1 + t_1)
                  Before its last factor this is y + e, e = scale * (x - mean) * t_4 + scale' * x * t_1 + beta * t_1
                  - scale' * mean * t_2; the last one rounds what is left of y: y' - y = e * (1 + t_1) + y * t_1.
                  With |x| <= |x - mean| + |mean| and |y| <= |scale * (x - mean)| + |beta| the factors are at most
                  (1 + g(1)) * (g(4) + (1 + g(4)) * g(1)) + g(1) <= g(6) for |scale * (x - mean)|,
                  (1 + g(1)) * (1 + g(4)) * (g(1) + g(2)) <= (1 + g(5)) * g(3) <= g(4) for |scale * mean|, u < 1/20,
                  (1 + g(1)) * g(1) + g(1) <= g(2) for |beta|.

    The larger of the two forms gives each term. The term of the mean belongs to scale and shift alone: x * scale and
    shift nearly cancel where |mean| is large beside |x - mean|, and their rounding stays behind.

    Assumed: x, the statistics, gamma and beta are the very numbers of that computation (exact in `dtype`); operations
    round correctly (IEEE 754; a fused multiply-add only leaves a factor out, but the approximate reciprocal root of a
    GPU is not covered); nothing over- or underflows. `forward_eval` itself is within the bound for float64.

    Returns:
        The bound, in the shape of x.

    Raises:
        ValueError: as `forward_eval`.

    >>> running = RunningStatistics(mean_C=np.array([4.0]), var_C=np.array([9.0]), num_batches_tracked=1)
    >>> bound = eval_error_bound(np.array([[1.0]]), running, eps=7.0, beta_C=np.array([10.0]))
    >>> round((bound / 2**-24).item(), 3) == 7 * 3 / 4 + 4 * 4 / 4 + 2 * 10
    True
    """
    u = float(np.finfo(dtype).eps) / 2  # finfo's eps is the gap after 1; rounding to nearest errs by half of it
    x_nC = _rows("x_NCS", x_NCS)
    gamma_C, beta_C = _affine(gamma_C, beta_C, x_nC)
    xhat_nC, std_C = _normalised(x_nC, running, eps)
    bound_nC = (
        _rounded(7, u) * np.abs(gamma_C * xhat_nC)
        + _rounded(4, u) * np.abs(gamma_C * running.mean_C / std_C)
        + _rounded(2, u) * np.abs(beta_C)
    )
    return _from_rows(bound_nC, np.shape(x_NCS))


def _rounded(k: int, u: float) -> float:
    """Bound the relative error of k roundings of at most u each: Higham's gamma_k."""
    return k * u / (1 - k * u)


def _normalised(x_nC: Array, statistics: RunningStatistics | BatchStatistics, eps: float) -> tuple[Array, Array]:
    """Return xhat_nC and std_C, once they are sure to exist."""
    _require_channels("mean_C", statistics.mean_C, x_nC)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(
            f"eps is {eps}; wanted a finite number, 0 or more; pass the eps of the layer (PyTorch's default is 1e-5, "
            "Keras's 1e-3)"
        )
    std_C = np.sqrt(statistics.var_C + eps)
    if not std_C.all():
        raise ValueError(
            f"var_C is 0 at channel {int(np.argmin(std_C))} and so is eps; wanted var + eps > 0, since x is divided by "
            "its root; pass the eps of the layer"
        )
    return (x_nC - statistics.mean_C) / std_C, std_C


def _rows(name: str, x_NCS: Floats) -> Array:
    """Return x as float64 rows of channels, x_nC."""
    x = _float64(name, x_NCS)
    if not 2 <= x.ndim <= 5:
        raise ValueError(
            f"{name} has shape {x.shape}; wanted rank 2 to 5, from (N, C) to (N, C, D, H, W); reshape it so that "
            "axis 0 is the batch and axis 1 the channels"
        )
    n_samples, channels, *positions = x.shape
    return np.moveaxis(x, 1, -1).reshape(n_samples * math.prod(positions), channels)


def _from_rows(y_nC: Array, shape: tuple[int, ...]) -> Array:
    """Return the rows in the shape that `_rows` was given."""
    n_samples, channels, *positions = shape
    return np.ascontiguousarray(np.moveaxis(y_nC.reshape(n_samples, *positions, channels), -1, 1))


def _gradient_rows(dy_NCS: Floats, x_NCS: Floats) -> Array:
    if np.shape(dy_NCS) != np.shape(x_NCS):
        raise ValueError(
            f"dy_NCS has shape {np.shape(dy_NCS)}; wanted {np.shape(x_NCS)}, the shape of x_NCS; "
            "pass the gradient at the output for this x"
        )
    return _rows("dy_NCS", dy_NCS)


def _affine(gamma_C: Floats | None, beta_C: Floats | None, x_nC: Array) -> tuple[Array, Array]:
    """Return gamma and beta, 1 and 0 where the layer has none."""
    _, channels = x_nC.shape
    gamma = np.ones(channels) if gamma_C is None else _float64("gamma_C", gamma_C)
    beta = np.zeros(channels) if beta_C is None else _float64("beta_C", beta_C)
    _require_channels("gamma_C", gamma, x_nC)
    _require_channels("beta_C", beta, x_nC)
    return gamma, beta


def _require_channels(name: str, values_C: Array, x_nC: Array) -> None:
    _, channels = x_nC.shape
    if values_C.shape != (channels,):
        raise ValueError(
            f"{name} has shape {values_C.shape}; wanted ({channels},), one value for each channel of x_NCS; "
            "pass the vector of this layer, or move the channels of x_NCS to axis 1"
        )


def _require_momentum(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum is {momentum}; wanted 0 to 1; pass the momentum of the layer, or CumulativeAverage() for "
            "PyTorch's momentum=None"
        )


def _float64(name: str, values: Floats) -> Array:
    dtype = np.asarray(values).dtype
    if not np.issubdtype(dtype, np.floating):
        raise ValueError(f"{name} has dtype {dtype}; wanted a float dtype; convert it with .astype(np.float64)")
    return np.asarray(values, dtype=np.float64)


def _keep_statistics(statistics: RunningStatistics | BatchStatistics) -> None:
    """Check mean_C and var_C and replace them by read-only float64 copies (rule 1)."""
    for name in ("mean_C", "var_C"):
        kept_C = _float64(name, getattr(statistics, name)).copy()
        kept_C.flags.writeable = False
        object.__setattr__(statistics, name, kept_C)
    mean_C, var_C = statistics.mean_C, statistics.var_C
    if not mean_C.ndim == var_C.ndim == 1 or mean_C.shape != var_C.shape:
        raise ValueError(
            f"mean_C has shape {mean_C.shape} and var_C {var_C.shape}; wanted two vectors of one length, a value per "
            "channel; pass the statistics of one layer"
        )
    bad_C = ~(var_C >= 0)  # the negation finds NaN too
    if bad_C.any():
        channel = int(np.argmax(bad_C))
        raise ValueError(
            f"var_C is {var_C[channel]} at channel {channel}; wanted 0 or more, as a mean of squares is; "
            "recompute the statistics, or look for a mean in the place of a variance"
        )
