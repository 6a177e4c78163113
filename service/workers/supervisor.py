"""The process that starts, replaces and stops several others that serve on its one socket.

Rule 1: it never serves and never loads a model; it holds the socket, so that connections wait, not fail.
Rule 2: a worker that ends is replaced, and so is one that hangs, or whose engine does not come back, with growing
    pauses where that does not help; when none at all can be started, the supervisor says why and ends. Nobody listens
    who cannot serve all that the others do: that is tried again and again until it can, and the others go on meanwhile.
    When there are no others any more, it is decided anew what is served, from what is there, as after a restart: one
    spoiled model ends no other.
Rule 3: beside those that serve, a spare waits: so a dead one is replaced in a third of the time of a start. Another
    spare is begun when all serve again.
Rule 4: workers have sessions of their own, so a signal reaches them only through the supervisor; when that is gone,
    they see their channel end and stop.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import final

from service.errors import EvalmodeError, Refused
from service.listening import let_nobody_in
from service.places import layout_at
from service.settings import Settings
from service.stdout import say
from service.watching import Watcher
from service.workers.channel import Facts, Gone
from service.workers.conductor import Conductor
from service.workers.pauses import STEADY_S, pause_s
from service.workers.process import Process
from service.workers.spare import Spare

PING_S = 2.0
HUNG_S = 20.0
"""How often a worker is asked whether it is there, and how long its answer may take: models are loaded beside its event
loop, so it answers then too."""

STUCK_END_S = 5.0
"""What a worker whose engine is stuck may still take to answer what it has begun with."""

STARTED_S = 120.0
"""And its first answer, for which it has to start."""

HOPELESS = 3
"""Failures in a row after which the service ends, if nobody else serves."""

_log = logging.getLogger(__name__)


@final
class Supervisor:
    """Keeps as many workers as the settings say."""

    def __init__(self, path: Path, settings: Settings, listening: socket.socket) -> None:
        self._settings = settings
        self._listening = listening
        self._path = path
        self._facts = {"path": str(path), "kind": layout_at(path), "settings": settings.model_dump(mode="json")}
        self._watcher = Watcher(path, every_s=settings.reload_s, called=settings.name)
        """Here and not in the workers: what all load is the same."""
        self._conductor = Conductor(self._watcher.reading)
        self._workers: set[Process] = set()
        self._spare = Spare(self._started, self._dismissed)
        self._announced = False
        self._failures = [0] * settings.workers
        """In a row, by place."""
        self._decides = 0
        """The place of the worker that says what is served, while nobody has said it."""
        self._stop_signal = signal.SIGTERM
        """What workers are stopped with: they take their time for SIGTERM."""
        self._stop = asyncio.Event()
        """Somebody asked all to end."""
        self._stopping = False
        self._unfinished = 0
        """Workers that could not end as they were asked to, because their engine did not come back."""

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM.

        Raises:
            WrongCall, Refused: as the first worker said, or no worker can be started; or not all could end well.
        """

        def end(signum: signal.Signals) -> None:
            if not self._stop.is_set():
                self._stop_signal = signum
                self._stop.set()
            elif signum == signal.SIGINT:  # the second time: what is being answered is given up
                for worker in self._workers:
                    worker.send(signal.SIGKILL)

        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, end, signum)
        stopped = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(self._watch())
        kept = [asyncio.create_task(self._keep(place)) for place in range(self._settings.workers)]
        done, _ = await asyncio.wait([stopped, *kept], return_when=asyncio.FIRST_COMPLETED)
        tasks = [stopped, watching, *kept]
        self._stopping = self._stop.is_set()
        for task in tasks:
            task.cancel()
        await self._dismiss_spare()
        await asyncio.wait(tasks)
        await self._dismiss_spare()  # one that a place was taking when it was cancelled
        self._listening.close()
        for ended in done - {stopped}:
            ended.result()
        if self._unfinished:
            raise Refused(f"{self._unfinished} of the workers ended without finishing what they had; the log says why")

    async def _watch(self) -> None:
        await self._conductor.decision()
        await self._watcher.run(self._conductor.load)

    async def _keep(self, place: int) -> None:
        """Start a worker at this place, and another one whenever it ends.

        Raises:
            EvalmodeError: the first worker's answer is no, or none can be started.
        """
        while True:
            served_s, why = await self._one(place)
            failures = self._failures[place] = 0 if served_s > STEADY_S else self._failures[place] + 1
            its_turn = self._conductor.decided or place == self._decides
            if failures >= HOPELESS and its_turn and not served_s and not self._conductor.workers:
                raise Refused(f"no worker can be started: {failures} in a row failed, and the last one {why}")
            self._conductor.restarts += 1
            _log.log(
                logging.WARNING if served_s else logging.ERROR,
                "a worker %s; %d of %d serve, and another takes its place in %.0f s",
                why,
                len(self._conductor.workers),
                self._settings.workers,
                pause_s(failures),
            )
            await asyncio.sleep(pause_s(failures))

    def _begin_anew(self, place: int, error: EvalmodeError) -> None:
        self._decides = place
        self._failures[place] = 0
        self._conductor.begin_anew()
        _log.critical(
            "no worker serves any more, and none can serve what was served: %s; what is in '%s' now decides what is "
            "served, as after a restart: models that were unloaded are loaded again, and what is refused is not served",
            error,
            self._path,
        )

    async def _one(self, place: int) -> tuple[float, str]:
        """Run a worker to its end; how long it served, and why it ended."""
        try:
            worker = await self._taken()
        except OSError as error:  # no memory for another process, or too many of them
            return 0.0, f"cannot be started: {error.strerror}"
        serves_from_s: float | None = None
        why = ""
        watched = asyncio.create_task(self._watched(worker))
        try:
            said = await self._conductor.join(worker.channel, first=place == self._decides, **self._facts)
            serves_from_s = time.monotonic()
            worker.loading = ""
            self._complete(said["announcement"])
            why = await watched
        except Gone:
            why = await watched
        except EvalmodeError as error:
            if not self._conductor.decided and place == self._decides:
                raise
            if self._conductor.decided and not self._conductor.workers:
                self._begin_anew(place, error)
            why = f"cannot serve: {error}"
        finally:
            watched.cancel()
            self._conductor.leave(worker.channel)
            ended = await self._dismissed(worker, signal.SIGTERM if serves_from_s is None else self._stop_signal)
            if self._stopping and worker.failed:
                self._unfinished += 1
        return 0.0 if serves_from_s is None else time.monotonic() - serves_from_s, why or ended

    async def _watched(self, worker: Process) -> str:
        """Wait for the end of a worker, and end one that does not even say that it is there, or, where others
        serve, that has a model which will not answer any more; why it was ended."""
        limit_s = STARTED_S
        while not worker.ended:
            try:
                stuck: str = await asyncio.wait_for(worker.channel.ask("ping"), limit_s)
                if stuck and self._conductor.others_than(worker.channel):
                    self._conductor.leave(worker.channel)
                    worker.send(signal.SIGINT)
                    with suppress(TimeoutError):  # for what it is answering; the engine does not come back
                        await asyncio.wait_for(worker.wait(), STUCK_END_S)
                    worker.send(signal.SIGKILL)
                    return f"did not come back from a run of {stuck} that nobody waits for, and was ended"
            except TimeoutError:
                worker.send(signal.SIGKILL)
                return f"said nothing for {limit_s:.0f} s and was ended"
            except Gone:
                with suppress(TimeoutError):
                    await asyncio.wait_for(worker.wait(), HUNG_S)
                if not worker.ended:
                    worker.send(signal.SIGKILL)
                    return f"could not be asked any more, and was ended {HUNG_S:.0f} s later"
            limit_s = HUNG_S
            with suppress(TimeoutError):
                await asyncio.wait_for(worker.wait(), PING_S)
        return ""

    async def _taken(self) -> Process:
        """The spare, or where there is none that lives, a new process."""
        return await self._spare.taken() or await self._started()

    async def _dismiss_spare(self) -> None:
        if (spare := await self._spare.taken()) is not None:
            await self._dismissed(spare)

    async def _started(self) -> Process:
        worker = await Process.started(self._listening, self._answer)
        self._workers.add(worker)
        return worker

    async def _answer(self, question: str, facts: Facts) -> object:
        if question != "closing":
            return await self._conductor.answer(question, facts)
        if self._stop.is_set():  # else the others go on with the socket
            let_nobody_in(self._listening)
            self._listening.close()
        return None

    async def _dismissed(self, worker: Process, signum: signal.Signals = signal.SIGTERM) -> str:
        """Have a process end, if it has not; how it did."""
        try:
            return await worker.end(signum)
        finally:
            self._workers.discard(worker)

    def _complete(self, said: str) -> None:
        """When all serve, it is said, and there will be a spare."""
        if len(self._conductor.workers) < self._settings.workers:
            return
        self._spare.want()
        if not self._announced:
            self._announced = True
            say(said)
        else:
            _log.warning("all %d workers serve again", self._settings.workers)
