"""What a model takes and gives: tensors, and for tables the named features behind them.

Rule 1: only what passed `accept_sample` or `accept_tensors` becomes an `Accepted`; later rooms never validate again.
Rule 2: nothing here runs a model, reads a file or knows a wire; it turns values into tensors or raises a RequestError.
Rule 3: a sample's faults are reported together, so that a caller mends them in one go.

A table's features become two tensors: the continuous ones in their order as `continuous: float32[batch, n]`, the
categorical ones as `categorical: int64[batch, m]`, where category i of the list is index i + 1 and index 0 is
'missing'. Standardisation is not here: it is the graph's first BatchNorm.
"""

from __future__ import annotations

import difflib
import math
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import (
    BadRequest,
    MissingFeature,
    MissingTensor,
    OutOfRange,
    RequestError,
    SeveralFaults,
    ShapeMismatch,
    UnknownFeature,
    UnknownTensor,
    WrongType,
    listing,
)

CONTINUOUS = "continuous"
CATEGORICAL = "categorical"
MISSING_INDEX = 0
"""The index of a categorical feature that is missing or whose category training never saw."""

_NUMBERS = frozenset({int, float})  # a boolean is another type than either

MOST_UNKNOWN = 10
"""For so many features that the model does not have another name is suggested, which takes a while."""

ECHO_LENGTH = 200
"""The most characters of an unknown category that go back to the caller."""

FLOAT32_MAX = float(np.finfo(np.float32).max)

_FLOAT = struct.Struct("=f")  # "=" raises OverflowError where the nearest float32 would be infinite

# Open Inference Protocol datatype -> NumPy dtype. BYTES is a string tensor and has no fixed size.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class TensorSpec(_Value):
    """A named tensor at the graph's edge."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """One number an axis; -1 is an axis of any length. The first axis is the batch."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return DATATYPES[self.datatype]


class ContinuousFeature(_Value):
    """A number, passed raw: the graph's first BatchNorm standardises it."""

    kind: Literal["continuous"] = "continuous"
    name: str
    unit: str | None = None
    minimum: float | None = None
    """The smallest value in training. For people: a value outside the range is served."""
    maximum: float | None = None
    missing: float | None = None
    """What null becomes: the training mean where training had missing values. None: null is refused."""
    example: float = 0.0

    @property
    def wanted(self) -> str:
        return "a number" if self.missing is None else "a number or null"


class CategoricalFeature(_Value):
    """One of the categories that training saw; anything else is served as 'missing'."""

    kind: Literal["categorical"] = "categorical"
    name: str
    categories: tuple[str, ...]
    example: str | None = None

    @property
    def wanted(self) -> str:
        return f"one of {listing(self.categories, most=12)}"


Feature = Annotated[ContinuousFeature | CategoricalFeature, Field(discriminator="kind")]


class ClassTarget(_Value):
    """The answer is one of `classes`; the graph's only output is a probability for each, in this order."""

    kind: Literal["classes"] = "classes"
    name: str
    classes: tuple[str, ...]


class NumberTarget(_Value):
    """The answer is a number; the graph's only output is `float32[batch, 1]`, in the target's own unit."""

    kind: Literal["number"] = "number"
    name: str
    unit: str | None = None


Target = Annotated[ClassTarget | NumberTarget, Field(discriminator="kind")]


