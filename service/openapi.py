"""The OpenAPI document: FastAPI's own routes, and each model's prediction routes with that model's own types.

The prediction routes are plain ASGI, so FastAPI does not know them; their schema comes from the signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import orjson

from service.access import is_open
from service.aliases import STABLE
from service.errors import (
    BadRequest,
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    HeadersTooLarge,
    Internal,
    NeedsBinary,
    NotFound,
    NotReady,
    QueueFull,
    RequestError,
    RequestTooSlow,
    Unauthorized,
    UnsupportedMediaType,
)
from service.numerics import made_up_rows
from service.protocol import Parse, predict, v2
from service.repository import Live
from service.signature import CategoricalFeature, ClassTarget, ContinuousFeature, Feature, TensorSpec

Schema = dict[str, Any]

DESCRIPTION = """Serves networks with BatchNorm exactly as they were evaluated: running statistics, never the batch's.

Every error, on every route, is `{"error": "...", "code": "..."}`. Beside what is named at each route, any request can
be refused as no HTTP (400), for a method that its path does not take (405), as too slow to arrive (408), for a head
that is too large (431), or fail for reasons of ours (500). Every answer has an `x-request-id`."""

SINCE_LOADED = (
    "Counted since the version was loaded: a restart begins at zero, and so does a version that is loaded anew. The "
    "counts of `GET /metrics` go on when a model is loaded anew."
)

TAGS = [
    {"name": "Predict", "description": "One sample by the names of its features in, a label or a value out."},
    {
        "name": "Open Inference Protocol",
        "description": "Tensors in, tensors out, in JSON or binary; what a model takes; what it has done. Version 2, "
        "with the extensions that `GET /v2` names.",
    },
    {"name": "Health", "description": "For orchestrators and load balancers; needs no API key but for single models."},
    {"name": "Model repository", "description": "What is served and why, loading and unloading, aliases of versions."},
    {"name": "Metrics", "description": "For Prometheus."},
]
"""In the order in which the page shows them."""

LARGEST_EXAMPLE_BYTES = 16 * 1024
"""Of JSON. Larger ones, such as images, would be most of the document, and nobody reads them."""

ERROR_SCHEMA: Schema = {
    "type": "object",
    "description": "Every error, on every route.",
    "required": ["error", "code"],
    "properties": {
        "error": {"type": "string", "description": "What came, what was wanted, and what to do."},
        "code": {"type": "string", "description": "The same fault has the same code."},
    },
}
_PREDICTION_ERRORS: tuple[type[RequestError], ...] = (
    BadRequest, NotFound, RequestTooSlow, BodyTooLarge, UnsupportedMediaType, QueueFull, HeadersTooLarge, Internal,
    NotReady, DeadlineExceeded,
)  # fmt: skip

KEY_SCHEMES: Schema = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key: 'Authorization: Bearer KEY'."},
    "key_header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
"""The page of the documentation (page/docs) knows the first by its name."""

_RETRY_AFTER: Schema = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}


def responses(*errors: type[RequestError]) -> dict[int | str, Schema]:
    """The errors that a route can answer with, for FastAPI."""
    return {error.status: _response(error) for error in errors}


def _response(error: type[RequestError]) -> Schema:
    return {
        "description": (error.__doc__ or "").splitlines()[0],
        **({"headers": _RETRY_AFTER} if error is QueueFull else {}),
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


def with_models(document: Schema, models: Sequence[Live]) -> Schema:
    """The document with the prediction routes of these models, each typed by its signature.

    Args:
        document: FastAPI's, not changed.
    """
    paths: Schema = {}
    schemas: Schema = {"Error": ERROR_SCHEMA}
    for live in models:
        if live.reader is not None:
            schemas[f"{live.name}.Sample"] = _sample(live)
            schemas[f"{live.name}.Prediction"] = _prediction(live)
            if len(models) == 1:
                paths["/predict"] = {"post": _predict_operation(live, "predict")}
            paths[f"/models/{live.name}/predict"] = {"post": _predict_operation(live, f"predict_{live.name}")}
        schemas[f"{live.name}.InferRequest"] = _infer_request(live)
        schemas[f"{live.name}.InferResponse"] = _infer_response(live)
        paths[f"/v2/models/{live.name}/infer"] = {"post": _with_binary(_infer_operation(live))}
    own = {
        path: {method: _own(operation, models) for method, operation in operations.items()}
        for path, operations in document["paths"].items()
    }
    return {**document, "paths": {**paths, **own}, "components": {"schemas": schemas}}


def _own(operation: Schema, models: Sequence[Live]) -> Schema:
    """An operation of FastAPI's, with examples that work, and without the answer that it gives nowhere here."""
    answers = {status: answer for status, answer in operation["responses"].items() if status != "422"}
    operation = {**operation, "responses": answers}
    if not models:
        return operation
    examples = {"model": models[0].name, "version": models[0].version, "alias": STABLE}
    if "parameters" in operation:
        operation["parameters"] = [
            {**parameter, "example": examples[parameter["name"]]} for parameter in operation["parameters"]
        ]
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]
        example = {name: examples.get(name, value) for name, value in body["example"].items()}
        operation["requestBody"] = {"content": {"application/json": {**body, "example": example}}}
    return operation


