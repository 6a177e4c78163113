"""The real server and Triton's own HTTP client, sync and asyncio; and what only a bare socket can send."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http  # type: ignore[import-untyped]
import tritonclient.http.aio  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from service.signature import DATATYPES
from tests import graphs
from tests.asking import identity_model, save
from tests.conftest import Serve, Serving

pytestmark = pytest.mark.e2e

X = np.array([[4.0, -2.5, 41.0], [5.5, -3.0, 39.5]], dtype=np.float32)


def models_in(folder: Path) -> Path:
    save(folder, "norm", graphs.batchnorm_model())
    save(folder, "every", identity_model({datatype: (datatype, ["batch", 2]) for datatype in DATATYPES}))  # type: ignore[misc]
    save(folder, "open", identity_model({"x": ("FP32", ["batch", "n"])}))
    return folder


def client_of(serving: Serving, **options: Any) -> Any:
    return tritonclient.http.InferenceServerClient(serving.address.removeprefix("http://"), **options)


def tensor(name: str, array: NDArray[Any], datatype: str, *, binary: bool = True) -> Any:
    sent = tritonclient.http.InferInput(name, list(array.shape), datatype)
    sent.set_data_from_numpy(array, binary_data=binary)
    return sent


def wanted(name: str, **options: Any) -> Any:
    return tritonclient.http.InferRequestedOutput(name, **options)


def values(datatype: str) -> NDArray[Any]:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        return np.array([[b"", "ä".encode()], [b"a\0b", b'":[']], dtype=np.object_)
    if datatype == "BOOL":
        return np.array([[True, False], [False, False]])
    if dtype.kind == "f":
        return np.array([[np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], [-0.0, 0.1]], dtype=dtype)
    return np.array([[np.iinfo(dtype).min, np.iinfo(dtype).max], [1, 2]], dtype=dtype)


def same(got: NDArray[Any], sent: NDArray[Any]) -> bool:
    """Bit for bit; the client gives strings of a JSON answer as text and those of a binary one as bytes."""
    if sent.dtype == np.object_:
        return [text.encode() if isinstance(text, str) else text for text in got.reshape(-1)] == sent.reshape(
            -1
        ).tolist()
    return (got.dtype, got.shape, got.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


def near(got: NDArray[Any], x: NDArray[Any]) -> bool:
    return np.allclose(got, graphs.batchnorm_answer(x), rtol=0, atol=6 * 2**-24 * 300)


def test_health_metadata_and_configuration(serve: Serve, tmp_path: Path) -> None:
    with client_of(serve(models_in(tmp_path))) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("norm")
        assert client.is_model_ready("norm", model_version="1")
        assert not client.is_model_ready("norm", model_version="2")
        assert not client.is_model_ready("nobody")
        server = client.get_server_metadata()
        assert server["name"] == "evalmode"
        assert {"binary_tensor_data", "statistics", "model_repository", "model_configuration"} <= set(
            server["extensions"]
        )
        for version in ("", "1"):
            metadata = client.get_model_metadata("norm", model_version=version)
            assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
            config = client.get_model_config("norm", model_version=version)
            assert (config["name"], config["input"][0]["dims"]) == ("norm", [3])
            assert config["max_batch_size"] > 0
        for ask in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
            with pytest.raises(
                InferenceServerException, match="no model 'nobody' is served here; served: 'every', 'norm'"
            ):
                ask("nobody")
            with pytest.raises(InferenceServerException, match="model 'norm' has no live version '2'"):
                ask("norm", model_version="2")


def test_every_datatype_in_bytes_and_in_json(serve: Serve, tmp_path: Path) -> None:
    """The client's default is binary both ways; JSON where it is asked for, which FP16 has not."""
    with client_of(serve(models_in(tmp_path))) as client:
        binary = client.infer("every", [tensor(d, values(d), d) for d in DATATYPES])
        for datatype in DATATYPES:
            assert same(binary.as_numpy(f"{datatype}_out"), values(datatype)), datatype
        in_json = client.infer(
            "every",
            [tensor(d, values(d), d, binary=d == "FP16") for d in reversed(DATATYPES)],
            outputs=[wanted(f"{d}_out", binary_data=d == "FP16") for d in DATATYPES],
        )
        for datatype in DATATYPES:
            output = in_json.get_output(f"{datatype}_out")
            assert ("data" in output) == (datatype != "FP16")
            assert same(in_json.as_numpy(f"{datatype}_out"), values(datatype)), datatype


