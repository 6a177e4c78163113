"""From a file to features, target and tensors: what is inferred, what is refused, and that there is one encoding."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.options import TableOptions
from export.table import Plan, Split, Table, plan, read, signature, split, split_rows, understand
from service.errors import WrongCall
from service.signature import CategoricalFeature, ClassTarget, ContinuousFeature, NumberTarget, SampleReader

CREDIT = Path(__file__).parents[2] / "data/german_credit/german_credit.csv"


def flats(n: int = 60, **columns: Any) -> pl.DataFrame:
    """A made-up table of flats: size, floor, district, a lift, and the rent; `columns` are added or replaced."""
    random = np.random.default_rng(5)
    size = random.uniform(20, 140, n)
    base: dict[str, Any] = {
        "size_m2": size,
        "floor": random.integers(0, 5, n),
        "district": random.choice(["Süd", "Nord", "West"], n),
        "lift": random.choice([True, False], n),
        "rent": 9.5 * size + random.normal(0, 40, n),
    }
    return pl.DataFrame(base | columns)


def learned(frame: pl.DataFrame, target: str = "rent", **options: Any) -> tuple[Table, Split, Plan]:
    table = understand(frame, target=target, options=TableOptions(**options))
    parts = split(table, seed=0)
    return table, parts, plan(table, parts.training)


def through_the_service(frame: pl.DataFrame, table: Table, features: Plan) -> list[NDArray[Any]]:
    """Every row as a JSON sample through the service's reader: one array for each input."""
    reader = SampleReader(signature(features.features, table.target))
    names = [feature.name for feature in features.features]
    samples = [
        {name: str(value).lower() if isinstance(value, bool) else value for name, value in row.items()}
        for row in frame.select(names).iter_rows(named=True)
    ]
    rows = [reader.accept(sample).tensors for sample in samples]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


# One encoding


def test_the_service_reads_a_row_of_the_credit_table_as_training_did() -> None:
    """Bit for bit, in dtype, shape and order, for all 1,000 rows and all 20 columns."""
    frame = read(CREDIT)
    table, _, features = learned(frame, "creditability")
    encoded = features.encode(table.columns)
    assert list(encoded) == ["continuous", "categorical"]
    for ours, theirs in zip(encoded.values(), through_the_service(frame, table, features), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.none() | st.floats(-1e20, 1e20),
            st.none() | st.integers(-(2**60), 2**60),
            st.none() | st.sampled_from(["", " ", "é", "ß ✓", "1", "01", "null"]),
            st.none() | st.booleans(),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_the_service_reads_any_row_as_training_did(rows: list[tuple[Any, ...]]) -> None:
    """Also with missing values, whole numbers beyond float32's digits, and categories that only held-out rows have."""
    varied = [0.1 * i for i in range(24)]
    schema = {"size_m2": pl.Float64, "floor": pl.Int64, "district": pl.String, "lift": pl.Boolean}
    frame = pl.DataFrame((rows * 12)[:24], schema=schema, orient="row")
    frame = frame.with_columns(pl.Series("varied", varied), (pl.int_range(24) * 1.5).alias("rent"))
    try:
        table, _, features = learned(frame)
    except WrongCall as refusal:
        assert "does not fit 32-bit" in str(refusal)  # noqa: PT017  # a table that has no network
        return
    # where training saw no missing value the service refuses null, so only the other rows are compared
    never = [f.name for f in features.features if isinstance(f, ContinuousFeature) and f.missing is None]
    taken = frame.select(pl.all_horizontal(pl.col("varied", *never).is_not_null())).to_series()
    encoded = features.encode(table.columns.filter(taken))
    for ours, theirs in zip(encoded.values(), through_the_service(frame.filter(taken), table, features), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_category_is_its_place_in_the_list_and_zero_is_missing() -> None:
    """Null, and a category that no training row has, are index 0; the order is that of the text, or of the number."""
    district = ["b", "a", None, "c"] * 15
    codes = [10, 9, 2, 9] * 15
    table, parts, features = learned(flats(district=district, code=codes), categorical=("code",), leave_out=("lift",))
    found = {f.name: f.categories for f in features.features if isinstance(f, CategoricalFeature)}
    assert found == {"district": ("a", "b", "c"), "code": ("2", "9", "10")}
    stranger = table.columns.with_columns(pl.lit("z").alias("district"))
    assert features.encode(table.columns)["categorical"][:4].tolist() == [[2, 3], [1, 2], [0, 1], [3, 2]]
    assert set(features.encode(stranger)["categorical"][:, 0].tolist()) == {0}
    assert len(parts.training) < 60


# Kinds


def test_numbers_are_continuous_and_text_and_booleans_are_categories() -> None:
    """Whole numbers too; those with few values are named in a note, because they may be codes."""
    table, _, features = learned(flats())
    assert [(f.name, f.kind) for f in features.features] == [
        ("size_m2", "continuous"),
        ("floor", "continuous"),
        ("district", "categorical"),
        ("lift", "categorical"),
    ]
    lift = features.features[3]
    assert isinstance(lift, CategoricalFeature)
    assert lift.categories == ("false", "true")
    assert any("'floor'" in note and "--categorical" in note for note in table.notes)


def test_kinds_can_be_chosen() -> None:
    """A code becomes a category, a text of digits a number; and a chosen column needs no note."""
    frame = flats(code=["7", "12"] * 30)
    table, _, features = learned(frame, categorical=("floor",), continuous=("code", "lift"))
    kinds = {f.name: f.kind for f in features.features}
    assert kinds["floor"] == "categorical"
    assert kinds["code"] == kinds["lift"] == "continuous"
    assert table.notes == ()


def test_codes_that_missing_values_made_floats_are_whole_numbers_again() -> None:
    """pandas writes 3, null as 3.0, NaN; the category is '3', as it would be without the missing value."""
    _, _, features = learned(flats(code=[3.0, None, 4.0] * 20), categorical=("code",))
    code = features.features[-1]
    assert isinstance(code, CategoricalFeature)
    assert code.categories == ("3", "4")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ([7] * 60, "is 7 in every training row"),
        (["same"] * 60, "is 'same' in every training row"),
        ([1e9 + i * 1e-9 for i in range(60)], "is 1e+09 in every training row"),  # not in float32
        ([None] * 60, "is empty in every row"),
        (["", None] * 30, "is empty in every row"),
        (list(range(100, 160)), "numbers the rows from 100 to 159; --continuous extra keeps it"),
        ([f"flat {i}" for i in range(60)], "has 60 different texts in 60 rows; --categorical extra keeps it"),
        ([date(2024, 1, 1)] * 60, "holds Date, which is neither a number nor a category"),
        ([[1, 2]] * 60, "neither a number nor a category"),
    ],
    ids=[
        "constant",
        "one text",
        "constant in float32",
        "nulls",
        "empty texts",
        "row numbers",
        "names",
        "dates",
        "lists",
    ],
)
def test_a_column_that_tells_nothing_is_left_out_with_its_reason(
    column: list[Any], reason: str, tmp_path: Path
) -> None:
    """Never in silence."""
    frame = flats().with_columns(pl.Series("extra", column))
    frame.write_parquet(tmp_path / "flats.parquet")
    table, _, features = learned(read(tmp_path / "flats.parquet"))
    assert reason in {**table.left_out, **features.left_out}["extra"]
    assert "extra" not in {feature.name for feature in features.features}


