"""What a connection promises, on real sockets: both ways of a prediction, every way of bytes, and every end."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import logging
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from service import exchange, http_server
from service.app import create_app
from service.asgi import Application
from service.bodies import RATE_BYTES_S
from service.busy_polling import BusyPolling
from service.coalescing import Coalescer
from service.connection import (
    BEGIN_S,
    KEEP_ALIVE_S,
    LAST_REQUEST_S,
    LINGER_BYTES,
    LINGER_S,
    PART_BYTES,
    Connection,
)
from service.large_body import LARGE_BODY_BYTES, place_for
from service.protocol import v2
from service.repository import Entry, Repository, load
from service.runtime import Runtime, place
from service.settings import Settings
from service.unread import HURRIED_BYTES_S, HURRIED_S, UNREAD_S
from tests import graphs
from tests.asking import JSON_LENGTH, binary_message, save
from tests.bundles import SAMPLE, write_table_bundle
from tests.wire import LIMIT_S, Answer, Client, Held, Loop, Served, message, serving

LOOPS: tuple[Loop, ...] = ("asyncio", "uvloop")
LIMIT_BYTES = 2**20
PIXELS = (3, 224, 224)
"""Of an image: 602,112 bytes, one row, short enough for the event loop."""
WIDTH = 2**17
"""Of an answer from a single number: 524,288 bytes."""
SEVERAL_ROWS = 50_000
"""600,000 bytes that are a batch of their own, in a thread."""


def image_model() -> onnx.ModelProto:
    constants = {"gamma": graphs.GAMMA, "beta": graphs.BETA, "mean": graphs.MEAN, "var": graphs.VAR}
    node = helper.make_node("BatchNormalization", ["x", *constants], ["y"], epsilon=graphs.EPS)
    shape = ["batch", *PIXELS]
    return graphs.model([node], constants, x=(TensorProto.FLOAT, shape), y=shape)


def wide_model() -> onnx.ModelProto:
    """Each number becomes many: y = x * (1, 2, 3, ...)."""
    node = helper.make_node("Mul", ["x", "steps"], ["y"])
    steps = {"steps": np.arange(1, WIDTH + 1, dtype=np.float32)[np.newaxis]}
    return graphs.model([node], steps, x=(TensorProto.FLOAT, ["batch", 1]), y=["batch", WIDTH])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    save(models, "norm", graphs.batchnorm_model())
    save(models, "image", image_model())
    save(models, "wide", wide_model())
    return load(models, place("cpu"), Settings(threads=1, max_batch_rows=2))


@pytest.fixture(params=LOOPS, scope="module")
def loop(request: pytest.FixtureRequest) -> Loop:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def started(repository: Repository, loop: Loop) -> Iterator[Served]:
    with serving(of_all(repository), loop=loop) as served:
        yield served


@pytest.fixture(scope="module")
def started_narrow(repository: Repository, loop: Loop) -> Iterator[Served]:
    with serving(of_all(repository), loop=loop, send_buffer_bytes=32 * 1024) as served:
        yield served


@pytest.fixture(scope="module")
def started_held(repository: Repository, loop: Loop) -> Iterator[tuple[Served, Held]]:
    runtime = Held()
    with serving(with_runtime(repository, runtime), loop=loop) as served:
        yield served, runtime


@pytest.fixture
def served(started: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    """All models, nobody there; and whatever a client does, it is no error of ours."""
    yield from fresh(started, caplog)


@pytest.fixture
def narrow(started_narrow: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    """The same, where the system takes little of an answer that is not read."""
    yield from fresh(started_narrow, caplog)


@pytest.fixture
def held(started_held: tuple[Served, Held], caplog: pytest.LogCaptureFixture) -> Iterator[tuple[Served, Held]]:
    """The model `norm` alone, computed when it is let go."""
    served, runtime = started_held
    runtime.renew()
    for _ in fresh(served, caplog):
        yield served, runtime
        runtime.let_go.set()


def fresh(served: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Served]:
    served.until_connections(0)
    served.clock.ahead_s = 0
    served.by_asgi.clear()
    served.in_place_bytes = 0
    yield served
    served.until(
        lambda: served.app.bodies.held_bytes == 0 and served.app.answers.held_bytes == 0
    )  # whatever became of them
    assert errors(caplog) == []


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def of_all(repository: Repository, body_limit_bytes: int = LIMIT_BYTES, **said: int) -> Application:
    return create_app(repository, Settings(body_limit_bytes=body_limit_bytes, **said))  # type: ignore[arg-type]


def with_runtime(
    repository: Repository, runtime: Runtime, body_limit_bytes: int = LIMIT_BYTES, **said: int
) -> Application:
    """An application whose model `norm` is computed by another runtime, in a thread."""
    live = repository.live("norm")
    live = replace(live, coalescer=Coalescer(runtime, max_rows=64, inline_rows=0, statistics=live.statistics))
    entry = Entry(name="norm", version="1", state="READY", live=live)
    settings = Settings(
        body_limit_bytes=body_limit_bytes,
        timeout_s=0,  # what a test holds is no measure of what others take
        **said,  # type: ignore[arg-type]
    )
    return create_app(Repository([entry], path=Path(), placement=place("cpu"), settings=settings), settings)


# Requests


class Ask(NamedTuple):
    """A prediction that may be sent either way."""

    path: str
    body: bytes
    headers: Sequence[tuple[str, str]]

    def declared(self) -> bytes:
        return message(self.path, self.body, self.headers)

    def chunked(self) -> bytes:
        return message(self.path, self.body, self.headers, chunks=[1])

    def but(self, *headers: tuple[str, str]) -> Ask:
        """The same with these headers, in place of others of their name."""
        kept = [pair for pair in self.headers if pair[0] not in dict(headers)]
        return Ask(self.path, self.body, [*kept, *headers])


JSON = ("content-type", "application/json")
CLOSE = ("connection", "close")


def sample(body: Any = SAMPLE, *headers: tuple[str, str], path: str = "/models/credit/predict") -> Ask:
    return Ask(path, body if isinstance(body, bytes) else json.dumps(body).encode(), [JSON, *headers])


def tensors(
    data: Any = (4.0, -2.5, 41.0), shape: Sequence[int] = (1, 3), path: str = "/v2/models/norm/infer", **said: Any
) -> Ask:
    x = {"name": "x", "shape": list(shape), "datatype": "FP32", "data": data}
    return sample({**said, "inputs": [x]}, path=path)


def rows(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)


def image(seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, *PIXELS)).astype(np.float32)


def binary(x: NDArray[np.float32], model: str = "norm", *, answer: bool = True, **said: Any) -> Ask:
    parameters = {"binary_data_size": x.nbytes}
    inputs = [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": parameters}]
    body, headers = binary_message(
        {**said, "inputs": inputs, "parameters": {"binary_data_output": answer}}, x.tobytes()
    )
    return Ask(f"/v2/models/{model}/infer", body, list(headers.items()))


def raw(x: NDArray[np.float32]) -> Ask:
    headers = [("content-type", "application/octet-stream"), (JSON_LENGTH, "0")]
    return Ask("/v2/models/norm/infer", x.tobytes(), headers)


def json_bytes_of(ask: Ask) -> int:
    return int(dict(ask.headers)[JSON_LENGTH])


SMALL = sample()
WIDE = binary(np.array([[3]], dtype=np.float32), "wide")
LARGE = binary(rows(SEVERAL_ROWS))
IMAGE = binary(image(), "image")
SCRIPT = message("/docs/assets/swagger-ui-bundle.js", method="GET")
ALIVE = message("/v2/health/live", method="GET")


def computed(repository: Repository, model: str, x: NDArray[np.float32]) -> bytes:
    """What the session itself gives."""
    (y,) = repository.live(model).admitted.runtime.run([x])
    return y.tobytes()


def blob(answer: Answer) -> bytes:
    assert answer.status == 200
    return answer.body[int(answer[JSON_LENGTH]) :]


def is_refused(answer: Answer, status: int, code: str) -> bool:
    """With words, and for the last time on this connection."""
    assert set(answer.said) == {"error", "code"}
    assert answer["content-type"] == "application/json"
    assert answer["connection"] == "close"
    return (answer.status, answer.said["code"]) == (status, code)


# Both ways


ALIKE: dict[str, tuple[int, Ask]] = {
    "named features": (200, SMALL),
    "an unknown category": (200, sample({**SAMPLE, "purpose": "space travel"})),
    "several models": (404, sample(path="/predict")),
    "tensors with an id": (200, tensors(id="42")),
    "tensors without an id": (200, tensors()),
    "a version": (200, tensors(path="/v2/models/norm/versions/1/infer")),
    "no batch axis": (200, tensors(shape=[3])),
    "outputs asked for": (200, tensors(outputs=[{"name": "y"}])),
    "binary asked for": (200, tensors(outputs=[{"name": "y", "parameters": {"binary_data": True}}])),
    "no content type": (200, Ask("/v2/models/norm/infer", tensors().body, [])),
    "binary, answer in JSON": (200, binary(rows(5), answer=False)),
    "binary both ways": (200, binary(rows(5), id="7")),
    "large binary both ways": (200, binary(rows(6000))),
    "large, inline": (200, IMAGE),
    "large JSON": (200, tensors(rows(6000).ravel().tolist(), [6000, 3])),
    "raw binary": (200, raw(rows(1))),
    "large raw binary": (400, raw(rows(6000))),
    "an unknown model": (404, tensors(path="/v2/models/nope/infer")),
    "an unknown model, large": (404, Ask("/v2/models/nope/infer", IMAGE.body, IMAGE.headers)),
    "an unknown version": (404, tensors(path="/v2/models/norm/versions/9/infer")),
    "another content type": (415, SMALL.but(("content-type", "text/plain"))),
    "a binary type where nothing is binary": (415, SMALL.but(("content-type", "application/octet-stream"))),
    "malformed JSON": (400, sample(b'{"age": 41,')),
    "NaN": (400, sample(b'{"age": NaN}')),
    "a key twice": (400, sample(b'{"age": 41, "age": 41}')),
    "a wrong shape": (400, tensors(shape=[3, 1])),
    "out of range": (400, tensors([1e39, 1, 2])),
    "an empty body": (400, sample(b"")),
    "a JSON length that is no number": (400, binary(rows(5)).but((JSON_LENGTH, "-5"))),
    "the same, large": (400, IMAGE.but((JSON_LENGTH, "x"))),
    "a JSON length that is too large": (400, binary(rows(5)).but((JSON_LENGTH, "4000"))),
    "the same, large, too": (400, IMAGE.but((JSON_LENGTH, "1000000"))),
    "a huge JSON length": (400, IMAGE.but((JSON_LENGTH, "9" * 5000))),
    "a JSON length where nothing is binary": (200, sample(SMALL.body + b" " * 70_000, (JSON_LENGTH, "9"))),
    "small, gzip welcome": (200, SMALL.but(("accept-encoding", "gzip"))),
    "medium, gzip welcome": (200, binary(rows(500)).but(("accept-encoding", "gzip"))),
    "large, gzip welcome": (200, IMAGE.but(("accept-encoding", "gzip"))),
    "the caller's request id": (200, SMALL.but(("x-request-id", "caller/1"))),
    "an invalid request id": (200, SMALL.but(("x-request-id", "caller 1"))),
    "the same header twice": (200, SMALL.but(("x-request-id", "one"), ("x-request-id", "two"))),
    "a content type twice": (415, SMALL.but(JSON, JSON)),
    "a JSON length twice": (400, binary(rows(5)).but((JSON_LENGTH, "5"), (JSON_LENGTH, "5"))),
    "encodings in two headers": (200, IMAGE.but(("accept-encoding", "br"), ("accept-encoding", "deflate"))),
}


@pytest.mark.parametrize(("status", "ask"), ALIKE.values(), ids=ALIKE.keys())
def test_both_ways_answer_alike(served: Served, status: int, ask: Ask) -> None:
    """By status, headers and body, whether alone, in company or by ASGI; what is declared does not go by ASGI."""
    with served.connect() as client:
        alone = client.ask(ask.declared())
        with served.connect():
            in_company = client.ask(ask.declared())
            assert served.by_asgi == []
        by_asgi = client.ask(ask.chunked())
        assert len(served.by_asgi) == 1
    assert alone.status == status
    assert alone.without_chance == in_company.without_chance == by_asgi.without_chance


def test_what_is_compared_is_compared(served: Served) -> None:
    """Both ways give what they should: an encoding, the caller's id, the length of the JSON."""
    with served.connect() as client:
        zipped = client.ask(IMAGE.but(("accept-encoding", "gzip"), ("x-request-id", "caller/1")).declared())
        plain = client.ask(IMAGE.declared())
        assert zipped["x-content-type-options"] == plain["x-content-type-options"] == "nosniff"
        assert (zipped["content-encoding"], zipped["vary"], zipped["x-request-id"]) == (
            "gzip", "accept-encoding", "caller/1",
        )  # fmt: skip
        assert gzip.decompress(zipped.body) == plain.body
        assert zipped[JSON_LENGTH] == plain[JSON_LENGTH]
        assert client.ask(SMALL.declared())["x-request-id"] != client.ask(SMALL.declared())["x-request-id"]
        assert client.ask(SMALL.declared()).get("connection") is None