def test_one_infers_in_each_of_the_clients_ways(serve: Serve, tmp_path: Path) -> None:
    with client_of(serve(models_in(tmp_path)), concurrency=4) as client:
        for request_id, version in (("", ""), ("42", "1")):
            result = client.infer("norm", [tensor("x", X, "FP32")], request_id=request_id, model_version=version)
            assert near(result.as_numpy("y"), X)
            assert result.get_response().get("id", "") == request_id
            assert result.get_response()["model_version"] == "1"
        one = client.infer("norm", [tensor("x", X[:1], "FP32")]).as_numpy("y")
        bare = client.infer("norm", [tensor("x", X[0], "FP32")]).as_numpy("y")
        assert (one.shape, bare.shape) == ((1, 3), (3,))
        assert one.tobytes() == bare.tobytes()
        waiting = [client.async_infer("norm", [tensor("x", X + i, "FP32")], request_id=str(i)) for i in range(16)]
        for i, handle in enumerate(waiting):
            result = handle.get_result()
            assert result.get_response()["id"] == str(i)
            assert near(result.as_numpy("y"), X + np.float32(i))
        parameters = {"any": "thing", "number": 1.5}
        result = client.infer(
            "norm", [tensor("x", X, "FP32")], priority=1, timeout=10_000_000, sequence_id=3, parameters=parameters
        )
        assert near(result.as_numpy("y"), X)


@pytest.mark.parametrize("count", [10, 5_000, 100_000])
def test_compression_both_ways(serve: Serve, tmp_path: Path, count: int) -> None:
    x = (np.arange(count, dtype=np.float32) % 97)[np.newaxis]
    with client_of(serve(models_in(tmp_path))) as client:
        for asked in (None, "gzip", "deflate"):
            for answered in (None, "gzip", "deflate"):
                result = client.infer(
                    "open",
                    [tensor("x", x, "FP32")],
                    request_compression_algorithm=asked,
                    response_compression_algorithm=answered,
                )
                assert same(result.as_numpy("x_out"), x)


REFUSED: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (lambda: tensor("z", X, "FP32"), {}, "the model has no input 'z'; it has 'x'"),
    (lambda: tensor("x", X.astype(np.float64), "FP64"), {}, "input 'x' has datatype FP64; the model takes FP32"),
    (lambda: tensor("x", X[:, :2], "FP32"), {}, r"input 'x' has shape \[2, 2\]; the model takes \[-1, 3\]"),
    (lambda: tensor("x", X[:0], "FP32"), {}, "has no rows; send at least one"),
    (
        lambda: tensor("x", X * np.float32("nan"), "FP32", binary=False),
        {},
        "JSON has no NaN or Infinity; send the tensor in its",
    ),
    (lambda: tensor("x", X, "FP32"), {"outputs": [wanted("z")]}, "the model has no output 'z'; it has 'y'"),
    (lambda: tensor("x", X, "FP32"), {"outputs": [wanted("y"), wanted("y")]}, "an output is asked for twice"),
    (
        lambda: tensor("x", X, "FP32"),
        {"outputs": [wanted("y", class_count=2)]},
        "output 'y' asks for 'classification', which this server does not do",
    ),
    (lambda: tensor("x", X, "FP32"), {"model_version": "9"}, "model 'norm' has no live version '9'"),
    (lambda: tensor("x", X, "FP32"), {"timeout": -1}, "it takes a whole number of microseconds"),
    (lambda: tensor("x", X, "FP32"), {"headers": {"Content-Encoding": "br"}}, "the content encoding is 'br'"),
]


def test_a_refusal_reaches_the_caller_as_a_sentence(serve: Serve, tmp_path: Path) -> None:
    """As the client's own exception, with our words; and the next request on the connection is answered."""
    with client_of(serve(models_in(tmp_path))) as client:
        for make, options, sentence in REFUSED:
            with pytest.raises(InferenceServerException, match=sentence):
                client.infer("norm", [make()], **options)
            assert near(client.infer("norm", [tensor("x", X, "FP32")]).as_numpy("y"), X)
        with pytest.raises(InferenceServerException, match="input 'x' is given twice"):
            client.infer("norm", [tensor("x", X, "FP32")] * 2)
        with pytest.raises(InferenceServerException, match="input 'x' is missing"):
            client.infer("norm", [])
        unfinished = client.async_infer("norm", [tensor("z", X, "FP32")])
        with pytest.raises(InferenceServerException, match="the model has no input 'z'"):
            unfinished.get_result()


