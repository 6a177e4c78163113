"""A connection that answers predictions itself: from the socket to the model and back, without ASGI between.

ASGI costs a task, a dozen calls and two writes for each request, which is more than a small network takes. So what most
callers send, one request after another with a body of a known length that is neither compressed nor too large, is
handed to the predictions as soon as it is read, and its answer leaves in one write. All else is uvicorn's, and gets the
same answers by the way of asgi.py.

Rule 1: one request at a time. One that comes before the last is answered goes to uvicorn, which keeps it until then.
Rule 2: whoever does not read its answers is asgi.py's, which waits for it.
Rule 3: a request that has begun is answered before a connection is shut down; once the process is about to end, each
        answer says that the connection closes, so that the next request goes elsewhere.
Rule 4: nobody holds a connection for nothing: one that is idle for long, sends too slowly or does not read its answer
        is closed. The server looks after that now and then (`close_if_late`), instead of a timer for each request.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, ClassVar, cast, final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.asgi import GONE, Application, headers_by_name
from service.errors import BadRequest, RequestError, RequestTooSlow
from service.large_body import LARGE_BODY_BYTES, LargeBody, place_for
from service.prediction import Headers, Route, Said, declared_json_bytes, route_of
from service.protocol import Body
from service.protocol.json import error_body

_ELSEWHERE = frozenset({b"content-encoding", b"transfer-encoding", b"expect", b"upgrade"})
"""With one of these headers a request is not ours."""

_JOINED_BYTES = 64 * 1024
"""A body up to this size is copied behind its head; a larger one is sent after it, in the same system call."""


KEEP_ALIVE_S = 75.0
"""How long a connection may be idle: longer than the minute after which most proxies close it on their side, so that
they do not send a request into a connection that is being closed here."""

LAST_REQUEST_S = 2.0
"""How long a request that has begun, or a first one, is waited for when the process ends."""

BEGIN_S = 30.0
RATE_BYTES_S = 16 * 1024
"""A request has to be here after `BEGIN_S`, and a second more for each so many bytes of its body."""


@final
class Exchange:
    """A prediction's request, and then whether it is answered; in the place of uvicorn's `RequestResponseCycle`."""

    __slots__ = ("chunks", "disconnected", "headers", "keep_alive", "left_bytes", "place", "response_complete", "route")

    message_event: ClassVar[asyncio.Event] = asyncio.Event()
    """uvicorn sets it when a client leaves; nobody waits for it."""

    def __init__(self, route: Route, headers: Headers, body_bytes: int, *, keep_alive: bool) -> None:
        self.route = route
        self.headers = headers
        self.left_bytes = body_bytes
        """Of the body, not yet read."""
        self.chunks: list[bytes] = []
        """The body, as it came."""
        self.place: memoryview | None = None
        """The body in its place, if it is large and binary."""
        if body_bytes >= LARGE_BODY_BYTES and (json_bytes := declared_json_bytes(headers)) is not None:
            self.place = place_for(body_bytes, json_bytes)
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False

    def take(self, chunk: bytes) -> None:
        """More of the body."""
        if self.place is None:
            self.chunks.append(chunk)
        else:
            room = self.room()
            room[: len(chunk)] = chunk
        self.left_bytes -= len(chunk)

    def room(self) -> memoryview:
        """What is left to be filled of its place."""
        assert self.place is not None
        return self.place[len(self.place) - self.left_bytes :]

    @property
    def body(self) -> Body:
        if self.place is not None:
            return self.place
        return self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)


@final
class Connection(HttpToolsProtocol):
    """uvicorn's connection, with a shorter way for predictions."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], app: Application):
        super().__init__(config, server_state, app_state)
        self._application = app
        self._exchange: Exchange | None = None
        """The request that is being read; None if it is uvicorn's."""
        self._reading = False
        """A request has begun and is not here yet."""
        self._deadline_s = self.loop.time() + BEGIN_S
        """The client has so long, on the clock of the event loop: for its next request, or for the rest of one."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        exchange = self._exchange
        if exchange is not None and exchange.place is not None and self._reading and not self.transport.is_closing():
            self._hand_over(LargeBody(self, exchange.room(), self._take_read))

    def _take_read(self, read_bytes: int) -> None:
        """So much more of a large body is in its place."""
        exchange = self._exchange
        assert exchange is not None
        self._deadline_s += read_bytes / RATE_BYTES_S
        exchange.left_bytes -= read_bytes
        if not exchange.left_bytes:
            self.parser = httptools.HttpRequestParser(self)  # the one before waits for a body that it will not see
            self._hand_over(self)
            self.on_message_complete()

    def _hand_over(self, protocol: asyncio.BaseProtocol) -> None:
        """What comes from now on is this protocol's."""
        self.transport.pause_reading()
        self.transport.set_protocol(protocol)
        self.transport.resume_reading()

    def on_message_begin(self) -> None:
        """Without the scope, which most requests do not need."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._reading = True
        if self._answered():
            self._deadline_s = self.loop.time() + BEGIN_S

    def on_headers_complete(self) -> None:
        self._exchange = self._short_way()
        if self._exchange is not None:
            self.cycle = cast(RequestResponseCycle, self._exchange)
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        self.scope["extensions"] = {GONE: {GONE: self.transport.is_closing}}
        super().on_headers_complete()
        if self._application.readiness.ending:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._deadline_s += len(body) / RATE_BYTES_S
        if self._exchange is not None:
            self._exchange.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading = False
        if not self._answered():
            self._deadline_s = math.inf
        exchange = self._exchange
        if exchange is None:
            super().on_message_complete()
            return

        def reply(status: int, said: Said, content: bytes) -> None:
            self._reply(exchange, status, said, content)

        self._application.predictions.answer(
            exchange.route,
            exchange.headers,
            exchange.body,
            reply,
            alone=len(self.connections) == 1,
            gone=self.transport.is_closing,
        )

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile, else wait for what comes next."""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        if self._reading or self._answered():
            patience_s = BEGIN_S if self._reading else KEEP_ALIVE_S
            unsent_bytes = self.transport.get_write_buffer_size()
            self._deadline_s = self.loop.time() + patience_s + unsent_bytes / RATE_BYTES_S

    def close_if_late(self) -> None:
        """Let go of a client that has not kept its deadline."""
        if self.loop.time() < self._deadline_s:
            return
        if self.transport.get_write_buffer_size():  # it does not read; what is left is not waited for
            self.transport.abort()
        elif not self.transport.is_closing():
            if self._reading:
                self._refuse(RequestTooSlow())
            self.transport.close()

    def shutdown(self) -> None:
        """Close, unless a request is on its way; a client that has only just connected may still send its first."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False
        elif cycle is None or self._reading:
            self._deadline_s = min(self._deadline_s, self.loop.time() + LAST_REQUEST_S)
        else:
            self.transport.close()

    def _short_way(self) -> Exchange | None:
        """None if the request has to go the other way."""
        if (
            self.parser.get_method() != b"POST"
            or (route := route_of(self.url.decode("latin-1"))) is None
            or not self._answered()
            or self.flow.write_paused
            or self.parser.get_http_version() != "1.1"
        ):
            return None
        headers = headers_by_name(self.headers)
        declared = headers.get(b"content-length", b"")
        if (
            not declared.isdigit()
            or int(declared) > self._application.body_limit_bytes
            or not _ELSEWHERE.isdisjoint(headers)
        ):
            return None
        keep_alive = self.parser.should_keep_alive() and not self._application.readiness.ending
        return Exchange(route, headers, int(declared), keep_alive=keep_alive)

    def _answered(self) -> bool:
        """The request before this one, if there was one."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _reply(self, exchange: Exchange, status: int, said: Said, content: bytes) -> None:
        exchange.response_complete = True
        if self.transport.is_closing():
            return
        lines = [STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            lines.append(b"%b: %b\r\n" % (name, value))
        for name, value in said:
            lines.append(b"%b: %b\r\n" % (name, value))
        lines.append(b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n")
        if len(content) <= _JOINED_BYTES:
            lines.append(content)
            self.transport.write(b"".join(lines))
        else:
            self.transport.writelines([b"".join(lines), content])
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest(f"the request is not valid HTTP/1.1: {msg.rstrip('.')}"))
        self.transport.close()

    def _refuse(self, error: RequestError) -> None:
        """What is not even a request is answered as every error is."""
        content = error_body(error)
        said = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(STATUS_LINE[error.status] + said + content)
