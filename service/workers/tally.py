"""Counts of processes that come and go, so that no total goes backwards.

A process that ends takes its counts with it; what it was last heard to have counted stays in the total. What it counted
after that is lost.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from service.readings import Reading, joined, lasting
from service.statistics import Document, summed


@final
class Tally:
    """What was last heard of each process, and of those that are gone."""

    def __init__(self) -> None:
        self._heard: dict[object, list[Document]] = {}
        self._gone: list[Document] = []

    def hear(self, process: object, documents: list[Document]) -> None:
        self._heard[process] = documents

    def end(self, process: object) -> None:
        """It will not be heard again; what it said stays."""
        self._gone = summed([*self._gone, *self._heard.pop(process, [])])

    def forget(self, model: str, kept: Collection[str] = ()) -> None:
        """It was loaded anew or unloaded: its counts begin at zero, but for the versions that go on as they were."""

        def stays(one: Document) -> bool:
            return one["name"] != model or one["version"] in kept

        self._gone = list(filter(stays, self._gone))
        self._heard = {process: list(filter(stays, documents)) for process, documents in self._heard.items()}

    def total(self) -> list[Document]:
        return summed([*self._gone, *(one for documents in self._heard.values() for one in documents)])


@final
class ReadingTally:
    """The same for readings, of which nothing is forgotten but what was measured in a process that is gone."""

    def __init__(self) -> None:
        self._heard: dict[object, Reading] = {}
        self._gone: Reading = []

    def hear(self, process: object, reading: Reading) -> None:
        self._heard[process] = reading

    def end(self, process: object) -> None:
        """It will not be heard again; what it counted stays."""
        self._gone = joined([self._gone, lasting(self._heard.pop(process, []))])

    def total(self) -> Reading:
        return joined([self._gone, *self._heard.values()])
