"""Every answer over HTTP: predictions, health, metadata, documentation, and every refusal with its status and code."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest

from service.app import create_app
from service.errors import NotFinite
from service.protocol import predict
from service.repository import Repository, load
from service.runtime import place
from service.settings import Settings
from tests import graphs
from tests.bundles import SAMPLE, probabilities, write_table_bundle

LIMIT_BYTES = 4000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    return loaded(models)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A table model, a regression, a plain tensor model, an embedding, and one that is refused."""
    models = tmp_path_factory.mktemp("several")
    write_table_bundle(models, name="credit")
    write_table_bundle(models, name="rate", regression=True)
    for name, model in {
        "norm": graphs.batchnorm_model(),
        "lookup": graphs.embedding_model(),
        "sick": graphs.batchnorm_model(training=True),
    }.items():
        (models / name / "1").mkdir(parents=True)
        onnx.save(model, models / name / "1" / "model.onnx")
    return loaded(models)


def loaded(models: Path) -> Repository:
    return load(models, place("cpu"), Settings(threads=1, max_batch_rows=16))


Scenario = Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]


def talk(repository: Repository, scenario: Scenario) -> Any:
    async def conversation() -> Any:
        app = create_app(repository, Settings(body_limit_bytes=LIMIT_BYTES))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await scenario(client)

    return asyncio.run(conversation())


def get(repository: Repository, path: str) -> httpx.Response:
    return talk(repository, lambda client: client.get(path))  # type: ignore[no-any-return]


def post(repository: Repository, path: str, content: Any, **headers: str) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return talk(repository, lambda client: client.post(path, content=body, headers=headers))  # type: ignore[no-any-return]


def expected() -> tuple[float, float]:
    continuous = np.array([[SAMPLE["age"], SAMPLE["amount"]]])
    bad, good = probabilities(continuous, np.array([[2, 2]]))[0]
    return float(bad), float(good)


@pytest.mark.parametrize("path", ["/predict", "/models/credit/predict"])
def test_a_sample_is_answered_with_label_and_probabilities(repository: Repository, path: str) -> None:
    response = post(repository, path, SAMPLE)
    answer = response.json()
    bad, good = expected()
    assert response.status_code == 200
    assert answer == {
        "label": "good" if good > bad else "bad",
        "probabilities": {"bad": pytest.approx(bad, abs=1e-6), "good": pytest.approx(good, abs=1e-6)},
        "model": "credit",
        "version": "1",
    }


def test_the_label_is_the_likeliest_class(repository: Repository) -> None:
    """For samples on both sides."""
    labels = set()
    for housing in ("own", "rent"):
        answer = post(repository, "/predict", {**SAMPLE, "housing": housing}).json()
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        labels.add(answer["label"])
    assert labels == {"bad", "good"}


def test_the_probabilities_are_the_exact_float32_values(repository: Repository) -> None:
    """No decimal rounding on the way: what JSON says is the very number the graph computed."""
    live = repository.only()
    assert live.reader is not None
    wanted = live.admitted.runtime.run(live.reader.accept(SAMPLE).tensors)[0][0]
    answer = post(repository, "/predict", SAMPLE).json()
    assert list(answer["probabilities"].values()) == [float(value) for value in wanted]


def test_an_unknown_category_is_served_and_said(repository: Repository) -> None:
    answer = post(repository, "/predict", {**SAMPLE, "purpose": "space travel"}).json()
    assert answer["served_as_missing"] == {"purpose": "space travel"}
    missing = post(repository, "/predict", {**SAMPLE, "purpose": None}).json()
    assert missing["probabilities"] == answer["probabilities"]
    assert "served_as_missing" not in missing


def test_a_regression_answers_a_value(several: Repository) -> None:
    answer = post(several, "/models/rate/predict", SAMPLE).json()
    assert set(answer) == {"value", "model", "version"}
    assert isinstance(answer["value"], float)


