"""`evalmode audit`: is BatchNorm healthy?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from export.cli import EVAL, SETTINGS, network_of, require_extra
from service.errors import Refused, WrongCall

if TYPE_CHECKING:
    from torch import Tensor

    from export.audit import Finding

_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_Count = Annotated[int | None, Parameter(validator=Number(gte=1))]


def audit(
    target: str,
    /,
    *,
    weights: Path | None = None,
    data: Path | None = None,
    set_: Annotated[tuple[str, ...], SETTINGS] = (),
    eval_: Annotated[bool, EVAL] = False,
    reference: Path | None = None,
    steps: _Count = None,
    training_rows: _Count = None,
    batch_size: _Count = None,
    format_: Annotated[Literal["table", "json", "sarif"], Parameter(name="--format")] = "table",
) -> None:
    """Look for everything about BatchNorm that a machine can see to be wrong.

    Each finding has a rule, and each rule a page in docs/rules: symptom, cause, fix. A network that a callable makes is
    audited in the state in which it is returned. Exit code 1 if a finding is an error, else 0.

    Examples:

        evalmode audit checkpoints/credit
        evalmode audit ckpt.pt --steps 12000
        evalmode audit my_package.nets:build --weights ckpt.pt --data inputs.npz --eval
        evalmode audit model.onnx --format sarif > audit.sarif

    Parameters
    ----------
    target
        A checkpoint (a folder of 'evalmode train', or a file with a state_dict), module:callable, or an ONNX file or
        bundle.
    weights
        The network's weights, where TARGET is module:callable.
    data
        Rows for the network, .npz: the rules that need activations join in.
    set_
        An argument of the callable, key=value.
    eval_
        Put a network that a callable makes in eval mode first.
    reference
        Another file with weights to hold the statistics against: the pretrained one, or that of another process.
    steps
        How many optimizer steps the network was trained for, if you know: each counts one batch.
    training_rows
        How many rows it was trained on.
    batch_size
        How many rows a training batch had.
    format_
        A table for people, JSON, or SARIF for code scanning.
    """
    findings = _findings(
        target, weights=weights, data=data, settings=set_, in_eval=eval_, reference=reference, steps=steps,
        training_rows=training_rows, batch_size=batch_size,
    )  # fmt: skip
    from export.audit import rendering

    match format_:
        case "json":
            print(rendering.json(findings))
        case "sarif":
            print(rendering.sarif(findings, target=target))
        case "table":
            rendering.table(findings, file=sys.stdout)
            for note in _not_asked(target, rows=data is not None):
                print(f"note: {note}", file=sys.stderr)
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise Refused(f"{errors} finding{'s are errors' if errors > 1 else ' is an error'}; see docs/rules")


def _newest(path: Path) -> Path:
    """A model's folder stands for its newest version."""
    from service import bundle

    versions = bundle.versions_in(path) if path.is_dir() and not (path / bundle.MODEL_FILE).is_file() else []
    return path / versions[-1] if versions else path


def _not_asked(target: str, *, rows: bool) -> list[str]:
    """What a clean answer does not say."""
    notes = []
    if Path(target).suffix in _WEIGHTS:
        notes.append(
            "a file with weights has no code: modes, eps, momentum and branches were not asked; name the network as "
            "module:callable to ask them"
        )
    elif not rows:
        notes.append("without --data, what only rows show was not asked: whether answers depend on the batch, and more")
    return notes


def _findings(
    target: str,
    *,
    weights: Path | None,
    data: Path | None,
    settings: tuple[str, ...],
    in_eval: bool,
    reference: Path | None,
    steps: int | None,
    training_rows: int | None,
    batch_size: int | None,
) -> tuple[Finding, ...]:
    path = _newest(Path(target))
    if path.suffix == ".onnx" or (path / "model.onnx").is_file():
        if weights or settings:
            raise WrongCall(
                f"'{target}' is an ONNX file, which has its weights in it; --weights and --set are for a network"
            )
        from export.audit import audit_onnx
        from service import bundle

        file = path / bundle.MODEL_FILE if path.is_dir() else path
        model = bundle.read_plain(file).model
        if data is None:
            return audit_onnx(model)
        require_extra("audit --data")
        from export.samples import read_for

        constants = {tensor.name for tensor in model.graph.initializer}
        names = [value.name for value in model.graph.input if value.name not in constants]
        return audit_onnx(model, read_for(data, names))
    require_extra("audit")
    from export.audit import audit_module, audit_state
    from export.loading import is_builder, read_state

    told = {"steps": steps, "training_rows": training_rows, "batch_size": batch_size}
    compared: Mapping[str, Tensor] | None = read_state(reference).tensors if reference else None
    if path.suffix in _WEIGHTS and not is_builder(target):
        if data or settings or weights:
            raise WrongCall(
                f"'{target}' is a file with weights, and without its network nothing can be run; name the network as "
                f"module:callable, with --weights {target}"
            )
        state = read_state(path)
        return audit_state(state.tensors, reference=compared, settled=state.settled, **told)
    network = network_of(target, weights=weights, settings=settings, sample=data)
    if in_eval:
        network.module.eval()
    inputs = network.inputs if data or not is_builder(target) else None
    return audit_module(network.module, inputs or None, reference=compared, settled=network.settled, **told)
