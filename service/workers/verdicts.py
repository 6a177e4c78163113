"""What became of a version of a model, in words that every process understands, and what several make of theirs.

Rule 1: all processes end in the same state: what each of them admitted is served by all, anything else by none.
Rule 2: a version is the same in two processes only if its files were the same, byte for byte.
Rule 3: nothing here reads files or knows an engine; a verdict crosses between processes as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

from service.places import version_order
from service.policy import TORN


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A version that was looked at: an `Entry` without what only its own process can hold."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of all its files, by path inside, where it is ready."""

    @property
    def ready(self) -> bool:
        return self.state == "READY"


def joint(found: Sequence[Sequence[Verdict]]) -> tuple[Verdict, ...]:
    """What all processes will hold a model to be: what all made of it, or where they differ, what any refused.

    Args:
        found: for each process, at least one, what it made of the model, newest first.
    """
    first = found[0]
    if all(_essence(other) == _essence(first) for other in found):
        return tuple(first)
    refused = {verdict.version: verdict for verdicts in reversed(found) for verdict in verdicts if not verdict.ready}
    if refused:
        return tuple(sorted(refused.values(), key=lambda verdict: version_order(verdict.version), reverse=True))
    newest = next(verdict for verdicts in found for verdict in verdicts)
    return (replace(newest, state="UNAVAILABLE", reason=TORN, digests={}),)


def _essence(verdicts: Sequence[Verdict]) -> list[tuple[str, str, Mapping[str, str]]]:
    """All but the reason, which may have a figure that is measured anew each time."""
    return [(verdict.version, verdict.state, verdict.digests) for verdict in verdicts]
