"""A checkpoint: the folder in which `evalmode train` leaves a network and everything that is known about it.

    weights.safetensors     the network's state: weights, running statistics, the unit of a number
    checkpoint.json         `Document`: configuration, features, target, how it was trained, how good it is
    samples.safetensors     up to 64 held-out rows as the graph's inputs, for golden samples

1. A folder appears whole or not at all, and one that is there is replaced only on request, by a whole one.
2. Nothing is unpickled: reading a checkpoint runs no code of whoever wrote it.
3. What is read fits: the network's state key by key, the features the network's inputs, the samples the features.
4. The same network, table and settings give the same bytes: no time, no path, no name of a machine is in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from export import table
from export.networks import Served, TabularNet, TabularNetConfig
from export.options import Task, TrainingOptions
from service.errors import WrongCall, first_line, listing
from service.files import whole_folder
from service.misfit import first_misfit
from service.signature import CategoricalFeature, ClassTarget, ContinuousFeature, Feature, Signature, Target

DOCUMENT_FILE = "checkpoint.json"
WEIGHTS_FILE = "weights.safetensors"
SAMPLES_FILE = "samples.safetensors"
MOST_SAMPLES = 64


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class DataSource(_Value):
    """The table a network learned from."""

    file: str
    """Its name, without the folder."""
    sha256: str
    rows: int
    training_rows: int
    validation_rows: int
    test_rows: int


class Outcome(_Value):
    """How training went."""

    epochs: int
    best_epoch: int
    """The epoch, counted from 1, after which the validation loss was lowest: the weights are from there."""
    steps: int
    """Training batches up to and including the best epoch; each updated the running statistics once."""
    initial_weight: float
    """The share of the running statistics still held by their initial values; see `service.bundle.LayerSummary`."""
    validation_loss: float


class CalibrationNote(_Value):
    """What `evalmode calibrate` did."""

    layers: tuple[str, ...]
    """The BatchNorm layers whose running statistics are the exact ones of the training rows."""
    passes: int
    validation_before: dict[str, float]
    validation_after: dict[str, float]


class Document(_Value):
    """`checkpoint.json`."""

    format: Literal["evalmode-checkpoint/1"] = "evalmode-checkpoint/1"
    network: TabularNetConfig
    task: Task
    features: tuple[Feature, ...]
    target: Target
    left_out: dict[str, str]
    """Columns of the table that are no features, with the reason."""
    training: TrainingOptions
    outcome: Outcome
    metrics: dict[str, dict[str, float]]
    """On the held-out test rows: for the network, and for the baselines beside it."""
    data: DataSource
    versions: dict[str, str]
    card: str | None = None
    """What the network is for, what was left out and why: for people."""
    calibration: CalibrationNote | None = None
    """How its running statistics were measured anew, if they were."""

    @model_validator(mode="after")
    def _network_fits_the_table(self) -> Self:
        continuous = sum(isinstance(feature, ContinuousFeature) for feature in self.features)
        categories = tuple(len(f.categories) + 1 for f in self.features if isinstance(f, CategoricalFeature))
        outputs = len(self.target.classes) if isinstance(self.target, ClassTarget) else 1
        want = (continuous, categories, self.target.kind, outputs)
        got = (self.network.n_continuous, self.network.cardinalities, self.network.target, self.network.outputs)
        if got != want:
            raise ValueError(f"the network takes and gives {got}, the features and the target are {want}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A trained network and what is known about it."""

    document: Document
    weights: Mapping[str, Tensor]
    samples: tuple[Tensor, ...]
    """Held-out rows, one tensor for each input of the graph, in its order."""

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.document.features

    @property
    def target(self) -> Target:
        return self.document.target

    @property
    def signature(self) -> Signature:
        return table.signature(self.features, self.target)

    @property
    def settled(self) -> frozenset[str]:
        """BatchNorm layers whose statistics were measured exactly."""
        return frozenset(self.document.calibration.layers if self.document.calibration else ())

    def network(self) -> TabularNet:
        """The network with its weights, in eval mode; made anew at each call. It gives logits, or the number."""
        network = TabularNet(self.document.network)
        network.load_state_dict(dict(self.weights))
        return network.eval().requires_grad_(False)

    def served(self) -> Served:
        """The network as it is served, in eval mode: what gives the outputs of `signature`."""
        return Served(self.network()).eval()


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that `write` could not make, before the work whose result it is to hold.

    Raises:
        WrongCall: it is there and is not to be replaced, or is no checkpoint, or its parent cannot be written to.
    """
    if folder.exists():
        if not overwrite:
            raise WrongCall(f"'{folder}' is already there; --overwrite replaces it, --out chooses another folder")
        if not (folder / DOCUMENT_FILE).is_file():
            raise WrongCall(f"'{folder}' is no checkpoint, so it is not replaced; --out chooses another folder")
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise WrongCall(f"'{folder}' cannot be made: '{there}' is not a folder that can be written to")


def write(folder: Path, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Write a checkpoint whole.

    Args:
        overwrite: a checkpoint that is there is moved aside, replaced, and only then deleted.

    Raises:
        WrongCall: see `require_free`.
        OSError: the disk is full or not writable; what was there is still there.
    """
    fresh, aside = (folder.with_name(f".{folder.name}.{state}") for state in ("fresh", "replaced"))
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)  # an earlier write was killed between its two renames
    require_free(folder, overwrite=overwrite)
    inputs = [tensor.name for tensor in checkpoint.signature.inputs]
    samples = dict(zip(inputs, checkpoint.samples, strict=True))
    for leftover in (fresh, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    replaced = folder.exists()
    with whole_folder(fresh if replaced else folder) as beside:
        (beside / WEIGHTS_FILE).write_bytes(safetensors.torch.save(_contiguous(checkpoint.weights)))
        (beside / SAMPLES_FILE).write_bytes(safetensors.torch.save(_contiguous(samples)))
        (beside / DOCUMENT_FILE).write_text(checkpoint.document.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if replaced:
        os.rename(folder, aside)
        try:
            os.rename(fresh, folder)
        except BaseException:
            os.rename(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and check that its parts fit.

    Raises:
        WrongCall: a file is missing or broken, or does not fit the others; the sentence says which and how.
    """
    try:
        document = Document.model_validate_json(_bytes(folder, DOCUMENT_FILE))
    except ValidationError as error:
        where, why, _ = first_misfit(error)
        raise WrongCall(f"'{folder / DOCUMENT_FILE}' is no checkpoint: {where or 'the document'}: {why}") from error
    weights = _tensors(folder, WEIGHTS_FILE)
    state = TabularNet(document.network).state_dict()
    _require_fit(
        folder / WEIGHTS_FILE, weights, {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    )
    samples = _tensors(folder, SAMPLES_FILE)
    rows = max((len(tensor) for tensor in samples.values() if tensor.ndim), default=0)
    inputs = table.signature(document.features, document.target).inputs
    dtypes = {"FP32": torch.float32, "INT64": torch.int64}
    _require_fit(folder / SAMPLES_FILE, samples, {i.name: (dtypes[i.datatype], (rows, i.shape[1])) for i in inputs})
    return Checkpoint(document=document, weights=weights, samples=tuple(samples[tensor.name] for tensor in inputs))


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise WrongCall(f"'{folder}' is no checkpoint: '{name}' cannot be read: {error.strerror}") from error


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    content = _bytes(folder, name)
    try:
        return dict(safetensors.torch.load(content))
    except SafetensorError as error:
        raise WrongCall(f"'{folder / name}' is no safetensors file: {first_line(error)}") from error


def _require_fit(
    file: Path, got: Mapping[str, Tensor], want: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """Refuse tensors that are missing, unexpected, or of another dtype or shape."""
    if missing := sorted(want.keys() - got.keys()):
        raise WrongCall(f"'{file}' does not fit {DOCUMENT_FILE}: it lacks {listing(missing)}")
    if unexpected := sorted(got.keys() - want.keys()):
        raise WrongCall(f"'{file}' does not fit {DOCUMENT_FILE}: it has {listing(unexpected)} too many")
    for key, tensor in got.items():
        dtype, shape = want[key]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise WrongCall(
                f"'{file}' does not fit {DOCUMENT_FILE}: '{key}' is {_described(tensor.dtype, tuple(tensor.shape))}; "
                f"it takes {_described(dtype, shape)}"
            )


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
