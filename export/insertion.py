"""Put BatchNorm into a trained network without changing what it answers in eval mode.

    y = gamma_C * (x - mean_C) / sqrt(var_C + eps) + beta_C  =  x      gamma_C = sqrt(var_C + eps),  beta_C = mean_C

The identity holds for any statistics, as long as gamma and beta are made of the very ones that the layer keeps. They
are measured on data all the same, because train mode will use the batch's in their place: the nearer the two, the
smaller the shift when training goes on. One pass serves all layers, since none changes what the next one sees.

The widely copied recipe sets gamma to the variance, which multiplies every channel by its standard deviation (fastai,
courses, `imagenet_batchnorm.ipynb`: the saved loss goes from 1.52 to 4.76). Leaving eps out of gamma is 5 % at a
standard deviation of 0.01. Both are found by the certificate here.

1. The user's network is never touched; a copy comes back.
2. The new layer is a child named `norm` of the layer that it follows, applied to that layer's output. So every key of
   the network's state stays what it was, and `LAYER.norm.*` come in addition.
3. What comes back is certified on the rows given: each new layer runs once, within 1e-5 of its range, the outputs are
   within 1e-4 of theirs, and the argmax of every row is the same.
4. BatchNorm's channels are axis 1. Where a layer's features are last (a Linear over a sequence, and the activation
   behind it), BatchNorm would normalise positions: it is refused, although eval mode would not show it.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.calibration import require_rows
from export.copying import copied
from export.rounding import flattened
from export.watching import Moments, run_exactly
from service.errors import Refused, WrongCall, first_line, listing

CHILD = "norm"

LAYER_TOLERANCE = 1e-5
"""Of the range of a layer's output: a hundred times what float32 loses in (x - mean) * gamma / std + beta."""
OUTPUT_TOLERANCE = 1e-4
"""Of the largest output: what the layers' errors may become on their way through the network."""

_DEAD = 1e-12
_ROWS_AT_ONCE = 256
_ROWS_FOR_SHIFT = 2048


class NormSpec(BaseModel):
    """A BatchNorm layer that was put in: all it takes to put it into a fresh network before its weights are loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(gt=0)
    axes: Literal[1, 2, 3]
    """BatchNorm1d, 2d or 3d."""
    eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.1, gt=0, le=1)
    """PyTorch's convention: the weight of the new batch."""

    def made(self) -> _BatchNorm:
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[self.axes]
        return kind(self.channels, eps=self.eps, momentum=self.momentum)


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertedLayer:
    """One layer and its certificate."""

    layer: str
    """The layer that the BatchNorm follows."""
    spec: NormSpec
    error: float
    """max |y - x|"""
    range: float
    """max x - min x"""
    gain: float
    """The largest gamma / sqrt(var + eps): 1, where gamma was made of the statistics that the layer keeps."""
    dead_channels: int
    """Channels with the same value everywhere: train mode would multiply what comes by 1 / sqrt(eps)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainModeShift:
    """What training will do to the outputs before it has learned anything, in standard deviations of the output."""

    batch_size: int
    median: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inserted:
    """The network with its new layers, in the mode in which the user's was."""

    module: nn.Module
    layers: tuple[InsertedLayer, ...]
    output_error: float
    """max |difference| / max |output|"""
    shift: TrainModeShift | None
    """None where the rows are too few for a batch."""
    rows: int

    @property
    def specs(self) -> dict[str, NormSpec]:
        """For `attach`."""
        return {layer.layer: layer.spec for layer in self.layers}