BY_ASGI: dict[str, tuple[int, bytes]] = {
    "a chunked body": (200, SMALL.chunked()),
    "a compressed body": (200, sample(gzip.compress(SMALL.body), ("content-encoding", "gzip")).declared()),
    "HTTP/1.0": (200, message(SMALL.path, SMALL.body, SMALL.headers, version="1.0")),
    "another method": (405, message(SMALL.path, method="GET")),
    "another method with a body": (405, message(SMALL.path, SMALL.body, SMALL.headers, method="PUT")),
    "a query": (200, message(SMALL.path + "?a=1", SMALL.body, SMALL.headers)),
    "a whole URL": (200, message("http://service" + SMALL.path, SMALL.body, SMALL.headers)),
    "a long path": (404, message(f"/models/{'a' * 600}/predict", SMALL.body, SMALL.headers)),
    "too large": (413, message(SMALL.path, b" " * (LIMIT_BYTES + 1), SMALL.headers)),
    "too large, binary": (413, message(IMAGE.path, bytes(LIMIT_BYTES + 1), IMAGE.headers)),
    "too large, in chunks": (413, message(SMALL.path, b" " * (LIMIT_BYTES + 1), SMALL.headers, chunks=[9])),
}


@pytest.mark.parametrize(("status", "content"), BY_ASGI.values(), ids=BY_ASGI.keys())
def test_what_is_out_of_the_ordinary_goes_by_asgi(served: Served, status: int, content: bytes) -> None:
    with served.connect() as client:
        assert client.ask(content).status == status
        assert len(served.by_asgi) == 1


def test_the_largest_body_goes_the_short_way(served: Served) -> None:
    """The limit itself is within the limit."""
    with served.connect() as client:
        padded = sample(SMALL.body + b" " * (LIMIT_BYTES - len(SMALL.body)))
        assert client.ask(padded.declared()).status == 200
        assert served.by_asgi == []


def test_who_declares_too_much_is_told_before_sending_it(served: Served) -> None:
    content = message(SMALL.path, b" " * (LIMIT_BYTES + 1), SMALL.headers)
    with served.connect() as client:
        assert client.ask(content[: -LIMIT_BYTES - 1]).said["code"] == "body_too_large"


def test_who_asks_whether_to_go_on_is_told(served: Served) -> None:
    """`Expect: 100-continue`: first to go on, then the answer."""
    content = SMALL.but(("expect", "100-continue")).declared()
    with served.connect() as client:
        assert client.ask(content[: -len(SMALL.body)]).status == 100
        assert client.ask(SMALL.body).without_chance == client.ask(SMALL.declared()).without_chance
        assert served.by_asgi == [f"POST {SMALL.path}"]


def test_http_1_0_is_answered_once(served: Served) -> None:
    with served.connect() as client:
        answer = client.ask(message(SMALL.path, SMALL.body, SMALL.headers, version="1.0"))
        assert answer["connection"] == "close"
        assert client.rest() == b""


@pytest.mark.parametrize("slash", ["%2F", "%2f"])
def test_an_encoded_slash_stays_within_its_name(served: Served, slash: str) -> None:
    """On both ways it is one segment of the path, and no model has such a name."""
    ask = sample(path=f"/models/credit{slash}versions/predict")
    with served.connect() as client:
        declared, chunked = client.ask(ask.declared()), client.ask(ask.chunked())
        assert (declared.status, declared.said["code"]) == (404, "unknown_model")
        assert declared.without_chance == chunked.without_chance


def test_an_encoded_name_is_the_name(served: Served) -> None:
    """`%65` is an `e`, on both ways."""
    ask = sample(path="/models/cr%65dit/predict")
    with served.connect() as client:
        assert client.ask(ask.chunked()).status == 200
        assert client.ask(ask.declared()).status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_http_2_is_passed_over(served: Served, chunked: bool) -> None:
    """As Java's HttpClient and `curl --http2` make it with each request; a server may ignore it (RFC 9110, 7.8)."""
    ask = SMALL.but(("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABk"))
    with served.connect() as client:
        assert client.ask(ask.chunked() if chunked else ask.declared()).status == 200


