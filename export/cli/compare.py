"""`evalmode compare`: why an ONNX model does not answer as a network does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from export.cli import EVAL, SETTINGS, network_of, require_extra
from service.errors import Refused, WrongCall


def compare(
    target: str,
    model: Path,
    /,
    *,
    sample: Path | None = None,
    weights: Path | None = None,
    set_: Annotated[tuple[str, ...], SETTINGS] = (),
    eval_: Annotated[bool, EVAL] = False,
    softmax: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Say whether an ONNX model is a network in eval mode, and if not, why, and at which BatchNorm they part.

    The network is taken in the mode in which its callable returns it: the usual reason for a difference is that it, and
    not the file, is in training mode. Differences are judged by the float error of this network on these rows.

    Examples:

        evalmode compare my_package.nets:build model.onnx --weights ckpt.pt --sample inputs.npz --eval
        evalmode compare checkpoints/credit models/credit/1/model.onnx

    Parameters
    ----------
    target
        module:callable, which returns a torch.nn.Module, or the folder that 'evalmode train' wrote.
    model
        The ONNX file, or a bundle's folder.
    sample
        Real rows, .npz: an array for each argument of forward. A checkpoint brings its own.
    weights
        The network's weights: safetensors, or what torch.save wrote of a state_dict.
    set_
        An argument of the callable, key=value.
    eval_
        Put the network in eval mode first.
    softmax
        The file gives the softmax of the network's logits, as 'evalmode export --softmax' makes it.
    """
    require_extra("compare")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    from export.diagnosis import diagnose
    from export.subject import Probabilities
    from service.bundle import MODEL_FILE, read_plain

    network = network_of(target, weights=weights, settings=set_, sample=sample, served=True)
    if not network.inputs:
        raise WrongCall("--sample is missing: the two are compared on real rows, never on noise")
    if eval_:
        network.module.eval()
    module = Probabilities(network.module) if softmax else network.module
    module.training = network.module.training  # of the wrapper alone
    found = diagnose(module, read_plain(model / MODEL_FILE if model.is_dir() else model).model, network.inputs)
    console = Console(highlight=False, soft_wrap=True)
    if found.layers:
        grid = Grid("BatchNorm layer", title_justify="left")
        for column in ("difference", "rounding explains", ""):
            grid.add_column(column, justify="right")
        for layer in found.layers:
            verdict = "[red]differs[/]" if layer.diverges else "[green]agrees[/]"
            grid.add_row(escape(layer.layer), f"{layer.difference:.2g}", f"{layer.allowed:.2g}", verdict)
        console.print(grid)
    said = f"{found.verdict}: {found.sentence}"
    if found.verdict not in ("equal", "just noise"):
        raise Refused(said)
    console.print(said, markup=False)
