"""What keeps several processes in step, in one process: verdicts, counts, the channel, and the conductor over it."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, final

import pytest

from service.errors import EvalmodeError, Internal, LoadRefused, NotReady, Refused, UnknownModel, UnknownVersion
from service.policy import TORN, settled
from service.settings import Settings
from service.statistics import Document, Statistics
from service.workers import conductor as conducting
from service.workers import supervisor
from service.workers.channel import Channel, Facts, Gone, restored
from service.workers.conductor import Conductor
from service.workers.pauses import pause_s
from service.workers.process import Process
from service.workers.supervisor import Supervisor
from service.workers.tally import Tally
from service.workers.verdicts import Verdict, joint
from service.workers.worker import OneOfSeveral, Worker
from tests.asking import loaded
from tests.bundles import write_table_bundle


def ready(version: str, digest: str = "a1") -> Verdict:
    return Verdict(name="credit", version=version, state="READY", digests={"model.onnx": digest})


def refused(version: str, reason: str = "refused at the golden door") -> Verdict:
    return Verdict(name="credit", version=version, state="UNAVAILABLE", reason=reason)


@pytest.mark.parametrize(
    ("found", "together"),
    [
        pytest.param([[ready("2")], [ready("2")]], [ready("2")], id="all admit the same"),
        pytest.param(
            [[refused("3"), ready("2")], [refused("3"), ready("2")]], [refused("3"), ready("2")], id="all fall back"
        ),
        pytest.param(
            [[refused("2", "0.31 off")], [refused("2", "0.32 off")]],
            [refused("2", "0.31 off")],
            id="a figure is measured anew in each",
        ),
        pytest.param([[ready("2")], [refused("2")]], [refused("2")], id="the second refuses"),
        pytest.param([[refused("2"), ready("1")], [ready("2")]], [refused("2")], id="the first refuses"),
        pytest.param([[ready("2", "a1")], [ready("2", "b2")]], [refused("2", TORN)], id="other bytes"),
        pytest.param([[ready("2")], [ready("3")]], [refused("2", TORN)], id="another version"),
        pytest.param([[], []], [], id="nothing is left"),
        pytest.param(
            [[ready("3"), ready("2")], [refused("3"), ready("2"), ready("1")]], [refused("3")], id="one of several"
        ),
    ],
)
def test_all_end_with_the_same_verdicts(found: list[list[Verdict]], together: list[Verdict]) -> None:
    assert list(joint(found)) == together


@pytest.mark.parametrize(
    ("before", "new", "after"),
    [
        ([ready("1")], [ready("2")], [ready("2")]),
        ([ready("1")], [refused("2")], [refused("2"), ready("1")]),
        ([refused("2"), ready("1")], [refused("3")], [refused("3"), ready("1")]),
        ([], [refused("1")], [refused("1")]),
    ],
)
def test_a_refusal_leaves_what_was_served(before: list[Verdict], new: list[Verdict], after: list[Verdict]) -> None:
    assert list(settled(before, new, held=())) == after


def test_what_an_alias_names_by_now_goes_on() -> None:
    """It was moved while another version was admitted, which did not know."""
    before = [ready("3"), ready("2"), ready("1")]
    assert settled(before, [ready("4"), ready("1")], held=["1", "3"]) == (ready("4"), ready("3"), ready("1"))
    assert settled(before, [ready("4"), refused("3")], held=["3"]) == (ready("4"), refused("3"), ready("3"))


def counted(model: str, requests: int) -> Document:
    document = Statistics().document(name=model, version="1")
    document["inference_stats"]["success"]["count"] = requests
    return document


def successes(documents: Sequence[Document]) -> dict[str, int]:
    return {one["name"]: one["inference_stats"]["success"]["count"] for one in documents}


def test_totals_never_go_backwards() -> None:
    """A process ends, and its counts stay; a model that was loaded anew begins at zero."""
    tally = Tally()
    tally.hear("first", [counted("credit", 3), counted("rate", 1)])
    tally.hear("second", [counted("credit", 4), counted("rate", 0)])
    assert successes(tally.total()) == {"credit": 7, "rate": 1}
    tally.end("first")
    assert successes(tally.total()) == {"credit": 7, "rate": 1}
    tally.hear("third", [counted("credit", 1), counted("rate", 0)])
    tally.hear("second", [counted("credit", 6), counted("rate", 0)])
    assert successes(tally.total()) == {"credit": 10, "rate": 1}
    tally.forget("credit", kept=["1"])
    assert successes(tally.total()) == {"credit": 10, "rate": 1}
    tally.forget("credit", kept=["2"])
    assert successes(tally.total()) == {"rate": 1}


def test_pauses_grow_to_half_a_minute() -> None:
    assert [pause_s(failures) for failures in (0, 1, 2, 3, 4, 9, 2000)] == [0, 0, 1, 2, 4, 30, 30]


def test_an_error_is_itself_on_the_other_side() -> None:
    refusal = LoadRefused(model="credit", version="2", reason="refused at the golden door")
    arrived = restored(type(refusal).__name__, str(refusal))
    assert (type(arrived), str(arrived)) == (LoadRefused, str(refusal))
    assert (arrived.status, arrived.code) == (400, "load_refused")  # type: ignore[attr-defined]
    assert isinstance(restored("Refused", "no"), Refused)
    assert isinstance(restored("KeyboardInterrupt", "no class of ours"), Internal)


# The channel

Serve = Callable[[str, Facts], Awaitable[object]]


async def nothing(question: str, facts: Facts) -> object:
    raise AssertionError(f"nobody was to ask {question}")


async def connected(one: Serve = nothing, other: Serve = nothing) -> tuple[Channel, Channel]:
    left, right = socket.socketpair()
    return await Channel.over(left, one), await Channel.over(right, other)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scenario(), timeout=20)

    asyncio.run(limited())


def test_questions_overtake_each_other() -> None:
    """A long one does not hold up those behind it, and both ends ask."""

    async def scenario() -> None:
        released = asyncio.Event()

        async def slow_or_quick(question: str, facts: Facts) -> object:
            if question == "slow":
                await released.wait()
            return {"heard": facts["word"]}

        async def release(question: str, facts: Facts) -> object:
            released.set()
            return None

        one, other = await connected(release, slow_or_quick)
        slow = asyncio.create_task(one.ask("slow", word="a\nb"))
        assert await one.ask("quick", word="c") == {"heard": "c"}
        assert not slow.done()
        assert await other.ask("release") is None
        assert await slow == {"heard": "a\nb"}
        await one.close()
        await other.close()

    run(scenario)


def test_an_unforeseen_error_stays_in_its_log(caplog: pytest.LogCaptureFixture) -> None:
    """Its text may hold anything, so it does not travel."""

    async def scenario() -> None:
        async def breaks(question: str, facts: Facts) -> object:
            raise ValueError("a path, a secret")

        one, other = await connected(other=breaks)
        with pytest.raises(Internal) as raised:
            await one.ask("anything")
        assert "secret" not in str(raised.value)
        await one.close()
        await other.close()

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert "a path, a secret" in caplog.text


def test_who_asks_the_dead_is_told() -> None:
    """What was asked before the end, and what is asked after it."""

    async def scenario() -> None:
        async def never(question: str, facts: Facts) -> object:
            return await asyncio.Event().wait()

        one, other = await connected(other=never)
        waiting = asyncio.create_task(one.ask("something"))
        await asyncio.sleep(0)
        await other.close()
        with pytest.raises(Gone):
            await waiting
        await one.gone()
        with pytest.raises(Gone):
            await one.ask("something else")
        with pytest.raises(NotReady, match="is being stopped"):
            await OneOfSeveral(one).load("credit")
        await one.close()

    run(scenario)


# The conductor


class FakeWorker:
    """Serves one model `credit` as a real one would, and finds on its disk what a test puts there."""

    def __init__(self) -> None:
        self.served: list[Verdict] = []
        self.disk: Sequence[Verdict] | EvalmodeError = [ready("1")]
        self.aliases: dict[str, dict[str, str]] = {}
        self.requests = 0
        self.heard: list[str] = []
        self.decided: list[object] = []
        """What others had made of what this one was to admit."""
        self.at: dict[str, Callable[[], Awaitable[None]]] = {}
        """What happens before a question is answered."""

    async def enlist(self, conductor: Conductor, *, first: bool = False) -> None:
        left, right = socket.socketpair()
        self.channel = await Channel.over(left, self.answer)
        self.known_as = await Channel.over(right, conductor.answer)
        self.crew = OneOfSeveral(self.channel)
        await conductor.join(self.known_as, first=first)

    async def answer(self, question: str, facts: Facts) -> object:
        self.heard.append(question)
        await self.at.get(question, self.nothing)()
        match question:
            case "prepare":
                wanted = facts["verdicts"]
                self.served = list(self.found()) if wanted is None else [Verdict(**one) for one in wanted]
                self.aliases = facts["aliases"] or {}
                return {"verdicts": self.served, "aliases": self.aliases}
            case "admit":
                self.decided.append(facts["decided"])
                return self.found()
            case "settle":
                if facts["verdicts"] is not None:
                    self.served = list(settled(self.served, [Verdict(**one) for one in facts["verdicts"]], held=()))
                return []
            case "take_aliases":
                self.aliases = {facts["model"]: facts["aliases"]}
                return True
            case "unload":
                self.served = [refused("1", "unloaded by request")]
                return self.served
            case "statistics":
                return [counted("credit", self.requests)]
            case "reading":
                return []
        return None

    async def nothing(self) -> None:
        pass

    def found(self) -> Sequence[Verdict]:
        if isinstance(self.disk, EvalmodeError):
            raise self.disk
        return self.disk

    async def die(self) -> None:
        await self.channel.close()


async def crew_of_two() -> tuple[Conductor, FakeWorker, FakeWorker]:
    conductor, one, other = Conductor(), FakeWorker(), FakeWorker()
    joining = asyncio.create_task(other.enlist(conductor))
    await one.enlist(conductor, first=True)
    await joining
    return conductor, one, other


async def part(*workers: FakeWorker) -> None:
    for worker in workers:
        await worker.channel.close()
        await worker.known_as.close()


def test_the_first_decides_and_the_others_follow() -> None:
    """Whatever another one finds on its disk."""

    async def scenario() -> None:
        conductor, one, other = Conductor(), FakeWorker(), FakeWorker()
        other.disk = [ready("2")]
        joining = asyncio.create_task(other.enlist(conductor))
        await one.enlist(conductor, first=True)
        await joining
        assert one.served == other.served == [ready("1")]
        assert other.heard == ["prepare", "listen"]
        await part(one, other)

    run(scenario)


def test_a_load_is_done_in_all_before_it_is_answered() -> None:
    async def scenario() -> None:
        _, one, other = await crew_of_two()
        one.disk = other.disk = [ready("2")]
        await one.crew.load("credit")
        assert one.served == other.served == [ready("2")]
        await other.crew.unload("credit")
        assert one.served == other.served == [refused("1", "unloaded by request")]
        await part(one, other)

    run(scenario)


def test_a_version_is_tried_in_one_worker() -> None:
    """The others hear what came of it, with the digests of the files."""

    async def scenario() -> None:
        _, one, other = await crew_of_two()
        one.disk = other.disk = [refused("3"), ready("2")]
        with pytest.raises(LoadRefused):
            await one.crew.load("credit")
        told = [[asdict(refused("3")), asdict(ready("2"))]]
        assert sorted([one.decided, other.decided], key=lambda decided: decided != [None]) == [[None], told]
        await part(one, other)

    run(scenario)


def test_an_alias_moves_in_all_and_who_joins_knows_it() -> None:
    """Only to a version that is live; nobody is told of what is refused."""

    async def scenario() -> None:
        conductor, one, other = await crew_of_two()
        assert await other.crew.move_alias("credit", "stable", "1")
        assert one.aliases == other.aliases == {"credit": {"stable": "1"}}
        with pytest.raises(UnknownVersion, match="no live version '2'; version '1' is served"):
            await one.crew.move_alias("credit", "stable", "2")
        with pytest.raises(UnknownModel):
            await one.crew.move_alias("nobody", "stable", "1")
        third = FakeWorker()
        await third.enlist(conductor)
        assert third.aliases == {"credit": {"stable": "1"}}
        await one.crew.move_alias("credit", "stable", None)
        assert one.aliases == other.aliases == third.aliases == {"credit": {}}
        await part(one, other, third)

    run(scenario)


@pytest.mark.parametrize("asked", [0, 1])
def test_if_one_refuses_none_loads(asked: int) -> None:
    """Whichever was asked: the caller hears the refusal, and all hold it against the version."""

    async def scenario() -> None:
        _, one, other = await crew_of_two()
        one.disk, other.disk = [ready("2")], [refused("2")]
        with pytest.raises(LoadRefused, match="version 2 of model 'credit' was refused at the golden door"):
            await (one, other)[asked].crew.load("credit")
        assert one.served == other.served == [refused("2"), ready("1")]
        counted = await one.crew.reading()
        for result in ("admitted", "refused"):  # the first at the start
            assert ["evalmode_loads", ["credit", result], 1] in json.loads(json.dumps(counted))
        await part(one, other)

    run(scenario)


def test_an_error_in_one_changes_none() -> None:
    """It was no verdict, so it is nobody's; and what the other had admitted is forgotten."""

    async def scenario() -> None:
        _, one, other = await crew_of_two()
        one.disk, other.disk = [ready("2")], UnknownModel(model="credit", models=())
        with pytest.raises(UnknownModel, match="no model 'credit'"):
            await one.crew.load("credit")
        assert one.served == other.served == [ready("1")]
        assert one.heard[-1] == "settle"
        await part(one, other)

    run(scenario)


