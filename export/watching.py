"""A network in float64, watched where its BatchNorm computes: what reaches each layer, and what depends on which.

A layer is known by the running_mean that the operator is called with, and not by the module that calls it. So a layer
whose statistics a function uses is seen like any other, and one that turns its input around before it normalises is
measured on what it normalises.

What depends on what is found by marking tensors while a small batch runs: an operator's results depend on all that its
operands depend on. Storages carry the marks, so views and in-place operators are seen as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from export.rounding import BATCH_NORMS, Exact, attention_in_parts, widened
from service.errors import EvalmodeError, Refused, first_line


def batch_norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a network by their paths."""
    return {path: part for path, part in network.named_modules() if isinstance(part, _BatchNorm)}


def run_exactly(network: nn.Module, inputs: Sequence[Tensor], mode: Exact | None = None) -> None:
    """One forward pass in float64, for what hooks see of it.

    Args:
        network: in float64 and eval mode.

    Raises:
        Refused: the network fails on the rows.
    """
    rows = [widened(tensor.detach().cpu()) for tensor in inputs]
    try:
        with torch.no_grad(), attention_in_parts(), mode or Exact():  # type: ignore[no-untyped-call]
            network(*rows)
    except EvalmodeError:
        raise
    except Exception as error:  # the network's own code may raise anything
        raise Refused(f"the network fails on these rows: {first_line(error)}") from error


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
        if not self.count or not other.count:  # no value has no mean, which is NaN here
            return self if self.count else other
        count = self.count + other.count
        delta_C = other.mean_C - self.mean_C
        return Moments(
            count=count,
            mean_C=self.mean_C + delta_C * (other.count / count),
            m2_C=self.m2_C + other.m2_C + delta_C.square() * (self.count * other.count / count),
        )


class _Watch(Exact):  # type: ignore[no-untyped-call, unused-ignore]  # depends on the order in which mypy reads
    """Sees every BatchNorm operator, and knows its layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = {
            _storage(norm.running_mean): path
            for path, norm in batch_norms(network).items()
            if norm.running_mean is not None
        }

    def layer(self, func: Any, args: Sequence[Any]) -> str | None:
        """The layer that an operator computes; None where it computes none."""
        if func.overloadpacket.__name__ not in BATCH_NORMS or not isinstance(args[3], Tensor):
            return None
        return self._layers.get(_storage(args[3]))


class Reaching(_Watch):  # type: ignore[no-untyped-call, unused-ignore]
    """Tells of each layer before it computes, with what it normalises: [N, C, ...], float64."""

    def __init__(self, network: nn.Module, before: Callable[[str, Tensor], None]) -> None:
        super().__init__(network)
        self._before = before

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if layer := self.layer(func, args):
            self._before(layer, args[0])
        return func(*args, **kwargs)


class Flow(_Watch):  # type: ignore[no-untyped-call, unused-ignore]
    """Marks every tensor with the layers that it depends on, by the storage that it lies in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.bytes = 0
        """Of all that was made, and of what the largest convolution and the measuring of the largest layer need."""
        self._workspace = 0
        self.depends: dict[str, frozenset[str]] = {}
        """For each layer, in the order in which they run, the layers that its input depends on."""
        self.calls: dict[str, int] = {}
        self._marks = {_storage(weight): frozenset[str]() for weight in (*network.parameters(), *network.buffers())}
        self._left: frozenset[str] = frozenset()
        self._alive: list[object] = []  # so that no storage is used again for something else

    def computed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        layer = self.layer(func, args)
        if layer is not None:
            self.depends[layer] = self.depends.get(layer, frozenset()) | self._of(args[0])
            self.calls[layer] = self.calls.get(layer, 0) + 1
            self._need(3 * args[0].nbytes)  # the channels first, the deviations, their squares
        result = pytree.tree_map_only(Tensor, widened, func(*args, **kwargs))
        given = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        layers = self._left.union(*(self._of(tensor) for tensor in given), {layer} if layer is not None else ())
        if func is torch.ops.aten._local_scalar_dense.default:
            self._left = layers  # a Python number cannot be followed, so all that comes later may depend on it
        if func is torch.ops.aten.convolution.default:
            self._need(_columns_bytes(result, args))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in (*made, *(given if func._schema.is_mutable else ())):
            self._mark(tensor, layers)
        return result

    def _need(self, workspace: int) -> None:
        more = max(workspace - self._workspace, 0)
        self._workspace += more
        self.bytes += more

    def _of(self, tensor: Tensor) -> frozenset[str]:
        return self._marks.get(_storage(tensor), frozenset())

    def _mark(self, tensor: Tensor, layers: frozenset[str]) -> None:
        key = _storage(tensor)
        if key not in self._marks:
            self.bytes += tensor.untyped_storage().nbytes()
            self._alive.append(tensor)
        self._marks[key] = self._marks.get(key, frozenset()) | layers


def levels_of(depends: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """For each layer 1, or one more than the highest among those that its input depends on."""
    level: dict[str, int] = {}

    def of(layer: str) -> int:
        if layer not in level:
            level[layer] = 1 + max((of(other) for other in depends[layer]), default=0)
        return level[layer]

    for layer in depends:  # in the order in which they run, so that recursion is shallow
        of(layer)
    return level


def _columns_bytes(y: Tensor, args: Sequence[Any]) -> int:
    """What a convolution in float64 lays out beside its input: a column of the kernel's inputs for each output."""
    x, weight = args[0], args[1]
    positions = max(math.prod(y.shape[2:]), math.prod(x.shape[2:]))
    return int(x.shape[0] * positions * math.prod(weight.shape[1:]) * args[8] * x.element_size())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