def with_keys(document: Schema) -> Schema:
    """The document of a service that needs API keys.

    Args:
        document: not changed.
    """
    refusals = {str(error.status): _response(error) for error in (Unauthorized, Forbidden)}
    paths: Schema = {}
    for path, operations in document["paths"].items():
        paths[path] = {
            method: {**operation, "security": []}
            if is_open(path)
            else {**operation, "responses": {**operation["responses"], **refusals}}
            for method, operation in operations.items()
        }
    return {
        **document,
        "paths": paths,
        "components": {**document["components"], "securitySchemes": KEY_SCHEMES},
        "security": [{name: []} for name in KEY_SCHEMES],
    }


def _predict_operation(live: Live, operation_id: str) -> Schema:
    return _operation(
        live,
        predict.parse,
        live.admitted.signature.example(),
        operation_id=operation_id,
        tag="Predict",
        summary=f"Ask '{live.name}' about one sample, by the names of its features",
        description="Every feature has to be there. A category that training never saw is served as missing, and "
        "`served_as_missing` says so.",
        schemas=(f"{live.name}.Sample", f"{live.name}.Prediction"),
    )


def _infer_operation(live: Live) -> Schema:
    return _operation(
        live,
        v2.parse,
        infer_example(live),
        operation_id=f"infer_{live.name}",
        tag="Open Inference Protocol",
        summary=f"Ask '{live.name}' with tensors",
        description=_infer_description(live),
        schemas=(f"{live.name}.InferRequest", f"{live.name}.InferResponse"),
    )


def _infer_description(live: Live) -> str:
    takes, gives = (
        ", ".join(f"`{spec.name}` {spec.datatype} {_axes(spec)}" for spec in specs)
        for specs in (live.admitted.signature.inputs, live.admitted.signature.outputs)
    )
    return (
        f"Takes {takes}; gives {gives}. The first axis is the batch; one sample may leave it out. A version or an "
        f"alias is asked at `/v2/models/{live.name}/versions/VERSION/infer`.\n\n"
        "Binary tensors follow the JSON in the order in which they stand in it; each has `binary_data_size` in its "
        "parameters in place of `data`, and the header `Inference-Header-Content-Length` is the length of the JSON. "
        "Outputs come so with `binary_data`.\n\n"
        f"With `{v2.TIMEOUT_US}` in the request's parameters, in microseconds, it is 504 if there is no answer by then."
    )


def _with_binary(operation: Schema) -> Schema:
    """The operation with binary tensors as the other form of request and answer."""
    length = {
        "schema": {"type": "integer", "minimum": 0},
        "description": "Bytes of JSON before the binary tensors; 0 where the body is nothing but the elements of the "
        "only input.",
    }
    blob = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    body, good = operation["requestBody"], operation["responses"]["200"]
    return {
        **operation,
        "parameters": [{"name": "Inference-Header-Content-Length", "in": "header", "required": False, **length}],
        "requestBody": {**body, "content": {**body["content"], **blob}},
        "responses": {
            **operation["responses"],
            "200": {
                **good,
                "headers": {"Inference-Header-Content-Length": length},
                "content": {**good["content"], **blob},
            },
        },
    }


