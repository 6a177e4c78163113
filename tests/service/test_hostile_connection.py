"""What clients must not send to a connection: it never fails, and answers each whole request once, in its turn."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import httptools
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from service.app import create_app
from service.connection import MOST_HEAD_BYTES, MOST_HEADERS, MOST_URL_BYTES, Connection
from service.http_server import config
from service.repository import Repository
from service.settings import Settings
from tests.asking import loaded, save
from tests.bundles import SAMPLE, write_table_bundle
from tests.graphs import batchnorm_model

BODY_LIMIT_BYTES = 300_000


TURNS = 5
"""Of the loop, without anything that is owed: then nothing comes any more."""


class Served(NamedTuple):
    """Models, and the one loop that they are served in."""

    repository: Repository
    loop: asyncio.Runner


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models)
    save(models, "norm", batchnorm_model())
    with asyncio.Runner() as loop:
        yield Served(loaded(models), loop)


@final
class Wire(asyncio.Transport):
    """A transport without a socket: what is written is kept, what comes while reading is paused waits."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self._closing = False
        self._paused = False
        self.waiting: list[bytes] = []
        self._protocol: Any = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def come(self, data: bytes) -> None:
        """Bytes of the client."""
        self.waiting.append(data)
        self._deliver()

    def _deliver(self) -> None:
        while self.waiting and not self._paused and not self._closing:
            data = self.waiting.pop(0)
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                room = memoryview(self._protocol.get_buffer(len(data)))
                taken = min(len(room), len(data))
                assert taken, "an empty buffer"
                room[:taken] = data[:taken]
                if rest := data[taken:]:
                    self.waiting.insert(0, rest)
                self._protocol.buffer_updated(taken)
            else:
                self._protocol.data_received(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self._closing, "written after it was closed"
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        asyncio.get_running_loop().call_soon(self._deliver)

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Answer(NamedTuple):
    status: int
    id: str
    code: str
    closes: bool


def talk(served: Served, parts: Sequence[bytes]) -> list[Answer]:
    """What is answered to these bytes, one part in a turn of the loop."""

    async def scenario() -> list[Answer]:
        faults: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        app = create_app(served.repository, Settings(body_limit_bytes=BODY_LIMIT_BYTES))
        about = config(app)
        about.load()
        connection = Connection(about, ServerState(), {}, app)
        wire = Wire()
        wire.set_protocol(connection)
        connection.connection_made(wire)
        for part in parts:
            wire.come(part)
            await asyncio.sleep(0)
        quiet = 0
        while quiet < TURNS:
            waits = bool(connection._last_owed() or wire.waiting) and not wire.is_closing()
            quiet = 0 if waits else quiet + 1
            await asyncio.sleep(0)  # for whatever it does, so there is no event
        answers = [*read(wire.written)]
        wire.close()
        connection.connection_lost(None)
        assert not faults
        return answers

    return served.loop.run(asyncio.wait_for(scenario(), 20))


def read(written: bytes) -> Iterator[Answer]:
    """The answers, which must be whole and nothing else."""
    while written:
        head, end, written = written.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, size = int(first.split()[1]), int(headers["content-length"])
        body, written = written[:size], written[size:]
        assert len(body) == size
        code = orjson.loads(body)["code"] if status >= 400 else ""
        yield Answer(status, headers.get("x-request-id", ""), code, headers.get("connection", "").lower() == "close")


def request(path: str, body: bytes, number: int, *more: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: a", f"x-request-id: {number}", f"content-length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


INFER = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]})
ROWS = 8000
HEAD = orjson.dumps(
    {"inputs": [{"name": "x", "shape": [ROWS, 3], "datatype": "FP32", "parameters": {"binary_data_size": ROWS * 12}}]}
)


def whole(kind: int, number: int) -> bytes:
    """A request that is in order."""
    match kind:
        case 0:
            return request("/v2/models/norm/infer", INFER, number)
        case 1:
            return request("/models/table/predict", orjson.dumps(SAMPLE), number)
        case 2:
            return request("/v2/health/ready", b"", number, method="GET")
        case 3:
            body = HEAD + bytes(ROWS * 12)
            return request("/v2/models/norm/infer", body, number, f"inference-header-content-length: {len(HEAD)}")
        case 4:
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (INFER[:30], INFER[30:], b""))
            head = request("/v2/models/norm/infer", b"", number, "transfer-encoding: chunked")
            return head.replace(b"content-length: 0\r\n", b"") + chunks
        case 5:
            return request("/v2/models/norm/infer", INFER[:-1], number)
        case _:
            return request("/nowhere", INFER, number)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if end > start]


@final
class Reader:
    """Which requests a parser finds in the same bytes, without anything of ours."""

    def __init__(self, data: bytes) -> None:
        self.begun = self.complete = 0
        self.fails = False
        try:
            httptools.HttpRequestParser(self).feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fails = True

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_message_complete(self) -> None:
        self.complete += 1


