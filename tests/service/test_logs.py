"""The log as lines of JSON, who writes it, and which requests are in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.access_log import AccessLog, AccessLogChoice
from service.counts import Counts
from service.headers import Headers
from service.logs import SELDOM_S, JsonLines, Seldom, Writer
from service.repository import Repository
from service.settings import Settings
from service.watch import Ended, Watch
from tests.asking import loaded, talk
from tests.bundles import SAMPLE, write_table_bundle


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("service.x", logging.WARNING, "", 0, message, args, None)
    made.fields = fields
    made.created = 1_700_000_000.1234
    return made


def test_a_record_is_one_line_of_json() -> None:
    line = JsonLines().format(record("two\nlines of %s", "text", status=200, model="credit"))
    assert "\n" not in line
    said = json.loads(line)
    assert said.pop("process") == os.getpid()
    assert said == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "warning",
        "logger": "service.x",
        "message": "two\nlines of text",
        "status": 200,
        "model": "credit",
    }


def test_a_traceback_is_a_field() -> None:
    try:
        raise ValueError("what was wrong")
    except ValueError as error:
        broken = logging.LogRecord("x", logging.ERROR, "", 0, "it broke", (), (ValueError, error, error.__traceback__))
    said = json.loads(JsonLines().format(broken))
    assert said["message"] == "it broke"
    assert said["exception"].endswith("ValueError: what was wrong")


@pytest.mark.parametrize("text", ["half of a pair \ud800", "\x00\x1b[31m", "ünïcode"])
def test_any_text_can_be_logged(text: str) -> None:
    assert json.loads(JsonLines().format(record(text, number=2**70)))["number"] in (2**70, str(2**70))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(end)


def until(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to be in time")


def test_what_is_logged_is_written(pipe: tuple[int, int]) -> None:
    writer = Writer(pipe[1])
    writer.emit(record("one"))
    writer.emit(record("two"))
    writer.flush()
    assert os.read(pipe[0], 100) == b"one\ntwo\n"


def test_what_a_library_says_again_and_again_is_said_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers in it; another trouble is not lost, and what the service says is always said."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    seldom = Seldom("opentelemetry")

    def is_said(logger: str, trouble: int) -> bool:
        message, arguments = [("refused, again in %.2f s", (now_s,)), ("status %s: unauthorised", (401,))][trouble]
        return bool(seldom.filter(logging.LogRecord(logger, logging.ERROR, "export.py", 1, message, arguments, None)))

    exporter = "opentelemetry.exporter.otlp"
    assert [is_said(exporter, 0), is_said(exporter, 0), is_said(exporter, 1)] == [True, False, True]
    assert [is_said("service.tracing", 1), is_said("service.tracing", 1)] == [True, True]
    now_s += SELDOM_S - 1
    assert not is_said(exporter, 0)
    now_s += 2
    assert [is_said(exporter, 0), is_said(exporter, 0)] == [True, False]


def test_the_same_words_about_another_trouble_are_said() -> None:
    """What came of something at another address is the same; another cause is not."""
    seldom = Seldom("asyncio")

    def is_said(address: int, cause: Exception) -> bool:
        failed = (type(cause), cause, None)
        return seldom.filter(
            logging.LogRecord("asyncio", logging.ERROR, "base.py", 1, "Exception in f at %#x", (address,), failed)
        )

    assert [is_said(0xAF, KeyError("a")), is_said(0xBE2, KeyError("a"))] == [True, False]
    assert [is_said(0xAF, KeyError("b")), is_said(0xAF, OSError("b"))] == [True, True]


def test_a_destination_that_is_closed_costs_lines_and_nothing_else(pipe: tuple[int, int]) -> None:
    """Nobody reads any more; who logs does not notice, and the lines are counted."""
    writer = Writer(pipe[1])
    os.close(pipe[0])
    writer.emit(record("one"))
    writer.emit(record("two"))
    writer.flush()
    assert writer.lost == 2


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = os.open("/dev/full", os.O_WRONLY)
    writer = Writer(full)
    writer.emit(record("one"))
    writer.flush()
    assert writer.lost == 1
    os.close(full)


def test_who_logs_does_not_wait_for_who_reads(pipe: tuple[int, int]) -> None:
    """The pipe is full: so many records wait, the rest is given up; when it is read again, the log says so."""
    writer = Writer(pipe[1], most_waiting=3)
    writer.emit(record("x" * 200_000))  # more than a pipe holds
    until(lambda: writer._waiting.empty())
    for i in range(5):
        writer.emit(record("%d", i))
    assert writer.lost == 2
    got = b""
    while not got.endswith(b"2\n"):
        got += os.read(pipe[0], 65536)
    assert got.endswith(b"x\n2 lines were lost\n0\n1\n2\n")


# The access log


def ended(status: int, route: str = "/predict") -> Ended:
    return Ended(request_id="r-1", method="POST", route=route, status=status, began_ns=0, ended_ns=2_500_000, trace={})


@pytest.mark.parametrize(
    ("choice", "lines"),
    [("all", 8), ("sampled", 6), ("errors", 4)],
)
def test_so_many_lines_a_second(choice: AccessLogChoice, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    """Two answers, two errors of callers and two of the service are written, the third of each is counted; the next
    second begins anew."""

    async def scenario() -> None:
        counts = Counts()
        access = AccessLog(choice, counts, lines_s=2)

        def wanted_of(status: int) -> bool:
            if status != 200:
                return access.wants(status, "/predict", {})
            answered = counts.of("m", "1").answered
            answered["/predict"] = answered.get("/predict", 0) + 1
            return access.wants_answer({})

        def second() -> int:
            wanted = [status for status in (200, 200, 200, 429, 401, 401, 500, 500) if wanted_of(status)]
            for status in wanted:
                access.tell(ended(status))
            return len(wanted)

        assert second() == lines
        access.close()
        assert second() == lines
        access.close()

    with caplog.at_level(logging.INFO, "service.access_log"):
        asyncio.run(scenario())
    summaries = [said.fields["unwritten"] for said in caplog.records if "unwritten" in vars(said)["fields"]]  # type: ignore[attr-defined]
    assert (
        summaries
        == {
            "all": [],
            "sampled": [{"200": 1, "401": 1}] * 2,
            "errors": [{"401": 1}] * 2,
        }[choice]
    )


def test_the_second_ends_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        access = AccessLog("sampled", Counts(), lines_s=1)
        awake = asyncio.Event()
        access.wakes(awake.set)
        assert access.wants(200, "/v2", {})
        assert not access.wants(200, "/v2", {})
        await asyncio.wait_for(awake.wait(), timeout=10)
        assert access.wants(200, "/v2", {})
        access.close()

    with caplog.at_level(logging.INFO, "service.access_log"):
        asyncio.run(scenario())
    assert [said.getMessage() for said in caplog.records] == ["1 more requests, by status: 200: 1"]


def test_probes_are_not_told_of_unless_they_fail() -> None:
    async def scenario() -> None:
        access = AccessLog("sampled", Counts())
        for route in ("/v2/health/ready", "/v2/health/live", "/metrics"):
            assert not access.wants(200, route, {})
            assert access.wants(503, route, {})
        access.close()

    asyncio.run(scenario())


class Sleepy:
    """Wants to hear of one answer, then sleeps until it is woken."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = 1

    @property
    def hears(self) -> bool:
        return self.left > 0

    def wants(self, status: int, route: str, headers: Headers) -> bool:
        return False

    def wants_answer(self, headers: Headers) -> bool:
        self.asked += 1
        self.left -= 1
        return True

    def wakes(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def tell(self, ended: Ended) -> None:
        pass

    def close(self) -> None:
        pass


def test_who_sleeps_is_not_asked() -> None:
    """So that an answered prediction costs one look while nobody wants to hear of it."""
    sleepy = Sleepy()
    watch = Watch(Counts(), sleepy)
    assert watch.wanting_answer({})
    assert not watch.hearing
    sleepy.left = 1
    sleepy.wake()
    assert watch.hearing
    assert watch.wanting_answer({})
    assert sleepy.asked == 2


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    return loaded(models)


def test_a_line_for_each_request(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """What was asked and what came of it; no header, no body, no path that a caller made up."""
    secret = "hunter2"
    trace_id = "0af7651916cd43dd8448eb211c80319c"

    async def scenario(client: httpx.AsyncClient) -> None:
        headers = {
            "x-request-id": "abc-1",
            "authorization": secret,
            "cookie": secret,
            "traceparent": f"00-{trace_id}-b7ad6b7169203331-01",
        }
        await client.post("/predict", json=SAMPLE, headers=headers)
        await client.post("/predict", json={**SAMPLE, secret: secret}, headers=headers)
        await client.get(f"/{secret}?{secret}={secret}", headers=headers)

    with caplog.at_level(logging.INFO, "service.access_log"):
        talk(repository, scenario, Settings(access_log="all"))
    own = [each for each in caplog.records if each.name == "service.access_log"]
    said: list[dict[str, Any]] = [json.loads(JsonLines().format(each)) for each in own]
    answered, refused, nowhere = said
    assert {
        "request_id": "abc-1",
        "method": "POST",
        "route": "/predict",
        "model": "credit",
        "version": "1",
        "status": 200,
        "rows": 1,
        "client": "127.0.0.1",
        "trace_id": trace_id,
    }.items() <= answered.items()
    assert 0 <= answered["queue_ms"] + answered["compute_ms"] <= answered["duration_ms"]
    assert {"status": 400, "code": "unknown_feature", "model": "credit"}.items() <= refused.items()
    assert {"status": 404, "code": "not_found", "route": "other"}.items() <= nowhere.items()
    assert secret not in json.dumps(said)
