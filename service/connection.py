"""A connection that answers predictions itself: from the socket to the model and back, without ASGI between.

ASGI costs a task, a dozen calls and two writes for each request, which is more than a small network takes. So what most
callers send, one request after another with a body of a known length that is neither compressed nor too large, is
handed to the predictions as soon as it is read, and its answer leaves in one write. All else is uvicorn's, and gets the
same answers by the way of asgi.py.

Rule 1: one request at a time. One that comes before the last is answered goes to uvicorn, which keeps it until then, so
        answers leave in the order of the requests. What comes behind one that waits so is not even parsed.
Rule 2: whoever does not read its answers is asgi.py's, which waits for it.
Rule 3: a request that is here is answered, whatever follows it: bytes that are not HTTP, or the end of the process.
        Once that is near, each answer says that the connection closes, so that the next request goes elsewhere; and so
        do those that were pipelined behind it (RFC 9112, section 9.3.2: the client sends them again).
Rule 4: whoever closes its side has left, and is not computed for.
Rule 5: whoever may not predict is asgi.py's, before anything of the body is read: this one has no words for it.
Rule 6: nobody holds a connection for nothing. The server looks now and then (`close_if_late`); there is no timer for
        each request.

    whose turn         while                                           until
    the client's       nothing has come yet                            BEGIN_S, then it is closed
    the client's       no request has begun                            KEEP_ALIVE_S, or another needs the place
    the client's       a request has begun and is not here yet         BEGIN_S and by its size, then 408
    ours               a request is here and not answered              it is answered, or its own deadline has come
    the client's       it was refused by its head, and still sends        LINGER_S and LINGER_BYTES, then it is cut
    the client's       something is written that it does not read      as unread.py says, then it is cut
    the client's       all is sent, and over TLS it has not said bye   GOODBYE_S, then it is cut
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
from collections import deque
from collections.abc import Callable
from typing import Any, cast, final

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.asgi import GONE, METHODS, Application
from service.bodies import RATE_BYTES_S, Held
from service.errors import BadRequest, HeadersTooLarge, NotReady, RequestError, RequestTooSlow, ServerFull
from service.exchange import Exchange
from service.headers import Headers, declared_bytes, headers_by_name, names_one_host, request_id
from service.large_body import LargeBody
from service.prediction import Route, Said, code_of, refusal, route_of
from service.unread import Unread

KEEP_ALIVE_S = 75.0
"""How long a connection may be idle: longer than the minute after which most proxies close it on their side, so that
they do not send a request into a connection that is being closed here."""

BEGIN_S = 30.0
"""A request has to be here after `BEGIN_S`, and a second more for each `RATE_BYTES_S` of its body."""

LINGER_S = 2.0
LINGER_BYTES = 1024 * 1024
"""Who was answered before its body was here may send so much and so long more, so that it comes to read the answer: a
socket that is closed with something unread in it takes the answer back."""

GOODBYE_S = 5.0
"""Over TLS a client says that it has seen the end. One that has been sent all is not waited for longer."""

SKIPPED_BYTES = 64 * 1024
"""A body that is declared and not larger is read to its end, whatever its request was answered, and the connection
serves on."""

LAST_REQUEST_S = 2.0
"""How long a request that has begun, or a first one, is waited for when the process ends."""

MOST_URL_BYTES = 8 * 1024
MOST_HEAD_BYTES = 64 * 1024
MOST_HEADERS = 128
"""Of a request; the parser has no limits of its own, and a header sent twice is looked for among all others."""

_JOINED_BYTES = 64 * 1024
"""A body up to this size is copied behind its head; a larger one is sent after it, in the same system call."""

_ELSEWHERE = frozenset({b"content-encoding", b"transfer-encoding", b"expect"})
"""A request with one of these headers needs more than its body read: uvicorn and asgi.py know how."""

_ENCODED = re.compile(rb"[^\w/.~-]")
"""What a path has to be freed of before it is one."""

_NO_PATH = (UnicodeDecodeError, httptools.HttpParserInvalidURLError)
"""What uvicorn raises where the target of a request is not one."""

_METHOD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ")
"""A method at the beginning of a request (RFC 9110, section 9.1)."""

_LONGEST_URL = 512

PART_BYTES = 2 * 1024
"""What comes is parsed in parts of this size, and no further while a request waits for its turn: the smallest requests
have 18 bytes, and a single read may bring ten thousand of them. Most requests are here in one part."""

_NOTHING = memoryview(b"")


@functools.lru_cache(maxsize=1024)
def _route_of_url(url: bytes) -> Route | None:
    return None if _ENCODED.search(url) else route_of(url.decode("ascii"))


@final
class Flow(FlowControl):
    """Reads nothing while a request waits for its turn; uvicorn would read on with each answer, and hold all of it."""

    def __init__(self, transport: asyncio.Transport, waits: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._waits = waits

    def resume_reading(self) -> None:
        if not self._waits():
            super().resume_reading()


@final
class Early:
    """The transport of a request whose body is not here: if it is answered before, the connection ends gently."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.linger()


