"""Everything that can be refused, with its status and code.

The sentence names what, got, wanted, and what to do. A test compares this drawing with the classes and the README.

    EvalmodeError
    ├── WrongCall                                     the command line was wrong (exit code 2)
    ├── Refused                                       the answer is no (exit code 1)
    │   ├── AdmissionRefused                          a bundle did not pass a door
    │   └── DeviceUnavailable                         --device cuda without a usable GPU
    └── RequestError
        ├── BadRequest               400 bad_request
        │   ├── MalformedJson        400 malformed_json
        │   ├── DuplicateKey         400 duplicate_key
        │   ├── MalformedBinary      400 malformed_binary
        │   ├── NeedsBinary          400 needs_binary
        │   ├── MalformedCompression 400 malformed_compression
        │   ├── WrongType            400 wrong_type
        │   ├── OutOfRange           400 out_of_range
        │   ├── NotUtf8              400 not_utf8
        │   ├── MissingFeature       400 missing_feature
        │   ├── UnknownFeature       400 unknown_feature
        │   ├── MissingTensor        400 missing_tensor
        │   ├── UnknownTensor        400 unknown_tensor
        │   ├── DatatypeMismatch     400 datatype_mismatch
        │   ├── ShapeMismatch        400 shape_mismatch
        │   ├── RowsRejected         400 rows_rejected
        │   ├── LoadRefused          400 load_refused
        │   ├── NotFinite            400 not_finite
        │   └── SeveralFaults        400 several_faults
        ├── Unauthorized             401 unauthorized
        ├── Forbidden                403 forbidden
        ├── NotFound                 404 not_found
        │   ├── UnknownModel         404 unknown_model
        │   ├── UnknownVersion       404 unknown_version
        │   └── UnknownAlias         404 unknown_alias
        ├── MethodNotAllowed         405 method_not_allowed
        ├── RequestTooSlow           408 request_too_slow
        ├── BodyTooLarge             413 body_too_large
        ├── UnsupportedMediaType     415 unsupported_media_type
        ├── UnsupportedEncoding      415 unsupported_encoding
        ├── QueueFull                429 queue_full
        ├── ServerFull               429 server_full
        ├── HeadersTooLarge          431 headers_too_large
        ├── ClientLeft               499 client_left
        ├── NotReady                 503 not_ready
        ├── DeadlineExceeded         504 deadline_exceeded
        └── Internal                 500 internal
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, Final

STOPPING = "the service is being stopped"


class EvalmodeError(Exception):
    """The root: its text is a sentence for a person, never a traceback."""


class WrongCall(EvalmodeError):
    """The command line, a setting or an argument cannot be meant."""


class Refused(EvalmodeError):
    """The question was understood and the answer is no."""


class AdmissionRefused(Refused):
    """A bundle did not pass one of the four doors; `door` says which."""

    def __init__(self, door: str, reason: str) -> None:
        self.door = door
        self.reason = printable(reason)
        super().__init__(f"refused at the {door} door: {self.reason}")


class DeviceUnavailable(Refused):
    """The device asked for cannot run models here."""


class RequestError(EvalmodeError):
    """A request that gets an answer other than 200."""

    status: ClassVar[int]
    code: ClassVar[str]


class BadRequest(RequestError):
    """The request is malformed or does not fit."""

    status = 400
    code = "bad_request"


class MalformedJson(BadRequest):
    """The body is not JSON."""

    code = "malformed_json"

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the body is not valid JSON: {reason}")


class DuplicateKey(BadRequest):
    """An object in the JSON has a key twice, and nobody can say which value is meant."""

    code = "duplicate_key"

    def __init__(self, *, key: str) -> None:
        super().__init__(f"the body has the key '{clipped(key)}' twice in one object; send it once")


class MalformedBinary(BadRequest):
    """The binary tensors do not fill the body as its header and its JSON say."""

    code = "malformed_binary"


class NeedsBinary(BadRequest):
    """A tensor that JSON cannot hold, such as one of 16-bit floats."""

    code = "needs_binary"

    def __init__(self, *, tensor: str, datatype: str, kind: str) -> None:
        how = (
            "send its bytes after the JSON, with 'binary_data_size' in its parameters and the header "
            "Inference-Header-Content-Length"
            if kind == "input"
            else "ask for it with the parameter 'binary_data': true"
        )
        super().__init__(f"{kind} '{tensor}' is {datatype}, which has no JSON form; {how}")


class MalformedCompression(BadRequest):
    """The body is not what its Content-Encoding says."""

    code = "malformed_compression"

    def __init__(self, *, encoding: str) -> None:
        super().__init__(f"the body is not whole, valid {encoding}, as its Content-Encoding says")


class WrongType(BadRequest):
    """A value has another JSON type than the model takes there."""

    code = "wrong_type"

    def __init__(self, *, what: str, got: object, want: str) -> None:
        super().__init__(f"{what} is {describe(got)}; it takes {want}")


class OutOfRange(BadRequest):
    """A number that the tensor's datatype cannot hold."""

    code = "out_of_range"

    def __init__(self, *, what: str, got: object, want: str) -> None:
        super().__init__(f"{what} is {got}, which is out of range; it takes {want}")


