"""Threads that do one thing at a time each, so that what takes long or is stuck holds up nothing else.

A thread ends with what it was made for. It cannot be stopped, so whoever ends the process waits for all of them, or
leaves them behind (http_server.py).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from weakref import WeakSet

_all: WeakSet[ThreadPoolExecutor] = WeakSet()


def own_thread(name: str) -> ThreadPoolExecutor:
    """One that begins when it is first given something to do."""
    thread = ThreadPoolExecutor(1, thread_name_prefix=name)
    _all.add(thread)
    return thread


def wait_for_threads() -> None:
    """Until all of them have done what they were given."""
    for thread in [*_all]:
        with suppress(RuntimeError):  # the system gives no more threads, so it has none
            thread.submit(int).result()
