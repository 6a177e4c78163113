"""`evalmode train`: a table becomes a checkpoint."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from export.cli import require_extra, text_or_file
from export.options import TableOptions, TrainingOptions
from service import bundle

if TYPE_CHECKING:
    from rich.console import Console

    from export.checkpoint import Document
    from export.table import Plan, Split, Table
    from export.training import Epoch


def train(
    table: Path,
    /,
    *,
    target: str,
    name: str | None = None,
    out: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    card: str | None = None,
    columns: Annotated[TableOptions, Parameter(name="*")] = TableOptions(),  # noqa: B008  # frozen
    options: Annotated[TrainingOptions, Parameter(name="*")] = TrainingOptions(),  # noqa: B008  # frozen
) -> None:
    """Train a network with BatchNorm on a table, and leave a checkpoint.

    Two classes, several or a number: what the target column holds decides, or --task. Numbers go into the network
    raw, categories as embeddings. The weights that did best on validation rows are kept, with the running statistics
    that belong to them, and measured on held-out rows beside a linear model and beside always giving the same answer.

    Examples:

        evalmode train applications.csv --target creditability
        evalmode train flats.parquet --target rent --leave-out id --categorical district --hidden 64 32

    Parameters
    ----------
    table
        A CSV or Parquet file with a header.
    target
        The column to predict. Rows without it are dropped.
    name
        What the network is called. Default: the file's name.
    out
        The folder for the checkpoint. Default: checkpoints/NAME.
    overwrite
        Replace the checkpoint that is there.
    card
        What the network is for, what was left out and why, for people: a text, or a file with it.
    """
    require_extra("train")
    from rich.console import Console

    from export import checkpoint, training
    from export import table as tables

    name = bundle.plain_name(table) if name is None else bundle.checked_name(name)
    folder = out or Path("checkpoints", name)
    checkpoint.require_free(folder, overwrite=overwrite)
    card = text_or_file(card)
    console = Console(highlight=False, soft_wrap=True)

    read = tables.understand(tables.read(table, missing=columns.missing), target=target, options=columns)
    split = tables.split(read, seed=options.seed)
    plan = tables.plan(read, split.training)
    _say_what_was_read(console, read, split, plan)

    encoded = plan.encode(read.columns)
    known, validation, test = (
        training.examples(encoded, read.answers, rows) for rows in (split.training, split.validation, split.test)
    )
    config = training.configure(plan.features, read.target, known, options)
    with _Progress(options.epochs, training.HEADLINE[read.task]) as progress:
        try:
            trained = training.train(config, known, validation, options, on_epoch=progress.show)
        except KeyboardInterrupt:
            progress.say(f"stopped; nothing was written to {folder}")
            raise
    metrics = {
        "network": training.measured(read.answers[split.test], training.predictions(trained.network, test.inputs)),
        **training.baselines(training.joined(known, validation), test, config),
    }
    document = checkpoint.Document(
        network=config,
        task=read.task,
        features=plan.features,
        target=read.target,
        left_out={**read.left_out, **plan.left_out},
        training=options,
        outcome=checkpoint.Outcome(
            epochs=trained.epochs,
            best_epoch=trained.kept.number,
            steps=trained.kept.steps,
            initial_weight=trained.kept.initial_weight,
            validation_loss=trained.kept.validation_loss,
        ),
        metrics=metrics,
        data=checkpoint.DataSource(
            file=table.name,
            sha256=hashlib.sha256(table.read_bytes()).hexdigest(),
            rows=len(read.answers),
            training_rows=len(split.training),
            validation_rows=len(split.validation),
            test_rows=len(split.test),
        ),
        versions=_versions(),
        card=card,
    )
    _say_how_it_went(console, document)
    samples = tuple(tensor[: checkpoint.MOST_SAMPLES] for tensor in test.inputs)
    made = checkpoint.Checkpoint(document=document, weights=trained.network.state_dict(), samples=samples)
    checkpoint.write(folder, made, overwrite=overwrite)
    console.print(f"\nwritten: {folder}\nnext:    evalmode export {folder} --name {name}", markup=False)


class _Progress:
    """A bar on standard error, with the losses and the metric of the last epoch."""

    def __init__(self, epochs: int, headline: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._headline = headline
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=epochs)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, epoch: Epoch) -> None:
        self._bar.update(
            self._task,
            completed=epoch.number,
            description=f"loss {epoch.training_loss:.4f}, validation {epoch.validation_loss:.4f}, "
            f"{self._headline} {epoch.metrics[self._headline]:.4f}",
        )

    def say(self, sentence: str) -> None:
        self._bar.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _say_what_was_read(console: Console, read: Table, split: Split, plan: Plan) -> None:
    kinds = [feature.kind for feature in plan.features]
    parts = (("training", split.training), ("validation", split.validation), ("test", split.test))
    console.print(
        f"{read.task} on '{read.target.name}': {len(read.answers)} rows "
        f"({', '.join(f'{len(rows)} {part}' for part, rows in parts)}), "
        f"{kinds.count('continuous')} continuous and {kinds.count('categorical')} categorical features",
        markup=False,
    )
    for column, reason in {**read.left_out, **plan.left_out}.items():
        console.print(f"left out: '{column}' {reason.removeprefix('left out ')}", markup=False)
    for note in (*read.notes, *plan.notes):
        console.print(f"note: {note}", markup=False)


def _say_how_it_went(console: Console, document: Document) -> None:
    from rich.table import Table as Grid

    from export.training import TRUSTED

    outcome, names = document.outcome, list(document.metrics["network"])
    kept = f"kept: epoch {outcome.best_epoch} of {outcome.epochs}, validation loss {outcome.validation_loss:.4f}"
    console.print(kept, markup=False)
    if outcome.initial_weight > TRUSTED:
        console.print(
            f"warning: after {outcome.steps} batches the running statistics still hold {outcome.initial_weight:.1%} "
            "of their initial values, so eval mode is not yet the network that trained; train for more --epochs, or "
            "with a smaller --batch-size",
            style="yellow",
            markup=False,
        )
    grid = Grid(title=f"on {document.data.test_rows} held-out rows", title_justify="left")
    grid.add_column("")
    for name in names:
        grid.add_column(name, justify="right")
    for model, metrics in document.metrics.items():
        grid.add_row(model, *(f"{metrics[name]:.4f}" for name in names))
    console.print(grid)


def _versions() -> dict[str, str]:
    def installed(distribution: str) -> str:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return "not installed"

    found = {distribution: installed(distribution) for distribution in ("evalmode", "torch", "polars", "scikit-learn")}
    return {"python": platform.python_version(), **found}
