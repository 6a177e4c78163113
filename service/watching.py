"""Notices what changes in the folder of models, and has it loaded as `load` would.

`look` reads, `Watch` decides, `Watcher` acts.

Rule 1: a look opens no file and runs in a thread of its own, so a file system that hangs keeps nobody waiting.
Rule 2: a version is loaded when two looks in a row find it the same, and other than when it was last loaded or refused:
        what is still being copied is left alone, and what was refused is tried again when it has changed.
Rule 3: what begins with a dot is being written, and is not there yet.
Rule 4: a folder that cannot be read changes nothing, and hides nothing beside it. That is said once, and again when it
        can be read. Nothing that a look comes upon ends the looking.
Rule 5: no clock is compared with a file's: its time is a mark that is the same or another.
Rule 6: what lies where it cannot be served is said once, when two looks in a row find it so; what was so at the start
        is said there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import stat
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

from service.aside import aside
from service.errors import EvalmodeError, LoadRefused, first_line
from service.places import (
    MODEL_FILE,
    NAME_PATTERN,
    Layout,
    Misplaced,
    layout,
    layout_at,
    misplaced,
    only_file,
    plain_name,
    safe_name,
    version_called,
)
from service.readings import Reading

Key = tuple[str, str]
"""Model and version."""

Mark = tuple[str, int, int, int, int]
"""Of a version's file: its path inside the folder, inode, size in bytes, times of change of its content and of itself,
in nanoseconds. Who exchanges a file and keeps its time changes the inode or the last."""

Marks = tuple[Mark, ...]

DEEPEST = 32
"""Folders in one another inside a version: more than anybody lays."""

HANGS_S = 30.0
"""A look that takes longer hangs with the file system: a folder of thousands of models takes seconds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one look found."""

    versions: Mapping[Key, Marks] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Why, by model or MODEL/VERSION; what is in there is not known. '' is all that is served."""
    misplaced: Sequence[Misplaced] = field(default_factory=list)


def look(path: Path, *, called: str = "", kind: Layout | None = None) -> Seen:
    """Every version under `path`; all three are what `places.find` takes."""
    versions: dict[Key, Marks] = {}
    unreadable: dict[str, str] = {}
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            versions[plain_name(path), "1"] = (_mark(path, path.name),)
        elif (kind := kind or layout(path)) == "bundle":
            whole = path.resolve()
            if (marks := _marks(path)) is not None:
                versions[safe_name(whole.parent.name), safe_name(whole.name)] = marks
        elif kind == "model":
            _note(safe_name(path.resolve().name), _versions(path), versions, unreadable)
        elif kind == "file":
            if (file := only_file(path)) is not None:
                versions[plain_name(file), "1"] = (_mark(file, file.name),)
        else:
            for model in _folders(path):
                try:
                    _note(model.name, _versions(model.path), versions, unreadable)
                except FileNotFoundError:  # it went while we looked
                    pass
                except OSError as error:
                    unreadable[model.name] = str(error.strerror)
    except OSError as error:
        unreadable[""] = str(error.strerror)
    if called:
        versions = {(called, version_called(path, version)): marks for (_, version), marks in versions.items()}
        unreadable = {_under(called, where): why for where, why in unreadable.items()}
    return Seen(versions=versions, unreadable=unreadable, misplaced=misplaced(path, called=called, kind=kind))


def _under(model: str, where: str) -> str:
    """The same of the model that is called so."""
    _, slash, version = where.partition("/")
    return model + slash + version if where else ""


def _note(
    model: str, found: tuple[dict[str, Marks], dict[str, str]], versions: dict[Key, Marks], unreadable: dict[str, str]
) -> None:
    versions |= {(model, version): marks for version, marks in found[0].items()}
    unreadable |= {f"{model}/{version}": why for version, why in found[1].items()}


def _versions(model: str | Path) -> tuple[dict[str, Marks], dict[str, str]]:
    """The versions in a model's folder, and why others cannot be looked at."""
    versions, unreadable = {}, {}
    for folder in _folders(model):
        try:
            if (marks := _marks(folder.path)) is not None:
                versions[folder.name] = marks
        except OSError as error:
            unreadable[folder.name] = str(error.strerror)
    return versions, unreadable


