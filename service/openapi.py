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
from service.errors import (
    BadRequest,
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    Internal,
    NeedsBinary,
    NotFound,
    NotReady,
    RequestError,
    Unauthorized,
    UnsupportedMediaType,
)
from service.numerics import made_up_rows
from service.protocol import Parse, predict, v2
from service.repository import Live
from service.signature import CategoricalFeature, ClassTarget, ContinuousFeature, Feature, TensorSpec

Schema = dict[str, Any]

ERROR_SCHEMA: Schema = {
    "type": "object",
    "description": "Every error, on every route.",
    "required": ["error", "code"],
    "properties": {
        "error": {"type": "string", "description": "What came, what was wanted, and what to do."},
        "code": {"type": "string", "description": "The same fault has the same code."},
    },
}
_ERRORS: tuple[type[RequestError], ...] = (
    BadRequest, Forbidden, NotFound, BodyTooLarge, UnsupportedMediaType, Internal, NotReady, DeadlineExceeded,
)  # fmt: skip


def _response(error: type[RequestError]) -> Schema:
    return {
        "description": (error.__doc__ or "").splitlines()[0],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


ERROR_RESPONSES: Schema = {str(error.status): _response(error) for error in _ERRORS}

KEY_SCHEMES: Schema = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key: 'Authorization: Bearer KEY'."},
    "key_header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
"""The page of the documentation (page/docs) knows the first by its name."""


def responses(*errors: type[RequestError]) -> dict[int | str, Schema]:
    """The errors that a route can answer with, for FastAPI."""
    return {error.status: ERROR_RESPONSES[str(error.status)] for error in errors}


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
    components = document.get("components", {})
    return {
        **document,
        "paths": {**paths, **document["paths"]},
        "components": {**components, "schemas": {**schemas, **components.get("schemas", {})}},
    }


def with_keys(document: Schema) -> Schema:
    """The document of a service that needs API keys.

    Args:
        document: not changed.
    """
    refusal = {str(Unauthorized.status): _response(Unauthorized)}
    paths: Schema = {}
    for path, operations in document["paths"].items():
        paths[path] = {
            method: {**operation, "security": []}
            if is_open(path)
            else {**operation, "responses": {**operation["responses"], **refusal}}
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
        summary=f"One sample of named features for '{live.name}'",
        schemas=(f"{live.name}.Sample", f"{live.name}.Prediction"),
    )


def _infer_operation(live: Live) -> Schema:
    return _operation(
        live,
        v2.parse,
        infer_example(live),
        operation_id=f"infer_{live.name}",
        tag="Open Inference Protocol",
        summary=f"Tensors for '{live.name}'",
        schemas=(f"{live.name}.InferRequest", f"{live.name}.InferResponse"),
    )


def _with_binary(operation: Schema) -> Schema:
    """The operation with binary tensors as the other form of request and answer."""
    length = {"schema": {"type": "integer", "minimum": 0}, "description": "Bytes of JSON before the binary tensors."}
    blob = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    body, good = operation["requestBody"], operation["responses"]["200"]
    return {
        **operation,
        "description": "Binary tensors follow the JSON in the order in which they stand in it; each has "
        "`binary_data_size` in its parameters in place of `data`. Outputs come so with `binary_data`.",
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
    live: Live, parse: Parse, example: Schema, *, operation_id: str, tag: str, summary: str, schemas: tuple[str, str]
) -> Schema:
    """An operation whose examples are a request and the answer that this model really gives to it, if JSON can hold
    them."""
    asked, answered = {}, {}
    with suppress(NeedsBinary):
        request = parse(live, orjson.dumps(example), None)
        answer = orjson.loads(request.render(live.admitted.runtime.run(request.accepted.tensors))[0])
        asked, answered = {"example": example}, {"example": answer}
    asks, answers = ({"$ref": f"#/components/schemas/{name}"} for name in schemas)
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": asks, **asked}}},
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {"application/json": {"schema": answers, **answered}},
            },
            **ERROR_RESPONSES,
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


def _tensor(spec: TensorSpec, data: str) -> Schema:
    axes = ", ".join("any" if axis == -1 else str(axis) for axis in spec.shape)
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", data],
        "properties": {
            "name": {"const": spec.name},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": f"[{axes}]"},
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
