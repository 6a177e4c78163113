"""The path of a prediction, from a body to an answer:

    bytes -> parse -> Accepted -> coalescing -> runtime -> render -> bytes

Two ways lead here and back to the client: most requests come straight from their connection (connection.py), the rest,
and those of any other server, through ASGI (asgi.py). A request id is taken from the caller or made, and returned with
every answer of either.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from time import perf_counter_ns
from typing import NamedTuple, TypeVar, final

from service.bodies import Bodies, Held
from service.coalescing import Computed
from service.errors import (
    Internal,
    MalformedBinary,
    MalformedJson,
    MethodNotAllowed,
    QueueFull,
    RequestError,
    ServerFull,
    Unauthorized,
    UnsupportedEncoding,
    UnsupportedMediaType,
    clipped,
)
from service.headers import REQUEST_ID, Headers, request_id, traced
from service.page_headers import NOSNIFF
from service.protocol import JSON, OCTET_STREAM, Answer, Body, Parse, Request, predict, v2
from service.protocol.compression import WORTH_BYTES, accepted, compressed
from service.protocol.json import error_body
from service.repository import Live, Repository
from service.threads import own_thread
from service.watch import Client, Ended, Watch

Said = list[tuple[bytes, bytes]]
"""The headers of an answer."""

Reply = Callable[[int, Said, bytes], None]
"""Takes the status, the headers and the body of an answer."""

SERVER_TIMING = b"server-timing"
JSON_LENGTH = b"inference-header-content-length"
_JSON_TYPE = (b"content-type", JSON)
_OCTET_STREAM_TYPE = (b"content-type", OCTET_STREAM)

_PREDICT = re.compile(r"/predict|/models/(?P<model>[^/]+)/predict")
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")

COUNTED_BYTES = 64 * 1024
"""Of an answer that takes room; of a smaller one, the connection counts what is not read of it."""

LARGE_BYTES = 2**20
"""JSON of this size, or an answer of so many bytes of tensors, takes some ten milliseconds to read or write, in which
nobody else would be answered: it has a thread."""

THREAD_BYTES = 64 * 1024
"""A body from this size on is compressed or decompressed in a thread: it takes as long as many small predictions."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Route(NamedTuple):
    """What a path asks for."""

    pattern: str
    """The route without the names in it."""
    parse: Parse
    binary: bool
    """Binary tensors may follow the JSON."""
    model: str | None
    version: str | None


def route_of(path: str) -> Route | None:
    """None if it is not a prediction."""
    return _short_route(path) if len(path) <= 512 else None  # no model has so long a name


@functools.lru_cache(maxsize=1024)
def _short_route(path: str) -> Route | None:
    if found := _INFER.fullmatch(path):
        version = "" if found["version"] is None else "/versions/{version}"
        pattern = f"/v2/models/{{model}}{version}/infer"
        return Route(pattern, v2.parse, True, found["model"], found["version"])
    if found := _PREDICT.fullmatch(path):
        pattern = "/predict" if found["model"] is None else "/models/{model}/predict"
        return Route(pattern, predict.parse, False, found["model"], None)
    return None


