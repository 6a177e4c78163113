"""The graph that will serve: with its BatchNorm folded where that is shown to be the same function, else as it came.

`service.graph.fold` says what may be folded; this shows that it was done. The folded graph and the one that came run on
the golden samples and on made-up rows, and must agree within rounding in every output. If they do not, nothing is
folded: the answers are the same, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from service.bundle import Bundle
from service.errors import first_line
from service.graph.fold import Fold, fold
from service.graph.parts import serialised
from service.numerics import largest_difference, made_up_rows, rounding_bounds
from service.runtime import Runtime

MADE_UP = 8
"""Rows of noise to compare on, of very different sizes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """Rows to compare on: one array per input, and how far each output may move."""

    rows: Sequence[NDArray[Any]]
    allowed: Sequence[float] | None = None
    """None: what rounding explains, by the lengths of the graph's sums."""
    alone: bool = False
    """There is no other trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model in the engine, and what became of each of its BatchNorm layers."""

    model: onnx.ModelProto
    runtime: Runtime
    folds: tuple[Fold, ...]


def trials(bundle: Bundle, plain: Runtime) -> list[Trial]:
    """The golden samples, within the passport's tolerance, and made-up rows."""
    fixed = plain.inputs[0].shape[0]
    made_up = [array[:fixed] if fixed > 0 else array for array in made_up_rows(plain.inputs, count=MADE_UP)]
    golden = bundle.passport.golden if bundle.passport else None
    rows = bundle.golden("input")
    if golden is None or not rows:
        return [Trial(rows=made_up, alone=True)]
    tolerances = [golden.tolerances.get(spec.name) for spec in plain.outputs]
    allowed = [tolerance.absolute if tolerance else 0.0 for tolerance in tolerances]
    return [Trial(rows=rows, allowed=allowed), Trial(rows=made_up)]


def folded_if_same(
    model: onnx.ModelProto, plain: Runtime, make_runtime: Callable[[bytes], Runtime], trials: Sequence[Trial]
) -> Served:
    """Load a model with its BatchNorm folded, if that is certified.

    Args:
        model: structurally sound; not changed.
        plain: the model as it came, loaded.
    """
    folded = fold(model)
    if not any(found.into for found in folded.folds):
        return Served(model=model, runtime=plain, folds=folded.folds)
    try:
        runtime = make_runtime(serialised(folded.model))
        reason = next(filter(None, (_difference(plain, runtime, model, trial) for trial in trials)), None)
    except Exception as error:  # the engine takes the one graph and not the other, or the rows fit neither
        reason = f"the folded graph does not run: {first_line(error)}"
    if reason is None:
        return Served(model=folded.model, runtime=runtime, folds=folded.folds)
    return Served(
        model=model,
        runtime=plain,
        folds=tuple(replace(found, into=None, side=None, kept_because=reason) for found in folded.folds),
    )


def _difference(plain: Runtime, folded: Runtime, model: onnx.ModelProto, trial: Trial) -> str | None:
    """Why the folded graph is not the same function, on these rows."""
    wanted, got = plain.run(trial.rows), folded.run(trial.rows)
    allowed = trial.allowed
    if allowed is None and trial.alone and not any(np.isfinite(one).any() for one in wanted if one.dtype.kind == "f"):
        return "made-up rows are outside its domain, and without golden samples nothing else shows that it is the same"
    if allowed is None:
        allowed = [2 * bound for bound in rounding_bounds(model, plain.outputs, wanted)]
    for spec, one, other, bound in zip(plain.outputs, wanted, got, allowed, strict=True):
        # made-up rows may overflow, in either graph; a real answer that does is for the golden door
        finite = np.isfinite(one) if one.dtype.kind == "f" else np.ones(one.shape, dtype=np.bool_)
        difference = largest_difference(one[finite], other[finite])
        if not difference <= bound:
            return f"folded, output '{spec.name}' would move by {difference:.3g}; rounding explains at most {bound:.3g}"
    return None
