"""The first lines of a worker: `python -m service.workers.start_worker CHANNEL LISTENING`, two descriptors it inherits.

They import little, so that a worker that lacks something can say so to its supervisor.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from uvicorn.loops.auto import auto_loop_factory

from service.errors import WrongCall
from service.memory import share_arenas
from service.workers.channel import Channel, Facts


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end without a traceback, as SIGTERM is
    share_arenas()
    channel, listening = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:])
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        try:
            from service.workers.worker import Worker  # and with it the engine, which may not be installed
        except WrongCall as missing:
            runner.run(_decline(channel, missing))
        else:
            runner.run(Worker(listening).work(channel))


async def _decline(connected: socket.socket, error: WrongCall) -> None:
    async def answer(question: str, facts: Facts) -> object:
        raise error

    await (await Channel.over(connected, answer)).gone()


if __name__ == "__main__":
    main()
