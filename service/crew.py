"""The processes that serve together: what a route must do or ask in all of them, it does through a `Crew`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol, final

from service import aliases
from service.counts import Loads
from service.meters import reading_of
from service.policy import refusal
from service.readings import Reading, joined
from service.repository import Repository
from service.statistics import Document, summed
from service.turns import Turns


class Crew(Protocol):
    """Every worker of this service, the one that asks included."""

    async def load(self, model: str, versions: Collection[str] | None = None) -> None:
        """Look at a model's folder again and serve what is admitted of it.

        Args:
            versions: what changed there; None: somebody asked, see `Repository.admit`.

        Raises:
            UnknownModel: nothing of that name is there.
            LoadRefused: what was asked for was not admitted; what was served before goes on.
        """
        ...

    async def move_alias(self, model: str, alias: str, version: str | None) -> bool:
        """From now on an alias of a model is this version; None: there is no such alias any more.

        Returns:
            Whether that will also hold after a restart.

        Raises:
            UnknownModel, UnknownVersion, UnknownAlias: there is no such model, live version or alias.
            BadRequest: it cannot be an alias.
        """
        ...

    async def unload(self, model: str) -> None:
        """Stop serving a model.

        Raises:
            UnknownModel: nobody knows it.
        """
        ...

    async def statistics(self) -> list[Document]:
        """What was done since the start: one entry for each live version."""
        ...

    async def reading(self) -> Reading:
        """What was counted since the start, and what is measured now."""
        ...


@final
class Alone:
    """A crew of one process."""

    def __init__(self, repository: Repository, watched: Callable[[], Reading] = list) -> None:
        """
        Args:
            watched: what is known of the folder that the models come from.
        """
        self._repository = repository
        self._watched = watched
        self._turns = Turns()
        self._loads = Loads()
        self._loads.begin(repository.entries)

    async def load(self, model: str, versions: Collection[str] | None = None) -> None:
        async with self._turns.load(model):
            entries = await asyncio.to_thread(self._repository.admit, model, versions)
            self._repository.swap(model, entries)
        refused = refusal(entries, versions)
        if versions is None or versions:  # else one went, and nothing was looked at
            self._loads.add(model, ready=refused is None)
        if refused:
            raise refused

    async def move_alias(self, model: str, alias: str, version: str | None) -> bool:
        async with self._turns.changing:
            self._repository.set_aliases(
                model,
                aliases.changed(
                    self._repository.aliases(model),
                    model=model,
                    alias=alias,
                    version=version,
                    live=self._repository.versions(model),
                ),
            )
            return await asyncio.to_thread(self._repository.keep_aliases, model)

    async def unload(self, model: str) -> None:
        async with self._turns.unload(model):
            self._repository.unload(model)

    async def statistics(self) -> list[Document]:
        lives = self._repository.lives
        return summed(live.statistics.document(name=live.name, version=live.version) for live in lives)

    async def reading(self) -> Reading:
        return joined([reading_of(self._repository), self._loads.reading(), self._watched()])