def insert(
    module: nn.Module,
    after: Sequence[str],
    inputs: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    batch_size: int = 32,
) -> Inserted:
    """Put a BatchNorm after each of these layers.

    Args:
        module: trained, in any mode; not changed.
        after: paths of layers, as `named_modules` has them.
        inputs: rows for each argument of `forward`, to measure and to certify on; not changed.
        batch_size: of the training that will follow, for `Inserted.shift`.

    Raises:
        WrongCall: there is no such layer, it has a child named `norm` already, there are no rows or not as many in each
            input, or eps or momentum is out of range.
        Refused: BatchNorm cannot stand there, the network fails on the rows, or the certificate does not hold.
    """
    if not after:
        raise WrongCall("name at least one layer to put BatchNorm after")
    if not (0 < eps < math.inf and 0 < momentum <= 1):
        raise WrongCall(f"eps {eps} must be above 0, and momentum {momentum} above 0 and 1 at most")
    require_rows(inputs)
    original = copied(module).eval()
    specs = {
        layer: NormSpec(channels=shape[1], axes=max(len(shape) - 2, 1), eps=eps, momentum=momentum)  # type: ignore[arg-type]
        for layer, shape in _output_shapes(original, list(dict.fromkeys(after)), inputs).items()
    }
    changed = copy.deepcopy(module)
    attach(changed, specs)
    _make_identities(original, changed, specs, inputs)
    layers, output_error = _certified(original, changed, specs, inputs)
    return Inserted(
        module=changed,
        layers=layers,
        output_error=output_error,
        shift=_train_mode_shift(changed, specs, inputs, batch_size),
        rows=len(inputs[0]),
    )


def attach(module: nn.Module, specs: Mapping[str, NormSpec]) -> None:
    """Give layers a BatchNorm to follow them, fresh, so that a state with `LAYER.norm.*` can be loaded.

    Args:
        module: changed in place.

    Raises:
        WrongCall: there is no such layer, or it has a child named `norm` already; nothing is changed then.
    """
    parts = {layer: _place(module, layer) for layer in specs}
    for layer, part in parts.items():
        parameters = (value for value in (*part.parameters(), *module.parameters()) if value.is_floating_point())
        like = next(parameters, torch.zeros(()))
        # float32 beside float16, as autocast and conversion to half precision leave it; float64 takes nothing else
        norm = specs[layer].made().to(like.device, torch.promote_types(like.dtype, torch.float32))
        norm.train(part.training)
        part.add_module(CHILD, norm)
        if type(part).forward is not nn.Sequential.forward:  # it runs its children, and so the new last one
            part.register_forward_hook(_normalise_output)


