"""Keeps several workers in step: they serve the same models, and count together.

Rule 1: the first worker decides what is served. Every other, also one that takes a dead one's place, loads the same
    bytes before it listens; what was changed meanwhile it loads anew. Where nobody serves any more and nobody can load
    the same, the next one decides as the first did.
Rule 2: models are loaded one at a time, in two steps: all admit, then all settle on the same verdicts. One of them
    admits first and has each version tried; the others load what that one loaded. A worker that dies between the two
    steps is replaced by one that is told what was settled.
Rule 3: who asks gets the answer when all have done it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import groupby
from typing import Any, final

from service.aliases import Aliases, changed
from service.counts import Loads
from service.errors import EvalmodeError, NotReady, UnknownModel
from service.meters import process_reading
from service.policy import refusal, settled
from service.readings import Reading, joined
from service.statistics import Document
from service.turns import Turns
from service.workers.channel import Channel, Facts, Gone
from service.workers.tally import ReadingTally, Tally
from service.workers.verdicts import Verdict, joint

STATISTICS_LIMIT_S = 2.0
"""A worker that does not answer in this time counts as last heard."""


NOBODY_LEFT = "the workers died; others take their place, so send it again"


@final
class Conductor:
    """Knows what is served, and asks the workers; each is known by its channel."""

    def __init__(self, watched: Callable[[], Reading] = list) -> None:
        """
        Args:
            watched: what is known of the folder that the models come from.
        """
        self._watched = watched
        self.workers: set[Channel] = set()
        """Those that serve."""
        self._decided = asyncio.Event()
        self._verdicts: dict[str, tuple[Verdict, ...]] = {}
        """What is served, by model; empty until the first worker has decided."""
        self._aliases: dict[str, Aliases] = {}
        self._turns = Turns()
        """Also of a worker that begins to serve: what is admitted meanwhile, it would not have."""
        self._changes = 0
        self._tally = Tally()
        self._readings = ReadingTally()
        self._loads = Loads()
        self.restarts = 0
        """Workers that were replaced."""

    @property
    def decided(self) -> bool:
        """The first worker has said what is served."""
        return self._decided.is_set()

    async def decision(self) -> None:
        """Wait until the first worker has said what is served."""
        await self._decided.wait()

    async def join(self, worker: Channel, *, first: bool, **facts: object) -> Facts:
        """Have a worker load what is served, and listen.

        Args:
            first: it decides, if nobody has yet.
            facts: what and how to load.

        Returns:
            What it said when it was prepared.

        Raises:
            EvalmodeError: it cannot serve that.
            Gone: it died.
        """
        while True:
            if not first:
                await self._decided.wait()
            wanted = self._wanted()
            said: Facts = await worker.ask("prepare", verdicts=wanted[0], aliases=wanted[1], **facts)
            async with self._turns.loading, self._turns.changing:
                if wanted != self._wanted():
                    continue
                await worker.ask("listen")
                self.workers.add(worker)
                if wanted[0] is None:
                    decided = [Verdict(**verdict) for verdict in said["verdicts"]]
                    self._verdicts = _by_model(decided)
                    self._loads.begin(decided)
                    self._aliases = said["aliases"]
                    self._decided.set()
                return said

    def begin_anew(self) -> None:
        """Nobody serves, and nobody can serve what was served: the next worker that joins as the first decides."""
        self._decided.clear()
        for model in self._verdicts:
            self._forget_counts(model)
        self._verdicts, self._aliases = {}, {}

    def others_than(self, worker: Channel) -> bool:
        """Whether any other serves."""
        return bool(self.workers - {worker})

    def leave(self, worker: Channel) -> None:
        """A worker serves no more; what it counted stays counted."""
        self.workers.discard(worker)
        self._tally.end(worker)
        self._readings.end(worker)

    async def answer(self, question: str, facts: Facts) -> object:
        """What a worker asks on behalf of its client."""
        match question:
            case "load":
                await self.load(facts["model"])
                return None
            case "move_alias":
                return await self._move_alias(facts["model"], facts["alias"], facts["version"])
            case "unload":
                await self._unload(facts["model"])
                return None
            case "statistics":
                return await self._statistics()
            case "reading":
                return await self._reading()
        raise AssertionError(question)

    async def load(self, model: str, versions: Collection[str] | None = None) -> None:
        """As a `Crew` does it."""
        asked = None if versions is None else sorted(versions)
        async with self._turns.load(model):
            try:
                found = await self._admitted(model, asked)
            except EvalmodeError:
                await self._ask_all("settle", model=model, verdicts=None)
                raise
            new = joint(found)
            async with self._turns.changing:
                kept = await self._ask_all("settle", model=model, verdicts=new)
                held = self._aliases.get(model, {}).values()
                self._verdicts[model] = settled(self._verdicts.get(model, ()), new, held)
                self._forget_counts(model, set(kept[0]).intersection(*kept))
        refused = refusal(new, versions)
        if versions is None or versions:  # else one went, and nothing was looked at
            self._loads.add(model, ready=refused is None)
        if refused:
            raise refused

    async def _admitted(self, model: str, versions: Collection[str] | None) -> list[list[Verdict]]:
        """What each worker made of a model: its trial may take most of the memory that is free, so there is one."""
        for first in [*self.workers]:
            with suppress(Gone):
                decided = await first.ask("admit", model=model, versions=versions, decided=None)
                others = await self._ask_all("admit", but=first, model=model, versions=versions, decided=decided)
                return [[Verdict(**verdict) for verdict in verdicts] for verdicts in (decided, *others)]
        raise NotReady(NOBODY_LEFT)

    async def _move_alias(self, model: str, alias: str, version: str | None) -> bool:
        async with self._turns.changing:
            if not self._verdicts.get(model):
                raise UnknownModel(model=model, models=sorted(self._verdicts))
            live = [verdict.version for verdict in reversed(self._verdicts[model]) if verdict.ready]
            after = changed(self._aliases.get(model, {}), model=model, alias=alias, version=version, live=live)
            self._aliases[model] = after
            return all(await self._ask_all("take_aliases", model=model, aliases=after))

    async def _unload(self, model: str) -> None:
        async with self._turns.unload(model):
            verdicts = (await self._ask_all("unload", model=model))[0]
            self._verdicts[model] = tuple(Verdict(**verdict) for verdict in verdicts)
            self._forget_counts(model)

    async def _statistics(self) -> list[Document]:
        async def hear(worker: Channel) -> None:
            try:
                counted = await asyncio.wait_for(worker.ask("statistics"), STATISTICS_LIMIT_S)
            except (TimeoutError, Gone):
                return
            if worker in self.workers and changes == self._changes:  # else it may be of a model that is there no more
                self._tally.hear(worker, counted)

        changes = self._changes
        await asyncio.gather(*map(hear, self.workers))
        return self._tally.total()

    async def _reading(self) -> Reading:
        async def hear(worker: Channel) -> None:
            try:
                read = await asyncio.wait_for(worker.ask("reading"), STATISTICS_LIMIT_S)
            except (TimeoutError, Gone):
                return
            if worker in self.workers:
                self._readings.hear(worker, read)

        await asyncio.gather(*map(hear, self.workers))
        own: Reading = [("evalmode_worker_restarts", (), self.restarts), *process_reading()]
        return joined([self._readings.total(), self._loads.reading(), self._watched(), own])

    def _forget_counts(self, model: str, kept: Collection[str] = ()) -> None:
        self._changes += 1
        self._tally.forget(model, kept)

    async def _ask_all(self, question: str, *, but: Channel | None = None, **facts: object) -> list[Any]:
        """The answers of all who serve; one that died meanwhile has none, and is replaced.

        Args:
            but: has answered already.

        Raises:
            EvalmodeError: the first refusal, after all have answered.
            NotReady: nobody is left.
        """
        asked = [worker.ask(question, **facts) for worker in self.workers if worker is not but]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Gone):
                raise answer
        answers = [answer for answer in answers if not isinstance(answer, Gone)]
        if not answers and but is None:
            raise NotReady(NOBODY_LEFT)
        return answers

    def _wanted(self) -> tuple[list[Verdict] | None, dict[str, Aliases] | None]:
        """What a worker is to serve, and its aliases; None: it decides."""
        if not self.decided:
            return None, None
        return [verdict for name in sorted(self._verdicts) for verdict in self._verdicts[name]], {**self._aliases}


def _by_model(verdicts: Iterable[Verdict]) -> dict[str, tuple[Verdict, ...]]:
    """Those of one model stand together."""
    return {name: tuple(of_one) for name, of_one in groupby(verdicts, lambda verdict: verdict.name)}
