"""What a sample shows when a copy of the network runs in eval mode.

1. The network itself is never run: a copy is, so nothing that its code does to itself reaches it, counters and
   exceptions included. The user's own hooks run on the copy, because they may be part of the function.
2. In float64 where the network's code allows it, so that a difference is the network's doing and not rounding's.
3. Every function of torch that is called is seen, `functional` ones too: from each tensor it is known which Dropout it
   went through, and on which axis its features are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from export.audit.facts import Company, DropoutBefore, FeaturesLast, LiveDropout, Observed, Seen
from export.audit.kinds import keeps_statistics
from export.rounding import flattened
from service.errors import Refused, first_line


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """What running a sample showed."""

    observed: Observed
    live_dropouts: tuple[LiveDropout, ...]
    dropouts_before: tuple[DropoutBefore, ...]
    features_last: tuple[FeaturesLast, ...]


def probe(module: nn.Module, inputs: Sequence[Tensor]) -> Probed:
    """Run rows through a copy of a network, together and alone.

    Args:
        module, inputs: not changed.

    Raises:
        Refused: the network cannot be copied, or fails on the inputs.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            network, rows, outputs, witness = _run(module, inputs, torch.float64)
            tolerance = 1e-6
        except Exception:  # the network's code may be written for one dtype, and may raise anything
            try:
                network, rows, outputs, witness = _run(module, inputs, None)
            except Exception as error:
                raise Refused(f"the network fails on the sample: {first_line(error)}") from error
            tolerance = 1e-3
        company = company_of(network, rows, outputs, tolerance)
    padded = max((padded_share(tensor) for tensor in inputs), default=0.0)
    return Probed(
        observed=Observed(
            seen=tuple(seen_of(watched, padded) for watched in witness.watched.values()), company=company
        ),
        live_dropouts=tuple(witness.live.values()),
        dropouts_before=tuple(dict.fromkeys(witness.dropouts_before)),
        features_last=tuple(witness.features_last.values()),
    )


def _run(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype | None
) -> tuple[nn.Module, list[Tensor], tuple[Tensor, ...], _Witness]:
    network = copy.deepcopy(module).cpu().eval()
    rows = [tensor.detach().cpu().clone() for tensor in inputs]
    if dtype is not None:
        network = network.to(dtype)
        rows = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in rows]
    witness = _Witness(network, rows)
    with witness.watching():
        outputs = flattened(network(*rows))
    return network, rows, outputs, witness


# The witness


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """Where a tensor comes from."""

    raw: bool = False
    """It is an input of the network, or a part of one."""
    dropout: tuple[str, float] | None = None
    between: tuple[str, ...] = ()
    """What stood between that Dropout and here, beside activations and pooling."""
    axis: int | None = None
    """The axis of the features, where it is known."""
    producer: str = ""


@dataclass(slots=True, kw_only=True)
class Watched:
    """The sums of a layer's inputs over all its calls, row by row, around a pivot."""

    layer: str
    pivot_C: Tensor
    values_per_row: int
    raw: bool
    sequence: bool
    """It has one axis of positions."""
    padded_share: float
    means_NC: list[Tensor]
    squares_NC: list[Tensor]
    weights_N: list[Tensor]


_UNCHANGED = {
    "view", "reshape", "flatten", "contiguous", "to", "float", "double", "clone", "detach", "unsqueeze", "squeeze",
    "__getitem__", "narrow", "select", "chunk", "split", "unbind", "type_as", "type", "transpose", "permute",
}  # fmt: skip
_WEIGHTED = {
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum", "embedding",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru",
    "rnn_tanh", "rnn_relu", "multi_head_attention_forward", "scaled_dot_product_attention",
}  # fmt: skip
_WEIGHTED_KINDS = _WEIGHTED | {name.replace("_", "") for name in _WEIGHTED}
_FEATURES_LAST = {"linear", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"}
_NORMALISING = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "native_batch_norm"}
_REGROUPING = {"view", "reshape", "flatten", "unsqueeze", "squeeze", "__getitem__", "select", "unflatten"}


