"""Where versions of models lie: NAME/VERSION/model.onnx; and what lies beside them in vain.

Rule 1: nothing here opens a file; names and what the file system says of them are enough.
Rule 2: what begins with a dot is being written, and is not there yet.
Rule 3: a model that was laid a step too high or too low hides no others (`layout`). What a folder is, is told once,
        when the service starts: a version that goes away for a moment must not make a model of its neighbour.
Rule 4: what cannot be read is passed over by `find`, and named by `misplaced`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from service.errors import WrongCall, listing, printable

MODEL_FILE = "model.onnx"
ONNX = ".onnx"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names and versions: what is safe as a folder and in a URL. No leading dot: those are folders being written."""

_OTHERS = re.compile(r"\.|lost\+found$")
"""What nobody put there to be served: folders being written, and what a file system keeps for itself."""

_CHARACTERS = "letters, digits, '_', '-' and '.', not starting with '.' or '-'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A place that may hold a version of a model; not read yet."""

    name: str
    version: str
    path: Path
    """A bundle's folder, or a plain ONNX file."""

    def __str__(self) -> str:
        return f"version {self.version} of model '{self.name}' ({self.path})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misplaced:
    """Something in the folder of models that cannot be served where it lies."""

    name: str
    """Of the model, or of what stands in the place of one; printable, whatever it is."""
    version: str
    """The same of the version; empty where it is the model that is wrong."""
    reason: str
    """What is wrong, and what to do."""

    @property
    def place(self) -> str:
        """Inside what is served."""
        return f"{self.name}/{self.version}" if self.version else self.name


Layout = Literal["bundle", "file", "model", "repository"]
"""`file`: a folder with one ONNX file in it and nothing else that could be a model."""


def find(path: Path, model: str | None = None, *, called: str = "", kind: Layout | None = None) -> list[Found]:
    """All versions under a repository (NAME/VERSION/), a model (VERSION/), a bundle, or a plain ONNX file.

    Args:
        model: only this one's are looked for.
        called: the name of the one model there, whatever its folder or file is called; empty keeps that. A bundle whose
            own folder is no number is then version 1.
        kind: what the folder is; None: what lies in it tells.

    Returns:
        In order of the models' names, and of each the oldest version first.

    Raises:
        WrongCall: nothing is there, or nothing that could be a model, or several models for one name.
    """
    if called:
        return [] if model not in (None, called) else _called(called, find(path, kind=kind), path)
    if path.is_file():
        found = [Found(name=plain_name(path), version="1", path=path)]
    elif not path.is_dir():
        raise WrongCall(f"there is nothing at '{path}'; give a model repository, a bundle or an ONNX file")
    else:
        match kind or layout(path):
            case "bundle":
                whole = path.resolve()
                found = [Found(name=safe_name(whole.parent.name), version=safe_name(whole.name), path=path)]
            case "model":
                name = safe_name(path.resolve().name)
                found = [Found(name=name, version=version, path=path / version) for version in versions_in(path)]
            case "repository":
                folders = model_folders(path) if model is None else [path / model]
                found = [
                    Found(name=folder.name, version=version, path=folder / version)
                    for folder in folders
                    if model is None or NAME_PATTERN.fullmatch(model)
                    for version in versions_in(folder)
                ]
            case "file":
                file = only_file(path)
                found = [] if file is None else find(file)
    if not found and model is None:
        there = "".join(f"; '{it.name}': {it.reason}" for it in misplaced(path)[:3])
        raise WrongCall(
            f"'{path}' holds no models; it should hold NAME/VERSION/{MODEL_FILE}. "
            f"`evalmode export` writes such a folder{there}"
        )
    return [version for version in found if model is None or version.name == model]


def layout_at(path: Path) -> Layout | None:
    """None if it is no folder."""
    return layout(path) if path.is_dir() else None


def layout(path: Path) -> Layout:
    """What a folder is.

    Where it could be several, a version with a number for a name makes it a model's folder, and after that any
    NAME/VERSION/model.onnx a repository: the rest was laid there by mistake.
    """
    versions = versions_in(path)
    if any(version.isdecimal() for version in versions):
        return "model"
    if any(versions_in(folder) for folder in model_folders(path)):
        return "repository"
    if (path / MODEL_FILE).is_file():
        return "bundle"
    if versions:
        return "model"
    return "repository" if only_file(path) is None else "file"


def misplaced(path: Path, *, called: str = "", kind: Layout | None = None) -> list[Misplaced]:
    """What in a repository or in a model's folder is not found by `find`, in order of the names.

    Left out are names that begin with a dot, and files that nobody can mean as a model.

    Args:
        path, called, kind: as for `find`.
    """
    if not os.path.isdir(path):
        return []
    match kind or layout(path):
        case "bundle" | "file":
            return []
        case "model":
            return _misplaced_in_model(_parted(path)[1], called or safe_name(path.resolve().name))
        case "repository":
            return [found for entry in _entries(path) for found in _misplaced_in_repository(entry, called)]