class NotUtf8(BadRequest):
    """An element of a BYTES tensor is not text; string tensors of ONNX hold UTF-8."""

    code = "not_utf8"

    def __init__(self, *, tensor: str, position: int) -> None:
        super().__init__(f"an element of input '{tensor}' is not UTF-8 from its byte {position} on")


class MissingFeature(BadRequest):
    """A named feature that the model needs is not in the sample."""

    code = "missing_feature"

    def __init__(self, *, feature: str, want: str) -> None:
        super().__init__(f"feature '{feature}' is missing; it takes {want}")


class UnknownFeature(BadRequest):
    """The sample names a feature the model does not have."""

    code = "unknown_feature"

    def __init__(self, *, feature: str, similar: str | None, features: Sequence[str]) -> None:
        hint = f"did you mean '{similar}'?" if similar else f"it takes {listing(features)}"
        super().__init__(f"the model has no feature '{clipped(feature)}'; {hint}")


class MissingTensor(BadRequest):
    """An input tensor of the graph is not in the request."""

    code = "missing_tensor"

    def __init__(self, *, tensor: str) -> None:
        super().__init__(f"input '{tensor}' is missing; send it with name, shape, datatype and data")


class UnknownTensor(BadRequest):
    """The request names an input or output the graph does not have."""

    code = "unknown_tensor"

    def __init__(self, *, kind: str, tensor: str, tensors: Iterable[str]) -> None:
        super().__init__(f"the model has no {kind} '{clipped(tensor)}'; it has {listing(tensors)}")


class DatatypeMismatch(BadRequest):
    """The tensor is well formed, but its datatype is not the model's."""

    code = "datatype_mismatch"

    def __init__(self, *, tensor: str, got: object, want: str) -> None:
        datatype = clipped(got) if isinstance(got, str) else describe(got)
        has = "no datatype" if got is ABSENT else f"datatype {datatype}"
        super().__init__(f"input '{tensor}' has {has}; the model takes {want}")


class ShapeMismatch(BadRequest):
    """The tensor is well formed, but not for this model, or its data do not fill its shape."""

    code = "shape_mismatch"

    def __init__(self, *, tensor: str, got: str, want: str) -> None:
        super().__init__(f"input '{tensor}' has {got}; the model takes {want}")


class RowsRejected(BadRequest):
    """The tensors fit the signature, but the graph cannot compute with their values."""

    code = "rows_rejected"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model cannot take these values: {clipped(reason, 300)}")


