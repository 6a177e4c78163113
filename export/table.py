"""A table becomes features, a target and tensors.

1. There is one encoding: what `Plan.encode` makes of a row, `service.signature.SampleReader` makes of it too, bit for
   bit. A number goes in raw (the network's first BatchNorm standardises it), category i of a feature is index i + 1.
2. Everything that is learned from rows (categories, means, ranges, which columns are constant) is learned from the
   training rows alone; `Plan` holds it, and nothing else of the table reaches the network.
3. A column is never dropped in silence: it is in the plan, or in `left_out` with its reason.

    column                                   is read as    unless
    numbers                                  continuous    --categorical; rows numbered one by one are left out
    text, booleans                           categorical   --continuous; text that differs in most rows is left out
    constant or empty in the training rows   left out
    dates, durations, lists, structures      left out

Whole numbers are continuous even when they have few values: 1 to 4 may be a grade or a code, and only a person knows.
A note names such columns. Missing are null, NaN, the empty text and what --missing names. A missing number becomes the
mean of the training rows, a missing category index 0, and so does a category that no training row has.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from export.options import TableOptions, Task
from service.errors import WrongCall, clipped, first_line, listing
from service.signature import (
    CATEGORICAL,
    CONTINUOUS,
    FLOAT32_MAX,
    MISSING_INDEX,
    CategoricalFeature,
    ClassTarget,
    ContinuousFeature,
    Feature,
    NumberTarget,
    Signature,
    Target,
    TensorSpec,
)

MINIMUM_ROWS = 20
"""Fewer cannot be split into rows to learn from, rows to stop by and rows to measure with."""

FEW_VALUES = 10
"""So many different whole numbers may be codes, or the classes of a target."""

VALIDATION_SHARE = 0.15
TEST_SHARE = 0.2
"""Of all rows; training gets the rest."""

MANY_TEXTS = 20
"""A text column with more different texts than this, and different in most rows, is taken for names or comments."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """A table whose columns have kinds and whose target is known in every row."""

    columns: pl.DataFrame
    """The columns that may become features, each Float64 (continuous) or String (categorical); null is missing."""
    task: Task
    target: Target
    answers: NDArray[Any]
    """For each row the index of its class (int64), or its number (float64)."""
    left_out: Mapping[str, str]
    """Columns that cannot be features, with the reason."""
    asked_for: frozenset[str]
    """Columns whose kind the caller chose; to leave one out would be to contradict."""
    notes: tuple[str, ...]
    """What a person should know about how the table was read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Row numbers, each row in exactly one part, each part in ascending order."""

    training: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What the training rows say about the features."""

    features: tuple[Feature, ...]
    means: Mapping[str, float]
    """Of each continuous feature, over its training values."""
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    def encode(self, columns: pl.DataFrame) -> dict[str, NDArray[Any]]:
        """Rows as the graph's inputs, in its order: `continuous: float32[B, N]` and `categorical: int64[B, M]`.

        Args:
            columns: with every feature by name, Float64 or String as in `Table.columns`; not changed.
        """
        tensors: dict[str, NDArray[Any]] = {}
        if continuous := [feature.name for feature in self.features if isinstance(feature, ContinuousFeature)]:
            filled = columns.select(pl.col(name).fill_null(self.means[name]) for name in continuous)
            tensors[CONTINUOUS] = np.ascontiguousarray(filled.to_numpy(), dtype=np.float32)
        if categorical := [feature for feature in self.features if isinstance(feature, CategoricalFeature)]:
            indices = columns.select(
                pl.col(feature.name).replace_strict(
                    feature.categories,
                    range(MISSING_INDEX + 1, len(feature.categories) + 1),
                    default=MISSING_INDEX,
                    return_dtype=pl.Int64,
                )
                for feature in categorical
            )
            tensors[CATEGORICAL] = np.ascontiguousarray(indices.to_numpy(), dtype=np.int64)
        return tensors


