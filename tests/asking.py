"""Questions to the application without a server, and the two halves of a binary message."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import httpx
import onnx
from onnx import TensorProto, helper

from service.app import create_app
from service.asgi import Application
from service.protocol.compression import unpacked
from service.repository import Repository, load
from service.runtime import place
from service.settings import Settings
from service.signature import DATATYPES, Datatype

JSON_LENGTH = "inference-header-content-length"

ONNX_TYPES: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
assert ONNX_TYPES.keys() == DATATYPES.keys()

Scenario = Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]


def talk(repository: Repository, scenario: Scenario, settings: Settings | None = None) -> Any:
    async def conversation() -> Any:
        transport = httpx.ASGITransport(app=_app(repository, settings or Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
            return await scenario(client)

    return asyncio.run(conversation())


@functools.lru_cache(maxsize=4)
def _app(repository: Repository, settings: Settings) -> Application:
    return create_app(repository, settings)


def ask(
    repository: Repository,
    method: str,
    path: str,
    body: Any = b"",
    headers: Mapping[str, str] | None = None,
    *,
    settings: Settings | None = None,
) -> httpx.Response:
    """
    Args:
        body: bytes as they are, anything else as JSON.
        headers: there is no content type unless one is given.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response: httpx.Response = talk(
        repository, lambda client: client.request(method, path, content=content, headers=headers), settings
    )
    return response


def binary_message(said: Mapping[str, Any], *blobs: bytes, spaces: int = 0) -> tuple[bytes, dict[str, str]]:
    """A request of the binary extension, and its headers.

    Args:
        spaces: after the JSON and counted with it, so that the blobs begin elsewhere.
    """
    head = json.dumps(said).encode() + b" " * spaces
    return b"".join((head, *blobs)), {
        "content-type": "application/octet-stream",
        JSON_LENGTH: str(len(head)),
    }


def binary_answer(response: httpx.Response) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of an answer, and by name the bytes of each output that is not in it."""
    assert response.headers["content-type"] == "application/octet-stream"
    size = int(response.headers[JSON_LENGTH])
    said: dict[str, Any] = json.loads(response.content[:size])
    blobs: dict[str, bytes] = {}
    for output in said["outputs"]:
        if "data" not in output:
            blobs[output["name"]] = response.content[size : size + output["parameters"]["binary_data_size"]]
            size += len(blobs[output["name"]])
    assert size == len(response.content)
    return said, blobs


def decompressed(body: bytes, encoding: bytes, *, limit_bytes: int) -> bytes:
    """All pieces of a body, see `unpacked`."""
    return b"".join(unpacked(body, encoding, limit_bytes=limit_bytes))


def identity_model(shapes: Mapping[str, tuple[Datatype, list[Any]]]) -> onnx.ModelProto:
    """Hands each input through: `NAME_out = NAME`.

    Args:
        shapes: by the input's name its datatype and shape, axes of any length by a name.
    """
    edges = [
        [helper.make_tensor_value_info(name + end, ONNX_TYPES[datatype], shape) for end in ("", "_out")]
        for name, (datatype, shape) in shapes.items()
    ]
    nodes = [helper.make_node("Identity", [name], [name + "_out"]) for name in shapes]
    graph = helper.make_graph(nodes, "identity", [edge[0] for edge in edges], [edge[1] for edge in edges])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def save(models: Path, name: str, model: onnx.ModelProto, version: str = "1") -> None:
    """A plain bundle at models/name/version."""
    (models / name / version).mkdir(parents=True)
    onnx.save(model, models / name / version / "model.onnx")


def loaded(models: Path) -> Repository:
    return load(models, place("cpu"), Settings(threads=1, max_batch_rows=8))
