"""A sample becomes exactly the tensors that were meant, or a sentence that names every fault."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.errors import BadRequest, OutOfRange, RequestError, SeveralFaults, ShapeMismatch
from service.signature import (
    CategoricalFeature,
    ContinuousFeature,
    SampleReader,
    Signature,
    TensorSpec,
    accept_tensors,
)
from tests.bundles import AMOUNT_MEAN, HOUSINGS, PURPOSES, SAMPLE, signature

READER = SampleReader(signature())


def changed(**changes: Any) -> dict[str, Any]:
    return {**SAMPLE, **changes}


def test_a_sample_becomes_tensors_in_the_order_of_the_features() -> None:
    """The order of keys in the sample does not matter, the order of the signature does."""
    accepted = READER.accept(dict(reversed(SAMPLE.items())))
    continuous, categorical = accepted.tensors
    assert continuous.dtype == np.float32
    assert categorical.dtype == np.int64
    assert continuous.tolist() == [[41.0, 2500.5]]
    assert categorical.tolist() == [[2, 2]]  # education is second of PURPOSES, rent second of HOUSINGS; 0 is missing
    assert accepted.rows == 1
    assert accepted.served_as_missing == {}


@pytest.mark.parametrize(
    ("sample", "code", "sentence"),
    [
        ([SAMPLE], "wrong_type", 'the body is the list [{"age": 41, '),
        (
            {k: v for k, v in SAMPLE.items() if k != "age"},
            "missing_feature",
            "feature 'age' is missing; it takes a number",
        ),
        (
            {k: v for k, v in SAMPLE.items() if k != "housing"},
            "missing_feature",
            "feature 'housing' is missing; it takes one of 'own', 'rent'",
        ),
        (changed(agee=3), "unknown_feature", "the model has no feature 'agee'; did you mean 'age'?"),
        (
            changed(zzz=3),
            "unknown_feature",
            "the model has no feature 'zzz'; it takes 'age', 'purpose', 'amount', 'housing'",
        ),
        (changed(age="41"), "wrong_type", "feature 'age' is the string '41'; it takes a number"),
        (changed(age=True), "wrong_type", "feature 'age' is the boolean true; it takes a number"),
        (changed(age=None), "wrong_type", "feature 'age' is null; it takes a number"),
        (changed(age=[41]), "wrong_type", "feature 'age' is the list [41]; it takes a number"),
        (changed(amount="much"), "wrong_type", "feature 'amount' is the string 'much'; it takes a number or null"),
        (changed(purpose=2), "wrong_type", "feature 'purpose' is the number 2; it takes one of"),
        (changed(age=1e39), "out_of_range", "feature 'age' is 1e+39, which is out of range"),
        (changed(age=-(10**5000)), "out_of_range", "feature 'age' is an integer of 16610 bits, which is out of range"),
        (changed(age=float("nan")), "out_of_range", "feature 'age' is nan, which is out of range"),
        (changed(age=float("inf")), "out_of_range", "feature 'age' is inf, which is out of range"),
    ],
)
def test_what_does_not_fit_is_named(sample: object, code: str, sentence: str) -> None:
    """The sentence says which feature, what came, what was wanted."""
    with pytest.raises(BadRequest) as caught:
        READER.accept(sample)
    assert caught.value.code == code
    assert sentence in str(caught.value)


def test_all_faults_come_at_once() -> None:
    """A caller mends a sample in one go, not one fault at a time."""
    with pytest.raises(SeveralFaults) as caught:
        READER.accept({"age": "x", "amount": 1e39, "porpose": "car", "housing": "own"})
    text = str(caught.value)
    assert "4 places" in text
    for part in ("(1) feature 'age'", "'purpose' is missing", "'amount' is 1e+39", "did you mean 'purpose'?"):
        assert part in text


def test_a_hostile_sample_gets_a_short_sentence() -> None:
    """What a client sends is clipped before it is repeated."""
    with pytest.raises(SeveralFaults) as caught:
        READER.accept({**SAMPLE, **{"x" * 10_000 + str(i): 1 for i in range(1000)}, "age": "y" * 10_000})
    assert len(str(caught.value)) < 4000
    assert "does not fit in 12 places" in str(caught.value)  # one age, ten names, and 990 more names


@pytest.mark.parametrize("more", [{}, {"amount": None}], ids=["complete", "with a null"])
def test_a_number_is_rounded_to_the_nearest_float32_up_to_the_greatest(more: dict[str, Any]) -> None:
    """Whichever way it is read: halfway to what would be the next one is too far."""
    greatest = float(np.finfo(np.float32).max)
    for value in (greatest, 3.4028235677973362e38):
        assert READER.accept(changed(age=value, **more)).tensors[0][0, 0] == greatest
    with pytest.raises(OutOfRange, match=re.escape("feature 'age' is 3.4028235677973366e+38, which is out of range")):
        READER.accept(changed(age=3.4028235677973366e38, **more))


def test_an_unknown_category_is_served_as_missing_and_said() -> None:
    accepted = READER.accept(changed(purpose="space travel"))
    assert accepted.tensors[1].tolist() == [[0, 2]]
    assert accepted.served_as_missing == {"purpose": "space travel"}


def test_an_unknown_category_is_not_echoed_without_end() -> None:
    assert READER.accept(changed(purpose="x" * 10**6)).served_as_missing == {"purpose": "x" * 200}


def test_null_is_what_the_signature_says() -> None:
    """For a category null is 'missing', for a number it is the value that training put there."""
    accepted = READER.accept(changed(purpose=None, amount=None))
    assert accepted.tensors[0].tolist() == [[41.0, AMOUNT_MEAN]]
    assert accepted.tensors[1].tolist() == [[0, 2]]
    assert accepted.served_as_missing == {}


@given(
    age=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(2**100), 2**100),
    amount=st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38) | st.none(),
    purpose=st.sampled_from(PURPOSES) | st.text() | st.none(),
    housing=st.sampled_from(HOUSINGS) | st.none(),
)
def test_every_sample_of_the_right_types_fits(age: float, amount: float | None, purpose: str, housing: str) -> None:
    """Whatever is accepted is finite and inside the tables."""
    continuous, categorical = READER.accept(
        {"age": age, "amount": amount, "purpose": purpose, "housing": housing}
    ).tensors
    assert np.isfinite(continuous).all()
    assert ((categorical >= 0) & (categorical <= [[len(PURPOSES), len(HOUSINGS)]])).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*SAMPLE, "other"]), inner, max_size=5),
    max_leaves=8,
)


@given(JSON)
def test_nothing_that_json_can_say_breaks_the_reader(sample: object) -> None:
    """Any value is accepted or is a RequestError; nothing else is raised."""
    with contextlib.suppress(RequestError):
        READER.accept(sample)


def test_a_signature_must_fill_its_tensors() -> None:
    """A passport whose features and tensors disagree is not one."""
    fields = signature().model_dump()
    with pytest.raises(ValidationError, match="the features fill tensors"):
        Signature.model_validate({**fields, "features": fields["features"][:3]})
    with pytest.raises(ValidationError, match="two features have the same name"):
        Signature.model_validate({**fields, "features": [*fields["features"][:3], fields["features"][1]]})


def test_only_continuous_or_only_categorical_features() -> None:
    """A model without one of the two kinds has one tensor, and no empty one."""
    output = TensorSpec(name="value", datatype="FP32", shape=(-1, 1))
    numbers = Signature(
        inputs=(TensorSpec(name="continuous", datatype="FP32", shape=(-1, 1)),),
        outputs=(output,),
        features=(ContinuousFeature(name="age"),),
        target=signature(regression=True).target,
    )
    assert [array.tolist() for array in SampleReader(numbers).accept({"age": 3}).tensors] == [[[3.0]]]
    words = Signature(
        inputs=(TensorSpec(name="categorical", datatype="INT64", shape=(-1, 1)),),
        outputs=(output,),
        features=(CategoricalFeature(name="colour", categories=("blue", "red")),),
        target=signature(regression=True).target,
    )
    assert [array.tolist() for array in SampleReader(words).accept({"colour": "red"}).tensors] == [[[2]]]


def rows(count: int) -> dict[str, Any]:
    return {"continuous": np.zeros((count, 2), np.float32), "categorical": np.zeros((count, 2), np.int64)}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({**rows(1), "extra": np.zeros((1, 1))}, "no input 'extra'; it has 'continuous', 'categorical'"),
        ({"continuous": rows(1)["continuous"]}, "input 'categorical' is missing"),
        (
            {**rows(1), "continuous": np.zeros((1, 3), np.float32)},
            "'continuous' has shape [1, 3]; the model takes [-1, 2]",
        ),
        ({**rows(1), "continuous": np.zeros(2, np.float32)}, "'continuous' has shape [2]; the model takes [-1, 2]"),
        ({**rows(2), "categorical": rows(3)["categorical"]}, "'categorical' has 3 rows"),
        (rows(0), "has no rows; send at least one"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        accept_tensors(signature(), tensors)
    assert sentence in str(caught.value)
    assert isinstance(caught.value, BadRequest | ShapeMismatch)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_a_feature_is_refused(index: int) -> None:
    """A lookup takes -1 from the end of its table without a word; here it is a sentence."""
    tensors = rows(3)
    tensors["categorical"][1, 0] = index
    with pytest.raises(OutOfRange, match=rf"feature 'purpose' .* is {index}, .* 0 for missing, or 1 to 3"):
        accept_tensors(signature(), tensors)
