"""What is exported: a network in eval mode, real rows for it, and everything that is known about the two.

    evalmode's own checkpoint    ──> of_checkpoint ──┐
    any nn.Module and a sample   ──> of_module ──────┴─> Subject ──> export.exporting

1. A `Subject` is ready: its network is a copy in eval mode that answers its rows; nothing later touches the original.
2. Nothing is served that was not evaluated: probabilities are made of logits only where that was asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from export import checkpoint, tabular_data
from export.checkpoint import Document
from export.copying import copied
from export.rounding import flattened
from service.errors import Refused, WrongCall, first_line, listing
from service.signature import ClassTarget, Signature

Sample: TypeAlias = Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any]] | Mapping[str, Tensor | NDArray[Any]]

_WRAPPED = "network"
_FLOATS = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Rows with their answers, for judging the running statistics."""

    inputs: tuple[Tensor, ...]
    """Of the network proper: see `Subject.network`."""
    targets: Tensor
    """int64[N] for classes, float[N, ...] for numbers."""
    source: str
    batch_size: int = 32
    """Of the training."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A network to export. `module` is in eval mode and answers `inputs`."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    """Real rows for each argument of `forward`, with the batch axis first."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    """Where the rows are from, for people."""
    wrapped: str = ""
    """The path of the network proper inside `module`; layers are named from there."""
    signature: Signature | None = None
    """None: tensors, as the graph has them."""
    target: ClassTarget | None = None
    """What the columns of a tensor network's only output stand for."""
    settled: frozenset[str] = frozenset()
    """BatchNorm layers whose statistics were measured exactly, so that no count of batches speaks about them."""
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what trained the network."""
    card: str | None = None
    data: Data | None = None

    @property
    def network(self) -> nn.Module:
        """The network proper."""
        return self.module.get_submodule(self.wrapped)


# evalmode's own


def of_checkpoint(folder: Path, *, table: Path | None = None) -> Subject:
    """A checkpoint that `evalmode train` wrote, with its held-out rows.

    Args:
        table: that it learned from; its training rows judge the running statistics.

    Raises:
        WrongCall: it cannot be read, or has no rows.
    """
    trained = checkpoint.read(folder)
    if not len(trained.samples[0]):
        raise WrongCall(f"'{folder}' has no samples, and parity is measured on real rows; train it again")
    served = trained.served()
    document = trained.document
    data: Data | None = None
    if table is not None:
        known = tabular_data.parts(trained, table).training
        data = Data(
            inputs=known.inputs,
            targets=known.answers,
            source=f"training rows of {table.name}",
            batch_size=document.training.batch_size,
        )
    return Subject(
        module=served,
        inputs=trained.samples,
        input_names=tuple(spec.name for spec in trained.signature.inputs),
        output_names=served.output_names,
        source=f"held-out rows of {document.data.file}",
        wrapped=_WRAPPED,
        signature=trained.signature,
        settled=trained.settled,
        provenance=document.model_dump(
            mode="json",
            include={"task", "data", "left_out", "training", "outcome", "metrics", "calibration"},
            exclude_none=True,
        ),
        versions=document.versions,
        card=card(document),
        data=data,
    )


def card(document: Document) -> str:
    """What the model is for, what was left out and why, and how good it is: in sentences."""
    data = document.data
    said = [
        *([document.card] if document.card else []),
        f"It predicts '{document.target.name}' from {len(document.features)} features; trained on {data.training_rows} "
        f"rows of {data.file}, {data.validation_rows} more to decide when to stop, {data.test_rows} held out.",
        *(f"Left out: '{name}' {reason.removeprefix('left out ')}." for name, reason in document.left_out.items()),
        *(
            f"On the held-out rows, {who}: {', '.join(f'{metric} {value:.3f}' for metric, value in figures.items())}."
            for who, figures in document.metrics.items()
        ),
    ]
    return "\n".join(said)


# Anybody's


def of_module(
    module: nn.Module,
    sample: Sample,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    softmax: bool = False,
    settled: frozenset[str] = frozenset(),
    source: str = "the rows given",
    provenance: Mapping[str, JsonValue] | None = None,
    card: str | None = None,
    data: Data | None = None,
) -> Subject:
    """Any network, in eval mode on a copy: what is exported is the function that eval mode computes.

    Args:
        module: in any mode; not changed.
        sample: real rows, one tensor or array for each argument of `forward`, in its order, or by its names.
        classes: what the columns of the only output stand for.
        softmax: the network gives logits; serve their softmax, over the last axis.

    Raises:
        WrongCall: the rows are none, not finite, or not as many in each; the classes are not as many as the columns.
        Refused: the network fails on the rows, or its output is not what `classes` and `softmax` say.
    """
    if not isinstance(module, nn.Module):
        raise WrongCall(f"the network is a {type(module).__name__}; give a torch.nn.Module, with its weights")
    if isinstance(sample, Mapping):
        sample = _by_argument(module, sample)
        input_names = list(sample)
        sample = list(sample.values())
    tensors = (sample,) if isinstance(sample, Tensor | np.ndarray) else tuple(sample)
    inputs = tuple(torch.as_tensor(tensor).detach().cpu() for tensor in tensors)
    names = tuple(input_names or ([f"input_{i}" for i in range(len(inputs))] if len(inputs) > 1 else ["input"]))
    _require_rows(names, inputs)
    if isinstance(module, torch.jit.ScriptModule):
        raise WrongCall("the network is a scripted module, which cannot be taken apart; export what it was made of")
    _require_dtypes(module, names, inputs)
    network = with_batch_norm_for_instance_norm(copied(module).cpu().eval().requires_grad_(False))
    outputs = _answered(network, inputs)
    found = tuple(output_names or (f"{name}_output" if name in names else name for name in _names(outputs)))
    tensors_out = flattened(outputs)
    if not tensors_out:
        raise Refused(f"the network's forward gives a {type(outputs).__name__} without tensors in it")
    if len(found) != len(tensors_out):
        raise WrongCall(f"{len(found)} output name(s) ({listing(found)}) for {len(tensors_out)} output(s)")
    if len({*names, *found}) < len(names) + len(found):
        raise WrongCall(
            f"a tensor is named twice: {listing([*names, *found])}; --outputs gives the outputs other names"
        )
    if softmax:
        _require_one_output("--softmax", tensors_out)
        network = Probabilities(network).eval()
        tensors_out = flattened(_answered(network, inputs))
    if classes:
        _require_probabilities(classes, tensors_out)
    return Subject(
        module=network,
        inputs=inputs,
        input_names=names,
        output_names=found,
        source=source,
        wrapped=_WRAPPED if softmax else "",
        target=ClassTarget(name="class", classes=tuple(classes)) if classes else None,
        settled=settled,
        provenance=dict(provenance or {}),
        card=card,
        data=data,
    )


def _by_argument(module: nn.Module, sample: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor | NDArray[Any]]:
    """Rows by name, in the order in which `forward` takes them; one alone may be called anything."""
    arguments = inspect.signature(module.forward).parameters
    any_number = any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments.values())
    if len(sample) == 1 or any_number:
        return dict(sample)
    names = list(arguments)
    if set(sample) != set(names[: len(sample)]):
        raise WrongCall(f"the sample has {listing(sample)}, but forward takes {listing(names)}")
    return {name: sample[name] for name in names[: len(sample)]}


def with_batch_norm_for_instance_norm(network: nn.Module) -> nn.Module:
    """Replace every InstanceNorm that keeps running statistics by the BatchNorm that it is in eval mode.

    There both compute gamma * (x - running_mean) / sqrt(running_var + eps) + beta, but the exporter repeats the
    statistics of an InstanceNorm for every row, so that they look as if the graph computed them.

    Args:
        network: in eval mode; changed in place.
    """
    kinds = {nn.InstanceNorm1d: nn.BatchNorm1d, nn.InstanceNorm2d: nn.BatchNorm2d, nn.InstanceNorm3d: nn.BatchNorm3d}
    for parent in list(network.modules()):
        for name, part in list(parent._modules.items()):
            kind = kinds.get(type(part))  # type: ignore[arg-type]
            if kind is None or not isinstance(part, _NormBase) or part.running_mean is None:
                continue
            norm = kind(part.num_features, eps=part.eps, momentum=part.momentum, affine=part.affine)
            norm.to(part.running_mean.dtype).load_state_dict(part.state_dict())
            setattr(parent, name, norm.eval().requires_grad_(False))
    return network


@final
class Probabilities(nn.Module):
    """The softmax of a network's logits, over the last axis."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        (logits,) = flattened(self.network(*inputs))
        return logits.softmax(-1)


