"""`evalmode export`: a network becomes a bundle, through every check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from export.cli import SETTINGS, require_extra
from service.errors import WrongCall

if TYPE_CHECKING:
    from rich.console import Console

    from export.exporting import Check
    from export.subject import Data, Subject


def export(
    target: str,
    /,
    *,
    name: str,
    weights: Path | None = None,
    sample: Path | None = None,
    set_: Annotated[tuple[str, ...], SETTINGS] = (),
    data: Path | None = None,
    batch_size: Annotated[int, Parameter(validator=Number(gte=2))] = 32,
    classes: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    softmax: Annotated[bool, Parameter(negative="")] = False,
    outputs: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    card: str | None = None,
    models: Path = Path("models"),
) -> None:
    """Export a network as the next version of a model, through every check.

    The network is audited and becomes ONNX in eval mode, with its BatchNorm kept and frozen, and is compared with
    PyTorch on the sample: at several batch sizes, at every optimisation level of onnxruntime, within what rounding
    explains for this network. What is written has passed the admission that 'evalmode serve' asks for, and has a
    report.html to look at. If a check fails, nothing is written.

    Examples:

        evalmode export checkpoints/credit --name credit
        evalmode export my_package.nets:build --weights ckpt.pt --sample inputs.npz --name fraud
        evalmode export nets:Net --set depth=50 --weights net.pt --sample rows.npz --name pets --classes cat dog

    Parameters
    ----------
    target
        The folder that 'evalmode train' wrote, or module:callable, which returns a torch.nn.Module.
    name
        What the model is called where it is served.
    weights
        The network's weights: safetensors, or what torch.save wrote of a state_dict.
    sample
        Real rows for the network, .npz: an array for each argument of forward, named for it or in order. They are kept
        in the bundle as golden samples.
    set_
        An argument of the callable, key=value; the value is JSON where it can be read as JSON.
    data
        Rows with their answers, for the gap report: .npz with an array 'targets' beside the inputs; for a checkpoint
        the table that it learned from.
    batch_size
        Rows in a batch of the training that --data is from: decides what is noise. A checkpoint knows its own.
    classes
        What the columns of the network's only output stand for.
    softmax
        The network gives logits: serve their softmax.
    outputs
        What to call the outputs. Default: the keys or fields that forward returns.
    card
        What the model is for, for people: a text, or a file with it.
    models
        The model repository; the bundle becomes NAME/VERSION in it, one version above the highest there.
    """
    require_extra("export")
    from rich.console import Console

    from export.exporting import export_subject, one_thread
    from service.bundle import checked_name

    checked_name(name)
    console = Console(highlight=False, soft_wrap=True)
    checks: list[Check] = []
    with one_thread():
        subject = _subject(
            console, target, weights=weights, sample=sample, settings=set_, data=data, batch_size=batch_size,
            classes=classes, softmax=softmax, outputs=outputs, card=card,
        )  # fmt: skip
        with Console(stderr=True).status("exporting") as status:
            try:
                exported = export_subject(
                    subject,
                    name=name,
                    models=models,
                    say=checks.append,
                    on_stage=lambda stage: status.update(f"{stage} …"),
                )
            finally:
                status.stop()
                _say_what_was_checked(console, checks)
    for finding in exported.findings:
        if finding.severity == "warning":
            console.print(f"warning {finding.rule}: {finding.message}", style="yellow", markup=False)
    if exported.gap is not None:
        console.print(
            f"\nthe running statistics are judged {exported.gap.verdict}: {exported.gap.sentence}", markup=False
        )
    predict = f"\n         evalmode predict {exported.folder.parent} SAMPLE" if subject.signature else ""
    console.print(
        f"\nwritten: {exported.folder} ({exported.size_bytes / 1000:,.0f} kB)\n"
        f"look:    {exported.report}\n"
        f"next:    evalmode serve {models}{predict}",
        markup=False,
    )


def _subject(
    console: Console,
    target: str,
    *,
    weights: Path | None,
    sample: Path | None,
    settings: Sequence[str],
    data: Path | None,
    batch_size: int,
    classes: Sequence[str],
    softmax: bool,
    outputs: Sequence[str],
    card: str | None,
) -> Subject:
    """What to export, out of what was said on the command line."""
    from export import loading, samples, subject
    from export.cli import text_or_file
    from export.subject import Data
    from service.bundle import digest

    if not loading.is_builder(target):
        flags = {
            "--weights": weights, "--sample": sample, "--set": settings, "--classes": classes, "--softmax": softmax,
            "--outputs": outputs, "--card": card,
        }  # fmt: skip
        if given := [flag for flag, value in flags.items() if value]:
            raise WrongCall(
                f"{given[0]} is for a network of yours, TARGET being module:callable; '{target}' is taken for a "
                "checkpoint of 'evalmode train', which knows all that itself"
            )
        return subject.of_checkpoint(Path(target), table=data)
    if sample is None:
        raise WrongCall(
            "--sample is missing: parity is measured on real rows, never on noise; save some as "
            "numpy.savez('inputs.npz', x=array), an array for each argument of forward"
        )
    network = loading.built(target, weights=weights, settings=settings)
    rows = samples.read(sample, network.module)
    for note in (*network.notes, *rows.notes):
        console.print(f"note: {note}", markup=False)
    answered: Data | None = None
    if data is not None:
        with_answers = samples.read(data, network.module, targets=True)
        assert with_answers.targets is not None
        answered = Data(
            inputs=with_answers.inputs, targets=with_answers.targets, source=data.name, batch_size=batch_size
        )
    files = {"weights": weights, "sample": sample, "data": data}
    return subject.of_module(
        network.module,
        rows.inputs,
        input_names=rows.names,
        output_names=outputs or None,
        classes=classes,
        softmax=softmax,
        settled=network.settled,
        source=f"rows of {sample.name}",
        provenance={
            "network": target,
            "settings": list(settings),
            **{
                what: {"file": file.name, **digest(file.read_bytes()).model_dump()}
                for what, file in files.items()
                if file is not None
            },
            "notes": list(network.notes),
        },
        card=text_or_file(card),
        data=answered,
    )


def _say_what_was_checked(console: Console, checks: Sequence[Check]) -> None:
    from rich.markup import escape
    from rich.table import Table as Grid

    if not checks:
        return
    colours = {"passed": "green", "failed": "red", "noted": "dim"}
    grid = Grid("check", title_justify="left")
    grid.add_column("figure", justify="right")
    grid.add_column("limit", justify="right")
    grid.add_column("verdict")
    for check in checks:
        grid.add_row(
            escape(check.what), escape(check.figure), check.limit, f"[{colours[check.verdict]}]{check.verdict}[/]"
        )
    console.print(grid)
