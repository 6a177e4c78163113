"""The Open Inference Protocol over HTTP: what it takes, what it gives, and every refusal with its code and sentence.

The cases of Triton's own HTTP tests are rows of the tables here.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from service.errors import BadRequest
from service.protocol import v2
from service.protocol.large_json import LARGE_BYTES
from service.repository import Repository
from service.settings import Settings
from service.signature import DATATYPES
from tests import graphs
from tests.asking import (
    JSON_LENGTH,
    ask,
    binary_answer,
    binary_message,
    identity_model,
    loaded,
    save,
    talk,
)
from tests.bundles import write_table_bundle

IN_JSON = [datatype for datatype in DATATYPES if datatype != "FP16"]


def two_inputs_model() -> Any:
    """`sum = a + b` row by row, `scaled = 3 a`, `many = -b`, for a: float[batch, 2] and b: float[batch, 5]."""
    nodes = [
        helper.make_node("ReduceSum", ["a", "axis"], ["a1"], keepdims=1),
        helper.make_node("ReduceSum", ["b", "axis"], ["b1"], keepdims=1),
        helper.make_node("Add", ["a1", "b1"], ["sum"]),
        helper.make_node("Mul", ["a", "three"], ["scaled"]),
        helper.make_node("Neg", ["b"], ["many"]),
    ]
    edges = {"a": 2, "b": 5, "sum": 1, "scaled": 2, "many": 5}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in edges.items()
    }
    constants = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("three", TensorProto.FLOAT, [], [3.0]),
    ]
    graph = helper.make_graph(
        nodes, "two", [values["a"], values["b"]], [values["sum"], values["scaled"], values["many"]], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    batch = ["batch"]
    plain = {
        "norm": graphs.batchnorm_model(),
        "stats": graphs.batchnorm_model(),
        "two": two_inputs_model(),
        "log": graphs.model([helper.make_node("Log", ["x"], ["y"])], {}),
        "every": identity_model({datatype: (datatype, [*batch, 2]) for datatype in DATATYPES}),  # type: ignore[misc]
        "json": identity_model({datatype: (datatype, [*batch, 2]) for datatype in IN_JSON}),  # type: ignore[misc]
        "line": identity_model({"x": ("FP32", batch)}),
        "words": identity_model({"x": ("BYTES", batch)}),
        "pairs": identity_model({"x": ("BYTES", [*batch, 2])}),
        "open": identity_model({"x": ("FP64", [*batch, "n"])}),
        "wide": identity_model({"x": ("FP32", [*batch, "n", "m"])}),
        "half": identity_model({"x": ("FP16", [*batch, 2])}),
        "fixed": identity_model({"x": ("FP32", [2, 3])}),
    }
    for name, model in plain.items():
        save(models, name, model)
    save(models, "sick", graphs.batchnorm_model(training=True))
    repository = loaded(models)
    assert {entry.name for entry in repository.entries if entry.live is None} == {"sick"}
    return repository


def infer(repository: Repository, model: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    return ask(repository, "POST", f"/v2/models/{model}/infer", body, headers)


def tensor(name: Any = "x", **changes: Any) -> dict[str, Any]:
    wanted = {"name": name, "shape": [2, 3], "datatype": "FP32", "data": [4.0, -2.5, 41, 5.5, -3, 39.5], **changes}
    return {key: value for key, value in wanted.items() if value is not ...}


def request(*tensors: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": list(tensors or [tensor()]), **more}


def values(datatype: str) -> NDArray[Any]:
    """Two rows of two, both ends of the datatype among them, nothing symmetric."""
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        return np.array([["", "ä\0"], ["\U0001f600", 'a"b:[\\']], dtype=dtype)
    if datatype == "BOOL":
        return np.array([[True, False], [True, True]])
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return np.array([[info.max, info.smallest_subnormal], [-0.0, 0.1]], dtype=dtype)
    ends = np.iinfo(dtype)
    return np.array([[ends.min, ends.max], [1, 2]], dtype=dtype)


def in_bytes(array: NDArray[Any]) -> bytes:
    """Written apart from the service: the bytes of the specification."""
    if array.dtype != np.object_:
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    texts = [str(text).encode() for text in array.reshape(-1)]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


# What it takes and gives


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_every_datatype_goes_through_json(repository: Repository, nested: bool) -> None:
    tensors = [
        tensor(d, shape=[2, 2], datatype=d, data=(values(d) if nested else values(d).reshape(-1)).tolist())
        for d in IN_JSON
    ]
    response = infer(repository, "json", request(*tensors))
    assert response.headers["content-type"] == "application/json"
    assert JSON_LENGTH not in response.headers
    outputs = response.json()["outputs"]
    assert [output["name"] for output in outputs] == [f"{datatype}_out" for datatype in IN_JSON]
    for datatype, output in zip(IN_JSON, outputs, strict=True):
        assert (output["shape"], output["datatype"]) == ([2, 2], datatype)
        assert "parameters" not in output
        assert np.array(output["data"], dtype=DATATYPES[datatype]).tolist() == values(datatype).reshape(-1).tolist()


def test_every_datatype_goes_through_bytes(repository: Repository) -> None:
    """Sent in another order than the model's; the bytes follow in the order in which they were sent."""
    names = list(reversed(DATATYPES))
    blobs = [in_bytes(values(name)) for name in names]
    tensors = [
        tensor(name, shape=[2, 2], datatype=name, data=..., parameters={"binary_data_size": len(blob)})
        for name, blob in zip(names, blobs, strict=True)
    ]
    body, headers = binary_message(request(*tensors, parameters={"binary_data_output": True}), *blobs)
    said, answer = binary_answer(infer(repository, "every", body, headers))
    assert [output["name"] for output in said["outputs"]] == [f"{datatype}_out" for datatype in DATATYPES]
    for name, blob in zip(names, blobs, strict=True):
        assert answer[f"{name}_out"] == blob


def test_bytes_in_and_json_out_and_the_other_way_round(repository: Repository) -> None:
    """Tensor by tensor, mixed in one request; the per-output wish beats the one for all."""
    names = ["INT64", "FP16", "BYTES", "BOOL"]
    blobs = [in_bytes(values(name)) for name in names]
    binary = [
        tensor(name, shape=[2, 2], datatype=name, data=..., parameters={"binary_data_size": len(blob)})
        for name, blob in zip(names, blobs, strict=True)
    ]
    others = [
        tensor(name, shape=[2, 2], datatype=name, data=values(name).tolist()) for name in DATATYPES if name not in names
    ]
    mixed = [binary[0], *others[:4], binary[1], *others[4:], *binary[2:]]
    wanted = [
        {"name": "FP64_out", "parameters": {"binary_data": True}},
        {"name": "INT64_out", "parameters": {"binary_data": False}},
        {"name": "FP16_out", "parameters": {"binary_data": True}},
        {"name": "BYTES_out"},
    ]
    body, headers = binary_message(request(*mixed, outputs=wanted), *blobs)
    said, answer = binary_answer(infer(repository, "every", body, headers))
    assert [output["name"] for output in said["outputs"]] == ["FP64_out", "INT64_out", "FP16_out", "BYTES_out"]
    assert set(answer) == {"FP64_out", "FP16_out"}
    assert answer["FP64_out"] == in_bytes(values("FP64"))
    assert answer["FP16_out"] == in_bytes(values("FP16"))
    assert said["outputs"][1]["data"] == values("INT64").reshape(-1).tolist()
    assert said["outputs"][3]["data"] == values("BYTES").reshape(-1).tolist()
    for output in said["outputs"]:
        assert ("data" in output) != ("parameters" in output)


@pytest.mark.parametrize(
    ("for_all", "for_y", "binary"),
    [
        (None, None, False),
        (True, None, True),
        (False, None, False),
        (None, True, True),
        (True, False, False),
        (False, True, True),
    ],
)
def test_an_output_is_binary_if_it_is_asked_to_be(
    repository: Repository, for_all: bool | None, for_y: bool | None, binary: bool
) -> None:
    said = request()
    if for_all is not None:
        said["parameters"] = {"binary_data_output": for_all}
    if for_y is not None:
        said["outputs"] = [{"name": "y", "parameters": {"binary_data": for_y}}]
    response = infer(repository, "norm", said)
    assert (response.headers["content-type"] == "application/octet-stream") == binary
    assert (JSON_LENGTH in response.headers) == binary
    assert ("data" in (binary_answer(response)[0] if binary else response.json())["outputs"][0]) != binary