class NotFinite(BadRequest):
    """The network overflowed on a sample of named features; for tensors, such an output is null."""

    code = "not_finite"

    def __init__(self) -> None:
        super().__init__(
            "the model's answer is not a finite number; a value in the sample is too large for the network"
        )


class SeveralFaults(BadRequest):
    """More than one thing is wrong with a sample: all of them in one answer."""

    code = "several_faults"

    def __init__(self, faults: Sequence[RequestError]) -> None:
        shown = "; ".join(f"({i}) {fault}" for i, fault in enumerate(faults[:10], start=1))
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        super().__init__(f"the sample does not fit in {len(faults)} places: {shown}{more}")


class LoadRefused(BadRequest):
    """The version that was to be loaded did not pass admission; what was served before goes on."""

    code = "load_refused"

    def __init__(self, *, model: str, version: str, reason: str) -> None:
        super().__init__(f"version {version} of model '{model}' was {reason}")


class Unauthorized(RequestError):
    """No API key came, or none that is known here; nothing was read of the request but its head."""

    status = 401
    code = "unauthorized"

    def __init__(self, *, presented: bool) -> None:
        what = "the API key is not known here" if presented else "this takes an API key"
        super().__init__(f"{what}; send one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")


class Forbidden(RequestError):
    """The API key lacks the right; or there are no keys, and this is for the machine itself."""

    status = 403
    code = "forbidden"


class NotFound(RequestError):
    """There is no such route."""

    status = 404
    code = "not_found"


class UnknownModel(NotFound):
    """No model of this name is served."""

    code = "unknown_model"

    def __init__(self, *, model: str, models: Sequence[str], why: str = "") -> None:
        """
        Args:
            why: what lies in its place, and what is wrong with it.
        """
        said = f"; {why}" if why else ""
        super().__init__(f"no model '{clipped(model)}' is served here{said}; served: {listing(models) or 'none'}")


class UnknownVersion(NotFound):
    """The model is served, but not in this version."""

    code = "unknown_version"

    def __init__(self, *, model: str, version: str, serving: Collection[str]) -> None:
        number, verb = ("versions", "are") if len(serving) > 1 else ("version", "is")
        served = f"{number} {listing(serving)} {verb} served" if serving else "none is served"
        super().__init__(
            f"model '{model}' has no live version '{clipped(version)}'; {served}, and the setting 'versions' says "
            "which of those in its folder are"
        )


class UnknownAlias(NotFound):
    """The model has no such alias."""

    code = "unknown_alias"

    def __init__(self, *, model: str, alias: str, aliases: Iterable[str]) -> None:
        super().__init__(f"model '{model}' has no alias '{clipped(alias)}'; it has {listing(aliases) or 'none'}")


class MethodNotAllowed(RequestError):
    """The route exists, for another method."""

    status = 405
    code = "method_not_allowed"


class RequestTooSlow(RequestError):
    """The request began and did not arrive in time; the connection is closed."""

    status = 408
    code = "request_too_slow"

    def __init__(self) -> None:
        super().__init__("the request did not arrive in time; send it again, whole")


class BodyTooLarge(RequestError):
    """The body is larger than the limit; it is not read to its end."""

    status = 413
    code = "body_too_large"

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"the body is larger than {limit_bytes} bytes; send a smaller one, or raise EVALMODE_BODY_LIMIT_BYTES"
        )


class UnsupportedMediaType(RequestError):
    """The body is declared as something other than JSON."""

    status = 415
    code = "unsupported_media_type"

    def __init__(self, got: str) -> None:
        super().__init__(f"the content type is '{clipped(got)}'; this route takes 'application/json'")


class UnsupportedEncoding(RequestError):
    """The body is compressed in a way that is not understood here."""

    status = 415
    code = "unsupported_encoding"

    def __init__(self, got: str) -> None:
        super().__init__(f"the content encoding is '{clipped(got)}'; this route takes gzip, deflate or none")


