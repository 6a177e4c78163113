"""JSON in and errors out, the same on every wire."""

from __future__ import annotations

import orjson

from service.errors import MalformedJson, RequestError


def parsed(body: bytes) -> object:
    """
    Raises:
        MalformedJson: the body is empty, is not UTF-8, or is not JSON as RFC 8259 has it, which knows no NaN.
    """
    if not body:
        raise MalformedJson("it is empty")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno} column {error.colno}"
        if any(word in body for word in (b"NaN", b"Infinity")):
            reason += "; JSON has no NaN or Infinity; null stands for a missing value, in a feature that takes one"
        raise MalformedJson(reason) from error


def error_body(error: RequestError) -> bytes:
    """`{"error": "...", "code": "..."}`, the body of every answer that is not a success."""
    return orjson.dumps({"error": str(error), "code": error.code})
