"""What is counted and measured, of one process and of several, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from service.counts import MOST_REPLACED, Counts, Histogram
from service.meters import reading_of
from service.readings import FAMILIES, Reading, joined, lasting
from service.repository import Repository
from service.settings import Settings
from service.workers.tally import ReadingTally
from tests import graphs
from tests.asking import loaded, talk
from tests.bundles import SAMPLE, write_table_bundle

JSON = {"content-type": "application/json"}
Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(text: str) -> Figures:
    """Every sample of a page by its name and its labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(page: Figures, name: str, **labels: str) -> float:
    """The sum of all samples of a name that have these labels."""
    return sum(value for (of, has), value in page.items() if of == name and has >= labels.items())


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_table_bundle(tmp_path, name="credit")
    (tmp_path / "sick" / "1").mkdir(parents=True)
    onnx.save(graphs.batchnorm_model(training=True), tmp_path / "sick" / "1" / "model.onnx")
    return tmp_path


@pytest.fixture
def repository(models: Path) -> Repository:
    return loaded(models)


async def page_of(client: httpx.AsyncClient) -> Figures:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return figures(answer.text)


def test_a_request_is_counted_wherever_it_ended(repository: Repository) -> None:
    async def scenario(client: httpx.AsyncClient) -> Figures:
        for _ in range(3):
            await client.post("/predict", json=SAMPLE)
        await client.post("/predict", content=b"{", headers=JSON)
        await client.post("/models/mallory/predict", json=SAMPLE)
        await client.get("/predict")
        await client.get("/mallory")
        await client.get("/v2/models/mallory")
        await client.post("/v2/repository/models/credit/unload", headers={"via": "a proxy"})
        await client.get("/v2/models/credit")
        return await page_of(client)

    page = talk(repository, scenario)
    of_credit = {"model": "credit", "version": "1", "route": "/predict"}
    assert total(page, "evalmode_requests_total", **of_credit, code="200") == 3
    assert total(page, "evalmode_requests_total", **of_credit, code="400") == 1
    assert total(page, "evalmode_requests_total", model="", route="/models/{model}/predict", code="404") == 1
    assert total(page, "evalmode_requests_total", model="", route="/predict", code="405") == 1
    assert total(page, "evalmode_requests_total", model="", route="other", code="404") == 1
    assert total(page, "evalmode_requests_total", route="/v2/models/{model}", code="404") == 1
    assert total(page, "evalmode_requests_total", route="/v2/models/{model}", code="200") == 1
    assert total(page, "evalmode_requests_total", route="other", code="403") == 1
    assert total(page, "evalmode_requests_total") == 10
    assert total(page, "evalmode_refusals_total", reason="malformed_json", model="credit", code="400") == 1
    assert total(page, "evalmode_refusals_total", reason="unknown_model", code="404") == 2
    assert total(page, "evalmode_refusals_total", reason="forbidden", code="403") == 1
    assert total(page, "evalmode_refusals_total") == 6
    assert total(page, "evalmode_request_duration_seconds_count", model="credit") == 3
    assert total(page, "evalmode_batch_rows_sum", model="credit") == 3
    assert total(page, "evalmode_requests_in_flight") == 0
    assert not any("mallory" in value for _, labels in page for _, value in labels)


def test_a_model_says_its_state_and_its_figures(repository: Repository) -> None:
    page = talk(repository, page_of)
    assert total(page, "evalmode_model_state", model="credit", state="ready") == 1
    assert total(page, "evalmode_model_state", model="sick", state="refused") == 1
    assert total(page, "evalmode_model_state") == 2
    assert 0 < total(page, "evalmode_golden_residual", model="credit") <= 1
    (digest,) = [dict(labels)["digest"] for name, labels in page if name == "evalmode_model_info"]
    assert len(digest) == 64
    assert total(page, "evalmode_loads_total", model="credit", result="admitted") == 1
    assert total(page, "evalmode_loads_total", model="sick", result="refused") == 1
    assert total(page, "evalmode_ready") == 1
    assert total(page, "process_resident_memory_bytes") > 10e6


