"""From a network to a bundle: the straight line of `evalmode export`.

    Subject ──> audit ──> convert ──> parity ──> passport, golden samples ──> admission ──> models/NAME/VERSION
                                       └─ on failure: which layer, and why

1. Whatever is refused on the way leaves nothing behind; a version appears whole, and only after the service's own
   admission took exactly the files that it consists of.
2. The same network and rows, exported by the same versions, give the same bytes: no clock is read, and torch has one
   thread.
3. Each check is reported as it is made, with its figure and its limit, the one that fails as well.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import JsonValue
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from export import cost, parity, subject
from export.audit import Finding, audit_module
from export.conversion import Converted, convert
from export.cost import Budget
from export.diagnosis import diagnose
from export.gap import Gap, answers, measured_gap, metrics
from export.parity import Parity
from export.report import render
from export.subject import Data, Sample, Subject
from service import bundle
from service.admission import Admitted, admit, check_digest
from service.bundle import REPORT_FILE, Bundle, GoldenSummary, ParityFigure, Passport
from service.errors import Refused, WrongCall
from service.runtime import OnnxRuntime, place
from service.signature import Signature


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that was looked at, for a person to read."""

    what: str
    figure: str
    limit: str
    verdict: Literal["passed", "failed", "noted"]


Say = Callable[[Check], None]
OnStage = Callable[[str], None]
"""Is told what is done next, for somebody who waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A bundle at its place."""

    folder: Path
    passport: Passport
    size_bytes: int
    findings: tuple[Finding, ...] = ()
    """What the audit found, short of an error."""
    gap: Gap | None = None

    @property
    def report(self) -> Path:
        return self.folder / REPORT_FILE


def export_checkpoint(
    folder: Path, *, name: str, models: Path, table: Path | None = None, say: Say = lambda _: None
) -> Exported:
    """Export a checkpoint of `evalmode train` as the next version of a model.

    Args:
        folder: the checkpoint; not changed.
        name: the model's.
        models: the repository; made if it is not there.
        table: that the network learned from, for the gap report.
        say: is called with each check, in order.

    Raises:
        WrongCall: the checkpoint cannot be read, the name cannot be one, or the repository cannot be written to.
        Refused: a check failed; the last check reported says which, where there is a figure to it.
    """
    bundle.checked_name(name)
    with one_thread():
        return export_subject(subject.of_checkpoint(folder, table=table), name=name, models=models, say=say)


