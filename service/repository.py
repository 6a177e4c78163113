"""Which models and versions are live.

Rule 1: what is live was admitted and rehearsed; a refused version is in the index with its reason, never served.
Rule 2: of each model those versions are live that the settings want (policy.py), and those that an alias names. A
        request that names none goes to `stable`, or where that is not set to the newest.
Rule 3: whoever holds a `Live` may finish with it, also after it was replaced or unloaded; then its memory is free.
Rule 4: what is live goes on while something better is looked for, when that is refused, and when its folder is gone.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, final
from weakref import WeakSet, finalize

from service import aliases as aliasing
from service import bundle as bundles
from service.admission import Admitted, admit
from service.aliases import STABLE, Aliases
from service.answer_size import AnswerSize, measured
from service.bundle import Bundle, Digests
from service.canary import Canary
from service.coalescing import Coalescer
from service.counts import Counts
from service.errors import (
    AdmissionRefused,
    LoadRefused,
    NotFound,
    NotReady,
    UnknownModel,
    UnknownVersion,
    WrongCall,
    first_line,
    listing,
    printable,
)
from service.limits import GRACE_S, SHARE, bounded_memory, bounded_time, free_memory_bytes, held_at_most
from service.memory import give_back_soon
from service.places import Found, Layout, Misplaced, find, layout_at, misplaced, version_order
from service.policy import TORN, Rule, parse, settled
from service.rehearsal import Batching, rehearse
from service.runtime import Deadline, Placement
from service.settings import Settings
from service.signature import SampleReader
from service.statistics import Statistics
from service.trial import Trials, Tried

UNLOADED = "unloaded by request"
"""The reason why a version is not served that nobody refused."""

NO_MODEL = "no model is ready; POST /v2/repository/index says why"

GONE = "its folder is gone; it is served from memory until it is replaced or unloaded"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Live:
    """An admitted version that answers requests."""

    name: str
    version: str
    admitted: Admitted
    batching: Batching
    coalescer: Coalescer
    canary: Canary
    statistics: Statistics
    answer_size: AnswerSize
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

    @property
    def ready(self) -> bool:
        return self.live is not None


@final
class Repository:
    """The models that are served, by name."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        path: Path,
        placement: Placement,
        settings: Settings,
        aliases: Mapping[str, Aliases] | None = None,
        kind: Layout | None = None,
    ) -> None:
        """
        Args:
            kind: what `path` was when the service started; None: what it is now.
        """
        self._path = path
        self._kind = kind or layout_at(path)
        self._placement = placement
        self._settings = settings
        self._policy = parse(settings.versions)
        self._aliases: dict[str, Aliases] = dict(aliases or {})
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._live: dict[str, Live] = {}
        """What answers who names no version, by model."""
        self._named: dict[str, dict[str, Live]] = {}
        """What answers who names a version or an alias, by model."""
        self._replaced: WeakSet[Live] = WeakSet()
        """Those that still have requests to answer, and hold themselves for no longer."""
        self._running: list[Live] = []
        """Those of them whose engine ran when they were replaced, until it has come back."""
        self._loading: dict[str, tuple[str, ...]] = {}
        """Versions that `admit` has begun with, by model, until they are swapped in or given up."""
        self._trials = Trials()
        self.counts = Counts()
        """Of all that this process serves and has served."""
        for name, of_one in groupby(sorted(entries, key=lambda entry: entry.name), lambda entry: entry.name):
            self.swap(name, tuple(of_one))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every version that was looked at, models in order of their names."""
        return tuple(entry for name in sorted(self._entries) for entry in _one_for_each(self._entries[name]))

    @property
    def loading(self) -> set[tuple[str, str]]:
        """Versions that are being admitted, by name and version."""
        return {(name, version) for name, versions in [*self._loading.items()] for version in versions}

    def misplaced(self) -> list[Misplaced]:
        """What lies in the folder and cannot be served there; looked for now, so it is called in a thread."""
        return misplaced(self._path, called=self._settings.name, kind=self._kind)

    def _find(self, name: str) -> list[Found]:
        return find(self._path, name, called=self._settings.name, kind=self._kind)

    def give_up(self, name: str) -> None:
        """What `admit` made of a model is not going to be served."""
        self._loading.pop(name, None)

    def admit(
        self, name: str, versions: Collection[str] | None = None, decided: Mapping[str, Tried] | None = None
    ) -> tuple[Entry, ...]:
        """Look at a model's folder again and admit what is to be live; nothing that is served changes.

        Until `swap` or `give_up` follows, the index says that it is being loaded.

        May take long, so it is called in a thread.

        Args:
            versions: what changed in the folder. Nothing else is read, what was refused stays so, and an unloaded
                model too. None: somebody asked, so the newest is admitted anew, and whatever was refused or changed.
            decided: what another process that serves made of them, by version: nothing is tried again, and no other
                bytes are loaded. None: this one is the first to look.

        Raises:
            UnknownModel: nothing of that name is there.
            NotReady: `stop_admitting` was called.
        """
        asked = versions is None
        before = self._entries.get(name, ())
        if not asked and before and all(entry.reason == UNLOADED for entry in before):
            return before
        try:
            there = {found.version: found for found in self._find(name)}
        except WrongCall:  # nothing is left there
            there = {}
        if asked and not there and any(entry.ready for entry in before):
            version = next(entry.version for entry in before if entry.ready)
            raise LoadRefused(
                model=name,
                version=version,
                reason=f"not found under '{self._path}' any more; put it back. It is served from memory",
            )
        if asked and not there:
            why = "; ".join(f"'{it.place}': {it.reason}" for it in self.misplaced() if it.name == name)
            raise UnknownModel(model=name, models=sorted(self._live), why=why)
        rule, held = self._policy.of(name), set(self._aliases.get(name, {}).values())
        serving = {entry.version: entry.live for entry in before if entry.live is not None}
        refused = {entry.version: entry for entry in before if entry.live is None}
        newest = max(there, key=version_order, default=None)
        passports = {version for version, live in serving.items() if live.admitted.bundle.passport is not None}
        passports |= _with_passport(there.values())

        def look(version: str) -> list[Entry]:
            found, live, known = there.get(version), serving.get(version), refused.get(version)
            if found is None:
                return [
                    _serving(live, GONE) if live is not None else _missing(name, version, self._aliases.get(name, {}))
                ]
            if not asked and version not in versions:  # type: ignore[operator]  # asked is None
                if known is None and live is None:  # it is wanted only now
                    return [self._load(found, passports, decided)]
                return [*filter(None, [known]), *map(_serving, filter(None, [live]))]
            if live is None:
                return [self._load(found, passports, decided)]
            if not (asked and version == newest) and _has_same_bytes(found, live):
                return [_serving(live)]
            anew = self._load(found, passports, decided)
            return [anew] if anew.ready else [anew, _serving(live)]

        kept = [version for version in serving if not asked or version in held]
        try:
            return tuple(_wanted({*there, *kept, *rule.names, *held}, rule, held, look))
        except BaseException:
            self.give_up(name)
            raise

    def stop_admitting(self) -> None:
        """The service ends: an admission that is under way is given up, and none begins any more."""
        self._trials.end()

    def swap(self, name: str, entries: tuple[Entry, ...]) -> list[str]:
        """From now on a model is what was found of it, as `settled` says.

        Returns:
            The versions that go on as they were.
        """
        self._loading.pop(name, None)
        before = self._entries.get(name, ())
        entries = settled(before, entries, self._aliases.get(name, {}).values())
        for entry in entries:
            if entry.live is not None:
                entry.live.statistics.counts = self.counts.of(name, entry.version)
        self._entries[name] = entries
        if not entries:
            del self._entries[name]
        self._assign(name)
        now = {entry.live for entry in entries}
        self._let_go(entry.live for entry in before if entry.live is not None and entry.live not in now)
        self.counts.pass_over(name, {live.version for live in self.answering if live.name == name})
        if before:  # not at the start
            give_back_soon()
        return [entry.version for entry in before if entry.live is not None and entry.live in now]

    def unload(self, name: str) -> None:
        """Stop serving a model; who is being answered gets the answer. One that is not served stays so, whatever comes
        into its folder.

        Raises:
            UnknownModel: nobody knows it.
        """
        entries = self._entries.get(name)
        if not entries:
            raise self._not_served(name, None)
        lives = [entry.live for entry in entries if entry.live is not None]
        self._entries[name] = tuple(
            Entry(name=name, version=entry.version, state="UNAVAILABLE", reason=UNLOADED)
            for entry in entries
            if entry.ready or not lives
        )
        self._assign(name)
        self._let_go(lives)

    def aliases(self, name: str) -> Aliases:
        """
        Raises:
            UnknownModel: there is no such model.
        """
        if name not in self._entries:
            raise UnknownModel(model=name, models=sorted(self._live))
        return self._aliases.get(name, {})

    def set_aliases(self, name: str, aliases: Aliases) -> None:
        """From now on a model's aliases are these; what none names any more goes when the model is next loaded."""
        self._aliases[name] = aliases
        self._assign(name)

    def keep_aliases(self, name: str) -> bool:
        """Write a model's aliases into its folder, in a thread; whether they will be there after a restart."""
        return aliasing.keep(
            aliasing.folder_of(self._path, name, called=self._settings.name, kind=self._kind),
            self._aliases.get(name, {}),
        )

    @property
    def all_aliases(self) -> dict[str, Aliases]:
        """By model."""
        return dict(self._aliases)

    def versions(self, name: str) -> list[str]:
        """Those of a model that are live, oldest first."""
        live = [entry.version for entry in self._entries.get(name, ()) if entry.ready]
        return sorted(live, key=version_order)

    def live(self, name: str, version: str | None = None) -> Live:
        """
        Args:
            version: or an alias; None: `stable`, or where that is not set the newest.

        Raises:
            UnknownModel, UnknownVersion: there is no such model or version.
            NotReady: there is, but it was not admitted, or is not there any more.
        """
        live = self._live.get(name) if version is None else self._named.get(name, {}).get(version)
        if live is None:
            raise self._not_served(name, version)
        return live

    def only(self) -> Live:
        """The one live model.

        Raises:
            NotReady: there is none.
            NotFound: there are several, so the request must name one.
        """
        if not self._live:
            name = next((live.name for live in self.lives), None)
            raise NotReady(NO_MODEL) if name is None else self._not_served(name, None)
        if len(self._live) > 1:
            raise NotFound(f"several models are served; name one, as in /models/NAME/predict: {listing(self._live)}")
        return next(iter(self._live.values()))

    @property
    def models(self) -> tuple[Live, ...]:
        """Of each model the version that answers who names none."""
        return tuple(self._live.values())

    @property
    def lives(self) -> tuple[Live, ...]:
        """Every version that is live."""
        return tuple(entry.live for entries in self._entries.values() for entry in entries if entry.live is not None)

    @property
    def answering(self) -> tuple[Live, ...]:
        """Every version that is live, and those that were replaced and are not done."""
        self._running = [live for live in self._running if live.coalescer.busy]
        return (*self.lives, *self._replaced)

    @property
    def ready(self) -> bool:
        return bool(self._live)

    def _assign(self, name: str) -> None:
        """Say who answers what."""
        by_version = {entry.version: entry.live for entry in self._entries.get(name, ()) if entry.live is not None}
        aliases = self._aliases.get(name, {})
        named = {alias: by_version[version] for alias, version in aliases.items() if version in by_version}
        self._named[name] = by_version | named
        default = aliases.get(STABLE) or max(by_version, key=version_order, default="")
        if default in by_version:
            self._live[name] = by_version[default]
        else:
            self._live.pop(name, None)

    def _let_go(self, lives: Iterable[Live]) -> None:
        for live in lives:
            self._replaced.add(live)
            if live.coalescer.busy:  # and perhaps will not come back
                self._running.append(live)
            finalize(live, give_back_soon).atexit = False

    def _not_served(self, name: str, version: str | None) -> NotFound | NotReady:
        entries = self._entries.get(name)
        if not entries:
            return UnknownModel(model=name, models=sorted(self._live))
        if not any(entry.ready for entry in entries):
            return NotReady(f"model '{name}' is not ready: version {entries[0].version} was {entries[0].reason}")
        alias = STABLE if version is None else version
        if behind := self._aliases.get(name, {}).get(alias):
            return NotReady(
                f"alias '{alias}' of model '{name}' is version {behind}, which is not live; load it, or move the alias"
            )
        return UnknownVersion(model=name, version=alias, serving=self.versions(name))

    def _load(self, found: Found, passports: Collection[str], decided: Mapping[str, Tried] | None) -> Entry:
        """Only the bytes that another process came back from: this one serves."""
        self._loading[found.name] = (*self._loading.get(found.name, ()), found.version)
        _log.info("%s/%s is being loaded beside what is served", found.name, found.version)
        start_s = time.monotonic()
        if decided is None:
            there = self._trials.tried(found.path, found.name, found.version, self._placement, self._settings)
        else:
            there = decided.get(found.version, Tried(reason=TORN))
        if there.reason:
            entry = Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=there.reason)
        else:
            entry = _load(found, self._placement, self._settings, passports, digests=there.digests)
        became = "admitted" if entry.ready else "refused"
        _log.info("%s/%s was %s after %.1f s", found.name, found.version, became, time.monotonic() - start_s)
        return entry


