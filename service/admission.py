"""What a bundle must pass before it is served: four doors, in this order.

1. structure     every BatchNormalization is frozen, no Dropout is live, weights come from inside the folder
2. digest        each file is what the passport says
3. golden        the golden samples, replayed on the session that will serve, within the passport's tolerance
4. independence  a row's answer does not depend on the rows beside it

Rule 1: an `Admitted` exists only if all doors were passed; nothing else is served.
Rule 2: doors 3 and 4 run the very `Runtime` object that will answer requests, with its BatchNorm folded.
Rule 3: a refusal is a sentence with the figure measured and the figure allowed.

`evalmode export` ends with the same doors, so what is written is what will be admitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from service.bundle import Bundle, IndependenceFigure, ParityFigure, digest
from service.errors import AdmissionRefused, first_line, listing
from service.folding import folded_if_same, trials
from service.graph import external
from service.graph.fold import Fold
from service.graph.parts import serialised
from service.graph.scan import BatchNorm, scan
from service.graph.size import nodes_inlined
from service.numerics import largest_difference, largest_value, made_up_rows, rounding_bounds, same_bits
from service.runtime import Deadline, OnnxRuntime, Placement, Runtime
from service.signature import Accepted, Signature, TensorSpec

MakeRuntime = Callable[[bytes], Runtime]

SUBJECTS = 8
"""Rows that independence is tried with: enough that each has different neighbours, few enough for a large model."""

MOST_NODES = 20_000
"""Of a graph with its functions written out: more than networks have, and the engine's time grows with their square."""

LONGEST_RUN_S = 0.1
"""A batch that takes longer, as far as one row tells, is made of `SUBJECTS` rows only: company must not cost more than
it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A bundle that passed all four doors, with the session that passed them."""

    bundle: Bundle
    runtime: Runtime
    signature: Signature
    batchnorms: tuple[BatchNorm, ...]
    """As they are in the file."""
    folds: tuple[Fold, ...]
    """What became of each of them in the graph that serves."""
    golden: tuple[ParityFigure, ...]
    """For each output, the largest distance from PyTorch over the golden samples; empty without golden samples."""
    golden_rows: int
    independence: IndependenceFigure
    subjects: Sequence[NDArray[Any]]
    """The rows that independence was tried with: one array per input."""
    bounds: Sequence[float]
    """For each output, the largest difference between batch sizes that rounding explains."""
    max_batch_rows: int
    """The most rows that independence was shown for. Fewer than asked for where so many would take longer than
    `LONGEST_RUN_S`."""

    def sample(self, rows: int) -> Accepted:
        """So many rows of those that independence was tried with, over and over if they are too few."""
        places = np.arange(rows) % self.subjects[0].shape[0] if self.subjects else None
        return Accepted(tuple(array[places] for array in self.subjects), rows)


def admit(
    bundle: Bundle,
    placement: Placement,
    *,
    threads: int = 0,
    max_batch_rows: int = 64,
    longest_run_s: float = LONGEST_RUN_S,
    deadline: Deadline | None = None,
) -> Admitted:
    """Lead a bundle through the four doors.

    Args:
        bundle: as read, not changed.
        max_batch_rows: the largest batch that independence is tested at, and that may be served.
        longest_run_s: no larger batch than runs in that time, as far as one row tells, but always `SUBJECTS` rows.
        deadline: when it passes, the bundle is refused; None: never.

    Raises:
        AdmissionRefused: a door did not open; its sentence says which, what was measured and what was wanted.
    """
    return admit_with(
        bundle,
        lambda model: OnnxRuntime(model, placement, threads=threads, deadline=deadline),
        max_batch_rows,
        longest_run_s,
    )


