"""How far a network computed in float32 may be from the exact one: float error analysis of this network on these rows.

A tolerance that is a round number says nothing: 1e-5 is far too much for one network and far too little for another. A
BatchNorm over values with |mean| >> std alone may move the answer by |gamma| * |mean| / std * u.

The network runs in float64, watched one ATen operator at a time, so residual sums, functional calls and layers of any
make are seen as well as modules. Each result y gets, element by element, the size of the error that its operator brings
when it is computed in float32 from exact operands (u = 2**-24, the unit roundoff):

    moves, chooses or compares     0                                          views, cat, gather, relu, max_pool, ...
    sum of n terms t               u * sqrt(n) * sqrt(y**2 + sum(t**2))       linear, conv, matmul, sum, mean, avg_pool
    BatchNorm, frozen              `export.batchnorm.eval_error_bound`
    normalises by its own values   the sum's, through 1 / std, and 8 roundings        layer, group and instance norm
    softmax                        u * (|x - max(x)| + sqrt(n) + 8) * y
    arithmetic                     8 roundings of y, and one of a constant            add, mul, sqrt, exp, ...
    anything else                  8 roundings of y and of the largest x              gelu, sigmoid, erf, ...

How these add up at the outputs is found by doing it: the network runs again with each of them added to its result under
random signs, and the outputs move. Signs that are all independent would average out what real rounding shares (a weight
is rounded once and used at every position), so in two thirds of the trials they differ along one axis only: axis 1, the
channels, or the last, the features. The bound is the largest movement over all trials times `SAFETY`.

The sum's line. Roundings that are independent with mean zero make an error of variance u**2 * sum(s_k**2) at most, with
s_k the partial sums (Higham and Mary 2019); partial sums of terms in no particular order are no larger than |y| and
sqrt(sum(t**2)) together. For terms of one sign that is the known sqrt(n) * u * sum(|t|); for terms of both signs it
is u * sum(|t|), as in Higham and Mary 2020. Fast kernels sum in blocks and stay below it. A BatchNorm folded into the
weights rounds each of them `_FOLDED` times more.

So this is an estimate on the safe side and no proof: random signs find the size of the error, not its worst case. The
tests compare it with what really happens over a zoo of networks: there it is 10 to 300 times the real error (2,000
beside layer norms), and one per cent of eps in one layer is already more than ten times what it allows.

Sources: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002, sections 3.1 and 3.4;
N. J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019, and
"Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels with Random Data", the same, 42, 2020.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from export.batchnorm import RunningStatistics, eval_error_bound
from service.errors import Refused

SAFETY = 4.0
"""The real error is a sum over very many roundings and so nearly normal; the largest movement over all elements and
trials is one standard deviation of it at least. Four of them are exceeded once in 16,000 times."""

TRIALS_PER_AXIS = 3
_SIGN_AXES = (None, 1, -1)
"""Along which axis signs differ; None is all of them."""

_FOLDED = 4
"""1 / sqrt(var + eps) rounds three times (its sum, root and quotient), the product with gamma or a weight once more."""

_NUMPY: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float16: np.float16}

Arguments: TypeAlias = Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """The outputs of a network without rounding, and how far rounding may take them from there."""

    exact: tuple[Tensor, ...]
    """float64 (or integers), one for each output."""
    bounds: tuple[float, ...]
    """The largest absolute error to expect over all rows and elements of each output; 0 where it is not a float."""


def analyse(module: nn.Module, inputs: Sequence[Tensor], *, trials_per_axis: int = TRIALS_PER_AXIS) -> Analysis:
    """Bound the rounding of a network on these rows.

    Args:
        module: in eval mode, with weights in float32 or float16; not changed.
        inputs: rows for each argument of `forward`; not changed.
        trials_per_axis: how often the network runs with random signs, for each of the three ways to draw them.
    """
    dtype = _working_dtype(module, inputs)
    duplicate = copy.deepcopy(module).cpu().double()
    rows = [widened(tensor.detach().cpu()) for tensor in inputs]
    exact = _outputs(duplicate, rows, Exact())  # type: ignore[no-untyped-call]
    moved_most = [0.0] * len(exact)
    for seed in range(trials_per_axis * len(_SIGN_AXES)):
        moved = _outputs(duplicate, rows, _Perturbed(_NUMPY[dtype], _SIGN_AXES[seed % len(_SIGN_AXES)], seed))
        for i, (one, other) in enumerate(zip(exact, moved, strict=True)):
            if one.is_floating_point():
                movement = (one - other).abs().nan_to_num(nan=math.inf)
                moved_most[i] = max(moved_most[i], float(movement.max()))
    least = torch.finfo(dtype).tiny  # numbers below it have fewer digits
    bounds = [
        SAFETY * max(movement, least) if one.is_floating_point() else 0.0
        for movement, one in zip(moved_most, exact, strict=True)
    ]
    return Analysis(exact=exact, bounds=tuple(bounds))


def flattened(outputs: object) -> tuple[Tensor, ...]:
    """What `forward` returned as the tensors that the exporter makes outputs of."""
    return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def _working_dtype(module: nn.Module, inputs: Sequence[Tensor]) -> torch.dtype:
    """The coarsest float dtype of the weights and inputs: its roundings are the ones that count."""
    dtypes = {value.dtype for value in (*module.parameters(), *module.buffers(), *inputs)}
    return torch.float16 if torch.float16 in dtypes else torch.float32


def _outputs(module: nn.Module, inputs: Sequence[Tensor], mode: TorchDispatchMode) -> tuple[Tensor, ...]:
    with torch.no_grad(), attention_in_parts(), mode:
        return flattened(module(*inputs))


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Attention as the matrix products it is made of; a fused kernel would be one operator of unknown rounding."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# The network, watched

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in _NARROW else tensor


class Exact(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator in float64, also where the network asks for less.

    A tensor that the network makes itself (`torch.zeros`) is widened when it is made: were it widened only when it is
    read, what the network writes into it would go into a copy, and be lost.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and value.dtype in _NARROW:
                raise Refused(
                    f"the network writes into a {str(value.dtype).removeprefix('torch.')} tensor that it keeps between "
                    "runs; register it as a buffer, so that it can be float64 here"
                )
        args = pytree.tree_map_only(Tensor, widened, list(args))
        kwargs = {name: torch.float64 if value in _NARROW else value for name, value in (kwargs or {}).items()}
        return pytree.tree_map_only(Tensor, widened, self.computed(func, args, kwargs))

    def computed(self, func: Any, args: Arguments, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


class _Perturbed(Exact):  # type: ignore[no-untyped-call]
    """Adds to each result the error of its operator, under random signs."""

    def __init__(self, dtype: type[np.floating[Any]], sign_axis: int | None, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._sign_axis = sign_axis
        self._generator = torch.Generator().manual_seed(seed)

    def computed(self, func: Any, args: Arguments, kwargs: Mapping[str, Any]) -> Any:
        in_place = func._schema.is_mutable
        operands = pytree.tree_map_only(Tensor, torch.clone, list(args)) if in_place else args
        result = func(*args, **kwargs)
        y = result[0] if isinstance(result, tuple) else result
        if func.is_view or not isinstance(y, Tensor) or not y.is_floating_point():
            return result
        error = _error(func, operands, kwargs, y, self._dtype).nan_to_num(nan=0.0, posinf=0.0)
        moved = y + self._signs(y) * error
        if in_place:
            y.copy_(moved)
            return result
        return (moved, *result[1:]) if isinstance(result, tuple) else moved

    def _signs(self, like: Tensor) -> Tensor:
        shape = list(like.shape)
        if self._sign_axis is not None and like.ndim > 1:
            kept = self._sign_axis % like.ndim
            shape = [length if axis == kept else 1 for axis, length in enumerate(shape)]
        return torch.randint(0, 2, shape, generator=self._generator).double() * 2 - 1


# The table of the module's docstring

# fmt: off
_MOVES = frozenset({
    "_to_copy", "_unsafe_index", "_unsafe_view", "abs", "alias", "amax", "amin", "cat", "ceil", "clamp", "clamp_max",
    "clamp_min", "clone", "constant_pad_nd", "copy", "detach", "embedding", "flip", "floor", "gather", "hardtanh",
    "index", "index_put", "index_select", "lift_fresh", "masked_fill", "max", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "maximum", "min", "minimum", "neg", "reflection_pad1d", "reflection_pad2d", "relu",
    "repeat", "replication_pad1d", "replication_pad2d", "roll", "round", "scatter", "select_scatter", "sign",
    "slice_scatter", "sort", "split", "split_with_sizes", "stack", "threshold", "topk", "tril", "triu", "unbind",
    "unsafe_split", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "where",
})
_SUMS = frozenset({"add", "sub", "rsub"})
_ARITHMETIC = _SUMS | {"div", "exp", "expm1", "mul", "pow", "reciprocal", "rsqrt", "sqrt", "square"}
_MEANS = frozenset({"mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"})
BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"})
# fmt: on


def _error(func: Any, args: Arguments, kwargs: Mapping[str, Any], y: Tensor, dtype: type[np.floating[Any]]) -> Tensor:
    """The size of the error in each element of y, in y's shape or one that spreads to it."""
    u = float(np.finfo(dtype).eps) / 2  # finfo's eps is the gap after 1; rounding to nearest errs by half of it
    op = func.overloadpacket.__name__
    if func._schema.is_mutable:
        op = op.removesuffix("_")
    operands = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    terms = _terms(op, args, y)
    if op in _MOVES:
        return torch.zeros_like(y)
    if terms is not None:
        squares: Tensor = func(*pytree.tree_map_only(Tensor, torch.square, list(args)), **kwargs).abs()
        if op in _MEANS:  # (t / n)**2, where the operator divides the sum of t**2 by n once
            squares = squares / terms
        return u * math.sqrt(terms) * (y.square() + squares).sqrt()
    if op in BATCH_NORMS and (op.endswith("no_training") or not args[5]):
        return _frozen_error(args, dtype)
    if op in BATCH_NORMS or op in ("native_layer_norm", "native_group_norm"):
        return _normalised_error(op, args, u)
    if op in ("_softmax", "_safe_softmax", "_log_softmax"):
        x, axis = args[0], args[1]
        # exp(x - max) takes the rounding of the difference over as a relative error
        relative: Tensor = u * ((x - x.amax(axis, keepdim=True)).abs() + math.sqrt(x.shape[axis]) + 8)
        return relative + u * y.abs() if op == "_log_softmax" else relative * y
    if op in _ARITHMETIC:
        constants = sum(abs(arg) for arg in args if isinstance(arg, float | int)) if op in _SUMS else 0.0
        return 8 * u * y.abs() + u * constants
    if not operands:  # a constant
        return u * y.abs()
    return 8 * u * (y.abs() + max(float(x.abs().max()) for x in operands if x.numel()))