@pytest.mark.parametrize("question", ["admit", "settle"])
def test_a_worker_that_dies_half_way_harms_nobody(question: str) -> None:
    """The others finish, the caller has its answer, and who comes in its place serves the new."""

    async def scenario() -> None:
        conductor, one, other = await crew_of_two()
        one.disk = other.disk = [ready("2")]
        other.at[question] = other.die
        await one.crew.load("credit")
        assert one.served == [ready("2")]
        conductor.leave(other.known_as)
        third = FakeWorker()
        await third.enlist(conductor)
        assert third.served == [ready("2")]
        await part(one, other, third)

    run(scenario)


def test_what_a_worker_admits_is_being_loaded_until_all_have_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what it admitted, on the refusal of another one, or on nothing."""
    write_table_bundle(tmp_path, name="credit")
    with socket.socket() as listening:
        worker = Worker(listening)
        monkeypatch.setattr(worker, "_begin", lambda _: None)
        worker._repository = repository = loaded(tmp_path)
        write_table_bundle(tmp_path, name="credit", version="2")
        for verdicts in (None, [asdict(refused("2"))], [asdict(ready("2"))]):
            worker._admit("credit", None, None)
            assert repository.loading == {("credit", "2")}
            worker._settle("credit", verdicts)
            assert repository.loading == set()
        assert repository.only().version == "2"


def test_changes_take_turns() -> None:
    """Two callers load at the same time, in two workers: no step of one falls between the steps of the other."""

    async def scenario() -> None:
        _, one, other = await crew_of_two()
        one.disk = other.disk = [ready("2")]
        await asyncio.gather(one.crew.load("credit"), other.crew.load("credit"), one.crew.unload("credit"))
        for worker in (one, other):
            steps = " ".join(worker.heard[2:])
            assert steps.count("admit settle") == 2
            assert steps.count("unload") == 1
        assert one.served == other.served
        await part(one, other)

    run(scenario)


def test_an_alias_does_not_wait_for_an_admission() -> None:
    """Of its own model or another: a way back is needed when something is wrong. An unload waits for its own."""

    async def scenario() -> None:
        _, one, other = await crew_of_two()
        admitting, done = asyncio.Event(), asyncio.Event()

        async def long() -> None:
            admitting.set()
            await done.wait()

        one.disk = other.disk = [ready("2")]
        one.at["admit"] = other.at["admit"] = long
        loading = asyncio.create_task(one.crew.load("credit"))
        await admitting.wait()
        assert await other.crew.move_alias("credit", "stable", "1")
        assert one.aliases == other.aliases == {"credit": {"stable": "1"}}
        await other.crew.unload("rate")
        unloading = asyncio.create_task(other.crew.unload("credit"))
        await asyncio.sleep(0.05)
        assert not unloading.done()
        done.set()
        await loading
        await unloading
        assert other.heard.index("settle") < len(other.heard) - 1 - other.heard[::-1].index("unload")
        await part(one, other)

    run(scenario)


def test_when_nobody_can_serve_what_was_served_the_next_decides() -> None:
    """One does, and who had begun to follow what was decided before follows that."""

    async def scenario() -> None:
        conductor, one, other = await crew_of_two()
        await one.crew.move_alias("credit", "stable", "1")
        for worker in (one, other):
            await worker.die()
            conductor.leave(worker.known_as)
        third, fourth = FakeWorker(), FakeWorker()
        third.disk, fourth.disk = [ready("2")], [ready("3")]
        begun = asyncio.Event()

        async def hold() -> None:
            fourth.at.clear()
            await begun.wait()

        fourth.at["prepare"] = hold
        following = asyncio.create_task(fourth.enlist(conductor, first=True))
        await asyncio.sleep(0.05)
        conductor.begin_anew()
        await third.enlist(conductor, first=True)
        begun.set()
        await following
        assert third.served == fourth.served == [ready("2")]
        assert third.aliases == fourth.aliases == {}
        assert fourth.heard == ["prepare", "prepare", "listen"]
        await part(one, other, third, fourth)

    run(scenario)


def test_what_was_changed_while_a_worker_prepared_it_prepares_anew() -> None:
    """An unloaded model does not come back with the one that takes a dead worker's place."""

    async def scenario() -> None:
        conductor, one, other = await crew_of_two()
        third = FakeWorker()

        async def meanwhile() -> None:
            del third.at["prepare"]
            await one.crew.unload("credit")

        third.at["prepare"] = meanwhile
        await third.enlist(conductor)
        assert third.heard == ["prepare", "prepare", "listen"]
        assert third.served == one.served == [refused("1", "unloaded by request")]
        await part(one, other, third)

    run(scenario)


