"""The model repository extension: what is served, and loading and unloading it.

Source: triton-inference-server, `docs/protocol/extension_model_repository.md`.

Rule 1: nothing here changes a model from what a request brings; a version is what lies in its folder, whole.
Rule 2: the index says of everything in the folder why it is not served, also where it can be no model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeVar, final

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from service import openapi
from service.asgi import KEY_NAME
from service.aside import aside
from service.crew import Crew
from service.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    LoadRefused,
    NotFound,
    NotReady,
    UnsupportedMediaType,
    clipped,
    describe,
)
from service.headers import headers_by_name
from service.misfit import first_misfit
from service.places import Misplaced, version_order
from service.prediction import check_content_type
from service.protocol.json import check_keys, parsed
from service.repository import Repository
from service.settings import Settings

_log = logging.getLogger(__name__)

LONGEST_BODY_BYTES = 64 * 1024
"""Nothing that is asked here is longer."""

LOOK_LIMIT_S = 1.0
"""A folder that does not say in this time what is in it is left out of the index."""


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True)


class IndexRequest(_Asked):
    """What of the index is wanted."""

    ready: bool = False


class LoadParameters(_Asked):
    """What Triton knows beside the name. A model is loaded as it lies in its folder, so nothing else can be said."""

    model_config = ConfigDict(extra="forbid")

    unload_dependents: bool = False


class LoadRequest(_Asked):
    """The body of load and unload."""

    parameters: LoadParameters = LoadParameters()


class AliasRequest(_Asked):
    """What an alias is to mean."""

    model_config = ConfigDict(extra="forbid")

    version: str


AskedT = TypeVar("AskedT", bound=_Asked)


async def _asked(request: Request, kind: type[AskedT], limit_bytes: int) -> AskedT:
    """The body of a management request, which may be empty and comes without a content type from some clients.

    Raises:
        UnsupportedMediaType: it is said to be something else than JSON, such as what a form in a page sends.
        BadRequest: it is malformed, or does not fit.
    """
    check_content_type(
        headers_by_name(request.scope["headers"]), binary=True
    )  # so aiohttp calls bytes, and no form does
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes=limit_bytes)
    body = b"".join(chunks)
    value = parsed(body) if body else {}
    if body:
        check_keys(body, value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        where, why, got = first_misfit(error)
        what = f"'{clipped(where)}' of the body" if where else "the body"
        raise BadRequest(f"{what} is {describe(got)}, which does not fit: {why}") from error


def _asker(request: Request) -> str:
    """For the log."""
    name = request.scope.get(KEY_NAME)
    return f"the key '{name}'" if name else "somebody"


@final
class _Folder:
    """Looked at for whoever asks: one look at a time, and nobody waits for one that hangs."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._look: asyncio.Task[list[Misplaced]] | None = None

    async def misplaced(self) -> list[Misplaced]:
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(aside(self._repository.misplaced))
        look = self._look
        await asyncio.wait([look], timeout=LOOK_LIMIT_S)
        return look.result() if look.done() else []


def _index(repository: Repository, misplaced: Sequence[Misplaced], *, only_ready: bool) -> list[dict[str, str]]:
    """Models in order of their names, of each the newest version first; what is served stays READY while it is loaded
    anew."""
    found: dict[tuple[str, str], tuple[str, str]] = {
        **{(one.name, one.version): ("UNAVAILABLE", one.reason) for one in misplaced},
        **{(entry.name, entry.version): (entry.state, entry.reason) for entry in repository.entries},
    }
    ready = {key for key, (state, _) in found.items() if state == "READY"}
    found |= dict.fromkeys(repository.loading - ready, ("LOADING", ""))
    newest_first = sorted(found, key=lambda key: version_order(key[1]), reverse=True)
    return [
        {"name": name, "version": version, "state": found[name, version][0], "reason": found[name, version][1]}
        for name, version in sorted(newest_first, key=lambda key: key[0])
        if not only_ready or (name, version) in ready
    ]


