"""Where log records go: to standard error, a line each, as text or as JSON.

Rule 1: who logs never waits and never fails. Lines are written by a thread; what a closed, full or slow destination
        does not take is counted and given up.
Rule 2: JSON is one object a line: time (RFC 3339, UTC), level, logger, message, process, then the fields of the record.
Rule 3: what other libraries log, uvicorn among them, goes the same way.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, Literal, final

import orjson

LogFormat = Literal["auto", "text", "json"]

SELDOM = ("opentelemetry", "asyncio")
SELDOM_S = 60.0
MOST_REMEMBERED = 1000
"""Messages; who comes with more says some of them more often."""

_NUMBER = re.compile(r"0x[0-9a-f]+|[\d.]+")

STANDARD_ERROR = 2
MOST_WAITING = 10_000
"""Records; some megabytes."""

FLUSH_LIMIT_S = 1.0
"""How long the end of the process waits for a destination that is slow."""

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TEXT_OF_SEVERAL = "%(asctime)s %(levelname)s %(name)s (worker %(process)d): %(message)s"


def begin(level: str, form: LogFormat, *, text: str = TEXT) -> None:
    """Send everything that is logged to standard error.

    Args:
        form: auto is text on a terminal, JSON elsewhere.
        text: the format of a line of text.
    """
    if form == "auto":
        form = "text" if os.isatty(STANDARD_ERROR) else "json"
    writer = Writer(STANDARD_ERROR)
    writer.setFormatter(JsonLines() if form == "json" else logging.Formatter(text))
    for library in SELDOM:
        writer.addFilter(Seldom(library))
    logging.basicConfig(level=level.upper(), handlers=[writer])


def flush() -> None:
    """Have everything written that was logged until now, if that is possible in `FLUSH_LIMIT_S`."""
    for writer in _writers():
        writer.flush()


def lost() -> int:
    """Lines of this process that were given up."""
    return sum(writer.lost for writer in _writers())


def _writers() -> list[Writer]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Writer)]


@final
class Seldom(logging.Filter):
    """What a library says again and again, such as that a collector is not there, is said once a minute."""

    def __init__(self, library: str) -> None:
        super().__init__(library)
        self._next_s: dict[str, float] = {}
        """By message, whatever the numbers in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        cause = record.exc_info[1] if record.exc_info else None
        said, now_s = _NUMBER.sub("", f"{record.getMessage()} {cause!r}"), time.monotonic()
        if now_s < self._next_s.get(said, 0.0):
            return False
        if len(self._next_s) >= MOST_REMEMBERED:
            self._next_s.clear()
        self._next_s[said] = now_s + SELDOM_S
        return True


@final
class JsonLines(logging.Formatter):
    """A record as one JSON object; a record's attribute `fields` is a dict of what else is in it."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(said, default=str).decode()
        except orjson.JSONEncodeError:  # half of a surrogate pair, a number of more than 64 bits
            return json.dumps(said, default=str)


@final
class Writer(logging.Handler):
    """Has records formatted and written by a thread of its own."""

    def __init__(self, destination: int, most_waiting: int = MOST_WAITING) -> None:
        """
        Args:
            destination: a file descriptor.
        """
        super().__init__()
        self.lost = 0
        self._destination = destination
        self._most_waiting = most_waiting
        self._waiting: SimpleQueue[logging.LogRecord | threading.Event] = SimpleQueue()
        self._told = 0
        """How many of the lost were told."""
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting.qsize() < self._most_waiting:
            self._waiting.put(record)
        else:
            self.lost += 1

    def flush(self) -> None:
        reached = threading.Event()
        self._waiting.put(reached)
        reached.wait(FLUSH_LIMIT_S)

    def _write(self) -> None:
        while True:
            record = self._waiting.get()
            if isinstance(record, threading.Event):
                record.set()
                continue
            try:
                self._put(self.format(record))
            except Exception:
                self.lost += 1
                continue
            if self.lost > self._told:
                self._tell_lost()

    def _tell_lost(self) -> None:
        lost = self.lost
        told = logging.LogRecord(__name__, logging.WARNING, "", 0, "%d lines were lost", (lost - self._told,), None)
        try:
            self._put(self.format(told))
        except OSError:
            return
        self._told = lost

    def _put(self, line: str) -> None:
        content = line.encode(errors="backslashreplace") + b"\n"
        while content:
            content = content[os.write(self._destination, content) :]
