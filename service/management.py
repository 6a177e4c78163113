"""The model repository extension: what is served, and loading and unloading it.

Source: triton-inference-server, `docs/protocol/extension_model_repository.md`.

Rule 1: nothing here changes a model from what a request brings; a version is what lies in its folder, whole.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from service import openapi
from service.asgi import headers_by_name
from service.crew import Crew
from service.errors import BadRequest, BodyTooLarge, Forbidden, NotFound, NotReady, UnsupportedMediaType, clipped
from service.prediction import check_content_type
from service.protocol.json import check_keys, parsed
from service.repository import Repository
from service.settings import Settings

LONGEST_BODY_BYTES = 64 * 1024
"""Nothing that is asked here is longer."""


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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"'{clipped(where)}' of the body" if where else "the body"
        raise BadRequest(f"{what} does not fit: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _body_of(kind: type[_Asked]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})  # they are named from the top of a document, which this is not
    for field in schema["properties"].values():
        if "$ref" in field:
            field |= parts[field.pop("$ref").rsplit("/", 1)[1]]
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def add(app: FastAPI, repository: Repository, crew: Crew, settings: Settings) -> None:
    """Add its routes; access.py says who may load and unload."""
    limit_bytes = min(settings.body_limit_bytes, LONGEST_BODY_BYTES)
    tags: list[str | Enum] = ["Model repository"]
    about: dict[str, Any] = {
        "tags": tags,
        "responses": openapi.responses(BadRequest, Forbidden, NotFound, UnsupportedMediaType, NotReady),
        "openapi_extra": _body_of(LoadRequest),
    }

    @app.post(
        "/v2/repository/index",
        tags=tags,
        summary="Every version looked at, and what became of it",
        responses=openapi.responses(BadRequest, UnsupportedMediaType),
        openapi_extra=_body_of(IndexRequest),
    )
    async def index(request: Request) -> list[dict[str, str]]:
        asked = await _asked(request, IndexRequest, limit_bytes)
        return [
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in repository.entries
            if entry.live is not None or not asked.ready
        ]

    @app.post(
        "/v2/repository/models/{model}/load", summary="Serve its newest version", response_class=Response, **about
    )
    async def load(model: str, request: Request) -> Response:
        await _asked(request, LoadRequest, limit_bytes)
        await crew.load(model)
        return Response()

    @app.post("/v2/repository/models/{model}/unload", summary="Stop serving it", response_class=Response, **about)
    async def unload(model: str, request: Request) -> Response:
        await _asked(request, LoadRequest, limit_bytes)
        await crew.unload(model)
        return Response()

    @app.get(
        "/v2/repository/models/{model}/aliases",
        tags=tags,
        summary="Names for its versions",
        responses=openapi.responses(NotFound),
    )
    async def aliases(model: str) -> dict[str, dict[str, str]]:
        return {"aliases": dict(repository.aliases(model))}

    @app.put(
        "/v2/repository/models/{model}/aliases/{alias}",
        summary="Give a live version a name, or move it there",
        **{**about, "openapi_extra": _body_of(AliasRequest)},
    )
    async def move_alias(model: str, alias: str, request: Request) -> dict[str, str | bool]:
        asked = await _asked(request, AliasRequest, limit_bytes)
        kept = await crew.move_alias(model, alias, asked.version)
        return {"model": model, "alias": alias, "version": asked.version, "survives_restart": kept}

    @app.delete("/v2/repository/models/{model}/aliases/{alias}", summary="Take a name away", **about)
    async def remove_alias(model: str, alias: str, request: Request) -> dict[str, str | bool]:
        await _asked(request, LoadRequest, limit_bytes)
        kept = await crew.move_alias(model, alias, None)
        return {"model": model, "alias": alias, "survives_restart": kept}