def test_a_column_that_is_asked_for_is_not_left_out() -> None:
    """Names as categories, row numbers as numbers: the caller knows. A constant is refused, since it cannot serve."""
    frame = flats(name=[f"flat {i}" for i in range(60)], row=range(60), same=[4.0] * 60)
    _, _, features = learned(frame, categorical=("name",), continuous=("row",))
    assert {"name", "row"} <= {feature.name for feature in features.features}
    with pytest.raises(WrongCall, match="'same' is 4 in every training row; it cannot be a feature"):
        learned(frame, continuous=("same",))


def test_text_that_is_nearly_numbers_is_pointed_at(tmp_path: Path) -> None:
    """A column of numbers with 'NA' in it is categories, until --missing says that NA is none."""
    path = tmp_path / "flats.csv"
    age = ["NA" if i % 9 == 0 else str(20 + i % 12) for i in range(60)]
    flats(age=age).write_csv(path)
    table, _, _ = learned(read(path))
    assert any("'age' is read as categories" in note and "--missing reads 'NA'" in note for note in table.notes)
    _, _, features = learned(read(path, missing=["NA"]))
    assert {f.name: f.kind for f in features.features}["age"] == "continuous"


# Missing values and ranges


def test_a_missing_number_is_the_mean_of_the_training_rows(tmp_path: Path) -> None:
    """Null and NaN alike; only where training had them does the service take null."""
    size = [None if i % 7 == 0 else float("nan") if i % 11 == 0 else 3.0 * i + 1 for i in range(60)]
    flats(size_m2=size).write_parquet(tmp_path / "flats.parquet")
    table, parts, features = learned(read(tmp_path / "flats.parquet"))
    kept = [value for i in parts.training if (value := size[i]) is not None and not np.isnan(value)]
    first, second = features.features[:2]
    assert isinstance(first, ContinuousFeature)
    assert isinstance(second, ContinuousFeature)
    assert first.missing == pytest.approx(np.mean(kept), rel=1e-12)
    assert (first.minimum, first.maximum) == (min(kept), max(kept))
    assert second.missing is None
    assert features.encode(table.columns)["continuous"][0, 0] == np.float32(first.missing)


