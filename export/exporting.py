"""From a checkpoint to a bundle: the straight line of `evalmode export`.

    checkpoint ──> convert ──> parity ──> passport, golden samples ──> admission ──> models/NAME/VERSION

1. Whatever is refused on the way leaves nothing behind; a version appears whole, and only after the service's own
   admission took exactly the files that it consists of.
2. The same checkpoint, exported by the same versions, gives the same bytes: no clock is read, torch has one thread.
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

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from export import checkpoint, parity
from export.checkpoint import Checkpoint, Document
from export.conversion import Converted, convert
from export.networks import Served
from export.parity import Parity
from service import bundle
from service.admission import Admitted, admit
from service.bundle import Bundle, GoldenSummary, ParityFigure, Passport
from service.errors import Refused, WrongCall
from service.runtime import place

NETWORK = "network"
"""Where `Served` has the network that was trained: layers are named from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something that was looked at, for a person to read."""

    what: str
    figure: str
    limit: str
    verdict: Literal["passed", "failed", "noted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A bundle at its place."""

    folder: Path
    passport: Passport
    size_bytes: int


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch with one thread: sums have one order then, on a machine with any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def export_checkpoint(
    folder: Path, *, name: str, models: Path, report: Callable[[Check], None] = lambda _: None
) -> Exported:
    """Export a checkpoint as the next version of a model.

    Args:
        folder: the checkpoint; not changed.
        name: the model's.
        models: the repository; made if it is not there.
        report: is called with each check, in order.

    Raises:
        WrongCall: the checkpoint cannot be read, the name cannot be one, or the repository cannot be written to.
        Refused: a check failed; the last check reported says which, where there is a figure to it.
    """
    model_folder = models / bundle.checked_name(name)
    trained = checkpoint.read(folder)
    if not len(trained.samples[0]):
        raise WrongCall(f"'{folder}' has no samples, and parity is measured on real rows; train it again")
    served = trained.served()
    converted = _converted(trained, served, report)
    measured = _measured(trained, served, converted, report)
    divergence = _train_eval_divergence(trained, served, measured, report)
    contents = {bundle.MODEL_FILE: converted.model.SerializeToString(), **_golden_files(trained, served)}
    with _writable(models):
        version = bundle.next_version(model_folder)
        place_of_it = model_folder / version
        draft = _passport(
            trained, converted, measured, contents, name=name, version=version, train_eval_divergence=divergence
        )
        admitted = _admitted(
            Bundle(name=name, version=version, folder=place_of_it, contents=contents, passport=draft), report
        )
        passport = draft.model_copy(update={"independence": admitted.independence})
        bundle.write(place_of_it, passport=passport, contents=contents, check=lambda read: admit(read, place("cpu")))
    size_bytes = sum(file.stat().st_size for file in place_of_it.rglob("*") if file.is_file())
    return Exported(folder=place_of_it, passport=passport, size_bytes=size_bytes)


def _converted(trained: Checkpoint, served: Served, report: Callable[[Check], None]) -> Converted:
    try:
        converted = convert(
            served,
            trained.samples,
            input_names=[spec.name for spec in trained.signature.inputs],
            output_names=served.output_names,
            wrapped=NETWORK,
        )
    except Refused:
        what = "BatchNorm layers kept, frozen, bit for bit"
        report(Check(what=what, figure="no", limit="all used", verdict="failed"))
        raise
    modules = sum(1 for _ in served.modules())
    layers = len(converted.layers)
    report(Check(what="modules in eval mode", figure=f"{modules} of {modules}", limit="all", verdict="passed"))
    report(
        Check(
            what="BatchNorm layers kept, frozen, bit for bit",
            figure=f"{layers} of {layers + len(converted.unused)}",
            limit="all used",
            verdict="passed",
        )
    )
    return converted


