"""OpenTelemetry traces, if they are asked for: a span for each prediction, and within it its queue and its compute.

Asked for by OTEL_EXPORTER_OTLP_ENDPOINT; all else is said to the SDK by its own variables (OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...). The caller's `traceparent` is the parent of the span.

Rule 1: a span costs more than a small prediction, so at most `TRACES_S` predictions a second have one, unless
        OTEL_TRACES_SAMPLER says which: then it alone does. Who comes with a trace that is not sampled takes none.
Rule 2: not asked for, the SDK is not imported and nothing is done.
Rule 3: spans are made when all is over, from the times that are measured anyhow, and sent by a thread of the SDK.
Source: OpenTelemetry semantic conventions 1.29 for HTTP server spans.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from time import perf_counter_ns
from typing import TYPE_CHECKING, final

from service.errors import WrongCall
from service.headers import Headers, is_unsampled
from service.shares import Shares
from service.watch import Ended

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ASKED_FOR = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

SAMPLER = "OTEL_TRACES_SAMPLER"

TRACES_S = 10
"""Predictions in a second that are traced, and as many again of each of the two kinds of error."""

CLOSE_LIMIT_S = 2.0


def tracing(environment: Mapping[str, str] = os.environ, *, tls: bool = False) -> Tracing | None:
    """As the environment asks; None if it does not.

    Args:
        tls: it is spoken here.

    Raises:
        WrongCall: it does, and the packages are not installed.
    """
    asking = next((name for name in ASKED_FOR if environment.get(name)), None)
    if asking is None or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise WrongCall(
            f"{asking} asks for traces, but '{error.name}' is not installed; pip install 'evalmode[telemetry]', "
            "or unset it"
        ) from error
    named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "evalmode"}
    resource = Resource.create({**named, "service.version": version("evalmode")})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    sampler = environment.get(SAMPLER, "")
    asks_parent = not sampler or sampler.startswith("parentbased_")
    return Tracing(provider, per_second=None if sampler else TRACES_S, asks_parent=asks_parent, tls=tls)


@final
class Tracing:
    """Makes spans of requests."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        per_second: int | None = TRACES_S,
        asks_parent: bool = True,
        tls: bool = False,
    ) -> None:
        """
        Args:
            per_second: at most; None: as many as the provider's sampler lets through.
            asks_parent: whoever comes with a trace that is not sampled has no span. The SDK says the same, later.
        """
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._wake: Callable[[], None] = lambda: None
        self._shares = None if per_second is None else Shares(per_second, lambda: self._wake())
        self._asks_parent = asks_parent
        self._scheme = "https" if tls else "http"
        self._tracer = provider.get_tracer("evalmode", version("evalmode"))
        self._propagator = TraceContextTextMapPropagator()

    @property
    def hears(self) -> bool:
        return self._shares is None or self._shares.has(200)

    def wants(self, status: int, route: str, headers: Headers) -> bool:
        """Predictions; the rest would be health checks, once a second."""
        return route.endswith(("/predict", "/infer")) and self._takes(status, headers)

    def wants_answer(self, headers: Headers) -> bool:
        return self._takes(200, headers)

    def wakes(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def _takes(self, status: int, headers: Headers) -> bool:
        if self._asks_parent and is_unsampled(headers):
            return False
        return self._shares is None or self._shares.take(status)

    def tell(self, ended: Ended) -> None:
        since_1970_ns = time.time_ns() - perf_counter_ns()
        attributes: dict[str, str | int] = {
            "http.request.method": ended.method,
            "http.route": ended.route,
            "http.response.status_code": ended.status,
            "url.scheme": self._scheme,
            "evalmode.request.id": ended.request_id,
        }
        if ended.model:
            attributes |= {"evalmode.model.name": ended.model, "evalmode.model.version": ended.version}
        if ended.client:
            attributes["client.address"] = ended.client[0]
        if ended.status >= 500:
            attributes["error.type"] = ended.code
        span = self._tracer.start_span(
            f"{ended.method} {ended.route}",
            self._propagator.extract(ended.trace),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=since_1970_ns + ended.began_ns,
        )
        if ended.submitted_ns and span.is_recording():
            inside = self._trace.set_span_in_context(span)
            ran_ns = since_1970_ns + ended.submitted_ns + ended.queue_ns
            queue = self._tracer.start_span("queue", inside, start_time=ran_ns - ended.queue_ns)
            queue.end(ran_ns)
            rows = {"evalmode.rows": ended.rows}
            compute = self._tracer.start_span("compute", inside, attributes=rows, start_time=ran_ns)
            compute.end(ran_ns + ended.compute_ns)
        if ended.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, ended.code)
        span.end(since_1970_ns + ended.ended_ns)

    def close(self) -> None:
        """Send what is left, if somebody takes it; the SDK alone would wait for half a minute."""
        if self._shares is not None:
            self._shares.close()
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_LIMIT_S)
