"""Whether requests should be sent here: not before a model answers, and no more when the process is about to end."""

from __future__ import annotations

import asyncio
from typing import final

from service.errors import STOPPING, NotReady
from service.repository import NO_MODEL, Repository


@final
class Readiness:
    """Of this process."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.ending = False
        """It is about to end: what comes is still answered, but should go elsewhere."""

    def end(self) -> None:
        """From now on it is about to end."""
        self.ending = True
        self._repository.stop_admitting()

    async def check(self) -> None:
        """
        Raises:
            NotReady: the process ends, there is no model, or one of them does not answer.
        """
        self._check_stays()
        if not self._repository.ready:
            raise NotReady(NO_MODEL)
        await asyncio.gather(*[live.canary.check() for live in self._repository.models])

    async def check_model(self, name: str, version: str | None) -> str:
        """The model's name.

        Raises:
            UnknownModel, UnknownVersion: there is no such model or version.
            NotReady: the process ends, or the model does not answer.
        """
        live = self._repository.live(name, version)
        self._check_stays()
        await live.canary.check()
        return live.name

    def _check_stays(self) -> None:
        if self.ending:
            raise NotReady(STOPPING)