def admit_with(
    bundle: Bundle, make_runtime: MakeRuntime, max_batch_rows: int, longest_run_s: float = LONGEST_RUN_S
) -> Admitted:
    """`admit` with any engine: the seam for tests."""
    model = sealed(bundle.model)
    content = serialised(model)
    batchnorms = check_structure(model, content)
    check_digest(bundle)
    plain = make_runtime(content)
    check_batch_axis(plain.inputs)
    signature = check_signature(bundle, plain)
    golden_inputs = bundle.golden("input")
    served = folded_if_same(model, plain, make_runtime, trials(bundle, plain))
    runtime = served.runtime
    golden = check_golden(bundle, runtime, golden_inputs)
    rows = _subjects(runtime.inputs, golden_inputs)
    fixed = runtime.inputs[0].shape[0]
    run_s = _median_run_s(runtime, [array[: max(fixed, 1)] for array in rows])
    max_batch_rows = int(min(max_batch_rows, max(SUBJECTS, longest_run_s / run_s)))
    sizes = batch_sizes(runtime.inputs, max_batch_rows)
    reference = reference_answers(runtime, rows, sizes[0])
    bounds = _rounding_bounds(bundle, model, runtime.outputs, reference)
    independence = check_independence(runtime, rows, reference, batch_sizes=sizes, bounds=bounds)
    return Admitted(
        bundle=bundle,
        runtime=runtime,
        signature=signature,
        batchnorms=batchnorms,
        folds=served.folds,
        golden=golden,
        golden_rows=golden_inputs[0].shape[0] if golden_inputs else 0,
        independence=independence,
        subjects=rows,
        bounds=bounds,
        max_batch_rows=max_batch_rows,
    )


# Door 1


def sealed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its initializers as constants, where a caller of onnxruntime could override them as inputs.

    Nobody can here, and a runtime computes faster, and in one order only, with weights that it knows.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constants]
    if len(kept) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
    return model


def check_batch_axis(inputs: Sequence[TensorSpec]) -> None:
    """Every input has rows, and all have them alike.

    Raises:
        AdmissionRefused: there is no input, one is a scalar, or two have batches of different lengths.
    """
    if not inputs:
        raise AdmissionRefused("structure", "the model has no inputs, so there is nothing to predict from")
    for spec in inputs:
        if not spec.shape:
            raise AdmissionRefused("structure", f"input '{spec.name}' is a scalar; every input needs a batch axis")
        if spec.shape[0] != inputs[0].shape[0]:
            raise AdmissionRefused(
                "structure",
                f"input '{inputs[0].name}' has shape {list(inputs[0].shape)} and '{spec.name}' {list(spec.shape)}; "
                "the first axis of every input is the batch, so it must be the same (-1 is any length)",
            )


def check_structure(model: onnx.ModelProto, content: bytes = b"") -> tuple[BatchNorm, ...]:
    """The BatchNormalization nodes of the model, all of them frozen.

    Args:
        content: the model serialised, where somebody has done that already.

    Raises:
        AdmissionRefused: it is not a valid model, or something in it makes answers depend on the batch or on chance.
    """
    try:
        onnx.checker.check_model(content or serialised(model))
    except onnx.checker.ValidationError as error:
        raise AdmissionRefused("structure", f"model.onnx is not a valid ONNX model: {first_line(error)}") from error
    if elsewhere := external.locations(model):
        raise AdmissionRefused(
            "structure", f"it has weights in other files ({listing(elsewhere)}), and only those inside it are served"
        )
    if (nodes := nodes_inlined(model)) > MOST_NODES:
        raise AdmissionRefused(
            "structure", f"it has {nodes} nodes, functions written out; at most {MOST_NODES} are served"
        )
    found = scan(model)
    if found.faults:
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        first = found.faults[0]
        remedy = (
            "measure its statistics again (`evalmode calibrate`)"
            if first.endswith("that is not finite") or "has a negative running_var" in first
            else "put the network in eval mode with .eval()"
        )
        raise AdmissionRefused("structure", f"{first}{more}; {remedy} and export it again")
    return found.batchnorms


# Door 2


def check_digest(bundle: Bundle) -> None:
    """Each file is what the passport says; a plain ONNX file has none and passes.

    Raises:
        AdmissionRefused: a file was changed after the bundle was written, or is not named by the passport.
    """
    if bundle.passport is None:
        return
    if unnamed := bundle.contents.keys() - bundle.passport.files.keys():
        raise AdmissionRefused("digest", f"the passport has no digest of '{min(unnamed)}'; export the model again")
    for path, said in bundle.passport.files.items():
        found = digest(bundle.contents[path])
        if found != said:
            raise AdmissionRefused(
                "digest",
                f"'{path}' has {found.size_bytes} bytes and sha256 {found.sha256[:12]}…, the passport says "
                f"{said.size_bytes} bytes and {said.sha256[:12]}…; copy the bundle again, whole",
            )