HTTP_2 = (("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABk"))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("where", [b"connection", b"pgrade:", b"h2c", b"http2-settings", b"\r\n\r\n", b"{"])
def test_an_offer_is_passed_over_wherever_the_head_is_split(served: Served, where: bytes, chunked: bool) -> None:
    """And what is in the body is never taken for a request."""
    ask = Ask(SMALL.path, ALIVE, SMALL.headers).but(*HTTP_2)
    for request, status in ((ask, 400), (SMALL.but(*HTTP_2), 200)):
        content = request.chunked() if chunked else request.declared()
        split = content.find(where) + 1 or len(content) // 2
        with served.connect() as client:
            client.send_apart(content[:split], content[split:])
            assert client.answer().status == status
            assert client.ask(SMALL.declared()).status == 200


def test_an_offer_is_passed_over_behind_other_requests(served: Served) -> None:
    with served.connect() as client:
        client.send((SMALL.declared() + SMALL.but(*HTTP_2).declared() + SMALL.but(*HTTP_2).chunked()) * 3 + ALIVE)
        assert [client.answer().status for _ in range(10)] == [200] * 10


def test_nobody_is_connected_to_somewhere_else(served: Served) -> None:
    """This is no proxy; and what follows such a head is not read."""
    with served.connect() as client:
        refusal = client.ask(b"CONNECT other:1 HTTP/1.1\r\nhost: other\r\n\r\n" + ALIVE)
        assert is_refused(refusal, 400, "bad_request")
        assert refusal.said["error"] == "CONNECT is for proxies, and this is none; send the request itself"
        assert client.rest() == b""


def test_a_length_of_very_many_digits_is_no_error_of_ours(served: Served) -> None:
    """However it is answered, it is not with a 500 and a traceback in the log."""
    padded = message(SMALL.path, SMALL.body, SMALL.headers, version="1.0").replace(
        b"content-length: ", b"content-length: " + b"0" * 5000
    )
    with served.connect() as client:
        assert client.ask(padded).status in (200, 400, 413)


# Packets


IN_PIECES = {
    "JSON": SMALL.declared(),
    "binary": binary(rows(1), id="a").declared(),
    "chunked": sample({}).chunked(),
}


@pytest.mark.parametrize("content", IN_PIECES.values(), ids=IN_PIECES.keys())
def test_a_request_may_be_split_anywhere(served: Served, content: bytes) -> None:
    """Within a name, a value, the end of the head, the body."""
    with served.connect() as client:
        whole = client.ask(content).without_chance
        for end in range(1, len(content)):
            client.send_apart(content[:end], content[end:])
            assert client.answer().without_chance == whole


@pytest.mark.parametrize("content", IN_PIECES.values(), ids=IN_PIECES.keys())
def test_a_request_may_come_byte_by_byte(served: Served, content: bytes) -> None:
    with served.connect() as client:
        whole = client.ask(content).without_chance
        client.send_apart(*[content[i : i + 1] for i in range(len(content))])
        assert client.answer().without_chance == whole


def cut(content: bytes, *ends: int) -> list[bytes]:
    return [content[start:end] for start, end in itertools.pairwise([0, *ends, len(content)])]


