"""Is the ONNX model the network in eval mode? Measured on real rows, judged by the float error of this network on them.

    measured   at batch 1, 2, 3 and the size of the sample, at every optimisation level of onnxruntime:
               the largest difference between the ONNX model and PyTorch in eval mode, for each output
    allowed    2 * bound: each of the two may be off the exact answer by `bound` (`export.rounding`)

Measuring is apart from judging: `measure` runs everything and returns figures, `refusal` reads them.

The batch sizes are there because code may branch on the number of rows (`self.norm(x) if x.shape[0] != 1 else x` is
exported without a word), the levels because a fusion is a change of the graph like any other, and the rows are real
ones because noise does not reach the values where the statistics matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from export.rounding import TRIALS_PER_AXIS, analyse, flattened
from service.bundle import ParityFigure, Tolerance
from service.errors import Refused, first_line, listing
from service.numerics import largest_difference
from service.runtime import OnnxRuntime, Optimisation, place

LEVELS: tuple[Optimisation, ...] = ("none", "basic", "extended", "all")
Arrays: TypeAlias = list[NDArray[Any]]

BATCH_SIZES = (1, 2, 3)
"""Besides all rows at once: alone, the smallest company, and the smallest odd one."""


MEANINGLESS = 0.25
"""Of the largest answer: where rounding may move it that far, equality within rounding says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far the ONNX model was from PyTorch at worst, in one setting."""

    output: str
    batch_size: int
    level: Optimisation
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """All that was measured; each mapping has an entry for each output."""

    bounds: Mapping[str, float]
    """How far rounding may take an output from the exact answer."""
    torch_errors: Mapping[str, float]
    """How far PyTorch's own answer is from the exact one."""
    torch_batch_effects: Mapping[str, float]
    """How much PyTorch's answer for a row changes with the number of rows beside it."""
    largest: Mapping[str, float]
    """The largest absolute value of PyTorch's answers."""
    differences: tuple[Difference, ...]
    not_finite: tuple[str, ...]
    """Outputs in which PyTorch gave NaN or infinity."""
    random: tuple[str, ...]
    """Outputs in which PyTorch gave two answers to the same rows."""

    @property
    def tolerances(self) -> dict[str, Tolerance]:
        """For the passport: how near a replay must come to what PyTorch gave."""
        return {name: Tolerance(absolute=2 * bound) for name, bound in self.bounds.items()}

    @property
    def comparable(self) -> bool:
        """Whether PyTorch itself answers as it should, so that a difference is the ONNX model's."""
        exact = all(self.torch_errors[name] <= bound for name, bound in self.bounds.items())
        return exact and not self.not_finite and not self.random

    @property
    def figures(self) -> tuple[ParityFigure, ...]:
        """For the passport: the worst of each kind."""
        return tuple(figure for name in self.bounds for figure in self._figures_of(name))

    def _figures_of(self, name: str) -> Iterator[ParityFigure]:
        bound = self.bounds[name]
        kinds = {
            "PyTorch and float64": (self.torch_errors[name], bound),
            "PyTorch in other batches": (self.torch_batch_effects[name], 2 * bound),
        }
        for level in LEVELS:
            worst = max(d.largest for d in self.differences if (d.output, d.level) == (name, level))
            kinds[f"ONNX, optimisation {level}"] = (worst, 2 * bound)
        for kind, (difference, allowed) in kinds.items():
            yield ParityFigure(name=f"{name}, {kind}", difference=difference, bound=allowed)


def measure(
    module: nn.Module,
    model: onnx.ModelProto,
    inputs: Sequence[Tensor],
    output_names: Sequence[str],
    *,
    analysed_rows: int | None = None,
    trials_per_axis: int = TRIALS_PER_AXIS,
) -> Parity:
    """Run a network and its ONNX model on the same rows.

    Args:
        module: in eval mode; not changed.
        inputs: real rows for each argument of `forward`, as many in each; not changed.
        analysed_rows: how many of them, from the front, the small batches and the float error analysis take; all of
            them by default. The largest batch always has all.
        trials_per_axis: of the float error analysis.

    Raises:
        Refused: PyTorch or the ONNX model fails on some number of rows. That they differ is for `refusal` to judge.
    """
    rows = len(inputs[0])
    few = min(rows, analysed_rows or rows)
    first = [tensor[:few] for tensor in inputs]
    analysis = analyse(module, first, trials_per_axis=trials_per_axis)
    wanted = torch_outputs(module, inputs)
    again = zip(torch_outputs(module, first), torch_outputs(module, first), strict=True)
    effects = [0.0] * len(wanted)
    batches = [(size, picked) for size in BATCH_SIZES for picked in _batches(few, size)]
    batches += [(rows, list(range(rows)))] if rows not in BATCH_SIZES else []
    torch_gave: list[Arrays] = []
    for size, picked in batches:
        with _failing_is_refused("PyTorch", size):
            torch_gave.append(torch_outputs(module, [tensor[picked] for tensor in inputs]))
        _raise_to(effects, torch_gave[-1], [output[picked] for output in wanted])
    differences: list[Difference] = []
    content, cpu = model.SerializeToString(), place("cpu")
    for level in LEVELS:
        runtime = OnnxRuntime(content, cpu, threads=1, optimisation=level)
        worst = {size: [0.0] * len(wanted) for size, _ in batches}
        for (size, picked), torch_answer in zip(batches, torch_gave, strict=True):
            with _failing_is_refused(f"the ONNX model at optimisation '{level}'", size):
                onnx_answer = runtime.run([tensor[picked].detach().cpu().numpy() for tensor in inputs])
            _raise_to(worst[size], onnx_answer, torch_answer)
        differences.extend(
            Difference(output=name, batch_size=size, level=level, largest=largest)
            for size, found in worst.items()
            for name, largest in zip(output_names, found, strict=True)
        )
    errors = [0.0] * len(wanted)
    _raise_to(errors, [output[:few] for output in wanted], [tensor.numpy() for tensor in analysis.exact])
    return Parity(
        bounds=dict(zip(output_names, analysis.bounds, strict=True)),
        torch_errors=dict(zip(output_names, errors, strict=True)),
        torch_batch_effects=dict(zip(output_names, effects, strict=True)),
        largest=dict(zip(output_names, map(_largest, wanted), strict=True)),
        differences=tuple(differences),
        not_finite=tuple(n for n, array in zip(output_names, wanted, strict=True) if not np.isfinite(array).all()),
        random=tuple(n for n, pair in zip(output_names, again, strict=True) if largest_difference(*pair)),
    )