def export_model(
    module: nn.Module,
    sample: Sample,
    *,
    name: str,
    models: Path | str = "models",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    softmax: bool = False,
    data: Data | None = None,
    card: str | None = None,
    say: Say = lambda _: None,
) -> Exported:
    """Export any network as the next version of a model, through every check.

    What is exported is the function that eval mode computes; the module is bit for bit what it was afterwards.

    Args:
        module: with its weights, in any mode.
        sample: real rows, with the batch axis first: one tensor or array for each argument of `forward`, in its order
            or by its names. They become golden samples, so they must be such as may be kept in the bundle.
        name: the model's.
        models: the repository; made if it is not there.
        input_names, output_names: how the graph calls them; by default after the arguments and what `forward` returns.
        classes: what the columns of the only output stand for; it must give probabilities.
        softmax: the network gives logits; serve their softmax.
        data: rows with their answers, for the gap report.
        card: what the model is for, in sentences.
        say: is called with each check, in order.

    Raises:
        WrongCall: the rows or names do not fit, or the repository cannot be written to.
        Refused: a check failed; nothing is written then.
    """
    bundle.checked_name(name)
    with one_thread():
        made = subject.of_module(
            module,
            sample,
            input_names=input_names,
            output_names=output_names,
            classes=classes,
            softmax=softmax,
            data=data,
            card=card,
        )
        return export_subject(made, name=name, models=Path(models), say=say)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread: sums have one order then, on a machine with any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def export_subject(
    it: Subject, *, name: str, models: Path, say: Say = lambda _: None, on_stage: OnStage = lambda _: None
) -> Exported:
    """The line itself; see the module.

    Args:
        say: is called with each check, in order.
        on_stage: is called before each part of the work.

    Raises:
        WrongCall: the repository cannot be written to.
        Refused: a check failed; nothing is written then.
    """
    model_folder = models / bundle.checked_name(name)
    on_stage("auditing")
    budget = cost.budget(it.module, it.inputs)
    if it.data is not None:
        first = [tensor[:2] for tensor in it.data.inputs]
        metrics(
            answers(it.network, first), it.data.targets[:2]
        )  # refuses answers that do not fit, before the long work
    findings = _audited(it, budget, say)
    on_stage("converting to ONNX")
    converted = _converted(it, say)
    on_stage("comparing with PyTorch, at four optimisation levels")
    rows = tuple(tensor[: budget.sample] for tensor in it.inputs)
    measured = _measured(it, converted, rows, budget, say)
    divergence = _train_eval_divergence(it, measured, rows, say)
    on_stage("judging the running statistics")
    gap = _gap(it, say)
    contents = {bundle.MODEL_FILE: converted.model.SerializeToString(), **_golden_files(it.module, rows)}
    with _writable(models):
        version = bundle.next_version(model_folder)
        folder = model_folder / version
        signature = _signature(it, contents[bundle.MODEL_FILE])
        for spec in (*signature.inputs, *signature.outputs):
            kind = "input" if spec in signature.inputs else "output"
            axes = ", ".join("batch" if axis == -1 else str(axis) for axis in spec.shape)
            say(Check(what=f"{kind} {spec.name}: {spec.datatype} [{axes}]", figure="", limit="", verdict="noted"))
        draft = Passport(
            name=name,
            version=version,
            signature=signature,
            files={path: bundle.digest(content) for path, content in contents.items()},
            batchnorm=converted.layers,
            golden=GoldenSummary(
                rows=len(rows[0]),
                source=f"{it.source}, with what PyTorch gave for them in eval mode",
                tolerances=measured.tolerances,
            ),
            parity=measured.figures,
            provenance={
                **it.provenance,
                "versions": {**({"training": dict(it.versions)} if it.versions else {}), "export": _versions()},
                "train_eval_divergence": {**divergence},
                "unused_layers": list(converted.unused),
            },
            card=it.card,
        )
        on_stage("leading it through the service's admission")
        admitted = _admitted(
            Bundle(name=name, version=version, folder=folder, contents=contents, passport=draft), budget, say
        )
        passport = draft.model_copy(update={"independence": admitted.independence})
        page = _page(it, converted, passport, admitted, findings, gap)
        bundle.write(folder, passport=passport, contents=contents, unread={REPORT_FILE: page}, check=check_digest)
    size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Exported(folder=folder, passport=passport, size_bytes=size_bytes, findings=findings, gap=gap)


def _audited(it: Subject, budget: Budget, say: Say) -> tuple[Finding, ...]:
    findings = audit_module(it.network, [tensor[: budget.analysed] for tensor in it.inputs], settled=it.settled)
    errors, warnings = ([f for f in findings if f.severity == severity] for severity in ("error", "warning"))
    figure = f"errors: {len(errors)}, warnings: {len(warnings)}" if errors or warnings else "healthy"
    verdict: Literal["passed", "failed"] = "failed" if errors else "passed"
    say(Check(what="audit of the BatchNorm layers", figure=figure, limit="no errors", verdict=verdict))
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Refused(f"{errors[0].rule}: {errors[0].message}{more}")
    return findings


def _converted(it: Subject, say: Say) -> Converted:
    try:
        converted = convert(
            it.module, it.inputs, input_names=it.input_names, output_names=it.output_names, wrapped=it.wrapped
        )
    except Refused:
        what = "BatchNorm layers kept, frozen, bit for bit"
        say(Check(what=what, figure="no", limit="all used", verdict="failed"))
        raise
    modules = sum(1 for _ in it.module.modules())
    layers = len(converted.layers)
    say(Check(what="modules in eval mode", figure=f"{modules} of {modules}", limit="all", verdict="passed"))
    say(
        Check(
            what="BatchNorm layers kept, frozen, bit for bit",
            figure=f"{layers} of {layers + len(converted.unused)}",
            limit="all used",
            verdict="passed",
        )
    )
    return converted


def _measured(it: Subject, converted: Converted, rows: Sequence[torch.Tensor], budget: Budget, say: Say) -> Parity:
    measured = parity.measure(
        it.module,
        converted.model,
        rows,
        it.output_names,
        analysed_rows=budget.analysed,
        trials_per_axis=budget.trials_per_axis,
    )
    for figure in measured.figures:
        say(_check(figure))
    reason = parity.refusal(measured)
    verdict: Literal["passed", "failed"] = "failed" if reason else "passed"
    said = "no" if reason else "yes"
    say(Check(what="the ONNX model is eval mode", figure=said, limit="rounding", verdict=verdict))
    if reason and measured.comparable:
        few = [tensor[: budget.analysed] for tensor in rows]
        found = diagnose(it.module, converted.model, few)
        raise Refused(f"{found.verdict}: {found.sentence}")
    if reason:
        raise Refused(reason)
    return measured