class QueueFull(RequestError):
    """More waits than can be answered in time; nothing was computed, and Retry-After says when to come again."""

    status = 429
    code = "queue_full"

    def __init__(self, *, rows: int, wait_s: float, bound: str) -> None:
        self.retry_after_s = max(1, math.ceil(wait_s))
        work = f", about {wait_s:.2f} s of work" if wait_s else ""
        super().__init__(f"{rows} rows are waiting already{work}; {bound}; try again in {self.retry_after_s} s")


class ServerFull(RequestError):
    """Bodies of others on their way leave no room, with answers that are not read among them.

    The connection is closed if its own body was being read.
    """

    status = 429
    code = "server_full"
    retry_after_s = 1

    def __init__(self, *, called: str, held_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"{held_bytes} bytes of other {called} are on their way, of {max_bytes} that may be (the setting "
            f"'max_reading_bytes'); try again in {self.retry_after_s} s"
        )


class HeadersTooLarge(RequestError):
    """The head of the request is larger than any that is meant; the connection is closed."""

    status = 431
    code = "headers_too_large"

    def __init__(self, *, url_bytes: int, headers: int, head_bytes: int) -> None:
        super().__init__(
            f"the head of the request is too large; it takes a URL of at most {url_bytes} bytes and {headers} headers, "
            f"{head_bytes} bytes together"
        )


class ClientLeft(RequestError):
    """The caller hung up before its answer was computed; nobody reads this, it is for statistics and logs."""

    status = 499  # not registered; nginx's name for it
    code = "client_left"

    def __init__(self) -> None:
        super().__init__("the client left before its answer was computed")


class NotReady(RequestError):
    """The model is known, but nothing of it passed admission."""

    status = 503
    code = "not_ready"


TIME = "the time of this request ('timeout' in it, in microseconds, or else the setting 'timeout_s')"


class DeadlineExceeded(RequestError):
    """The time that the caller gave was over before there was an answer; what was not computed by then is not."""

    status = 504
    code = "deadline_exceeded"

    def __init__(self, *, began: bool = False) -> None:
        """
        Args:
            began: some of it was computed, or was being computed.
        """
        super().__init__(
            f"{TIME} passed while it was computed; send fewer rows at a time, or give it longer"
            if began
            else f"{TIME} passed while it waited, so it was not computed; send it again later"
        )


class Internal(RequestError):
    """Ours, not the client's; the traceback is in the log beside the request id."""

    status = 500
    code = "internal"

    def __init__(self) -> None:
        super().__init__("the server failed; the log has the reason under this request id")


ABSENT: Final = object()
"""What stands under a key that is not there; null is something else."""

_SHOWN = 60
"""Characters of a list or an object, of which the rest is not even written."""


def describe(value: object) -> str:
    """A JSON value in words, short enough for a sentence: `the string 'abc'`, `null`, `the list [2, -3]`, `missing`."""
    if value is ABSENT:
        return "missing"
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {clipped(str(value))}"
        case str():
            return f"the string '{clipped(value)}'"
        case list():
            return f"the list {_beginning(value)}"
        case dict():
            return f"the object {_beginning(value)}"
        case _:
            return f"a {type(value).__name__}"


def _beginning(value: object) -> str:
    """The JSON of a list or an object, written until it is long enough."""
    written = ""
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        written += part
        if len(written) > _SHOWN:
            break
    return clipped(written, _SHOWN)


def clipped(text: str, length: int = 80) -> str:
    """At most `length` characters of what a client sent, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def listing(names: Iterable[str], most: int = 30) -> str:
    """`'a', 'b', 'c'`, cut after `most` names."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def printable(text: str) -> str:
    """With what a terminal or a log would obey written out: a file may have any name inside it."""
    return "".join(it if it.isprintable() else it.encode("unicode_escape").decode() for it in text)


def first_line(error: Exception) -> str:
    """The first line of what a library raised: the part of it that fits a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