class Signature(_Value):
    """Tensors in and out, and for a table the features and the target behind them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    features: tuple[Feature, ...] | None = None
    target: Target | None = None

    @model_validator(mode="after")
    def _features_fill_the_tensors(self) -> Self:
        if self.features is None:
            return self
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise ValueError("two features have the same name")
        widths = {CONTINUOUS: len(self.continuous), CATEGORICAL: len(self.categorical)}
        want = {name: (-1, width) for name, width in widths.items() if width}
        got = {tensor.name: tensor.shape for tensor in self.inputs}
        if got != want:
            raise ValueError(f"the features fill tensors {want}, but the graph takes {got}")
        if self.target is None or len(self.outputs) != 1:
            raise ValueError("a signature with features needs a target and exactly one output")
        return self

    @property
    def continuous(self) -> tuple[ContinuousFeature, ...]:
        return tuple(f for f in self.features or () if isinstance(f, ContinuousFeature))

    @property
    def categorical(self) -> tuple[CategoricalFeature, ...]:
        return tuple(f for f in self.features or () if isinstance(f, CategoricalFeature))

    @cached_property
    def float_rows(self) -> tuple[tuple[str, list[int]], ...] | None:
        """Each input's name and the shape of a row, if all are FP32, not empty, and of fixed shape but for the batch,
        and JSON can hold every output; else None."""
        if any(spec.datatype == "FP16" for spec in self.outputs):
            return None
        for spec in self.inputs:
            if spec.datatype != "FP32" or spec.shape[0] != -1 or min(spec.shape[1:], default=1) < 1:
                return None
        return tuple((spec.name, list(spec.shape[1:])) for spec in self.inputs)

    def example(self) -> dict[str, float | str | None]:
        """A sample that the model accepts, by feature names: a real row of the training table."""
        return {
            feature.name: int(value) if isinstance(value := feature.example, float) and value.is_integer() else value
            for feature in self.features or ()
        }


class Accepted(NamedTuple):
    """Rows that fit the model: one array per input of the graph, in the graph's order, all with `rows` rows."""

    tensors: tuple[NDArray[Any], ...]
    rows: int
    served_as_missing: Mapping[str, str] = MappingProxyType({})
    """Categorical features whose value training never saw, with that value."""


class SampleReader:
    """Turns one sample of named features into tensors; the look-ups are built once for a signature."""

    def __init__(self, signature: Signature) -> None:
        if signature.features is None:
            raise ValueError("this signature has no named features")
        self._features = signature.features
        self._names = frozenset(feature.name for feature in signature.features)
        self._continuous = tuple(feature.name for feature in signature.continuous)
        self._index: dict[str, dict[str | None, int]] = {
            feature.name: {
                None: MISSING_INDEX,
                **{category: i for i, category in enumerate(feature.categories, start=MISSING_INDEX + 1)},
            }
            for feature in signature.categorical
        }
        self._floats = struct.Struct(f"={len(self._continuous)}f")  # as _FLOAT
        self._tensor_order = tuple(tensor.name for tensor in signature.inputs)

    def accept(self, sample: object) -> Accepted:
        """The sample as one row of every input.

        Args:
            sample: a JSON object (a dict) with every feature by name. null is taken where the signature has a value
                for missing; an unknown category is taken and reported in `served_as_missing`.

        Raises:
            WrongType, OutOfRange, MissingFeature, UnknownFeature: the one thing that is wrong.
            SeveralFaults: all the things that are wrong.
        """
        return self._complete(sample) or self._careful(sample)

    def _complete(self, sample: object) -> Accepted | None:
        """`accept` for the sample that nothing needs to be said about: every feature there, known and of its type."""
        try:
            continuous = [sample[name] for name in self._continuous]  # type: ignore[index]  # TypeError if it is no dict
            categorical = [index[sample[name]] for name, index in self._index.items()]  # type: ignore[index]
            whole = len(sample) == len(self._names) and _NUMBERS.issuperset(map(type, continuous))  # type: ignore[arg-type]
            if not whole or not math.isfinite(sum(continuous)):
                return None
            packed = self._floats.pack(*continuous)
        except (TypeError, KeyError, OverflowError):
            return None
        return self._accepted(np.frombuffer(packed, dtype=np.float32), np.array(categorical, dtype=np.int64), {})

    def _accepted(
        self, continuous: NDArray[np.float32], categorical: NDArray[np.int64], served_as_missing: dict[str, str]
    ) -> Accepted:
        tensors: dict[str, NDArray[Any]] = {CONTINUOUS: continuous[np.newaxis], CATEGORICAL: categorical[np.newaxis]}
        return Accepted(
            tensors=tuple([tensors[name] for name in self._tensor_order]), rows=1, served_as_missing=served_as_missing
        )

    def _careful(self, sample: object) -> Accepted:
        """`accept` for any sample, feature by feature."""
        if not isinstance(sample, dict):
            raise WrongType(what="the body", got=sample, want="one JSON object of named features")
        continuous: list[float] = []
        categorical: list[int] = []
        served_as_missing: dict[str, str] = {}
        faults: list[RequestError] = []
        for feature in self._features:
            try:
                value = sample[feature.name]
            except KeyError:
                faults.append(MissingFeature(feature=feature.name, want=feature.wanted))
                continue
            try:
                if isinstance(feature, ContinuousFeature):
                    continuous.append(_number(feature, value))
                    continue
                category = _category(feature, value)
                index = MISSING_INDEX if category is None else self._index[feature.name].get(category, MISSING_INDEX)
                if index == MISSING_INDEX and category is not None:
                    served_as_missing[feature.name] = category[:ECHO_LENGTH]
                categorical.append(index)
            except RequestError as fault:
                faults.append(fault)
        if len(sample) > len(self._names) - len(faults):
            unknown = [name for name in sample if name not in self._names]
            faults.extend(self._unknown(name) for name in unknown[:MOST_UNKNOWN])
            if len(unknown) > MOST_UNKNOWN:
                faults.append(BadRequest(f"{len(unknown) - MOST_UNKNOWN} more features that the model does not have"))
        if faults:
            raise faults[0] if len(faults) == 1 else SeveralFaults(faults)
        return self._accepted(
            np.array(continuous, dtype=np.float32), np.array(categorical, dtype=np.int64), served_as_missing
        )

    def _unknown(self, name: str) -> UnknownFeature:
        features = [feature.name for feature in self._features]
        similar = next(iter(difflib.get_close_matches(name[:200], features, n=1)), None)
        return UnknownFeature(feature=name, similar=similar, features=features)