kinds = st.lists(st.integers(0, 6), min_size=1, max_size=5)
places = st.lists(st.integers(0, 2**20), max_size=6)
fuzzing = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzing
@given(kinds=kinds, places=places)
def test_each_request_has_its_answer_in_its_turn(served: Served, kinds: list[int], places: list[int]) -> None:
    """Of every kind, all at once, cut anywhere."""
    sent = b"".join(whole(kind, number) for number, kind in enumerate(kinds))
    answers = talk(served, cut(sent, places))
    assert [answer.id for answer in answers] == [str(number) for number in range(len(kinds))]
    assert [answer.status for answer in answers] == [{5: 400, 6: 404}.get(kind, 200) for kind in kinds]


edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2), st.integers(0, 255)), min_size=1, max_size=4)


@fuzzing
@given(kinds=kinds, places=places, edits=edits)
def test_a_damaged_stream_never_fails(
    served: Served, kinds: list[int], places: list[int], edits: list[tuple[int, int, int]]
) -> None:
    """Whole requests are answered once, and what cannot be read once at most, after them."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it warns of each
    sent = bytearray(b"".join(whole(kind, number) for number, kind in enumerate(kinds)))
    for place, edit, value in edits:
        place %= len(sent)
        if edit == 0:
            sent[place] = value
        elif edit == 1:
            del sent[place]
        else:
            sent.insert(place, value)
    found = Reader(bytes(sent))
    answers = talk(served, cut(bytes(sent), places))
    assert len(answers) <= found.complete + 1
    if not any(answer.closes for answer in answers):
        assert len(answers) >= found.complete


@fuzzing
@given(noise=st.binary(min_size=1, max_size=300), places=places)
def test_noise_has_one_answer_at_most(served: Served, noise: bytes, places: list[int]) -> None:
    assert len(talk(served, cut(noise, places))) <= 1 + noise.count(b"\n\r\n")


HEADS = {
    "a long URL": request("/v2/health/ready?" + "a" * MOST_URL_BYTES, b"", 0, method="GET"),
    "many headers": request("/v2/health/ready", b"", 0, *(f"x-{i}: 1" for i in range(MOST_HEADERS)), method="GET"),
    "one header many times": request("/v2/health/ready", b"", 0, *(["a: 1"] * 10_000), method="GET"),
    "a large header": request("/v2/health/ready", b"", 0, "a: " + "a" * MOST_HEAD_BYTES, method="GET"),
    "several large headers": request("/v2/models/norm/infer", INFER, 0, *(f"a{i}: " + "a" * 2**13 for i in range(9))),
    "a name without end": b"GET / HTTP/1.1\r\n" + b"a" * (MOST_HEAD_BYTES + 20),
    "a value without end": b"GET / HTTP/1.1\r\na: " + b"a" * (MOST_HEAD_BYTES + 20),
    "a URL without end": b"GET /" + b"a" * (MOST_HEAD_BYTES + 20),
}


@pytest.mark.parametrize("step", [997, 4096, 10**9])
@pytest.mark.parametrize("what", HEADS)
def test_a_head_has_an_end(served: Served, what: str, step: int) -> None:
    parts = [HEADS[what][i : i + step] for i in range(0, len(HEADS[what]), step)]
    (answer,) = talk(served, parts)
    assert (answer.status, answer.code, answer.closes) == (431, "headers_too_large", True)


def test_what_follows_a_body_in_chunks_has_an_end(served: Served) -> None:
    """Trailers are headers too, and nobody looks at them."""
    head = request("/v2/models/norm/infer", b"", 0, "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(INFER), INFER)
    answers = talk(served, [head + chunk, *(b"a: " + b"b" * 1000 + b"\r\n" for _ in range(100))])
    assert [(answer.status, answer.closes) for answer in answers] == [(431, True)]


def test_a_large_head_that_is_allowed_is_answered(served: Served) -> None:
    """Before a body that is large as well."""
    more = [f"a{i}: " + "a" * 6000 for i in range(10)]
    body = HEAD + bytes(ROWS * 12)
    sent = request("/v2/models/norm/infer", body, 0, f"inference-header-content-length: {len(HEAD)}", *more)
    assert [answer.status for answer in talk(served, [sent])] == [200]
    assert [answer.status for answer in talk(served, cut(sent, range(0, len(sent), 5000)))] == [200]


def test_a_good_request_behind_a_large_one_arrives_in_drops(served: Served) -> None:
    """The place of the large body is not read into again."""
    small = whole(0, 1)
    parts = [whole(3, 0), *(small[i : i + 40] for i in range(0, len(small), 40))]
    assert [(answer.id, answer.status) for answer in talk(served, parts)] == [("0", 200), ("1", 200)]
