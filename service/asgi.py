"""The application as any ASGI server calls it: predictions in front of FastAPI's middleware, everything else within it.

A request with a compressed or a chunked body, of HTTP/1.0 or with anything else that is out of the ordinary comes this
way; connection.py says which do not.

Rule 1: whether the caller may ask at all is the first question (access.py).
Rule 2: HEAD is GET without the body of its answer (RFC 9110, section 9.3.2), wherever there is a GET.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter_ns
from typing import Any, final

from service.access import Access, is_open
from service.bodies import Bodies, Held
from service.busy_polling import BusyPolling
from service.errors import BodyTooLarge, ClientLeft, MethodNotAllowed, RequestError, ServerFull
from service.headers import REQUEST_ID, Headers, declared_bytes, headers_by_name, request_id, traced
from service.page_headers import with_page_headers
from service.prediction import (
    THREAD_BYTES,
    Predictions,
    Route,
    Said,
    check_content_type,
    code_of,
    refusal,
    route_of,
)
from service.protocol.compression import unpacked
from service.readiness import Readiness
from service.watch import ELSEWHERE, Ended

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

GONE = "evalmode.gone"
"""An extension in the scope: says whether the client has left."""

CODE = "evalmode.code"
"""Put into the scope by whoever answers with an error: its code."""

KEY_NAME = "evalmode.key"
"""In the scope: that of the key that was sent; empty if none is needed."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})

_UNKNOWN: dict[str, Callable[[], bool]] = {GONE: lambda: False}
"""Of another server, which does not say."""


@final
class Application:
    """Answers predictions; hands everything else to `rest`."""

    def __init__(
        self,
        predictions: Predictions,
        readiness: Readiness,
        access: Access,
        bodies: Bodies,
        answers: Bodies,
        *,
        body_limit_bytes: int,
        rest: Asgi,
    ) -> None:
        self.predictions = predictions
        self.readiness = readiness
        self.access = access
        self.bodies = bodies
        self.answers = answers
        self.polling = BusyPolling()
        self.body_limit_bytes = body_limit_bytes
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        headers = headers_by_name(scope["headers"])
        if b"%2" in (raw_path := scope.get("raw_path") or b""):
            scope = {**scope, "path": _with_slashes_as_sent(scope["path"], raw_path)}
        if scope.get("root_path"):  # of another server; what is checked here is what is routed
            scope = {**scope, "root_path": ""}
        try:
            scope = {**scope, KEY_NAME: self.access.check(scope["path"], headers)}
        except RequestError as error:
            given = request_id(headers)
            await _send(send, *refusal(error, given))
            self._ended(scope, headers, ELSEWHERE, error.status, error.code, given, perf_counter_ns())
            return
        route = route_of(scope["path"])
        if route is None:
            await self._elsewhere(scope, headers, receive, send)
        else:
            room = Held(self.answers)
            try:
                await _send(send, *await self._answer(scope, headers, route, receive, room))
            finally:
                room.hold_anyhow(0)

    async def _elsewhere(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """What is no prediction."""
        began_ns = perf_counter_ns()
        given = request_id(headers)
        status = 500  # of whoever breaks before it answers
        keyed = self.access.needs_keys and not is_open(scope["path"])
        head_only = scope["method"] == "HEAD"
        asked = {**scope, "method": "GET"} if head_only else scope

        async def send_with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                said = with_page_headers(message.get("headers", ()), keyed=keyed)
                message["headers"] = [*said, (REQUEST_ID, given)]
            elif head_only and message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        try:
            await self._rest(asked, receive, send_with_request_id)
        finally:
            route = getattr(asked.get("route"), "path", ELSEWHERE)
            self._ended(scope, headers, route, status, asked.get(CODE, ""), given, began_ns)

    def _ended(
        self, scope: Scope, headers: Headers, route: str, status: int, code: str, given: bytes, began_ns: int
    ) -> None:
        watch = self.predictions.watch
        watch.counts.ended(route, status, reason=code)
        for watcher in watch.wanting(status, route, headers):
            watcher.tell(
                Ended(
                    request_id=given.decode(),
                    method=scope["method"] if scope["method"] in METHODS else "_OTHER",
                    route=route,
                    status=status,
                    code=code,
                    began_ns=began_ns,
                    ended_ns=perf_counter_ns(),
                    client=scope.get("client"),
                    trace=traced(headers),
                )
            )

    async def _answer(
        self, scope: Scope, headers: Headers, route: Route, receive: Receive, room: Held
    ) -> tuple[int, Said, bytes]:
        """
        Args:
            room: of the answer, which may wait for the one before.
        """
        began_ns = perf_counter_ns()
        held = Held(self.bodies)
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{scope['path']} takes POST, not {scope['method']}")
            check_content_type(headers, binary=route.binary)
            body = await self._body(receive, headers, held)
        except Exception as error:
            given = request_id(headers)
            status, said, content = refusal(error, given)
            if isinstance(error, ServerFull):
                said.append((b"connection", b"close"))
            self._ended(scope, headers, route.pattern, status, code_of(error), given, began_ns)
            return status, said, content
        finally:
            held.hold(0)
        answered: asyncio.Future[tuple[int, Said, bytes]] = asyncio.get_running_loop().create_future()

        def reply(status: int, said: Said, content: bytes) -> None:
            if not answered.done():  # the server gave up on this request
                room.hold_anyhow(len(content))
                answered.set_result((status, said, content))

        left = scope.get("extensions", {}).get(GONE, _UNKNOWN)[GONE]
        self.predictions.answer(
            route, headers, body, reply, gone=lambda: answered.done() or left(), client=scope.get("client")
        )
        return await answered

    async def _body(self, receive: Receive, headers: Headers, held: Held) -> bytes:
        """What the client sent, uncompressed.

        Raises:
            RequestError: it is too large, or not what its headers say, or there is no room for it.
        """
        body = await self._received(receive, headers, held)
        if b"content-encoding" not in headers:
            return body
        return await self._unpacked(body, headers[b"content-encoding"], held)

    async def _received(self, receive: Receive, headers: Headers, held: Held) -> bytes:
        """What the client sent, as it came."""
        limit_bytes = self.body_limit_bytes
        if (declared_bytes(headers) or 0) > limit_bytes:
            raise BodyTooLarge(limit_bytes=limit_bytes)
        chunks: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > limit_bytes:
                raise BodyTooLarge(limit_bytes=limit_bytes)
            if more:
                held.hold(size)
            chunks.append(chunk)
        return b"".join(chunks)

    async def _unpacked(self, body: bytes, encoding: bytes, held: Held) -> bytes:
        pieces = unpacked(body, encoding, limit_bytes=self.body_limit_bytes)
        if len(body) < THREAD_BYTES // 32:  # it may become a thousand times as large
            return b"".join(pieces)
        content: list[bytes] = []
        size = len(body)
        held.hold(size)
        while piece := await asyncio.to_thread(next, pieces, b""):
            size += len(piece)
            held.hold(size)
            content.append(piece)
        return b"".join(content)


def _with_slashes_as_sent(path: str, raw_path: bytes) -> str:
    """The path; as it was sent if a slash in it was encoded, so that what was one segment does not become two."""
    return raw_path.decode("latin-1") if b"%2f" in raw_path.lower() else path


async def _send(send: Send, status: int, said: Said, content: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": said})
    await send({"type": "http.response.body", "body": content})