def signature(features: Sequence[Feature], target: Target) -> Signature:
    """The tensors of a network with these features and this target, and what they mean."""
    widths = {
        CONTINUOUS: sum(isinstance(feature, ContinuousFeature) for feature in features),
        CATEGORICAL: sum(isinstance(feature, CategoricalFeature) for feature in features),
    }
    datatypes = {CONTINUOUS: "FP32", CATEGORICAL: "INT64"}
    output = (
        TensorSpec(name="probabilities", datatype="FP32", shape=(-1, len(target.classes)))
        if isinstance(target, ClassTarget)
        else TensorSpec(name="value", datatype="FP32", shape=(-1, 1))
    )
    return Signature(
        inputs=tuple(
            TensorSpec.model_validate({"name": name, "datatype": datatypes[name], "shape": (-1, width)})
            for name, width in widths.items()
            if width
        ),
        outputs=(output,),
        features=tuple(features),
        target=target,
    )


# Reading


def read(path: Path, *, missing: Sequence[str] = ()) -> pl.DataFrame:
    """A CSV or Parquet file as it is, but with null for what is missing.

    Args:
        path: Parquet is known by its first bytes; anything else is CSV with a header, separated by comma, semicolon,
            tab or bar.
        missing: texts that mean missing, beside the empty one.

    Raises:
        WrongCall: there is no such file, it is not a table, it has no rows, or two columns have the same name.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            frame = pl.read_parquet(path)
        else:
            separator = _separator(path)
            frame = pl.read_csv(path, separator=separator, infer_schema_length=None, null_values=list(missing))
    except OSError as error:
        raise WrongCall(f"'{path}' cannot be read: {error.strerror or first_line(error)}") from error
    except pl.exceptions.PolarsError as error:
        raise WrongCall(f"'{path}' is not a table: {first_line(error)}") from error
    if frame.height == 0:
        raise WrongCall(f"'{path}' has no rows below its header")
    empty = [*missing, ""]
    return frame.with_columns(
        pl.when(pl.col(pl.String).is_in(empty)).then(None).otherwise(pl.col(pl.String)).name.keep()
    ).with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))


def _separator(path: Path) -> str:
    """What separates the columns: that which makes most of them out of the first line.

    Raises:
        WrongCall: two columns have the same name; reading would rename one of them.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
    except UnicodeDecodeError as error:
        raise WrongCall(f"'{path}' is not a table: neither Parquet nor CSV in UTF-8") from error
    columns = {separator: next(csv.reader([header], delimiter=separator), []) for separator in ",;\t|"}
    separator, names = max(columns.items(), key=lambda item: len(item[1]))  # the first of equals, so a comma
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise WrongCall(f"'{path}' has more than one column called {listing(twice)}; rename them")
    return separator


# Kinds


def understand(frame: pl.DataFrame, *, target: str, options: TableOptions) -> Table:
    """Give every column its kind, and every row its answer.

    Args:
        frame: as `read` returns it; not changed.
        target: the column to predict. Rows without it are dropped, and counted in a note.

    Raises:
        WrongCall: a column that is named is not there or not of the kind it is said to be, the target cannot be
            learned, or there are fewer than `MINIMUM_ROWS` rows.
    """
    _check_names(frame.columns, target, options)
    notes: list[str] = []
    known = frame.filter(pl.col(target).is_not_null())
    if dropped := frame.height - known.height:
        notes.append(f"{dropped} row(s) without '{target}' were dropped")
    if known.height < MINIMUM_ROWS:
        raise WrongCall(
            f"the table has {known.height} rows with a value for '{target}'; at least {MINIMUM_ROWS} are needed "
            "to train, to stop and to measure"
        )
    task, meaning, answers = _answers(known[target], options.task)
    left_out = dict.fromkeys(options.leave_out, "left out on request")
    columns: list[pl.Series] = []
    for column in known:
        if column.name == target or column.name in left_out:
            continue
        if column.name in options.categorical:
            columns.append(_texts(column))
        elif column.name in options.continuous:
            columns.append(_numbers(column))
        elif reason := _unsuitable(column):
            left_out[column.name] = reason
        else:
            columns.append(_numbers(column) if column.dtype.is_numeric() else _texts(column))
    chosen = {*options.categorical, *options.continuous}
    notes += _doubts([column for column in known if column.name in {c.name for c in columns} - chosen])
    return Table(
        columns=pl.DataFrame(columns),
        task=task,
        target=meaning,
        answers=answers,
        left_out=left_out,
        asked_for=frozenset(chosen),
        notes=tuple(notes),
    )