def refusal(parity: Parity) -> str | None:
    """Why the ONNX model is not the network in eval mode, as a sentence; None when it is."""
    for name, bound in parity.bounds.items():
        if name in parity.not_finite:
            return f"PyTorch's own output '{name}' is not finite on these rows; look for values unlike training's"
        if name in parity.random:
            return f"PyTorch's own output '{name}' is random: two equal runs gave two answers, in eval mode"
        if parity.largest[name] and not bound <= MEANINGLESS * parity.largest[name]:
            return (
                f"rounding alone may move PyTorch's output '{name}' by {bound:.3g}, and the largest answer is "
                f"{parity.largest[name]:.3g}: the network amplifies it so much that its answers mean nothing; look for "
                "a BatchNorm with a variance near 0, or inputs in a very large unit"
            )
        if not parity.torch_errors[name] <= bound:
            return (
                f"PyTorch's output '{name}' is {parity.torch_errors[name]:.3g} away from the same network in float64; "
                f"rounding explains at most {bound:.3g}: it computes in a coarser type than that of its weights"
            )
        apart = [d for d in parity.differences if d.output == name and not d.largest <= 2 * bound]
        if apart:
            return _apart(parity, name, apart)
        if not parity.torch_batch_effects[name] <= 2 * bound:
            return (
                f"PyTorch's output '{name}' of a row changes by {parity.torch_batch_effects[name]:.3g} with the rows "
                f"beside it, in eval mode too; rounding explains at most {2 * bound:.3g}: the network mixes its batch"
            )
    return None


def _apart(parity: Parity, name: str, apart: Sequence[Difference]) -> str:
    worst = max(apart, key=lambda difference: difference.largest)
    sizes = {difference.batch_size for difference in apart}
    levels = {difference.level for difference in apart}
    hint = ""
    if sizes != {difference.batch_size for difference in parity.differences}:
        numbers = ", ".join(map(str, sorted(sizes)))
        hint = f"; only batches of {numbers} are wrong: the network's code may branch on the number of rows"
    elif levels != set(LEVELS):
        hint = f"; it is wrong only at optimisation {listing(level for level in LEVELS if level in levels)}"
    return (
        f"output '{name}' of the ONNX model is {worst.largest:.3g} away from PyTorch in eval mode (in a batch of "
        f"{worst.batch_size}, optimisation '{worst.level}'); rounding explains at most "
        f"{2 * parity.bounds[name]:.3g}{hint}"
    )


def torch_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> Arrays:
    """What PyTorch gives in the mode that the module is in, one array per output."""
    with torch.no_grad():
        return [output.detach().cpu().numpy() for output in flattened(module(*inputs))]


def train_eval_divergence(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[float, ...] | None:
    """How far each output would be off if BatchNorm used the statistics of these rows: what eval mode prevents.

    Only BatchNorm is put in training mode, on a copy: with dropout live the figure would be mostly chance.

    Returns:
        The largest difference for each output; None for a network without BatchNorm, or where these rows are too few
        to have statistics.
    """
    duplicate = copy.deepcopy(module)
    norms = [part for part in duplicate.modules() if isinstance(part, _BatchNorm)]
    for norm in norms:
        norm.train()
    try:
        trained = torch_outputs(duplicate, inputs)
    except ValueError:  # "Expected more than 1 value per channel when training"
        return None
    evaluated = torch_outputs(module, inputs)
    return tuple(largest_difference(*pair) for pair in zip(trained, evaluated, strict=True)) if norms else None


@contextmanager
def _failing_is_refused(who: str, size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network's own code and onnxruntime may raise anything
        raise Refused(f"{who} fails on a batch of {size}: {first_line(error)}") from error


def _largest(output: NDArray[Any]) -> float:
    if output.dtype.kind != "f":
        return 0.0
    return float(np.abs(output.astype(np.float64)).max(initial=0.0, where=np.isfinite(output)))


def _batches(rows: int, size: int) -> Iterator[list[int]]:
    """All rows in batches of one size; the last one begins again from the first row to be full."""
    for start in range(0, rows, size):
        yield [row % rows for row in range(start, start + size)]


def _raise_to(worst: list[float], got: Arrays, wanted: Arrays) -> None:
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        worst[i] = max(worst[i], largest_difference(one, other))