def test_all_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs counts as last heard, one that is gone too, and a load begins at zero."""
    monkeypatch.setattr(conducting, "STATISTICS_LIMIT_S", 0.05)

    async def scenario() -> None:
        async def hang() -> None:
            await asyncio.Event().wait()

        async def total() -> int:
            return successes(await one.crew.statistics())["credit"]

        conductor, one, other = await crew_of_two()
        one.requests, other.requests = 3, 4
        assert await total() == 7
        other.at["statistics"] = hang
        one.requests, other.requests = 5, 9
        assert await total() == 9
        await other.die()
        conductor.leave(other.known_as)
        assert await total() == 9
        await one.crew.load("credit")
        one.requests = 1
        assert await total() == 1
        await part(one, other)

    run(scenario)


def test_with_nobody_left_the_caller_is_told() -> None:
    async def scenario() -> None:
        conductor, one, other = await crew_of_two()
        for worker in (one, other):
            worker.at["admit"] = worker.die
        with pytest.raises(NotReady):
            await conductor.answer("load", {"model": "credit"})
        await part(one, other)

    run(scenario)


def test_the_first_may_not_be_able() -> None:
    """Its refusal is the service's."""

    async def scenario() -> None:
        conductor, one = Conductor(), FakeWorker()
        one.disk = Refused("no model was admitted")
        with pytest.raises(Refused, match="no model was admitted"):
            await one.enlist(conductor, first=True)
        assert not conductor.decided
        await part(one)

    run(scenario)