def _normalise_output(part: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """A forward hook; it is looked up by name when a network is copied or pickled."""
    answer: Tensor = part.get_submodule(CHILD)(output)
    return answer


# May we?


def _place(module: nn.Module, layer: str) -> nn.Module:
    """A layer that BatchNorm can become a child of."""
    if not layer:
        raise WrongCall("'' is the whole network; name a layer of it")
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if layer not in parts:
        similar = difflib.get_close_matches(layer, parts, n=3)
        hint = f"; did you mean {listing(similar)}?" if similar else f"; it has {listing([p for p in parts if p], 12)}"
        raise WrongCall(f"the network has no layer '{layer}'{hint}")
    if hasattr(parts[layer], CHILD):
        raise WrongCall(f"layer '{layer}' has a '{CHILD}' already; name another layer")
    return parts[layer]


def _output_shapes(network: nn.Module, layers: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """What each layer gives for the first rows, once it is sure that BatchNorm can follow it."""
    parts = {layer: _place(network, layer) for layer in layers}
    seen: dict[str, list[object]] = {layer: [] for layer in layers}
    features_last: list[Tensor] = []  # the tensors themselves, so that none of their ids is used again

    def follow(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        passed_on = type(part).__module__ in _ELEMENTWISE and any(x is tensor for x in args for tensor in features_last)
        if isinstance(output, Tensor) and (passed_on or _gives_features_last(part, output)):
            features_last.append(output)

    hooks = [part.register_forward_hook(follow) for part in network.modules() if not list(part.children())]
    hooks += [
        part.register_forward_hook(lambda _part, _args, output, layer=layer: seen[layer].append(output))
        for layer, part in parts.items()
    ]
    rows = min(2, len(inputs[0]))
    try:
        _answers(network, [tensor[:rows] for tensor in inputs])
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for layer, outputs in seen.items():
        if len(outputs) != 1:
            raise Refused(
                f"layer '{layer}' runs {len(outputs)} times in a forward; BatchNorm needs a place that is passed once"
            )
        (output,) = outputs
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise Refused(f"layer '{layer}' gives {_kind(output)}; BatchNorm takes one tensor of floats")
        shape = list(output.shape)
        if not 2 <= output.ndim <= 5 or not output.numel():
            raise Refused(f"layer '{layer}' gives the shape {shape}; BatchNorm takes [batch, channels, ...]")
        if len(output) % rows:
            raise Refused(
                f"layer '{layer}' gives the shape {shape} for {rows} rows: its first axis is not the batch, and "
                "BatchNorm takes [batch, channels, ...]"
            )
        if any(output is tensor for tensor in features_last):
            raise Refused(
                f"layer '{layer}' gives the shape {shape} with its features on the last axis; BatchNorm takes axis 1 "
                "for the channels, and would normalise positions"
            )
        found[layer] = tuple(output.shape)
    return found


_ELEMENTWISE = frozenset({"torch.nn.modules.activation", "torch.nn.modules.dropout"})
"""Where the layers are defined that leave each axis where it is."""


def _gives_features_last(part: nn.Module, output: Tensor) -> bool:
    if isinstance(part, nn.LayerNorm | nn.RMSNorm):  # over [channels, ...] the channels are still on axis 1
        return output.ndim > 1 + len(part.normalized_shape)
    return output.ndim > 2 and isinstance(part, nn.Linear | nn.Bilinear | nn.Embedding)


def _kind(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {str(output.dtype).removeprefix('torch.')}"
    return f"a {type(output).__name__}"


# Do it


def _make_identities(
    original: nn.Module, changed: nn.Module, specs: Mapping[str, NormSpec], inputs: Sequence[Tensor]
) -> None:
    """Measure what each layer gives in eval mode, float64, and make the BatchNorm behind it the identity."""
    network = copy.deepcopy(original).cpu().double()
    found: dict[str, Moments] = {}

    def take(layer: str, output: Tensor) -> None:
        moments = Moments.of(output.double())
        found[layer] = found[layer].merged(moments) if layer in found else moments

    hooks = [
        network.get_submodule(layer).register_forward_hook(lambda _part, _args, y, layer=layer: take(layer, y))
        for layer in specs
    ]
    try:
        for start in range(0, len(inputs[0]), _ROWS_AT_ONCE):
            run_exactly(network, [tensor[start : start + _ROWS_AT_ONCE] for tensor in inputs])
    finally:
        for hook in hooks:
            hook.remove()
    for layer, moments in found.items():
        if not torch.isfinite(moments.m2_C).all():
            raise Refused(f"layer '{layer}' gives NaN or infinity on these rows")
        if moments.count < 2:
            raise Refused(f"layer '{layer}' gives a single value in each channel; statistics need more rows")
        norm = _norm(changed, layer)
        _make_identity(norm, moments.mean_C, moments.m2_C / moments.count)
        if not torch.isfinite(norm.weight).all():
            raise Refused(f"layer '{layer}' gives values whose variance is too large for float32; scale the data")


@torch.no_grad()
def _make_identity(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.copy_(mean_C)
    norm.running_var.copy_(var_C)
    # made of what the layer keeps, after its rounding to the layer's own dtype
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
    norm.num_batches_tracked.fill_(1)  # with 0 it would look like a layer that was never updated


def _norm(module: nn.Module, layer: str) -> _BatchNorm:
    norm = module.get_submodule(f"{layer}.{CHILD}")
    assert isinstance(norm, _BatchNorm)
    return norm


# Is it what was promised?


def _certified(
    original: nn.Module, changed: nn.Module, specs: Mapping[str, NormSpec], inputs: Sequence[Tensor]
) -> tuple[tuple[InsertedLayer, ...], float]:
    """Every layer's certificate and the relative error of the outputs, on all rows."""
    evaluated = copy.deepcopy(changed).eval()
    error, runs = dict.fromkeys(specs, 0.0), dict.fromkeys(specs, 0)
    lowest, highest = dict.fromkeys(specs, math.inf), dict.fromkeys(specs, -math.inf)

    def look(layer: str, x: Tensor, y: Tensor) -> None:
        runs[layer] += 1
        error[layer] = max(error[layer], _largest(y.double() - x.double()))
        lowest[layer], highest[layer] = min(lowest[layer], float(x.min())), max(highest[layer], float(x.max()))

    for layer in specs:
        _norm(evaluated, layer).register_forward_hook(lambda _part, args, y, layer=layer: look(layer, args[0], y))
    largest = difference = 0.0
    starts = range(0, len(inputs[0]), _ROWS_AT_ONCE)
    for start in starts:
        rows = [tensor[start : start + _ROWS_AT_ONCE] for tensor in inputs]
        for one, other in zip(_answers(original, rows), _answers(evaluated, rows), strict=True):
            decides = one.is_floating_point() and one.ndim == 2 and one.shape[1] > 1
            if not torch.isfinite(one).all():
                raise Refused(
                    "the network's own outputs are not finite on these rows; look for values unlike training's"
                )
            if decides and not torch.equal(one.argmax(1), other.argmax(1)):
                row = start + int((one.argmax(1) != other.argmax(1)).nonzero()[0])
                raise Refused(f"with BatchNorm put in, the network decides otherwise in row {row}; nothing was written")
            if one.is_floating_point():
                largest = max(largest, _largest(one))
                difference = max(difference, _largest(one.double() - other.double()))
            elif not torch.equal(one, other):
                raise Refused("with BatchNorm put in, an output of whole numbers changes; nothing was written")
    for layer in specs:
        if runs[layer] != len(starts):
            raise Refused(
                f"layer '{layer}' runs all of its children, the new '{CHILD}' among them, so BatchNorm would stand "
                "there twice; name its last child"
            )
        allowed = LAYER_TOLERANCE * (highest[layer] - lowest[layer])
        if not error[layer] <= max(allowed, float(torch.finfo(torch.float32).tiny)):
            raise Refused(
                f"BatchNorm behind '{layer}' is no identity: it is {error[layer]:.3g} off, and {allowed:.3g} (1e-5 of "
                "the range) is allowed; a larger --eps, or a layer whose channels vary more, may help"
            )
    output_error = difference / largest if largest else 0.0
    if not output_error <= OUTPUT_TOLERANCE:
        raise Refused(
            f"with BatchNorm put in, the outputs move by {difference:.3g}, and {OUTPUT_TOLERANCE * largest:.3g} is "
            "allowed (1e-4 of the largest)"
        )
    layers = tuple(
        InsertedLayer(
            layer=layer,
            spec=spec,
            error=error[layer],
            range=highest[layer] - lowest[layer],
            gain=_gain(_norm(changed, layer)),
            dead_channels=_dead_channels(_norm(changed, layer)),
        )
        for layer, spec in specs.items()
    )
    return layers, output_error


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN is larger than any."""
    return float(tensor.double().abs().nan_to_num(nan=math.inf).max()) if tensor.numel() else 0.0


def _gain(norm: _BatchNorm) -> float:
    assert norm.running_var is not None
    return float((norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()).max())


def _dead_channels(norm: _BatchNorm) -> int:
    assert norm.running_var is not None
    return int((norm.running_var <= _DEAD).sum())


def _train_mode_shift(
    changed: nn.Module, specs: Mapping[str, NormSpec], inputs: Sequence[Tensor], batch_size: int
) -> TrainModeShift | None:
    """The outputs with the new layers in train mode, against eval mode, in seeded batches."""
    rows = len(inputs[0])
    # all rows as one batch have the very statistics that were measured, and would not move at all
    batch_size = min(batch_size, rows // 2)
    if batch_size < 2:
        return None
    evaluated = copy.deepcopy(changed).eval()
    training = copy.deepcopy(evaluated)
    for layer in specs:
        _norm(training, layer).train()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    moved, wanted = [], []
    for start in range(0, min(rows, _ROWS_FOR_SHIFT), batch_size):
        batch = [tensor[order[start : start + batch_size]] for tensor in inputs]
        if len(batch[0]) < batch_size:
            break  # a smaller batch than training's would say more than there is
        wanted.append(_first(_answers(evaluated, batch)))
        try:
            moved.append(_first(_answers(training, batch)))
        except Refused:  # one value per channel
            return None
    before, after = torch.cat(wanted), torch.cat(moved)
    in_std = (after - before).abs() / before.std(0, correction=0).clamp_min(_DEAD)
    return TrainModeShift(batch_size=batch_size, median=float(in_std.median()), largest=float(in_std.max()))


def _first(outputs: Sequence[Tensor]) -> Tensor:
    """The first output of floats, or of anything."""
    output = next((output for output in outputs if output.is_floating_point()), outputs[0])
    return output.double().reshape(len(output), -1)


def _answers(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            return flattened(network(*inputs))
    except Exception as error:  # the network's own code may raise anything
        raise Refused(f"the network fails on these rows: {first_line(error)}") from error
