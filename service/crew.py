"""The processes that serve together: what a route must do or ask in all of them, it does through a `Crew`."""

from __future__ import annotations

import asyncio
from typing import Protocol, final

from service.errors import LoadRefused
from service.repository import Repository
from service.statistics import Document


class Crew(Protocol):
    """Every worker of this service, the one that asks included."""

    async def load(self, model: str) -> None:
        """Look at a model's folder again and serve what is admitted of it.

        Raises:
            UnknownModel: nothing of that name is there.
            LoadRefused: the newest version was not admitted; what was served before goes on.
        """
        ...

    async def unload(self, model: str) -> None:
        """Stop serving a model.

        Raises:
            UnknownModel, NotReady: it is not served.
        """
        ...

    async def statistics(self) -> list[Document]:
        """What was done since the start: one entry for each live version."""
        ...


@final
class Alone:
    """A crew of one process."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._loading = asyncio.Lock()

    async def load(self, model: str) -> None:
        async with self._loading:
            entries = await asyncio.to_thread(self._repository.admit, model)
            self._repository.swap(model, entries)
        if entries[0].live is None:
            raise LoadRefused(model=model, version=entries[0].version, reason=entries[0].reason)

    async def unload(self, model: str) -> None:
        async with self._loading:
            self._repository.unload(model)

    async def statistics(self) -> list[Document]:
        return [live.statistics.document(name=live.name, version=live.version) for live in self._repository.models]
