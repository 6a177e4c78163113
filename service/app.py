"""Builds the application: FastAPI for documentation, health and metadata, the predictions in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from service import logs, management, metrics, openapi
from service.access import Access
from service.access_log import AccessLog
from service.asgi import CODE, Application
from service.bodies import Bodies
from service.counts import Counts
from service.crew import Alone, Crew
from service.errors import (
    Internal,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RequestError,
)
from service.limits import held_at_most
from service.prediction import Predictions
from service.protocol import documents
from service.protocol.json import error_body
from service.readiness import Readiness
from service.repository import Live, Repository
from service.settings import Settings
from service.statistics import Document
from service.tracing import tracing
from service.watch import Watch, Watcher

PAGE_FOLDER = Path(__file__).parent / "page"


def create_app(repository: Repository, settings: Settings, crew: Crew | None = None) -> Application:
    """The ASGI application that serves these models.

    Args:
        crew: the processes that serve them; by default this one alone.

    Raises:
        WrongCall: the keys file cannot be read.
    """
    access, readiness = Access(settings), Readiness(repository)
    watch = Watch(repository.counts, *_watchers(settings, repository.counts))
    rest = _fastapi(repository, crew or Alone(repository), settings, readiness, watch, needs_keys=access.needs_keys)
    limit_bytes = settings.body_limit_bytes
    most_bytes = held_at_most(settings.max_reading_bytes, processes=settings.workers)
    bodies = Bodies(max_bytes=most_bytes, body_limit_bytes=limit_bytes)
    answers = Bodies(max_bytes=most_bytes, body_limit_bytes=limit_bytes, called="answers")
    timeout_s = settings.timeout_s or None
    predictions = Predictions(repository, timeout_s=timeout_s, watch=watch, bodies=bodies, answers=answers)
    return Application(predictions, readiness, access, bodies, answers, body_limit_bytes=limit_bytes, rest=rest)


def _watchers(settings: Settings, counts: Counts) -> list[Watcher]:
    watchers: list[Watcher] = []
    if settings.access_log != "off":
        watchers.append(AccessLog(settings.access_log, counts))
    if (traces := tracing(tls=settings.tls_certificate is not None)) is not None:
        watchers.append(traces)
    return watchers


def _fastapi(
    repository: Repository, crew: Crew, settings: Settings, readiness: Readiness, watch: Watch, *, needs_keys: bool
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        watch.close()
        logs.flush()

    app = FastAPI(
        lifespan=lifespan,
        title="evalmode",
        version=version("evalmode"),
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_documentation(app, repository, needs_keys=needs_keys)
    _add_health(app, readiness)
    _add_statistics(app, repository, crew)  # before the models: /v2/models/stats is no model
    _add_metadata(app, repository)
    metrics.add(app, repository, crew)
    management.add(app, repository, crew, settings)
    app.add_exception_handler(RequestError, _own_error)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(Exception, _unforeseen_error)
    return app


def _add_documentation(app: FastAPI, repository: Repository, *, needs_keys: bool) -> None:
    app.mount("/docs/assets", StaticFiles(directory=PAGE_FOLDER / "swagger-ui"), name="swagger-ui")
    app.mount("/docs/page", StaticFiles(directory=PAGE_FOLDER / "docs"), name="docs")
    page = (PAGE_FOLDER / "docs" / "index.html").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    def documentation() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/", include_in_schema=False)
    def front() -> RedirectResponse:
        return RedirectResponse("/docs")

    documented: list[ref[Live]] | None = None  # what was replaced is not held on to

    def document() -> dict[str, Any]:
        nonlocal documented
        if app.openapi_schema is None or documented != list(map(ref, repository.models)):
            own = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                tags=app.openapi_tags,
                routes=app.routes,
            )
            documented = list(map(ref, repository.models))
            whole = openapi.with_models(own, repository.models)
            app.openapi_schema = openapi.with_keys(whole) if needs_keys else whole
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way FastAPI documents for extending it


def _add_health(app: FastAPI, readiness: Readiness) -> None:
    tags: list[str | Enum] = ["Health"]

    @app.get("/v2/health/live", tags=tags, summary="Whether the process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get(
        "/v2/health/ready",
        tags=tags,
        summary="Whether models are there and answer",
        responses=openapi.responses(NotReady),
    )
    async def ready() -> dict[str, bool]:
        await readiness.check()
        return {"ready": True}

    of_model = _of_model("Whether {} answers", tags)

    @app.get("/v2/models/{model}/ready", **of_model.newest)
    @app.get("/v2/models/{model}/versions/{version}/ready", **of_model.version)
    async def model_ready(model: str, version: str | None = None) -> dict[str, str | bool]:
        return {"name": await readiness.check_model(model, version), "ready": True}


def _add_metadata(app: FastAPI, repository: Repository) -> None:
    tags: list[str | Enum] = ["Open Inference Protocol"]

    @app.get("/v2", tags=tags, summary="This server and its extensions of the protocol")
    async def server() -> dict[str, str | list[str]]:
        return {"name": "evalmode", "version": app.version, "extensions": list(documents.EXTENSIONS)}

    of_model = _of_model("What {} takes and gives, and what its admission measured", tags)

    @app.get("/v2/models/{model}", **of_model.newest)
    @app.get("/v2/models/{model}/versions/{version}", **of_model.version)
    async def model_metadata(model: str, version: str | None = None) -> dict[str, object]:
        live = repository.live(model, version)
        return documents.metadata(live, repository.versions(model), repository.aliases(model))

    of_model = _of_model("The configuration of {}, as Triton has it", tags)

    @app.get("/v2/models/{model}/config", **of_model.newest)
    @app.get("/v2/models/{model}/versions/{version}/config", **of_model.version)
    async def model_config(model: str, version: str | None = None) -> dict[str, object]:
        return documents.config(repository.live(model, version), repository.versions(model))


def _add_statistics(app: FastAPI, repository: Repository, crew: Crew) -> None:
    tags: list[str | Enum] = ["Open Inference Protocol"]

    @app.get(
        "/v2/models/stats",
        tags=tags,
        summary="What every model has done since it was loaded",
        description=openapi.SINCE_LOADED,
        responses=openapi.responses(NotReady),
    )
    async def statistics() -> dict[str, list[Document]]:
        return {"model_stats": await crew.statistics()}

    of_model = _of_model("What {} has done since it was loaded", tags, openapi.SINCE_LOADED)

    @app.get("/v2/models/{model}/stats", **of_model.newest)
    @app.get("/v2/models/{model}/versions/{version}/stats", **of_model.version)
    async def model_statistics(model: str, version: str | None = None) -> dict[str, list[Document]]:
        live = repository.live(model, version)
        entries = await crew.statistics()
        wanted = repository.versions(model) if version is None else [live.version]
        return {"model_stats": [one for one in entries if one["name"] == live.name and one["version"] in wanted]}


class _Both(NamedTuple):
    """What the document says of a route of a model, and of the same one of a version."""

    newest: dict[str, Any]
    version: dict[str, Any]


def _of_model(summary: str, tags: list[str | Enum], description: str | None = None) -> _Both:
    """
    Args:
        summary: with {} where it is said of what.
    """
    common = {"tags": tags, "description": description, "responses": openapi.responses(NotFound, NotReady)}
    return _Both(
        {**common, "summary": summary.format("a model")},
        {**common, "summary": summary.format("a version of a model, or an alias")},
    )


async def _own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(request, error)


async def _framework_error(request: Request, error: Exception) -> Response:
    """What routing refuses, in the words of this service."""
    assert isinstance(error, HTTPException)
    if error.status_code == MethodNotAllowed.status:
        refused = MethodNotAllowed(f"{request.url.path} does not take {request.method}")
        return _answer(request, refused, {"allow": ", ".join(sorted(_methods(request)))})
    return _answer(
        request, NotFound(f"there is nothing at {request.url.path}; GET /docs lists what there is"), error.headers
    )


def _methods(request: Request) -> set[str]:
    """Those that the path takes; each route knows its own only."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    methods = {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}
    return methods | {"HEAD"} if "GET" in methods else methods


async def _unforeseen_error(request: Request, error: Exception) -> Response:
    return _answer(request, Internal())  # Starlette raises `error` again afterwards, so the server logs its traceback


def _answer(request: Request, error: RequestError, headers: Any = None) -> Response:
    request.scope[CODE] = error.code
    return Response(error_body(error), status_code=error.status, headers=headers, media_type="application/json")