def _measured(trained: Checkpoint, served: Served, converted: Converted, report: Callable[[Check], None]) -> Parity:
    measured = parity.measure(served, converted.model, trained.samples, served.output_names)
    for figure in measured.figures:
        report(_check(figure))
    reason = parity.refusal(measured)
    verdict: Literal["passed", "failed"] = "failed" if reason else "passed"
    said = "no" if reason else "yes"
    report(Check(what="the ONNX model is eval mode", figure=said, limit="rounding", verdict=verdict))
    if reason:
        raise Refused(reason)
    return measured


def _train_eval_divergence(
    trained: Checkpoint, served: Served, measured: Parity, report: Callable[[Check], None]
) -> dict[str, JsonValue]:
    """For people: how far off each output would be with the statistics of the samples in place of the running ones."""
    differences = parity.train_eval_divergence(served, trained.samples)
    if differences is None:
        return {}
    found = dict(zip(served.output_names, differences, strict=True))
    for name, difference in found.items():
        what, limit = f"{name}, with train mode's statistics", f"{2 * measured.bounds[name]:.2g}"
        report(Check(what=what, figure=f"{difference:.2g}", limit=limit, verdict="noted"))
    return {**found}


def _admitted(draft: Bundle, report: Callable[[Check], None]) -> Admitted:
    try:
        admitted = admit(draft, place("cpu"))
    except Refused:
        report(Check(what="the service's admission", figure="refused", limit="4 doors", verdict="failed"))
        raise
    for figure in admitted.golden:
        what = f"{figure.name}, {admitted.golden_rows} golden samples replayed"
        report(_check(figure.model_copy(update={"name": what})))
    sizes = ", ".join(str(size) for size in admitted.independence.batch_sizes if size > 1)
    apart = f"{admitted.independence.bound:.2g}"
    report(Check(what=f"a row alone and among {sizes}", figure=apart, limit="rounding", verdict="passed"))
    report(Check(what="the service's admission", figure="admitted", limit="4 doors", verdict="passed"))
    return admitted


def _check(figure: ParityFigure) -> Check:
    return Check(
        what=figure.name,
        figure=f"{figure.difference:.2g}",
        limit=f"{figure.bound:.2g}",
        verdict="passed" if figure.difference <= figure.bound < math.inf else "failed",
    )


def _golden_files(trained: Checkpoint, served: Served) -> dict[str, bytes]:
    inputs: Sequence[NDArray[np.generic]] = [tensor.numpy() for tensor in trained.samples]
    return bundle.golden_files(inputs, parity.torch_outputs(served, trained.samples))


def _passport(
    trained: Checkpoint,
    converted: Converted,
    measured: Parity,
    contents: dict[str, bytes],
    *,
    name: str,
    version: str,
    train_eval_divergence: dict[str, JsonValue],
) -> Passport:
    document = trained.document
    return Passport(
        name=name,
        version=version,
        signature=trained.signature,
        files={path: bundle.digest(content) for path, content in contents.items()},
        batchnorm=converted.layers,
        golden=GoldenSummary(
            rows=len(trained.samples[0]),
            source=f"held-out rows of {document.data.file}, with what PyTorch gave for them in eval mode",
            tolerances=measured.tolerances,
        ),
        parity=measured.figures,
        provenance={
            **_provenance(document),
            "train_eval_divergence": train_eval_divergence,
            "unused_layers": list(converted.unused),
        },
        card=card(document),
    )


def _provenance(document: Document) -> dict[str, JsonValue]:
    """Where the model comes from; what the passport says elsewhere is left out."""
    said: dict[str, JsonValue] = document.model_dump(
        mode="json", include={"task", "data", "left_out", "training", "outcome", "metrics"}
    )
    return {**said, "versions": {"training": dict(document.versions), "export": _versions()}}


def _versions() -> dict[str, JsonValue]:
    versions: dict[str, JsonValue] = {"python": platform.python_version()}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "evalmode"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # evalmode, run from its sources
            versions[package] = "not installed"
    return versions


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