@final
class Connection(HttpToolsProtocol):
    """uvicorn's connection, with a shorter way for predictions.

    uvicorn's `cycle` is the request that came last, answered or not.
    """

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], app: Application):
        super().__init__(config, server_state, app_state)
        self._application = app
        self._exchange: Exchange | None = None
        """The request that is being read, if it is ours."""
        self._owed: deque[Exchange | RequestResponseCycle] = deque()
        """Those whose head is here and that are not answered, in their order."""
        self._reading = False
        """A request has begun and is not here yet."""
        self._head_read = False
        self._closes = False
        """The request that came last and is not ours is the last, whatever becomes of its body."""
        self._first = True
        """Nothing was computed yet for what came in this turn."""
        self._deadline_s = self.loop.time() + BEGIN_S
        """On the clock of the event loop; infinite while it is our turn."""
        self._unhanded_bytes = 0
        """What came since the last part of a body: of a head, or of what may follow a body in chunks."""
        self._held = Held(app.bodies)
        """Of bodies, what is here and waits: for the rest, or for its turn."""
        self._carrier: asyncio.Transport | None = None
        """What carries the transport, if that is TLS."""
        self._hurries = False
        """The process ends, and it was told."""
        self._unparsed = _NOTHING
        """What is here and is parsed when those before it are answered."""
        self._parsing = False
        self._lingering_bytes: int | None = None
        """What may still come after the last answer; None before it."""
        self._goodbye_until_s = math.inf
        """Once it is closed and all is sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = Unread(self._application.answers, transport, self._carrier, self.loop.time())
        self.flow = Flow(transport, lambda: bool(self.pipeline or self._unparsed))

    def connection_made_over(self, carrier: asyncio.Transport, transport: asyncio.Transport) -> None:
        """As `connection_made`, where TLS is spoken."""
        self._carrier = carrier
        self.connection_made(transport)

    # what is read

    def data_received(self, data: bytes) -> None:
        if self._lingering_bytes is not None:
            self._pass_over(len(data))
            return
        self._first = True
        if self._carrier is not None:
            self._unread.count(self.loop.time())  # TLS says neither that it is paused, nor that it goes on
        self._application.polling.received()
        if len(data) <= PART_BYTES and not self._unparsed:
            self._parse(data)
        else:
            self._parse_parts(data)
        if self._exchange is not None:
            self._read_on(self._exchange)

    def _read_on(self, exchange: Exchange) -> None:
        """More of its body is to come."""
        self._hold(exchange)
        if exchange.place is not None and exchange.left_bytes and not self._ended:
            self._hand_over(LargeBody(self, exchange.room(), self._took))

    def _parse_parts(self, data: bytes) -> None:
        """This, after what waits to be parsed, as far as it is due; the rest is kept."""
        waited = self._unparsed
        self._held.hold(self._held.count_bytes - len(waited))
        self._unparsed = memoryview(b"".join([waited, data]) if waited else data)
        self._parsing = True
        while self._unparsed and not self.pipeline and not self._ended:
            exchange = self._exchange
            size = PART_BYTES if exchange is None else max(PART_BYTES, exchange.left_bytes)
            part, self._unparsed = self._unparsed[:size], self._unparsed[size:]
            self._parse(part)
        self._parsing = False
        if self._unparsed:
            self.flow.pause_reading()
            try:
                self._held.hold(self._held.count_bytes + len(self._unparsed))
            except ServerFull as error:
                self._give_up(error)

    def _go_on(self) -> None:
        """With what waited to be parsed until those before it were answered, and then with what comes."""
        if not self._ended:
            self._first = True
            self._parse_parts(b"")
            self.flow.resume_reading()
            if self._exchange is not None:
                self._read_on(self._exchange)

    def _parse(self, data: bytes | memoryview) -> None:
        self._unhanded_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head, rest = self._head_without_upgrade(), memoryview(data)[upgrade.args[0] :]
            self.parser = _parser(self)
            self._parse(head)
            self._parse(rest)
            return
        except httptools.HttpParserError as error:
            self._unreadable(error, data)
            return
        if self._unhanded_bytes > MOST_HEAD_BYTES:
            self._unhanded_bytes = 0
            self._give_up(_too_large())

    def linger(self) -> None:
        """Nothing more is answered; what the client sends all the same is passed over for a while."""
        if self._lingering_bytes is not None or self.transport.is_closing():
            return
        self._lingering_bytes = LINGER_BYTES
        self._deadline_s = self.loop.time() + LINGER_S
        self._reading = False
        self._forget_bodies()
        if self.transport.can_write_eof():  # not over TLS
            self.transport.write_eof()
        self.flow.read_paused = False
        self._hand_over(self)

    def _forget_bodies(self) -> None:
        """What is here and will not be answered. A connection that is over may stay in memory for long, and with it
        all that it holds: it is part of cycles, for Python to find."""
        if self._exchange is not None:
            self._exchange.give_body()
            self._exchange = None
        self._unparsed = _NOTHING
        self._held.hold(0)

    def _pass_over(self, count_bytes: int) -> None:
        assert self._lingering_bytes is not None
        self._lingering_bytes -= count_bytes
        if self._lingering_bytes < 0:
            self.transport.pause_reading()

    def _hold(self, exchange: Exchange) -> None:
        """Count what is here of a body that is not here whole."""
        try:
            self._held.hold(exchange.body_bytes - exchange.left_bytes)
        except ServerFull as error:
            self._give_up(error)

    def _took(self, read_bytes: int) -> bool:
        """So much more of a large body is in its place; whether more is wanted."""
        exchange = self._exchange
        assert exchange is not None
        self._deadline_s += read_bytes / RATE_BYTES_S
        exchange.left_bytes -= read_bytes
        if exchange.left_bytes:
            self._hold(exchange)
            return not self._ended
        self.parser = _parser(self)  # the one before waits for a body that it will not see
        self._hand_over(self)
        self._first = True
        self.on_message_complete()
        return False

    def _hand_over(self, protocol: asyncio.BaseProtocol) -> None:
        """What comes from now on is this protocol's; transports choose how they read when they begin to."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
            self.transport.set_protocol(protocol)
            self.transport.resume_reading()

    def on_message_begin(self) -> None:
        """Without the scope, which most requests do not need."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._exchange = None
        self._reading = True
        self._head_read = False
        self._wait()

    def on_headers_complete(self) -> None:
        by_name = self._checked_head()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise BadRequest("CONNECT is for proxies, and this is none; send the request itself")
            return  # the parser stops here, and `_parse` goes on
        self._head_read = True
        self._exchange = self._short_way(by_name)
        if self._exchange is not None:
            self.cycle = cast(RequestResponseCycle, self._exchange)
        else:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.expect_100_continue = url, headers, expects
            self.scope["headers"] = headers
            self.scope["extensions"] = {GONE: {GONE: self.transport.is_closing}}
            super().on_headers_complete()
            self._closes = self._application.readiness.ending or not self.cycle.keep_alive
            size = declared_bytes(by_name)
            if size is None or size > SKIPPED_BYTES or expects:
                self.cycle.keep_alive = False  # until its body is here
                self.cycle.transport = cast(asyncio.Transport, Early(self))
            else:
                self.cycle.keep_alive = not self._closes
        self._owed.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unhanded_bytes = 0
        if self._exchange is not None:
            self._deadline_s += len(body) / RATE_BYTES_S
            self._exchange.take(body)
            return
        if not self.cycle.response_complete:
            self._deadline_s += len(body) / RATE_BYTES_S
        if self.pipeline:
            self._held.hold(self._held.count_bytes + len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._head_read:
            return
        self._reading = False
        self._unhanded_bytes = 0
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            cycle = self.cycle
            cycle.transport = self.transport
            if not cycle.response_started:
                cycle.keep_alive = not self._closes
            super().on_message_complete()
            self._wait()
            return
        exchange.more_body = False
        self._deadline_s = math.inf
        if self._held.count_bytes:
            self._held.hold(0)
        alone, self._first = self._first and len(self.connections) == 1, False

        def reply(status: int, said: Said, content: bytes) -> None:
            self._reply(exchange, status, said, content)

        self._application.predictions.answer(
            exchange.route,
            exchange.headers,
            exchange.give_body(),
            reply,
            alone=alone,
            gone=self.transport.is_closing,
            client=self.client,
        )

    def _head_without_upgrade(self) -> bytes:
        """Of a request that asks for another protocol, which may be ignored (RFC 9110, section 7.8).

        The parser takes what follows such a head for the other protocol, so it is given this one. Java's HTTP client
        asks for HTTP/2 that way with every first request.
        """
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([first, *lines, b"", b""])

    def _checked_head(self) -> Headers:
        """
        Raises:
            HeadersTooLarge, BadRequest: the parser goes no further, and asks for `_unreadable`.
        """
        size = self._unhanded_bytes  # with what follows the head, so it is counted anew only where it may be too large
        if size > MOST_HEAD_BYTES:
            size = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        self._unhanded_bytes = 0
        if len(self.url) > MOST_URL_BYTES or len(self.headers) > MOST_HEADERS or size > MOST_HEAD_BYTES:
            raise _too_large()
        headers = headers_by_name(self.headers)
        if not names_one_host(headers) and (b"host" in headers or self.parser.get_http_version() != "1.0"):
            raise BadRequest("HTTP/1.1 wants one 'host' header, and this request has none or several")
        return headers

    def _short_way(self, headers: Headers) -> Exchange | None:
        """None if the request has to go the other way."""
        if (
            self.parser.get_method() != b"POST"
            or len(self.url) > _LONGEST_URL
            or (route := _route_of_url(self.url)) is None
            or self._owed
            or self.flow.write_paused
            or self.parser.get_http_version() != "1.1"
        ):
            return None
        body_bytes = declared_bytes(headers)
        if (
            body_bytes is None
            or body_bytes > self._application.body_limit_bytes
            or not _ELSEWHERE.isdisjoint(headers)
            or not self._application.access.lets_predict(headers)
        ):
            return None
        keep_alive = self.parser.should_keep_alive() and not self._application.readiness.ending
        return Exchange(route, headers, body_bytes, keep_alive=keep_alive)

    # what is answered

    def _reply(self, exchange: Exchange, status: int, said: Said, content: bytes) -> None:
        exchange.response_complete = True
        if not self.transport.is_closing():
            self._write(status, said, content, keep_alive=exchange.keep_alive)
            if not exchange.keep_alive:
                self.transport.close()
            else:
                self._application.polling.answered(self, self.loop)
        self.on_response_complete()

    def _write(self, status: int, said: Said, content: bytes, *, keep_alive: bool) -> None:
        lines = [STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            lines.append(b"%b: %b\r\n" % (name, value))
        for name, value in said:
            lines.append(b"%b: %b\r\n" % (name, value))
        lines.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if len(content) <= _JOINED_BYTES:
            lines.append(content)
            self.transport.write(b"".join(lines))
        else:
            self.transport.writelines([b"".join(lines), content])
            self._unread.count(self.loop.time())

    def on_response_complete(self) -> None:
        """Go on with what came meanwhile, else wait for what comes next. Called for answers of either way."""
        self._owed.popleft()
        if self._carrier is not None:
            self._unread.count(self.loop.time())
        if self._ended:
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._held.hold(self._held.count_bytes - len(cycle.body))
            self._start_asgi_task(cycle, app)
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self._unparsed and not self._parsing:
            self.loop.call_soon(self._go_on)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_bodies()
        self._unread.forget()
        for cycle in self._owed:  # uvicorn tells the last that came, and that may not be the one that is computed
            cycle.disconnected = True
            cycle.message_event.set()

    def _unreadable(self, error: httptools.HttpParserError, data: bytes | memoryview) -> None:
        """What cannot be read ends the connection."""
        if isinstance(error, httptools.HttpParserInvalidMethodError):
            self._give_up(_unknown_method(bytes(data)))
        elif not isinstance(error, httptools.HttpParserCallbackError):
            self._give_up(BadRequest(f"the request is not valid HTTP/1.1: {error}"))
        elif isinstance(error.__context__, _NO_PATH):
            self._give_up(BadRequest("the request is not valid HTTP/1.1: its target is not a path"))
        else:
            self._give_up(error.__context__ if isinstance(error.__context__, RequestError) else error)

    def _give_up(self, error: BaseException) -> None:
        """Nothing more is read; the answers that are owed are given first, and one request has one answer."""
        if self._ended:
            return
        self._unparsed = _NOTHING
        if last := self._last_owed():
            last.keep_alive = False
            self.flow.pause_reading()
        elif self._reading and self._head_read and not self._owed:  # it was answered before it was here
            self.transport.close()
        else:
            self._refuse(error)
            if self._reading and self._head_read:
                self.linger()
            else:
                self.transport.close()

    def _refuse(self, error: BaseException) -> None:
        given = request_id({})
        status, said, content = refusal(error, given)
        self._write(status, said, content, keep_alive=False)
        self._application.predictions.watch.refused_unread(status, code_of(error), given, self.client)

    def _last_owed(self) -> Exchange | RequestResponseCycle | None:
        """The last of the requests that are here and not answered."""
        return next((cycle for cycle in reversed(self._owed) if not cycle.more_body), None)

    @property
    def _ended(self) -> bool:
        """Nothing more is read or answered."""
        return self._lingering_bytes is not None or self.transport.is_closing()

    # whose turn it is

    def _wait(self) -> None:
        """From now on, as the table says."""
        if self._owed and self._last_owed():
            self._deadline_s = math.inf
        else:
            self._deadline_s = self.loop.time() + (BEGIN_S if self._reading else KEEP_ALIVE_S)

    @property
    def idle_until_s(self) -> float:
        """When it is let go of if nothing comes; infinite if something has begun, long past if it is closed and waits
        for a goodbye only."""
        if self._unread.unsent_bytes:
            return math.inf
        if self.transport.is_closing():
            return -math.inf
        return math.inf if self._reading or self._owed or self._ended else self._deadline_s

    def give_place(self) -> None:
        """To another, as nothing has begun: gently, and where that was tried, at once."""
        if self.transport.is_closing():
            self.cut()
        else:
            self.transport.close()

    def cut(self) -> None:
        """Over TLS what carries it, which ends in whatever state TLS is."""
        (self._carrier or self.transport).abort()

    def close_if_late(self) -> bool:
        """Let go of a client that has not kept its deadline; whether it lost an answer that it did not read."""
        now_s = self.loop.time()
        if self._unread.unsent_bytes:
            late = self._unread.is_late(now_s, hurry=self._application.answers.turned_away or self._hurries)
            if late:
                self.cut()
            return late
        self._unread.rest(now_s)
        if not self.transport.is_closing():
            if now_s > self._deadline_s:
                if self._reading and (self._owed or not self._head_read):  # else it was answered before it was here
                    self._refuse(RequestTooSlow())
                self.transport.close()
        elif now_s > self._goodbye_until_s:
            self.cut()
        else:
            self._goodbye_until_s = min(self._goodbye_until_s, now_s + GOODBYE_S)
        return False

    def pause_writing(self) -> None:
        self._unread.count(self.loop.time())
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread.resume(self.loop.time())
        super().resume_writing()

    def give_up(self) -> None:
        """The process ends now: whoever is owed an answer is told that it does not come."""
        if self._ended:
            return
        if self._last_owed():
            first = self._owed[0]
            if isinstance(first, Exchange) or not first.response_started:
                first.disconnected = True  # what is computed for it all the same is not written
                self._refuse(NotReady("the service is being stopped, and the model took too long; ask another one"))
        self.transport.close()

    def shutdown(self) -> None:
        """Close after what is owed; a request that has begun, and a first one, may still arrive. To be called again for
        those that come meanwhile."""
        if self._hurries:
            return
        self._hurries = True
        if self._ended:
            return
        if self._owed:
            self._owed[-1].keep_alive = False
            self._closes = True
        elif self._reading or self.cycle is None:
            self._deadline_s = min(self._deadline_s, self.loop.time() + LAST_REQUEST_S)
        else:
            self.transport.close()


def _parser(connection: Connection) -> httptools.HttpRequestParser:
    """As uvicorn makes its own: what follows a last request is passed over."""
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(url_bytes=MOST_URL_BYTES, headers=MOST_HEADERS, head_bytes=MOST_HEAD_BYTES)


def _unknown_method(data: bytes) -> BadRequest:
    """
    Args:
        data: what holds the method, perhaps behind other requests, or only its end.
    """
    found = _METHOD.match(data)
    said = f"method '{found[1].decode()}'" if found and found[1].decode() not in METHODS else "its method"
    return BadRequest(
        f"the request is not valid HTTP/1.1: {said} is not known; GET, HEAD, POST, PUT and DELETE are, in capitals"
    )