def load(
    path: Path,
    placement: Placement,
    settings: Settings,
    *,
    begin: Callable[[Found], None] = lambda _: None,
    tell: Callable[[Entry], None] = lambda _: None,
    kind: Layout | None = None,
) -> Repository:
    """Admit those versions of each model under `path` that are to be live.

    Args:
        kind: what `path` was when the service started; None: what it is now.
        begin: is called with each version before it is loaded.
        tell: is called with each version as soon as it is decided.

    Raises:
        WrongCall: there is nothing that could be a model, or its aliases cannot be read.
    """
    policy, kind = parse(settings.versions), kind or layout_at(path)
    entries: list[Entry] = []
    aliases: dict[str, Aliases] = {}
    for name, of_one in groupby(find(path, called=settings.name, kind=kind), lambda found: found.name):
        there = {found.version: found for found in of_one}
        folder = aliasing.folder_of(path, name, called=settings.name, kind=kind)
        aliases[name] = aliasing.read(folder) if folder is not None else {}
        rule, held = policy.of(name), set(aliases[name].values())
        passports = _with_passport(there.values())

        def look(
            version: str, name: str = name, there: Mapping[str, Found] = there, passports: set[str] = passports
        ) -> list[Entry]:
            found = there.get(version)
            if found is None:
                entry = _missing(name, version, aliases[name])
            else:
                begin(found)
                entry = load_bounded(found, placement, settings, passports)
            tell(entry)
            return [entry]

        entries += _wanted({*there, *rule.names, *held}, rule, held, look)
    if unknown := sorted(policy.by_model.keys() - aliases.keys()):
        there_are = listing(aliases)
        _log.warning("--versions names models that are not there: %s; there are: %s", listing(unknown), there_are)
    return Repository(entries, path=path, placement=placement, settings=settings, aliases=aliases, kind=kind)


