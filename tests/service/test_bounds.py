"""A request that is wrong costs no more than one that is right, however much is wrong with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from service.repository import Repository
from tests.asking import ask, identity_model, loaded, save
from tests.bundles import SAMPLE, write_table_bundle


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models: Path = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="table")
    save(models, "plain", identity_model({"x": ("FP32", ["batch", 2])}))
    save(models, "half", identity_model({"x": ("FP16", ["batch", 2])}))
    return loaded(models)


def test_of_many_unknown_features_the_first_are_told_and_the_others_counted(repository: Repository) -> None:
    """To suggest another name takes a while."""
    sample = {**SAMPLE, **{f"amuont_{i}": 1 for i in range(20_000)}}
    start = time.perf_counter()
    answer = ask(repository, "POST", "/models/table/predict", sample)
    assert time.perf_counter() - start < 2
    assert answer.status_code == 400
    assert "did you mean 'amount'" in answer.json()["error"]
    assert "does not fit in 11 places" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": [{"name": "x"}] * 100}, "'inputs' has 100 tensors; the model takes 1"),
        ({"outputs": [{"name": "x_out"}] * 100}, "'outputs' has 100 objects; the model has 1 outputs"),
        ({"parameters": {str(i): 1 for i in range(101)}}, "'parameters' of the request has 101 entries; it takes 100"),
    ],
)
def test_lists_that_are_far_too_long_are_not_read(repository: Repository, body: dict[str, Any], said: str) -> None:
    whole = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    answer = ask(repository, "POST", "/v2/models/plain/infer", {**whole, **body})
    assert (answer.status_code, answer.json()["error"]) == (400, said)


def test_a_model_that_json_cannot_hold_does_not_take_the_document_away(repository: Repository) -> None:
    """It is documented without an example; the others keep theirs."""
    document = ask(repository, "GET", "/openapi.json").json()
    half = document["paths"]["/v2/models/half/infer"]["post"]["requestBody"]["content"]["application/json"]
    table = document["paths"]["/v2/models/table/infer"]["post"]["requestBody"]["content"]["application/json"]
    assert "example" not in half
    assert "example" in table
