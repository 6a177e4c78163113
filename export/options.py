"""What `evalmode train` can be told: flags on the command line, and the settings a checkpoint remembers.

Nothing here imports torch, so that `evalmode train --help` answers where torch is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from pydantic import ConfigDict

Norm = Literal["before", "after", "none"]
"""Where a block has its BatchNorm: before the activation, after it, or nowhere."""

Task = Literal["binary", "multiclass", "regression"]

_Columns = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]
_AtLeastOne = Number(gte=1)
_FromZero = Number(gte=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """How the table is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: Task | None = None
    """What is predicted. Default: text, booleans and at most 10 different whole numbers are classes, other numbers
    are a regression."""
    categorical: _Columns = ()
    """Columns to read as categories; for whole numbers that are codes."""
    continuous: _Columns = ()
    """Columns to read as numbers."""
    leave_out: _Columns = ()
    """Columns that the network must not see."""
    missing: _Columns = ()
    """Texts that mean 'missing', beside the empty one: --missing NA ?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How the network is built and trained. The defaults suit small tables; see benchmarks/credit_auc.py."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**32))] = 0
    """Decides the split, the initial weights and the order of rows; the same seed gives the same weights."""
    epochs: Annotated[int, Parameter(validator=_AtLeastOne)] = 500
    """The most passes over the training rows."""
    patience: Annotated[int, Parameter(validator=_AtLeastOne)] = 20
    """Stop when the validation loss has not improved for so many epochs."""
    batch_size: Annotated[int, Parameter(validator=Number(gte=2))] = 32
    """Rows in a training batch; a single row left over joins the batch before it."""
    hidden: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="", validator=_AtLeastOne)] = (32, 16)
    """Sizes of the hidden layers: --hidden 128 64"""
    norm: Norm = "before"
    """Where the hidden layers have their BatchNorm, seen from the activation."""
    dropout: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.5
    """The share of activations dropped in training."""
    learning_rate: Annotated[float, Parameter(validator=Number(gt=0))] = 0.0005
    """AdamW's step size."""
    weight_decay: Annotated[float, Parameter(validator=_FromZero)] = 0.1
    """AdamW's pull of the weights of linear layers and embeddings towards zero."""
    mask_rate: Annotated[float, Parameter(validator=Number(gte=0, lt=1))] = 0.02
    """The share of categories that training hides, so that the network learns what 'missing' means."""
