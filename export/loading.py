"""The user's own network: a callable that builds it, and a file with its weights.

    my_package.nets:build  +  key=value ...  ──> build ──> nn.Module ──┐
    ckpt.pt, ckpt.safetensors ──> read_state ──> State ────────────────┴─> load ──> the network with its weights

1. Nothing is unpickled but tensors: a file runs no code of whoever wrote it. The builder is the user's own code.
2. Every key of the network is in the file and every key of the file in the network, under one prefix, with one shape;
   `load_state_dict(strict=False)` leaves a BatchNorm with mean 0 and variance 1 and says nothing.
3. What was done to make a file fit (a wrapping opened, a prefix taken off) is said in a note.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.errors import WrongCall, clipped, first_line, listing
from service.files import write_whole

INSERTED_KEY = "evalmode.inserted"
SETTLED_KEY = "evalmode.settled"
"""Entries of a safetensors header: BatchNorm layers that `evalmode insert` put in, and layers whose statistics were
measured exactly, so that `num_batches_tracked` says nothing about them."""

_WRAPPINGS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights")
_AVERAGED_WRAPPINGS = ("model_ema", "ema", "ema_state_dict", "state_dict_ema", "ema_model", "averaged_model")
_AVERAGED_COUNT = "n_averaged"
_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """The tensors of a file with weights, by their keys in it."""

    file: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, JsonValue]
    """What a safetensors header says under the keys of this module."""
    notes: tuple[str, ...] = ()

    @property
    def settled(self) -> frozenset[str]:
        """BatchNorm layers whose statistics were measured exactly, so that no count of batches speaks about them."""
        layers = self.metadata.get(SETTLED_KEY)
        return frozenset(map(str, layers)) if isinstance(layers, list) else frozenset()


# The network


def is_builder(target: str) -> bool:
    """Whether a command line's TARGET is `module:callable`, and no path.

    >>> [is_builder(target) for target in ("my_package.nets:build", "nets:Net", "checkpoints/credit", "C:/net.onnx")]
    [True, True, False, False]
    """
    module, colon, name = target.partition(":")
    dotted = [*module.split("."), *name.split(".")]
    return bool(colon) and all(part.isidentifier() for part in dotted)


def build(target: str, settings: Sequence[str] = ()) -> nn.Module:
    """Call the user's builder.

    Args:
        target: `module:callable`; the module is looked for in the current folder too. A name that is a network already
            is taken as it is.
        settings: `key=value` each, passed by keyword; the value is JSON where it can be read as JSON, else text.

    Raises:
        WrongCall: it cannot be imported or called, or gives no network.
    """
    made = _called(target, _imported(target), _settings(settings))
    if not isinstance(made, nn.Module):
        raise WrongCall(f"'{target}' gave a {type(made).__name__}; it must return a torch.nn.Module")
    return made


def _imported(target: str) -> Any:
    module_name, _, path = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name)
        where = "; run evalmode in the folder that holds it, or install it" if missing else ""
        raise WrongCall(f"'{module_name}' cannot be imported: {_said(error)}{where}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            similar = difflib.get_close_matches(name, [n for n in vars(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean '{similar[0]}'?" if similar else ""
            raise WrongCall(f"'{module_name}' has no '{path}'{hint}")
        found = getattr(found, name)
    return found


def _called(target: str, builder: Any, settings: Mapping[str, JsonValue]) -> object:
    if isinstance(builder, nn.Module):
        if settings:
            raise WrongCall(f"'{target}' is a network already, so --set has nothing to set")
        return copy.deepcopy(builder)
    if not callable(builder):
        raise WrongCall(f"'{target}' is a {type(builder).__name__}; name a function or class that makes the network")
    try:
        inspect.signature(builder).bind(**settings)
    except TypeError as error:
        takes = inspect.signature(builder)
        raise WrongCall(f"'{target}' takes {takes}: {error}; --set key=value gives an argument") from error
    except ValueError:  # a builtin without a signature
        pass
    try:
        return builder(**settings)
    except Exception as error:  # the user's code
        raise WrongCall(f"'{target}' failed: {_said(error)}") from error


def _settings(pairs: Sequence[str]) -> dict[str, JsonValue]:
    """`key=value` as keyword arguments.

    >>> _settings(["width=64", "norm=batch", "dropout=0.5", "pretrained=false"])
    {'width': 64, 'norm': 'batch', 'dropout': 0.5, 'pretrained': False}
    """
    found: dict[str, JsonValue] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise WrongCall(f"--set {pair} is not key=value")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {clipped(str(error), 300)}" if str(error) else type(error).__name__


# The file


def read_state(file: Path) -> State:
    """Read a file with weights: safetensors, or what `torch.save` wrote of tensors and plain containers.

    Raises:
        WrongCall: it cannot be read, would have to run code, or holds no weights.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(9)
    except OSError as error:
        raise WrongCall(f"'{file}' cannot be read: {error.strerror}") from error
    if file.suffix == ".safetensors" or head[8:9] == b"{":
        return _safetensors(file)
    return _opened(file, _unpickled(file))