def test_binary_and_json_are_the_same_numbers(repository: Repository) -> None:
    in_json = infer(repository, "norm", request()).json()["outputs"][0]["data"]
    blob = np.array(tensor()["data"], dtype="<f4").tobytes()
    body, headers = binary_message(
        request(tensor(data=..., parameters={"binary_data_size": 24}), parameters={"binary_data_output": True}), blob
    )
    _, answer = binary_answer(infer(repository, "norm", body, headers))
    assert np.frombuffer(answer["y"], dtype="<f4").tolist() == np.array(in_json, dtype=np.float32).tolist()
    wanted = graphs.batchnorm_answer(np.array(tensor()["data"]).reshape(2, 3)).reshape(-1)
    np.testing.assert_allclose(in_json, wanted, rtol=0, atol=6 * 2**-24 * 300)


@pytest.mark.parametrize("spaces", range(8))
def test_binary_tensors_may_begin_anywhere(repository: Repository, spaces: int) -> None:
    """The JSON before them has a length of every residue modulo 8, and processors read aligned numbers."""
    numbers = np.array([[0.1, -2.5, 1e300]])
    said = request(tensor(shape=[1, 3], datatype="FP64", data=..., parameters={"binary_data_size": 24}))
    body, headers = binary_message(said, numbers.tobytes(), spaces=spaces)
    assert infer(repository, "open", body, headers).json()["outputs"][0]["data"] == numbers[0].tolist()


def test_binary_tensors_follow_in_the_order_of_the_json(repository: Repository) -> None:
    """Not in that of the model: `b` first, though the model has `a` first; and `a` may be in the JSON itself."""
    a, b = np.array([[1, 2]], dtype="<f4"), np.array([[3, 4, 5, 6, 7]], dtype="<f4")
    tensor_a = tensor("a", shape=[1, 2], data=..., parameters={"binary_data_size": 8})
    tensor_b = tensor("b", shape=[1, 5], data=..., parameters={"binary_data_size": 20})
    wanted = {"sum": [28.0], "scaled": [3.0, 6.0], "many": [-3.0, -4.0, -5.0, -6.0, -7.0]}
    for said, blobs in [
        (request(tensor_b, tensor_a), [b, a]),
        (request(tensor_a, tensor_b), [a, b]),
        (request(tensor_b, tensor("a", shape=[1, 2], data=[1, 2])), [b]),
    ]:
        body, headers = binary_message(said, *(blob.tobytes() for blob in blobs))
        outputs = infer(repository, "two", body, headers).json()["outputs"]
        assert {output["name"]: output["data"] for output in outputs} == wanted


def test_outputs_come_as_and_in_the_order_they_are_asked_for(repository: Repository) -> None:
    inputs = [tensor("a", shape=[1, 2], data=[1, 2]), tensor("b", shape=[1, 5], data=[3, 4, 5, 6, 7])]
    for names in (["many"], ["scaled", "sum"], ["many", "sum", "scaled"]):
        answer = infer(repository, "two", request(*inputs, outputs=[{"name": name} for name in names])).json()
        assert [output["name"] for output in answer["outputs"]] == names
    for absent in ({}, {"outputs": None}):
        answer = infer(repository, "two", request(*inputs, **absent)).json()
        assert [output["name"] for output in answer["outputs"]] == ["sum", "scaled", "many"]


def test_the_order_of_inputs_does_not_matter(repository: Repository) -> None:
    inputs = [tensor("a", shape=[1, 2], data=[1, 2]), tensor("b", shape=[1, 5], data=[3, 4, 5, 6, 7])]
    answers = [infer(repository, "two", request(*order)).content for order in (inputs, inputs[::-1])]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("id_", ["42", "", "ä", "a:b", '"', "x" * 300])
def test_the_id_comes_back_as_it_was(repository: Repository, id_: str) -> None:
    assert infer(repository, "norm", request(id=id_)).json()["id"] == id_


@pytest.mark.parametrize("path", ["/v2/models/norm/infer", "/v2/models/norm/versions/1/infer"])
def test_the_answer_has_what_the_protocol_says_and_nothing_else(repository: Repository, path: str) -> None:
    """Without an id there is none; null is none."""
    for body in (request(), request(id=None), request(parameters={}), request(tensor(parameters=None))):
        answer = ask(repository, "POST", path, body).json()
        assert set(answer) == {"model_name", "model_version", "outputs"}
        assert (answer["model_name"], answer["model_version"]) == ("norm", "1")
        assert [set(output) for output in answer["outputs"]] == [{"name", "shape", "datatype", "data"}]
        assert answer["outputs"][0]["shape"] == [2, 3]


