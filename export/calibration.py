"""Running statistics as the exact statistics of the data: front to back, each layer after the layers before it.

    mean_C = sum_n(x_nC) / n        var_C = sum_n((x_nC - mean_C)**2) / n        n: every row, every position

x is what reaches a layer in eval mode, dropout off, when all layers before it normalise with their NEW statistics. So
with these statistics eval mode answers exactly what train mode would answer if all the data were one batch, and that is
the definition here: the variance is the population's, which is what train mode divides by, and not the sample's.

1. Independent of batch size, of order and of the size of the last batch, up to float64's rounding: batches are merged
   by count, mean and sum of squared deviations (Chan, Golub and LeVeque 1983), never as E[x**2] - E[x]**2.
2. A layer is measured only once every layer that its input depends on is settled. What depends on what is found by
   following one small batch through every operator; storages, not names, carry the marks, so views and in-place
   operators are seen as well.
3. One pass over the data where that is exact: if all rows fit in memory at once, each layer is measured when it is
   reached, and the same pass goes on with what was found. Else one pass for each level of dependence.
4. The network is never touched: a float64 copy runs. Nothing has to be put back when something fails.

Under `torch.distributed` every process gives its own rows, and all get the same statistics.

`torch.optim.swa_utils.update_bn` averages the statistics of batches, whatever their size, without what lies between
them, while the layers before normalise by the batch and dropout is on; it is none of the above.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from export.rounding import Exact, attention_in_parts
from service.errors import Refused, WrongCall, first_line

MEMORY_BYTES = 2**30
"""What the values between the layers may take when all rows run at once."""

Vector = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a calibration will do, and so what it costs."""

    levels: tuple[tuple[str, ...], ...]
    """BatchNorm layers; each depends on layers of earlier levels only."""
    calls: Mapping[str, int]
    """How often eval mode calls each layer."""
    one_pass: bool
    bytes_per_row: float
    """All values between the layers, in float64: more than are there at any one time."""
    unused: tuple[str, ...]
    """BatchNorm layers that eval mode never calls: nothing can be measured for them."""

    @property
    def passes(self) -> int:
        return 1 if self.one_pass else len(self.levels)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibratedLayer:
    """The exact statistics of one layer, beside those it had."""

    layer: str
    mean_C: Vector
    var_C: Vector
    """The population variance."""
    count: int
    """Values in each channel: rows times positions."""
    old_mean_C: Vector | None
    """None where the layer kept no statistics (track_running_stats=False)."""
    old_var_C: Vector | None
    eps: float

    @property
    def mean_shift(self) -> float:
        """The median over the channels of how far the old mean is off, in standard deviations."""
        if self.old_mean_C is None:
            return float("nan")
        return float(np.median(np.abs(self.old_mean_C - self.mean_C) / np.sqrt(self.var_C + self.eps)))

    @property
    def variance_ratio(self) -> float:
        """The median over the channels of the old variance by the new one."""
        if self.old_var_C is None:
            return float("nan")
        return float(np.median((self.old_var_C + self.eps) / (self.var_C + self.eps)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibrated:
    """What was measured; `applied` gives it to a network."""

    layers: tuple[CalibratedLayer, ...]
    """In the order in which the network runs them."""
    passes: int
    rows: int
    """Of all processes together."""
    unused: tuple[str, ...]


OnProgress = Callable[[int, int], None]
"""Is told how many batches are done, of how many."""


def plan(module: nn.Module, inputs: Sequence[Tensor], *, memory_bytes: int = MEMORY_BYTES) -> Plan:
    """Find the order in which layers are measured.

    Args:
        module, inputs: as for `calibrate`; not changed. The first two rows are run.

    Raises:
        WrongCall, Refused: as for `calibrate`.
    """
    _require_rows(inputs)
    return _plan(_prepared(module), inputs, memory_bytes)


def calibrate(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    batch_size: int = 256,
    memory_bytes: int = MEMORY_BYTES,
    on_progress: OnProgress = lambda done, total: None,
) -> Calibrated:
    """Measure the exact statistics of every BatchNorm layer.

    Args:
        module: in any mode; not changed.
        inputs: rows for each argument of `forward`, as many in each; those of this process, under `torch.distributed`.
        batch_size: of the passes, where one pass does not do; decides time and memory, never the result.
        memory_bytes: what all rows at once may take.
        on_progress: is called after each batch.

    Raises:
        WrongCall: there are no rows, or not as many in each input.
        Refused: there is no BatchNorm, a layer feeds itself, has one value in all, or is reached by NaN or infinity; or
            the network fails on the rows.
    """
    _require_rows(inputs)
    network = _prepared(module)
    rows = len(inputs[0])
    plans = _of_all_processes((rows, _plan(network, inputs, memory_bytes) if rows else None))
    total_rows = sum(count for count, _ in plans)
    planned = next((found for _, found in plans if found is not None), None)
    if planned is None:
        raise WrongCall("there are no rows to measure statistics on")
    measuring = _Measuring(network)
    # all processes run the same number of forwards then, so that they can meet inside one
    one_pass = all(found is not None and found.one_pass for _, found in plans)
    if one_pass:
        measuring.settle_as_reached(inputs, planned.calls)
        on_progress(1, 1)
    else:
        batches = [[tensor[start : start + batch_size] for tensor in inputs] for start in range(0, rows, batch_size)]
        for done, level in enumerate(planned.levels):
            for i, batch in enumerate(batches):
                measuring.add(batch, {layer: planned.calls[layer] for layer in level})
                on_progress(done * len(batches) + i + 1, len(planned.levels) * len(batches))
            measuring.settle(level)
    order = [layer for layer in planned.calls if layer in measuring.settled]
    return Calibrated(
        layers=tuple(_layer(module, layer, measuring.settled[layer]) for layer in order),
        passes=1 if one_pass else len(planned.levels),
        rows=total_rows,
        unused=planned.unused,
    )


def applied(module: nn.Module, calibrated: Calibrated) -> nn.Module:
    """A copy of the network with the new statistics, in the layers' own dtype; everything else is as it was.

    A layer that kept none keeps them from now on. `num_batches_tracked` stays, or becomes 1: with 0, the first batch of
    a cumulative average would replace everything.

    Raises:
        Refused: a statistic is too large for the layer's dtype.
    """
    duplicate = copy.deepcopy(module)
    for found in calibrated.layers:
        norm = duplicate.get_submodule(found.layer)
        assert isinstance(norm, _BatchNorm)
        _keep_statistics(norm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.running_mean.copy_(torch.from_numpy(found.mean_C))
            norm.running_var.copy_(torch.from_numpy(found.var_C))
            norm.num_batches_tracked.clamp_min_(1)
        for name, values_C in (("running_mean", norm.running_mean), ("running_var", norm.running_var)):
            if not torch.isfinite(values_C).all():
                dtype = str(values_C.dtype).removeprefix("torch.")
                raise Refused(f"layer '{found.layer}' has a {name} too large for {dtype}; keep BatchNorm in float32")
    return duplicate


def shard(inputs: Sequence[Tensor], rank: int, world: int) -> tuple[Tensor, ...]:
    """The rows of one process out of `world`: every world-th one."""
    return tuple(tensor[rank::world] for tensor in inputs)


# Preparations


def _require_rows(inputs: Sequence[Tensor]) -> None:
    lengths = {len(tensor) for tensor in inputs}
    if not inputs or (lengths == {0} and not distributed.is_initialized()):
        raise WrongCall("there are no rows to measure statistics on")
    if len(lengths) > 1:
        raise WrongCall(f"the inputs have different numbers of rows: {sorted(lengths)}")


def _prepared(module: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode, in which every BatchNorm keeps statistics."""
    network = copy.deepcopy(module).cpu().double().eval().requires_grad_(False)
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        raise Refused("the network has no BatchNorm layer, so there are no running statistics to measure")
    for norm in norms:
        _keep_statistics(norm)
    return network


def _keep_statistics(norm: _BatchNorm) -> None:
    if norm.running_mean is None or norm.running_var is None:
        like = norm.weight if norm.affine else torch.zeros(())
        norm.running_mean = torch.zeros(norm.num_features, dtype=like.dtype, device=like.device)
        norm.running_var = torch.ones(norm.num_features, dtype=like.dtype, device=like.device)
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
    norm.track_running_stats = True


def _norms(network: nn.Module) -> dict[str, _BatchNorm]:
    return {path: part for path, part in network.named_modules() if isinstance(part, _BatchNorm)}


# What depends on what


class _Flow(Exact):
    """Marks every tensor with the layers that it depends on, by the storage that it lies in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._marks: dict[int, frozenset[str]] = {}
        self._alive: list[object] = []  # so that no storage is used again for something else

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        layers = frozenset[str]().union(*(self.of(tensor) for tensor in given))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in (*made, *(given if func._schema.is_mutable else ())):
            self.mark(tensor, layers)
        return result

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._marks.get(_storage(tensor), frozenset())

    def mark(self, tensor: Tensor, layers: frozenset[str]) -> None:
        key = _storage(tensor)
        if key not in self._marks:
            self.bytes += tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        self._marks[key] = self._marks.get(key, frozenset()) | layers


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _plan(network: nn.Module, inputs: Sequence[Tensor], memory_bytes: int) -> Plan:
    norms = _norms(network)
    flow = _Flow()
    depends: dict[str, frozenset[str]] = {}
    calls: dict[str, int] = {}

    def before(layer: str, x: Tensor) -> None:
        depends[layer] = depends.get(layer, frozenset()) | flow.of(x)
        calls[layer] = calls.get(layer, 0) + 1

    def after(layer: str, x: Tensor, y: Tensor) -> None:
        flow.mark(y, flow.of(x) | {layer})

    hooks = [
        hook
        for path, norm in norms.items()
        for hook in (
            norm.register_forward_pre_hook(lambda _, args, path=path: before(path, args[0])),
            norm.register_forward_hook(lambda _, args, y, path=path: after(path, args[0], y)),
        )
    ]
    probed = [tensor[:2] for tensor in inputs]
    try:
        run_exactly(network, probed, flow)
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise Refused("eval mode never calls a BatchNorm layer of the network, so there is nothing to measure")
    for layer, sources in depends.items():
        if layer in sources:
            raise Refused(
                f"layer '{layer}' runs {calls[layer]} times and its later input depends on its earlier output, so no "
                "statistics are those of its input; give each place a layer of its own"
            )
    level = _levels(depends)
    levels = tuple(
        tuple(layer for layer in calls if level[layer] == number) for number in range(1, max(level.values()) + 1)
    )
    bytes_per_row = flow.bytes / len(probed[0])
    fits = bytes_per_row * len(inputs[0]) <= memory_bytes
    return Plan(
        levels=levels,
        calls=calls,
        one_pass=fits and max(calls.values()) == 1,
        bytes_per_row=bytes_per_row,
        unused=tuple(path for path in norms if path not in calls),
    )


def _levels(depends: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """For each layer 1, or one more than the highest among those that its input depends on."""
    level: dict[str, int] = {}

    def of(layer: str) -> int:
        if layer not in level:
            level[layer] = 1 + max((of(other) for other in depends[layer]), default=0)
        return level[layer]

    for layer in depends:  # in the order in which they run, so that recursion is shallow
        of(layer)
    return level


def run_exactly(network: nn.Module, inputs: Sequence[Tensor], mode: Exact | None = None) -> None:
    """One forward pass in float64, for what hooks see of it.

    Args:
        network: in float64 and eval mode.

    Raises:
        Refused: the network fails on the rows.
    """
    widened = [tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu() for tensor in inputs]
    try:
        with torch.no_grad(), attention_in_parts(), mode or Exact():  # type: ignore[no-untyped-call]
            network(*widened)
    except (_Enough, Refused):
        raise
    except Exception as error:  # the network's own code may raise anything
        raise Refused(f"the network fails on these rows: {first_line(error)}") from error


# Measuring


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """How many values a layer's channels saw, their mean, and the sum of squared deviations from it: float64."""

    count: int
    mean_C: Tensor
    m2_C: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of a layer's input [N, C, ...]: mean first, then deviations."""
        values_Cn = x.transpose(0, 1).flatten(1)
        mean_C = values_Cn.mean(1)
        return cls(count=values_Cn.shape[1], mean_C=mean_C, m2_C=(values_Cn - mean_C[:, None]).square().sum(1))

    def merged(self, other: Moments) -> Moments:
        """Of both together: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, (2.1)."""
        count = self.count + other.count
        if not count:
            return self
        delta_C = other.mean_C - self.mean_C
        return Moments(
            count=count,
            mean_C=self.mean_C + delta_C * (other.count / count),
            m2_C=self.m2_C + other.m2_C + delta_C.square() * (self.count * other.count / count),
        )


class _Enough(Exception):
    """All layers of a level were measured: the rest of the pass would be for nothing."""


class _Measuring:
    """The network while its layers are settled one after the other."""

    def __init__(self, network: nn.Module) -> None:
        self.settled: dict[str, Moments] = {}
        self._network = network
        self._norms = _norms(network)
        self._open: dict[str, Moments] = {}

    def settle_as_reached(self, inputs: Sequence[Tensor], layers: Mapping[str, int]) -> None:
        """One pass with all rows: each layer is measured when it is reached, and goes on with what was found."""

        def reached(layer: str, x: Tensor) -> None:
            self._open[layer] = Moments.of(x)
            self.settle([layer])

        self._watched(inputs, layers, reached)

    def add(self, inputs: Sequence[Tensor], calls: Mapping[str, int]) -> None:
        """One batch for layers whose input is settled."""
        left = sum(calls.values())

        def reached(layer: str, x: Tensor) -> None:
            nonlocal left
            found = Moments.of(x)
            self._open[layer] = self._open[layer].merged(found) if layer in self._open else found
            left -= 1
            if not left:
                raise _Enough

        self._watched(inputs, calls, reached)

    def settle(self, layers: Sequence[str]) -> None:
        """Give layers the statistics that all processes measured together."""
        for layer in layers:
            parts = [found for found in _of_all_processes(self._open.pop(layer, None)) if found is not None]
            moments = functools.reduce(Moments.merged, parts)
            if moments.count < 2:
                raise Refused(f"layer '{layer}' sees a single value in each channel; statistics need more rows")
            finite = torch.isfinite(moments.mean_C) & torch.isfinite(moments.m2_C)
            if not finite.all():
                channel = int((~finite).nonzero()[0])
                raise Refused(f"layer '{layer}' is reached by NaN or infinity, in channel {channel}; look at the rows")
            norm = self._norms[layer]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean = moments.mean_C
            norm.running_var = moments.m2_C / moments.count
            self.settled[layer] = moments

    def _watched(
        self, inputs: Sequence[Tensor], layers: Mapping[str, int], reached: Callable[[str, Tensor], None]
    ) -> None:
        hooks = [
            self._norms[layer].register_forward_pre_hook(lambda _, args, layer=layer: reached(layer, args[0]))
            for layer in layers
        ]
        try:
            run_exactly(self._network, inputs)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def _layer(module: nn.Module, layer: str, moments: Moments) -> CalibratedLayer:
    norm = module.get_submodule(layer)
    assert isinstance(norm, _BatchNorm)
    old_mean, old_var = (
        None if vector is None else vector.detach().cpu().double().numpy().copy()
        for vector in (norm.running_mean, norm.running_var)
    )
    return CalibratedLayer(
        layer=layer,
        mean_C=moments.mean_C.numpy(),
        var_C=(moments.m2_C / moments.count).numpy(),
        count=moments.count,
        old_mean_C=old_mean,
        old_var_C=old_var,
        eps=norm.eps,
    )


def _of_all_processes(value: T) -> list[T]:
    """What every process says, in the order of their ranks."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
