"""One of several processes that serve, under a supervisor.

Rule 1: it does what the supervisor asks, in this order: `prepare`, `listen`; from then on `admit` and `settle`,
    `take_aliases`, `unload`, `statistics`, `reading`, `ping`. It serves nothing before `listen`, so whoever answers is
    ready.
Rule 2: `admit` changes nothing that is served; `settle` cannot fail. So several workers can do both or neither. What
    another has admitted is not tried again, and nothing else is loaded.
Rule 3: when the supervisor is gone, it stops.
Rule 4: the supervisor knows what is being loaded before it is: a model may end the process, which then says nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from service import logs
from service.aliases import Aliases
from service.app import create_app
from service.errors import STOPPING, NotReady, Refused
from service.http_server import SHARED_TAKES_AT_ONCE, Server
from service.loading import loaded, placed
from service.meters import reading_of
from service.places import Found, Layout
from service.printed import announcement
from service.readings import Reading
from service.repository import Entry, Repository, load_these
from service.settings import Settings
from service.statistics import Document
from service.tls import tls_of
from service.trial import Tried
from service.workers.channel import Channel, Facts, Gone
from service.workers.verdicts import Verdict

STUCK_S = 30.0
"""A run that nobody waits for is ended between two operators; one that goes on for so long will not come back."""

CLOSING_LIMIT_S = 1.0
"""A supervisor that says nothing for so long is not waited for."""

ORPHAN_LIMIT_S = 5.0
"""What is being answered when the supervisor is found gone may still take this long."""


@final
class Worker:
    """One of several."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._candidates: dict[str, tuple[Entry, ...]] = {}
        self._stuck: Callable[[], str] = lambda: ""
        """The model whose engine does not come back; empty: none."""

    async def work(self, connected: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._supervisor = await Channel.over(connected, self._answer)
        async with asyncio.TaskGroup() as self._tasks:  # ends the process if serving fails
            self._tasks.create_task(self._stop_when_orphaned())

    async def _stop_when_orphaned(self) -> None:
        await self._supervisor.gone()
        asyncio.get_running_loop().call_later(ORPHAN_LIMIT_S, os._exit, 1)
        signal.raise_signal(signal.SIGINT)  # to uvicorn, which drains and ends the process; without it, the end
        await asyncio.Event().wait()

    async def _answer(self, question: str, facts: Facts) -> object:
        match question:
            case "prepare":
                return await self._prepare(Path(facts["path"]), Settings(**facts["settings"]), facts)
            case "listen":
                await self._listen()
                return None
            case "admit":
                return await asyncio.to_thread(self._admit, facts["model"], facts["versions"], facts["decided"])
            case "settle":
                return self._settle(facts["model"], facts["verdicts"])
            case "take_aliases":
                self._repository.set_aliases(facts["model"], facts["aliases"])
                return await asyncio.to_thread(self._repository.keep_aliases, facts["model"])
            case "unload":
                self._repository.unload(facts["model"])
                return _verdicts(entry for entry in self._repository.entries if entry.name == facts["model"])
            case "statistics":
                return self._statistics()
            case "ping":
                return self._stuck()
            case "reading":
                return reading_of(self._repository)
        raise AssertionError(question)

    async def _prepare(self, path: Path, settings: Settings, facts: Facts) -> Facts:
        """Load what the others serve, or, as the first, what is to be served."""
        logs.begin(settings.log_level, settings.log_format, text=logs.TEXT_OF_SEVERAL)
        self._settings = settings
        verdicts = facts["verdicts"]
        if verdicts is None:
            self._repository = await asyncio.to_thread(loaded, path, settings, self._begin, facts["kind"])
            verdicts = await asyncio.to_thread(_verdicts, self._repository.entries)
        else:
            wanted = [Verdict(**verdict) for verdict in verdicts]
            self._repository = await asyncio.to_thread(
                _loaded_as, path, facts["kind"], settings, wanted, facts["aliases"], self._begin
            )
        host, port = self._listening.getsockname()[:2]
        said = announcement(self._repository, host, port, settings)
        return {"verdicts": verdicts, "aliases": self._repository.all_aliases, "announcement": said}

    def _begin(self, what: object) -> None:
        """Tell the supervisor what is loaded next; called in a thread, and it knows when this returns."""
        with suppress(Gone):
            asyncio.run_coroutine_threadsafe(self._supervisor.ask("begin", what=str(what)), self._loop).result()

    async def _listen(self) -> None:
        listens = asyncio.Event()
        self._stuck = lambda: _stuck(self._repository)
        crew = OneOfSeveral(self._supervisor)
        app = create_app(self._repository, self._settings, crew)
        server = Server(
            app,
            listens.set,
            shutdown_delay_s=self._settings.shutdown_delay_s,
            max_connections=self._settings.max_connections,
            takes_at_once=SHARED_TAKES_AT_ONCE,
            when_closing=self._close,
            tls=tls_of(self._settings),
        )
        serving = self._tasks.create_task(server.serve(sockets=[self._listening]))
        listening = asyncio.create_task(listens.wait())
        await asyncio.wait([serving, listening], return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            listening.cancel()
            raise Refused("the server ended before it listened; the log says why")

    async def _close(self) -> None:
        """The supervisor knows whether all end, or this one alone."""
        with suppress(Gone, TimeoutError):
            await asyncio.wait_for(self._supervisor.ask("closing"), CLOSING_LIMIT_S)

    def _admit(self, model: str, versions: Collection[str] | None, decided: Sequence[Facts] | None) -> list[Verdict]:
        """May take long, so it is called in a thread; the supervisor has one model admitted at a time."""
        known = None if decided is None else _tried([Verdict(**verdict) for verdict in decided])
        self._begin(f"model '{model}'")
        try:
            self._candidates[model] = self._repository.admit(model, versions, known)
        finally:
            self._begin("")
        return _verdicts(self._candidates[model])

    def _settle(self, model: str, verdicts: Sequence[Facts] | None) -> list[str]:
        """Serve what all agreed on, or, where that is nothing, forget what was admitted; which versions go on."""
        candidates = {entry.version: entry for entry in self._candidates.pop(model, ()) if entry.ready}
        if verdicts is None:
            self._repository.give_up(model)
            return []
        agreed = [Verdict(**verdict) for verdict in verdicts]
        return self._repository.swap(
            model, tuple(candidates[it.version] if it.ready else _refused(it) for it in agreed)
        )

    def _statistics(self) -> list[Document]:
        return [live.statistics.document(name=live.name, version=live.version) for live in self._repository.lives]


@final
class OneOfSeveral:
    """A crew of several processes: what one is asked, the supervisor asks all."""

    def __init__(self, supervisor: Channel) -> None:
        self._supervisor = supervisor

    async def load(self, model: str, versions: Collection[str] | None = None) -> None:
        assert versions is None  # the supervisor alone watches the folder
        await self._ask("load", model=model)

    async def move_alias(self, model: str, alias: str, version: str | None) -> bool:
        kept: bool = await self._ask("move_alias", model=model, alias=alias, version=version)
        return kept

    async def unload(self, model: str) -> None:
        await self._ask("unload", model=model)

    async def statistics(self) -> list[Document]:
        counted: list[Document] = await self._ask("statistics")
        return counted

    async def reading(self) -> Reading:
        read: Reading = await self._ask("reading")
        return read

    async def _ask(self, question: str, **facts: object) -> Any:
        try:
            return await self._supervisor.ask(question, **facts)
        except Gone as gone:
            raise NotReady(STOPPING) from gone


def _stuck(repository: Repository) -> str:
    stuck = (live for live in repository.answering if live.coalescer.unwanted_s > STUCK_S)
    return next((f"version {live.version} of model '{live.name}'" for live in stuck), "")


def _loaded_as(
    path: Path,
    kind: Layout | None,
    settings: Settings,
    verdicts: Sequence[Verdict],
    aliases: Mapping[str, Aliases],
    begin: Callable[[Found], None],
) -> Repository:
    """What other processes serve, and nothing else, whatever lies beside it by now.

    Raises:
        Refused: it is not there any more.
    """
    placement = placed(settings)
    wanted = {(verdict.name, verdict.version) for verdict in verdicts if verdict.ready}
    found = (
        {(entry.name, entry.version): entry for entry in load_these(path, placement, settings, wanted, begin, kind)}
        if wanted
        else {}
    )
    for verdict in verdicts:
        entry = found.get((verdict.name, verdict.version))
        if verdict.ready and entry is None:
            raise Refused(
                f"version {verdict.version} of model '{verdict.name}' is gone from '{path}', and the other workers "
                "serve it; put it back, or unload the model"
            )
        if verdict.ready and entry is not None and _verdict(entry).digests != verdict.digests:
            raise Refused(
                f"version {verdict.version} of model '{verdict.name}' under '{path}' is not what the other workers "
                "serve: its files were changed since; load it, or put back what was there"
            )
    entries = [found[(it.name, it.version)] if it.ready else _refused(it) for it in verdicts]
    return Repository(entries, path=path, placement=placement, settings=settings, aliases=aliases, kind=kind)


def _tried(verdicts: Sequence[Verdict]) -> dict[str, Tried]:
    """What another worker made of a model, by version: one that goes on although its files were refused is refused."""
    ready = {it.version: Tried(digests=it.digests) for it in verdicts if it.ready}
    return ready | {it.version: Tried(reason=it.reason) for it in verdicts if not it.ready}


def _refused(verdict: Verdict) -> Entry:
    return Entry(name=verdict.name, version=verdict.version, state="UNAVAILABLE", reason=verdict.reason)


def _verdict(entry: Entry) -> Verdict:
    digests = {} if entry.live is None else entry.live.admitted.bundle.digests
    return Verdict(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason, digests=digests)


def _verdicts(entries: Iterable[Entry]) -> list[Verdict]:
    return [_verdict(entry) for entry in entries]