def _check_names(columns: Sequence[str], target: str, options: TableOptions) -> None:
    flags = {
        "--target": (target,),
        "--categorical": options.categorical,
        "--continuous": options.continuous,
        "--leave-out": options.leave_out,
    }
    taken: dict[str, str] = {}
    for flag, names in flags.items():
        for name in names:
            if name not in columns:
                similar = difflib.get_close_matches(name, columns, n=1)
                hint = f"did you mean '{similar[0]}'?" if similar else f"it has {listing(columns)}"
                raise WrongCall(f"the table has no column '{clipped(name)}' ({flag}); {hint}")
            if taken.setdefault(name, flag) != flag:
                raise WrongCall(f"column '{name}' is named by {taken[name]} and by {flag}; it can be one of them")


def _unsuitable(column: pl.Series) -> str | None:
    """Why a column is no feature, unless the caller says otherwise."""
    dtype, values = column.dtype, column.drop_nulls()
    different = values.n_unique()
    if values.is_empty():
        return "is empty in every row"
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum)):
        return f"holds {dtype}, which is neither a number nor a category"
    if dtype.is_integer() and different == len(column):
        first, last = int(values.min()), int(values.max())  # type: ignore[arg-type]  # whole numbers
        if last - first == different - 1:
            return f"numbers the rows from {first} to {last}; --continuous {column.name} keeps it"
    if dtype == pl.String and different > max(MANY_TEXTS, len(values) / 2):
        texts = f"has {different} different texts in {len(values)} rows{_almost_numbers(column)}"
        return f"{texts}; --categorical {column.name} keeps it"
    return None


def _doubts(columns: Sequence[pl.Series]) -> list[str]:
    """What was guessed and may be meant otherwise."""
    codes = [c.name for c in columns if c.dtype.is_integer() and c.drop_nulls().n_unique() <= FEW_VALUES]
    mixed = [(c.name, _almost_numbers(c)) for c in columns if c.dtype == pl.String]
    notes = [f"column '{name}' is read as categories{also}" for name, also in mixed if also]
    if codes:
        notes.append(
            f"whole numbers with few different values are read as numbers: {listing(codes)}; "
            "where they are codes, say --categorical COLUMN"
        )
    return notes


def _almost_numbers(column: pl.Series) -> str:
    """For a text column that is mostly numbers, the texts that keep it from being one."""
    texts = column.drop_nulls()
    others = texts.filter(texts.cast(pl.Float64, strict=False).is_null())
    if not 0 < len(others) < len(texts) / 2:
        return ""
    first = listing(others.unique().sort().head(3).to_list())
    return f", though most are numbers and {len(others)} are not; --missing reads {first} as missing"


def _numbers(column: pl.Series) -> pl.Series:
    """As Float64, null for missing.

    Raises:
        WrongCall: a value is no number, not finite, or too large for float32.
    """
    try:
        numbers = column.cast(pl.Float64).fill_nan(None)
    except pl.exceptions.PolarsError as error:
        texts = column.cast(pl.String)
        wrong = texts.filter(texts.cast(pl.Float64, strict=False).is_null() & texts.is_not_null())
        shown = f"holds '{clipped(str(wrong[0]))}'" if len(wrong) else f"holds {column.dtype}"
        raise WrongCall(f"column '{column.name}' {shown}, which is no number; --missing reads it as missing") from error
    if len(outside := numbers.filter(~numbers.is_between(-FLOAT32_MAX, FLOAT32_MAX))):
        raise WrongCall(
            f"column '{column.name}' holds {outside[0]}; a number must be finite and fit 32-bit floating point. "
            f"Leave the column out, or write such values as missing"
        )
    return numbers