@pytest.mark.parametrize(
    ("model", "datatype", "with_axis", "data"),
    [
        ("norm", "FP32", [1, 3], [4.0, -2.5, 41.0]),
        ("open", "FP64", [1, 4], [1.0, 2.0, 3.0, 4.5]),
        ("pairs", "BYTES", [1, 2], ["a", ""]),
        ("line", "FP32", [1], [2.5]),
        ("words", "BYTES", [1], ["a"]),
        ("wide", "FP32", [1, 1, 2], [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_a_sample_without_its_batch_axis_comes_back_without_it(
    repository: Repository, model: str, datatype: str, with_axis: list[int], data: list[Any], binary: bool
) -> None:
    """And has the very numbers that it has as a batch of one."""
    more = {"parameters": {"binary_data_output": binary}}
    batched, single = (
        infer(repository, model, request(tensor(shape=shape, datatype=datatype, data=data), **more))
        for shape in (with_axis, with_axis[1:])
    )
    assert (batched.status_code, single.status_code) == (200, 200)
    said, bare = (
        binary_answer(response) if binary else (response.json(), response.json()["outputs"][0]["data"])
        for response in (batched, single)
    )
    assert said[0]["outputs"][0]["shape"] == with_axis
    assert bare[0]["outputs"][0]["shape"] == with_axis[1:]
    assert said[1] == bare[1]


def test_several_inputs_leave_their_batch_axis_out_together(repository: Repository) -> None:
    a, b = tensor("a", shape=[2], data=[1, 2]), tensor("b", shape=[5], data=[3, 4, 5, 6, 7])
    shapes = {output["name"]: output["shape"] for output in infer(repository, "two", request(a, b)).json()["outputs"]}
    assert shapes == {"sum": [1], "scaled": [2], "many": [5]}
    response = infer(repository, "two", request(a, {**b, "shape": [1, 5]}))
    assert (response.status_code, response.json()["code"]) == (400, "shape_mismatch")


def test_what_is_not_finite_is_null_in_json_and_itself_in_bytes(repository: Repository) -> None:
    """JSON has no NaN; a strict parser must be able to read every answer."""
    body = request(tensor(shape=[1, 3], data=[0, -1, 1]))
    assert infer(repository, "log", body).json()["outputs"][0]["data"] == [None, None, 0.0]
    _, answer = binary_answer(infer(repository, "log", {**body, "parameters": {"binary_data_output": True}}))
    minus_infinity, nan, zero = np.frombuffer(answer["y"], dtype="<f4")
    assert (minus_infinity, np.isnan(nan), zero) == (-np.inf, True, 0)


def test_nan_and_infinity_are_taken_in_bytes(repository: Repository) -> None:
    blob = np.array([np.nan, np.inf, -np.inf]).tobytes()
    said = request(
        tensor(shape=[1, 3], datatype="FP64", data=..., parameters={"binary_data_size": 24}),
        parameters={"binary_data_output": True},
    )
    body, headers = binary_message(said, blob)
    assert binary_answer(infer(repository, "open", body, headers))[1]["x_out"] == blob


# Raw binary requests


@pytest.mark.parametrize(
    ("model", "content", "shape"),
    [
        ("norm", np.array([4, -2.5, 41], dtype="<f4").tobytes(), [1, 3]),
        ("open", np.arange(5, dtype="<f8").tobytes(), [1, 5]),
        ("open", b"", [1, 0]),
        ("half", np.array([1.5, -2], dtype="<f2").tobytes(), [1, 2]),
        ("line", np.array([7.5], dtype="<f4").tobytes(), [1]),
        ("fixed", np.arange(6, dtype="<f4").tobytes(), [2, 3]),
        ("words", "any ä bytes".encode(), [1]),
        ("words", b"", [1]),
        ("words", b"\x05\0\0\0", [1]),
    ],
)
def test_a_raw_request_is_one_row_and_its_answer_is_binary(
    repository: Repository, model: str, content: bytes, shape: list[int]
) -> None:
    """The body is the elements and nothing else; a string has no length before it."""
    response = infer(repository, model, content, {JSON_LENGTH: "0", "content-type": "application/octet-stream"})
    assert response.status_code == 200
    said, answer = binary_answer(response)
    (output,) = said["outputs"]
    assert output["shape"] == shape
    if model == "words":
        assert answer[output["name"]] == len(content).to_bytes(4, "little") + content
    elif model != "norm":
        assert answer[output["name"]] == content
    assert "id" not in said


@pytest.mark.parametrize(
    ("model", "content", "code", "sentence"),
    [
        ("norm", bytes(11), "malformed_binary", "input 'x' has 11 bytes; FP32 of shape [1, 3] takes 12"),
        ("norm", bytes(24), "malformed_binary", "input 'x' has 24 bytes; FP32 of shape [1, 3] takes 12"),
        ("norm", b"", "malformed_binary", "input 'x' has 0 bytes"),
        ("open", bytes(12), "malformed_binary", "input 'x' has 12 bytes; FP64 of shape [1, 1] takes 8"),
        ("two", bytes(28), "bad_request", "a raw binary request has one input, but model 'two' takes 2"),
        ("wide", bytes(8), "bad_request", "which the size of a raw binary request does not tell"),
        ("pairs", b"ab", "bad_request", "a raw binary request holds one element of BYTES"),
        ("words", b"a\xff", "not_utf8", "not UTF-8 from its byte 1 on"),
    ],
)
def test_a_raw_request_that_tells_too_little_is_refused(
    repository: Repository, model: str, content: bytes, code: str, sentence: str
) -> None:
    response = infer(repository, model, content, {JSON_LENGTH: "0"})
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert sentence in response.json()["error"]


# Refusals

MANY = {f"k{i}": i for i in range(40)}

REFUSED: list[tuple[str, Any, str, str]] = [
    # the body
    ("norm", b"", "malformed_json", "it is empty"),
    ("norm", b"{", "malformed_json", "line 1 column 2"),
    ("norm", b"\xff", "malformed_json", "not valid JSON"),
    ("norm", b"\xef\xbb\xbf{}", "malformed_json", "BOM"),
    ("norm", json.dumps(request()).encode() + b"x", "malformed_json", "not valid JSON"),
    ("norm", json.dumps(request()).encode("utf-16"), "malformed_json", "not valid JSON"),
    ("norm", b"[" * 5000, "malformed_json", "not valid JSON"),
    ("norm", [], "wrong_type", "the body is the list []; it takes one JSON object with 'inputs'"),
    ("norm", None, "wrong_type", "the body is null"),
    ("norm", 3, "wrong_type", "the body is the number 3"),
    ("norm", "x", "wrong_type", "the body is the string 'x'"),
    ("norm", {}, "wrong_type", "'inputs' is missing; it takes a list of tensors"),
    ("norm", {"inputs": None}, "wrong_type", "'inputs' is null; it takes a list of tensors"),
    ("norm", {"inputs": {}}, "wrong_type", "'inputs' is the object {}; it takes a list"),
    ("norm", {"inputs": "x"}, "wrong_type", "'inputs' is the string 'x'"),
    ("norm", {"inputs": []}, "missing_tensor", "input 'x' is missing"),
    ("norm", {"inputs": [None]}, "wrong_type", "'inputs[0]' is null; it takes an object with name, shape, datatype"),
    ("norm", {"inputs": [tensor(), 7]}, "wrong_type", "'inputs[1]' is the number 7"),
    # the name
    ("norm", request(tensor(name=...)), "wrong_type", "the name of 'inputs[0]' is missing; it takes a string"),
    ("norm", request(tensor(name=None)), "wrong_type", "the name of 'inputs[0]' is null"),
    ("norm", request(tensor(name=3)), "wrong_type", "the name of 'inputs[0]' is the number 3"),
    ("norm", request(tensor("X")), "unknown_tensor", "no input 'X'; it has 'x'"),
    ("norm", request(tensor("y" * 500)), "unknown_tensor", "…'; it has 'x'"),
    ("norm", request(tensor(), tensor()), "bad_request", "input 'x' is given twice; send it once"),
    ("norm", request(tensor(), tensor("z")), "unknown_tensor", "no input 'z'"),
    ("two", request(tensor("a", shape=[1, 2], data=[1, 2])), "missing_tensor", "input 'b' is missing"),
    # the datatype
    ("norm", request(tensor(datatype=...)), "datatype_mismatch", "input 'x' has no datatype; the model takes FP32"),
    ("norm", request(tensor(datatype=None)), "datatype_mismatch", "input 'x' has datatype null; the model takes FP32"),
    ("norm", request(tensor(datatype="FP64")), "datatype_mismatch", "has datatype FP64; the model takes FP32"),
    ("norm", request(tensor(datatype="fp32")), "datatype_mismatch", "has datatype fp32; the model takes FP32"),
    ("norm", request(tensor(datatype="BF16")), "datatype_mismatch", "has datatype BF16; the model takes FP32"),
    ("norm", request(tensor(datatype=7)), "datatype_mismatch", "the model takes FP32"),
    ("norm", request(tensor(datatype=["FP32"])), "datatype_mismatch", 'has datatype the list ["FP32"]; the model'),
    # the shape
    ("norm", request(tensor(shape=...)), "wrong_type", "the shape of input 'x' is missing; it takes a list of"),
    ("norm", request(tensor(shape=None)), "wrong_type", "the shape of input 'x' is null"),
    ("norm", request(tensor(shape="2,3")), "wrong_type", "the shape of input 'x' is the string '2,3'"),
    ("norm", request(tensor(shape=[2, -3])), "wrong_type", "is the list [2, -3]; it takes a list of non-negative"),
    ("norm", request(tensor(shape=[-2, -3])), "wrong_type", "it takes a list of non-negative integers"),
    ("norm", request(tensor(shape=[2.0, 3])), "wrong_type", "is the list [2.0, 3]; it takes a list of non-negative"),
    ("norm", request(tensor(shape=[True, 3])), "wrong_type", "is the list [true, 3]; it takes a list of non-negative"),
    ("norm", request(tensor(shape=["2", 3])), "wrong_type", 'is the list ["2", 3]; it takes a list of non-negative'),
    ("norm", request(tensor(shape=[0.5] * 10**5)), "wrong_type", "0.5, 0.5…; it takes a list of non-negative"),
    ("norm", request(tensor(shape={"a" * 500: 1})), "wrong_type", "aaa…; it takes a list of non-negative integers"),
    ("norm", request(tensor(shape=[[2, 3]])), "wrong_type", "is the list [[2, 3]]; it takes a list of non-negative"),
    ("norm", request(tensor(shape=[2**40, 2**40])), "shape_mismatch", "elements; the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[2**63, 3])), "shape_mismatch", "elements; the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[1] * 33)), "shape_mismatch", "33 axes"),
    ("norm", request(tensor(shape=[2**62] * 400)), "shape_mismatch", "400 axes"),
    ("norm", request(tensor(shape=[6])), "shape_mismatch", "shape [6]; the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[3, 2])), "shape_mismatch", "shape [3, 2]; the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[1, 2, 3])), "shape_mismatch", "shape [1, 2, 3]; the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[], data=[1])), "shape_mismatch", "the model takes [-1, 3]"),
    ("norm", request(tensor(shape=[0, 3], data=[])), "bad_request", "has no rows; send at least one"),
    *(
        ("open", request(tensor(shape=shape, datatype="FP64", data=[])), "shape_mismatch", "too large for a")
        for shape in ([2**31, 0], [2**16 + 1, 0], [0, 2**16 + 1])
    ),
    ("fixed", request(tensor(shape=[1, 3], data=[1, 2, 3])), "shape_mismatch", "the model takes [2, 3]"),
    (
        "two",
        request(tensor("a", shape=[1, 2], data=[1, 2]), tensor("b", shape=[2, 5], data=[0] * 10)),
        "shape_mismatch",
        "input 'b' has 2 rows; the model takes as many rows in every input; 'a' has 1",
    ),
    # the data
    ("norm", request(tensor(data=...)), "wrong_type", "the data of input 'x' is missing; it takes a list of values"),
    ("norm", request(tensor(data=None)), "wrong_type", "the data of input 'x' is null; it takes a list of values"),
    ("norm", request(tensor(data=1.5)), "wrong_type", "the data of input 'x' is the number 1.5"),
    ("norm", request(tensor(data="123456")), "wrong_type", "the data of input 'x' is the string '123456'"),
    ("norm", request(tensor(data={})), "wrong_type", "the data of input 'x' is the object {}"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5])), "shape_mismatch", "5 values for shape [2, 3]"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, 6, 7])), "shape_mismatch", "7 values for shape [2, 3]"),
    ("norm", request(tensor(data=[])), "shape_mismatch", "0 values for shape [2, 3]"),
    ("norm", request(tensor(data=[[1, 2, 3], [4, 5]])), "shape_mismatch", "ragged data"),
    ("norm", request(tensor(data=[[1, 2, 3], 4, 5, 6])), "shape_mismatch", "not lists of 2 at depth 1"),
    ("norm", request(tensor(data=[[[1, 2, 3], [4, 5, 6]]])), "shape_mismatch", "not lists of 2 at depth 1"),
    ("norm", request(tensor(data=[[1, 2, 3], [4, 5, [6]]])), "wrong_type", "value 5 of input 'x' is the list [6]"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, "6"])), "wrong_type", "value 5 of input 'x' is the string '6'"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, None])), "wrong_type", "value 5 of input 'x' is null"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, True])), "wrong_type", "value 5 of input 'x' is the boolean true"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, {}])), "wrong_type", "value 5 of input 'x' is the object {}"),
    ("norm", request(tensor(data=[1, 2, 3, 4, 5, 1e39])), "out_of_range", "value 5 of input 'x' is 1e+39"),
    *(
        ("norm", json.dumps(request(tensor(data=[1, 2, 3, 4, 5, value]))).encode(), "malformed_json", sentence)
        for value in (float("nan"), float("inf"), -float("inf"))
        for sentence in ("JSON has no NaN or Infinity", "binary form, with 'binary_data_size' in its parameters")
    ),
    (
        "norm",
        json.dumps(request(tensor(data=[1, 2, 3, 4, 5, 6]))).encode().replace(b"6]", b"1e400]"),
        "malformed_json",
        "not valid JSON",
    ),
    ("half", request(tensor(shape=[1, 2], datatype="FP16", data=[1, 2])), "needs_binary", "has no JSON form; send its"),
    # the outputs
    ("norm", request(outputs={}), "wrong_type", "'outputs' is the object {}"),
    ("norm", request(outputs="y"), "wrong_type", "'outputs' is the string 'y'"),
    ("norm", request(outputs=["y"]), "wrong_type", "'outputs[0]' is the string 'y'; it takes an object with a name"),
    ("norm", request(outputs=[{}]), "wrong_type", "the name of 'outputs[0]' is missing; it takes a string"),
    ("norm", request(outputs=[{"name": 1}]), "wrong_type", "the name of 'outputs[0]' is the number 1"),
    ("norm", request(outputs=[{"name": "z"}]), "unknown_tensor", "no output 'z'; it has 'y'"),
    ("norm", request(outputs=[{"name": "y"}] * 2), "bad_request", "asked for twice"),
    (
        "norm",
        request(outputs=[{"name": "y", "parameters": {"classification": 2}}]),
        "bad_request",
        "output 'y' asks for 'classification', which this server does not do",
    ),
    # id and parameters
    ("norm", request(id=3), "wrong_type", "'id' is the number 3; it takes a string"),
    ("norm", request(id=["a"]), "wrong_type", "'id' is the list [\"a\"]"),
    ("norm", request(parameters=[]), "wrong_type", "'parameters' of the request is the list []"),
    ("norm", request(parameters={"a": None}), "wrong_type", "parameter 'a' of the request is null"),
    ("norm", request(parameters={"a": []}), "wrong_type", "a string, a number or a boolean"),
    ("norm", request(parameters={"a": {}}), "wrong_type", "parameter 'a' of the request is the object {}"),
    ("norm", request(tensor(parameters=3)), "wrong_type", "'parameters' of input 'x' is the number 3"),
    ("norm", request(tensor(parameters={"a": []})), "wrong_type", "parameter 'a' of input 'x' is the list []"),
    ("norm", request(outputs=[{"name": "y", "parameters": ""}]), "wrong_type", "'parameters' of output 'y'"),
    ("norm", request(outputs=[{"name": "y", "parameters": {"a": None}}]), "wrong_type", "'a' of output 'y' is null"),
    *(
        ("norm", request(parameters={"binary_data_output": value}), "wrong_type", "it takes true or false")
        for value in (1, 0, "true", 1.0)
    ),
    (
        "norm",
        request(outputs=[{"name": "y", "parameters": {"binary_data": "yes"}}]),
        "wrong_type",
        "parameter 'binary_data' of output 'y' is the string 'yes'; it takes true or false",
    ),
    *(
        ("norm", request(parameters={"timeout": value}), "wrong_type", "it takes a whole number of microseconds")
        for value in (-1, 1.5, 1000.0, "1000", True)
    ),
    # a key twice, wherever it is
    ("norm", b'{"inputs": [], "inputs": []}', "duplicate_key", "the key 'inputs' twice in one object; send it once"),
    ("norm", json.dumps(request()).encode()[:-1] + b', "id": "1", "id": "2"}', "duplicate_key", "the key 'id' twice"),
    ("norm", json.dumps(request()).encode()[:-1] + b', "id": "1", "i\\u0064": "2"}', "duplicate_key", "'id' twice"),
    (
        "norm",
        json.dumps(request()).encode().replace(b'"name"', b'"name": "x", "name"'),
        "duplicate_key",
        "'name' twice",
    ),
    ("norm", json.dumps(request()).encode().replace(b'"data"', b'"data": [], "data"'), "duplicate_key", "'data' twice"),
    ("norm", json.dumps(request()).encode().replace(b'"shape"', b'"shape": 0, "shape"'), "duplicate_key", "'shape' t"),
    (
        "norm",
        json.dumps(request(parameters={"a": 1})).encode().replace(b'"a": 1', b'"a": 1, "a": 1'),
        "duplicate_key",
        "the key 'a' twice",
    ),
    (
        "norm",
        json.dumps(request(other={"deep": [{"b": 1}]})).encode().replace(b'"b": 1', b'"b": ":", "b": 1'),
        "duplicate_key",
        "the key 'b' twice",
    ),
    ("norm", b'{"a": 1, "a": 2}', "duplicate_key", "the key 'a' twice"),
    # as many colons as keys: one is an escape
    (
        "norm",
        json.dumps(request()).encode()[:-1] + b', "id": "\\u003a", "a": 1, "a": 2}',
        "duplicate_key",
        "the key 'a' twice",
    ),
    # binary tensors where no bytes are
    ("norm", request(tensor(data=..., parameters={"binary_data_size": 24})), "malformed_binary", "but 0 are left"),
    ("norm", request(tensor(parameters={"binary_data_size": 24})), "bad_request", "both 'data' and 'binary_data_size'"),
    ("norm", request(tensor(data=[], parameters={"binary_data_size": 24})), "bad_request", "both 'data' and"),
    ("norm", request(tensor(parameters={"binary_data_size": 0})), "bad_request", "both 'data' and 'binary_data_size'"),
]


