"""The document of the API as a developer reads it: everything has words, and every example in it works as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from service.openapi import LARGEST_EXAMPLE_BYTES
from service.repository import Repository
from tests import graphs
from tests.asking import ask, identity_model, loaded, save
from tests.bundles import write_table_bundle

Document = dict[str, Any]


def image_model() -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["y"]),
    ]
    return graphs.model(nodes, {}, x=(TensorProto.FLOAT, ["batch", 3, 96, 96]), y=["batch", 3])


def many_model() -> onnx.ModelProto:
    """Little goes in and much comes out."""
    weight = np.ones((1, LARGEST_EXAMPLE_BYTES), np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    return graphs.model([node], {"w": weight}, x=(TensorProto.FLOAT, ["batch", 1]), y=["batch", weight.size])


@pytest.fixture(scope="module", params=["one model", "several"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit", version="3")
    if request.param == "several":
        write_table_bundle(models, name="rate", regression=True)
        save(models, "norm", graphs.batchnorm_model())
        save(models, "halves", identity_model({"x": ("FP16", ["batch", 3])}))
        save(models, "words", identity_model({"x": ("BYTES", ["batch", 2])}))
        save(models, "pixels", image_model())
        save(models, "many", many_model())
    return loaded(models)


@pytest.fixture
def document(repository: Repository) -> Document:
    said: Document = ask(repository, "GET", "/openapi.json").json()
    return said


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def example_of(operation: Document) -> Any:
    content = operation.get("requestBody", {}).get("content", {})
    return content.get("application/json", {}).get("example")


def test_every_operation_has_its_place_and_its_words(document: Document) -> None:
    names = [tag["name"] for tag in document["tags"]]
    assert names == ["Predict", "Open Inference Protocol", "Health", "Model repository", "Metrics"]
    assert all(tag["description"] for tag in document["tags"])
    summaries = []
    for method, path, operation in operations(document):
        (tag,) = operation["tags"]
        assert tag in names, (method, path)
        summaries.append(operation["summary"])
        assert len(operation["summary"].split()) > 2, (method, path)
        assert operation["responses"]["200"]["description"], (method, path)
        assert all("example" in parameter for parameter in operation.get("parameters", []) if parameter["in"] == "path")
    shared = len(document["paths"].keys() & {"/predict"})  # the short route is the same operation
    assert len(set(summaries)) == len(summaries) - shared


OF_MODELS = {"404", "503"}
OF_BODIES = {"400", "413", "415"}
ERRORS = {
    "/v2": set(),
    "/v2/health/live": set(),
    "/v2/health/ready": {"503"},
    "/v2/models/stats": {"503"},
    "/metrics": {"503"},
    "/v2/repository/index": OF_BODIES,
    "/v2/repository/models/{model}/load": {"403"} | OF_BODIES | OF_MODELS,
    "/v2/repository/models/{model}/unload": {"403"} | OF_BODIES | OF_MODELS,
    "/v2/repository/models/{model}/aliases": {"404"},
    "/v2/repository/models/{model}/aliases/{alias}": {"403"} | OF_BODIES | OF_MODELS,
}
"""By path; of a model that is asked for something {404, 503}, of predictions all that follow."""
OF_PREDICTIONS = {"408", "429", "431", "500", "504"} | OF_BODIES | OF_MODELS


def wanted(path: str) -> set[str]:
    if path.endswith(("/predict", "/infer")):
        return OF_PREDICTIONS
    return set(ERRORS.get(path, OF_MODELS))


def test_every_operation_names_all_its_errors(document: Document) -> None:
    """Those of any request at all are in the words at the top."""
    for method, path, operation in operations(document):
        assert operation["responses"].keys() - {"200"} == wanted(path), (method, path)
    assert all(f"({status})" in document["info"]["description"] for status in (400, 405, 408, 431, 500))


def test_every_example_works_as_it_stands(repository: Repository, document: Document) -> None:
    """Each operation is asked with the names, the path and the body that the document gives; its answer is the one that
    stands there, where one does. Unloading comes last."""
    asked = 0
    for method, path, operation in sorted(operations(document), key=lambda it: ("unload" in it[1], it[0] == "DELETE")):
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
        body = example_of(operation)
        if method in ("POST", "PUT") and body is None:
            continue
        answer = ask(repository, method, path, b"" if body is None else body)
        assert answer.status_code == 200, (method, path, answer.text)
        if "example" in (said := operation["responses"]["200"].get("content", {}).get("application/json", {})):
            assert answer.json() == said["example"], path
        asked += 1
    assert asked > 20
    assert ask(repository, "POST", "/v2/repository/models/credit/load").status_code == 200


def test_what_no_json_can_hold_or_nobody_reads_is_no_example(repository: Repository, document: Document) -> None:
    """Half precision, which goes in binary, and images, which would be most of the document."""
    if len(repository.models) == 1:
        return
    without = [
        path for _, path, operation in operations(document) if "/infer" in path and example_of(operation) is None
    ]
    assert without == ["/v2/models/halves/infer", "/v2/models/pixels/infer"]
    many = document["paths"]["/v2/models/many/infer"]["post"]
    assert example_of(many) is not None
    assert "example" not in many["responses"]["200"]["content"]["application/json"]
    assert len(ask(repository, "GET", "/openapi.json").content) < 8 * LARGEST_EXAMPLE_BYTES


def test_statistics_say_since_when_they_count(document: Document) -> None:
    for path in ("/v2/models/stats", "/v2/models/{model}/stats", "/v2/models/{model}/versions/{version}/stats"):
        assert "a restart begins at zero" in document["paths"][path]["get"]["description"]


def test_an_inference_names_its_tensors(document: Document) -> None:
    described = document["paths"]["/v2/models/credit/infer"]["post"]["description"]
    assert (
        "Takes `continuous` FP32 [any, 2], `categorical` INT64 [any, 2]; gives `probabilities` FP32 [any, 2]"
        in described
    )
