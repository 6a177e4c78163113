"""Questions and answers between two processes, over a socket that both inherited.

Rule 1: nothing blocks; a question waits for its answer while others are asked, in either direction.
Rule 2: an answer is JSON, or an error of `service.errors` by the name of its class, with its sentence; what is foreseen
    crosses as itself, anything else as `Internal`, its traceback in the log of the process where it was raised.
Rule 3: when the other end is gone, every question ends with `Gone`, those to come too.

A message is one line: {"ask": what, "number": n, "facts": {...}}, then {"number": n, "answer": ...} or
{"number": n, "error": class, "sentence": text}.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, final

import orjson

from service.errors import EvalmodeError, Internal

Facts = dict[str, Any]
Answer = Callable[[str, Facts], Awaitable[object]]
"""Gives the answer to a question."""

LINE_LIMIT_BYTES = 64 * 2**20
"""Statistics and verdicts of thousands of models; both ends are ours, so this only ends what can only be a mistake."""

_log = logging.getLogger(__name__)


@final
class Gone(ConnectionError):
    """The process at the other end is gone."""


@final
class Channel:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._open = True
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def over(cls, connected: socket.socket, answer: Answer) -> Channel:
        reader, writer = await asyncio.open_unix_connection(sock=connected, limit=LINE_LIMIT_BYTES)
        return cls(reader, writer, answer)

    async def ask(self, question: str, **facts: object) -> Any:
        """
        Raises:
            EvalmodeError: what the other end raised.
            Gone: the other end is.
        """
        if not self._open:
            raise Gone
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        self._send({"ask": question, "number": number, "facts": facts})
        try:
            return await future
        finally:
            del self._asked[number]

    async def gone(self) -> None:
        """Wait until the other end is gone."""
        await asyncio.shield(self._listening)

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(orjson.loads(line))
        except ConnectionError:  # it was killed
            pass
        finally:
            self._open = False
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(Gone())

    def _take(self, message: Facts) -> None:
        if "ask" in message:
            task = asyncio.create_task(self._reply(message["number"], message["ask"], message["facts"]))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        future = self._asked.get(message["number"])
        if future is None or future.done():  # who asked does not wait any more
            return
        if "error" in message:
            future.set_exception(restored(message["error"], message["sentence"]))
        else:
            future.set_result(message["answer"])

    async def _reply(self, number: int, question: str, facts: Facts) -> None:
        try:
            said = {"answer": await self._answer(question, facts)}
        except EvalmodeError as error:
            said = {"error": type(error).__name__, "sentence": str(error)}
        except Exception:
            _log.exception("'%s' failed", question)
            said = {"error": Internal.__name__, "sentence": str(Internal())}
        if self._open:
            self._send({"number": number, **said})

    def _send(self, message: Facts) -> None:
        self._writer.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))


def restored(name: str, sentence: str) -> EvalmodeError:
    """The error of this class, with this sentence; one that is unknown here is ours and internal."""
    for kind in _kinds(EvalmodeError):
        if kind.__name__ == name:
            return kind.__new__(kind, sentence)  # the sentence is made already: what __init__ makes it of stays behind
    return Internal()


def _kinds(kind: type[EvalmodeError]) -> Iterator[type[EvalmodeError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