@pytest.mark.parametrize(("model", "body", "code", "sentence"), REFUSED)
def test_a_malformed_request_is_refused_with_the_fault_named(
    repository: Repository, model: str, body: Any, code: str, sentence: str
) -> None:
    """A 400 with `error` and `code`, whatever it is."""
    response = infer(repository, model, body)
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert set(response.json()) == {"error", "code"}
    assert sentence in response.json()["error"]
    assert len(response.json()["error"]) < 500


@pytest.mark.parametrize("datatype", [datatype for datatype in DATATYPES if "INT" in datatype])
def test_an_integer_out_of_range_is_refused_and_never_wraps(repository: Repository, datatype: str) -> None:
    """At both ends, and just within them it is taken."""
    info = np.iinfo(DATATYPES[datatype])
    others = [tensor(d, shape=[1, 2], datatype=d, data=values(d)[0].tolist()) for d in IN_JSON if d != datatype]

    def answer(value: int) -> Any:
        body = request(*others, tensor(datatype, shape=[1, 2], datatype=datatype, data=[1, value]))
        return infer(repository, "json", {**body, "outputs": [{"name": f"{datatype}_out"}]})

    for value in (int(info.min), int(info.max)):
        assert answer(value).json()["outputs"][0]["data"] == [1, value]
    for value in (int(info.min) - 1, int(info.max) + 1, 2**64, -(2**63) - 1, 10**30):
        response = answer(value)
        assert (response.status_code, response.json()["code"]) == (400, "out_of_range")
        assert f"value 1 of input '{datatype}'" in response.json()["error"]
        assert f"it takes {datatype} from {info.min} to {info.max}" in response.json()["error"]


