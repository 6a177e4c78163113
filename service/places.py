"""Where versions of models lie: NAME/VERSION/model.onnx.

Rule 1: nothing here opens a file; names and what the file system says of them are enough.
Rule 2: what begins with a dot is being written, and is not there yet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.errors import WrongCall, listing

MODEL_FILE = "model.onnx"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names and versions: what is safe as a folder and in a URL. No leading dot: those are folders being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A place that may hold a version of a model; not read yet."""

    name: str
    version: str
    path: Path
    """A bundle's folder, or a plain ONNX file."""

    def __str__(self) -> str:
        return f"version {self.version} of model '{self.name}' ({self.path})"


def find(path: Path, model: str | None = None, *, called: str = "") -> list[Found]:
    """All versions under a repository (NAME/VERSION/), a model (VERSION/), a bundle, or a plain ONNX file.

    Args:
        model: only this one's are looked for.
        called: the name of the one model there, whatever its folder or file is called; empty keeps that. A bundle whose
            own folder is no number is then version 1.

    Returns:
        In order of the models' names, and of each the oldest version first.

    Raises:
        WrongCall: nothing is there, or nothing that could be a model, or several models for one name.
    """
    if called:
        return [] if model not in (None, called) else _called(called, find(path), path)
    if path.is_file():
        found = [Found(name=plain_name(path), version="1", path=path)]
    elif not path.is_dir():
        raise WrongCall(f"there is nothing at '{path}'; give a model repository, a bundle or an ONNX file")
    elif (path / MODEL_FILE).is_file():
        whole = path.resolve()
        found = [Found(name=safe_name(whole.parent.name), version=safe_name(whole.name), path=path)]
    elif versions := versions_in(path):
        name = safe_name(path.resolve().name)
        found = [Found(name=name, version=version, path=path / version) for version in versions]
    else:
        folders = model_folders(path) if model is None else [path / model]
        found = [
            Found(name=folder.name, version=version, path=folder / version)
            for folder in folders
            if model is None or (NAME_PATTERN.fullmatch(model) and is_folder(folder))
            for version in versions_in(folder)
        ]
    if not found and (file := only_file(path)) is not None:
        found = find(file)
    if not found and model is None:
        raise WrongCall(
            f"'{path}' holds no models; it should hold NAME/VERSION/{MODEL_FILE}. "
            "`evalmode export` writes such a folder"
        )
    return [version for version in found if model is None or version.name == model]


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
        raise WrongCall(
            f"'{name}' cannot be a model's name; use letters, digits, '_', '-' and '.', not starting with '.' or '-'"
        )
    return name


def model_folders(path: Path) -> list[Path]:
    """The folders of a repository that may be models, in order of their names."""
    return sorted(entry for entry in path.iterdir() if NAME_PATTERN.fullmatch(entry.name) and is_folder(entry))


def versions_in(model_folder: Path) -> list[str]:
    """The version folders under `models/NAME`, oldest first. Folders that are being written start with a dot."""
    return sorted(
        (
            entry.name
            for entry in model_folder.iterdir()
            if NAME_PATTERN.fullmatch(entry.name) and is_file(entry / MODEL_FILE)
        ),
        key=version_order,
    )


def is_file(path: Path) -> bool:
    """False too where nobody may look: one version must not hide the others."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def version_order(version: str) -> tuple[int, int, str]:
    """A sort key: integers numerically, and above any other string, which sort as text."""
    return (1, int(version), "") if version.isdecimal() else (0, 0, version)


def plain_name(file: Path) -> str:
    """The name under which a plain ONNX file is served: its stem, in the characters that a name may have."""
    return safe_name(file.stem)


def safe_name(text: str) -> str:
    """`text` in the characters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip(".-") or "model"