def load_these(
    path: Path,
    placement: Placement,
    settings: Settings,
    versions: Collection[tuple[str, str]],
    begin: Callable[[Found], None],
    kind: Layout | None,
) -> list[Entry]:
    """Admit these versions, by name and version, and no others; one that is not there is left out."""
    try:
        found_there = find(path, called=settings.name, kind=kind)
    except WrongCall:  # nothing is left there
        return []
    entries = []
    for found in found_there:
        if (found.name, found.version) not in versions:
            continue
        _log.info("%s/%s is being loaded", found.name, found.version)
        begin(found)
        entries.append(load_bounded(found, placement, settings))
    return entries


def _wanted(
    versions: Collection[str], rule: Rule, held: Collection[str], look: Callable[[str], list[Entry]]
) -> list[Entry]:
    """What was made of the versions that are to be live, newest first, and of those that were refused before them.

    Args:
        held: those that an alias names.
        look: makes something of a version.
    """
    entries: list[Entry] = []
    admitted = 0
    for version in sorted(versions, key=version_order, reverse=True):
        wanted = rule.wants(version, admitted)
        if wanted or version in held:
            looked = look(version)
            entries += looked
            admitted += wanted and any(entry.ready for entry in looked)
    return entries


def _one_for_each(entries: Sequence[Entry]) -> list[Entry]:
    """A version that is served as it was before its files changed has two entries; here they are one."""
    ready = {entry.version for entry in entries if entry.ready}
    changed = {entry.version: entry.reason for entry in entries if not entry.ready and entry.version in ready}
    return [
        replace(entry, reason=f"served as it was before its files changed; now it is {changed[entry.version]}")
        if entry.version in changed
        else entry
        for entry in entries
        if entry.ready or entry.version not in changed
    ]


