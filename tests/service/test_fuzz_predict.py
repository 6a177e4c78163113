"""Samples of named features, good ones and damaged ones: the answer of the network by the book, or a refusal in words.

Complete samples are read in one go, others feature by feature; what an accepted one means is found a second time here,
by Python's own parser, and answered by the network in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest, NotFinite
from service.protocol import predict
from service.repository import Live
from service.signature import SampleReader
from tests.asking import loaded
from tests.bundles import (
    AMOUNT_MEAN,
    HOUSINGS,
    PURPOSES,
    SAMPLE,
    logits,
    probabilities,
    write_table_bundle,
)
from tests.fuzzing import (
    AS_LONG_AS_IT_TAKES,
    TO_JSON,
    Changes,
    add_a_pair,
    change_case,
    changed,
    changes,
    fuzzed,
    give_twice,
    leave_out,
    nest,
    put_a_number,
    put_a_value,
    swap,
)
from tests.service.test_fuzz_json import Refused, in_words, strictly

pytestmark = AS_LONG_AS_IT_TAKES


@pytest.fixture(scope="module")
def credit(tmp_path_factory: pytest.TempPathFactory) -> Live:
    models: Path = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    return loaded(models).live("credit")


ONE_FAULT = (put_a_number, put_a_value, put_a_value, add_a_pair, give_twice, leave_out, nest, swap, change_case)

NUMBERS = ["41", "0", "-0", "2500.5", "1e3", "1E-7", "5e-324", "16777217", "-12.25", "18446744073709551616", "3e38"]
AMOUNTS = [*NUMBERS, "null"]
WORDS = ["null", '"space travel"', '"\\u0063ar"', '""', '"car "', '"a:b"', '"\\"\\\\"', '"' + "ä" * 300 + '"']


@st.composite
def samples(draw: st.DrawFn) -> str:
    """A good one, in one of many spellings."""
    parts = [
        f'"age": {draw(st.sampled_from(NUMBERS))}',
        f'"amount": {draw(st.sampled_from(AMOUNTS))}',
        f'"purpose": {draw(st.sampled_from([json.dumps(word) for word in PURPOSES] + WORDS))}',
        f'"housing": {draw(st.sampled_from([json.dumps(word) for word in HOUSINGS] + WORDS))}',
    ]
    joint = draw(st.sampled_from([", ", ",", " ,\n"]))
    return "{" + joint.join(draw(st.permutations(parts))) + "}"


class Read(NamedTuple):
    """What was read of a sample, numbers by their bits."""

    continuous: bytes
    categorical: list[int]
    served_as_missing: dict[str, str]


def outcome(live: Live, body: bytes, *, quick: bool) -> tuple[Read, predict.PredictRequest] | Refused:
    """Any exception but a refusal fails the test."""
    with pytest.MonkeyPatch.context() as patch:
        if not quick:
            patch.setattr(SampleReader, "_complete", lambda *_: None)
        try:
            request = predict.parse(live, body)
        except BadRequest as refused:
            return in_words(refused)
    continuous, categorical = request.accepted.tensors
    assert continuous.dtype == np.float32
    assert categorical.dtype == np.int64
    assert continuous.shape == categorical.shape == (1, 2)
    return Read(continuous.tobytes(), categorical[0].tolist(), dict(request.accepted.served_as_missing)), request


def meaning(sample: dict[str, Any]) -> Read:
    """An accepted sample by the words of the signature."""
    assert sample.keys() == SAMPLE.keys()
    numbers = [sample["age"], AMOUNT_MEAN if sample["amount"] is None else sample["amount"]]
    assert all(type(number) in (int, float) for number in numbers)
    continuous = np.array([numbers], dtype=np.float64).astype(np.float32)
    assert np.isfinite(continuous).all()
    indices, missing = [], {}
    for name, categories in (("purpose", PURPOSES), ("housing", HOUSINGS)):
        word = sample[name]
        assert word is None or type(word) is str
        indices.append(categories.index(word) + 1 if word in categories else 0)
        if word is not None and word not in categories:
            missing[name] = word[:200]
    return Read(continuous.tobytes(), indices, missing)


def check(live: Live, body: bytes) -> bool:
    """Whether it was accepted; then everything about its answer holds."""
    careful, quick = outcome(live, body, quick=False), outcome(live, body, quick=True)
    assert quick[0] == careful[0]
    if isinstance(quick, Refused):
        assert quick == careful
        return False
    read, request = quick
    assert read == meaning(strictly(body))
    outputs = live.admitted.runtime.run(request.accepted.tensors)
    try:
        answer = json.loads(request.render(outputs)[0])
    except NotFinite:
        assert max(map(abs, np.frombuffer(read.continuous, dtype=np.float32))) > 1e30
        return True
    assert (answer["model"], answer["version"]) == ("credit", "1")
    assert answer.get("served_as_missing", {}) == read.served_as_missing
    continuous, categorical = request.accepted.tensors
    wanted = probabilities_by_the_book(continuous.astype(np.float64), categorical)
    got = answer["probabilities"]
    assert list(got) == ["bad", "good"]
    assert got[answer["label"]] == max(got.values())
    # five-term sums in float32: 8 roundings of 2^-24 of the greatest logit
    scale = float(np.abs(logits(continuous.astype(np.float64), categorical)).max())
    if 8 * 2.0**-24 * scale < 0.01:
        np.testing.assert_allclose(list(got.values()), wanted, rtol=0, atol=1e-6 + 8 * 2.0**-24 * scale)
    return True


def probabilities_by_the_book(continuous: Any, categorical: Any) -> list[float]:
    raised = logits(continuous, categorical)
    if np.abs(raised).max() < 300:
        return list(probabilities(continuous, categorical)[0])
    best = raised[0].argmax()  # exp would overflow
    return [float(i == best) for i in range(2)]


@fuzzed(80)
@given(samples())
def test_a_good_sample_is_answered_as_the_network_computes(credit: Live, sample: str) -> None:
    assert check(credit, sample.encode())


@fuzzed(100)
@given(samples(), st.lists(changes(ONE_FAULT, most=1), min_size=8, max_size=8))
def test_one_fault_in_a_sample_is_found_either_way(credit: Live, sample: str, each: list[Changes]) -> None:
    """A feature missing, misspelt, twice or of another type, one too many, a number too large."""
    for made in each:
        check(credit, changed(sample.encode(), made))


@fuzzed(120)
@given(samples(), st.lists(changes(TO_JSON), min_size=6, max_size=6))
def test_a_damaged_sample_is_refused_or_means_what_it_says(credit: Live, sample: str, each: list[Changes]) -> None:
    """Read at once or feature by feature: the same tensors, or a refusal in the same words."""
    for made in each:
        check(credit, changed(sample.encode(), made))


@fuzzed(50)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_anything_is_refused_in_words(credit: Live, body: bytes) -> None:
    assert not check(credit, body)


@pytest.mark.parametrize("row", [[np.nan, 1.0], [np.inf, 0.0], [np.inf, -np.inf]])
def test_an_answer_that_is_no_number_is_refused(credit: Live, row: list[float]) -> None:
    """This network is too tame to give one."""
    request = predict.parse(credit, json.dumps(SAMPLE).encode())
    with pytest.raises(NotFinite):
        request.render([np.array([row], dtype=np.float32)])