@pytest.mark.parametrize(
    ("body", "status", "code", "sentence"),
    [
        (b"", 400, "malformed_json", "the body is not valid JSON: it is empty"),
        (b"{", 400, "malformed_json", "at line 1 column 2"),
        (b'{"age": NaN}', 400, "malformed_json", "JSON has no NaN or Infinity; null stands for a missing value"),
        (b'{"age": 1e400}', 400, "malformed_json", "number is infinity"),
        (b"\xff\xfe", 400, "malformed_json", "the body is not valid JSON"),
        (b"[" * 2000, 400, "malformed_json", "depth limit"),
        (b"[]", 400, "wrong_type", "the body is the list []; it takes one JSON object"),
        ({**SAMPLE, "age": "x"}, 400, "wrong_type", "feature 'age' is the string 'x'"),
        ({**SAMPLE, "age": 1e39}, 400, "out_of_range", "feature 'age' is 1e+39"),
        ({**SAMPLE, "colour": 1}, 400, "unknown_feature", "no feature 'colour'"),
        ({"age": 1, "amount": 1, "purpose": "car"}, 400, "missing_feature", "feature 'housing' is missing"),
        ({}, 400, "several_faults", "4 places"),
        (b" " * (LIMIT_BYTES + 1), 413, "body_too_large", f"larger than {LIMIT_BYTES} bytes"),
    ],
)
def test_a_bad_body_is_the_callers_fault(
    repository: Repository, body: Any, status: int, code: str, sentence: str
) -> None:
    """Each has its status, its code and a sentence; never a 500, never a guess."""
    response = post(repository, "/predict", body)
    answer = response.json()
    assert (response.status_code, answer["code"]) == (status, code)
    assert sentence in answer["error"]
    assert set(answer) == {"error", "code"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_not_a_number_is_not_given(repository: Repository, value: float) -> None:
    """A network that overflows on absurd input gives a sentence, not a label chosen among NaN."""
    request = predict.parse(repository.only(), json.dumps(SAMPLE).encode())
    with pytest.raises(NotFinite, match="not a finite number"):
        request.render([np.array([[0.5, value]], dtype=np.float32)])


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_another_content_type_is_refused(repository: Repository, content_type: str) -> None:
    response = post(repository, "/predict", SAMPLE, content_type=content_type)
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert f"'{content_type}'" in response.json()["error"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", ""])
def test_json_by_any_spelling_is_taken(repository: Repository, content_type: str) -> None:
    assert post(repository, "/predict", SAMPLE, content_type=content_type).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/models/nope/predict", 404, "unknown_model"),
        ("POST", "/v2/models/nope/infer", 404, "unknown_model"),
        ("POST", "/v2/models/credit/versions/7/infer", 404, "unknown_version"),
        ("GET", "/v2/models/nope", 404, "unknown_model"),
        ("GET", "/v2/models/credit/versions/7", 404, "unknown_version"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v2/health/live/", 404, "not_found"),
        ("GET", "/predict", 405, "method_not_allowed"),
        ("DELETE", "/v2/models/credit/infer", 405, "method_not_allowed"),
        ("POST", "/v2/health/live", 405, "method_not_allowed"),
        ("POST", "/models/sick/predict", 503, "not_ready"),
        ("GET", "/v2/models/sick/ready", 503, "not_ready"),
        ("POST", "/predict", 404, "not_found"),
    ],
)
def test_a_wrong_route_is_named(several: Repository, method: str, path: str, status: int, code: str) -> None:
    response = talk(several, lambda client: client.request(method, path, json=SAMPLE))
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert set(response.json()) == {"error", "code"}
    if status == 405:
        assert response.headers["allow"]


def test_a_tensor_model_says_how_it_is_called(several: Repository) -> None:
    response = post(several, "/models/norm/predict", SAMPLE)
    assert response.status_code == 400
    assert "call POST /v2/models/norm/infer" in response.json()["error"]


def test_several_models_must_be_named(several: Repository) -> None:
    sentence = post(several, "/predict", SAMPLE).json()["error"]
    assert "several models are served" in sentence
    assert "'credit'" in sentence
    assert "'sick'" not in sentence


def test_a_body_that_lies_about_its_length_is_cut_off(repository: Repository) -> None:
    """The limit holds for what arrives, not only for what was declared."""

    async def chunks() -> Any:
        for _ in range(LIMIT_BYTES // 100 + 2):
            yield b" " * 100

    response = talk(repository, lambda client: client.post("/predict", content=chunks()))
    assert response.status_code == 413


@pytest.mark.parametrize(("declared", "read"), [(str(10**9), 0), (None, 5), ("0", 5), ("-1", 5), ("x", 5)])
def test_a_body_over_the_limit_is_not_read_to_its_end(repository: Repository, declared: str | None, read: int) -> None:
    """Nothing of it where its length was declared, else as far as the limit: the sender cannot fill the memory."""
    chunks_read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal chunks_read
        chunks_read += 1
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    if declared is not None:
        headers.append((b"content-length", declared.encode()))
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    asyncio.run(create_app(repository, Settings(body_limit_bytes=LIMIT_BYTES))(scope, receive, send))
    assert sent[0]["status"] == 413
    assert chunks_read == read


@pytest.mark.parametrize("path", ["/v2", "/metrics", "/docs", "/nowhere"])
def test_head_has_no_body_whatever_the_server_makes_of_one(repository: Repository, path: str) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": path, "headers": [], "query_string": b""}
    asyncio.run(create_app(repository, Settings())(scope, receive, send))
    start, *rest = sent
    assert int(dict(start["headers"])[b"content-length"]) > 0
    assert rest
    assert not any(message["body"] for message in rest)


def test_every_answer_has_a_request_id(repository: Repository) -> None:
    """The caller's own if it sent one that is safe to write in a log, else a new one, on every route."""
    assert post(repository, "/predict", SAMPLE, x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    assert post(repository, "/predict", b"{", x_request_id="abc-2").headers["x-request-id"] == "abc-2"
    made = {get(repository, "/v2/health/live").headers["x-request-id"] for _ in range(2)}
    made.add(get(repository, "/nowhere").headers["x-request-id"])
    made.add(post(repository, "/predict", SAMPLE, x_request_id="a b").headers["x-request-id"])
    assert len(made) == 4
    assert "a b" not in made


def test_what_fails_inside_is_ours_and_says_nothing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A 500 has a constant body; the reason is in the log beside the request id."""

    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("service.protocol.predict.PredictRequest.render", broken)
    response = post(repository, "/predict", SAMPLE, x_request_id="find-me")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "secret" not in response.text
    assert "find-me" in caplog.text
    assert "secret detail" in caplog.text


def infer(**tensors: Any) -> dict[str, Any]:
    return {"inputs": [{"name": name, **tensor} for name, tensor in tensors.items()]}


X: dict[str, Any] = {"shape": [2, 3], "datatype": "FP32", "data": [4.0, -2.5, 41, 5.5, -3, 39.5]}


def x(**changes: Any) -> dict[str, Any]:
    return infer(x={**X, **changes})


@pytest.mark.parametrize("data", [X["data"], [X["data"][:3], X["data"][3:]]], ids=["flat", "nested"])
@pytest.mark.parametrize("path", ["/v2/models/norm/infer", "/v2/models/norm/versions/1/infer"])
def test_tensors_are_answered_with_tensors(several: Repository, path: str, data: list[Any]) -> None:
    response = post(several, path, {"id": "42", **x(data=data)})
    answer = response.json()
    assert response.status_code == 200
    assert {key: answer[key] for key in ("id", "model_name", "model_version")} == {
        "id": "42", "model_name": "norm", "model_version": "1",
    }  # fmt: skip
    (output,) = answer["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("y", [2, 3], "FP32")
    wanted = graphs.batchnorm_answer(np.array(X["data"]).reshape(2, 3)).reshape(-1)
    np.testing.assert_allclose(output["data"], wanted, rtol=0, atol=6 * 2**-24 * 300)


def test_the_id_is_echoed_only_if_given(several: Repository) -> None:
    assert "id" not in post(several, "/v2/models/norm/infer", x()).json()


def test_outputs_that_are_asked_for_are_answered(several: Repository) -> None:
    assert len(post(several, "/v2/models/norm/infer", {**x(), "outputs": [{"name": "y"}]}).json()["outputs"]) == 1
    assert post(several, "/v2/models/norm/infer", {**x(), "outputs": []}).json()["outputs"] == []


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        ([], "wrong_type", "the body is the list []"),
        ({}, "wrong_type", "'inputs' is missing; it takes a list of tensors"),
        ({"inputs": []}, "missing_tensor", "input 'x' is missing"),
        ({"inputs": [1]}, "wrong_type", "'inputs[0]' is the number 1"),
        ({"inputs": [{}]}, "wrong_type", "the name of 'inputs[0]' is missing"),
        (infer(z=X), "unknown_tensor", "no input 'z'; it has 'x'"),
        ({"inputs": [{"name": "x", **X}] * 2}, "bad_request", "given twice"),
        (x(datatype="FP64"), "datatype_mismatch", "datatype FP64; the model takes FP32"),
        (x(datatype=None), "datatype_mismatch", "the model takes FP32"),
        (x(shape=[2, 4]), "shape_mismatch", "6 values for shape [2, 4], which has 8; the model takes shape [-1, 3]"),
        (x(shape=[1, 6]), "shape_mismatch", "shape [1, 6]; the model takes [-1, 3]"),
        (x(shape=[6]), "shape_mismatch", "shape [6]; the model takes [-1, 3]"),
        (x(shape=[-2, -3]), "wrong_type", "a list of non-negative integers"),
        (x(shape=[2.0, 3]), "wrong_type", "a list of non-negative integers"),
        (x(shape=[2**40, 2**40]), "shape_mismatch", "elements"),
        (x(shape="2,3"), "wrong_type", "the shape of input 'x' is the string '2,3'"),
        (x(data=None), "wrong_type", "the data of input 'x' is null"),
        (x(data=[1, 2, 3, 4, 5, "6"]), "wrong_type", "value 5 of input 'x' is the string '6'; it takes numbers (FP32)"),
        (x(data=[1, 2, 3, 4, 5, True]), "wrong_type", "value 5 of input 'x' is the boolean true"),
        (x(data=[1, 2, 3, 4, 5, None]), "wrong_type", "value 5 of input 'x' is null"),
        (x(data=[1, 2, 3, 4, 5, 1e39]), "out_of_range", "value 5 of input 'x' is 1e+39"),
        (x(data=[[1, 2, 3], [4, 5]]), "shape_mismatch", "ragged data"),
        (x(data=[[1, 2, 3], 4]), "shape_mismatch", "ragged data"),
        (x(data=[[[1, 2, 3]], [[4, 5, 6]]]), "shape_mismatch", "ragged data"),
        (x(shape=[0, 3], data=[]), "bad_request", "no rows"),
        ({**x(), "id": 3}, "wrong_type", "'id' is the number 3"),
        ({**x(), "outputs": {}}, "wrong_type", "'outputs' is the object {}"),
        ({**x(), "outputs": [{"name": "z"}]}, "unknown_tensor", "no output 'z'; it has 'y'"),
        ({**x(), "outputs": ["y"]}, "wrong_type", "'outputs[0]' is the string 'y'"),
    ],
)
def test_an_inference_request_that_does_not_fit_is_named(
    several: Repository, request_: Any, code: str, sentence: str
) -> None:
    response = post(several, "/v2/models/norm/infer", request_)
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert sentence in response.json()["error"]


@pytest.mark.parametrize("index", [-5, 4, 2**63 - 1])
def test_a_value_that_the_graph_cannot_take_is_the_callers_fault(several: Repository, index: int) -> None:
    """An index outside an embedding is a 400 with the engine's own reason, not a 500."""
    request = infer(x={"shape": [1, 1], "datatype": "INT64", "data": [index]})
    response = post(several, "/v2/models/lookup/infer", request)
    assert (response.status_code, response.json()["code"]) == (400, "rows_rejected")


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1.5])
def test_an_integer_is_never_rounded_and_never_wraps(several: Repository, value: float) -> None:
    request = infer(x={"shape": [1, 1], "datatype": "INT64", "data": [value]})
    assert post(several, "/v2/models/lookup/infer", request).json()["code"] in ("out_of_range", "wrong_type")


def test_health(several: Repository) -> None:
    assert get(several, "/v2/health/live").json() == {"live": True}
    assert get(several, "/v2/health/ready").json() == {"ready": True}
    assert get(several, "/v2/models/credit/ready").json() == {"name": "credit", "ready": True}
    assert get(several, "/v2/models/credit/versions/1/ready").status_code == 200


def test_without_a_model_the_server_is_alive_and_not_ready() -> None:
    empty = Repository([], path=Path(), placement=place("cpu"), settings=Settings())
    assert get(empty, "/v2/health/live").status_code == 200
    assert (get(empty, "/v2/health/ready").status_code, post(empty, "/predict", SAMPLE).status_code) == (503, 503)


def test_metadata_says_what_admission_measured(several: Repository) -> None:
    server = get(several, "/v2").json()
    assert server["name"] == "evalmode"
    metadata = get(several, "/v2/models/credit").json()
    assert metadata["name"] == "credit"
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"][0] == {"name": "continuous", "datatype": "FP32", "shape": [-1, 2]}
    measured = metadata["evalmode"]
    assert measured["provider"] == "CPUExecutionProvider"
    assert measured["golden"]["rows"] == 12
    assert 0 < measured["golden"]["differences"]["probabilities"] <= measured["golden"]["tolerances"]["probabilities"]
    assert measured["independence"]["kind"] in ("exact", "bounded")
    assert get(several, "/v2/models/norm").json()["evalmode"]["golden"] is None


def test_the_index_names_the_refused_with_its_reason(several: Repository) -> None:
    index = {entry["name"]: entry for entry in post(several, "/v2/repository/index", {}).json()}
    assert index["credit"]["state"] == "READY"
    assert index["sick"]["state"] == "UNAVAILABLE"
    assert "training mode" in index["sick"]["reason"]


def test_openapi_types_each_model(several: Repository) -> None:
    """Feature names, categories, and an example that works as printed."""
    document = get(several, "/openapi.json").json()
    assert "/predict" not in document["paths"]  # with several models it would be refused
    operation = document["paths"]["/models/credit/predict"]["post"]
    request, answer = (
        part["content"]["application/json"] for part in (operation["requestBody"], operation["responses"]["200"])
    )
    assert post(several, "/models/credit/predict", request["example"]).json() == answer["example"]
    sample = document["components"]["schemas"]["credit.Sample"]
    assert sample["required"] == ["age", "purpose", "amount", "housing"]
    assert sample["properties"]["age"]["type"] == "number"
    assert sample["properties"]["amount"]["type"] == ["number", "null"]
    assert sample["properties"]["purpose"]["anyOf"][0]["enum"] == ["car", "education", "radio/television"]
    for name in ("credit", "norm", "lookup"):
        path = f"/v2/models/{name}/infer"
        example = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert post(several, path, example).status_code == 200
    assert not any("sick" in path for path in document["paths"])


def test_openapi_has_the_short_route_for_a_lone_model(repository: Repository) -> None:
    assert "/predict" in get(repository, "/openapi.json").json()["paths"]


def test_the_documentation_needs_no_internet(repository: Repository) -> None:
    """Everything the page loads comes from this server."""
    page = get(repository, "/docs").text
    assert "https://" not in page
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        assert f"/docs/assets/{asset}" in page
        assert get(repository, f"/docs/assets/{asset}").status_code == 200
    assert get(repository, "/").headers["location"] == "/docs"


def test_requests_at_the_same_time_are_answered_like_requests_alone(repository: Repository) -> None:
    """64 different samples at once, each with the bits it has alone."""
    samples = [{**SAMPLE, "age": 20 + i * 0.7, "amount": 300 + 117.5 * i} for i in range(64)]
    alone = [post(repository, "/predict", sample).content for sample in samples]

    async def all_at_once(client: httpx.AsyncClient) -> list[bytes]:
        responses = await asyncio.gather(*(client.post("/predict", json=sample) for sample in samples))
        return [response.content for response in responses]

    assert talk(repository, all_at_once) == alone


def test_one_bad_request_among_many_fails_alone(several: Repository) -> None:
    """A value only the graph can refuse meets the others in one batch, and only its own caller hears of it."""

    async def all_at_once(client: httpx.AsyncClient) -> list[int]:
        requests = [infer(x={"shape": [1, 1], "datatype": "INT64", "data": [i]}) for i in (0, 1, 99, 2, 3)]
        responses = await asyncio.gather(*(client.post("/v2/models/lookup/infer", json=body) for body in requests))
        return [response.status_code for response in responses]

    assert talk(several, all_at_once) == [200, 200, 400, 200, 200]


def test_files_of_the_bundle_are_not_served(repository: Repository) -> None:
    """The static route gives the page's assets and nothing beside them."""
    for path in ("/docs/assets/../../app.py", "/docs/assets/%2e%2e/%2e%2e/app.py", "/docs/assets//etc/passwd"):
        assert get(repository, path).status_code == 404
