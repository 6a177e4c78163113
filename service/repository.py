"""Which models and versions are live.

Rule 1: what is live was admitted and rehearsed; a refused version is in the index with its reason, never served.
Rule 2: one version of a model is live: the newest that was admitted.
Rule 3: whoever holds a `Live` may finish with it, also after it was replaced or unloaded.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

from service import bundle as bundles
from service.admission import Admitted, admit
from service.bundle import MODEL_FILE, NAME_PATTERN, Bundle, checked_name
from service.canary import Canary
from service.coalescing import Coalescer
from service.errors import (
    AdmissionRefused,
    NotFound,
    NotReady,
    UnknownModel,
    UnknownVersion,
    WrongCall,
    first_line,
    listing,
    printable,
)
from service.limits import GRACE_S, SHARE, bounded_memory, bounded_time, free_memory_bytes
from service.rehearsal import Batching, rehearse
from service.runtime import Deadline, Placement
from service.settings import Settings
from service.signature import SampleReader
from service.statistics import Statistics
from service.trial import tried

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A place that may hold a version of a model; not read yet."""

    name: str
    version: str
    path: Path
    """A bundle's folder, or a plain ONNX file."""

    def read(self) -> Bundle:
        if self.path.is_file():
            return bundles.read_plain(self.path)
        return bundles.read(self.path, name=self.name, version=self.version)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Live:
    """An admitted version that answers requests."""

    name: str
    version: str
    admitted: Admitted
    batching: Batching
    coalescer: Coalescer
    canary: Canary
    statistics: Statistics
    reader: SampleReader | None
    """None when the model takes tensors only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A version that was looked at, and what became of it."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""
    live: Live | None = None


def find(path: Path, name: str = "") -> list[Found]:
    """All versions under a repository (NAME/VERSION/), a model (VERSION/), a bundle, or a plain ONNX file.

    Args:
        name: what the one model there is called, whatever its folder or file is called; empty keeps that. A bundle
            whose own folder is no number is then version 1.

    Raises:
        WrongCall: nothing is there, or nothing that could be a model, or several models for one name.
    """
    found = _found(path)
    if not name:
        return found
    checked_name(name)
    if len(names := {version.name for version in found}) > 1:
        raise WrongCall(
            f"--name '{name}' is for one model, and '{path}' holds {listing(sorted(names))}; give the path of one"
        )
    bare = (path / MODEL_FILE).is_file() and not path.resolve().name.isdecimal()
    return [replace(version, name=name, version="1" if bare else version.version) for version in found]


def _found(path: Path) -> list[Found]:
    if path.is_file():
        plain = bundles.plain_name(path)
        return [Found(name=plain, version="1", path=path)]
    if not path.is_dir():
        raise WrongCall(f"there is nothing at '{path}'; give a model repository, a bundle or an ONNX file")
    if (path / MODEL_FILE).is_file():
        whole = path.resolve()
        return [Found(name=bundles.safe_name(whole.parent.name), version=bundles.safe_name(whole.name), path=path)]
    if found := list(_versions(path)):
        return found
    if found := [version for model in _folders(path) for version in _versions(model)]:
        return found
    if len(files := sorted(path.glob("*.onnx"))) == 1:
        return _found(files[0])
    raise WrongCall(
        f"'{path}' holds no models; it should hold NAME/VERSION/{MODEL_FILE}. `evalmode export` writes such a folder"
    )


def _versions(model_folder: Path) -> Iterator[Found]:
    for version in bundles.versions_in(model_folder):
        yield Found(name=bundles.safe_name(model_folder.resolve().name), version=version, path=model_folder / version)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and NAME_PATTERN.fullmatch(entry.name))


@final
class Repository:
    """The models that are served, by name."""

    def __init__(self, entries: Sequence[Entry], *, path: Path, placement: Placement, settings: Settings) -> None:
        self._path = path
        self._placement = placement
        self._settings = settings
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._live: dict[str, Live] = {}
        for name, of_one in itertools.groupby(sorted(entries, key=lambda entry: entry.name), lambda entry: entry.name):
            self.swap(name, tuple(of_one))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every version that was looked at, models in order of their names."""
        return tuple(entry for name in sorted(self._entries) for entry in self._entries[name])

    def admit(self, name: str) -> tuple[Entry, ...]:
        """Look at a model's folder again and admit its newest version; nothing that is served changes.

        May take long, so it is called in a thread.

        Raises:
            UnknownModel: nothing of that name is there.
        """
        try:
            there = find(self._path, self._settings.name)
        except WrongCall:  # nothing is left there
            there = []
        found = [version for version in there if version.name == name]
        if not found:
            raise UnknownModel(model=name, models=sorted({version.name for version in there}))
        if name in self._live:  # of those before it, none is better than what is served
            versions = [version.version for version in found]
            serving = self._live[name].version
            found = found[versions.index(serving) + 1 :] or found[-1:] if serving in versions else found
        return tuple(_newest(found, self._placement, self._settings, lambda _: None, load=_load_tried))

    def swap(self, name: str, entries: tuple[Entry, ...]) -> None:
        """From now on a model is what was found of it; where nothing of that was admitted, it goes on as it was."""
        live = next((entry.live for entry in entries if entry.live is not None), None)
        if live is not None:
            self._live[name] = live
        elif name in self._live:
            entries = (*entries, *(entry for entry in self._entries[name] if entry.live is self._live[name]))
        self._entries[name] = entries

    def unload(self, name: str) -> None:
        """Stop serving a model; who is being answered gets the answer.

        Raises:
            UnknownModel, NotReady: it is not served.
        """
        live = self.live(name)
        del self._live[name]
        self._entries[name] = (
            Entry(name=name, version=live.version, state="UNAVAILABLE", reason="unloaded by request"),
        )

    def live(self, name: str, version: str | None = None) -> Live:
        """
        Raises:
            UnknownModel, UnknownVersion: there is no such model or version.
            NotReady: there is, but none of its versions was admitted.
        """
        live = self._live.get(name)
        if live is None:
            if refused := self._entries.get(name):
                raise NotReady(f"model '{name}' is not ready: version {refused[0].version} was {refused[0].reason}")
            raise UnknownModel(model=name, models=sorted(self._live))
        if version is not None and version != live.version:
            raise UnknownVersion(model=name, version=version, serving=live.version)
        return live

    def only(self) -> Live:
        """The one live model.

        Raises:
            NotReady: there is none.
            NotFound: there are several, so the request must name one.
        """
        if not self._live:
            raise NotReady("no model is ready")
        if len(self._live) > 1:
            raise NotFound(f"several models are served; name one, as in /models/NAME/predict: {listing(self._live)}")
        return next(iter(self._live.values()))

    @property
    def models(self) -> tuple[Live, ...]:
        return tuple(self._live.values())

    @property
    def ready(self) -> bool:
        return bool(self._live)