@final
class Stopped:
    """A worker's process that says nothing, and whose channel may be gone."""

    def __init__(self, *, gone: bool) -> None:
        self._gone = gone
        self.channel = self
        self.ended = False
        self.signals: list[signal.Signals] = []

    async def ask(self, _: str) -> None:
        if self._gone:
            raise Gone
        await self.wait()

    async def wait(self) -> None:
        await asyncio.Event().wait()

    def send(self, signum: signal.Signals) -> None:
        self.signals.append(signum)


@final
class Late:
    """A spare's process."""

    def __init__(self) -> None:
        self.ended = False

    async def end(self, signum: signal.Signals) -> str:
        self.ended = True
        return f"ended with {signum.name}"


def test_a_spare_that_is_being_taken_at_the_end_is_dismissed(tmp_path: Path) -> None:
    """Nobody has it then: a place was to have it, and is given up while it still starts."""

    async def scenario() -> None:
        with socket.socket() as listening:
            supervisor = Supervisor(tmp_path, Settings(workers=1), listening)
            starting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            supervisor._spare._started = starting
            running = asyncio.create_task(supervisor.run())
            await asyncio.sleep(0.05)
            assert supervisor._spare._started is None
            supervisor._stop.set()
            await asyncio.sleep(0.05)
            spare = Late()
            starting.set_result(spare)
            await asyncio.wait_for(running, 5)
            assert spare.ended

    run(scenario)