def _serving(live: Live, reason: str = "") -> Entry:
    return Entry(name=live.name, version=live.version, state="READY", reason=reason, live=live)


def _missing(name: str, version: str, aliases: Aliases) -> Entry:
    alias = next((alias for alias, named in aliases.items() if named == version), None)
    whose = "the setting 'versions'" if alias is None else f"the alias '{alias}' ({aliasing.FILE})"
    reason = f"not found in its folder, but {whose} names it; put it there, or name another"
    return Entry(name=name, version=version, state="UNAVAILABLE", reason=reason)


def _has_same_bytes(found: Found, live: Live) -> bool:
    try:
        _read(found, live.admitted.bundle.digests)
    except AdmissionRefused:
        return False
    return True


def _read(found: Found, tried: Digests | None) -> Bundle:
    if found.path.is_file():
        return bundles.read_plain(found.path, tried=tried)
    return bundles.read(found.path, name=found.name, version=found.version, tried=tried)


def _with_passport(there: Iterable[Found]) -> set[str]:
    """The versions that are bundles."""
    return {found.version for found in there if (found.path / bundles.PASSPORT_FILE).is_file()}


def _check_passport(bundle: Bundle, passports: Collection[str]) -> None:
    """Of one model, all versions have a passport or none: two doors are open to who has none.

    Args:
        passports: the versions that have one, served or in their folders; its own where it had one.

    Raises:
        AdmissionRefused: it has none, and another has, or it had one itself.
    """
    if bundle.passport is None and passports:
        whose = max(passports, key=version_order)
        raise AdmissionRefused(
            "digest",
            f"it has no passport ({bundles.PASSPORT_FILE}) and version {whose} of the model has one; "
            "copy all of the bundle, or serve a plain ONNX file as a model of another name",
        )


