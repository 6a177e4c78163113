"""Rows for a network, out of a `.npz` file: one array for each argument of `forward`, and perhaps the targets.

    inputs.npz   x: float32[N, ...], mask: int64[N, ...]      named for the arguments, or arr_0, arr_1, ... in order
                 targets: int64[N] or float32[N, ...]         what the network should have answered

1. Every array has the same number of rows, and every number is finite: NaN in a sample would make every comparison true
   or false for no reason.
2. Floats come in the dtype of the network's weights, as they would in training; indices stay integers.
3. Nothing is unpickled.
"""

from __future__ import annotations

import difflib
import inspect
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.errors import WrongCall, first_line, listing

TARGETS = ("targets", "target", "labels", "y")
"""What the array with the answers may be called, where no argument of `forward` is called so."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Rows as a network takes them."""

    names: tuple[str, ...]
    """Of the arguments of `forward`."""
    inputs: tuple[Tensor, ...]
    """One for each name, with the batch axis first."""
    targets: Tensor | None = None
    """int64[N] for classes, float[N, ...] for numbers; None where the file has none."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs[0])

    def first(self, rows: int) -> Samples:
        """At most so many rows, from the front."""
        return Samples(
            names=self.names,
            inputs=tuple(tensor[:rows] for tensor in self.inputs),
            targets=None if self.targets is None else self.targets[:rows],
            notes=self.notes,
        )


def read(file: Path, module: nn.Module, *, targets: bool = False) -> Samples:
    """Read rows for a network.

    Args:
        module: whose `forward` names the arrays and whose weights give the dtype; not changed.
        targets: whether the answers are needed.

    Raises:
        WrongCall: the file cannot be read, or its arrays do not fit the network or each other.
    """
    arrays = _arrays(file)
    arguments = _arguments(module)
    answers = _taken_out(arrays, arguments)
    if targets and answers is None:
        raise WrongCall(f"'{file}' has no answers; add an array 'targets' with one for each row")
    arrays = _arranged(file, arrays, arguments)
    for name, array in [*arrays.items(), *([("targets", answers)] if answers is not None else [])]:
        _require_numbers(file, name, array)
    lengths = {name: len(array) for name, array in arrays.items()}
    if answers is not None:
        lengths["targets"] = len(answers)
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise WrongCall(f"'{file}' has arrays with different numbers of rows: {said}; the first axis is the batch")
    if not next(iter(lengths.values())):
        raise WrongCall(f"'{file}' has no rows")
    dtype = float_dtype(module)
    notes = [
        f"'{name}' is {array.dtype}; given to the network as {str(dtype).removeprefix('torch.')}"
        for name, array in arrays.items()
        if array.dtype.kind == "f" and array.dtype.name != str(dtype).removeprefix("torch.")
    ]
    inputs = tuple(_tensor(file, name, array, dtype) for name, array in arrays.items())
    return Samples(names=tuple(arrays), inputs=inputs, targets=_answers(answers), notes=tuple(notes))


def read_for(file: Path, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Read rows for the inputs of a graph, in its order.

    Raises:
        WrongCall: the file cannot be read, or its arrays do not fit the names or each other.
    """
    arrays = _arrays(file)
    takes = {name: inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names if name.isidentifier()}
    _taken_out(arrays, takes)
    unnamed = list(arrays) == [f"arr_{i}" for i in range(len(arrays))] or len(arrays) == len(names) == 1
    found = dict(zip(names, arrays.values(), strict=False)) if unnamed else arrays
    if set(found) != set(names) or len(arrays) != len(names):
        raise WrongCall(f"'{file}' has the arrays {listing(arrays)}, but the model takes {listing(names)}")
    for name, array in found.items():
        _require_numbers(file, name, array)
    if len({len(array) for array in found.values()}) > 1 or not len(found[names[0]]):
        raise WrongCall(f"'{file}' needs as many rows in each array, and one at least")
    return tuple(_plain(found[name]) for name in names)


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a network takes floats: that of its first weights with a fraction."""
    floats = (value.dtype for value in (*module.parameters(), *module.buffers()) if value.is_floating_point())
    return next(floats, torch.float32)


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as opened:
            content = np.load(opened, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise WrongCall(f"'{file}' is a single array; save it as .npz: numpy.savez('inputs.npz', x=array)")
            arrays = dict(content)
    except OSError as error:
        raise WrongCall(f"'{file}' cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise WrongCall(f"'{file}' is no .npz file: {first_line(error)}; numpy.savez writes one") from error
    if not arrays:
        raise WrongCall(f"'{file}' has no arrays in it")
    return arrays


def _arguments(module: nn.Module) -> dict[str, inspect.Parameter] | None:
    """The arguments of `forward`; None where it takes any number of them."""
    found = inspect.signature(module.forward).parameters
    kinds = {parameter.kind for parameter in found.values()}
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else dict(found)


def _taken_out(
    arrays: dict[str, NDArray[Any]], arguments: Mapping[str, inspect.Parameter] | None
) -> NDArray[Any] | None:
    for name in TARGETS:
        if name in arrays and name not in (arguments or {}):
            return arrays.pop(name)
    return None


def _arranged(
    file: Path, arrays: Mapping[str, NDArray[Any]], arguments: Mapping[str, inspect.Parameter] | None
) -> dict[str, NDArray[Any]]:
    """The arrays by the arguments that they are for, in the order in which `forward` takes them."""
    if not arrays:
        raise WrongCall(f"'{file}' has answers, but no inputs")
    # one array for one argument cannot be mistaken, whatever it is called
    unnamed = list(arrays) == [f"arr_{i}" for i in range(len(arrays))] or len(arrays) == len(arguments or ()) == 1
    if arguments is None:
        return {f"input_{i}" if unnamed else name: array for i, (name, array) in enumerate(arrays.items())}
    names = list(arguments)
    takes = f"forward takes {listing(names)}"
    if len(arrays) > len(names):
        raise WrongCall(f"'{file}' has {len(arrays)} arrays ({listing(arrays)}), but {takes}")
    found = dict(zip(names, arrays.values(), strict=False)) if unnamed else dict(arrays)
    if unknown := [name for name in found if name not in arguments]:
        similar = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean '{similar[0]}'?" if similar else ""
        raise WrongCall(f"'{file}' has the array '{unknown[0]}', but {takes}{hint}")
    required = [name for name, argument in arguments.items() if _is_required(argument)]
    if missing := [name for name in required if name not in found]:
        raise WrongCall(f"'{file}' lacks {listing(missing)}: {takes}")
    if set(found) != set(names[: len(found)]):  # the exporter calls a network by position
        raise WrongCall(f"'{file}' leaves out an argument in the middle: {takes}; give an array for that one too")
    return {name: found[name] for name in names[: len(found)]}


def _is_required(argument: inspect.Parameter) -> bool:
    return argument.default is inspect.Parameter.empty and argument.kind is not inspect.Parameter.VAR_KEYWORD


def _require_numbers(file: Path, name: str, array: NDArray[Any]) -> None:
    if array.dtype.kind not in "fiub":
        raise WrongCall(f"'{file}': '{name}' is {array.dtype}; a network takes numbers")
    if array.ndim == 0:
        raise WrongCall(f"'{file}': '{name}' is a single number; the first axis must be the batch")
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        where = np.argwhere(~finite)[0].tolist()
        raise WrongCall(
            f"'{file}': '{name}' is {array[tuple(where)]} at {where} ({int((~finite).sum())} such values); parity is "
            "measured on real numbers: leave such rows out, or put in what the network was trained to see there"
        )


def _tensor(file: Path, name: str, array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    tensor = _plain(array)
    if not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        raise WrongCall(f"'{file}': '{name}' has values that {str(dtype).removeprefix('torch.')} cannot hold")
    return converted


def _plain(array: NDArray[Any]) -> Tensor:
    """In this machine's byte order, and in a dtype that PyTorch computes with."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    dtype = np.float64 if kind == "f" and size > 8 else np.int64 if kind == "u" and size > 1 else array.dtype
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("=")))


def _answers(array: NDArray[Any] | None) -> Tensor | None:
    if array is None:
        return None
    tensor = _plain(array)
    return tensor if tensor.is_floating_point() else tensor.long()