def test_loading_anew_forgets_nothing(repository: Repository, models: Path) -> None:
    """Neither does unloading, nor the counts of the version before."""

    async def scenario(client: httpx.AsyncClient) -> None:
        await client.post("/predict", json=SAMPLE)
        assert (await client.post("/v2/repository/models/credit/load")).status_code == 200
        await client.post("/predict", json=SAMPLE)
        write_table_bundle(models, name="credit", version="2")
        assert (await client.post("/v2/repository/models/credit/load")).status_code == 200
        await client.post("/predict", json=SAMPLE)
        assert (await client.post("/v2/repository/models/credit/unload")).status_code == 200
        page = await page_of(client)
        assert total(page, "evalmode_requests_total", model="credit", version="1", code="200") == 2
        assert total(page, "evalmode_requests_total", model="credit", version="2", code="200") == 1
        assert total(page, "evalmode_model_state", model="credit", state="unloaded") == 1
        assert total(page, "evalmode_model_state", model="credit", state="refused") == 0
        assert total(page, "evalmode_loads_total", model="credit", result="admitted") == 3

    talk(repository, scenario)
    shutil.rmtree(models)


def test_both_formats_are_well_formed(repository: Repository) -> None:
    """OpenMetrics, which Prometheus asks for, and the older text."""

    async def scenario(client: httpx.AsyncClient) -> None:
        await client.post("/predict", json=SAMPLE)
        page = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert page.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        names = {family.name for family in openmetrics.text_string_to_metric_families(page.text)}  # type: ignore[no-untyped-call]
        assert names >= {name for name in FAMILIES if name.startswith("evalmode_request")}

    talk(repository, scenario)


