"""The path of a prediction: plain ASGI in front of FastAPI's middleware.

    bytes -> parse -> Accepted -> coalescing -> runtime -> render -> bytes

Everything that is not a prediction goes on to `rest`, the FastAPI application. A request id is taken from the caller or
made, and returned with every answer of either.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, NamedTuple, final

from service.coalescing import Computed
from service.connection import EXTENSION, Wire
from service.errors import (
    BadRequest,
    BodyTooLarge,
    Internal,
    MalformedBinary,
    MethodNotAllowed,
    RequestError,
    UnsupportedEncoding,
    UnsupportedMediaType,
    clipped,
)
from service.protocol import JSON, OCTET_STREAM, Answer, Body, Parse, predict, v2
from service.protocol.compression import WORTH_BYTES, accepted, compressed, decompressed
from service.protocol.json import error_body
from service.repository import Live, Repository

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = dict[bytes, bytes]

REQUEST_ID = b"x-request-id"
JSON_LENGTH = b"inference-header-content-length"
_REQUEST_ID_TAKEN = re.compile(rb"[\x21-\x7e]{1,128}")

_PREDICT = re.compile(r"/predict|/models/(?P<model>[^/]+)/predict")
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")

_THREAD_BYTES = 64 * 1024
"""A body from this size on is compressed or decompressed in a thread: it takes as long as many small predictions."""

_log = logging.getLogger(__name__)


class _Route(NamedTuple):
    parse: Parse
    binary: bool
    """Binary tensors may follow the JSON."""
    model: str | None
    version: str | None


@functools.lru_cache(maxsize=1024)
def _route(path: str) -> _Route | None:
    """What a path asks for; None if it is not a prediction."""
    if found := _INFER.fullmatch(path):
        return _Route(v2.parse, True, found["model"], found["version"])
    if found := _PREDICT.fullmatch(path):
        return _Route(predict.parse, False, found["model"], None)
    return None


class _Response(NamedTuple):
    status: int
    content: bytes
    headers: list[tuple[bytes, bytes]]


@final
class Predictions:
    """Answers predictions; hands everything else to `rest`."""

    def __init__(self, repository: Repository, *, body_limit_bytes: int, rest: Asgi) -> None:
        self._repository = repository
        self._body_limit_bytes = body_limit_bytes
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        path = scope["path"]
        route = _route(path)
        if route is None:
            await self._rest(scope, receive, _with_request_id(send, request_id))
            return
        wire: Wire | None = scope.get("extensions", {}).get(EXTENSION)
        live: Live | None = None
        began_ns = perf_counter_ns()
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{path} takes POST, not {scope['method']}")
            live = self._repository.only() if route.model is None else self._repository.live(route.model, route.version)
            body = await self._body(receive, headers, binary=route.binary)
            began_ns = perf_counter_ns()
            request = route.parse(live, body)
            computed = await live.coalescer.submit(
                request.accepted,
                alone=wire is not None and wire.alone,
                expires_ns=None if request.timeout_s is None else began_ns + int(request.timeout_s * 1e9),
                gone=None if wire is None else wire.is_closing,
            )
            response = await _success(request.render(computed.outputs), computed, headers)
            live.statistics.success.add(perf_counter_ns() - began_ns)
        except Exception as error:
            if not isinstance(error, RequestError):
                _log.exception("prediction failed, request id %s", request_id.decode())
                error = Internal()
            if live is not None:
                live.statistics.fail.add(perf_counter_ns() - began_ns)
            response = _refusal(error)
        head = {
            "type": "http.response.start",
            "status": response.status,
            "headers": [
                *response.headers,
                (b"content-length", b"%d" % len(response.content)),
                (REQUEST_ID, request_id),
            ],
        }
        if wire is not None:
            wire.cork()
        await send(head)
        await send({"type": "http.response.body", "body": response.content})
        if wire is not None:
            wire.uncork()

    async def _body(self, receive: Receive, headers: Headers, *, binary: bool) -> Body:
        """What the client sent, uncompressed, with the length of its JSON where binary tensors follow.

        Raises:
            RequestError: it is too large, of another kind, or its headers contradict it.
        """
        _check_content_type(headers.get(b"content-type", b""), binary=binary)
        content = await _read(receive, headers, self._body_limit_bytes)
        if encoding := headers.get(b"content-encoding"):
            if len(content) < _THREAD_BYTES:
                content = decompressed(content, encoding, limit_bytes=self._body_limit_bytes)
            else:
                limit = self._body_limit_bytes
                content = await asyncio.to_thread(decompressed, content, encoding, limit_bytes=limit)
        if not binary or (declared := headers.get(JSON_LENGTH)) is None:
            return Body(content)
        return Body(content, json_bytes=_json_bytes(declared, len(content)))


async def _success(answer: Answer, computed: Computed, headers: Headers) -> _Response:
    content = answer.content
    kind = JSON if answer.json_bytes is None else OCTET_STREAM
    said = [
        (b"content-type", kind),
        (b"server-timing", b"queue;dur=%.3f, compute;dur=%.3f" % (computed.queue_ns / 1e6, computed.compute_ns / 1e6)),
    ]
    if answer.json_bytes is not None:
        said.append((JSON_LENGTH, b"%d" % answer.json_bytes))
    if len(content) >= WORTH_BYTES and (encoding := accepted(headers.get(b"accept-encoding", b""))):
        if len(content) < _THREAD_BYTES:
            content = compressed(content, encoding)
        else:
            content = await asyncio.to_thread(compressed, content, encoding)
        said += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
    return _Response(200, content, said)


def _refusal(error: RequestError) -> _Response:
    said = [(b"content-type", JSON)]
    if isinstance(error, MethodNotAllowed):
        said.append((b"allow", b"POST"))
    if isinstance(error, UnsupportedEncoding):
        said.append((b"accept-encoding", b"gzip, deflate"))
    return _Response(error.status, error_body(error), said)


async def _read(receive: Receive, headers: Headers, limit_bytes: int) -> bytes:
    """The whole body, as long as it is not larger than the limit."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes=limit_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client left before its request was complete")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes=limit_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_content_type(content_type: bytes, *, binary: bool) -> None:
    """JSON, or not said, which Open Inference Protocol clients do; bytes where there may be binary tensors."""
    if content_type == JSON:
        return
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind not in (JSON, b"") and not (binary and kind == OCTET_STREAM):
        raise UnsupportedMediaType(content_type.decode("latin-1"))


def _json_bytes(declared: bytes, size: int) -> int:
    """The value of Inference-Header-Content-Length.

    Raises:
        MalformedBinary: it is not a number of bytes that the body has.
    """
    if not declared.isdigit() or len(declared) > 10 or int(declared) > size:
        raise MalformedBinary(
            f"the header Inference-Header-Content-Length is '{clipped(declared.decode('latin-1'), 40)}', but the body "
            f"has {size} bytes (uncompressed); it takes the length of the JSON alone, or 0 for a raw binary request"
        )
    return int(declared)


_ID_PREFIX = secrets.token_hex(6).encode()
_id_numbers = itertools.count(1)


def _request_id(headers: Headers) -> bytes:
    """The caller's if it gave one, else one that no other process makes; random bytes for each would cost a system
    call."""
    given = headers.get(REQUEST_ID)
    if given and _REQUEST_ID_TAKEN.fullmatch(given):
        return given
    return b"%b-%x" % (_ID_PREFIX, next(_id_numbers))


def _with_request_id(send: Send, request_id: bytes) -> Send:
    async def send_with_request_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
        await send(message)

    return send_with_request_id
