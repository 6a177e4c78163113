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
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple, final

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
from service.protocol import JSON, OCTET_STREAM, Parse, predict, v2
from service.protocol.compression import WORTH_BYTES, Encoding, accepted, compressed, decompressed
from service.protocol.json import error_body
from service.repository import Live, Repository

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = dict[bytes, bytes]

REQUEST_ID = b"x-request-id"
SERVER_TIMING = b"server-timing"
JSON_LENGTH = b"inference-header-content-length"
_JSON_TYPE = (b"content-type", JSON)
_OCTET_STREAM_TYPE = (b"content-type", OCTET_STREAM)
_NO_EXTENSIONS: dict[str, Wire] = {}
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


def _route(path: str) -> _Route | None:
    """What a path asks for; None if it is not a prediction."""
    return _short_route(path) if len(path) <= 512 else None  # no model has so long a name


@functools.lru_cache(maxsize=1024)
def _short_route(path: str) -> _Route | None:
    if found := _INFER.fullmatch(path):
        return _Route(v2.parse, True, found["model"], found["version"])
    if found := _PREDICT.fullmatch(path):
        return _Route(predict.parse, False, found["model"], None)
    return None


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
        headers = _headers(scope["headers"])
        request_id = _request_id(headers)
        if b"%2" in (raw_path := scope.get("raw_path") or b""):
            scope = {**scope, "path": _with_slashes_as_sent(scope["path"], raw_path)}
        route = _route(scope["path"])
        if route is None:
            await self._rest(scope, receive, _with_request_id(send, request_id))
            return
        wire: Wire | None = scope.get("extensions", _NO_EXTENSIONS).get(EXTENSION)
        live: Live | None = None
        read_ns = perf_counter_ns()
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['path']} takes POST, not {scope['method']}")
            live = self._repository.only() if route.model is None else self._repository.live(route.model, route.version)
            body = await self._body(receive, headers, route)
            read_ns = perf_counter_ns()
            request = route.parse(live, body, _json_bytes(headers, len(body)) if route.binary else None)
            computed = await live.coalescer.submit(
                request.accepted,
                alone=wire is not None and wire.alone,
                expires_ns=None if request.timeout_s is None else read_ns + int(request.timeout_s * 1e9),
                gone=None if wire is None else wire.is_closing,
            )
            status, (content, json_bytes) = 200, request.render(computed.outputs)
            said = [
                _JSON_TYPE if json_bytes is None else _OCTET_STREAM_TYPE,
                (
                    SERVER_TIMING,
                    b"queue;dur=%.3f, compute;dur=%.3f" % (computed.queue_ns / 1e6, computed.compute_ns / 1e6),
                ),
            ]
            if json_bytes is not None:
                said.append((JSON_LENGTH, b"%d" % json_bytes))
            if len(content) >= WORTH_BYTES and (encoding := accepted(headers.get(b"accept-encoding", b""))):
                content = await _compressed(content, encoding)
                said += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
            live.statistics.answered(perf_counter_ns() - read_ns, computed.queue_ns)
        except Exception as error:
            if not isinstance(error, RequestError):
                _log.exception("prediction failed, request id %s", request_id.decode())
                error = Internal()
            if live is not None:
                live.statistics.failed(perf_counter_ns() - read_ns)
            status, content, said = error.status, error_body(error), _refusal_headers(error)
        said.append((b"content-length", b"%d" % len(content)))
        said.append((REQUEST_ID, request_id))
        if wire is not None:
            wire.cork()
        await send({"type": "http.response.start", "status": status, "headers": said})
        await send({"type": "http.response.body", "body": content})
        if wire is not None:
            wire.uncork()

    async def _body(self, receive: Receive, headers: Headers, route: _Route) -> bytes:
        """What the client sent, uncompressed.

        Raises:
            RequestError: it is too large, of another kind than the route takes, or not what its headers say.
        """
        limit_bytes = self._body_limit_bytes
        _check_content_type(headers.get(b"content-type", b""), binary=route.binary)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit_bytes:
            raise BodyTooLarge(limit_bytes=limit_bytes)
        chunks: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client left before its request was complete")
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > limit_bytes:
                raise BodyTooLarge(limit_bytes=limit_bytes)
            chunks.append(chunk)
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if b"content-encoding" not in headers:
            return body
        if size < _THREAD_BYTES // 32:  # it may become a thousand times as large
            return decompressed(body, headers[b"content-encoding"], limit_bytes=limit_bytes)
        return await asyncio.to_thread(decompressed, body, headers[b"content-encoding"], limit_bytes=limit_bytes)


async def _compressed(content: bytes, encoding: Encoding) -> bytes:
    if len(content) < _THREAD_BYTES:
        return compressed(content, encoding)
    return await asyncio.to_thread(compressed, content, encoding)


def _headers(pairs: Sequence[tuple[bytes, bytes]]) -> Headers:
    """By name; one that was sent twice is joined by commas (RFC 9110, section 5.2), and then means what that means."""
    headers = dict(pairs)
    if len(headers) < len(pairs):
        headers = {name: b", ".join([value for other, value in pairs if other == name]) for name in headers}
    return headers


def _with_slashes_as_sent(path: str, raw_path: bytes) -> str:
    """The path; as it was sent if a slash in it was encoded, so that what was one segment does not become two."""
    return raw_path.decode("latin-1") if b"%2f" in raw_path.lower() else path


def _refusal_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    said = [_JSON_TYPE]
    if isinstance(error, MethodNotAllowed):
        said.append((b"allow", b"POST"))
    if isinstance(error, UnsupportedEncoding):
        said.append((b"accept-encoding", b"gzip, deflate"))
    return said


def _check_content_type(content_type: bytes, *, binary: bool) -> None:
    """JSON, or not said, which Open Inference Protocol clients do; bytes where there may be binary tensors."""
    if content_type == JSON:
        return
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind not in (JSON, b"") and not (binary and kind == OCTET_STREAM):
        raise UnsupportedMediaType(content_type.decode("latin-1"))


def _json_bytes(headers: Headers, size: int) -> int | None:
    """The value of Inference-Header-Content-Length; None without it.

    Raises:
        MalformedBinary: it is not a number of bytes that the body has.
    """
    declared = headers.get(JSON_LENGTH)
    if declared is None:
        return None
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