def _texts(column: pl.Series) -> pl.Series:
    """As String, null for missing. Whole numbers are written as such even where missing values made them floats."""
    if column.dtype.is_float() and (column.drop_nulls() % 1 == 0).all():
        column = column.cast(pl.Int64, strict=False)
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError as error:
        raise WrongCall(f"column '{column.name}' holds {column.dtype}, which cannot be categories") from error


# The target


def _answers(column: pl.Series, wanted: Task | None) -> tuple[Task, Target, NDArray[Any]]:
    """What the task is, what the answers mean, and each row's answer."""
    task = wanted or _task(column)
    name = column.name
    if task == "regression":
        numbers = _numbers(column)
        if numbers.n_unique() < 2:
            raise WrongCall(f"target '{name}' is {numbers[0]} in every row; there is nothing to learn")
        return task, NumberTarget(name=name), numbers.to_numpy()
    texts = _texts(column)
    classes = _in_order(texts.unique())
    if len(classes) < 2:
        raise WrongCall(f"target '{name}' is '{clipped(classes[0])}' in every row; two classes are needed")
    if wanted == "binary" and len(classes) != 2:
        raise WrongCall(f"target '{name}' has {len(classes)} classes; --task binary takes 2")
    if len(classes) > max(MANY_TEXTS, len(texts) / 10):
        raise WrongCall(
            f"target '{name}' has {len(classes)} different values in {len(texts)} rows, which is too many classes"
            f"{_almost_numbers(texts)}"
        )
    for label, count in zip(*np.unique(texts.to_numpy(), return_counts=True), strict=True):
        if count < 3:
            raise WrongCall(
                f"class '{clipped(str(label))}' of target '{name}' has {count} row(s); each class needs at least 3: "
                "one to train with, one to stop by, one to measure with"
            )
    answers = texts.replace_strict(classes, range(len(classes)), return_dtype=pl.Int64).to_numpy()
    return "binary" if len(classes) == 2 else "multiclass", ClassTarget(name=name, classes=classes), answers


def _task(column: pl.Series) -> Task:
    dtype, different = column.dtype, column.n_unique()
    if not dtype.is_numeric():
        return "binary" if different == 2 else "multiclass"
    whole = dtype.is_integer() or bool((column % 1 == 0).all())
    if whole and different <= FEW_VALUES:
        return "binary" if different == 2 else "multiclass"
    return "regression"


def _in_order(texts: pl.Series) -> tuple[str, ...]:
    """Different texts in an order of their own: whole numbers by size, anything else by code point."""
    values: list[str] = texts.drop_nulls().unique().to_list()
    try:
        return tuple(sorted(values, key=lambda text: (int(text), text)))
    except ValueError:
        return tuple(sorted(values))


# The split


def split(table: Table, *, seed: int) -> Split:
    """Divide the rows at random; each class has its share, and at least one row, in every part."""
    groups = table.answers if isinstance(table.target, ClassTarget) else np.zeros(len(table.answers), np.int64)
    return split_rows(groups, np.arange(len(groups)), seed=seed, validation=VALIDATION_SHARE, test=TEST_SHARE)


def split_rows(groups: NDArray[np.int64], rows: Rows, *, seed: int, validation: float, test: float) -> Split:
    """Divide `rows` at random, each group of `groups[rows]` by itself; a part with a share gets one row at least."""
    random = np.random.default_rng(seed)
    parts: dict[str, list[Rows]] = {"training": [], "validation": [], "test": []}
    for group in np.unique(groups[rows]):
        members = random.permutation(rows[groups[rows] == group])
        n_validation, n_test = (max(1, round(share * len(members))) if share else 0 for share in (validation, test))
        cuts = np.split(members, [n_test, n_test + n_validation])
        for part, cut in zip(("test", "validation", "training"), cuts, strict=True):
            parts[part].append(cut)
    return Split(**{part: np.sort(np.concatenate(members)) for part, members in parts.items()})