_BLOB = np.arange(6, dtype="<f4").tobytes()
_SIZED = request(tensor(data=..., parameters={"binary_data_size": 24}))


@pytest.mark.parametrize(
    ("said", "content", "code", "sentence"),
    [
        (_SIZED, _BLOB[:-1], "malformed_binary", "input 'x' declares 24 bytes, but 23 are left of the body"),
        (_SIZED, b"", "malformed_binary", "input 'x' declares 24 bytes, but 0 are left of the body"),
        (_SIZED, _BLOB + b"\0", "malformed_binary", "1 bytes are left over after the tensors"),
        (request(), b"\0", "malformed_binary", "1 bytes are left over after the tensors"),
        (
            request(tensor(data=..., parameters={"binary_data_size": 20})),
            _BLOB[:20],
            "malformed_binary",
            "input 'x' has 20 bytes; FP32 of shape [2, 3] takes 24",
        ),
        (
            request(tensor(shape=[2, 2], data=..., parameters={"binary_data_size": 24})),
            _BLOB,
            "malformed_binary",
            "FP32 of shape [2, 2] takes 16",
        ),
        (
            request(tensor(shape=[3, 2], data=..., parameters={"binary_data_size": 24})),
            _BLOB,
            "shape_mismatch",
            "shape [3, 2]; the model takes [-1, 3]",
        ),
        (request(tensor(parameters={"binary_data_size": 24})), _BLOB, "bad_request", "both 'data' and"),
        (request(tensor(data=..., parameters={})), _BLOB, "wrong_type", "the data of input 'x' is missing"),
        (
            request(tensor(data=..., datatype="FP64", parameters={"binary_data_size": 24})),
            _BLOB,
            "datatype_mismatch",
            "",
        ),
        (
            request(tensor(data=..., shape=..., parameters={"binary_data_size": 24})),
            _BLOB,
            "wrong_type",
            "the shape of",
        ),
        *(
            (
                request(tensor(data=..., parameters={"binary_data_size": size})),
                _BLOB,
                "wrong_type",
                "'binary_data_size' of input 'x' is",
            )
            for size in (-1, -24, 24.0, "24", True)
        ),
        *(
            (
                request(tensor(data=..., parameters={"binary_data_size": size})),
                _BLOB,
                "malformed_binary",
                f"declares {size} bytes, but 24 are left",
            )
            for size in (25, 2**31, 2**63)
        ),
    ],
)
def test_binary_tensors_fill_the_body_as_the_json_says(
    repository: Repository, said: Any, content: bytes, code: str, sentence: str
) -> None:
    body, headers = binary_message(said, content)
    response = infer(repository, "norm", body, headers)
    assert (response.status_code, response.json()["code"]) == (400, code)
    assert sentence in response.json()["error"]


@pytest.mark.parametrize(
    "length", ["-1", "1.5", "x", "", " ", "1e3", "0x10", "+5", "99999", "2147483648", "9" * 30, "12, 12"]
)
def test_a_json_length_that_is_none_is_refused(repository: Repository, length: str) -> None:
    """Not a number, beyond an int32, or more than there is."""
    body, headers = binary_message(_SIZED, _BLOB)
    headers[JSON_LENGTH] = length
    response = infer(repository, "norm", body, headers)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_binary")
    assert "the header Inference-Header-Content-Length is '" in response.json()["error"]


@pytest.mark.parametrize("change", [-1, 1, -10, 10])
def test_a_json_length_that_is_not_the_jsons_is_refused(repository: Repository, change: int) -> None:
    body, headers = binary_message(_SIZED, _BLOB)
    headers[JSON_LENGTH] = str(int(headers[JSON_LENGTH]) + change)
    response = infer(repository, "norm", body, headers)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_json")


def test_a_json_length_of_the_whole_body_is_fine(repository: Repository) -> None:
    """Nothing follows, so it is plain JSON, whatever the content type is called."""
    body, headers = binary_message(request())
    assert infer(repository, "norm", body, headers).content == infer(repository, "norm", request()).content
    headers["content-type"] = "application/json"
    assert infer(repository, "norm", body, headers).status_code == 200
    headers[JSON_LENGTH] = str(len(body) + 1)
    assert infer(repository, "norm", body, headers).json()["code"] == "malformed_binary"


def test_json_out_of_a_model_of_half_precision_is_refused_before_it_runs(repository: Repository) -> None:
    blob = np.array([1.5, -2], dtype="<f2").tobytes()
    asked = tensor(shape=[1, 2], datatype="FP16", data=..., parameters={"binary_data_size": 4})
    for more in (
        {},
        {"outputs": [{"name": "x_out"}]},
        {"outputs": [{"name": "x_out", "parameters": {"binary_data": False}}]},
    ):
        body, headers = binary_message(request(asked, **more), blob)
        response = infer(repository, "half", body, headers)
        assert (response.status_code, response.json()["code"]) == (400, "needs_binary")
        assert "output 'x_out' is FP16" in response.json()["error"]
        assert "'binary_data': true" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(request()).encode()[:-1] + b', "z": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}" + b" " * spaces
        for depth in (600, 1000, 5000)
        for spaces in (0, LARGE_BYTES)
    ]
    + [
        json.dumps(request()).encode()[:-1] + b', "\\u007a": ' + b"[" * 1000 + b"]" * 1000 + b"}" + b" " * spaces
        for spaces in (0, LARGE_BYTES)
    ]
    + [json.dumps(request()).encode().replace(b'"FP32"', b"[" * 1010 + b"]" * 1010)],
)
def test_nesting_ends_somewhere_and_not_in_a_500(repository: Repository, body: bytes) -> None:
    """It is read, or refused in words; how deep Python's stack goes is nobody's promise."""
    response = infer(repository, "norm", body)
    assert response.status_code in (200, 400)
    assert response.status_code == 200 or "error" in response.json()


@pytest.mark.parametrize(
    "body",
    [
        {f"key {i}": i for i in range(60_000)},
        {"inputs": [tensor(shape=[1], data=[1])] * 12_000},
        {"inputs": [{**tensor(), **{f"key {i}": i for i in range(60_000)}, "data": 1}]},
        request(tensor(shape=[2**62] * 60_000)),
        request(tensor(shape=[1] * 200_000)),
    ],
    ids=["keys", "inputs", "keys of a tensor", "long axes", "axes"],
)
def test_no_request_takes_longer_than_it_is_long(repository: Repository, body: Any) -> None:
    """Each is about a megabyte; work that grew with the square of it would take many seconds."""
    started = time.process_time()
    assert infer(repository, "norm", body).status_code == 400
    assert time.process_time() - started < 2


def test_a_table_model_takes_tensors_too_and_checks_its_indices(repository: Repository) -> None:
    continuous = tensor("continuous", shape=[1, 2], data=[41, 2500.5])

    def answer(indices: list[int]) -> Any:
        return infer(
            repository,
            "credit",
            request(continuous, tensor("categorical", shape=[1, 2], datatype="INT64", data=indices)),
        )

    assert answer([2, 2]).status_code == 200
    for indices in ([4, 0], [-1, 0], [0, 3]):
        assert (answer(indices).status_code, answer(indices).json()["code"]) == (400, "out_of_range")


