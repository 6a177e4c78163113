"""The table that a checkpoint learned from, as rows for its network, in the very parts in which they were used.

The split is not stored: it follows from the file, the target and the seed, so the file must be the same, byte for byte.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from export import table, training
from export.checkpoint import Checkpoint
from export.options import TableOptions
from export.table import Plan
from export.training import Examples
from service.errors import WrongCall
from service.signature import CategoricalFeature, ContinuousFeature


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """All rows of the table, each in the part that training gave it."""

    training: Examples
    validation: Examples
    test: Examples


def parts(trained: Checkpoint, file: Path, *, missing: tuple[str, ...] = ()) -> Parts:
    """Read the table of a checkpoint again.

    Args:
        missing: texts that mean 'missing', as given to `evalmode train`.

    Raises:
        WrongCall: it cannot be read, or is not the table that the checkpoint learned from.
    """
    document = trained.document
    frame = table.read(file, missing=missing)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != document.data.sha256:
        raise WrongCall(
            f"'{file}' is not the table that the checkpoint learned from ({document.data.file}, sha256 "
            f"{document.data.sha256[:12]}…, this one {found[:12]}…), so nobody knows which of its rows were held out"
        )
    features = {feature.name: feature for feature in trained.features}
    options = TableOptions(
        task=document.task,
        categorical=tuple(name for name, f in features.items() if isinstance(f, CategoricalFeature)),
        continuous=tuple(name for name, f in features.items() if isinstance(f, ContinuousFeature)),
        leave_out=tuple(c for c in frame.columns if c not in features and c != document.target.name),
    )
    read = table.understand(frame, target=document.target.name, options=options)
    split = table.split(read, seed=document.training.seed)
    if (len(split.training), len(split.validation), len(split.test)) != (
        document.data.training_rows,
        document.data.validation_rows,
        document.data.test_rows,
    ):
        raise WrongCall(f"'{file}' splits into other parts than in training; give the same --missing as then")
    encoded = Plan(features=trained.features, means=_means(trained), left_out={}, notes=()).encode(read.columns)
    known, validation, test = (
        training.examples(encoded, read.answers, rows) for rows in (split.training, split.validation, split.test)
    )
    return Parts(training=known, validation=validation, test=test)


def _means(trained: Checkpoint) -> dict[str, float]:
    """What a missing number becomes: the mean of the training rows, which the standardising BatchNorm holds."""
    continuous = [feature for feature in trained.features if isinstance(feature, ContinuousFeature)]
    means = trained.weights.get("standardise.running_mean", torch.zeros(len(continuous)))
    return {
        feature.name: float(mean) if feature.missing is None else feature.missing
        for feature, mean in zip(continuous, means, strict=True)
    }