@pytest.mark.parametrize("version", ["abc", "", "99", "1.0.0, text/plain; version=x"])
def test_whoever_asks_for_a_version_that_is_none_is_answered(repository: Repository, version: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        page = await client.get("/metrics", headers={"accept": f"application/openmetrics-text; version={version}"})
        assert page.status_code == 200
        assert "evalmode_ready" in page.text

    talk(repository, scenario)


@pytest.mark.parametrize(
    ("max_queue_s", "limit_rows"), [("3600", 4096), ("0", 4096), ("0.000000001", 32)], ids=["rows", "no time", "time"]
)
def test_the_queue_has_its_limit_beside_it(
    models: Path, monkeypatch: pytest.MonkeyPatch, max_queue_s: str, limit_rows: int
) -> None:
    """In time it is told from the start, by what a row took when the model was loaded."""
    monkeypatch.setenv("EVALMODE_MAX_QUEUE_S", max_queue_s)
    repository = loaded(models)
    page = talk(repository, page_of, Settings(threads=1))
    assert total(page, "evalmode_queue_limit_rows") == limit_rows
    assert total(page, "evalmode_queue_rows") == 0


@given(st.lists(st.sampled_from([1, 10, 1000]) | st.integers(0, 1200)))
def test_a_value_is_in_the_bucket_of_the_first_bound_that_is_not_below_it(values: list[int]) -> None:
    """As Prometheus counts: a bucket holds what is less than or equal to its bound."""
    bounds = (1, 10, 1000)
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    *counts, total_of_all = histogram.value
    assert [sum(counts[: i + 1]) for i in range(4)] == [
        *(sum(value <= bound for value in values) for bound in bounds),
        len(values),
    ]
    assert total_of_all == sum(values)


def counted(requests: int, in_flight: int = 0) -> Reading:
    """As it arrives from another process."""
    counts = Counts()
    for _ in range(requests):
        counts.ended("/predict", 429, reason="queue_full", model="m", version="1")
    counts.begun = counts.refused = requests
    counts.begun += in_flight
    counts.of("m", "1").duration_ns.add(requests)
    read: Reading = json.loads(json.dumps(counts.reading()))
    return read


def test_a_model_that_does_not_answer_is_not_ready(repository: Repository) -> None:
    """As the probe found it; of several processes one is enough."""
    live = repository.live("credit")
    assert value(reading_of(repository), "evalmode_ready") == 1
    live.canary._failed_ns = live.coalescer.ran_ns + 1
    assert value(reading_of(repository), "evalmode_ready") == 0
    assert value(joined([[("evalmode_ready", (), 1)], reading_of(repository)]), "evalmode_ready") == 0
    live.coalescer.ran_ns += 2
    assert value(reading_of(repository), "evalmode_ready") == 1


def test_versions_of_long_ago_are_told_of_no_more() -> None:
    """What is read stays as large as it is, no series jumps, and what is in flight is known; what was live until now is
    told of, however old it is."""
    counts, sizes = Counts(), []
    seen: dict[tuple[object, ...], object] = {}
    for version in range(1, 200):
        counts.of("m", str(version)).answered["/predict"] = version
        counts.of("m", "3").answered["/predict"] = version
        counts.ended("/predict", 429, reason="queue_full", model="m", version=str(version))
        counts.of("other", "1").answered["/predict"] = 5
        counts.begun = counts.answered + 2
        live = {"3", str(version)} if version < 190 else {str(version)}
        counts.pass_over("m", live)
        read = counts.reading()
        sizes.append(len(read))
        assert value(read, "evalmode_requests_in_flight") == 2
        for name, labels, count in read:
            if name == "evalmode_requests" and labels[0] == "m" and labels[1] != "3":
                assert seen.setdefault(tuple(labels), count) == count
    assert max(sizes) == sizes[100]
    told_of = {labels[1] for _, labels, _ in read if labels and labels[0] == "m"}
    assert told_of == {"3", *map(str, range(200 - MOST_REPLACED, 200))}


def value(reading: Reading, name: str) -> object:
    return next(value for of, _, value in reading if of == name)


def test_what_a_dead_process_counted_stays_and_what_it_held_goes() -> None:
    tally = ReadingTally()
    tally.hear("first", counted(3, in_flight=2))
    tally.hear("second", counted(4, in_flight=1))
    assert value(tally.total(), "evalmode_requests") == 7
    assert value(tally.total(), "evalmode_requests_in_flight") == 3
    tally.end("first")
    assert value(tally.total(), "evalmode_requests") == 7
    assert value(tally.total(), "evalmode_requests_in_flight") == 1
    tally.hear("third", counted(1))
    assert value(tally.total(), "evalmode_requests") == 8
    duration = value(tally.total(), "evalmode_request_duration_seconds")
    assert isinstance(duration, list)
    assert (sum(duration[:-1]), duration[-1]) == (3, 8)


def test_processes_are_joined_by_what_a_figure_means() -> None:
    """Memory adds up; a start is the first one, a limit the tightest."""
    one: Reading = [("process_start_time_seconds", (), 10.0), ("process_max_fds", (), 64)]
    other: Reading = [("process_start_time_seconds", (), 20.0), ("process_max_fds", (), 32)]
    assert joined([one, other]) == [("process_start_time_seconds", (), 10.0), ("process_max_fds", (), 32)]
    assert lasting([*one, ("process_cpu_seconds", (), 1.5)]) == [("process_cpu_seconds", (), 1.5)]


def test_a_page_is_made_while_a_model_runs(repository: Repository) -> None:
    """Nothing of it waits for the engine: a batch that does not end does not hold it up."""
    live = repository.live("credit")

    async def scenario(client: httpx.AsyncClient) -> None:
        live.coalescer._busy = True  # as if a batch ran for ever
        asking = asyncio.create_task(client.post("/predict", json=SAMPLE))
        await asyncio.sleep(0.01)
        page = await asyncio.wait_for(page_of(client), timeout=5)
        assert total(page, "evalmode_queue_rows", model="credit") == 1
        assert total(page, "evalmode_requests_in_flight") == 1
        live.coalescer._run_next()
        assert (await asking).status_code == 200
        assert total(await page_of(client), "evalmode_requests_in_flight") == 0

    talk(repository, scenario)