def _number(feature: ContinuousFeature, value: object) -> float:
    if value is None and feature.missing is not None:
        return feature.missing
    if type(value) is not float and type(value) is not int:  # bool is an int to isinstance, but not a number in JSON
        raise WrongType(what=f"feature '{feature.name}'", got=value, want=feature.wanted)
    try:
        if math.isfinite(value):
            _FLOAT.pack(value)
            return float(value)
    except OverflowError:
        pass
    raise OutOfRange(
        what=f"feature '{feature.name}'", got=_short(value), want="a finite number that fits 32-bit floating point"
    )


def _short(value: float) -> str:
    # Python refuses to write integers of more than 4300 digits
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else str(value)


def _category(feature: CategoricalFeature, value: object) -> str | None:
    if value is not None and type(value) is not str:
        raise WrongType(what=f"feature '{feature.name}'", got=value, want=feature.wanted)
    return value


def accept_tensors(signature: Signature, tensors: Mapping[str, NDArray[Any]]) -> Accepted:
    """Named arrays, already of the right dtype, as an `Accepted`.

    Args:
        tensors: one array for every input of the signature, each with its batch axis, not changed.

    Raises:
        UnknownTensor, MissingTensor: the names are not the graph's.
        ShapeMismatch: an axis has another length than the signature says, or the batch axes differ or are empty.
    """
    names = [spec.name for spec in signature.inputs]
    for name in tensors:
        if name not in names:
            raise UnknownTensor(kind="input", tensor=name, tensors=names)
    ordered: list[NDArray[Any]] = []
    for spec in signature.inputs:
        if spec.name not in tensors:
            raise MissingTensor(tensor=spec.name)
        array = tensors[spec.name]
        if not fits(array.shape, spec.shape):
            raise ShapeMismatch(tensor=spec.name, got=f"shape {list(array.shape)}", want=str(list(spec.shape)))
        ordered.append(array)
    rows = ordered[0].shape[0] if ordered and ordered[0].ndim else 0
    if rows == 0:
        raise BadRequest(f"input '{names[0] if names else ''}' has no rows; send at least one")
    for spec, array in zip(signature.inputs, ordered, strict=True):
        if array.shape[0] != rows:
            raise ShapeMismatch(
                tensor=spec.name,
                got=f"{array.shape[0]} rows",
                want=f"as many rows in every input; '{names[0]}' has {rows}",
            )
    if CATEGORICAL in tensors and signature.categorical:
        _check_indices(signature.categorical, tensors[CATEGORICAL])
    return Accepted(tensors=tuple(ordered), rows=rows)


def _check_indices(features: Sequence[CategoricalFeature], indices: NDArray[Any]) -> None:
    """A lookup in a graph takes a negative index from the end of its table without a word, so it is refused here."""
    for column, feature in enumerate(features):
        last = len(feature.categories)
        outside = (indices[:, column] < MISSING_INDEX) | (indices[:, column] > last)
        if outside.any():
            raise OutOfRange(
                what=f"an index of feature '{feature.name}' (column {column} of '{CATEGORICAL}')",
                got=int(indices[outside.argmax(), column]),
                want=f"0 for missing, or 1 to {last} for its categories",
            )


def fits(got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether a shape is the wanted one, where -1 is any length."""
    return len(got) == len(want) and all(w in (-1, g) for g, w in zip(got, want, strict=True))
