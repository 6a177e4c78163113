"""Spans of predictions, in memory and to a receiver of OTLP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from service import shares
from service.app import create_app
from service.errors import WrongCall
from service.headers import is_unsampled
from service.repository import Repository
from service.settings import Settings
from service.tracing import TRACES_S, Tracing, tracing
from service.watch import Watch
from tests.asking import loaded, talk
from tests.bundles import SAMPLE, write_table_bundle

pytest.importorskip("opentelemetry.sdk", reason="needs the extra 'telemetry'")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    models = tmp_path_factory.mktemp("models")
    write_table_bundle(models, name="credit")
    return loaded(models)


def traced(repository: Repository, body: bytes | None = None, *, tls: bool = False) -> dict[str, ReadableSpan]:
    """The spans of one prediction, by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    application = create_app(repository, Settings())
    application.predictions.watch = Watch(repository.counts, Tracing(provider, tls=tls))

    async def scenario(client: httpx.AsyncClient) -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=application), base_url="http://service"
        ) as watched:
            if body is None:
                await watched.post("/predict", json=SAMPLE, headers=TRACEPARENT)
            else:
                await watched.post("/predict", content=body, headers={"content-type": "application/json"})
            await watched.get("/v2/health/live")

    talk(repository, scenario)
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_prediction_is_a_span_in_its_callers_trace(repository: Repository) -> None:
    spans = traced(repository)
    assert spans.keys() == {"POST /predict", "queue", "compute"}
    whole, queue, compute = spans["POST /predict"], spans["queue"], spans["compute"]
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE_ID}
    assert whole.kind is SpanKind.SERVER
    assert whole.attributes is not None
    assert {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "evalmode.model.name": "credit",
    }.items() <= whole.attributes.items()
    for inner in (queue, compute):
        assert inner.parent is not None
        assert inner.parent.span_id == whole.context.span_id
    times = [whole.start_time, queue.start_time, queue.end_time, compute.end_time, whole.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert queue.end_time == compute.start_time


@pytest.mark.parametrize(("tls", "scheme"), [(False, "http"), (True, "https")])
def test_a_span_says_how_it_was_called(repository: Repository, tls: bool, scheme: str) -> None:
    assert (traced(repository, tls=tls)["POST /predict"].attributes or {})["url.scheme"] == scheme


def test_a_refusal_is_a_span_that_computed_nothing(repository: Repository) -> None:
    spans = traced(repository, b"{")
    assert spans.keys() == {"POST /predict"}
    assert (spans["POST /predict"].attributes or {})["http.response.status_code"] == 400
    assert spans["POST /predict"].status.is_unset  # the caller's fault is no error of a server's span


@pytest.mark.parametrize(
    ("traceparent", "unsampled"),
    [
        (f"00-{TRACE_ID}-{PARENT_ID}-00", True),
        (f"00-{TRACE_ID}-{PARENT_ID}-02", True),
        (f"00-{TRACE_ID}-{PARENT_ID}-fe", True),
        (f"00-{TRACE_ID}-{PARENT_ID}-01", False),
        (f"00-{TRACE_ID}-{PARENT_ID}-03", False),
        (f"ff-{TRACE_ID}-{PARENT_ID}-00", False),
        (f"00-{'0' * 32}-{PARENT_ID}-00", False),
        (f"00-{TRACE_ID}-{'0' * 16}-00", False),
        (f"00-{TRACE_ID}-{PARENT_ID}-00, 00-{TRACE_ID}-{PARENT_ID}-01", False),
        ("nonsense", False),
    ],
)
def test_whose_trace_is_recorded_nowhere_is_told_by_its_flags(traceparent: str, unsampled: bool) -> None:
    """A header that is none (W3C Trace Context, section 3.2.2) says nothing; the service's span is a root then."""
    assert is_unsampled({b"traceparent": traceparent.encode()}) is unsampled
    assert not is_unsampled({})


UNSAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}


async def ask_often(client: httpx.AsyncClient, times: int) -> None:
    """Answers, refusals, and as many of either whose callers have a trace that nobody records."""
    for headers in (UNSAMPLED, TRACEPARENT, {}):
        for _ in range(times):
            await client.post("/predict", json=SAMPLE, headers=headers)
            await client.post("/predict", content=b"{", headers=headers)


def test_so_many_predictions_a_second_are_spans(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes: a span costs more than a small prediction. Who is recorded nowhere takes none of them."""
    monkeypatch.setattr(shares, "SECOND_S", 600.0)  # it ends when this test says so
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    application = create_app(repository, Settings())
    tracing = Tracing(provider, per_second=2)
    application.predictions.watch = Watch(repository.counts, tracing)

    async def scenario(_: httpx.AsyncClient) -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=application), base_url="http://service"
        ) as watched:
            for _second in range(2):
                await ask_often(watched, 4)
                assert not application.predictions.watch.hearing
                tracing._shares.close()  # type: ignore[union-attr]  # the second is over
                assert application.predictions.watch.hearing

    talk(repository, scenario)
    spans = [span for span in exporter.get_finished_spans() if span.name == "POST /predict"]
    statuses = [(span.attributes or {})["http.response.status_code"] for span in spans]
    assert statuses == [200, 400, 200, 400] * 2


def test_off_nothing_is_imported() -> None:
    program = "import service.app, service.server, sys; from service.tracing import tracing; assert tracing() is None; "
    program += "sys.exit(any(name in sys.modules for name in ('opentelemetry.sdk', 'opentelemetry.exporter')))"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=50, env={"PATH": ""}).returncode == 0


@pytest.mark.parametrize(
    "environment",
    [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}],
)
def test_it_is_off_unless_it_is_asked_for(environment: dict[str, str]) -> None:
    assert tracing(environment) is None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(WrongCall, match=r"OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but .*evalmode\[telemetry\]"):
        tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})


@contextmanager
def receiver() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Takes what is sent, as a collector does."""
    taken: list[ExportTraceServiceRequest] = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            taken.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receive)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.mark.parametrize(("sampler", "limited"), [("", True), ("parentbased_always_on", False), ("always_on", False)])
def test_who_names_a_sampler_has_no_other_limit(sampler: str, limited: bool) -> None:
    async def scenario() -> None:
        traces = tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER": sampler})
        assert traces is not None
        assert all(traces.wants_answer({}) for _ in range(TRACES_S))
        assert traces.hears is traces.wants_answer({}) is not limited
        unsampled = {name.encode(): value.encode() for name, value in UNSAMPLED.items()}
        assert traces.wants_answer(unsampled) is (sampler == "always_on")
        traces.close()

    asyncio.run(scenario())


def test_spans_arrive_at_a_collector(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the environment says where; what is left is sent at the end."""
    with receiver() as (address, taken):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        application = create_app(repository, Settings())

        async def scenario(_: httpx.AsyncClient) -> None:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=application), base_url="http://service"
            ) as client:
                await client.post("/predict", json=SAMPLE, headers=TRACEPARENT)

        talk(repository, scenario)
        application.predictions.watch.close()
    (resource,) = [resource for request in taken for resource in request.resource_spans]
    named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert named["service.name"] == "evalmode"
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"POST /predict", "queue", "compute"}
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