def check_signature(bundle: Bundle, runtime: Runtime) -> Signature:
    """The passport's signature if it is the graph's, else the graph's own."""
    graph = Signature(inputs=runtime.inputs, outputs=runtime.outputs)
    if bundle.passport is None:
        return graph
    said = bundle.passport.signature
    if (said.inputs, said.outputs) != (graph.inputs, graph.outputs):
        raise AdmissionRefused(
            "structure",
            f"the passport says {_edge(said)}, but the graph has {_edge(graph)}; export the model again",
        )
    return said


def _edge(signature: Signature) -> str:
    inputs, outputs = (
        ", ".join(f"{spec.name}: {spec.datatype}{list(spec.shape)}" for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )
    return f"({inputs}) -> ({outputs})"


# Door 3


def check_golden(bundle: Bundle, runtime: Runtime, golden_inputs: Sequence[NDArray[Any]]) -> tuple[ParityFigure, ...]:
    """For each output, the largest distance from the golden outputs; empty without golden samples.

    Raises:
        AdmissionRefused: golden samples are promised and missing, or an output is farther off than the tolerance.
    """
    if bundle.passport is None or bundle.passport.golden is None:
        return ()
    said = bundle.passport.golden
    wanted = bundle.golden("output")
    if len(golden_inputs) != len(runtime.inputs) or len(wanted) != len(runtime.outputs):
        raise AdmissionRefused("golden", "the passport promises golden samples, but not each input and output has them")
    got = _run(runtime, golden_inputs, "golden")
    figures = []
    for spec, want, have in zip(runtime.outputs, wanted, got, strict=True):
        tolerance = said.tolerances.get(spec.name)
        if tolerance is None:
            raise AdmissionRefused("golden", f"the passport has no tolerance for output '{spec.name}'")
        if have.shape != want.shape:
            raise AdmissionRefused("golden", f"output '{spec.name}' has shape {have.shape}; PyTorch gave {want.shape}")
        if have.dtype != want.dtype:
            raise AdmissionRefused(
                "golden", f"output '{spec.name}' is {have.dtype}; the golden samples have {want.dtype}"
            )
        largest = largest_value(want)
        if 0 < largest <= tolerance.absolute:
            raise AdmissionRefused(
                "golden",
                f"the tolerance {tolerance.absolute:.3g} of output '{spec.name}' says nothing: its largest golden "
                f"value is {largest:.3g}, so that zeros would pass",
            )
        difference = largest_difference(have, want)
        if not difference <= tolerance.absolute:
            raise AdmissionRefused(
                "golden",
                f"output '{spec.name}' is {difference:.3g} away from what PyTorch gave in eval mode; "
                f"float error explains at most {tolerance.absolute:.3g}",
            )
        figures.append(ParityFigure(name=spec.name, difference=difference, bound=tolerance.absolute))
    return tuple(figures)


# Door 4


def batch_sizes(inputs: Sequence[TensorSpec], max_batch_rows: int) -> tuple[int, ...]:
    """The sizes to try independence at: alone, 2, 3, 7 and the maximum; or the one size that the graph allows."""
    fixed = inputs[0].shape[0] if inputs and inputs[0].shape else -1
    if fixed != -1:
        return (fixed,)
    return tuple(sorted({size for size in (1, 2, 3, 7) if size < max_batch_rows} | {max_batch_rows}))


def reference_answers(runtime: Runtime, rows: Sequence[NDArray[Any]], size: int) -> list[NDArray[Any]]:
    """The answer to every row in a batch of `size`, by output: alone wherever the graph allows it."""
    count = rows[0].shape[0]
    parts = [_answers(runtime, rows, (np.arange(size) + start) % count) for start in range(0, count, size)]
    return [np.concatenate(outputs)[:count] for outputs in zip(*parts, strict=True)]


def check_independence(
    runtime: Runtime,
    rows: Sequence[NDArray[Any]],
    reference: Sequence[NDArray[Any]],
    *,
    batch_sizes: Sequence[int],
    bounds: Sequence[float],
) -> IndependenceFigure:
    """Show that a row's answer does not depend on the rows beside it.

    At every size, first one half of the rows is exchanged and then the other: the answers to those that stayed must not
    change in any bit. Another size, and another place than the first, may change rounding, at most by `bounds`.

    Args:
        rows: one array per input, with the same number of rows, at least 2; not changed.
        reference: the answer to each of them at the first of the batch sizes.
        batch_sizes: ascending.
        bounds: for each output, the largest difference that rounding explains.

    Raises:
        AdmissionRefused: the model is random, has an output without batch axis, or depends on its batch.
    """
    count = rows[0].shape[0]
    worst = [0.0] * len(runtime.outputs)
    exact = True
    for size in batch_sizes:
        order = np.arange(size) % count
        answers = _answers(runtime, rows, order)
        _check_repeatable(runtime, answers, _answers(runtime, rows, order))
        for stay in (np.arange(size) % 2 == 0, np.arange(size) % 2 == 1) if size > 1 else ():
            exchanged = np.where(stay, order, (order + max(count // 2, 1)) % count)
            _check_undisturbed(runtime, answers, _answers(runtime, rows, exchanged), stay)
        for i, spec in enumerate(runtime.outputs):
            difference = largest_difference(answers[i], reference[i][order])
            if not difference <= bounds[i]:
                raise AdmissionRefused(
                    "independence",
                    f"output '{spec.name}' of a row is {difference:.3g} different in a batch of {size} than in one "
                    f"of {batch_sizes[0]}; rounding explains at most {bounds[i]:.3g}",
                )
            worst[i] = max(worst[i], difference)
            exact = exact and same_bits(answers[i], reference[i][order])
    bound = max(worst, default=0.0)
    return IndependenceFigure(kind="exact" if exact else "bounded", bound=bound, batch_sizes=tuple(batch_sizes))


def _answers(runtime: Runtime, rows: Sequence[NDArray[Any]], places: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The outputs of a batch with the rows of these numbers, one array per output."""
    outputs = _run(runtime, [array[places] for array in rows], "independence")
    for spec, output in zip(runtime.outputs, outputs, strict=True):
        if output.ndim == 0 or output.shape[0] != len(places):
            raise AdmissionRefused(
                "independence", f"output '{spec.name}' has shape {output.shape} for {len(places)} rows: no batch axis"
            )
    return outputs


def _check_repeatable(runtime: Runtime, one: Sequence[NDArray[Any]], again: Sequence[NDArray[Any]]) -> None:
    for spec, first, second in zip(runtime.outputs, one, again, strict=True):
        if not same_bits(first, second):
            raise AdmissionRefused("independence", f"output '{spec.name}' is random: equal runs gave two answers")


def _check_undisturbed(
    runtime: Runtime, before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], stay: NDArray[np.bool_]
) -> None:
    for spec, first, second in zip(runtime.outputs, before, after, strict=True):
        if not same_bits(first[stay], second[stay]):
            difference = largest_difference(first[stay], second[stay])
            raise AdmissionRefused(
                "independence",
                f"output '{spec.name}' of a row changed by {difference:.3g} when only its neighbours in a batch of "
                f"{len(stay)} changed; the network mixes the rows of a batch",
            )


def _subjects(inputs: Sequence[TensorSpec], golden_inputs: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """The rows to try independence with: golden ones, and made-up ones beside them where those are too few."""
    if not golden_inputs:
        return made_up_rows(inputs, count=SUBJECTS)
    real = [array[:SUBJECTS] for array in golden_inputs]
    missing = SUBJECTS - real[0].shape[0]
    if missing <= 0:
        return real
    shaped = [
        spec.model_copy(update={"shape": (spec.shape[0], *array.shape[1:])})
        for spec, array in zip(inputs, real, strict=True)
    ]
    return [np.concatenate(pair) for pair in zip(real, made_up_rows(shaped, count=missing), strict=True)]


def _rounding_bounds(
    bundle: Bundle, model: onnx.ModelProto, outputs: Sequence[TensorSpec], reference: Sequence[NDArray[Any]]
) -> list[float]:
    """How far another order of summation may move each output.

    From the passport: twice its tolerance, for two answers that each lie within it of the true one.
    """
    golden = bundle.passport.golden if bundle.passport else None
    if golden is not None:
        return [2 * golden.tolerances[spec.name].absolute for spec in outputs]
    return rounding_bounds(model, outputs, reference)


def _run(runtime: Runtime, tensors: Sequence[NDArray[Any]], door: str) -> list[NDArray[Any]]:
    try:
        return runtime.run(tensors)
    except AdmissionRefused:
        raise
    except Exception as error:  # onnxruntime raises a class of its own for each status
        rows = tensors[0].shape[0] if tensors else 0
        raise AdmissionRefused(door, f"the model failed on a batch of {rows}: {first_line(error)}") from error


def _median_run_s(runtime: Runtime, row: Sequence[NDArray[Any]]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _run(runtime, row, "independence")
        times.append(time.perf_counter() - start)
    return float(np.median(times))
