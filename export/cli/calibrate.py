"""`evalmode calibrate`: running statistics as the exact statistics of the data."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from export.cli import SETTINGS, network_of, require_extra
from service.errors import WrongCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import JsonValue
    from rich.console import Console
    from torch import Tensor, nn

    from export.calibration import Calibrated

Metrics = Mapping[str, float]


def calibrate(
    target: str,
    /,
    *,
    data: Path,
    out: Path,
    weights: Path | None = None,
    validation: Path | None = None,
    set_: Annotated[tuple[str, ...], SETTINGS] = (),
    missing: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    batch_size: Annotated[int, Parameter(validator=Number(gte=1))] = 256,
    memory_mb: Annotated[int, Parameter(validator=Number(gte=0))] = 1024,
) -> None:
    """Measure the running statistics of every BatchNorm anew: exactly, on all the data, front to back.

    Each layer is measured in eval mode behind layers that have their new statistics already, dropout off, in float64,
    every row counted once. The result does not depend on batch size or order. It is not always better: the metric on
    validation rows is printed before and after, and a new checkpoint is written beside the old one, never over it.

    All rows run at once if that fits in --memory-mb; else there is one pass over the data for each level of layers that
    depend on each other. Under torchrun each process takes its share of the rows.

    Examples:

        evalmode calibrate checkpoints/credit --data german_credit.csv --out checkpoints/credit-exact
        evalmode calibrate nets:build --weights ckpt.pt --data train.npz --validation val.npz --out exact.safetensors
        torchrun --nproc-per-node 2 --no-python evalmode calibrate nets:build --weights ckpt.pt --data train.npz ...

    Parameters
    ----------
    target
        The folder that 'evalmode train' wrote, or module:callable, which returns a torch.nn.Module.
    data
        Training rows: .npz for a network of yours; for a checkpoint the table that it learned from.
    out
        What to write: a .safetensors file, or a checkpoint's folder. It must not be there yet.
    weights
        The network's weights: safetensors, or what torch.save wrote of a state_dict.
    validation
        Rows with an array 'targets', .npz, for the metric before and after. Default: --data, if it has targets.
    set_
        An argument of the callable, key=value.
    missing
        Texts in the table that mean 'missing', as given to 'evalmode train'.
    batch_size
        Rows at a time, where they do not all fit; decides time and memory, not the result.
    memory_mb
        What all rows at once may take.
    """
    require_extra("calibrate")
    from rich.console import Console

    with _processes() as (rank, world):
        console = Console(highlight=False, soft_wrap=True, quiet=rank > 0)
        work = _Work(console, rank, world, batch_size, memory_mb * 2**20)
        from export.loading import is_builder

        if is_builder(target):
            if out.suffix != ".safetensors":
                raise WrongCall(f"--out {out} must end in .safetensors: it holds weights, and nothing that runs")
            if out.exists():
                raise WrongCall(f"'{out}' is already there and is not replaced; --out takes another name")
            _calibrate_weights(work, target, weights, set_, data, validation, out)
        else:
            if weights or set_ or validation:
                raise WrongCall(
                    f"--weights, --set and --validation are for a network of yours; '{target}' is taken for a folder"
                )
            _calibrate_checkpoint(work, Path(target), data, missing, out)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=False)
class _Work:
    """Where the work is done, and by how many."""

    console: Console
    rank: int
    world: int
    batch_size: int
    memory_bytes: int

    def calibrated(self, network: nn.Module, inputs: Sequence[Tensor]) -> Calibrated:
        """Measure, and say what it costs and what came out."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from export import calibration

        share = calibration.shard(inputs, self.rank, self.world)
        if len(share[0]):
            cost = calibration.plan(network, share, memory_bytes=self.memory_bytes)
            passes = "1 pass over the data" if cost.passes == 1 else f"{cost.passes} passes over the data"
            needed = cost.bytes_per_row * len(share[0]) / 2**20
            why = "all rows at once" if cost.one_pass else f"all rows at once would take up to {needed:,.0f} MB"
            layers = sum(len(level) for level in cost.levels)
            self.console.print(f"{layers} BatchNorm layers, {len(inputs[0])} rows: {passes} ({why})", markup=False)
        columns = (TextColumn("measuring"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True, quiet=self.rank > 0), transient=True) as bar:
            task = bar.add_task("", total=None)
            found = calibration.calibrate(
                network,
                share,
                batch_size=self.batch_size,
                memory_bytes=self.memory_bytes,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        self._say_layers(found)
        return found

    def _say_layers(self, found: Calibrated) -> None:
        from rich.markup import escape
        from rich.table import Table as Grid

        grid = Grid("layer", title_justify="left")
        for heading in ("means were off by", "variances were", "values per channel"):
            grid.add_column(heading, justify="right")
        for layer in found.layers:
            known = not math.isnan(layer.mean_shift)
            grid.add_row(
                escape(layer.layer),
                f"{layer.mean_shift:.3g} std" if known else "not kept",
                f"{layer.variance_ratio:.3g} times" if known else "not kept",
                f"{layer.count:,}",
            )
        self.console.print(grid)
        for unused in found.unused:
            self.console.print(f"note: '{unused}' is never called in eval mode; it stays as it is", markup=False)

    def say_metrics(self, before: Metrics, after: Metrics, rows: str) -> None:
        from rich.table import Table as Grid

        grid = Grid(f"on {rows}", title_justify="left")
        for heading in ("before", "after", ""):
            grid.add_column(heading, justify="right")
        for name, value in before.items():
            better = (after[name] < value) == (name in ("log loss", "RMSE"))
            verdict = "same" if after[name] == value else "[green]better[/]" if better else "[yellow]worse[/]"
            grid.add_row(name, f"{value:.4f}", f"{after[name]:.4f}", verdict)
        self.console.print(grid)

    def write(self, act: Callable[[], None]) -> None:
        """By one process."""
        if self.rank == 0:
            act()


def _calibrate_weights(
    work: _Work,
    target: str,
    weights: Path | None,
    settings: tuple[str, ...],
    data: Path,
    validation: Path | None,
    out: Path,
) -> None:
    from torch.nn.modules.instancenorm import _InstanceNorm

    from export import loading, samples
    from export.calibration import applied

    network = network_of(target, weights=weights, settings=settings, sample=data)
    for note in network.notes:
        work.console.print(f"note: {note}", markup=False)
    for path, part in network.module.named_modules():
        if isinstance(part, _InstanceNorm) and part.track_running_stats:
            said = f"note: '{path}' is an InstanceNorm, whose statistics are averages over rows; it stays as it is"
            work.console.print(said, markup=False)
    judged, where = (network.inputs, network.targets), data.name
    if validation is not None:
        read = samples.read(validation, network.module, targets=True)
        judged, where = (read.inputs, read.targets), validation.name
    found = work.calibrated(network.module, network.inputs)
    calm = applied(network.module, found)
    if judged[1] is None:
        work.console.print("no metric: neither --validation nor --data has an array 'targets'")
    else:
        before, after = (_metrics(module, judged[0], judged[1]) for module in (network.module, calm))
        work.say_metrics(before, after, f"{len(judged[1])} rows of {where}")
    settled = sorted({*network.settled, *(layer.layer for layer in found.layers)})
    metadata: dict[str, JsonValue] = {**network.metadata, loading.SETTLED_KEY: [*settled]}
    work.write(lambda: loading.write_state(out, calm.state_dict(), metadata))
    work.console.print(
        f"\nwritten: {out}\nnext:    evalmode export {target} --weights {out} --sample inputs.npz --name NAME",
        markup=False,
    )


def _metrics(module: nn.Module, inputs: Sequence[Tensor], targets: Tensor) -> Metrics:
    from export.gap import answers, metrics

    return metrics(answers(module, inputs), targets)


def _calibrate_checkpoint(work: _Work, folder: Path, data: Path, missing: tuple[str, ...], out: Path) -> None:
    from export import checkpoint, tabular_data, training
    from export.calibration import applied
    from export.networks import TabularNet

    checkpoint.require_free(out, overwrite=False)
    trained = checkpoint.read(folder)
    parts = tabular_data.parts(trained, data, missing=missing)
    network = trained.network()
    found = work.calibrated(network, parts.training.inputs)
    calm = applied(network, found)
    assert isinstance(calm, TabularNet)

    def measured(it: TabularNet, rows: training.Examples) -> Metrics:
        return training.measured(rows.answers.numpy(), training.predictions(it, rows.inputs))

    before, after = (measured(it, parts.validation) for it in (network, calm))
    work.say_metrics(before, after, f"{len(parts.validation)} validation rows")
    document = trained.document.model_copy(
        update={
            "calibration": checkpoint.CalibrationNote(
                layers=tuple(layer.layer for layer in found.layers),
                passes=found.passes,
                validation_before=dict(before),
                validation_after=dict(after),
            ),
            "metrics": {**trained.document.metrics, "network": dict(measured(calm, parts.test))},
        }
    )
    made = dataclasses.replace(trained, document=document, weights=calm.state_dict())
    work.write(lambda: checkpoint.write(out, made))
    work.console.print(f"\nwritten: {out}\nnext:    evalmode export {out} --name NAME", markup=False)


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Join the other processes that torchrun started; (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0, 1
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