def test_the_repository(serve: Serve, tmp_path: Path) -> None:
    """Unloaded, loaded, replaced by a newer version, and not by one that is refused."""
    with client_of(serve(models_in(tmp_path))) as client:
        index = {entry["name"]: entry for entry in client.get_model_repository_index()}
        assert index["norm"] == {"name": "norm", "version": "1", "state": "READY", "reason": ""}
        client.unload_model("norm")
        assert not client.is_model_ready("norm")
        assert client.is_model_ready("open")
        with pytest.raises(InferenceServerException, match="unloaded by request"):
            client.infer("norm", [tensor("x", X, "FP32")])
        client.load_model("norm")
        assert near(client.infer("norm", [tensor("x", X, "FP32")]).as_numpy("y"), X)
        save(tmp_path, "norm", graphs.batchnorm_model(mean=graphs.MEAN + 1), version="2")
        client.load_model("norm")
        result = client.infer("norm", [tensor("x", X + np.float32(1), "FP32")])
        assert result.get_response()["model_version"] == "2"
        assert near(result.as_numpy("y"), X)
        save(tmp_path, "norm", graphs.batchnorm_model(training=True), version="3")
        with pytest.raises(
            InferenceServerException, match="version 3 of model 'norm' was refused at the structure door"
        ):
            client.load_model("norm")
        assert client.infer("norm", [tensor("x", X, "FP32")]).get_response()["model_version"] == "2"
        with pytest.raises(InferenceServerException, match="no model 'nobody'"):
            client.load_model("nobody")
        with pytest.raises(InferenceServerException, match="config"):
            client.load_model("norm", config="{}")
        with pytest.raises(InferenceServerException, match=r"file:1/model\.onnx|config"):
            client.load_model("norm", config="{}", files={"file:1/model.onnx": b"abc"})
        client.unload_model("open", unload_dependents=True)
        assert not client.is_model_ready("open")


def test_where_others_can_reach_it_nothing_is_loaded_or_unloaded(serve: Serve, tmp_path: Path) -> None:
    serving = serve(models_in(tmp_path), "--host", "0.0.0.0")
    with client_of(serving) as client:
        for act in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="only where the service listens on loopback"):
                act("norm")
        assert len(client.get_model_repository_index()) == 3
        assert near(client.infer("norm", [tensor("x", X, "FP32")]).as_numpy("y"), X)


def test_statistics_are_those_of_what_was_asked(serve: Serve, tmp_path: Path) -> None:
    with client_of(serve(models_in(tmp_path))) as client:
        for rows in (1, 2, 2):
            client.infer("norm", [tensor("x", X[:rows], "FP32")])
        with pytest.raises(InferenceServerException):
            client.infer("norm", [tensor("z", X, "FP32")])
        (entry,) = client.get_inference_statistics("norm")["model_stats"]
        assert (entry["inference_count"], entry["execution_count"]) == (5, 3)
        assert (entry["inference_stats"]["success"]["count"], entry["inference_stats"]["fail"]["count"]) == (3, 1)
        everyone = client.get_inference_statistics()["model_stats"]
        assert [one["name"] for one in everyone] == ["every", "norm", "open"]
        (entry,) = client.get_inference_statistics("norm", model_version="1")["model_stats"]
        assert entry["inference_count"] == 5


