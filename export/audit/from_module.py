"""The facts in a network, in the state in which it is given; it is not changed.

What does not show in its attributes is read in its code (`source`), and, where there is a sample, in what happens when
a copy of it runs (`probe`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel

from export.audit.facts import DropoutBefore, Facts, LiveDropout, Momentum, NormFacts
from export.audit.from_state import dtype, is_empty, vector
from export.audit.kinds import is_handmade, is_other_norm, keeps_statistics
from export.audit.probe import probe
from export.audit.source import batch_size_branches, reads_its_mode

_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding)


def read_module(module: nn.Module, inputs: Sequence[Tensor] | None = None) -> Facts:
    """The facts.

    Args:
        module: not changed, bit for bit, and its hooks neither.
        inputs: rows for each argument of `forward`; what they show is left out where there are none. Not changed.

    Raises:
        Refused: the network cannot be copied, or fails on the inputs.
    """
    parts = dict(module.named_modules())
    live_norms = _trained_for_quantisation(module)
    norms = tuple(_norm(path, part, part in live_norms) for path, part in parts.items() if keeps_statistics(part))
    # what has no numbers yet cannot be copied, nor run
    runs = not any(is_empty(value) for value in (*module.parameters(), *module.buffers()))
    probed = probe(module, inputs) if inputs and runs else None
    live = [
        LiveDropout(layer=path, p=p, why="it is in training mode")
        for path, part in parts.items()
        if (p := _drops(part))
    ]
    return Facts(
        source="module",
        norms=norms,
        root_training=module.training,
        training=tuple((path, type(part).__name__) for path, part in parts.items() if part.training and _minds(part)),
        live_dropouts=() if module.training else (*live, *(probed.live_dropouts if probed else ())),
        dropouts_before=probed.dropouts_before if probed else tuple(_in_sequence(module)),
        averaged="the class AveragedModel" if any(isinstance(part, AveragedModel) for part in parts.values()) else "",
        other_norms=Counter(type(part).__name__ for part in parts.values() if is_other_norm(part)),
        trainable=any(parameter.requires_grad for parameter in module.parameters()),
        branches=tuple(batch_size_branches(module)),
        features_last=probed.features_last if probed else (),
        observed=probed.observed if probed else None,
    )


def _drops(part: nn.Module) -> float:
    """Its p, if it is a Dropout and drops."""
    return part.p if isinstance(part, _DropoutNd) and part.training else 0.0


def _minds(part: nn.Module) -> bool:
    """Its mode changes its answers."""
    match part:
        case _DropoutNd() | nn.MultiheadAttention() | nn.RNNBase():
            return float(getattr(part, "p", getattr(part, "dropout", 0.0))) > 0
        case nn.RReLU():
            return True
        case _:
            return keeps_statistics(part) or reads_its_mode(part)


def _norm(path: str, part: nn.Module, live: bool) -> NormFacts:
    mean, var, gamma, beta = (_tensor(part, name) for name in ("running_mean", "running_var", "weight", "bias"))
    count = _tensor(part, "num_batches_tracked")
    stored = mean if var is None else var
    affine = [value for value in (gamma, beta) if value is not None]
    handmade = is_handmade(part)
    tracks = getattr(part, "track_running_stats", None)
    return NormFacts(
        layer=path,
        kind=type(part).__name__,
        mean_C=vector(mean),
        var_C=vector(var),
        gamma_C=vector(gamma),
        beta_C=vector(beta),
        dtype=dtype(stored),
        weights_dtype=dtype(stored if gamma is None else gamma),
        eps=_number(getattr(part, "eps", None)),
        momentum=_momentum(part, handmade),
        num_batches_tracked=int(count) if count is not None and count.numel() == 1 and not is_empty(count) else None,
        training=part.training,
        tracks=bool(tracks) if isinstance(tracks, bool) else None,
        affine_frozen=bool(affine) and not any(value.requires_grad for value in affine),
        synced=isinstance(part, nn.SyncBatchNorm),
        lazy=any(is_empty(value) for value in (*part.parameters(recurse=False), *part.buffers(recurse=False))),
        handmade=handmade,
        quantised="live" if live else "",
    )


def _tensor(part: nn.Module, name: str) -> Tensor | None:
    value = getattr(part, name, None)
    return value if isinstance(value, Tensor) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _momentum(part: nn.Module, handmade: bool) -> Momentum:
    momentum = getattr(part, "momentum", None)
    if handmade:
        return None  # whose convention it follows is not known
    return "cumulative" if momentum is None else _number(momentum)


def _trained_for_quantisation(module: nn.Module) -> set[nn.Module]:
    """The BatchNorm inside a layer for quantisation-aware training that has not been told to freeze its statistics."""
    return {
        norm
        for part in module.modules()
        if getattr(part, "freeze_bn", None) is False and isinstance(norm := getattr(part, "bn", None), nn.Module)
    }


# Dropout before a norm layer, where nothing runs


def _in_sequence(module: nn.Module) -> Iterator[DropoutBefore]:
    """What `nn.Sequential` says of the order of its children, nested ones included."""
    inside: set[nn.Module] = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.Sequential) and part not in inside:
            inside.update(child for child in part.modules() if isinstance(child, nn.Sequential))
            yield from _in_order(list(_flat(path, part)))


def _flat(path: str, part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in part.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.Sequential):
            yield from _flat(below, child)
        else:
            yield below, child


def _in_order(parts: Sequence[tuple[str, nn.Module]]) -> Iterator[DropoutBefore]:
    dropout: tuple[str, float] | None = None
    between: tuple[str, ...] = ()
    for path, part in parts:
        if isinstance(part, _DropoutNd):
            dropout, between = (path, part.p) if part.p > 0 else None, ()
        elif keeps_statistics(part):
            if dropout is not None:
                yield DropoutBefore(dropout=dropout[0], norm=path, p=dropout[1], between=between)
            dropout = None
        elif isinstance(part, _WEIGHTED):
            between = (*between, type(part).__name__)
            dropout = dropout if len(between) == 1 else None
        elif next(part.children(), None) is not None or is_other_norm(part):
            dropout = None  # what happens inside is not known here