def _safetensors(file: Path) -> State:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no mapping
        said = {key: json.loads(header[key]) for key in (INSERTED_KEY, SETTLED_KEY) if key in header}
    except (SafetensorError, ValueError) as error:
        raise WrongCall(f"'{file}' is no safetensors file: {first_line(error)}") from error
    return State(file=file, tensors=tensors, metadata=said)


def _unpickled(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        needed = _class_it_names(str(error))
        if not needed:
            raise WrongCall(
                f"'{file}' holds no weights that PyTorch can read: it is no pickle, or a damaged one"
            ) from error
        raise WrongCall(
            f"'{file}' is a pickle that holds more than tensors ({needed}), and loading it would run its code; where "
            "it was made, save the weights alone: torch.save(network.state_dict(), 'weights.pt')"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and more for files that are none
        raise WrongCall(f"'{file}' holds no weights that PyTorch can read: {_said(error)}") from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _class_it_names(said: str) -> str | None:
    """The class for which a pickle is refused, out of PyTorch's explanation; None where there is another reason."""
    for mark in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if mark in said:
            return clipped(said.split(mark, 1)[1].split()[0], 100)
    return None


def _opened(file: Path, content: object) -> State:
    """The state inside the wrappings that training loops put around it."""
    notes: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content):
        inside = [key for key in (*_WRAPPINGS, *_AVERAGED_WRAPPINGS) if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        averaged = [key for key in inside if key in _AVERAGED_WRAPPINGS]
        notes.append(f"took the weights under '{inside[0]}'")
        if averaged and inside[0] not in averaged:
            notes.append(f"the averaged weights under {listing(averaged)} were left aside")
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not _is_state(content):
        found = f"a dictionary of {listing(map(str, content), 8)}" if isinstance(content, Mapping) else "no dictionary"
        raise WrongCall(f"'{file}' has no weights in it ({found}); save network.state_dict()")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return State(file=file, tensors=tensors, metadata={}, notes=tuple(notes))


def _is_state(content: Mapping[Any, Any]) -> bool:
    """A state has tensors under keys that are texts; beside them, modules may keep state of other kinds."""
    return any(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()) and not any(
        isinstance(content.get(key), Mapping) for key in _WRAPPINGS
    )


def write_state(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, JsonValue]) -> None:
    """Write weights as safetensors, whole or not at all.

    Raises:
        WrongCall: the file is there already.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    if file.exists():
        raise WrongCall(f"'{file}' is already there and is not replaced; --out takes another name")
    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}  # tied ones as well
    header = {key: json.dumps(value) for key, value in metadata.items()}
    write_whole(file, safetensors.torch.save(copies, header))


# Both


def load(module: nn.Module, state: State) -> tuple[str, ...]:
    """Give a network its weights.

    Args:
        module: changed in place, its mode not.

    Returns:
        What was done to make the file fit.

    Raises:
        WrongCall: a key is missing or too many, or a tensor has another shape; nothing has been changed then.
    """
    wanted = module.state_dict()
    prefix = _prefix(state.tensors, wanted)
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.tensors.items() if key.startswith(prefix)}
    outside = [key for key in state.tensors if not key.startswith(prefix) and key != _AVERAGED_COUNT]
    takes_average = _AVERAGED_COUNT in wanted
    notes = [f"took '{prefix}' off the keys"] if prefix else []
    if _AVERAGED_COUNT in state.tensors and not takes_average:
        inside.pop(_AVERAGED_COUNT, None)
        notes.append("these are averaged weights (AveragedModel): their running statistics belong to other weights")
    missing = [key for key in wanted if key not in inside]
    if missing and all(key.endswith(f".{_COUNT}") or key == _COUNT for key in missing):
        notes.append("the file counts no batches (num_batches_tracked), as files from before PyTorch 0.4.1")
        missing = []
    _require_all(state.file, missing, [*outside, *(key for key in inside if key not in wanted)])
    _require_shapes(state.file, inside, wanted)
    module.load_state_dict(inside, strict=False)
    return (*state.notes, *notes)


def _prefix(got: Iterable[str], wanted: Mapping[str, Tensor]) -> str:
    """What stands before the network's own keys in the file: the prefix under which most of them are found."""
    got = set(got)
    candidates = {""}
    for key in list(wanted)[:3]:
        candidates |= {found[: -len(key)] for found in got if found.endswith(f".{key}")}
    return max(sorted(candidates, key=len), key=lambda prefix: sum(prefix + key in got for key in wanted))


def _require_all(file: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    faults = []
    statistics = [key for key in missing if key.endswith(_STATISTICS)]
    if statistics:
        faults.append(
            f"it lacks running statistics, {listing(statistics, 4)}: BatchNorm would serve mean 0 and variance 1; save "
            "the whole state_dict(), buffers included, or build the network without them and run 'evalmode calibrate'"
        )
    if others := [key for key in missing if key not in statistics]:
        faults.append(f"it lacks {listing(others, 8)}")
    if unexpected:
        faults.append(f"the network has no {listing(unexpected, 8)}")
    if faults:
        raise WrongCall(f"'{file}' does not fit the network: {'; '.join(faults)}")


def _require_shapes(file: Path, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for key, tensor in got.items():
        is_lazy = torch.nn.parameter.is_lazy(wanted[key])
        if not is_lazy and tensor.shape != wanted[key].shape:
            raise WrongCall(
                f"'{file}' does not fit the network: '{key}' has shape {list(tensor.shape)}; the network's has "
                f"{list(wanted[key].shape)}; --set gives the builder other arguments"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Built:
    """The user's network with its weights, in the mode in which its builder returned it."""

    module: nn.Module
    settled: frozenset[str] = frozenset()
    """BatchNorm layers whose statistics were measured exactly."""
    metadata: Mapping[str, JsonValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def structure(self) -> dict[str, JsonValue]:
        """What a file with later weights must say, so that the network can be built for them: what was put in."""
        return {key: value for key, value in self.metadata.items() if key == INSERTED_KEY}


def built(target: str, *, weights: Path | None, settings: Sequence[str] = ()) -> Built:
    """Build the user's network and give it its weights.

    Raises:
        WrongCall: see `build`, `read_state` and `load`.
    """
    module = build(target, settings)
    if weights is None:
        return Built(module=module)
    state = read_state(weights)
    attach_inserted(module, state)
    _give_statistics(module, state)
    notes = load(module, state)
    return Built(module=module, settled=state.settled, metadata=state.metadata, notes=notes)


def _give_statistics(module: nn.Module, state: State) -> None:
    """Let layers keep the statistics that `evalmode calibrate` measured, where their builder gave them none."""
    from export.calibration import keep_statistics

    parts = dict(module.named_modules())
    for layer in state.settled:
        part = parts.get(layer)
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            keep_statistics(part)


def attach_inserted(module: nn.Module, state: State) -> None:
    """Put in the BatchNorm layers that `evalmode insert` said, in the file's header, that it had put in."""
    if specs := cast("dict[str, Any]", state.metadata.get(INSERTED_KEY, {})):
        from export.insertion import NormSpec, attach

        try:
            found = {layer: NormSpec(**spec) for layer, spec in specs.items()}
        except (AttributeError, TypeError, ValidationError) as error:
            raise WrongCall(
                f"'{state.file}' says under '{INSERTED_KEY}' in its header what evalmode does not understand: "
                f"{first_line(error)}"
            ) from error
        attach(module, found)
