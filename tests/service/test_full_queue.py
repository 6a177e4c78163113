"""What a caller reads where too many wait already, on a real socket, by both ways of a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from service.app import create_app
from service.coalescing import Coalescer
from service.repository import Entry, Repository, load
from service.runtime import place
from service.settings import Settings
from tests import graphs
from tests.asking import save
from tests.wire import Held, message, serving

BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [4, -2.5, 41]}]}).encode()
PATH = "/v2/models/norm/infer"


@pytest.mark.parametrize("chunks", [None, [1]], ids=["short", "asgi"])
def test_who_finds_the_queue_full_is_told_when_to_come_again(tmp_path: Path, chunks: list[int] | None) -> None:
    """429 at once, with Retry-After; nothing of it is computed, or even read, and those who wait are answered."""
    save(tmp_path, "norm", graphs.batchnorm_model())
    live = load(tmp_path, place("cpu"), Settings(threads=1)).live("norm")
    runtime = Held()
    live = replace(live, coalescer=Coalescer(runtime, max_rows=1, inline_rows=0, max_waiting_rows=1))
    entry = Entry(name="norm", version="1", state="READY", live=live)
    settings = Settings(timeout_s=0)
    app = create_app(Repository([entry], path=Path(), placement=place("cpu"), settings=settings), settings)
    ask = message(PATH, BODY, chunks=chunks)
    with serving(app) as served, served.connect() as runs, served.connect() as waits, served.connect() as late:
        runs.send_apart(ask)
        runtime.wait_until_it_runs()
        waits.send_apart(ask)
        served.until(lambda: live.coalescer.waiting_rows == 1)
        refused = late.ask(ask)
        assert late.ask(message(PATH, b"no JSON", chunks=chunks)).status == 429
        runtime.let_go.set()
        assert {runs.answer().status, waits.answer().status} == {200}
        assert (refused.status, refused.said["code"]) == (429, "queue_full")
        assert int(refused["retry-after"]) >= 1
        assert "try again in" in refused.said["error"]
    assert runtime.fake.batches == [1, 1]
    assert bool(served.by_asgi) is (chunks is not None)
