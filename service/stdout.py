"""Standard output, where `evalmode serve` says what it serves.

Nobody may be able to read it: the disk that it goes to is full, or the pipe is closed. A service serves all the same,
and says that in its log, once.
"""

from __future__ import annotations

import logging
import os
import sys

_log = logging.getLogger(__name__)


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        _log.warning("nothing more is said on standard output: %s", error.strerror)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