@pytest.mark.parametrize(("gone", "why"), [(False, "said nothing for"), (True, "could not be asked any more")])
def test_a_worker_that_hangs_is_ended_also_while_it_starts(
    monkeypatch: pytest.MonkeyPatch, gone: bool, why: str
) -> None:
    """Nobody waits for it for ever, above all not while what is served is changing."""
    monkeypatch.setattr(supervisor, "STARTED_S", 0.05)
    monkeypatch.setattr(supervisor, "HUNG_S", 0.05)

    async def scenario() -> None:
        with socket.socket() as listening:
            watching: Any = Supervisor(Path(), Settings(), listening)
            worker = Stopped(gone=gone)
            assert why in await asyncio.wait_for(watching._watched(worker), 5)
            assert worker.signals == [signal.SIGKILL]

    run(scenario)


class StuckWorker:
    """Says that its engine does not come back, and ends when it is killed, or has said so three times."""

    def __init__(self) -> None:
        self.channel = self
        self.sent: list[signal.Signals] = []
        self._left = 3

    @property
    def ended(self) -> bool:
        return not self._left or signal.SIGKILL in self.sent

    async def ask(self, question: str) -> str:
        assert question == "ping"
        self._left -= 1
        return "version 1 of model 'm'"

    def send(self, signum: signal.Signals) -> None:
        self.sent.append(signum)

    async def wait(self) -> str:
        await asyncio.sleep(0 if self.ended else 60)
        return ""


@pytest.mark.parametrize("others", [True, False])
def test_a_stuck_worker_is_ended_only_while_another_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: bool
) -> None:
    """Alone it still answers for all other models."""
    monkeypatch.setattr(supervisor, "PING_S", 0.01)
    monkeypatch.setattr(supervisor, "STUCK_END_S", 0.01)

    async def scenario() -> tuple[str, list[signal.Signals]]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            one = Supervisor(tmp_path, Settings(workers=2), listening)
            stuck = StuckWorker()
            one._conductor.workers.add(cast("Channel", stuck))
            if others:
                one._conductor.workers.add(cast("Channel", StuckWorker()))
            return await one._watched(cast("Process", stuck)), stuck.sent

    why, sent = asyncio.run(scenario())
    if others:
        assert sent == [signal.SIGINT, signal.SIGKILL]
        assert why == "did not come back from a run of version 1 of model 'm' that nobody waits for, and was ended"
    else:
        assert (why, sent) == ("", [])
