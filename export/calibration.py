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
5. A layer runs as often for every batch as for the rows that were followed. Where the network's code branches on the
   number of rows or on their values, rule 1 cannot hold, and that is refused.
6. Under `torch.distributed` every process gives its own rows, and all get the same statistics, or all the same
   refusal: nobody waits for a process that has failed, or has fewer rows or none.

`torch.optim.swa_utils.update_bn` averages the statistics of batches, whatever their size, without what lies between
them, while the layers before normalise by the batch and dropout is on; it is none of the above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from export.copying import copied
from export.watching import Flow, Moments, Reaching, batch_norms, levels_of, run_exactly
from service.errors import EvalmodeError, Refused, WrongCall

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
    """All values between the layers, in float64 and without the weights, and what the largest operator needs beside
    them: an estimate from above."""
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
    require_rows(inputs)
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
        Refused: there is no BatchNorm, a layer feeds itself, has one value in all, is reached by NaN or infinity, or
            runs more often for some rows than for others; or the network fails on the rows.
    """
    if batch_size < 1:
        raise WrongCall(f"a batch of {batch_size} rows is none; batch_size is 1 or more")
    network = _prepared(module)
    shares = _of_all_processes(_attempted(lambda: _Share.of(network, inputs, memory_bytes)))
    plans = [share.plan for share in shares if share.plan is not None]
    if not plans:
        raise WrongCall("there are no rows to measure statistics on")
    planned = plans[0]
    # all processes run the same number of forwards then, so that they can meet inside one
    one_pass = all(share.plan is not None and share.plan.one_pass for share in shares)
    measuring = _Measuring(network, planned.calls)
    if one_pass:
        measuring.settle_as_reached(inputs)
        on_progress(1, 1)
    else:
        starts = range(0, len(inputs[0]), batch_size)
        batches = [[tensor[start : start + batch_size] for tensor in inputs] for start in starts]
        for done, level in enumerate(planned.levels):

            def progress(batch: int, before: int = done * len(batches)) -> None:
                on_progress(before + batch, len(planned.levels) * len(batches))

            measuring.settle(_of_all_processes(measuring.measured(level, batches, progress)))
    return Calibrated(
        layers=tuple(_layer(module, layer, measuring.settled[layer]) for layer in planned.calls),
        passes=1 if one_pass else len(planned.levels),
        rows=sum(share.rows for share in shares),
        unused=planned.unused,
    )


def applied(module: nn.Module, calibrated: Calibrated) -> nn.Module:
    """A copy of the network with the new statistics, in the layers' own dtype; everything else is as it was.

    A layer that kept none keeps them from now on. `num_batches_tracked` stays, or becomes 1: with 0, the first batch of
    a cumulative average would replace everything.

    Raises:
        WrongCall: a layer is not in this network, or has other channels.
        Refused: a statistic is too large for the layer's dtype.
    """
    duplicate = copied(module)
    norms = batch_norms(duplicate)
    for found in calibrated.layers:
        norm = norms.get(found.layer)
        if norm is None or norm.num_features != len(found.mean_C):
            raise WrongCall(
                f"the network has no BatchNorm '{found.layer}' of {len(found.mean_C)} channels; these statistics are "
                "another network's"
            )
        keep_statistics(norm)
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


def require_rows(inputs: Sequence[Tensor]) -> None:
    """There is at least one row, and as many for each argument of `forward`."""
    lengths = {len(tensor) for tensor in inputs}
    if lengths <= {0}:
        raise WrongCall("there are no rows to measure statistics on")
    if len(lengths) > 1:
        raise WrongCall(f"the inputs have different numbers of rows: {sorted(lengths)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What one process brings."""

    rows: int
    plan: Plan | None
    """None where there are no rows to follow."""

    @classmethod
    def of(cls, network: nn.Module, inputs: Sequence[Tensor], memory_bytes: int) -> _Share:
        if inputs and not any(len(tensor) for tensor in inputs):
            return cls(rows=0, plan=None)
        require_rows(inputs)
        return cls(rows=len(inputs[0]), plan=_plan(network, inputs, memory_bytes))