def test_a_number_missing_in_held_out_rows_only_is_noted() -> None:
    """They are measured with the mean, and the note says that the service refuses null there."""
    frame = flats()
    table = understand(frame, target="rent", options=TableOptions())
    held_out = split(table, seed=0).test[0]
    size = frame["size_m2"].to_list()
    size[held_out] = None
    table, _, features = learned(frame.with_columns(size_m2=pl.Series(size)))
    assert any("1 held-out row" in note for note in features.notes)
    assert features.encode(table.columns)["continuous"][held_out, 0] == np.float32(features.means["size_m2"])


def test_the_example_is_one_real_training_row() -> None:
    """All values from the same row, and one without missing values where there is one."""
    frame = flats(size_m2=[None if i % 2 else 30.0 + i for i in range(60)])
    _, parts, features = learned(frame)
    example = signature(features.features, NumberTarget(name="rent")).example()
    rows = frame[parts.training].select(*example).with_columns(pl.col("lift").cast(pl.String)).to_dicts()
    assert example in rows


def test_nothing_is_learned_from_rows_that_are_held_out() -> None:
    """Other values in validation and test rows change no range, no mean, no category."""
    frame = flats()
    table, parts, before = learned(frame)
    outside = pl.Series([row not in set(parts.training.tolist()) for row in range(60)])
    changed = frame.with_columns(
        size_m2=pl.when(outside).then(9999.0).otherwise("size_m2"),
        district=pl.when(outside).then(pl.lit("Ost")).otherwise("district"),
    )
    after = plan(understand(changed, target="rent", options=TableOptions()), parts.training)
    assert after.features == before.features
    assert after.means == before.means
    assert table.left_out == {}


# What is refused