def test_the_asyncio_client(serve: Serve, tmp_path: Path) -> None:
    """All of it once more, and 32 requests at the same time, of which every fourth is wrong."""
    address = serve(models_in(tmp_path)).address.removeprefix("http://")

    async def scenario() -> None:
        async with tritonclient.http.aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("norm")
            assert not await client.is_model_ready("nobody")
            assert (await client.get_server_metadata())["name"] == "evalmode"
            assert (await client.get_model_metadata("norm"))["name"] == "norm"
            assert (await client.get_model_config("norm"))["name"] == "norm"
            assert len(await client.get_model_repository_index()) == 3
            binary = await client.infer("every", [tensor(d, values(d), d) for d in DATATYPES])
            for datatype in DATATYPES:
                assert same(binary.as_numpy(f"{datatype}_out"), values(datatype)), datatype
            x = np.arange(5_000, dtype=np.float32)[np.newaxis]
            for algorithm in ("gzip", "deflate"):
                packed = await client.infer(
                    "open",
                    [tensor("x", x, "FP32")],
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                assert same(packed.as_numpy("x_out"), x)
            answers: list[Any] = await asyncio.gather(
                *(
                    client.infer("norm", [tensor("x", X[:, : 3 - (i % 4 == 3)] + i, "FP32")], request_id=str(i))
                    for i in range(32)
                ),
                return_exceptions=True,
            )
            for i, answer in enumerate(answers):
                if i % 4 == 3:
                    assert isinstance(answer, InferenceServerException)
                    assert "the model takes [-1, 3]" in str(answer)
                else:
                    assert answer.get_response()["id"] == str(i)
                    assert near(answer.as_numpy("y"), X + np.float32(i))
            await client.unload_model("norm")
            assert not await client.is_model_ready("norm")
            await client.load_model("norm")
            assert await client.is_model_ready("norm")
            (entry,) = (await client.get_inference_statistics("open"))["model_stats"]
            assert entry["inference_count"] == 2

    asyncio.run(scenario())


# A bare socket


BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": X.reshape(-1).tolist()}]}
).encode()


