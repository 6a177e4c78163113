"""The service with a switch: `python -m benchmarks.seeing.switched FILE serve ...`.

A turn begins with each SIGUSR1; whether it sees, `seeing.sees` says. A line is written to FILE then: whether it sees
from now on, and the nanoseconds of CPU time and the predictions that there were until then.

A second of the shares that log and traces have lasts two here, one of which is seen; spans leave in turns that see.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

from benchmarks.seeing.seeing import EXPORT_S, TURN_S, sees
from service import alone, shares
from service.app import create_app
from service.asgi import Application
from service.cli import main
from service.statistics import Statistics
from service.tracing import Tracing
from service.watch import Watch

EXPORT_EVERY = round(EXPORT_S / TURN_S)
"""Pairs of turns."""

COUNTING = {name: getattr(Statistics, name) for name in ("answered", "ran", "failed")}


def nothing(*_: object, **__: object) -> None: ...


@final
class Switch:
    def __init__(self, watch: Watch, file: Path) -> None:
        self._watch = watch
        self._watchers = (*watch.hearing,)
        self._file = file
        self._turns = count()

    def turn(self, *_: object) -> None:
        number = next(self._turns)
        seeing = sees(number)
        for name, counting in COUNTING.items():
            setattr(Statistics, name, counting if seeing else nothing)
        self._watch._watchers = self._watch.hearing = self._watchers if seeing else ()
        now = (seeing, time.process_time_ns(), self._watch.counts.begun)
        with self._file.open("a", encoding="utf-8") as lines:
            print(json.dumps(now), file=lines)
        if seeing and number // 2 % EXPORT_EVERY == EXPORT_EVERY - 1:
            for tracing in self._watchers:
                if isinstance(tracing, Tracing):
                    threading.Thread(target=tracing._provider.force_flush).start()


def switched(*arguments: Any) -> Application:
    app = create_app(*arguments)
    signal.signal(signal.SIGUSR1, Switch(app.predictions.watch, FILE).turn)
    return app


if __name__ == "__main__":
    FILE = Path(sys.argv.pop(1))
    with patch.object(alone, "create_app", switched), patch.object(shares, "SECOND_S", 2 * shares.SECOND_S):
        main()