@final
class Predictions:
    """Answers predictions with the models of a repository."""

    def __init__(
        self,
        repository: Repository,
        *,
        timeout_s: float | None,
        watch: Watch | None = None,
        bodies: Bodies | None = None,
        answers: Bodies | None = None,
    ) -> None:
        """
        Args:
            timeout_s: how long a caller waits who does not say; None: as long as it takes.
            bodies: where those count that wait to be parsed; by default as many as there are.
            answers: where those count that are computed and not written; likewise.
        """
        self._bodies = Bodies(max_bytes=sys.maxsize, body_limit_bytes=0) if bodies is None else bodies
        self._answers = Bodies(max_bytes=sys.maxsize, body_limit_bytes=0) if answers is None else answers
        self._thread = own_thread("json")
        """For what is large; one, so that the event loop has never more than one beside it."""
        self.watch = watch or Watch(repository.counts)
        self._repository = repository
        self._timeout_s = timeout_s

    def drop_late(self) -> None:
        """Answer those whose time is over; to be called now and then."""
        for live in self._repository.answering:
            live.coalescer.drop_late()

    def answer(
        self,
        route: Route,
        headers: Headers,
        body: Body,
        reply: Reply,
        *,
        alone: bool = False,
        gone: Callable[[], bool] | None = None,
        client: Client = None,
    ) -> None:
        """Predict; whatever happens, `reply` is called once, on the event loop, before this returns or later.

        Args:
            body: whole, uncompressed.
            alone: nobody else can be asking, see `Coalescer.submit`.
            gone: says that the client has left.
        """
        self.watch.counts.begun += 1
        prediction = _Prediction(self.watch, route, headers, reply, client, self._thread)
        try:
            check_content_type(headers, binary=route.binary)
            live = self._repository.only() if route.model is None else self._repository.live(route.model, route.version)
            prediction.live = live
            live.coalescer.check_room()
            json_bytes = _json_bytes(headers, len(body)) if route.binary else None
            if len(body) >= LARGE_BYTES and _takes_long(live, body, json_bytes):
                held = Held(self._bodies)
                held.hold(len(body))

                def submit(request: Request) -> None:
                    self._submit(prediction, live, request, alone=False, gone=gone)

                prediction.do_in_thread(
                    lambda: route.parse(live, body, json_bytes), submit, whatever=lambda: held.hold(0)
                )
            else:
                self._submit(prediction, live, route.parse(live, body, json_bytes), alone=alone, gone=gone)
        except Exception as error:
            prediction.refuse(error)

    def _submit(
        self, prediction: _Prediction, live: Live, request: Request, *, alone: bool, gone: Callable[[], bool] | None
    ) -> None:
        prediction.request = request
        timeout_s = self._timeout_s if request.timeout_s is None else request.timeout_s
        begin = None
        if (answer_bytes := live.answer_size.guess_bytes(request.accepted)) >= COUNTED_BYTES:
            prediction.room = room = Held(self._answers)
            room_bytes = min(int(answer_bytes), self._answers.max_bytes // 4)
            begin = lambda: room.hold(room_bytes)  # noqa: E731
        live.coalescer.submit(
            request.accepted,
            prediction.answer,
            alone=alone,
            expires_ns=None if timeout_s is None else prediction.since_ns + int(timeout_s * 1e9),
            gone=gone,
            begin=begin,
        )


def _takes_long(live: Live, body: Body, json_bytes: int | None) -> bool:
    """To parse a body that is large: much of it is JSON, or text, which is looked at element by element."""
    inputs = live.admitted.signature.inputs
    return json_bytes is None or json_bytes >= LARGE_BYTES or any(spec.datatype == "BYTES" for spec in inputs)


@final
class _Prediction:
    """One of them, from its request to its answer."""

    __slots__ = (
        "client",
        "headers",
        "live",
        "replied",
        "reply",
        "request",
        "room",
        "route",
        "since_ns",
        "thread",
        "watch",
    )

    request: Request

    def __init__(
        self, watch: Watch, route: Route, headers: Headers, reply: Reply, client: Client, thread: Executor
    ) -> None:
        self.watch = watch
        self.route = route
        self.headers = headers
        self.reply = reply
        self.replied = False
        self.client = client
        self.thread = thread
        """For what is large."""
        self.live: Live | None = None
        self.room: Held | None = None
        """The room of its answer, if that is large."""
        self.since_ns = perf_counter_ns()
        """When its last byte was read."""

    def answer(self, computed: Computed) -> None:
        """With what was computed, or with the reason why it was not."""
        try:
            if computed.error is not None:
                raise computed.error
            answer_bytes = sum([output.nbytes for output in computed.outputs])
            if self.room is not None:
                self.room.hold_anyhow(answer_bytes)
            if answer_bytes >= LARGE_BYTES:
                self.do_in_thread(
                    lambda: self.request.render(computed.outputs), lambda answer: self._answer(answer, computed)
                )
            else:
                self._answer(self.request.render(computed.outputs), computed)
        except Exception as error:
            self.refuse(error)

    def do_in_thread(
        self, work: Callable[[], T], then: Callable[[T], None], whatever: Callable[[], None] | None = None
    ) -> None:
        """Go on when it is done, on the event loop; or refuse with what it raised.

        Args:
            whatever: is called when it is done, whatever came of it.
        """

        def go_on(done: asyncio.Future[T]) -> None:
            try:
                if whatever is not None:
                    whatever()
                then(done.result())
            except Exception as error:
                self.refuse(error)

        asyncio.get_running_loop().run_in_executor(self.thread, work).add_done_callback(go_on)

    def _answer(self, answer: Answer, computed: Computed) -> None:
        content, json_bytes = answer
        if self.room is not None:
            self.room.hold_anyhow(len(content))
        timing = b"queue;dur=%.3f, compute;dur=%.3f" % (computed.queue_ns / 1e6, computed.compute_ns / 1e6)
        said = [_JSON_TYPE if json_bytes is None else _OCTET_STREAM_TYPE, NOSNIFF, (SERVER_TIMING, timing)]
        if json_bytes is not None:
            said.append((JSON_LENGTH, b"%d" % json_bytes))
        if len(content) >= WORTH_BYTES and (encoding := accepted(self.headers.get(b"accept-encoding", b""))):
            said += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
            if len(content) >= THREAD_BYTES:
                self.do_in_thread(
                    lambda: compressed(content, encoding), lambda packed: self._give(said, packed, computed)
                )
                return
            content = compressed(content, encoding)
        self._give(said, content, computed)

    def _give(self, said: Said, content: bytes, computed: Computed) -> None:
        assert self.live is not None
        took_ns = perf_counter_ns() - self.since_ns
        said.append((b"content-length", b"%d" % len(content)))
        given = request_id(self.headers)
        said.append((REQUEST_ID, given))
        self.replied = True
        self._reply(200, said, content)
        self.live.statistics.answered(took_ns, computed.queue_ns, self.route.pattern)
        if self.watch.hearing:
            for watcher in self.watch.wanting_answer(self.headers):
                watcher.tell(self._ended(200, "", given, computed))

    def refuse(self, error: BaseException) -> None:
        """Say what is wrong; whatever breaks here or before, the client gets an answer, and no second one."""
        if self.replied:
            _log.error("an answer was given and could not be counted", exc_info=error)
            return
        if isinstance(error, MalformedJson) and self.route.binary and _is_undeclared(self.headers):
            error = _undeclared(error)
        took_ns = perf_counter_ns() - self.since_ns
        given = request_id(self.headers)
        status, said, content = refusal(error, given)
        self.replied = True
        self._reply(status, said, content)
        try:
            self._count_refused(error, status, given, took_ns)
        except Exception:  # the refusal was given; nobody is helped if this fails too
            _log.exception("a refusal could not be counted")

    def _reply(self, status: int, said: Said, content: bytes) -> None:
        try:
            self.reply(status, said, content)
        finally:
            if self.room is not None:
                self.room.hold_anyhow(0)

    def _count_refused(self, error: BaseException, status: int, given: bytes, took_ns: int) -> None:
        if self.live is not None:
            self.live.statistics.failed(took_ns)
        self.watch.counts.refused += 1
        code = code_of(error)
        of = {} if self.live is None else {"model": self.live.name, "version": self.live.version}
        self.watch.counts.ended(self.route.pattern, status, reason=code, **of)
        for watcher in self.watch.wanting(status, self.route.pattern, self.headers):
            watcher.tell(self._ended(status, code, given, None))

    def _ended(self, status: int, code: str, given: bytes, computed: Computed | None) -> Ended:
        return Ended(
            request_id=given.decode(),
            method="POST",
            route=self.route.pattern,
            status=status,
            code=code,
            model="" if self.live is None else self.live.name,
            version="" if self.live is None else self.live.version,
            began_ns=self.since_ns,
            ended_ns=perf_counter_ns(),
            submitted_ns=0 if computed is None else computed.since_ns,
            queue_ns=0 if computed is None else computed.queue_ns,
            compute_ns=0 if computed is None else computed.compute_ns,
            rows=0 if computed is None else computed.accepted.rows,
            client=self.client,
            trace=traced(self.headers),
        )


def code_of(error: BaseException) -> str:
    """What the caller reads of it."""
    return error.code if isinstance(error, RequestError) else Internal.code


def refusal(error: BaseException, request_id: bytes) -> tuple[int, Said, bytes]:
    """The answer to a request that failed; what is not its caller's fault is logged, and not told."""
    if not isinstance(error, RequestError):
        _log.error("prediction failed, request id %s", request_id.decode(), exc_info=error)
        error = Internal()
    content = error_body(error)
    said = [_JSON_TYPE, NOSNIFF, (b"content-length", b"%d" % len(content)), (REQUEST_ID, request_id)]
    if isinstance(error, Unauthorized):
        said.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        said.append((b"allow", b"POST"))
    if isinstance(error, QueueFull | ServerFull):
        said.append((b"retry-after", b"%d" % error.retry_after_s))
    if isinstance(error, UnsupportedEncoding):
        said.append((b"accept-encoding", b"gzip, deflate"))
    return error.status, said, content


def check_content_type(headers: Headers, *, binary: bool) -> None:
    """JSON, or not said, which Open Inference Protocol clients do; bytes where there may be binary tensors.

    Raises:
        UnsupportedMediaType: it is something else.
    """
    content_type = headers.get(b"content-type", b"")
    if content_type == JSON:
        return
    kind = _media_type(headers)
    if kind not in (JSON, b"") and not (binary and kind == OCTET_STREAM):
        raise UnsupportedMediaType(content_type.decode("latin-1"))


def _media_type(headers: Headers) -> bytes:
    return headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()


def declared_json_bytes(headers: Headers) -> int | None:
    """The value of Inference-Header-Content-Length; None without it, or if it is no number."""
    declared = headers.get(JSON_LENGTH, b"")
    return int(declared) if declared.isdigit() and len(declared) <= 10 else None


def _json_bytes(headers: Headers, size: int) -> int | None:
    """The same, checked.

    Raises:
        MalformedBinary: it is not a number of bytes that the body has.
    """
    if JSON_LENGTH not in headers:
        return None
    json_bytes = declared_json_bytes(headers)
    if json_bytes is None or json_bytes > size:
        said = clipped(headers[JSON_LENGTH].decode("latin-1"), 40)
        raise MalformedBinary(
            f"the header Inference-Header-Content-Length is '{said}', but the body has {size} bytes (uncompressed); it "
            "takes the length of the JSON alone, or 0 for a raw binary request"
        )
    return json_bytes


def _is_undeclared(headers: Headers) -> bool:
    """Bytes are sent, and how many of them are JSON is not said."""
    return JSON_LENGTH not in headers and _media_type(headers) == OCTET_STREAM


def _undeclared(error: MalformedJson) -> MalformedJson:
    """For who sends bytes and does not say how many of them are JSON."""
    return MalformedJson(
        f"{error.reason}. Without the header Inference-Header-Content-Length all of the body is JSON; where tensors "
        "follow in binary, say there how many bytes of JSON stand before them, or 0 if the body is nothing but the "
        "elements of the only input"
    )
