"""The service with a switch: `python -m benchmarks.seeing.switched FILE serve ...`.

SIGUSR1 makes it blind, and the next one lets it see again. At each a line is written to FILE: whether it sees from now
on, and the nanoseconds of CPU time and the predictions that there were until then.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

from service import alone
from service.app import create_app
from service.asgi import Application
from service.cli import main
from service.statistics import Statistics
from service.watch import Watch

COUNTING = {name: getattr(Statistics, name) for name in ("answered", "ran", "failed")}


def nothing(*_: object, **__: object) -> None: ...


@final
class Switch:
    def __init__(self, watch: Watch, file: Path) -> None:
        self._watch = watch
        self._watchers = (*watch.hearing,)
        self._file = file
        self._sees = cycle([False, True])

    def turn(self, *_: object) -> None:
        sees = next(self._sees)
        for name, counting in COUNTING.items():
            setattr(Statistics, name, counting if sees else nothing)
        self._watch._watchers = self._watch.hearing = self._watchers if sees else ()
        now = (sees, time.process_time_ns(), self._watch.counts.begun)
        with self._file.open("a", encoding="utf-8") as lines:
            print(json.dumps(now), file=lines)


def switched(*arguments: Any) -> Application:
    app = create_app(*arguments)
    signal.signal(signal.SIGUSR1, Switch(app.predictions.watch, FILE).turn)
    return app


if __name__ == "__main__":
    FILE = Path(sys.argv.pop(1))
    with patch.object(alone, "create_app", switched):
        main()