@pytest.mark.parametrize(
    ("columns", "options", "complaint"),
    [
        ({"size_m2": [float("inf")] + [1.0, 2.0] * 29 + [0.0]}, {}, "'size_m2' holds inf; a number must be finite"),
        ({"size_m2": [1e39] + [1.0, 2.0] * 29 + [0.0]}, {}, r"'size_m2' holds 1e\+39"),
        ({"size_m2": [1e25 * i for i in range(60)]}, {}, "whose square does not fit"),
        ({"size_m2": [1e-25 * i for i in range(60)]}, {}, "give it in another unit"),
        ({}, {"continuous": ("district",)}, "'district' holds '(Süd|Nord|West)', which is no number"),
        ({}, {"categorical": ("distrikt",)}, r"no column 'distrikt' \(--categorical\); did you mean 'district'"),
        ({}, {"leave_out": ("rent",)}, "'rent' is named by --target and by --leave-out"),
        ({}, {"categorical": ("lift",), "continuous": ("lift",)}, "by --categorical and by --continuous"),
        ({}, {"leave_out": ("size_m2", "floor", "district", "lift")}, "no column is left to predict 'rent' from"),
        ({"rent": [float("inf")] + [1.0, 2.0] * 29 + [0.0]}, {}, "'rent' holds inf"),
        ({"rent": [5.5] * 60}, {}, "'rent' is 5.5 in every row"),
        ({"rent": ["low"] * 60}, {}, "'rent' is 'low' in every row; two classes are needed"),
        ({"rent": ["low"] * 58 + ["high"] * 2}, {}, "class 'high' of target 'rent' has 2 row"),
        ({"rent": [f"{i} EUR" for i in range(60)]}, {}, "60 different values in 60 rows, which is too many classes"),
        ({"rent": ["a", "b", "c"] * 20}, {"task": "binary"}, "has 3 classes; --task binary takes 2"),
        ({"rent": [1.0] * 10 + [None] * 50}, {}, "10 rows with a value for 'rent'; at least 20"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_learned_is_refused_with_a_sentence(
    columns: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    """It names the column, what came and what to do."""
    with pytest.raises(WrongCall, match=complaint):
        learned(flats(**columns), **options)


def test_a_column_too_far_from_zero_for_its_spread_is_noted() -> None:
    """Seconds since 1970 within one hour: float32 has steps of 128 there."""
    seconds = [1.7e9 + 60 * i for i in range(60)]
    _, _, features = learned(flats(seconds=seconds))
    assert any("'seconds'" in note and "steps of 128" in note for note in features.notes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a table"),
        (b"a,b\n", "has no rows"),
        (b"a,b,a\n1,2,3\n", "more than one column called 'a'"),
        (b"\xff\xfe,b\n1,2\n", "neither Parquet nor CSV in UTF-8"),
        (b"a,b\n1,2\n1,2,3\n", "is not a table"),
        (b"PAR1 but not really", "is not a table"),
    ],
    ids=["empty", "header only", "a name twice", "not UTF-8", "ragged", "not Parquet"],
)
def test_a_file_that_is_no_table_is_refused_with_a_sentence(content: bytes, complaint: str, tmp_path: Path) -> None:
    """With its name and what is wrong."""
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(WrongCall, match=complaint):
        read(path)
    with pytest.raises(WrongCall, match="cannot be read: No such file"):
        read(tmp_path / "absent.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_seen(separator: str, tmp_path: Path) -> None:
    """CSV as spreadsheets write it, with a byte-order mark."""
    flats().write_csv(tmp_path / "flats.csv", separator=separator, include_bom=True)
    assert read(tmp_path / "flats.csv").columns == ["size_m2", "floor", "district", "lift", "rent"]


def test_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    """The same table in both forms gives the same features and tensors."""
    frame = flats(district=["Süd", "", "Nord"] * 20)
    frame.write_csv(tmp_path / "flats.csv", quote_style="necessary")
    frame.write_parquet(tmp_path / "flats.parquet")
    plans = [learned(read(tmp_path / name)) for name in ("flats.csv", "flats.parquet")]
    assert plans[0][2].features == plans[1][2].features
    for one, other in zip(*(features.encode(table.columns).values() for table, _, features in plans), strict=True):
        np.testing.assert_array_equal(one, other)


# The target


@pytest.mark.parametrize(
    ("column", "task", "classes"),
    [
        (["yes", "no"] * 30, "binary", ("no", "yes")),
        ([True, False] * 30, "binary", ("false", "true")),
        ([0, 1] * 30, "binary", ("0", "1")),
        ([1.0, 0.0] * 30, "binary", ("0", "1")),
        ([10, 9, 2] * 20, "multiclass", ("2", "9", "10")),
        (["c", "a", "b"] * 20, "multiclass", ("a", "b", "c")),
        ([0.5, 1.5] * 30, "regression", None),
        (list(range(30)) * 2, "regression", None),
    ],
)
def test_the_task_is_inferred_from_the_target(column: list[Any], task: str, classes: tuple[str, ...] | None) -> None:
    """Text, booleans and few whole numbers are classes, in an order of their own; other numbers are a regression."""
    table = understand(flats(rent=column), target="rent", options=TableOptions())
    assert table.task == task
    if classes is None:
        assert isinstance(table.target, NumberTarget)
        np.testing.assert_array_equal(table.answers, np.array(column, dtype=np.float64))
    else:
        assert isinstance(table.target, ClassTarget)
        assert table.target.classes == classes
        said = [str(value).lower().removesuffix(".0") for value in column]
        assert [classes[answer] for answer in table.answers] == said


def test_the_task_can_be_chosen() -> None:
    """A grade from 1 to 5 is a number where the caller says so."""
    frame = flats(rent=[1, 2, 3, 4, 5] * 12)
    assert understand(frame, target="rent", options=TableOptions()).task == "multiclass"
    assert understand(frame, target="rent", options=TableOptions(task="regression")).task == "regression"


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    """Null and NaN alike; the other rows keep their own answers."""
    rent = [None if i % 6 == 0 else float("nan") if i == 1 else 10.5 * i for i in range(60)]
    flats(rent=rent, row=[i * 0.5 for i in range(60)]).write_parquet(tmp_path / "flats.parquet")
    table = understand(read(tmp_path / "flats.parquet"), target="rent", options=TableOptions())
    assert table.notes[0] == "11 row(s) without 'rent' were dropped"
    np.testing.assert_array_equal(table.answers, table.columns["row"].to_numpy() * 21)


# The split


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    seed=st.integers(0, 2**32 - 1),
    validation=st.floats(0.05, 0.4),
    test=st.sampled_from([0.0, 0.2, 0.4]),
)
def test_every_row_is_in_one_part_and_every_class_has_its_share(
    groups: list[int], seed: int, validation: float, test: float
) -> None:
    """Nobody is lost, nobody is seen twice, and a share differs by rounding only."""
    classes = np.repeat(np.array(groups), 3)  # three rows of each at least
    rows = np.arange(len(classes))[::-1].copy()
    parts = split_rows(classes, rows, seed=seed, validation=validation, test=test)
    everyone = np.concatenate([parts.training, parts.validation, parts.test])
    assert sorted(everyone.tolist()) == list(range(len(classes)))
    for group in set(groups):
        members = int((classes == group).sum())
        for part, share in ((parts.validation, validation), (parts.test, test)):
            count = int((classes[part] == group).sum())
            assert count == (max(1, round(share * members)) if share else 0)
        assert (classes[parts.training] == group).any()


def test_the_seed_decides_the_split() -> None:
    """The same seed gives the same rows, another seed gives others."""
    table = understand(flats(), target="rent", options=TableOptions())
    one, same, other = (split(table, seed=seed).test.tolist() for seed in (3, 3, 4))
    assert one == same
    assert one != other
