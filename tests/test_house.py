"""The house as DESIGN promises it: arrows point one way, the service needs no torch, the drawings are true."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import errors
from service.errors import EvalmodeError, RequestError

ROOT = Path(__file__).parent.parent

SAY_WHEN = {"service/logs.py": 1, "service/statistics.py": 1, "service/tracing.py": 1}
"""Where the clock of the wall is read, and how often: lines of the log, the last inference, spans."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(folder: str, *modules: str) -> list[str]:
    """The files under `folder` that import one of `modules`, or something inside one."""
    return [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / folder).rglob("*.py"))
        if any(name == module or name.startswith(f"{module}.") for name in imports(file) for module in modules)
    ]


def test_the_service_never_imports_torch_or_export() -> None:
    """The arrow between the halves points one way: export -> service."""
    assert importers("service", "torch", "export", "onnxscript", "sklearn", "polars") == []
    assert importers("export", "torch") != []  # the reader of imports does see them


def test_only_the_runtime_imports_the_engine() -> None:
    assert importers("service", "onnxruntime") == ["service/runtime.py"]


def test_a_clock_that_jumps_changes_nothing() -> None:
    """What is waited for or measured goes by a clock that nobody sets; that of the wall says when something was."""
    wall = re.compile(r"\btime\.(?:time|time_ns|localtime|gmtime)\b|\bdatetime\.\w+|\bfrom time import .*\btime\b")
    found = {
        str(file.relative_to(ROOT)): len(wall.findall(file.read_text(encoding="utf-8")))
        for file in sorted((ROOT / "service").rglob("*.py"))
    }
    assert {file: count for file, count in found.items() if count} == SAY_WHEN


def test_the_graph_is_pure() -> None:
    """ONNX surgery knows no files, no engine and no wire."""
    assert importers("service/graph", "pathlib", "os", "service.runtime", "service.protocol", "onnxruntime") == []


@pytest.mark.parametrize("module", ["service.app", "service.server", "service.cli", "export.cli"])
def test_importing_does_not_load_torch(module: str) -> None:
    """Serving works without torch installed, and the training verbs can say what is missing."""
    program = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=50).returncode == 0


def tree(error: type[EvalmodeError]) -> dict[str, str]:
    """Each error class with its parent's name."""
    found = {}
    for child in error.__subclasses__():
        found[child.__name__] = error.__name__
        found |= tree(child)
    return found


def drawn() -> dict[str, tuple[str, str]]:
    """Each class in the drawing of `errors.py`, with its parent and what stands behind it."""
    parents: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"    ((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+) *(.*)", line):
            depth = (len(match[1]) // 4) + (1 if "── " in line else 0)
            del parents[depth:]
            found[match[2]] = (parents[-1] if parents else "", match[3])
            parents.append(match[2])
    return found


def test_the_drawing_of_the_errors_is_true() -> None:
    drawing = drawn()
    assert {name: parent for name, (parent, _) in drawing.items() if parent} == tree(EvalmodeError)
    for name, (_, behind) in drawing.items():
        error = getattr(errors, name)
        if issubclass(error, RequestError) and error is not RequestError:
            assert behind == f"{error.status} {error.code}", name


def test_every_code_is_used_once() -> None:
    codes = [
        error.code
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, RequestError) and error is not RequestError
    ]
    assert len(set(codes)) == len(codes)
