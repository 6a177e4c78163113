"""`evalmode insert`: BatchNorm in a trained network that had none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from export.cli import SETTINGS, network_of, require_extra
from service.errors import WrongCall

if TYPE_CHECKING:
    from pydantic import JsonValue
    from rich.console import Console

    from export.insertion import Inserted


def insert(
    target: str,
    /,
    *,
    after: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")],
    data: Path,
    out: Path,
    weights: Path | None = None,
    set_: Annotated[tuple[str, ...], SETTINGS] = (),
    batch_size: Annotated[int, Parameter(validator=Number(gte=2))] = 32,
    eps: Annotated[float, Parameter(validator=Number(gt=0))] = 1e-5,
    momentum: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 0.1,
) -> None:
    """Put BatchNorm into a trained network without changing what it answers in eval mode.

    Behind each layer that you name, gamma = sqrt(var + eps) and beta = mean of what comes out of it on the data. That
    each new layer is the identity, and that the outputs and every decision stay, is certified on the data, or nothing
    is written. Train mode will change the outputs: by how much, at your batch size, is said.

    The new layer is a child 'norm' of the layer it follows. evalmode puts it in again when it reads the file; in your
    own code, 'export.insertion.attach' does.

    Examples:

        evalmode insert nets:vgg --weights vgg.pt --after features.1 features.4 --data images.npz --out bn.safetensors

    Parameters
    ----------
    target
        module:callable, which returns a torch.nn.Module.
    after
        The layers that BatchNorm is to follow, by their path in the network.
    data
        Rows to measure and to certify on, .npz: real ones, preprocessed as in training.
    out
        The .safetensors file to write. It must not be there yet.
    weights
        The network's weights: safetensors, or what torch.save wrote of a state_dict.
    set_
        An argument of the callable, key=value.
    batch_size
        Rows in a batch of the training that will follow.
    eps
        Of the new layers.
    momentum
        Of the new layers: the weight of the new batch.
    """
    require_extra("insert")
    from rich.console import Console

    from export import insertion, loading

    if not loading.is_builder(target):
        raise WrongCall(f"'{target}' is not module:callable; BatchNorm is put into a network of yours")
    if out.suffix != ".safetensors":
        raise WrongCall(f"--out {out} must end in .safetensors: it holds weights, and says where BatchNorm was put")
    if out.exists():
        raise WrongCall(f"'{out}' is already there and is not replaced; --out takes another name")
    console = Console(highlight=False, soft_wrap=True)
    network = network_of(target, weights=weights, settings=set_, sample=data)
    for note in network.notes:
        console.print(f"note: {note}", markup=False)
    with Console(stderr=True).status("measuring"):
        found = insertion.insert(
            network.module, after, network.inputs, eps=eps, momentum=momentum, batch_size=batch_size
        )
    _say(console, found)
    already: Any = network.metadata.get(loading.INSERTED_KEY) or {}
    settled = sorted({*network.settled, *(f"{layer}.{insertion.CHILD}" for layer in found.specs)})
    metadata: dict[str, JsonValue] = {
        **network.metadata,
        loading.INSERTED_KEY: {**already, **{layer: spec.model_dump() for layer, spec in found.specs.items()}},
        loading.SETTLED_KEY: [*settled],
    }
    loading.write_state(out, found.module.state_dict(), metadata)
    console.print(
        f"\nwritten: {out}\n"
        f"next:    evalmode export {target} --weights {out} --sample inputs.npz --name NAME\n"
        "train:   from export.loading import built, write_state\n"
        f"         found = built('{target}', weights=Path('{out}'))  # then train found.module, and keep it with\n"
        "         write_state(Path('trained.safetensors'), found.module.state_dict(), found.structure)",
        markup=False,
    )


def _say(console: Console, found: Inserted) -> None:
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid("BatchNorm behind", title_justify="left")
    for heading in ("channels", "off the identity by", "allowed", "dead channels"):
        grid.add_column(heading, justify="right")
    from export.insertion import LAYER_TOLERANCE, OUTPUT_TOLERANCE

    for layer in found.layers:
        grid.add_row(
            escape(layer.layer),
            str(layer.spec.channels),
            f"{layer.error:.2g}",
            f"{LAYER_TOLERANCE * layer.range:.2g}",
            str(layer.dead_channels or ""),
        )
    console.print(grid)
    console.print(
        f"on {found.rows} rows the outputs move by {found.output_error:.2g} of the largest ({OUTPUT_TOLERANCE:g} "
        "allowed), and no decision changes",
        markup=False,
    )
    if found.shift is not None:
        console.print(
            f"in train mode, at {found.shift.batch_size} rows a batch, the outputs will move by "
            f"{found.shift.median:.2g} of their standard deviation (median; {found.shift.largest:.2g} at most) before "
            "anything is learned; keep the new layers in eval mode for the first steps, or train with larger batches",
            markup=False,
        )