SPLITS = {
    "at once": [],
    "the head": [0],
    "the head and a byte": [1],
    "within the JSON": [30],
    "all but the last byte of the JSON": [-1],
    "after the JSON": [None],
    "within a number": [0, 31, -1, 301, 4097, 65537],
    "in random pieces": sorted(np.random.default_rng(3).integers(1, 590_000, 20).tolist()),
    "all but the last byte": [599_000],
}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("model", ["image", "norm"])
def test_a_large_body_may_come_in_any_pieces(
    served: Served, repository: Repository, model: str, splits: Sequence[int | None]
) -> None:
    """Its answer is the session's, bit by bit; and what follows it in the same packet is answered after it."""
    x = image(2) if model == "image" else rows(SEVERAL_ROWS)
    ask = binary(x, model)
    content = ask.declared()
    head_bytes, json_bytes = len(content) - len(ask.body), json_bytes_of(ask)
    ends = sorted(head_bytes + (json_bytes if end is None else json_bytes + end if end < 0 else end) for end in splits)
    *packets, last = cut(content, *ends)
    with served.connect() as client:
        alone = client.ask(SMALL.declared()).without_chance
        client.send_apart(*packets)
        client.send(last + SMALL.declared())
        assert blob(client.answer()) == computed(repository, model, x)
        assert client.answer().without_chance == alone
        assert f"POST {ask.path}" not in served.by_asgi
        assert served.in_place_bytes > 0 or not packets


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
def test_so_may_a_large_one_in_json(served: Served, repository: Repository, splits: Sequence[int | None]) -> None:
    x = rows(SEVERAL_ROWS // 5)
    ask = tensors(x.ravel().tolist(), x.shape)
    content = ask.declared()
    size = len(ask.body)
    ends = sorted(len(content) - size + min(end or 0, size - 1) % size for end in splits)
    *packets, last = cut(content, *ends)
    with served.connect() as client:
        client.send_apart(*packets)
        client.send(last + SMALL.declared())
        (y,) = client.answer().said["outputs"]
        assert np.float32(y["data"]).tobytes() == computed(repository, "norm", x)
        assert client.answer().status == 200
        assert served.in_place_bytes > 0 or not packets


@pytest.mark.parametrize("model", ["image", "norm"])
def test_large_bodies_may_follow_one_another(served: Served, repository: Repository, model: str) -> None:
    """In one stream, each with its own numbers."""
    inputs = [image(seed) if model == "image" else rows(SEVERAL_ROWS + seed) for seed in range(3)]
    with served.connect() as client:
        client.send(b"".join([binary(x, model).declared() for x in inputs]))
        for x in inputs:
            assert blob(client.answer()) == computed(repository, model, x)


@pytest.mark.parametrize("size", [LARGE_BODY_BYTES - 1, LARGE_BODY_BYTES, LARGE_BODY_BYTES + 1])
def test_from_one_size_on_a_body_is_read_in_its_place(served: Served, size: int) -> None:
    ask = binary(rows(5000))
    json_bytes = size - 60_000
    text = ask.body[: json_bytes_of(ask)].ljust(json_bytes)
    padded = Ask(ask.path, text + ask.body[-60_000:], [*ask.headers[:1], (JSON_LENGTH, str(json_bytes))])
    with served.connect() as client:
        content = padded.declared()
        client.send_apart(content[: -len(padded.body)])
        client.send(padded.body)
        assert blob(client.answer()) == blob(client.ask(ask.declared()))
        assert (served.in_place_bytes > 0) == (size >= LARGE_BODY_BYTES)


@pytest.mark.parametrize("length", [64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1])
def test_an_answer_arrives_whole(served: Served, length: int) -> None:
    """Below, at and above the size from which it is not copied behind its head."""
    with served.connect() as client:
        short = len(client.ask(tensors(id="").declared()).body)
        answer = client.ask(tensors(id="i" * (length - short)).declared())
        assert len(answer.body) == length
        assert answer.said["id"] == "i" * (length - short)
        assert client.ask(tensors(id="next").declared()).said["id"] == "next"


# One connection, many requests


def numbered(i: int) -> bytes:
    """Predictions of three kinds, and now and then something else."""
    name = ("x-request-id", f"number-{i}")
    kinds = [sample({**SAMPLE, "age": 20 + i}, name), tensors([i, 1, 2]).but(name), binary(rows(1 + i)).but(name)]
    return message("/v2/health/live", b"", [name], method="GET") if i % 7 == 1 else kinds[i % 3].declared()


@pytest.mark.parametrize("count", [4, 50])
@pytest.mark.parametrize("company", [False, True])
def test_pipelined_requests_are_answered_in_order(served: Served, count: int, company: bool) -> None:
    """All in one packet; each answer is the one that its request gets by itself."""
    everything = [numbered(i) for i in range(count)]
    with served.connect() as client:
        one_by_one = [client.ask(one).without_chance for one in everything]
        other = served.connect() if company else None
        client.send(b"".join(everything))
        assert [client.answer().without_chance for _ in everything] == one_by_one
        if other is not None:
            other.leave()
    assert [answer["x-request-id"] for answer in one_by_one] == [f"number-{i}" for i in range(count)]


def test_what_comes_before_the_answer_waits_for_it(held: tuple[Served, Held]) -> None:
    """A quick request behind a slow one, and a third of which half is there."""
    served, runtime = held
    with served.connect() as client:
        half = tensors(id="half").declared()
        client.send(tensors(id="slow").declared() + ALIVE + half[:-20])
        runtime.wait_until_it_runs()
        with served.connect() as other:
            other.ask(ALIVE)
        assert client.hears_nothing
        runtime.let_go.set()
        assert client.answer().said["id"] == "slow"
        assert client.answer().said == {"live": True}
        client.send(half[-20:])
        assert client.answer().said["id"] == "half"


def test_a_caller_is_looked_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer says whom it went to; and it is told when something came."""
    told: list[object] = []
    monkeypatch.setattr(BusyPolling, "answered", lambda _, caller, loop: told.append(id(caller)))
    monkeypatch.setattr(BusyPolling, "received", lambda _: told.append("received"))
    with served.connect() as one, served.connect() as other:
        for client in (one, one, other):
            assert client.ask(SMALL.declared()).status == 200
    served.until(lambda: len(told) == 6)
    first = told[1]
    assert told[:5] == ["received", first, "received", first, "received"]
    assert told[5] not in ("received", first)


def test_a_connection_is_used_again_and_again(served: Served) -> None:
    with served.connect() as client:
        answers = {client.ask(SMALL.declared()).without_chance for _ in range(100)}
        assert len(answers) == 1
        assert served.connections == 1
        assert served.by_asgi == []


@pytest.mark.parametrize(
    "content",
    [SMALL.but(CLOSE).declared(), SMALL.but(CLOSE).chunked(), IMAGE.but(CLOSE).declared(), LARGE.but(CLOSE).declared()],
    ids=["short", "asgi", "large", "large, in a thread"],
)
def test_who_wants_to_close_is_answered_and_closed(served: Served, content: bytes) -> None:
    with served.connect() as client:
        answer = client.ask(content)
        assert (answer.status, answer["connection"]) == (200, "close")
        assert client.rest() == b""
        served.until_connections(0)


def test_who_ends_its_side_after_asking_is_answered(served: Served) -> None:
    """As `nc` does with what is piped into it."""
    with served.connect() as client:
        whole = client.ask(SMALL.declared()).without_chance
        client.send(SMALL.declared())
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer().without_chance == whole
        assert client.rest() == b""


# Clients that leave


def few(count: int) -> bytes:
    return binary(rows(count)).declared()


def few_by_asgi(count: int) -> bytes:
    return binary(rows(count)).chunked()


def many(count: int) -> bytes:
    """Enough for a place of their own."""
    return binary(rows(10_000 + count)).declared()


WAYS = [few, few_by_asgi, many]


@pytest.mark.parametrize("way", WAYS)
def test_for_who_has_left_nothing_is_computed(held: tuple[Served, Held], way: Callable[[int], bytes]) -> None:
    """Of three that wait for a slow model, the second leaves."""
    served, runtime = held
    with served.connect() as first:
        first.send(few(1))
        runtime.wait_until_it_runs()
        second = served.connect()
        second.send_apart(way(2))
        with served.connect() as third:
            assert third.ask(ALIVE).status == 200  # so the second waits by now, on whichever way
            third.send_apart(few(3))
            second.leave()
            served.until_connections(2)
            runtime.let_go.set()
            assert {first.answer().status, third.answer().status} == {200}
    assert runtime.fake.batches == [1, 3]


HALVES = {
    "a head": SMALL.declared()[:30],
    "a body": SMALL.declared()[:-5],
    "a large body": IMAGE.declared()[:100_000],
    "a large body, the head": IMAGE.declared()[: -len(IMAGE.body)],
    "a chunked body": SMALL.chunked()[:-5],
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES.keys())
@pytest.mark.parametrize("abruptly", [False, True])
def test_who_leaves_half_way_harms_nobody(served: Served, half: bytes, abruptly: bool) -> None:
    """Nothing is logged as an error (the fixture looks), and the next is served."""
    client = served.connect()
    client.send_apart(half)
    client.leave(abruptly=abruptly)
    served.until_connections(0)
    with served.connect() as other:
        assert other.ask(SMALL.declared()).status == 200


@pytest.mark.parametrize("ask", [WIDE.declared(), WIDE.chunked(), SCRIPT], ids=["short", "asgi", "a file"])
def test_who_leaves_while_it_is_answered_harms_nobody(narrow: Served, ask: bytes) -> None:
    client = narrow.connect(receive_buffer_bytes=4096)
    client.send(ask * 3)
    narrow.until(lambda: narrow.unsent_bytes_now > 50_000)
    client.leave(abruptly=True)
    narrow.until_connections(0)
    with narrow.connect() as other:
        assert other.ask(SMALL.declared()).status == 200


# Shutdown


@contextmanager
def ending(served: Served) -> Iterator[None]:
    """It begins to end, and has let go of those who asked for nothing."""
    with served.connect() as idle:
        assert idle.ask(ALIVE).status == 200
        yield
        served.begin_shutdown()
        assert idle.rest() == b""


@pytest.mark.parametrize("way", WAYS)
def test_who_waits_is_answered_before_the_end(repository: Repository, loop: Loop, way: Callable[[int], bytes]) -> None:
    """Whole, and for the last time."""
    runtime = Held()
    with serving(with_runtime(repository, runtime), loop=loop) as served, served.connect() as client:
        with ending(served):
            client.send(way(2))
            runtime.wait_until_it_runs()
        assert not served.ended.done()
        runtime.let_go.set()
        answer = client.answer()
        assert blob(answer) == (2 * rows(runtime.fake.batches[0])).tobytes()
        assert answer["connection"] == "close"
        assert client.rest() == b""
        served.ended.result(LIMIT_S)


@pytest.mark.parametrize(
    ("before", "half"),
    [(b"", b""), *itertools.product([b"", ALIVE], HALVES.values())],
    ids=["nothing yet", *[f"{name}, {count}" for count in ("first", "second") for name in HALVES]],
)
def test_a_request_that_has_begun_is_answered_before_the_end(
    repository: Repository, loop: Loop, before: bytes, half: bytes
) -> None:
    """Its rest comes when the server is about to end; and a first one may begin even then."""
    wholes = [SMALL.declared(), SMALL.chunked(), IMAGE.declared()]
    (whole, *_) = [whole for whole in wholes if whole.startswith(half)]
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        if before:
            client.ask(before)
        with ending(served):
            client.send_apart(half)
        client.send(whole[len(half) :])
        answer = client.answer()
        assert (answer.status, answer["connection"]) == (200, "close")
        assert client.rest() == b""
        served.ended.result(LIMIT_S)


def test_pipelined_requests_are_answered_before_the_end(repository: Repository, loop: Loop) -> None:
    """All of them, and the last says that it is the last."""
    runtime = Held()
    with serving(with_runtime(repository, runtime), loop=loop) as served, served.connect() as client:
        with ending(served):
            client.send(few(1) + ALIVE + few(2))
            runtime.wait_until_it_runs()
        runtime.let_go.set()
        answers = [client.answer() for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert [answer.get("connection") for answer in answers] == [None, None, "close"]
        assert client.rest() == b""


def test_who_asks_while_it_ends_is_asked_to_go(repository: Repository, loop: Loop) -> None:
    """Each answer of the time between the signal and the end is the last of its connection, on every way."""
    with serving(of_all(repository), loop=loop, shutdown_delay_s=60) as served, ExitStack() as open_clients:
        contents = [SMALL.declared(), SMALL.chunked(), IMAGE.declared(), LARGE.declared(), ALIVE]
        clients = [open_clients.enter_context(served.connect()) for _ in contents]
        assert {client.ask(ALIVE).get("connection") for client in clients} == {None}
        served.begin_shutdown()
        served.until(lambda: served.app.readiness.ending)
        for client, content in zip(clients, contents, strict=True):
            answer = client.ask(content)
            assert (answer.status, answer["connection"]) == (200, "close")
            assert client.rest() == b""
        served.server.handle_exit(signal.SIGINT, None)  # it would take its time


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES.keys())
def test_a_late_client_does_not_hold_up_the_end(repository: Repository, loop: Loop, half: bytes) -> None:
    """It is looked after until the end."""
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        with ending(served):
            client.send_apart(half)
        served.clock.ahead_s += 60
        assert is_refused(client.answer(), 408, "request_too_slow")
        served.ended.result(LIMIT_S)


def test_who_never_says_a_word_does_not_hold_up_the_end(repository: Repository, loop: Loop) -> None:
    """Who has only just come is waited for, for a moment."""
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        with ending(served):
            pass
        served.pass_s(LAST_REQUEST_S - 1)
        assert served.connections == 1
        served.clock.ahead_s += 2
        assert client.rest() == b""
        served.ended.result(LIMIT_S)


def test_who_does_not_read_does_not_hold_up_the_end(
    repository: Repository, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it did not read in the time for that is given up."""
    monkeypatch.setattr(http_server, "DRAIN_LIMIT_S", 0.1)
    with (
        serving(of_all(repository), loop=loop, send_buffer_bytes=32 * 1024) as served,
        served.connect(receive_buffer_bytes=4096) as client,
    ):
        client.send_apart(WIDE.declared())
        served.begin_shutdown()
        served.ended.result(LIMIT_S)


@pytest.mark.parametrize("way", WAYS)
def test_who_waited_in_vain_is_told_at_the_end(
    repository: Repository, loop: Loop, way: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model does not come back in the time for the end: that is an answer too, and the only one."""
    monkeypatch.setattr(http_server, "DRAIN_LIMIT_S", 0.3)
    runtime = Held()
    with serving(with_runtime(repository, runtime), loop=loop) as served, served.connect() as client:
        client.send(way(2))
        runtime.wait_until_it_runs()
        served.begin_shutdown()
        assert is_refused(client.answer(), 503, "not_ready")
        runtime.let_go.set()
        assert client.rest() == b""


# Late clients


def body_bytes_of(half: bytes) -> int:
    _, _, body = half.partition(b"\r\n\r\n")
    return len(body)


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES.keys())
@pytest.mark.parametrize("before", [b"", SMALL.declared(), IMAGE.declared()], ids=["first", "second", "after a large"])
def test_half_a_request_is_answered_408(served: Served, half: bytes, before: bytes) -> None:
    """After `BEGIN_S`, and the time that what has come may take."""
    with served.connect() as client:
        if before:
            assert client.ask(before).status == 200
        served.pass_s(1)
        client.send_apart(half)
        served.pass_s(BEGIN_S + body_bytes_of(half) / RATE_BYTES_S - 1)
        assert client.hears_nothing
        served.pass_s(2)
        assert is_refused(client.answer(), 408, "request_too_slow")
        assert client.rest() == b""
        served.until_connections(0)


@pytest.mark.parametrize(
    ("content", "patience_s"),
    [
        (b"", BEGIN_S),
        (b"\r\n", BEGIN_S),
        (SMALL.declared(), KEEP_ALIVE_S),
        (SMALL.chunked(), KEEP_ALIVE_S),
        (IMAGE.declared(), KEEP_ALIVE_S),
        (sample(b"{").declared(), KEEP_ALIVE_S),
        (ALIVE, KEEP_ALIVE_S),
    ],
    ids=["never a word", "a line's end", "short", "asgi", "large", "refused", "something else"],
)
def test_who_is_idle_is_let_go_of_without_words(served: Served, content: bytes, patience_s: float) -> None:
    with served.connect() as client:
        if len(content) > 2:
            client.ask(content)
        else:
            client.send(content)
        served.pass_s(patience_s - 1)
        assert served.connections == 1
        served.pass_s(2)
        assert client.rest() == b""
        served.until_connections(0)


def padded(ask: Ask) -> Ask:
    return Ask(ask.path, ask.body + b" " * 600_000, ask.headers)


SLOWLY = {"short": padded(SMALL).declared(), "asgi": padded(SMALL).chunked(), "large": IMAGE.declared()}


@pytest.mark.parametrize("content", SLOWLY.values(), ids=SLOWLY.keys())
def test_who_keeps_to_the_rate_is_served(served: Served, content: bytes) -> None:
    """Also if it takes longer than what a request has to begin with."""
    pieces = cut(content, *range(RATE_BYTES_S, len(content), RATE_BYTES_S))
    assert 0.9 * len(pieces) > BEGIN_S
    with served.connect() as client:
        for piece in pieces:
            client.send_apart(piece)
            served.pass_s(0.9)
        assert client.answer().status == 200


@pytest.mark.parametrize("content", SLOWLY.values(), ids=SLOWLY.keys())
def test_who_is_slower_than_the_rate_is_not(served: Served, content: bytes) -> None:
    """At half of it, what came buys half of the time that it took."""
    pieces = cut(content, *range(RATE_BYTES_S, len(content), RATE_BYTES_S))
    with served.connect() as client:
        taken = 0
        while served.connections:
            client.send_apart(pieces[taken])
            taken += 1
            served.pass_s(2)
        assert BEGIN_S - 1 <= taken <= BEGIN_S + 2
        assert is_refused(client.answer(), 408, "request_too_slow")


@pytest.mark.parametrize("way", WAYS)
def test_a_slow_model_is_waited_for(held: tuple[Served, Held], way: Callable[[int], bytes]) -> None:
    """However long; and from its answer on, the client has its time again."""
    served, runtime = held
    with served.connect() as client:
        client.send(way(1))
        runtime.wait_until_it_runs()
        served.pass_s(10_000)
        runtime.let_go.set()
        assert client.answer().status == 200
        served.pass_s(KEEP_ALIVE_S - 1)
        assert served.connections == 1
        served.pass_s(2)
        assert client.rest() == b""


def test_who_waits_for_an_answer_need_not_send_the_next_request(held: tuple[Served, Held]) -> None:
    """The time for the one that it has begun runs from the answer on."""
    served, runtime = held
    with served.connect() as client:
        client.send_apart(few(1) + HALVES["a body"])
        served.pass_s(10_000)
        runtime.let_go.set()
        assert client.answer().status == 200
        served.pass_s(BEGIN_S - 1)
        assert served.connections == 1
        served.pass_s(2)
        assert is_refused(client.answer(), 408, "request_too_slow")


def test_nobody_is_late_while_an_answer_is_due(held: tuple[Served, Held]) -> None:
    """Of three that are pipelined, the second takes long, and half of the third is there."""
    served, runtime = held
    with served.connect() as client:
        client.send(ALIVE + few(1) + HALVES["a body"])
        assert client.answer().status == 200
        runtime.wait_until_it_runs()
        served.pass_s(BEGIN_S + 1)
        runtime.let_go.set()
        assert client.answer().status == 200


@pytest.mark.parametrize("content", [WIDE.declared(), WIDE.chunked()], ids=["short", "asgi"])
def test_who_does_not_read_is_let_go_of(narrow: Served, content: bytes) -> None:
    """With what it did not read, when it has not read anything for long."""
    with narrow.connect(receive_buffer_bytes=4096) as client:
        client.send_apart(content)
        narrow.until(lambda: narrow.unsent_bytes_now > 50_000)
        narrow.pass_s(UNREAD_S - 2)
        assert narrow.connections == 1
        narrow.pass_s(5)
        narrow.until_connections(0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(WIDE.declared(), id="an answer"),
        pytest.param(WIDE.chunked(), id="an answer by asgi"),
        pytest.param(WIDE.but(CLOSE).declared(), id="the last answer"),
        pytest.param(WIDE.but(CLOSE).chunked(), id="the last answer by asgi"),
        pytest.param(WIDE.declared() * 2, id="two answers"),
        pytest.param(WIDE.chunked() * 2, id="two answers by asgi"),
        pytest.param(SCRIPT, id="a file"),
    ],
)
def test_who_does_not_read_holds_nothing_for_ever(narrow: Served, content: bytes) -> None:
    with narrow.connect(receive_buffer_bytes=4096) as client:
        client.send_apart(content)
        narrow.until(lambda: narrow.unsent_bytes_now > 50_000)
        for _ in range(2):
            narrow.pass_s(3600)
        assert narrow.connections == 0


@pytest.mark.parametrize("content", [WIDE.declared(), WIDE.chunked(), SCRIPT], ids=["short", "asgi", "a file"])
@pytest.mark.parametrize(("each_s", "stays"), [(0.2, True), (6.0, False)], ids=["at the rate", "slower"])
def test_who_reads_slowly_is_let_go_of(narrow: Served, content: bytes, each_s: float, stays: bool) -> None:
    """Answers are read at the rate at which requests are sent, or not at all."""
    with narrow.connect(receive_buffer_bytes=4096) as client:
        client.send_apart(content * 3)
        narrow.until(lambda: narrow.unsent_bytes_now > 50_000)
        for _ in range(60):
            if not narrow.connections:
                break
            before = narrow.unsent_bytes
            for _ in range(2):
                client.socket.recv(4096)
            narrow.pass_s(each_s)
            assert narrow.unsent_bytes <= before + 4 * WIDTH
        assert bool(narrow.connections) == stays


ROOM_BYTES = 3 * 2**20


@contextmanager
def crowded(repository: Repository, loop: Loop, content: bytes) -> Iterator[tuple[Served, list[Client]]]:
    """Clients that read nothing of their answers, as many as take the room."""
    with (
        serving(of_all(repository), loop=loop, send_buffer_bytes=32 * 1024) as served,
        ExitStack() as open_clients,
    ):
        served.app.answers.max_bytes = ROOM_BYTES
        clients = []
        while unread_bytes(served) + 4 * WIDTH <= ROOM_BYTES:
            clients.append(client := open_clients.enter_context(served.connect(receive_buffer_bytes=4096)))
            before = unread_bytes(served)
            client.send_apart(content)
            served.until(lambda before=before: served.app.answers.held_bytes > before)  # type: ignore[misc]
        # also what the system has taken of it is still here, and the beginning of it is with the client
        assert unread_bytes(served) == pytest.approx(len(clients) * 4 * WIDTH, rel=0.05)
        yield served, clients


@pytest.mark.parametrize("content", [WIDE.declared(), WIDE.chunked()], ids=["short", "asgi"])
def test_answers_that_nobody_reads_take_so_much_and_no_more(repository: Repository, loop: Loop, content: bytes) -> None:
    """Whoever asks for another large one is told to come again, before it is computed, and small ones are given; who
    has not read is answered all the same, and makes room."""
    wanted = computed(repository, "wide", np.array([[3]], dtype=np.float32))
    statistics = repository.live("wide").statistics
    with crowded(repository, loop, content) as (served, clients):
        ran = statistics.document(name="wide", version="1")["execution_count"]
        with served.connect() as other:
            refused = other.ask(content)
            assert (refused.status, refused.said["code"]) == (429, "server_full")
            assert refused["retry-after"] == "1"
            assert f"of {ROOM_BYTES} that may be (the setting 'max_reading_bytes')" in refused.said["error"]
            for one in (SMALL.declared(), SMALL.chunked(), ALIVE):
                assert other.ask(one).status == 200
        assert statistics.document(name="wide", version="1")["execution_count"] == ran
        for client in clients:
            assert blob(client.answer()) == wanted
        assert unread_bytes(served) == 0
        with served.connect() as other:
            assert blob(other.ask(content)) == wanted


@pytest.mark.parametrize("content", [WIDE.declared(), WIDE.chunked()], ids=["short", "asgi"])
def test_however_many_ask_at_once(repository: Repository, loop: Loop, content: bytes) -> None:
    """All are here before the first is computed."""
    with (
        serving(of_all(repository), loop=loop, send_buffer_bytes=32 * 1024) as served,
        ExitStack() as open_clients,
    ):
        served.app.answers.max_bytes = ROOM_BYTES
        clients = [open_clients.enter_context(served.connect(receive_buffer_bytes=4096)) for _ in range(40)]
        for client in clients:
            client.send(content)
        begun = Counter(client.socket.recv(12) for client in clients)
        fit = ROOM_BYTES // (4 * WIDTH)
        assert begun == {b"HTTP/1.1 200": pytest.approx(fit, abs=1), b"HTTP/1.1 429": pytest.approx(40 - fit, abs=1)}
        assert unread_bytes(served) < ROOM_BYTES + 4 * WIDTH


def test_an_answer_larger_than_all_room_is_given_to_who_is_alone(repository: Repository, loop: Loop) -> None:
    wanted = computed(repository, "wide", np.array([[3]], dtype=np.float32))
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        served.app.answers.max_bytes = 1000
        for _ in range(3):
            assert blob(client.ask(WIDE.declared())) == wanted


def test_what_waits_behind_an_answer_that_is_not_read_counts_too(narrow: Served) -> None:
    with narrow.connect(receive_buffer_bytes=4096) as client:
        client.send_apart(WIDE.declared())
        narrow.until(lambda: narrow.app.answers.held_bytes > 3.8 * WIDTH)
        client.send_apart(WIDE.declared())
        narrow.until(lambda: narrow.app.answers.held_bytes > 7.6 * WIDTH)
        assert [client.answer().status, client.answer().status] == [200, 200]


def test_who_does_not_read_leaves_when_others_need_the_room(
    repository: Repository, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """And not when nobody came; who reads, stays. The log says so."""
    with crowded(repository, loop, WIDE.declared()) as (served, clients):
        served.pass_s(HURRIED_S + 1)
        assert served.connections == len(clients)
        reads, taken_bytes = clients[0], 0
        while taken_bytes < 2 * HURRIED_BYTES_S:
            taken_bytes += len(reads.socket.recv(2**16))
        with served.connect() as other:
            assert other.ask(WIDE.declared()).status == 429
            served.until(lambda: not served.app.answers.turned_away)  # it is not remembered for long
            served.app.answers.turned_away = True
            served.pass_s(1)
            served.until_connections(2)
            assert other.ask(WIDE.declared()).status == 200


def test_the_end_does_not_wait_long_for_who_does_not_read(
    repository: Repository, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), crowded(repository, loop, WIDE.declared()) as (served, clients):
        served.pass_s(0)
        served.begin_shutdown()
        served.until(lambda: all(connection._hurries for connection in served.server._connections))
        served.clock.ahead_s += HURRIED_S + 1
        served.until_connections(0)
    assert f"{len(clients)} connections were cut: their clients did not read" in caplog.text
    assert "all who read were answered" in caplog.text


@pytest.mark.parametrize("ends", ["it is refused", "the client leaves"])
def test_of_a_body_that_is_not_answered_nothing_is_kept(
    repository: Repository, loop: Loop, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Not even by what is left of its connection, which may be there for long after it."""
    places: list[ref[Any]] = []

    def noted(size: int, json_bytes: int) -> memoryview:
        place = place_for(size, json_bytes)
        places.append(ref(place.obj))
        return place

    monkeypatch.setattr(exchange, "place_for", noted)
    content, half = IMAGE.declared(), LIMIT_BYTES // 3
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        gc.disable()
        try:
            client.send_apart(content[:half])
            if ends == "it is refused":
                served.app.bodies.max_bytes = half
                client.send(content[half : half + 20_000])
                assert is_refused(client.answer(), 429, "server_full")
            else:
                client.leave(abruptly=True)
                served.until_connections(0)
            served.until(lambda: places[0]() is None)
            assert served.connections == (ends == "it is refused")  # for a while, so that the answer is read
        finally:
            gc.enable()


def test_idle_is_idle_also_after_an_early_answer(served: Served) -> None:
    """A wrong method is refused by the head; a small body is read all the same, and the connection used again."""
    content = message(SMALL.path, SMALL.body, SMALL.headers, method="PUT")
    end = content.index(b"\r\n\r\n") + 4
    with served.connect() as client:
        assert client.ask(content[:end]).status == 405
        client.send_apart(content[end:])
        assert client.ask(SMALL.declared()).status == 200
        served.pass_s(KEEP_ALIVE_S - 1)
        assert served.connections == 1
        served.pass_s(2)
        assert client.rest() == b""


EARLY = {
    "too large": (413, message(SMALL.path, b"", SMALL.headers).replace(b"length: 0", b"length: 10000000000")),
    "another method": (405, message(SMALL.path, b"1", SMALL.headers, method="PUT", chunks=[1])[:-6]),
    "another type": (415, sample(b"1").but(("content-type", "text/plain")).chunked()[:-6]),
    "no route": (404, message("/nowhere", b"", SMALL.headers).replace(b"length: 0", b"length: 10000000000")),
}


@pytest.mark.parametrize(("status", "head"), EARLY.values(), ids=EARLY.keys())
def test_who_is_refused_by_the_head_and_goes_on_is_cut_off(served: Served, status: int, head: bytes) -> None:
    """It may read the answer, whatever it has sent meanwhile; then its time is over, and nothing buys it more."""
    with served.connect() as client:
        client.send_apart(head)
        for _ in range(5):
            client.send_apart(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        answer = client.answer()
        assert (answer.status, answer["connection"]) == (status, "close")
        assert client.rest() == b""
        for _ in range(40):
            client.send_apart(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        served.pass_s(LINGER_S + 1)
        served.until_connections(0)


@pytest.mark.parametrize(("status", "head"), EARLY.values(), ids=EARLY.keys())
def test_of_a_body_that_is_refused_not_much_is_read(served: Served, status: int, head: bytes) -> None:
    """What the system takes for itself is a few megabytes."""
    with served.connect() as client:
        assert client.ask(head).status == status
        client.socket.settimeout(0.3)
        with pytest.raises(OSError, match=r"timed out|reset|Broken"):
            client.send(b"x" * 64 * 2**20)
        assert served.note_of(client.name) < 2 * LINGER_BYTES


def test_who_asks_whether_to_go_on_and_may_not_is_closed(served: Served) -> None:
    """It may send the body or not: nobody can know what comes next."""
    with served.connect() as client:
        head = message(SMALL.path, b"{}", [JSON, ("expect", "100-continue")], method="PUT")[:-2]
        answer = client.ask(head)
        assert (answer.status, answer["connection"]) == (405, "close")
        assert client.rest() == b""


def test_what_is_passed_over_buys_no_time(served: Served) -> None:
    """Of a small body, whose request was answered."""
    head = message(SMALL.path, b"x" * 60_000, SMALL.headers, method="PUT")[:-60_000]
    with served.connect() as client:
        assert client.ask(head).status == 405
        client.send_apart(b"x" * 59_999)
        served.pass_s(BEGIN_S + 1)
        served.pass_s(0)
        assert served.connections == 0


def test_nobody_is_answered_twice(served: Served) -> None:
    """If the body of a request that was refused by its head never comes, there is nothing more to say."""
    content = SMALL.but(("content-type", "text/plain")).chunked()
    with served.connect() as client:
        assert client.ask(content[: content.index(b"\r\n\r\n") + 4]).status == 415
        served.pass_s(3600)
        assert client.rest() == b""


def test_what_fails_while_it_is_looked_after_ends_nothing(
    repository: Repository, loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and all else is looked after."""
    looks = 0

    def fails() -> None:
        nonlocal looks
        looks += 1
        raise OSError("no such thing")

    monkeypatch.setattr(http_server, "TICK_S", 0.01)
    with serving(of_all(repository), loop=loop) as served, served.connect() as client:
        monkeypatch.setattr(served.app.predictions, "drop_late", fails)
        served.until(lambda: looks > 5)
        assert client.ask(SMALL.declared()).status == 200
        monkeypatch.undo()
    assert len(errors(caplog)) == 1


def test_the_server_looks_for_late_clients_by_itself(
    repository: Repository, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "TICK_S", 0.01)
    with serving(of_all(repository), loop=loop) as served, served.connect() as client, served.connect() as other:
        assert client.ask(SMALL.declared()).status == 200
        other.send_apart(HALVES["a body"])
        served.clock.ahead_s += BEGIN_S + 1
        assert is_refused(other.answer(), 408, "request_too_slow")
        served.clock.ahead_s += KEEP_ALIVE_S
        assert client.rest() == b""


# What is not HTTP


def with_lines(*lines: str) -> bytes:
    return "\r\n".join([f"POST {SMALL.path} HTTP/1.1", "host: h", *lines, "", "{}"]).encode()


NOT_HTTP = {
    "nonsense": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header without a colon": b"GET / HTTP/1.1\r\nnonsense\r\n\r\n",
    "a length and chunks": with_lines("content-length: 2", "transfer-encoding: chunked"),
    "chunks and a length": with_lines("transfer-encoding: chunked", "content-length: 2"),
    "two lengths": with_lines("content-length: 2", "content-length: 3"),
    "a negative length": with_lines("content-length: -2"),
    "no length": with_lines("content-length: two"),
    "no chunk": with_lines("transfer-encoding: chunked", "") + b"zz\r\n",
    "two hosts": with_lines("host: other", "content-length: 2"),
    "no host": SMALL.declared().replace(b"host:", b"hose:"),
    "no host, of a question": ALIVE.replace(b"host:", b"hose:"),
    "no host, of HTTP/2": ALIVE.replace(b"host:", b"hose:").replace(b"/1.1", b"/2.0"),
    "two hosts, of HTTP/1.0": ALIVE.replace(b"host:", b"host: other\r\nhost:").replace(b"/1.1", b"/1.0"),
}


@pytest.mark.parametrize("content", NOT_HTTP.values(), ids=NOT_HTTP.keys())
@pytest.mark.parametrize("before", [b"", SMALL.declared(), IMAGE.declared()], ids=["first", "second", "after a large"])
def test_what_is_not_http_is_answered_as_every_error_is(served: Served, content: bytes, before: bytes) -> None:
    with served.connect() as client:
        if before:
            assert client.ask(before).status == 200
        assert is_refused(client.ask(content), 400, "bad_request")
        assert client.rest() == b""
        served.until_connections(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"FOO /v2 HTTP/1.1\r\n\r\n", "method 'FOO' is not known"),
        (b"get /v2 HTTP/1.1\r\n\r\n", "method 'get' is not known"),
        (b"FOO", "its method is not known"),
        (NOT_HTTP["TLS"], "its method is not known"),
    ],
    ids=["unknown", "small letters", "cut off", "no text"],
)
def test_a_method_that_nobody_knows_is_named(served: Served, content: bytes, said: str) -> None:
    """With those that are known; where it is not all here, without its name."""
    with served.connect() as client:
        refusal = client.ask(content)
        assert is_refused(refusal, 400, "bad_request")
        assert refusal.said["error"] == (
            f"the request is not valid HTTP/1.1: {said}; GET, HEAD, POST, PUT and DELETE are, in capitals"
        )


GET_ROUTES = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/norm",
    "/v2/models/norm/ready",
    "/metrics",
    "/docs",
]


@pytest.mark.parametrize("path", [*GET_ROUTES, "/v2/models/nobody", "/nowhere"])
def test_head_is_get_without_its_body(served: Served, path: str) -> None:
    """The same status and headers, and the connection goes on; also for what is refused."""
    with served.connect() as client:
        whole = client.ask(message(path, method="GET"))
        client.send(message(path, method="HEAD"))
        head = client.answer(head_only=True)
        assert head.status == whole.status == (200 if path in GET_ROUTES else 404)
        if path != "/metrics":  # it has another length each time
            assert head.without_chance.headers == whole.without_chance.headers
        assert client.ask(SMALL.declared()).status == 200


def test_nonsense_is_answered_after_what_came_before_it(held: tuple[Served, Held]) -> None:
    """Or not at all: the first answer belongs to the first request."""
    served, runtime = held
    with served.connect() as client:
        client.send_apart(tensors(id="first").declared() + NOT_HTTP["nonsense"])
        runtime.let_go.set()
        assert client.answer().said.get("id") == "first"


@pytest.mark.parametrize("after", [SMALL.declared(), IMAGE.declared()[:1000]], ids=["whole", "half"])
@pytest.mark.parametrize(
    ("before", "company"),
    [(SMALL.declared(), 0), (SMALL.declared(), 1), pytest.param(LARGE.declared(), 1)],
    ids=["alone", "in company", "after a large"],
)
def test_what_follows_the_last_request_is_passed_over(
    served: Served, before: bytes, company: int, after: bytes
) -> None:
    """A client that says `close` and goes on is answered up to there, whatever it sent before."""
    with served.connect() as client, ExitStack() as others:
        for _ in range(company):
            others.enter_context(served.connect())
        assert client.ask(before).status == 200
        answer = client.ask(SMALL.but(CLOSE).declared() + after)
        assert (answer.status, answer["connection"]) == (200, "close")
        assert client.rest() == b""


# Memory


@pytest.mark.parametrize("content", [WIDE.declared(), WIDE.chunked()], ids=["short", "asgi"])
def test_who_asks_and_does_not_read_is_given_little(narrow: Served, repository: Repository, content: bytes) -> None:
    """Of thirty answers, those that fit are made; the rest is when it is read, and none is lost."""
    statistics = repository.live("wide").statistics
    before = statistics.document(name="wide", version="1")["inference_stats"]["success"]["count"]
    with narrow.connect(receive_buffer_bytes=4096) as client:
        client.send_apart(content * 30)
        narrow.until(lambda: narrow.unsent_bytes_now > 50_000)
        with narrow.connect() as other:
            assert other.ask(ALIVE).status == 200
        assert narrow.unsent_bytes < 2 * 4 * WIDTH
        made = statistics.document(name="wide", version="1")["inference_stats"]["success"]["count"] - before
        assert made <= 3
        wanted = computed(repository, "wide", np.array([[3]], dtype=np.float32))
        for _ in range(30):
            assert blob(client.answer()) == wanted


def held_bytes(served: Served) -> int:
    return served.inside(lambda: served.app.bodies.held_bytes)


def unread_bytes(served: Served) -> int:
    return served.inside(lambda: served.app.answers.held_bytes)


PACKED_IMAGE = Ask(IMAGE.path, gzip.compress(IMAGE.body, 1), [*IMAGE.headers, ("content-encoding", "gzip")])


@pytest.mark.parametrize("content", [IMAGE.declared(), IMAGE.chunked()], ids=["short", "asgi"])
def test_bodies_that_are_half_here_take_so_much_and_no_more(repository: Repository, loop: Loop, content: bytes) -> None:
    """Who would need more is told to come again; those who were there are answered, and then there is room for it."""
    most_bytes = 2 * LIMIT_BYTES
    wanted = computed(repository, "image", image())
    nearly = most_bytes % 500_000
    with (
        serving(of_all(repository, max_reading_bytes=most_bytes), loop=loop) as served,
        ExitStack() as open_clients,
    ):
        clients = [open_clients.enter_context(served.connect()) for _ in range(4)]
        for client in clients:
            client.send_apart(content[:500_000])
        one_more = open_clients.enter_context(served.connect())
        one_more.send_apart(content[: nearly - 10_000])
        assert most_bytes - 30_000 < held_bytes(served) <= most_bytes
        one_more.send_apart(content[nearly - 10_000 : nearly + 10_000])
        refused = one_more.answer()
        assert is_refused(refused, 429, "server_full")
        assert refused["retry-after"] == "1"
        assert one_more.rest() == b""
        with served.connect() as small:
            assert small.ask(SMALL.declared()).status == 200  # there is room for who is not read in parts
            assert small.ask(SMALL.chunked()).status == 200
        for client in clients:
            client.send(content[500_000:])
            assert blob(client.answer()) == wanted
        assert held_bytes(served) == 0
        for client in clients:
            client.send_apart(content[:500_000])
        assert held_bytes(served) > 4 * 490_000
        clients[0].leave()
        clients[1].leave(abruptly=True)
        served.until_connections(2)
        served.until(lambda: served.app.bodies.held_bytes < 2 * 510_000)
        with served.connect() as another:
            another.send_apart(content[:500_000], content[500_000:])
            assert blob(another.answer()) == wanted
        served.pass_s(3600)
        for client in clients[2:]:
            assert is_refused(client.answer(), 408, "request_too_slow")
        served.until(lambda: served.app.bodies.held_bytes == 0)


def test_small_bodies_in_parts_are_counted_too(repository: Repository, loop: Loop) -> None:
    """Ten thousand of them would be as much as a few large ones."""
    whole = sample(SMALL.body + b" " * 60_000).declared()
    with serving(of_all(repository, 2**16), loop=loop) as served, ExitStack() as open_clients:
        served.app.bodies.max_bytes = 2**18
        clients = [open_clients.enter_context(served.connect()) for _ in range(4)]
        for client in clients:
            client.send_apart(whole[:60_000])
        with served.connect() as one_more:
            one_more.send_apart(whole[:10_000])
            assert one_more.hears_nothing
            one_more.send_apart(whole[10_000:40_000])
            assert is_refused(one_more.answer(), 429, "server_full")
        for client in clients:
            client.send(whole[60_000:])
            assert client.answer().status == 200
        assert held_bytes(served) == 0


def test_what_a_packed_body_unpacks_to_is_counted(repository: Repository, loop: Loop) -> None:
    """It is small when it comes, and refused for what it becomes."""
    noise = np.random.default_rng(1).bytes(3000).hex().encode()
    named = b'{"id": "' + noise + b'", ' + tensors().body[1:] + b" " * (LIMIT_BYTES - 10_000)
    packed = Ask(tensors().path, gzip.compress(named), [JSON, ("content-encoding", "gzip")])
    assert 2048 < len(packed.body) < 10_000
    half = IMAGE.declared()[:600_000]
    with (
        serving(of_all(repository, max_reading_bytes=2 * LIMIT_BYTES), loop=loop) as served,
        ExitStack() as open_clients,
    ):
        for _ in range(3):
            open_clients.enter_context(served.connect()).send_apart(half)
        with served.connect() as one_more:
            assert is_refused(one_more.ask(packed.declared()), 429, "server_full")
        open_clients.close()
        served.until_connections(0)
        with served.connect() as one_more:
            assert one_more.ask(packed.declared()).said["id"] == noise.decode()


@pytest.mark.parametrize(
    "content", [IMAGE.declared(), IMAGE.chunked(), PACKED_IMAGE.declared()], ids=["short", "asgi", "packed"]
)
def test_one_body_of_the_largest_size_is_read_whatever_the_limit(
    repository: Repository, loop: Loop, content: bytes
) -> None:
    with serving(of_all(repository, max_reading_bytes=1), loop=loop) as served, served.connect() as client:
        client.send_apart(content[:400_000], content[400_000:500_000], content[500_000:])
        assert client.answer().status == 200
        assert held_bytes(served) == 0


def test_bodies_that_wait_for_their_turn_are_counted(repository: Repository, loop: Loop) -> None:
    """Behind a slow model; who has too many of them is answered what it is owed, and has to go."""
    runtime = Held()
    waiting = sample(b" " * 15_000).declared()
    with (
        serving(with_runtime(repository, runtime, 2**14, max_reading_bytes=1), loop=loop) as served,
        served.connect() as client,
        served.connect() as other,
    ):
        client.send_apart(few(1) + 2 * waiting)
        runtime.wait_until_it_runs()
        assert 2 * 15_000 <= held_bytes(served) < 2 * 15_300
        other.send_apart(few(2), waiting[:10_000])
        runtime.let_go.set()
        assert [client.answer().status for _ in range(3)] == [200, 404, 404]
        assert other.answer()["connection"] == "close"
        assert other.rest() == b""
        served.until(lambda: served.app.bodies.held_bytes == 0)


@pytest.mark.parametrize(
    "one", [b"GET / HTTP/1.1\r\nhost:\r\n\r\n", ALIVE, numbered(1)], ids=["smallest", "small", "named"]
)
def test_who_sends_many_requests_is_read_as_fast_as_it_is_answered(
    served: Served, monkeypatch: pytest.MonkeyPatch, one: bytes
) -> None:
    """However many come in a packet, few are begun before those ahead of them are answered; and none is lost."""
    most = 0
    began = Connection.on_message_complete

    def noted(connection: Connection) -> None:
        nonlocal most
        began(connection)
        most = max(most, len(connection._owed))

    monkeypatch.setattr(Connection, "on_message_complete", noted)
    count = 3000
    with served.connect() as client:
        sending = threading.Thread(target=client.send, args=[one * count])
        sending.start()
        assert len({client.answer().status for _ in range(count)}) == 1
        sending.join()
    assert 0 < most < 2 * PART_BYTES / len(one) + 2


@given(size=st.integers(0, 200_000), json_bytes=st.integers(0, 5000))
def test_what_follows_the_json_begins_where_processors_like_it(size: int, json_bytes: int) -> None:
    room = place_for(size, json_bytes)
    assert (len(room), room.itemsize, room.readonly) == (size, 1, False)
    if json_bytes < size:
        assert np.frombuffer(room[json_bytes:], dtype=np.uint8).ctypes.data % 16 == 0


@pytest.mark.parametrize("spaces", range(17))
def test_the_model_reads_from_where_the_body_was_read_to(repository: Repository, spaces: int) -> None:
    """Whatever the length of the JSON, no number is copied, and none stands askew."""
    x = rows(6000)
    parameters = {"binary_data_size": x.nbytes}
    body, headers = binary_message(
        {"inputs": [{"name": "x", "shape": [6000, 3], "datatype": "FP32", "parameters": parameters}]},
        x.tobytes(),
        spaces=spaces,
    )
    json_bytes = int(headers[JSON_LENGTH])
    room = place_for(len(body), json_bytes)
    room[:] = body
    (tensor,) = v2.parse(repository.live("norm"), room, json_bytes).accepted.tensors
    assert np.shares_memory(tensor, np.frombuffer(room, dtype=np.uint8))
    assert tensor.ctypes.data % 16 == 0
    assert tensor.tobytes() == x.tobytes()


def resident_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_to_declare_much_costs_nothing(repository: Repository, loop: Loop) -> None:
    """Twenty clients declare 64 MiB each, and send no byte of it."""
    head = message(IMAGE.path, b"", IMAGE.headers).replace(b"content-length: 0", b"content-length: %d" % 2**26)
    with serving(of_all(repository, 2**26), loop=loop) as served, ExitStack() as clients:
        before = resident_bytes()
        for _ in range(20):
            clients.enter_context(served.connect()).send_apart(head)
        assert resident_bytes() - before < 5e6


def test_who_is_idle_costs_nothing(repository: Repository, loop: Loop) -> None:
    """What was sent is given back with the answer, and not when the connection is closed."""
    content = message(IMAGE.path, b"{}" + bytes(40 * 2**20), [*IMAGE.but((JSON_LENGTH, "2")).headers])
    with serving(of_all(repository, 2**26), loop=loop) as served, served.connect() as client:
        before = resident_bytes()
        assert client.ask(content).said["code"] == "wrong_type"
        assert served.inside(resident_bytes) - before < 10e6