def exchange(serving: Serving, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back until the connection is closed."""
    host, _, port = serving.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return (
        int(status.split()[1]),
        {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)},
        body,
    )


def bare(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: service",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


PATHS: list[tuple[str, str, int]] = [
    ("POST", "/v2/models/norm/infer", 200),
    ("POST", "/v2/models/norm/infer?version=7&x=%2F", 200),
    ("POST", "/v2/models/norm/infer?", 200),
    ("POST", "/v2/models/norm%2Finfer", 405),
    ("POST", "/v2%2Fmodels/norm/infer", 404),
    ("POST", "/v2/models%2fnorm/infer", 404),
    ("POST", "/v2/models/norm%2Fversions%2F1/infer", 404),
    ("POST", "/v2/models/norm/versions/1%2Finfer", 405),
    ("POST", "/v2/models/../models/norm/infer", 404),
    ("POST", "/v2/models/norm/../norm/infer", 404),
    ("POST", "/v2/./models/norm/infer", 404),
    ("POST", "/v2/models/%2e%2e/infer", 404),
    ("POST", "/v2/models/%2e%2e/models/norm/infer", 404),
    ("POST", "//v2/models/norm/infer", 404),
    ("POST", "/v2//models/norm/infer", 404),
    ("POST", "/v2/models/norm//infer", 404),
    ("POST", "/v2/models/norm/infer/", 404),
    ("POST", "/v2/models/norm/infer;x=1", 404),
    ("POST", "/v2/models/norm%00/infer", 404),
    ("POST", "/v2/models/%00/infer", 404),
    ("POST", "/v2/models/norm%0d%0a/infer", 404),
    ("POST", "/v2/models/%ff/infer", 404),
    ("POST", "/v2/models/%zz/infer", 404),
    ("POST", "/v2/models/n%6Frm/infer", 200),  # an escaped letter is that letter (RFC 3986, section 6.2.2.2)
    ("GET", "/docs/assets/../../app.py", 404),
    ("GET", "/docs/assets/%2e%2e/%2e%2e/app.py", 404),
    ("GET", "/docs/assets/..%2f..%2fapp.py", 404),
    ("GET", "/docs/assets//etc/passwd", 404),
    ("GET", "/v2/models/norm%2Fready", 404),
    ("GET", "/v2/health/live?", 200),
    ("GET", "/v2/health/live?a=1&a=2#x", 200),
    ("OPTIONS", "*", 404),
]


def test_no_path_is_normalised(serve: Serve, tmp_path: Path) -> None:
    """On its way through the real server: every refusal is JSON and the only 200s are those that are meant."""
    serving = serve(models_in(tmp_path))
    for method, path, wanted_status in PATHS:
        status, headers, body = exchange(serving, bare(method, path, BODY if method == "POST" else b""))
        assert status == wanted_status, (path, body)
        assert headers["x-request-id"]
        if status != 200:
            assert set(json.loads(body)) == {"error", "code"}, path


def test_methods(serve: Serve, tmp_path: Path) -> None:
    """Whatever HTTP knows is a 405 that says which; what it does not know never reaches a route."""
    serving = serve(models_in(tmp_path))
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HEAD"):
        status, headers, body = exchange(serving, bare(method, "/v2/models/norm/infer"))
        assert (status, headers["allow"]) == (405, "POST"), method
        assert (body == b"") == (method == "HEAD")
    for path in ("/v2", "/v2/health/live", "/v2/models/norm", "/v2/models/norm/stats"):
        for method in ("POST", "OPTIONS", "DELETE"):
            status, headers, _ = exchange(serving, bare(method, path))
            assert (status, headers["allow"]) == (405, "GET, HEAD"), (method, path)
        assert exchange(serving, bare("HEAD", path))[::2] == (200, b""), path
    for method in ("BREW", "post"):
        status, headers, body = exchange(serving, bare(method, "/v2/models/norm/infer", BODY))
        assert (status, headers["content-type"]) == (400, "application/json"), method
        assert json.loads(body)["code"] == "bad_request"
    assert exchange(serving, bare("POST", "/v2/models/norm/infer", BODY))[0] == 200


def test_framing(serve: Serve, tmp_path: Path) -> None:
    """Chunks, HTTP/1.0, several requests on one connection; and lies about lengths."""
    serving = serve(models_in(tmp_path))
    path = "/v2/models/norm/infer"
    _, _, wanted_body = exchange(serving, bare("POST", path, BODY))
    assert near(np.array(json.loads(wanted_body)["outputs"][0]["data"]).reshape(2, 3), X)
    start = f"POST {path} HTTP/1.1\r\nHost: service\r\nConnection: close\r\n".encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:50], BODY[50:]))
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    assert exchange(serving, chunked)[2] == wanted_body
    old = f"POST {path} HTTP/1.0\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    assert exchange(serving, old)[2] == wanted_body
    kept = bare("POST", path, BODY).replace(b"Connection: close\r\n", b"")
    status, _, rest = exchange(serving, kept + bare("POST", path, b"{"))
    assert status == 200
    assert rest.startswith(wanted_body)
    assert b"HTTP/1.1 400 Bad Request" in rest
    for lie in (
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 5x\r\n\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    ):
        assert exchange(serving, start + lie)[0] == 400
    assert exchange(serving, bare("POST", path, BODY, "Inference-Header-Content-Length: 99999999999"))[0] == 400
    twice = [f"Inference-Header-Content-Length: {len(BODY)}", "Inference-Header-Content-Length: 0"]
    for headers, wanted_status in ((twice, 400), (["Content-Encoding: gzip", "Content-Encoding: identity"], 415)):
        status, _, refusal = exchange(serving, bare("POST", path, BODY, *headers))
        assert status == wanted_status
        assert set(json.loads(refusal)) == {"error", "code"}
    blob = X.astype("<f4").tobytes()
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}}]}
    ).encode()
    lengths = f"INFERENCE-header-CONTENT-length: {len(head)}"
    assert exchange(serving, bare("POST", path, head + blob, lengths))[2] == wanted_body
    assert serving.stop() == 0


def test_a_deadline_holds_for_a_request_that_is_alone(serve: Serve, tmp_path: Path) -> None:
    """One microsecond is over before anything can run, also where nothing is waited for."""
    serving = serve(models_in(tmp_path))
    late = BODY[:-1] + b', "parameters": {"timeout": 1}}'
    status, _, body = exchange(serving, bare("POST", "/v2/models/norm/infer", late))
    assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")
    with client_of(serving) as client:
        (entry,) = client.get_inference_statistics("norm")["model_stats"]
        assert (entry["execution_count"], entry["inference_stats"]["fail"]["count"]) == (0, 1)
        with pytest.raises(InferenceServerException, match="was not computed"):
            client.infer("norm", [tensor("x", X, "FP32")], timeout=1)


def test_two_servers_of_the_same_file_answer_alike(serve: Serve, tmp_path: Path) -> None:
    """A plain ONNX file and one of a repository: the client sees no difference but the name."""
    onnx.save(graphs.batchnorm_model(), tmp_path / "norm.onnx")
    answers = []
    for path in (tmp_path / "norm.onnx", models_in(tmp_path / "models")):
        with client_of(serve(path)) as client:
            answers.append(client.infer("norm", [tensor("x", X, "FP32")]).as_numpy("y"))
    assert same(answers[0], answers[1])