def _body_of(kind: type[_Asked], example: dict[str, object]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})  # they are named from the top of a document, which this is not
    for field in schema["properties"].values():
        if "$ref" in field:
            field |= parts[field.pop("$ref").rsplit("/", 1)[1]]
    return {"requestBody": {"content": {"application/json": {"schema": schema, "example": example}}}}


def add(app: FastAPI, repository: Repository, crew: Crew, settings: Settings) -> None:
    """Add its routes; access.py says who may load and unload."""
    limit_bytes = min(settings.body_limit_bytes, LONGEST_BODY_BYTES)
    folder = _Folder(repository)
    tags: list[str | Enum] = ["Model repository"]
    about: dict[str, Any] = {
        "tags": tags,
        "responses": openapi.responses(BadRequest, Forbidden, NotFound, BodyTooLarge, UnsupportedMediaType, NotReady),
        "openapi_extra": _body_of(LoadRequest, {}),
    }

    @app.post(
        "/v2/repository/index",
        tags=tags,
        summary="Everything in the folder of models, and why it is served or not",
        description="READY is served; UNAVAILABLE is not, and `reason` says why and what to do, also of what can be no "
        "model where it lies; LOADING is being admitted now. With `ready` only what is served.",
        responses=openapi.responses(BadRequest, BodyTooLarge, UnsupportedMediaType),
        openapi_extra=_body_of(IndexRequest, {"ready": False}),
    )
    async def index(request: Request) -> list[dict[str, str]]:
        asked = await _asked(request, IndexRequest, limit_bytes)
        return _index(repository, [] if asked.ready else await folder.misplaced(), only_ready=asked.ready)

    @app.post(
        "/v2/repository/models/{model}/load",
        summary="Look at a model's folder again and serve its newest version",
        description="Answered when it is served. One that does not pass admission is 400 `load_refused` with its "
        "reason, and what was served goes on.",
        response_class=Response,
        **about,
    )
    async def load(model: str, request: Request) -> Response:
        await _asked(request, LoadRequest, limit_bytes)
        try:
            await crew.load(model)
        except LoadRefused as refused:
            _log.warning("%s (%s asked)", refused, _asker(request))
            raise
        _log.info("model '%s' was looked at again, as %s asked", model, _asker(request))
        return Response()

    @app.post(
        "/v2/repository/models/{model}/unload",
        summary="Stop serving a model, until somebody asks for load",
        response_class=Response,
        **about,
    )
    async def unload(model: str, request: Request) -> Response:
        await _asked(request, LoadRequest, limit_bytes)
        await crew.unload(model)
        _log.info("model '%s' was unloaded, as %s asked", model, _asker(request))
        return Response()

    @app.get(
        "/v2/repository/models/{model}/aliases",
        tags=tags,
        summary="The aliases of a model",
        responses=openapi.responses(NotFound),
    )
    async def aliases(model: str) -> dict[str, dict[str, str]]:
        return {"aliases": dict(repository.aliases(model))}

    @app.put(
        "/v2/repository/models/{model}/aliases/{alias}",
        summary="Give a live version of a model an alias, or move it there",
        description="Who names no version gets the alias `stable`, where it is set, and otherwise the newest.",
        **{**about, "openapi_extra": _body_of(AliasRequest, {"version": "1"})},
    )
    async def move_alias(model: str, alias: str, request: Request) -> dict[str, str | bool]:
        asked = await _asked(request, AliasRequest, limit_bytes)
        kept = await crew.move_alias(model, alias, asked.version)
        _log.info(
            "alias '%s' of model '%s' is version %s now, as %s asked", alias, model, asked.version, _asker(request)
        )
        return {"model": model, "alias": alias, "version": asked.version, "survives_restart": kept}

    @app.delete("/v2/repository/models/{model}/aliases/{alias}", summary="Take an alias away", **about)
    async def remove_alias(model: str, alias: str, request: Request) -> dict[str, str | bool]:
        await _asked(request, LoadRequest, limit_bytes)
        kept = await crew.move_alias(model, alias, None)
        _log.info("alias '%s' of model '%s' is gone, as %s asked", alias, model, _asker(request))
        return {"model": model, "alias": alias, "survives_restart": kept}
