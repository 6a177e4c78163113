"""Each server in an environment of its own, made once: build/bench/PEER/venv.

Rule 1: a stamp is written last and holds the digest of what was asked for, so an interrupted or outdated environment
is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.serving.workloads import BUILD, ROOT

PEERS = Path(__file__).with_name("peers")
EVALMODE = "evalmode"
"""Installed from the checkout, as its users do: not editable, with the versions of constraints.txt."""
HALVES = ("service", "export")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE")


class CannotInstall(Exception):
    """pip's reason."""


def installed(peer: str) -> Path:
    """The environment's folder of programs.

    Raises:
        CannotInstall: pip failed; its last words.
    """
    room = BUILD / peer
    stamp, wanted = room / "installed", _digest(peer)
    if stamp.exists() and stamp.read_text() == wanted:
        return room / "venv" / "bin"
    shutil.rmtree(room / "venv", ignore_errors=True)
    stamp.unlink(missing_ok=True)
    _run(sys.executable, "-m", "venv", str(room / "venv"))
    pip = [str(room / "venv" / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    if peer == EVALMODE:
        _run(*pip, "--constraint", str(ROOT / "constraints.txt"), f"{_copied(room / 'source')}[service]")
    else:
        _run(*pip, "--requirement", str(PEERS / peer / "requirements.txt"))
    stamp.write_text(wanted)
    return room / "venv" / "bin"


def versions(programs: Path) -> dict[str, str]:
    """Every package of an environment."""
    listed = _run(str(programs / "python"), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    return {package["name"]: package["version"] for package in json.loads(listed)}


def _digest(peer: str) -> str:
    """Of what an environment is made from, and with which Python."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(_sources(peer)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources(peer: str) -> Iterable[Path]:
    if peer != EVALMODE:
        return [PEERS / peer / "requirements.txt"]
    code = [it for half in HALVES for it in (ROOT / half).rglob("*") if it.suffix != ".pyc" and it.is_file()]
    return [ROOT / "constraints.txt", *(ROOT / name for name in PROJECT_FILES), *code]


def _copied(source: Path) -> Path:
    """The project's files apart from the checkout, where setuptools would find what it built before."""
    shutil.rmtree(source, ignore_errors=True)
    for half in HALVES:
        shutil.copytree(ROOT / half, source / half, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source)
    return source


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if ended.returncode:
        said = [line for line in (ended.stderr or ended.stdout).splitlines() if line.startswith("ERROR")]
        raise CannotInstall(said[-1][:300] if said else f"{' '.join(command[:4])} ended with {ended.returncode}")
    return ended.stdout