# The features


def plan(table: Table, training: Rows) -> Plan:
    """What the training rows say about each column.

    Raises:
        WrongCall: no feature is left, a column cannot be standardised in float32, or a column whose kind the caller
            chose tells nothing.
    """
    left_out: dict[str, str] = {}
    notes: list[str] = []
    kept: list[pl.Series] = []
    for column in (column.gather(training) for column in table.columns):
        if not (reason := _tells_nothing(column)):
            kept.append(column)
            notes += _check_scale(column) if column.dtype == pl.Float64 else []
        elif column.name in table.asked_for:
            raise WrongCall(f"column '{column.name}' {reason}; it cannot be a feature")
        else:
            left_out[column.name] = reason
    if not kept:
        reasons = "; ".join(f"'{name}' {reason}" for name, reason in {**table.left_out, **left_out}.items())
        raise WrongCall(f"no column is left to predict '{table.target.name}' from: {reasons or 'there is no other'}")
    missing = pl.DataFrame(kept).select(pl.sum_horizontal(pl.all().is_null().cast(pl.Int64))).to_series()
    row = int(missing.arg_min() or 0)  # the first row with the fewest missing values
    means = {
        column.name: float(np.mean(column.drop_nulls().to_numpy())) for column in kept if column.dtype == pl.Float64
    }
    for column in kept:
        if column.name in means and not column.null_count() and (count := table.columns[column.name].null_count()):
            notes.append(
                f"column '{column.name}' is missing in {count} held-out row(s) and in no training row: they are "
                "measured with its mean, but the service will refuse null there"
            )
    return Plan(
        features=tuple(
            _continuous(column, means[column.name], row) if column.name in means else _categorical(column, row)
            for column in kept
        ),
        means=means,
        left_out=left_out,
        notes=tuple(notes),
    )


def _tells_nothing(column: pl.Series) -> str | None:
    values = column.drop_nulls()
    if values.is_empty():
        return "is empty in every training row"
    if column.dtype == pl.Float64:
        if values.cast(pl.Float32).n_unique() == 1:
            return f"is {values[0]:.7g} in every training row"
    elif values.n_unique() == 1 and not column.null_count():
        return f"is '{clipped(str(values[0]))}' in every training row"
    return None


def _check_scale(column: pl.Series) -> list[str]:
    """Whether float32 can hold a column's variance, and tell its values apart."""
    values = column.drop_nulls().to_numpy()
    with np.errstate(over="ignore"):
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if not 1e-15 < deviation < 1e18:
        raise WrongCall(
            f"column '{column.name}' varies by {deviation:.3g}, whose square does not fit 32-bit floating point; "
            "give it in another unit, or leave it out"
        )
    largest = float(np.abs(values).max())
    step = float(np.spacing(np.float32(largest)))
    if step > deviation / 1000:
        return [
            f"column '{column.name}' reaches {largest:.4g} but varies by {deviation:.3g} only; 32-bit floating point "
            f"has steps of {step:.3g} there, so subtract a constant from it first"
        ]
    return []


def _continuous(column: pl.Series, mean: float, row: int) -> ContinuousFeature:
    example = column[row]
    return ContinuousFeature(
        name=column.name,
        minimum=column.min(),  # type: ignore[arg-type]  # of numbers
        maximum=column.max(),  # type: ignore[arg-type]  # of numbers
        missing=mean if column.null_count() else None,
        example=mean if example is None else example,
    )


def _categorical(column: pl.Series, row: int) -> CategoricalFeature:
    return CategoricalFeature(name=column.name, categories=_in_order(column), example=column[row])