def _operation(
    live: Live,
    parse: Parse,
    example: Schema,
    *,
    operation_id: str,
    tag: str,
    summary: str,
    description: str,
    schemas: tuple[str, str],
) -> Schema:
    """An operation whose examples are a request and the answer that this model really gives to it, where JSON can hold
    them and they are not too large."""
    asked, answered = {}, {}
    body = orjson.dumps(example)
    if len(body) <= LARGEST_EXAMPLE_BYTES:
        with suppress(NeedsBinary):
            request = parse(live, body, None)
            answer = request.render(live.admitted.runtime.run(request.accepted.tensors))[0]
            asked = {"example": example}
            if len(answer) <= LARGEST_EXAMPLE_BYTES:
                answered = {"example": orjson.loads(answer)}
    asks, answers = ({"$ref": f"#/components/schemas/{name}"} for name in schemas)
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "description": description,
        "requestBody": {"required": True, "content": {"application/json": {"schema": asks, **asked}}},
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {"application/json": {"schema": answers, **answered}},
            },
            **{str(error.status): _response(error) for error in _PREDICTION_ERRORS},
        },
    }


def _sample(live: Live) -> Schema:
    features = live.admitted.signature.features or ()
    return {
        "type": "object",
        "required": [feature.name for feature in features],
        "additionalProperties": False,
        "properties": {feature.name: _feature(feature) for feature in features},
    }


def _feature(feature: Feature) -> Schema:
    match feature:
        case ContinuousFeature():
            seen = f"in training from {feature.minimum:g} to {feature.maximum:g}" if feature.minimum is not None else ""
            null = f"null becomes {feature.missing:g}" if feature.missing is not None else ""
            about = "; ".join(part for part in (f"in {feature.unit}" if feature.unit else "", seen, null) if part)
            return {
                "type": "number" if feature.missing is None else ["number", "null"],
                "description": about,
                "examples": [feature.example],
            }
        case CategoricalFeature():
            known = {"title": "seen in training", "type": "string", "enum": list(feature.categories)}
            other = {"title": "any other is served as 'missing'", "type": ["string", "null"]}
            return {"anyOf": [known, other], "examples": [feature.example]}


def _prediction(live: Live) -> Schema:
    target = live.admitted.signature.target
    if isinstance(target, ClassTarget):
        answer: Schema = {
            "label": {"type": "string", "enum": list(target.classes), "description": f"the likeliest {target.name}"},
            "probabilities": {
                "type": "object",
                "required": list(target.classes),
                "properties": {name: {"type": "number", "minimum": 0, "maximum": 1} for name in target.classes},
            },
        }
    else:
        answer = {"value": {"type": "number", "description": target.name if target else ""}}
    return {
        "type": "object",
        "required": [*answer, "model", "version"],
        "properties": {
            **answer,
            "model": {"type": "string"},
            "version": {"type": "string"},
            "served_as_missing": {
                "type": "object",
                "description": "features whose category training never saw, with what came; absent if there are none",
                "additionalProperties": {"type": "string"},
            },
        },
    }


def _infer_request(live: Live) -> Schema:
    signature = live.admitted.signature
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string", "description": "echoed in the answer"},
            "inputs": {"type": "array", "items": {"oneOf": [_tensor(spec, "data") for spec in signature.inputs]}},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"enum": [spec.name for spec in signature.outputs]}},
                },
            },
        },
    }


def _infer_response(live: Live) -> Schema:
    outputs = [_tensor(spec, "data") for spec in live.admitted.signature.outputs]
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"const": live.name},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": {"oneOf": outputs}},
        },
    }


def _axes(spec: TensorSpec) -> str:
    return "[" + ", ".join("any" if axis == -1 else str(axis) for axis in spec.shape) + "]"


def _tensor(spec: TensorSpec, data: str) -> Schema:
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", data],
        "properties": {
            "name": {"const": spec.name},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": _axes(spec)},
            "datatype": {"const": spec.datatype},
            data: {"type": "array", "description": "row-major, flat or nested as the shape says", "items": {}},
        },
    }


def infer_example(live: Live) -> Schema:
    """An inference request that this model answers: the example sample of a table, made-up numbers otherwise."""
    signature = live.admitted.signature
    if live.reader is not None:
        arrays = list(live.reader.accept(signature.example()).tensors)
    else:
        arrays = made_up_rows(signature.inputs, count=1)
    return {
        "inputs": [
            {
                "name": spec.name,
                "shape": list(array.shape),
                "datatype": spec.datatype,
                "data": np.ascontiguousarray(array).reshape(-1).tolist(),
            }
            for spec, array in zip(signature.inputs, arrays, strict=True)
        ]
    }