def _terms(op: str, args: Arguments, y: Tensor) -> int | None:
    """How many terms an element of y adds up, its bias and the roundings of a folded BatchNorm included."""
    match op:
        case "convolution":
            weight, transposed, groups = args[1], args[6], args[8]
            channels = weight.shape[0] // groups if transposed else weight.shape[1]
            return int(channels * math.prod(weight.shape[2:])) + 1 + _FOLDED
        case "mm" | "bmm" | "mv" | "dot":
            return int(args[0].shape[-1]) + _FOLDED
        case "addmm" | "baddbmm" | "addmv":
            return int(args[1].shape[-1]) + 1 + _FOLDED
        case "sum" | "mean":
            return int(args[0].numel() // max(y.numel(), 1)) + 1
        case "cumsum":
            return int(args[0].shape[args[1]])
        case "avg_pool2d" | "avg_pool3d":
            return int(math.prod(args[1])) + 1
        case "_adaptive_avg_pool2d" | "_adaptive_avg_pool3d":
            axes = range(-len(args[1]), 0)
            return int(math.prod(args[0].shape[axis] // y.shape[axis] + 2 for axis in axes)) + 1
        case _:
            return None


def _frozen_error(args: Arguments, dtype: type[np.floating[Any]]) -> Tensor:
    """BatchNorm with running statistics: x, gamma, beta, mean, var, ..., eps."""
    gamma, beta = (None if vector is None else vector.numpy() for vector in args[1:3])
    running = RunningStatistics(mean_C=args[3].numpy(), var_C=args[4].numpy(), num_batches_tracked=0)
    return torch.from_numpy(
        eval_error_bound(args[0].numpy(), running, eps=args[-1], gamma_C=gamma, beta_C=beta, dtype=dtype)
    )


def _normalised_error(op: str, args: Arguments, u: float) -> Tensor:
    """Layers that normalise with the mean and variance of their own input: of a row, a group or an instance."""
    x: Tensor = args[0]
    match op:
        case "native_layer_norm":
            gamma, beta, eps, values = args[2], args[3], args[4], x.flatten(-len(args[1]))
        case "native_group_norm":
            gamma, beta, eps, values = args[1], args[2], args[7], x.reshape(x.shape[0] * args[6], -1)
        case _:  # instance norm, which torch computes as BatchNorm over one row of N * C channels
            gamma, beta, eps, values = args[1], args[2], args[-1], x.transpose(0, 1).flatten(1)
    n = values.shape[-1]
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    r = (variance + eps).rsqrt()
    square = values.square().mean(-1, keepdim=True)
    # the mean is a sum like any other; the variance may be computed as E[x**2] - E[x]**2
    error: Tensor = u * r * (math.sqrt(n) * square.sqrt() + 2 * values.abs())
    error = error + u * (math.sqrt(n) * square * r.square() + 8) * ((values - mean) * r).abs()
    if op in BATCH_NORMS:
        error = error.reshape(x.transpose(0, 1).shape).transpose(0, 1)
    error = error.reshape(x.shape)
    if gamma is None or beta is None:
        return error
    if op != "native_layer_norm":
        gamma, beta = (vector_C.reshape(-1, *[1] * (x.ndim - 2)) for vector_C in (gamma, beta))
    scaled: Tensor = error * gamma.abs() + 2 * u * beta.abs()
    return scaled
