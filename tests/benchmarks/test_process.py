"""What is started is stopped, whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.serving.process import DidNotStart, Running, clean_environment

FAMILY = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], \
start_new_session=True); print('up', flush=True); time.sleep(99)"


def running(tmp_path: Path, program: str) -> Running:
    return Running(
        [sys.executable, "-c", program],
        environment=clean_environment(Path(sys.executable).parent),
        folder=tmp_path,
        log=tmp_path / "log",
        room=tmp_path / "room",
    )


def test_a_child_in_a_session_of_its_own_is_measured_and_stopped_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(tmp_path, FAMILY) as family:
        assert family.first_answer_s(lambda: None if b"up" in log.read_bytes() else "not up") > 0
        processes = [it for it in psutil.Process(os.getpid()).children(recursive=True) if "99" in str(it.cmdline())]
        assert len(processes) == 2
        assert family.pss_mb() > 2
        assert family.cpu_s() > 0
    assert not [it for it in processes if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    program = "raise SystemExit('no such model')"
    with running(tmp_path, program) as server, pytest.raises(DidNotStart, match="ended with 1: no such model"):
        server.first_answer_s(lambda: "not up")
