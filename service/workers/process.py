"""A worker's process, from the side of the supervisor.

Rule 1: it inherits the channel and the socket that all listen on, and has a session of its own.
Rule 2: what it said last that it loads is kept: if it dies of that, nobody else knows.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from typing import final

from service.workers.channel import Answer, Channel, Facts


@final
class Process:
    """One that was started; it imports what a worker needs, and then waits to be told what to load."""

    channel: Channel

    def __init__(self, process: asyncio.subprocess.Process, answer: Answer) -> None:
        self._process = process
        self._answer_other = answer
        self.loading = ""
        """What it loads; empty while it loads nothing."""

    @classmethod
    async def started(cls, listening: socket.socket, answer: Answer) -> Process:
        """
        Args:
            answer: to all that it asks on behalf of its clients.

        Raises:
            OSError: there is no memory for another process, or there are too many of them.
        """
        ours, its = socket.socketpair()
        with its:
            inherited = (its.fileno(), listening.fileno())
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # the user's folder is no place to import from: it may have a `service` of its own
                    "-m",
                    "service.workers.start_worker",
                    *map(str, inherited),
                    pass_fds=inherited,
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    start_new_session=True,
                )
            except RuntimeError as error:  # no thread that waits for its end; it sees its channel end
                ours.close()
                raise OSError(errno.EAGAIN, str(error)) from error
        self = cls(process, answer)
        self.channel = await Channel.over(ours, self._answer)
        return self

    async def _answer(self, question: str, facts: Facts) -> object:
        if question == "begin":
            self.loading = facts["what"]
            return None
        return await self._answer_other(question, facts)

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    @property
    def failed(self) -> bool:
        """It ended, with a code of its own that is not 0."""
        return (self._process.returncode or 0) > 0

    def send(self, signum: signal.Signals) -> None:
        if not self.ended:
            self._process.send_signal(signum)

    async def wait(self) -> str:
        """How it ended."""
        code = await self._process.wait()
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{why} while it loaded {self.loading}" if self.loading else why

    async def end(self, signum: signal.Signals) -> str:
        """Have it end, if it has not; how it did."""
        self.send(signum)
        why = await self.wait()
        await self.channel.close()
        return why