# The quick way and the careful way


finite = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(2**40), 2**40)


@st.composite
def spellings(draw: st.DrawFn) -> Callable[[], tuple[bytes, list[bytes]]]:
    """A request as most callers write it, and the same one written in other ways."""
    rows = draw(st.integers(1, 3))
    data = draw(st.lists(finite, min_size=3 * rows, max_size=3 * rows))
    plain = tensor(shape=[rows, 3], data=data)
    more: dict[str, Any] = draw(st.sampled_from([{}, {"id": "7"}]))
    nested = {**plain, "data": [data[3 * i : 3 * i + 3] for i in range(rows)]}
    backwards = dict(reversed(plain.items()))
    others = [
        json.dumps({**more, **request(backwards)}),
        json.dumps(request(nested, **more)),
        json.dumps(request(plain, parameters={}, **more)),
        json.dumps(request({**plain, "parameters": {"any": 1}}, **more)),
        json.dumps(request(plain, outputs=[{"name": "y"}], **more)),
        json.dumps(request(plain, unknown=":", **more)),
        json.dumps(request(plain, **more), indent=draw(st.integers(0, 3)), separators=(" ,\n", "\t:\r")),
        json.dumps(request(plain, **more)).replace('"inputs"', '"\\u0069nputs"'),
        json.dumps(request(plain, **more)) + " " * LARGE_BYTES,
        json.dumps(request(nested, **more)) + " " * LARGE_BYTES,
    ]
    # a function, so that hypothesis does not print them
    return lambda: (json.dumps(request(plain, **more)).encode(), [other.encode() for other in others])


@settings(max_examples=60)
@given(spelled=spellings())
def test_every_spelling_of_a_request_has_the_same_answer(
    repository: Repository, spelled: Callable[[], tuple[bytes, list[bytes]]]
) -> None:
    """The short path of `parse` and its long ones: same tensors and same answer, bit for bit."""
    plain, others = spelled()
    live = repository.live("norm")
    one = v2.parse(live, plain)
    outputs = live.admitted.runtime.run(one.accepted.tensors)
    assert one.outputs is None, "the request was meant to take the quick way"
    for body in others:
        other = v2.parse(live, body)
        assert (other.accepted.rows, other.batched, other.id) == (one.accepted.rows, one.batched, one.id)
        for mine, its in zip(one.accepted.tensors, other.accepted.tensors, strict=True):
            assert (mine.dtype, mine.shape, mine.tobytes()) == (its.dtype, its.shape, its.tobytes())
        assert other.render(outputs) == one.render(outputs)


mutations = st.lists(
    st.tuples(
        st.integers(0, 400), st.sampled_from([b"", b'"', b":", b",", b"[", b"]", b"{", b"1", b"e9", b"\\", b"-", b" "])
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150)
@given(mutations=mutations, replace=st.booleans())
def test_no_body_gets_anything_but_an_answer_or_a_refusal(
    repository: Repository, mutations: list[tuple[int, bytes]], replace: bool
) -> None:
    """Good requests with characters put in, taken out or replaced: never an exception of another kind."""
    body = json.dumps(request(id="1", outputs=[{"name": "y", "parameters": {"binary_data": False}}])).encode()
    for place, piece in mutations:
        body = body[:place] + piece + body[place + replace :]
    try:
        v2.parse(repository.live("norm"), body)
    except BadRequest:
        return


# Deadlines, timing, statistics


@pytest.mark.parametrize("timeout", [0, 60_000_000, 2**62])
def test_a_request_with_time_left_is_answered(repository: Repository, timeout: int) -> None:
    assert infer(repository, "norm", request(parameters={"timeout": timeout})).status_code == 200


def test_a_request_whose_time_is_over_is_not_computed(repository: Repository) -> None:
    """One microsecond is over before the body is read."""
    before = repository.live("norm").statistics.document(name="norm", version="1")
    response = infer(repository, "norm", request(parameters={"timeout": 1}))
    assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")
    assert "was not computed" in response.json()["error"]
    after = repository.live("norm").statistics.document(name="norm", version="1")
    assert after["execution_count"] == before["execution_count"]
    assert after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_id": 3, "sequence_start": True, "sequence_end": False, "priority": 1},
        {"content_type": "np", "headers": "x", "triton_enable_empty_final_response": True},
        {"any": 1.5, "thing": -(2**63), "text": ""},
    ],
)
def test_parameters_of_others_are_passed_over(repository: Repository, parameters: dict[str, Any]) -> None:
    """Wherever they stand, as long as they are strings, numbers and booleans."""
    body = request(
        tensor(parameters=parameters), parameters=parameters, outputs=[{"name": "y", "parameters": parameters}]
    )
    assert infer(repository, "norm", body).content == infer(repository, "norm", request()).content


def test_an_answer_says_where_its_time_went(repository: Repository) -> None:
    """As W3C Server-Timing has it: metrics with durations in milliseconds."""
    timing = infer(repository, "norm", request()).headers["server-timing"]
    assert re.fullmatch(r"queue;dur=\d+\.\d{3}, compute;dur=\d+\.\d{3}", timing)


@pytest.fixture
def fresh(tmp_path: Path) -> Repository:
    save(tmp_path, "norm", graphs.batchnorm_model())
    save(tmp_path, "other", graphs.batchnorm_model())
    return loaded(tmp_path)


def test_statistics_count_what_was_done(fresh: Repository) -> None:
    """Three requests of 1, 2 and 2 rows, one refused, one for nobody."""
    for rows in (1, 2, 2):
        assert infer(fresh, "norm", request(tensor(shape=[rows, 3], data=[1] * 3 * rows))).status_code == 200
    assert infer(fresh, "norm", {}).status_code == 400
    assert infer(fresh, "nobody", request()).status_code == 404
    document = ask(fresh, "GET", "/v2/models/norm/stats").json()
    assert list(document) == ["model_stats"]
    (entry,) = document["model_stats"]
    assert (entry["name"], entry["version"]) == ("norm", "1")
    assert (entry["inference_count"], entry["execution_count"]) == (5, 3)
    assert abs(entry["last_inference"] - time.time() * 1000) < 60_000
    counts = {name: figure["count"] for name, figure in entry["inference_stats"].items()}
    assert counts == {
        "success": 3,
        "fail": 1,
        "queue": 3,
        "compute_input": 3,
        "compute_infer": 3,
        "compute_output": 3,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert 0 < entry["inference_stats"]["compute_infer"]["ns"] <= entry["inference_stats"]["success"]["ns"]
    sizes = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in entry["batch_stats"]}
    assert sizes == {1: 1, 2: 2}
    assert set(entry["batch_stats"][0]) == {"batch_size", "compute_input", "compute_infer", "compute_output"}
    assert ask(fresh, "GET", "/v2/models/norm/versions/1/stats").json() == document
    everyone = ask(fresh, "GET", "/v2/models/stats").json()["model_stats"]
    assert [(one["name"], one["inference_count"]) for one in everyone] == [("norm", 5), ("other", 0)]


# The other routes


def test_the_server_says_what_it_can(repository: Repository) -> None:
    server = ask(repository, "GET", "/v2").json()
    assert set(server) == {"name", "version", "extensions"}
    assert set(server["extensions"]) == {"binary_tensor_data", "model_configuration", "model_repository", "statistics"}