def _folders(path: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return [entry for entry in entries if NAME_PATTERN.fullmatch(entry.name) and _is_folder(entry)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def _marks(folder: str | Path) -> Marks | None:
    """Of all its files; None where it is no version, or went while we looked."""
    try:
        if not stat.S_ISREG(os.stat(os.path.join(folder, MODEL_FILE)).st_mode):
            return None
        return tuple(sorted(_files(folder, "")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(folder: str | Path, inside: str) -> Iterator[Mark]:
    if inside.count("/") > DEEPEST:
        raise OSError(errno.ELOOP, f"its folders are in one another more than {DEEPEST} deep")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{inside}{entry.name}/")
            else:
                with suppress(FileNotFoundError):  # it went, or is a link to nothing
                    yield _mark(entry.path, inside + entry.name)


def _mark(file: str | Path, name: str) -> Mark:
    found = os.stat(file)
    return name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@final
class Watch:
    """What was seen before, and what of that was acted on."""

    def __init__(self, seen: Seen) -> None:
        """
        Args:
            seen: before anything was loaded.
        """
        self._before = dict(seen.versions)
        self._done = dict(seen.versions)

    def plan(self, seen: Seen) -> dict[str, set[str]]:
        """By model, the versions that are to be looked at; none where one went. From now on they count as done."""
        now = {**{key: marks for key, marks in self._before.items() if _hidden(key, seen)}, **seen.versions}
        changed: dict[str, set[str]] = defaultdict(set)
        for key in sorted(now.keys() | self._done.keys()):
            marks = now.get(key)
            if marks != self._done.get(key) and marks == self._before.get(key):
                model, version = key
                if marks is None:
                    del self._done[key]
                    _ = changed[model]
                else:
                    self._done[key] = marks
                    changed[model].add(version)
        self._before = now
        return dict(changed)

    def undo(self, model: str, versions: Collection[str]) -> None:
        """These could not be looked at, so they are planned again."""
        for version in versions:
            self._done.pop((model, version), None)


def _hidden(key: Key, seen: Seen) -> bool:
    return not seen.unreadable.keys().isdisjoint({"", key[0], "/".join(key)})


class Load(Protocol):
    """`Crew.load`."""

    async def __call__(self, model: str, versions: Collection[str] | None = None) -> None: ...


@final
class Watcher:
    """Looks again and again."""

    def __init__(self, path: Path, *, every_s: float, called: str = "") -> None:
        """Look for the first time, which is to be before anything is loaded: what comes after it is noticed.

        Args:
            every_s: 0 is never.
        """
        self._path = path
        self._called = called
        self._kind = layout_at(path)
        self._every_s = every_s
        self._unreadable: Mapping[str, str] = {}
        self._looks_since_s = math.inf
        """On the clock of `time.monotonic`; infinite between two looks."""
        first = look(path, called=called, kind=self._kind) if every_s else Seen()
        self._misplaced = self._misplaced_and_told = first.misplaced
        self._watch = Watch(first)

    def reading(self) -> Reading:
        hangs = time.monotonic() - self._looks_since_s > HANGS_S
        return [("evalmode_unreadable_folders", (), len(self._unreadable) + hangs)]

    async def run(self, load: Load) -> None:
        """Has `load` done whatever is new, until cancelled."""
        while self._every_s:
            await asyncio.sleep(self._every_s)
            try:
                await self._look(load)
            except Exception as error:  # what nobody foresaw must not end the looking
                if "" not in self._unreadable:
                    _log.exception("looking at '%s' broke", self._path)
                self._tell({"": first_line(error)})

    async def _look(self, load: Load) -> None:
        self._looks_since_s = time.monotonic()
        try:
            seen = await aside(lambda: look(self._path, called=self._called, kind=self._kind))
        finally:
            self._looks_since_s = math.inf
        self._tell(seen.unreadable)
        if not seen.unreadable:
            self._tell_misplaced(seen.misplaced)
        for model, versions in self._watch.plan(seen).items():
            await self._have_loaded(load, model, versions)

    async def _have_loaded(self, load: Load, model: str, versions: set[str]) -> None:
        said = ", ".join(sorted(versions)) or "none"
        try:
            await load(model, versions)
        except LoadRefused as refused:
            _log.warning("%s; what was served goes on", refused)
        except EvalmodeError as error:  # nobody can load now
            _log.warning("model '%s' was changed (versions: %s) and cannot be loaded yet: %s", model, said, error)
            self._watch.undo(model, versions)
        except Exception:
            _log.exception("model '%s' was changed (versions: %s) and could not be loaded", model, said)
        else:
            if versions:
                _log.info("model '%s' was changed and looked at again (versions: %s)", model, said)
            else:
                _log.info("a version of model '%s' was removed; what was served goes on", model)

    def _tell(self, unreadable: Mapping[str, str]) -> None:
        """Once for each trouble, and once for its end."""
        for where in unreadable.keys() - self._unreadable.keys():
            _log.warning("%s cannot be read: %s; what was served goes on", self._said(where), unreadable[where])
        for where in self._unreadable.keys() - unreadable.keys():
            _log.warning("%s can be read again", self._said(where))
        self._unreadable = dict(unreadable)

    def _tell_misplaced(self, found: Sequence[Misplaced]) -> None:
        for one in found:
            if one in self._misplaced and one not in self._misplaced_and_told:
                _log.warning("'%s' is not served: %s", one.place, one.reason)
        self._misplaced_and_told = [it for it in found if it in self._misplaced or it in self._misplaced_and_told]
        self._misplaced = found

    def _said(self, where: str) -> str:
        model, _, version = where.partition("/")
        if version:
            return f"version {version} of model '{model}' in '{self._path}'"
        return f"'{self._path / model if model and not self._called else self._path}'"