def _require_rows(names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    if len(names) != len(inputs):
        raise WrongCall(f"{len(names)} input name(s) ({listing(names)}) for {len(inputs)} input(s)")
    if not inputs:
        raise WrongCall("a sample has at least one tensor of rows; parity is measured on real rows")
    for name, tensor in zip(names, inputs, strict=True):
        if tensor.ndim == 0 or not len(tensor):
            raise WrongCall(
                f"sample '{name}' has shape {list(tensor.shape)}; the first axis is the batch, with a row at least"
            )
        if len(tensor) != len(inputs[0]):
            raise WrongCall(f"sample '{names[0]}' has {len(inputs[0])} rows, '{name}' has {len(tensor)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WrongCall(f"sample '{name}' has NaN or infinity in it; parity is measured on real numbers")


def _require_dtypes(module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    tensors = {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
        **dict(zip(names, inputs, strict=True)),
    }
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Refused(
                f"'{name}' is {dtype}, which NumPy and most clients do not know; export the network in float32, with "
                "network.float() and rows in float32"
            )


def _answered(network: nn.Module, inputs: Sequence[Tensor]) -> object:
    try:
        with torch.no_grad():
            return network(*inputs)
    except Exception as error:  # the network's own code may raise anything
        shapes = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in inputs)
        raise Refused(f"the network fails on the sample ({shapes}): {first_line(error)}") from error


def _names(outputs: object) -> list[str]:
    """What a network calls its outputs: keys, fields, or numbers."""
    if isinstance(outputs, Tensor):
        return ["output"]
    if isinstance(outputs, Mapping):
        named = [(str(key), value) for key, value in outputs.items()]
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        named = [(found.name, getattr(outputs, found.name)) for found in dataclasses.fields(outputs)]
    elif hasattr(outputs, "_asdict"):
        named = list(outputs._asdict().items())
    else:
        named = []
    if named and all(isinstance(value, Tensor) for _, value in named):
        return [re.sub(r"\W", "_", name) for name, _ in named]
    return [f"output_{i}" for i in range(len(flattened(outputs)))]


def _require_one_output(flag: str, outputs: Sequence[Tensor]) -> None:
    if len(outputs) != 1 or outputs[0].ndim < 2:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise WrongCall(f"{flag} is for a network with one output [batch, classes]; this one gives {shapes}")


def _require_probabilities(classes: Sequence[str], outputs: Sequence[Tensor]) -> None:
    _require_one_output("--classes", outputs)
    (output,) = outputs
    if output.ndim != 2 or output.shape[1] != len(classes):
        raise WrongCall(f"--classes names {len(classes)}, but the output has the shape {list(output.shape)}")
    if len(set(classes)) != len(classes):
        raise WrongCall("--classes names a class twice")
    sums = output.double().sum(1)
    if bool((output < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise Refused(
            "the output is not a probability for each class: the rows do not sum to 1; --softmax serves the softmax of "
            "logits"
        )
