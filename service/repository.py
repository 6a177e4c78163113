"""Which models and versions are live.

Rule 1: what is live was admitted; a refused version is in the index with its reason and is never served.
Rule 2: one version of a model is live: the newest that was admitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from service import bundle as bundles
from service.admission import Admitted, admit
from service.bundle import MODEL_FILE, NAME_PATTERN, Bundle
from service.coalescing import INLINE_RUN_S, Coalescer
from service.errors import (
    AdmissionRefused,
    NotFound,
    NotReady,
    UnknownModel,
    UnknownVersion,
    WrongCall,
    first_line,
    listing,
)
from service.runtime import Placement
from service.settings import Settings
from service.signature import SampleReader

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """An admitted version that answers requests."""

    name: str
    version: str
    admitted: Admitted
    coalescer: Coalescer
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


def find(path: Path) -> list[Found]:
    """All versions under a repository (NAME/VERSION/), a model (VERSION/), a bundle, or a plain ONNX file.

    Raises:
        WrongCall: nothing is there, or nothing that could be a model.
    """
    if path.is_file():
        plain = bundles.plain_name(path)
        return [Found(name=plain, version="1", path=path)]
    if not path.is_dir():
        raise WrongCall(f"there is nothing at '{path}'; give a model repository, a bundle or an ONNX file")
    if (path / MODEL_FILE).is_file():
        whole = path.resolve()
        return [Found(name=whole.parent.name, version=whole.name, path=path)]
    if found := list(_versions(path)):
        return found
    if found := [version for model in _folders(path) for version in _versions(model)]:
        return found
    raise WrongCall(
        f"'{path}' holds no models; it should hold NAME/VERSION/{MODEL_FILE}. `evalmode export` writes such a folder"
    )


def _versions(model_folder: Path) -> Iterator[Found]:
    for version in bundles.versions_in(model_folder):
        yield Found(name=model_folder.resolve().name, version=version, path=model_folder / version)


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and NAME_PATTERN.fullmatch(entry.name))


@final
class Repository:
    """The models that are served, by name."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._live = {entry.name: entry.live for entry in entries if entry.live is not None}

    def live(self, name: str, version: str | None = None) -> Live:
        """
        Raises:
            UnknownModel, UnknownVersion: there is no such model or version.
            NotReady: there is, but none of its versions was admitted.
        """
        live = self._live.get(name)
        if live is None:
            refused = [entry for entry in self.entries if entry.name == name]
            if refused:
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
    found: Sequence[Found], placement: Placement, settings: Settings, tell: Callable[[Entry], None] = lambda _: None
) -> Repository:
    """Admit the newest version of each model, or the newest that can be admitted.

    Args:
        found: in any order of models, versions oldest first.
        tell: is called with each version as soon as it is decided.
    """
    entries: list[Entry] = []
    done: set[str] = set()
    for version in reversed(found):
        if version.name in done:
            continue
        entry = _load(version, placement, settings)
        tell(entry)
        entries.append(entry)
        if entry.live is not None:
            done.add(version.name)
    return Repository(sorted(entries, key=lambda entry: entry.name))


def _load(found: Found, placement: Placement, settings: Settings) -> Entry:
    try:
        admitted = admit(found.read(), placement, threads=settings.threads, max_batch_rows=settings.max_batch_rows)
    except AdmissionRefused as refusal:
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=str(refusal))
    except Exception as error:  # a file that nobody foresaw must not keep the other models from being served
        _log.exception("admission of %s/%s broke", found.name, found.version)
        reason = f"not admitted: admission broke on it ({first_line(error)}); the log has the traceback"
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    coalescer = Coalescer(admitted.runtime, max_rows=admitted.max_batch_rows, inline=admitted.run_s < INLINE_RUN_S)
    reader = SampleReader(admitted.signature) if admitted.signature.features is not None else None
    live = Live(name=found.name, version=found.version, admitted=admitted, coalescer=coalescer, reader=reader)
    return Entry(name=found.name, version=found.version, state="READY", live=live)