def _prepared(module: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode, in which every BatchNorm keeps statistics."""
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        raise Refused("the network has lazy layers that never saw a row; run one batch through it first")
    network = copied(module).cpu().double().eval().requires_grad_(False)
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        raise Refused("the network has no BatchNorm layer, so there are no running statistics to measure")
    for norm in norms:
        keep_statistics(norm)
    return network.double()  # those that were added as well


def keep_statistics(norm: _BatchNorm) -> None:
    """Give a layer running statistics, mean 0 and variance 1, if it has none."""
    if norm.running_mean is None or norm.running_var is None:
        like = norm.weight if norm.affine else torch.zeros(())
        norm.running_mean = torch.zeros(norm.num_features, dtype=like.dtype, device=like.device)
        norm.running_var = torch.ones(norm.num_features, dtype=like.dtype, device=like.device)
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
    norm.track_running_stats = True


def _plan(network: nn.Module, inputs: Sequence[Tensor], memory_bytes: int) -> Plan:
    flow = Flow(network)
    probed = [tensor[:2] for tensor in inputs]
    run_exactly(network, probed, flow)
    depends, calls = flow.depends, flow.calls
    if not calls:
        raise Refused("eval mode never calls a BatchNorm layer of the network, so there is nothing to measure")
    for layer, sources in depends.items():
        if layer in sources:
            raise Refused(
                f"layer '{layer}' runs {calls[layer]} times and its later input depends on its earlier output, so no "
                "statistics are those of its input; give each place a layer of its own"
            )
    level = levels_of(depends)
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
        unused=tuple(path for path in batch_norms(network) if path not in calls),
    )


# Measuring


class _Enough(BaseException):
    """All layers of a level were measured: the rest of the pass would be for nothing.

    Not an `Exception`, which the network's own code may catch.
    """


class _Measuring:
    """The network while its layers are settled one after the other."""

    def __init__(self, network: nn.Module, calls: Mapping[str, int]) -> None:
        self.settled: dict[str, Moments] = {}
        self._network = network
        self._norms = batch_norms(network)
        self._calls = calls

    def settle_as_reached(self, inputs: Sequence[Tensor]) -> None:
        """One pass with all rows: each layer is measured when it is reached, and goes on with what was found."""
        told = False  # whether all processes will raise what is being raised here

        def reached(layer: str, x: Tensor) -> None:
            nonlocal told
            found = {layer: Moments.of(x)}
            told = True
            self.settle(_of_all_processes(found))
            told = False

        failure = _attempted(lambda: self._run(inputs, list(self._calls), reached))
        if told:
            assert isinstance(failure, EvalmodeError)
            raise failure
        _of_all_processes(failure)

    def measured(
        self, level: Sequence[str], batches: Sequence[Sequence[Tensor]], on_batch: Callable[[int], None]
    ) -> dict[str, Moments] | EvalmodeError:
        """One pass over the rows of this process, for layers whose input is settled; or why there is none."""
        found: dict[str, Moments] = {}

        def reached(layer: str, x: Tensor) -> None:
            moments = Moments.of(x)
            found[layer] = found[layer].merged(moments) if layer in found else moments

        def run() -> dict[str, Moments]:
            for i, batch in enumerate(batches):
                self._run(batch, level, reached)
                on_batch(i + 1)
            return found

        return _attempted(run)

    def settle(self, found: Sequence[Mapping[str, Moments]]) -> None:
        """Give layers the statistics that all processes found together, each of them nothing or the same layers."""
        parts = [part for part in found if part]
        if any(set(part) != set(parts[0]) for part in parts):
            raise Refused("the processes reach the layers in different orders: the network's code branches on its rows")
        for layer in parts[0]:
            moments = functools.reduce(Moments.merged, (part[layer] for part in parts))
            if moments.count < 2:
                raise Refused(f"layer '{layer}' sees a single value in each channel; statistics need more rows")
            finite = torch.isfinite(moments.mean_C) & torch.isfinite(moments.m2_C)
            if not finite.all():
                channel = int((~finite).nonzero()[0])
                raise Refused(f"layer '{layer}' is reached by NaN or infinity, in channel {channel}; look at the rows")
            norm = self._norms[layer]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(moments.mean_C)  # in place: the operator that waits for it has this tensor
            norm.running_var.copy_(moments.m2_C / moments.count)
            self.settled[layer] = moments

    def _run(self, inputs: Sequence[Tensor], layers: Sequence[str], reached: Callable[[str, Tensor], None]) -> None:
        """One forward as far as these layers need it; each must run as often as it did when it was followed."""
        runs = dict.fromkeys(self._norms, 0)

        def before(layer: str, x: Tensor) -> None:
            runs[layer] += 1
            if runs[layer] > self._calls.get(layer, 0):
                raise self._branches(layer, runs, inputs)
            if layer in layers:
                reached(layer, x)
            if all(runs[wanted] == self._calls[wanted] for wanted in layers):
                raise _Enough

        def before_nothing(layer: str, x: Tensor) -> None:
            if not x.numel():  # for no rows there is nothing to compute, and so no operator to see
                before(layer, x)

        hooks = [
            norm.register_forward_pre_hook(
                lambda _norm, args, path=path: before_nothing(path, args[0]) if args else None
            )
            for path, norm in self._norms.items()
        ]
        try:
            run_exactly(self._network, inputs, Reaching(self._network, before))
        except _Enough:
            return
        finally:
            for hook in hooks:
                hook.remove()
        raise self._branches(next(path for path in layers if runs[path] != self._calls[path]), runs, inputs)

    def _branches(self, layer: str, runs: Mapping[str, int], inputs: Sequence[Tensor]) -> Refused:
        return Refused(
            f"layer '{layer}' runs {runs[layer]} times for a batch of {len(inputs[0])} and {self._calls.get(layer, 0)} "
            "times for the first two rows: the network's code branches on its rows, and its statistics would depend on "
            "how they are divided"
        )


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


# Several processes


def _attempted(make: Callable[[], T]) -> T | EvalmodeError:
    """What was made, or why not: to be told to the other processes, which would wait for it."""
    try:
        return make()
    except EvalmodeError as error:
        return error


def _of_all_processes(value: T | EvalmodeError) -> list[T]:
    """What every process found, in the order of their ranks; where one failed, all raise."""
    values: list[Any] = [value]
    if distributed.is_available() and distributed.is_initialized():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
    for found in (value, *values):  # one's own first
        if isinstance(found, EvalmodeError):
            raise found
    return values