def test_health(repository: Repository) -> None:
    """200 and JSON where it is well; what is not ready is a 503 with its reason."""
    assert ask(repository, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(repository, "GET", "/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/norm/ready", "/v2/models/norm/versions/1/ready"):
        assert ask(repository, "GET", path).json() == {"name": "norm", "ready": True}
    sick = ask(repository, "GET", "/v2/models/sick/ready")
    assert (sick.status_code, sick.json()["code"]) == (503, "not_ready")
    assert "training mode" in sick.json()["error"]


@pytest.mark.parametrize("path", ["/v2/models/two", "/v2/models/two/versions/1"])
def test_metadata(repository: Repository, path: str) -> None:
    document = ask(repository, "GET", path).json()
    assert (document["name"], document["versions"], document["platform"]) == ("two", ["1"], "onnx_onnxv1")
    assert document["inputs"] == [
        {"name": "a", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "b", "datatype": "FP32", "shape": [-1, 5]},
    ]
    assert [output["name"] for output in document["outputs"]] == ["sum", "scaled", "many"]


def test_metadata_of_every_datatype(repository: Repository) -> None:
    document = ask(repository, "GET", "/v2/models/every").json()
    assert [one["datatype"] for one in document["inputs"]] == list(DATATYPES)


def test_the_configuration_is_as_triton_writes_it(repository: Repository) -> None:
    """With a free batch axis, `dims` are those of a row and `max_batch_size` says how many; else it is 0."""
    document = ask(repository, "GET", "/v2/models/two/config").json()
    assert document["name"] == "two"
    assert (document["platform"], document["backend"]) == ("onnxruntime_onnx", "onnxruntime")
    assert document["max_batch_size"] == repository.live("two").batching.max_rows > 0
    assert ask(repository, "GET", "/v2/models/every/config").json()["max_batch_size"] == 8
    assert document["input"][1] == {"name": "b", "data_type": "TYPE_FP32", "dims": [5]}
    assert [one["name"] for one in document["output"]] == ["sum", "scaled", "many"]
    assert ask(repository, "GET", "/v2/models/two/versions/1/config").json() == document
    fixed = ask(repository, "GET", "/v2/models/fixed/config").json()
    assert (fixed["max_batch_size"], fixed["input"][0]["dims"]) == (0, [2, 3])
    assert ask(repository, "GET", "/v2/models/wide/config").json()["input"][0]["dims"] == [-1, -1]
    types = [one["data_type"] for one in ask(repository, "GET", "/v2/models/every/config").json()["input"]]
    assert types == ["TYPE_" + datatype.replace("BYTES", "STRING") for datatype in DATATYPES]


def test_the_index_lists_every_version_or_only_the_ready(repository: Repository) -> None:
    everything: Any = [
        ask(repository, "POST", "/v2/repository/index", body).json() for body in (b"", {}, {"ready": False})
    ]
    assert everything[0] == everything[1] == everything[2]
    assert {"name": "norm", "version": "1", "state": "READY", "reason": ""} in everything[0]
    (sick,) = [entry for entry in everything[0] if entry["name"] == "sick"]
    assert sick["state"] == "UNAVAILABLE"
    assert "training mode" in sick["reason"]
    ready = ask(repository, "POST", "/v2/repository/index", {"ready": True}).json()
    assert ready == [entry for entry in everything[0] if entry["state"] == "READY"]


@pytest.mark.parametrize("route", ["index", "models/norm/load", "models/norm/unload"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "malformed_json"),
        (b"[]", None),
        (b"3", None),
        (b'{"ready": true, "ready": false, "parameters": {}, "parameters": {}}', "duplicate_key"),
        (b'{"ready": NaN}', "malformed_json"),
        (b'{"ready": "yes", "parameters": 1}', None),
        (b'{"ready": 1, "parameters": []}', None),
    ],
)
def test_the_wire_is_strict_for_the_repository_too(
    repository: Repository, route: str, body: bytes, code: str | None
) -> None:
    response = ask(repository, "POST", f"/v2/repository/{route}", body, {"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()) == {"error", "code"}
    if code is not None:
        assert response.json()["code"] == code
    assert repository.live("norm").version == "1"


NOTHING = [b"", b"{}", b'{"parameters": {}}', b'{"parameters": {"unload_dependents": false}}']


@pytest.mark.parametrize("body", NOTHING)
@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}], ids=["untyped", "json"])
def test_load_and_unload(fresh: Repository, body: bytes, headers: dict[str, str]) -> None:
    """An empty 200 each; tritonclient sends no content type."""
    unloaded = ask(fresh, "POST", "/v2/repository/models/norm/unload", body, headers)
    assert (unloaded.status_code, unloaded.content) == (200, b"")
    gone = infer(fresh, "norm", request())
    assert (gone.status_code, gone.json()["code"]) == (503, "not_ready")
    assert ask(fresh, "GET", "/v2/models/norm/ready").status_code == 503
    assert infer(fresh, "other", request()).status_code == 200
    index = {entry["name"]: entry for entry in ask(fresh, "POST", "/v2/repository/index").json()}
    assert (index["norm"]["state"], index["other"]["state"]) == ("UNAVAILABLE", "READY")
    assert "unloaded" in index["norm"]["reason"]
    assert [entry["name"] for entry in ask(fresh, "POST", "/v2/repository/index", {"ready": True}).json()] == ["other"]
    again = ask(fresh, "POST", "/v2/repository/models/norm/load", body, headers)
    assert (again.status_code, again.content) == (200, b"")
    assert infer(fresh, "norm", request()).status_code == 200


def test_to_unload_twice_is_no_fault(fresh: Repository, tmp_path: Path) -> None:
    """Nor is it to unload what was refused; that stays away until somebody asks for it, whatever comes."""
    for _ in range(2):
        assert ask(fresh, "POST", "/v2/repository/models/norm/unload").status_code == 200
    save(tmp_path, "sick", graphs.batchnorm_model(training=True))
    assert ask(fresh, "POST", "/v2/repository/models/sick/load").status_code == 400
    assert ask(fresh, "POST", "/v2/repository/models/sick/unload").status_code == 200
    assert [entry.reason for entry in fresh.entries if entry.name == "sick"] == ["unloaded by request"]
    save(tmp_path, "sick", graphs.batchnorm_model(), version="2")
    assert {entry.reason for entry in fresh.admit("sick", {"2"})} == {"unloaded by request"}
    assert ask(fresh, "POST", "/v2/repository/models/sick/load").status_code == 200
    assert fresh.live("sick").version == "2"


def test_what_is_loaded_is_the_newest_version(fresh: Repository, tmp_path: Path) -> None:
    old = infer(fresh, "norm", request()).json()
    save(tmp_path, "norm", graphs.batchnorm_model(mean=graphs.MEAN + 1), version="2")
    assert infer(fresh, "norm", request()).json() == old
    assert ask(fresh, "POST", "/v2/repository/models/norm/load").status_code == 200
    new = infer(fresh, "norm", request()).json()
    assert (old["model_version"], new["model_version"]) == ("1", "2")
    assert new["outputs"][0]["data"] != old["outputs"][0]["data"]
    replaced = ask(fresh, "GET", "/v2/models/norm/versions/1")
    assert (replaced.status_code, replaced.json()["code"]) == (404, "unknown_version")
    assert "version '2' is served" in replaced.json()["error"]