def load(
    path: Path, placement: Placement, settings: Settings, tell: Callable[[Entry], None] = lambda _: None
) -> Repository:
    """Admit the newest version of each model under `path`, or the newest that can be admitted.

    Args:
        tell: is called with each version as soon as it is decided.

    Raises:
        WrongCall: there is nothing that could be a model.
    """
    entries = _newest(find(path, settings.name), placement, settings, tell, load=load_bounded)
    return Repository(entries, path=path, placement=placement, settings=settings)


def load_these(
    path: Path, placement: Placement, settings: Settings, versions: Collection[tuple[str, str]]
) -> list[Entry]:
    """Admit these versions, by name and version, and no others; one that is not there is left out."""
    return [
        load_bounded(found, placement, settings)
        for found in find(path, settings.name)
        if (found.name, found.version) in versions
    ]


def _newest(
    found: Sequence[Found],
    placement: Placement,
    settings: Settings,
    tell: Callable[[Entry], None],
    *,
    load: Callable[[Found, Placement, Settings], Entry],
) -> list[Entry]:
    """The newest version of each model that can be admitted, and those that were refused before it.

    Args:
        found: in any order of models, versions oldest first.
    """
    entries: list[Entry] = []
    done: set[str] = set()
    for version in reversed(found):
        if version.name in done:
            continue
        entry = load(version, placement, settings)
        tell(entry)
        entries.append(entry)
        if entry.live is not None:
            done.add(version.name)
    return entries


def _load_tried(found: Found, placement: Placement, settings: Settings) -> Entry:
    """`_load` for a process that already serves: only what another process came back from."""
    if reason := tried(found.path, found.name, found.version, placement, settings):
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    return _load(found, placement, settings, memory_bytes=None)


def load_bounded(found: Found, placement: Placement, settings: Settings) -> Entry:
    """`_load` for a process that serves nothing yet: it may take most of the memory that is free, and no more.

    Where even the engine does not come back, the process ends: nobody is served by it, and nobody would ever be.
    """

    def give_up() -> None:
        _log.critical(
            "%s/%s does not come to an end while it is loaded; take it away, or raise --admission-limit-s",
            found.name,
            found.version,
        )
        os._exit(1)

    with bounded_time(settings.admission_limit_s + GRACE_S, give_up):
        return _load(found, placement, settings, memory_bytes=int(free_memory_bytes() * SHARE))


def _load(found: Found, placement: Placement, settings: Settings, *, memory_bytes: int | None) -> Entry:
    deadline = Deadline()
    memory = nullcontext() if memory_bytes is None else bounded_memory(memory_bytes)
    try:
        with bounded_time(settings.admission_limit_s, deadline.end), memory:
            admitted = admit(
                found.read(),
                placement,
                threads=settings.threads,
                max_batch_rows=settings.max_batch_rows,
                deadline=deadline,
            )
            batching = rehearse(admitted, settings.numerics)
    except AdmissionRefused as refusal:
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=str(refusal))
    except MemoryError:
        reason = "not admitted: it asks for more memory than is free"
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    except Exception as error:  # a file that nobody foresaw must not keep the other models from being served
        _log.exception("admission of %s/%s broke", found.name, found.version)
        reason = f"not admitted: admission broke on it ({printable(first_line(error))}); the log has the traceback"
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    statistics = Statistics()
    coalescer = Coalescer(
        admitted.runtime,
        max_rows=batching.max_rows,
        inline_rows=batching.inline_rows,
        max_waiting_rows=settings.max_queue_rows,
        max_waiting_bytes=settings.max_queue_bytes,
        statistics=statistics,
    )
    rows, run_s = min(batching.run_s.items())
    live = Live(
        name=found.name,
        version=found.version,
        admitted=admitted,
        batching=batching,
        coalescer=coalescer,
        canary=Canary(coalescer, admitted.sample(rows), run_s=run_s),
        statistics=statistics,
        reader=SampleReader(admitted.signature) if admitted.signature.features is not None else None,
    )
    return Entry(name=found.name, version=found.version, state="READY", live=live)