def _misplaced_in_repository(entry: os.DirEntry[str], called: str) -> list[Misplaced]:
    """What is wrong with a model's folder, or in it."""
    reason = ""
    if not _is_folder(entry):
        if entry.name.endswith(ONNX) or "." not in entry.name:
            reason = _no_folder(entry, f"NAME/VERSION/{MODEL_FILE}, such as {plain_name(Path(entry.name))}/1")
    elif not NAME_PATTERN.fullmatch(entry.name):
        reason = f"this cannot be a model's name; use {_CHARACTERS}"
    else:
        versions, others = _parted(entry.path)
        if found := _misplaced_in_model(others, called if called and versions else entry.name):
            return found
        if not versions:
            hint = f"put one at {entry.name}/1/{MODEL_FILE}, or take the folder away"
            reason = _unreadable(entry) or f"it holds no version; {hint}"
    return [Misplaced(name=printable(entry.name), version="", reason=reason)] if reason else []


def _misplaced_in_model(others: Sequence[os.DirEntry[str]], name: str) -> list[Misplaced]:
    """What is wrong with what lies beside the versions of a model."""
    return [
        Misplaced(name=name, version=printable(entry.name), reason=reason)
        for entry in others
        if (reason := _why_no_version(entry, name))
    ]


def _why_no_version(entry: os.DirEntry[str], name: str) -> str:
    """Empty if nobody can mean it as one."""
    if not _is_folder(entry):
        if entry.name.isdecimal():
            return _no_folder(entry, f"{name}/{entry.name}/{MODEL_FILE}")
        return _no_folder(entry, f"{name}/VERSION/{MODEL_FILE}") if entry.name.endswith(ONNX) else ""
    if not NAME_PATTERN.fullmatch(entry.name):
        return f"this cannot be a version; use a number, or {_CHARACTERS}"
    if why := _unreadable(entry):
        return why
    if os.path.lexists(os.path.join(entry.path, MODEL_FILE)):
        return f"its {MODEL_FILE} is no file that can be read; put the file there"
    other = next((file.name for file in _entries(entry.path) if file.name.endswith(ONNX)), "")
    hint = f"'{printable(other)}' in it has to be called so" if other else "put it there, or take the folder away"
    return f"it holds no {MODEL_FILE}; {hint}"


def _no_folder(entry: os.DirEntry[str], place: str) -> str:
    if not os.path.exists(entry.path):
        return "it is a link that leads nowhere"
    return f"it is a file, where a folder should be; put it at {place}"


def _unreadable(folder: os.DirEntry[str]) -> str:
    """Why a folder cannot be read; empty if it can."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        return f"it cannot be read: {error.strerror}; let the service's user read it"
    return ""


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What people put into a folder, in order of the names; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((it for it in entries if not _OTHERS.match(it.name)), key=lambda it: it.name)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link that goes round
        return entry.is_dir()
    return False


def only_file(path: Path) -> Path | None:
    """The one ONNX file that lies in a folder."""
    files = sorted(path.glob("*.onnx"))
    return files[0] if len(files) == 1 else None


def _called(name: str, found: Sequence[Found], path: Path) -> list[Found]:
    checked_name(name)
    if len(names := {version.name for version in found}) > 1:
        raise WrongCall(
            f"--name '{name}' is for one model, and '{path}' holds {listing(sorted(names))}; give the path of one"
        )
    return [replace(version, name=name, version=version_called(path, version.version)) for version in found]


def version_called(path: Path, version: str) -> str:
    """The version of the one model at `path` that is called otherwise than its folder."""
    bare = (path / MODEL_FILE).is_file() and not version.isdecimal()
    return "1" if bare else version


def checked_name(name: str) -> str:
    """`name` if it is one a model may have.

    Raises:
        WrongCall: it is not.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise WrongCall(f"'{name}' cannot be a model's name; use {_CHARACTERS}")
    return name


def model_folders(path: Path) -> list[Path]:
    """The folders of a repository that may be models, in order of their names."""
    return [Path(it.path) for it in _entries(path) if NAME_PATTERN.fullmatch(it.name) and _is_folder(it)]


def versions_in(model_folder: Path) -> list[str]:
    """The version folders under `models/NAME`, oldest first. Folders that are being written start with a dot."""
    return sorted((entry.name for entry in _parted(model_folder)[0]), key=version_order)


def _parted(model_folder: str | Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """The versions of a model, and what else lies there."""
    versions: list[os.DirEntry[str]] = []
    others: list[os.DirEntry[str]] = []
    for entry in _entries(model_folder):
        is_version = NAME_PATTERN.fullmatch(entry.name) and os.path.isfile(os.path.join(entry.path, MODEL_FILE))
        (versions if is_version else others).append(entry)
    return versions, others


def version_order(version: str) -> tuple[int, int, str]:
    """A sort key: integers numerically, and above any other string, which sort as text."""
    return (1, int(version), "") if version.isdecimal() else (0, 0, version)


def plain_name(file: Path) -> str:
    """The name under which a plain ONNX file is served: its stem, in the characters that a name may have."""
    return safe_name(file.stem)


def safe_name(text: str) -> str:
    """`text` in the characters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip(".-") or "model"