@final
class _Witness(TorchFunctionMode):
    """Sees every call of a function of torch, and the inputs of every norm layer."""

    def __init__(self, network: nn.Module, rows: Sequence[Tensor]) -> None:
        super().__init__()
        self.network = network
        self.pasts: MutableMapping[Tensor, _Past] = WeakIdKeyDictionary()
        self.kinds = {path: type(part).__name__ for path, part in network.named_modules()}
        self.stack: list[str] = []
        self.watched: dict[str, Watched] = {}
        self.live: dict[str, LiveDropout] = {}
        self.dropouts_before: list[DropoutBefore] = []
        self.features_last: dict[str, FeaturesLast] = {}
        self.aside = False
        """What runs now is the witness's own."""
        for tensor in rows:
            self.pasts[tensor] = _Past(raw=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, and the mode itself, for as long as this lasts."""
        hooks = []
        for path, part in self.network.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue  # it takes no hooks, and what happens inside is not seen
            hooks.append(part.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            hooks.append(part.register_forward_hook(self._leaving, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(path)
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is not None and keeps_statistics(part):
                self.aside = True
                try:
                    self._norm_called(path, part, given)
                finally:
                    self.aside = False

        return hook

    def _leaving(self, _part: nn.Module, _args: object, _output: object) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, and write down where its results come from."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(getattr(func, "__name__", "")).rstrip("_") or str(func)
        if self.aside or not isinstance(result, Tensor | tuple | list):
            return result
        if "dropout" in name and isinstance(result, Tensor):
            return self._dropped(result, args, kwargs)
        known = [self.pasts.get(tensor, _Past()) for tensor in _tensors((*args, *kwargs.values()))]
        first = next(_tensors(args), None)
        for tensor in _tensors((result,)):
            past = self._merged(known, name)
            past = replace(past, axis=_axis(name, past.axis, first, tensor, args, kwargs))
            if name in _FEATURES_LAST or name.startswith("conv"):
                past = replace(past, producer=f"{name} in '{self.stack[-1]}'" if self.stack else name)
            self.pasts[tensor] = past
        return result

    def _merged(self, known: Sequence[_Past], name: str) -> _Past:
        mixed = name in _WEIGHTED
        past = next((past for past in known if past.dropout is not None), known[0] if known else _Past())
        if name in _NORMALISING:
            return _Past(axis=past.axis, producer=past.producer)
        raw = past.raw and name in _UNCHANGED
        if past.dropout is None or (mixed and any(step.lower() in _WEIGHTED_KINDS for step in past.between)):
            return _Past(raw=raw, axis=past.axis, producer=past.producer)
        others = [other for other in known if other is not past and other != _Past()]
        kind = self.kinds[self.stack[-1]] if self.stack else ""
        step = (kind if kind.lower().replace("_", "") == name.replace("_", "") else name,) if mixed or others else ()
        return replace(past, raw=raw, between=(*past.between, *step))

    def _dropped(self, result: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        given = args[0] if args else kwargs["input"]
        p = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        training = bool(args[2] if len(args) > 2 else kwargs.get("training", True))
        layer = self.stack[-1] if self.stack else ""
        if training and p > 0:
            why = "its code calls dropout without training=self.training"
            self.live.setdefault(layer, LiveDropout(layer=layer, p=p, why=why))
        result = result.view_as(result)  # in eval mode it is the very tensor that went in
        past = self.pasts.get(given, _Past())
        dropout = (layer, p) if p > 0 else past.dropout
        self.pasts[result] = replace(past, raw=False, dropout=dropout, between=() if p > 0 else past.between)
        return result

    def _norm_called(self, layer: str, part: nn.Module, x: Tensor) -> None:
        past = self.pasts.get(x, _Past())
        if past.dropout is not None:
            dropout, p = past.dropout
            self.dropouts_before.append(DropoutBefore(dropout=dropout, norm=layer, p=p, between=past.between))
        if past.axis is not None and past.axis != 1:
            found = FeaturesLast(layer=layer, producer=past.producer, shape=tuple(x.shape))
            self.features_last.setdefault(layer, found)
        mean = getattr(part, "running_mean", None)
        channels = mean.numel() if isinstance(mean, Tensor) else x.shape[1] if x.ndim > 1 else 0
        if x.ndim < 2 or x.shape[1] != channels or not x.numel() or not x.is_floating_point():
            return
        x_NCS = x.detach().double().reshape(x.shape[0], x.shape[1], -1)
        pivot_C = mean.detach().double() if isinstance(mean, Tensor) else x_NCS.mean((0, 2))
        pivot_C = torch.nan_to_num(pivot_C, posinf=0.0, neginf=0.0)
        watched = self.watched.setdefault(
            layer,
            Watched(
                layer=layer,
                pivot_C=pivot_C,
                values_per_row=x_NCS.shape[2],
                raw=past.raw,
                sequence=x.ndim == 3,
                padded_share=0.0,
                means_NC=[],
                squares_NC=[],
                weights_N=[],
            ),
        )
        away_NCS = x_NCS - watched.pivot_C[:, None]
        watched.means_NC.append(away_NCS.mean(2))
        watched.squares_NC.append(away_NCS.square().mean(2))
        watched.weights_N.append(torch.full((len(x_NCS),), float(x_NCS.shape[2]), dtype=torch.float64))
        watched.values_per_row = min(watched.values_per_row, x_NCS.shape[2])
        if x.ndim == 3:
            watched.padded_share = max(watched.padded_share, padded_share(x))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _axis(
    name: str, axis: int | None, given: Tensor | None, result: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> int | None:
    """On which axis of the result the features are."""
    if name in _FEATURES_LAST:
        return result.ndim - 1
    if name.startswith("conv"):
        return 1
    if axis is None or given is None:
        return None
    if name == "transpose" and len(args) == 3:
        one, other = (int(place) % given.ndim for place in args[1:])
        return {one: other, other: one}.get(axis, axis)
    if name == "permute":
        places = list(_flat_integers((*args[1:], *kwargs.values())))
        return [place % given.ndim for place in places].index(axis) if len(places) == given.ndim else None
    if name in _REGROUPING:
        last = axis == given.ndim - 1 and result.ndim >= 2 and result.shape[-1] == given.shape[-1]
        return result.ndim - 1 if last else axis if result.ndim == given.ndim and name == "__getitem__" else None
    return axis if name in _NORMALISING or (result.ndim == given.ndim and name != "__get__") else None


def _flat_integers(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, tuple | list):
            yield from _flat_integers(value)


# Sums of a layer


def seen_of(watched: Watched, padded: float) -> Seen:
    """Mean, population variance and their standard errors, over rows that are independent of each other."""
    mean_NC, square_NC = torch.cat(watched.means_NC), torch.cat(watched.squares_NC)
    weight_N1 = torch.cat(watched.weights_N)[:, None]
    total = weight_N1.sum()
    offset_C = (weight_N1 * mean_NC).sum(0) / total
    var_NC = square_NC - 2 * offset_C * mean_NC + offset_C**2
    var_C = (weight_N1 * var_NC).sum(0) / total
    return Seen(
        layer=watched.layer,
        rows=len(mean_NC),
        values_per_row=watched.values_per_row,
        mean_C=(watched.pivot_C + offset_C).numpy(),
        var_C=var_C.clamp_min(0).numpy(),
        mean_error_C=((weight_N1 * (mean_NC - offset_C)).square().sum(0).sqrt() / total).numpy(),
        var_error_C=((weight_N1 * (var_NC - var_C)).square().sum(0).sqrt() / total).numpy(),
        raw=watched.raw,
        padded_share=max(watched.padded_share, padded) if watched.sequence else 0.0,
    )


def padded_share(tensor: Tensor) -> float:
    """How much of rows of a sequence is trailing zeros: [N, L] of indices, [N, C, L] or [N, L, C] of numbers.

    0 where every row has as many of them: that is no padding, or one that every row shares.
    """
    if tensor.ndim == 2 and not tensor.is_floating_point():
        candidates = [tensor == 0]
    elif tensor.ndim == 3:
        candidates = [(tensor == 0).all(1), (tensor == 0).all(2)]
    else:
        return 0.0
    shares = [0.0]
    for zero_NL in candidates:
        trailing_N = zero_NL.flip(1).long().cumprod(1).sum(1)
        if int(trailing_N.min()) < int(trailing_N.max()):
            shares.append(float(trailing_N.sum()) / zero_NL.numel())
    return max(shares)


# Rows and their company


def company_of(network: nn.Module, rows: Sequence[Tensor], together: Sequence[Tensor], tolerance: float) -> Company:
    """Row 0 alone, with one, with two, and with all others; and with another neighbour."""
    total = len(rows[0]) if rows[0].ndim else 0
    if total < 2:
        return Company(rows=0)
    picks = {1: [0], 2: [0, 1], 3: [0, 1, 2]} if total > 2 else {1: [0], 2: [0, 1]}
    answers: dict[int, Sequence[Tensor]] = {}
    for size, pick in picks.items():
        try:
            answers[size] = flattened(network(*(tensor[pick] for tensor in rows)))
        except Exception as error:  # the network's own code may raise anything
            return Company(rows=size, failure=f"{type(error).__name__}: {first_line(error)}")
    answers[total] = together
    per_row = [i for i, output in enumerate(together) if output.ndim and len(output) == total]
    for size, outputs in answers.items():
        for i in per_row:
            if outputs[i].shape[:1] != (size,):
                shapes = f"{list(outputs[i].shape)} instead of [{size}, ...]"
                return Company(rows=size, failure=f"its output has the shape {shapes}")
    largest = max((_largest(together[i]) for i in per_row), default=0.0)
    differences = {
        size: max((_largest(outputs[i][0] - answers[1][i][0]) for i in per_row), default=0.0)
        for size, outputs in answers.items()
    }
    neighbours = 0.0
    if total > 2:
        try:
            other = flattened(network(*(tensor[[0, 2]] for tensor in rows)))
            neighbours = max((_largest(other[i][0] - answers[2][i][0]) for i in per_row), default=0.0)
        except Exception as error:
            return Company(rows=2, failure=f"{type(error).__name__}: {first_line(error)}")
    size = max(differences, key=lambda size: differences[size])
    if max(differences[size], neighbours) <= tolerance * largest:
        return Company(rows=0, largest=largest)
    return Company(
        rows=size,
        difference=max(differences[size], neighbours),
        largest=largest,
        neighbours=neighbours > tolerance * largest,
    )


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    return float(torch.nan_to_num(tensor.detach().double(), nan=0.0).abs().max())