def _train_eval_divergence(
    it: Subject, measured: Parity, rows: Sequence[torch.Tensor], say: Say
) -> dict[str, JsonValue]:
    """For people: how far off each output would be with the statistics of the samples in place of the running ones."""
    differences = parity.train_eval_divergence(it.module, rows)
    if differences is None:
        return {}
    found = {
        name: difference
        for name, difference in zip(it.output_names, differences, strict=True)
        if measured.bounds[name]  # a label is another one, or the same
    }
    for name, difference in found.items():
        what, limit = f"{name}, with train mode's statistics", f"{2 * measured.bounds[name]:.2g}"
        say(Check(what=what, figure=f"{difference:.2g}", limit=limit, verdict="noted"))
    return {**found}


def _gap(it: Subject, say: Say) -> Gap | None:
    """For people: what each choice of statistics would do to the metric; only where there are answers."""
    if it.data is None:
        return None
    if not any(isinstance(part, _BatchNorm) for part in it.network.modules()):
        say(Check(what="the gap of the statistics", figure="no BatchNorm", limit="", verdict="noted"))
        return None
    gap = measured_gap(it.network, it.data, batch_size=it.data.batch_size, settled=it.settled)
    for variant in gap.variants:
        figure = ", ".join(f"{metric} {value:.4f}" for metric, value in variant.metrics.items())
        say(Check(what=f"with the statistics {variant.name}", figure=figure, limit="", verdict="noted"))
    return gap


def _signature(it: Subject, model: bytes) -> Signature:
    """The table's, or that of the graph with what its columns stand for."""
    if it.signature is not None:
        return it.signature
    runtime = OnnxRuntime(model, place("cpu"), threads=1, optimisation="none")
    return Signature(inputs=runtime.inputs, outputs=runtime.outputs, target=it.target)


def _admitted(draft: Bundle, budget: Budget, say: Say) -> Admitted:
    try:
        # by the count of the budget and by no clock, so that the passport does not depend on who else computes
        admitted = admit(draft, place("cpu"), max_batch_rows=budget.batch, longest_run_s=math.inf)
    except Refused:
        say(Check(what="the service's admission", figure="refused", limit="4 doors", verdict="failed"))
        raise
    for figure in admitted.golden:
        what = f"{figure.name}, {admitted.golden_rows} golden samples replayed"
        say(_check(figure.model_copy(update={"name": what})))
    sizes = ", ".join(str(size) for size in admitted.independence.batch_sizes if size > 1)
    apart = f"{admitted.independence.bound:.2g}"
    say(Check(what=f"a row alone and among {sizes}", figure=apart, limit="rounding", verdict="passed"))
    say(Check(what="the service's admission", figure="admitted", limit="4 doors", verdict="passed"))
    return admitted


def _check(figure: ParityFigure) -> Check:
    return Check(
        what=figure.name,
        figure=f"{figure.difference:.2g}",
        limit=f"{figure.bound:.2g}",
        verdict="passed" if figure.difference <= figure.bound < math.inf else "failed",
    )


def _golden_files(module: nn.Module, rows: Sequence[torch.Tensor]) -> dict[str, bytes]:
    return bundle.golden_files([tensor.numpy() for tensor in rows], parity.torch_outputs(module, rows))


def _page(
    it: Subject,
    converted: Converted,
    passport: Passport,
    admitted: Admitted,
    findings: Sequence[Finding],
    gap: Gap | None,
) -> bytes:
    layers = {layer.layer: it.network.get_submodule(layer.layer) for layer in converted.layers}
    return render(passport, layers=layers, folds=admitted.folds, findings=findings, gap=gap).encode()


def _versions() -> dict[str, JsonValue]:
    versions: dict[str, JsonValue] = {"python": platform.python_version()}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "evalmode"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # evalmode, run from its sources
            versions[package] = "not installed"
    return versions


@contextmanager
def _writable(models: Path) -> Iterator[None]:
    """What the file system says, as a sentence."""
    try:
        yield
    except FileExistsError as error:
        raise WrongCall(f"another export has just taken this version: {error}; run the command again") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise WrongCall(f"'{models}' cannot be written to: {why}; --models chooses another folder") from error
