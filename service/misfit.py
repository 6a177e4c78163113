"""The first thing in a document that does not fit, as pydantic found it, for sentences of our own."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError

from service.errors import ABSENT


class Misfit(NamedTuple):
    """Where it is, and what is wrong with it."""

    where: str
    """Names and indices, between dots; empty if it is the whole."""
    why: str
    """Begins in lower case: `input should be a valid string`."""
    got: object
    """`ABSENT` where something is missing."""


def first_misfit(error: ValidationError) -> Misfit:
    first = error.errors()[0]
    raised = first.get("ctx", {}).get("error")  # by a validator of ours; pydantic writes its class before its sentence
    why = str(raised) if isinstance(raised, ValueError) else first["msg"][:1].lower() + first["msg"][1:]
    got = ABSENT if first["type"] == "missing" else first["input"]
    return Misfit(".".join(str(part) for part in first["loc"]), why, got)
