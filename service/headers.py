"""The headers of a request, and what is read of them everywhere: its length, its id, its trace."""

from __future__ import annotations

import itertools
import re
import secrets
import sys
from collections.abc import Sequence

Headers = dict[bytes, bytes]
"""Of a request, by name in lower case."""

REQUEST_ID = b"x-request-id"

_REQUEST_ID_TAKEN = re.compile(rb"[\x21-\x7e]{1,128}")
_ID_PREFIX = secrets.token_hex(6).encode()
_id_numbers = itertools.count(1)
_TRACE = (("traceparent", b"traceparent"), ("tracestate", b"tracestate"))
_UNSAMPLED = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][02468ace]")


def headers_by_name(pairs: Sequence[tuple[bytes, bytes]]) -> Headers:
    """One that was sent twice is joined by commas (RFC 9110, section 5.2), and then means what that means."""
    headers = dict(pairs)
    if len(headers) < len(pairs):
        headers = {name: b", ".join([value for other, value in pairs if other == name]) for name in headers}
    return headers


def declared_bytes(headers: Headers) -> int | None:
    """What Content-Length says; None without it, or if it is no number."""
    declared = headers.get(b"content-length", b"")
    if not declared.isdigit():
        return None
    return int(declared) if len(declared) <= 18 else sys.maxsize


def names_one_host(headers: Headers) -> bool:
    """As HTTP/1.1 wants it (RFC 9112, section 3.2): no host has a comma in it, and two are joined by one."""
    host = headers.get(b"host")
    return host is not None and b"," not in host


def request_id(headers: Headers) -> bytes:
    """The caller's if it gave one, else one that no other process makes; random bytes for each would cost a system
    call."""
    given = headers.get(REQUEST_ID)
    if given and _REQUEST_ID_TAKEN.fullmatch(given):
        return given
    return b"%b-%x" % (_ID_PREFIX, next(_id_numbers))


def traced(headers: Headers) -> dict[str, str]:
    """What the caller says of its trace (W3C Trace Context)."""
    return {name: headers[key].decode("latin-1") for name, key in _TRACE if key in headers}


def is_unsampled(headers: Headers) -> bool:
    """The caller has a trace that is recorded nowhere: the last bit of its flags is 0 (W3C Trace Context, 3.2.2.5)."""
    traceparent = headers.get(b"traceparent")
    return traceparent is not None and _UNSAMPLED.fullmatch(traceparent) is not None