def load_bounded(found: Found, placement: Placement, settings: Settings, passports: Collection[str] = ()) -> Entry:
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
        return _load(found, placement, settings, passports, memory_bytes=int(free_memory_bytes() * SHARE))


def _load(
    found: Found,
    placement: Placement,
    settings: Settings,
    passports: Collection[str],
    *,
    memory_bytes: int | None = None,
    digests: Digests | None = None,
) -> Entry:
    """Admit a version, and make what serves it.

    Args:
        memory_bytes: the most that it may take; None: any amount.
        digests: of what it must consist; None: whatever is there.
    """
    deadline = Deadline()
    memory = nullcontext() if memory_bytes is None else bounded_memory(memory_bytes)
    try:
        with bounded_time(settings.admission_limit_s, deadline.end), memory:
            bundle = _read(found, digests)
            _check_passport(bundle, passports)
            admitted = admit(
                bundle,
                placement,
                threads=settings.threads,
                max_batch_rows=settings.max_batch_rows,
                deadline=deadline,
            )
            batching = rehearse(admitted, settings.numerics)
            rows, run_s = min(batching.run_s.items())
            sample = admitted.sample(rows)
            answer_size = measured(admitted.runtime, sample)
            deadline.lift()  # or it would pass while this serves
    except AdmissionRefused as refusal:
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=str(refusal))
    except MemoryError:
        reason = (
            "not admitted: it asks for more memory than is free; give it more, or let fewer rows run together "
            "(--max-batch-rows)"
        )
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    except Exception as error:  # a file that nobody foresaw must not keep the other models from being served
        _log.exception("admission of %s/%s broke", found.name, found.version)
        reason = f"not admitted: admission broke on it ({printable(first_line(error))}); the log has the traceback"
        return Entry(name=found.name, version=found.version, state="UNAVAILABLE", reason=reason)
    statistics = Statistics()
    coalescer = Coalescer(
        admitted.runtime,
        max_rows=batching.max_rows,
        slice_rows=batching.slice_rows,
        inline_rows=batching.inline_rows,
        max_waiting_rows=settings.max_queue_rows,
        max_waiting_bytes=held_at_most(settings.max_queue_bytes, processes=settings.workers),
        max_wait_s=settings.max_queue_s or math.inf,
        row_s=batching.row_s,
        sample=sample,
        statistics=statistics,
    )
    live = Live(
        name=found.name,
        version=found.version,
        admitted=admitted,
        batching=batching,
        coalescer=coalescer,
        canary=Canary(coalescer, sample, run_s=run_s),
        statistics=statistics,
        answer_size=answer_size,
        reader=SampleReader(admitted.signature) if admitted.signature.features is not None else None,
    )
    return Entry(name=found.name, version=found.version, state="READY", live=live)
