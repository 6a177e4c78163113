"""GET /metrics: what all processes of the service counted, in the text formats that Prometheus reads.

Rule 1: whichever process is asked, it answers for all.
Rule 2: what a model is (its state, its digest, its golden samples) is the same in all processes, so the one that is
        asked says it; what was counted and measured comes from each of them (readings.py).
Rule 3: nothing here waits for a model.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import final

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service import openapi
from service.bundle import MODEL_FILE
from service.crew import Crew
from service.errors import NotReady
from service.readings import FAMILIES, Family, Reading
from service.repository import UNLOADED, Entry, Live, Repository

STATES = ("ready", "stale", "refused", "unloaded")

_VERSION = version("evalmode")
"""Looked up once: it takes half a millisecond, in which nobody is answered."""


def add(app: FastAPI, repository: Repository, crew: Crew) -> None:
    @app.get(
        "/metrics",
        tags=["Metrics"],
        summary="What all processes counted, for Prometheus",
        description="In OpenMetrics or the older text, as the header Accept says. No count begins anew when a model is "
        "loaded anew, as the statistics of the protocol do.",
        response_class=PlainTextResponse,
        responses=openapi.responses(NotReady),
    )
    async def metrics(request: Request) -> Response:
        encode, content_type = _encoder(request.headers.get("accept", ""))
        page = encode(Page(repository, await crew.reading()))
        return Response(page, headers={"content-type": content_type})


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """The plain format for whoever asks for a version that is none."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")


@final
class Page(Collector):
    """One answer."""

    def __init__(self, repository: Repository, reading: Reading) -> None:
        self._repository = repository
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        yield _build_info()
        yield _states(self._repository.entries)
        yield _models(self._repository.lives)
        yield _residuals(self._repository.lives)
        families: dict[str, Metric] = {}
        for name, labels, value in sorted(self._reading, key=lambda sample: (sample[0], *sample[1])):
            if name not in families:
                families[name] = _empty(name, FAMILIES[name])
            _add(families[name], labels, value, FAMILIES[name])
        yield from families.values()


def _empty(name: str, family: Family) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    made: Metric = kinds[family.kind](name, family.help, labels=family.labels)
    return made


def _add(metric: Metric, labels: Iterable[str], value: list[int] | float, family: Family) -> None:
    if isinstance(metric, HistogramMetricFamily):
        assert isinstance(value, list)
        bounds = [repr(round(float(bound * family.scale), 9)) for bound in family.bounds]
        below = accumulate(value[:-1])
        metric.add_metric([*labels], [*zip([*bounds, "+Inf"], below, strict=True)], value[-1] * family.scale)
    elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily):
        assert not isinstance(value, list)
        metric.add_metric([*labels], value)


def _build_info() -> Metric:
    info = GaugeMetricFamily("evalmode_build_info", "Always 1.", labels=["version", "python"])
    info.add_metric([_VERSION, platform.python_version()], 1)
    return info


def _states(entries: Iterable[Entry]) -> Metric:
    states = GaugeMetricFamily(
        "evalmode_model_state",
        "1 for the state that a version is in, else 0; stale: ready, but its files were since changed or removed.",
        labels=["model", "version", "state"],
    )
    for entry in entries:
        for each in STATES:
            states.add_metric([entry.name, entry.version, each], int(each == _state(entry)))
    return states


def _state(entry: Entry) -> str:
    if entry.ready:
        return "stale" if entry.reason else "ready"
    return "unloaded" if entry.reason == UNLOADED else "refused"


def _models(models: Iterable[Live]) -> Metric:
    info = GaugeMetricFamily(
        "evalmode_model_info",
        "Always 1. The digest is that of model.onnx in its passport; a plain ONNX file has none.",
        labels=["model", "version", "digest", "provider", "independence"],
    )
    for live in models:
        passport = live.admitted.bundle.passport
        digest = passport.files[MODEL_FILE].sha256 if passport is not None else ""
        independence = live.batching.independence.kind
        info.add_metric([live.name, live.version, digest, live.admitted.runtime.provider, independence], 1)
    return info


def _residuals(models: Iterable[Live]) -> Metric:
    residuals = GaugeMetricFamily(
        "evalmode_golden_residual",
        "The largest distance from PyTorch over the golden samples, as a share of what is allowed; refused above 1.",
        labels=["model", "version"],
    )
    for live in models:
        if figures := live.admitted.golden:
            shares = [figure.difference / figure.bound if figure.difference else 0.0 for figure in figures]
            residuals.add_metric([live.name, live.version], max(shares))
    return residuals
