"""Work on files in a thread of its own, which may hang with a file system that does, and keeps nobody waiting then.

The threads of the event loop are for what comes to an end: requests are computed there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """What `work` returns or raises. The process ends without waiting for it."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()

    def finish(done: Future[T]) -> None:
        if ended.done():  # nobody waits any more
            return
        if error := done.exception():
            ended.set_exception(error)
        else:
            ended.set_result(done.result())

    def run() -> None:
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, done)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return await ended
