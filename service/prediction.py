"""The path of a prediction: plain ASGI in front of FastAPI's middleware.

    bytes -> parse -> Accepted -> coalescing -> runtime -> render -> bytes

Everything that is not a prediction goes on to `rest`, the FastAPI application. A request id is taken from the caller or
made, and returned with every answer of either.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, final

from service.errors import BadRequest, BodyTooLarge, Internal, MethodNotAllowed, RequestError, UnsupportedMediaType
from service.protocol import Parse, predict, v2
from service.protocol.json import error_body
from service.repository import Live, Repository

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = b"x-request-id"
_REQUEST_ID_TAKEN = re.compile(rb"[\x21-\x7e]{1,128}")

_PREDICT = re.compile(r"/predict|/models/(?P<model>[^/]+)/predict")
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")

_log = logging.getLogger(__name__)


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
        parse: Parse
        if found := _INFER.fullmatch(path):
            parse = v2.parse
        elif found := _PREDICT.fullmatch(path):
            parse = predict.parse
        else:
            await self._rest(scope, receive, _with_request_id(send, request_id))
            return
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{path} takes POST, not {scope['method']}")
            live = self._live(**found.groupdict())
            _check_content_type(headers.get(b"content-type", b""))
            body = await _read(receive, headers, self._body_limit_bytes)
            request = parse(live, body)
            outputs = await live.coalescer.submit(request.accepted)
            status, content = 200, request.render(outputs)
        except RequestError as error:
            status, content = error.status, error_body(error)
        except Exception:
            _log.exception("prediction failed, request id %s", request_id.decode())
            status, content = Internal.status, error_body(Internal())
        answer_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (REQUEST_ID, request_id),
        ]
        if status == MethodNotAllowed.status:
            answer_headers.append((b"allow", b"POST"))
        await send({"type": "http.response.start", "status": status, "headers": answer_headers})
        await send({"type": "http.response.body", "body": content})

    def _live(self, model: str | None, version: str | None = None) -> Live:
        return self._repository.only() if model is None else self._repository.live(model, version)


async def _read(receive: Receive, headers: dict[bytes, bytes], limit_bytes: int) -> bytes:
    """The whole body, as long as it is not larger than the limit."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes=limit_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
    else:
        chunks = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise BadRequest("the client left before its request was complete")
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
            if size > limit_bytes or not message.get("more_body", False):
                break
            message = await receive()
        body = b"".join(chunks)
    if len(body) > limit_bytes:
        raise BodyTooLarge(limit_bytes=limit_bytes)
    return body


def _check_content_type(content_type: bytes) -> None:
    """JSON, or not said, which Open Inference Protocol clients do."""
    kind = content_type.split(b";", 1)[0].strip().lower()
    if kind not in (b"application/json", b""):
        raise UnsupportedMediaType(content_type.decode("latin-1"))


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    given = headers.get(REQUEST_ID)
    return given if given and _REQUEST_ID_TAKEN.fullmatch(given) else secrets.token_hex(8).encode()


def _with_request_id(send: Send, request_id: bytes) -> Send:
    async def send_with_request_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
        await send(message)

    return send_with_request_id
