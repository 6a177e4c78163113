"""What an audit says: rules, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from export.audit.facts import Facts, NormFacts

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The gravest first. An error makes answers wrong, a warning may, and an info is worth knowing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a check saw, before the rule gives it its id."""

    severity: Severity
    message: str
    """One sentence with the layers and the figures."""
    layers: tuple[str, ...] = ()
    """Every layer concerned, in the network's order; empty where it is the network as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A fault, or something worth knowing, in one sentence."""

    rule: str
    severity: Severity
    layer: str
    """The first layer concerned; empty where it is the network as a whole."""
    message: str
    layers: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """The page with symptom, cause and fix, from the root of the project."""
        return help_page(self.rule)


Check = Callable[[Facts], Iterator[Found]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One failure mode that a machine can see."""

    id: str
    title: str
    severity: Severity
    """Of its gravest finding; a finding may be milder where the figures are."""
    check: Check

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """Apply the rule."""
        for found in self.check(facts):
            yield Finding(
                rule=self.id,
                severity=found.severity,
                layer=found.layers[0] if found.layers else "",
                message=found.message,
                layers=found.layers,
            )


def help_page(rule: str) -> str:
    """Where a rule is explained, from the root of the project."""
    return f"docs/rules/{rule}.md"


def names(norms: Sequence[NormFacts]) -> tuple[str, ...]:
    """The layers' names."""
    return tuple(norm.layer for norm in norms)


def subject(norms: Sequence[NormFacts], facts: Facts) -> str:
    """The layers as the subject of a sentence: `layer 'a' (1 of 7)`, or `3 of 7 layers ('a', 'b', 'c')`."""
    return subject_of(names(norms), len(facts.norms))


def subject_of(layers: Sequence[str], total: int) -> str:
    """Like `subject`, for bare names."""
    if len(layers) == 1:
        return f"layer '{layers[0]}' (1 of {total})"
    shown = ", ".join(f"'{layer}'" for layer in layers[:3])
    more = ", ..." if len(layers) > 3 else ""
    return f"{len(layers)} of {total} layers ({shown}{more})"


def verb(norms: Sequence[object], one: str, several: str) -> str:
    """The verb that goes with `subject`."""
    return one if len(norms) == 1 else several


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 channel`, `3 channels`, `3 batches`."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"
