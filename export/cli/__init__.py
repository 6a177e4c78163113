"""The verbs of the training half, a file each. They import what they need when called, so that `--help` answers without
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from service.errors import WrongCall, listing

if TYPE_CHECKING:
    from pydantic import JsonValue
    from torch import Tensor, nn

EXTRA = ("torch", "polars", "sklearn", "safetensors", "rich", "onnxscript", "jinja2")
"""What the extra `export` installs, by module."""


def require_extra(verb: str) -> None:
    """Refuse a verb whose libraries are not installed.

    Raises:
        WrongCall: with what to install.
    """
    if missing := [module for module in EXTRA if find_spec(module) is None]:
        raise WrongCall(f"'evalmode {verb}' needs {listing(missing)}; pip install 'evalmode[export]'")


SETTINGS = Parameter(name="--set", negative="")
"""`--set key=value`, once for each argument of the user's callable."""


EVAL = Parameter(name="--eval", negative="")
"""`--eval`: judge what would be served, where a callable returns its network in training mode."""


def text_or_file(text: str | None) -> str | None:
    """The card's text, out of a file where there is one of this name."""
    if text is None or "\n" in text or len(text) > 255:
        return text
    file = Path(text)
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else text
    except (OSError, UnicodeDecodeError) as error:
        raise WrongCall(f"the card '{file}' cannot be read as text: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """What TARGET names: a network with its weights, in the mode in which it came, and rows where it has some."""

    module: nn.Module
    inputs: tuple[Tensor, ...] = ()
    targets: Tensor | None = None
    settled: frozenset[str] = frozenset()
    """BatchNorm layers whose statistics were measured exactly."""
    metadata: dict[str, JsonValue] = field(default_factory=dict)
    """Of the file with its weights."""
    notes: tuple[str, ...] = ()


def network_of(
    target: str,
    *,
    weights: Path | None,
    settings: Sequence[str] = (),
    sample: Path | None = None,
    targets: bool = False,
    served: bool = False,
) -> Network:
    """The network that TARGET names: `module:callable`, or a checkpoint of `evalmode train`.

    Args:
        sample: rows for it; a checkpoint brings its own.
        targets: whether the rows need answers.
        served: a checkpoint's network as it is served, with probabilities, and not the logits that it trains with.

    Raises:
        WrongCall: it cannot be made, or the rows do not fit it.
    """
    from export import checkpoint, loading, samples

    if loading.is_builder(target):
        built = loading.built(target, weights=weights, settings=settings)
        rows = samples.read(sample, built.module, targets=targets) if sample else None
        return Network(
            module=built.module,
            inputs=rows.inputs if rows else (),
            targets=rows.targets if rows else None,
            settled=built.settled,
            metadata=dict(built.metadata),
            notes=(*built.notes, *(rows.notes if rows else ())),
        )
    if weights is not None or settings:
        flag = "--weights" if weights else "--set"
        raise WrongCall(
            f"{flag} is for a network of yours, TARGET being module:callable; '{target}' is a folder's name"
        )
    trained = checkpoint.read(Path(target))
    module = trained.served() if served else trained.network()
    if sample is None:
        return Network(module=module, inputs=trained.samples, settled=trained.settled)
    rows = samples.read(sample, module, targets=targets)
    return Network(module=module, inputs=rows.inputs, targets=rows.targets, settled=trained.settled, notes=rows.notes)