def test_a_bad_new_version_is_refused_and_the_old_one_goes_on(
    fresh: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asked is told why, and so is whoever reads the log."""
    before = infer(fresh, "norm", request()).content
    save(tmp_path, "norm", graphs.batchnorm_model(training=True), version="2")
    response = ask(fresh, "POST", "/v2/repository/models/norm/load")
    assert (response.status_code, response.json()["code"]) == (400, "load_refused")
    assert "version 2 of model 'norm' was refused at the structure door" in response.json()["error"]
    assert f"{response.json()['error']} (somebody asked)" in caplog.text
    assert infer(fresh, "norm", request()).content == before
    entries = [entry for entry in ask(fresh, "POST", "/v2/repository/index").json() if entry["name"] == "norm"]
    assert [(entry["version"], entry["state"]) for entry in entries] == [("2", "UNAVAILABLE"), ("1", "READY")]


@pytest.mark.parametrize("model", ["nobody", "%2e%2e", ".", "1"])
def test_what_is_not_there_cannot_be_loaded(fresh: Repository, model: str) -> None:
    for verb in ("load", "unload"):
        response = ask(fresh, "POST", f"/v2/repository/models/{model}/{verb}")
        assert (response.status_code, response.json()["code"]) in [(404, "unknown_model"), (404, "not_found")]


def test_a_model_whose_folder_is_gone_cannot_be_loaded(fresh: Repository, tmp_path: Path) -> None:
    """Nor the last one; what is served goes on."""
    for name in ("norm", "other"):
        shutil.rmtree(tmp_path / name)
        response = ask(fresh, "POST", f"/v2/repository/models/{name}/load")
        assert (response.status_code, response.json()["code"]) == (400, "load_refused")
        assert "put it back. It is served from memory" in response.json()["error"]
    assert infer(fresh, "norm", request()).status_code == 200


@pytest.mark.parametrize(
    "parameters", [{"config": "{}"}, {"file:1/model.onnx": "AAAA"}, {"unload_dependents": False, "config": "{}"}]
)
def test_a_model_cannot_be_sent(fresh: Repository, parameters: dict[str, Any]) -> None:
    response = ask(fresh, "POST", "/v2/repository/models/norm/load", {"parameters": parameters})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert any(name in response.json()["error"] for name in parameters if name != "unload_dependents")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_models_are_loaded_only_from_this_machine(fresh: Repository, host: str) -> None:
    for verb in ("load", "unload"):
        for name in ("norm", "nobody"):
            response = ask(fresh, "POST", f"/v2/repository/models/{name}/{verb}", settings=Settings(host=host))
            assert (response.status_code, response.json()["code"]) == (403, "forbidden")
            assert "loopback" in response.json()["error"]
    assert ask(fresh, "POST", "/v2/repository/index", settings=Settings(host=host)).status_code == 200
    assert fresh.live("norm").version == "1"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_is_loopback(fresh: Repository, host: str) -> None:
    assert ask(fresh, "POST", "/v2/repository/models/norm/unload", settings=Settings(host=host)).status_code == 200


def test_a_model_called_stats_is_served(repository: Repository) -> None:
    """Only its metadata without a version are not to be had: that path is the statistics of all."""
    assert list(ask(repository, "GET", "/v2/models/stats").json()) == ["model_stats"]
    answer = infer(repository, "stats", request()).json()
    assert answer["model_name"] == "stats"
    assert ask(repository, "GET", "/v2/models/stats/versions/1").json()["name"] == "stats"
    assert ask(repository, "GET", "/v2/models/stats/ready").json()["name"] == "stats"
    (entry,) = ask(repository, "GET", "/v2/models/stats/stats").json()["model_stats"]
    assert entry["name"] == "stats"
    assert entry["inference_count"] >= 2  # whoever asks whether it is ready may have it run


# Paths


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v2/models/nobody/infer", 404, "unknown_model"),
        ("POST", "/v2/models/norm/versions/2/infer", 404, "unknown_version"),
        ("POST", "/v2/models/norm/versions/01/infer", 404, "unknown_version"),
        ("POST", "/v2/models/norm/versions/latest/infer", 404, "unknown_version"),
        ("POST", "/v2/models/NORM/infer", 404, "unknown_model"),
        ("POST", "/v2/models/sick/infer", 503, "not_ready"),
        ("POST", "/v2/models/norm/infer/", 404, "not_found"),
        ("POST", "/v2/models/norm//infer", 404, "not_found"),
        ("POST", "/v2/models//infer", 404, "not_found"),
        ("POST", "/v2/models/norm/versions//infer", 404, "not_found"),
        ("POST", "/v2/models/norm/versions/infer", 405, "method_not_allowed"),
        ("POST", "/V2/models/norm/infer", 404, "not_found"),
        ("POST", "/v2/models/norm%2F/infer", 404, "unknown_model"),
        ("POST", "/v2/models/norm%2Finfer", 405, "method_not_allowed"),
        ("POST", "/v2%2Fmodels/norm/infer", 404, "not_found"),
        ("POST", "/v2/models/norm%2fversions%2f1/infer", 404, "unknown_model"),
        ("POST", "/v2/models/norm/versions/1%2f/infer", 404, "unknown_version"),
        ("POST", "/v2/models/%2e%2e/infer", 404, "unknown_model"),
        ("POST", "/v2/models/%00/infer", 404, "unknown_model"),
        ("POST", "/v2/models/norm%0a/infer", 404, "unknown_model"),
        ("POST", "/v2/models/norm%20/infer", 404, "unknown_model"),
        ("GET", "/v2/models/norm%2Fready", 404, "unknown_model"),
        ("GET", "/v2%2fhealth%2flive", 404, "not_found"),
        ("GET", "/v2/models", 404, "not_found"),
        ("GET", "/v2/", 404, "not_found"),
        ("GET", "/v2/models/nobody/config", 404, "unknown_model"),
        ("GET", "/v2/models/norm/versions/2/config", 404, "unknown_version"),
        ("GET", "/v2/models/nobody/stats", 404, "unknown_model"),
        ("GET", "/v2/models/norm/versions/2/stats", 404, "unknown_version"),
        ("GET", "/v2/models/sick", 503, "not_ready"),
        ("GET", "/v2/trace/setting", 404, "not_found"),
        ("GET", "/v2/logging", 404, "not_found"),
    ],
)
def test_no_path_is_normalised(repository: Repository, method: str, path: str, status: int, code: str) -> None:
    response = ask(repository, method, path, request())
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert set(response.json()) == {"error", "code"}


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v2", "GET"),
        ("/v2/health/live", "GET"),
        ("/v2/health/ready", "GET"),
        ("/v2/models/norm", "GET"),
        ("/v2/models/norm/versions/1", "GET"),
        ("/v2/models/norm/ready", "GET"),
        ("/v2/models/norm/config", "GET"),
        ("/v2/models/norm/stats", "GET"),
        ("/v2/models/stats", "GET"),
        ("/v2/models/norm/infer", "POST"),
        ("/v2/models/norm/versions/1/infer", "POST"),
        ("/v2/models/nobody/infer", "POST"),
        ("/v2/repository/index", "POST"),
        ("/v2/repository/models/norm/load", "POST"),
        ("/v2/repository/models/norm/unload", "POST"),
    ],
)
def test_another_method_is_a_405_that_says_which(repository: Repository, path: str, allowed: str) -> None:
    allowed_also = {"GET", "HEAD"} if allowed == "GET" else {allowed}
    for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"} - allowed_also:
        response = ask(repository, method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == ", ".join(sorted(allowed_also))
        if method != "HEAD":
            assert response.json()["code"] == "method_not_allowed"
    assert repository.live("norm").version == "1"


def test_query_strings_are_ignored(repository: Repository) -> None:
    wanted = infer(repository, "norm", request()).content
    for query in ("?", "?a=1", "?version=7&a&a=%2F", "?" + "x" * 500):
        assert ask(repository, "POST", f"/v2/models/norm/infer{query}", request()).content == wanted
        assert ask(repository, "GET", f"/v2/health/live{query}").json() == {"live": True}


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("application/octet-stream", 200),
        ("", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
    ],
)
def test_the_content_type(repository: Repository, content_type: str, status: int) -> None:
    assert infer(repository, "norm", request(), {"content-type": content_type}).status_code == status


@pytest.mark.parametrize("content", [b"\x00\x00\x80?" * 3, b"", b"[" * 200_000, b"\xff" * 200_000])
def test_bytes_without_their_header_are_told_of_it(repository: Repository, content: bytes) -> None:
    """What to say there, for tensors behind JSON and for nothing but tensors; with the content type of bytes only."""
    refusal = infer(repository, "norm", content, {"content-type": "application/octet-stream"})
    assert (refusal.status_code, refusal.json()["code"]) == (400, "malformed_json")
    assert "Without the header Inference-Header-Content-Length all of the body is JSON" in refusal.json()["error"]
    assert "or 0 if the body is nothing but the elements of the only input" in refusal.json()["error"]
    for others in (
        {"content-type": "application/json"},
        {"content-type": "application/octet-stream", JSON_LENGTH: "1"},
    ):
        assert "Without the header" not in infer(repository, "norm", content or b"{", others).json()["error"]


def test_requests_at_the_same_time_have_the_answers_they_have_alone(repository: Repository) -> None:
    """JSON and binary, with and without batch axis, one of them wrong."""
    bodies: list[dict[str, Any]] = [
        request(tensor(shape=[1, 3], data=[i, -i, 2.5 * i]), id=str(i))
        if i % 2
        else request(tensor(shape=[3], data=[i] * 3))
        for i in range(12)
    ]
    bodies[5] = {}
    alone = [infer(repository, "norm", body).content for body in bodies]

    async def together(client: Any) -> list[bytes]:
        answers = await asyncio.gather(*(client.post("/v2/models/norm/infer", json=body) for body in bodies))
        return [answer.content for answer in answers]

    assert talk(repository, together) == alone
