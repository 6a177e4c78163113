"""What is large is read and written beside the event loop; whatever breaks, the client gets one answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from service import prediction
from service.bodies import Bodies
from service.prediction import Predictions, route_of
from service.protocol.elements import to_json
from service.repository import Repository, load
from service.runtime import place
from service.settings import Settings
from service.statistics import Statistics
from tests import graphs
from tests.asking import save

SMALL = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [4, -2.5, 41]}]}).encode()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder: Path = tmp_path_factory.mktemp("models")
    save(folder, "norm", graphs.batchnorm_model())
    return load(folder, place("cpu"), Settings(threads=1))


def answers(repository: Repository, body: bytes, bodies: Bodies | None = None) -> list[tuple[int, Any]]:
    """Every answer to one request."""
    told: list[tuple[int, Any]] = []

    async def scenario() -> None:
        answered = asyncio.Event()

        def reply(status: int, _: object, content: bytes) -> None:
            told.append((status, orjson.loads(content)))
            answered.set()

        route = route_of("/v2/models/norm/infer")
        assert route is not None
        Predictions(repository, timeout_s=None, bodies=bodies).answer(route, {}, body, reply)
        await asyncio.wait_for(answered.wait(), timeout=10)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    return told


@pytest.mark.parametrize("large", [False, True])
def test_the_thread_of_a_prediction_is_for_what_is_large(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Reading and writing; a small one has no thread to wait for. The answer is the same."""
    seen: list[int] = []
    watched: Callable[..., Any] = orjson.loads
    monkeypatch.setattr(prediction, "LARGE_BYTES", 1 if large else 2**20)

    def loads(body: bytes) -> Any:
        seen.append(threading.get_ident())
        return watched(body)

    monkeypatch.setattr("service.protocol.json.orjson.loads", loads)
    ((status, said),) = answers(repository, SMALL)
    assert (status, said["outputs"][0]["shape"]) == (200, [1, 3])
    assert (seen[0] != threading.get_ident()) is large


def test_a_large_body_that_does_not_fit_is_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what waits to be read counts, until it is."""
    monkeypatch.setattr(prediction, "LARGE_BYTES", 1)
    bodies = Bodies(max_bytes=1000, body_limit_bytes=0)
    ((status, said),) = answers(repository, b'{"inputs": 3}', bodies)
    assert (status, said["code"]) == (400, "wrong_type")
    assert bodies.held_bytes == 0
    ((status, said),) = answers(repository, SMALL + b" " * 1000, bodies)
    assert (status, said["code"]) == (429, "server_full")


@pytest.mark.parametrize("broken", ["answered", "failed"])
@pytest.mark.parametrize("body", [SMALL, b"{}"])
def test_a_count_that_breaks_keeps_nobody_from_an_answer(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, body: bytes, broken: str
) -> None:
    """It is logged; the client has its one answer before."""
    monkeypatch.setattr(Statistics, broken, lambda *_: 1 / 0)
    try:
        told = answers(repository, body)
    except ZeroDivisionError:
        pytest.fail("the connection would be given up")
    assert [status for status, _ in told] == [200 if body == SMALL else 400]


def test_an_answer_that_cannot_be_made_is_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks after the model has run: nobody waits for ever."""
    monkeypatch.setattr(prediction, "WORTH_BYTES", "no number")
    assert [status for status, _ in answers(repository, SMALL)] == [500]


def test_a_large_answer_is_written_in_parts() -> None:
    """So that other threads run meanwhile; bit for bit as in one."""
    array = np.random.default_rng(1).normal(size=(70, 3001)).astype(np.float32)
    array[3, 4], array[5, 6] = np.nan, np.inf
    assert isinstance(to_json(array), orjson.Fragment)
    whole = orjson.dumps(array.reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY)
    assert orjson.dumps({"data": to_json(array)}) == b'{"data":%b}' % whole
