"""Which versions of a model are to be live: what `--versions` says.

    latest                       the newest version that can be admitted, of each model
    latest:2                     the two newest
    credit=3,7                   of `credit` these and no others
    latest fraud=latest:3        several of those, between spaces: one without a name is for all other models

Rule 1: nothing here looks at a disk; a rule is asked version by version, newest first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, final

from service.errors import LoadRefused
from service.places import NAME_PATTERN, version_order

LATEST = "latest"

TORN = "not admitted: its files change while they are read; load it again"
"""Why a version is refused that is another one each time it is looked at."""


@final
@dataclass(frozen=True, slots=True)
class Latest:
    """So many of the newest that can be admitted."""

    count: int = 1
    names: frozenset[str] = frozenset()

    def wants(self, version: str, admitted: int) -> bool:
        """
        Args:
            admitted: so many newer ones are wanted and were admitted.
        """
        return admitted < self.count


@final
@dataclass(frozen=True, slots=True)
class Named:
    """These and no others."""

    names: frozenset[str]

    def wants(self, version: str, admitted: int) -> bool:
        return version in self.names


Rule = Latest | Named


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """A rule for each model."""

    others: Rule = Latest()
    by_model: Mapping[str, Rule] = field(default_factory=dict)

    def of(self, model: str) -> Rule:
        return self.by_model.get(model, self.others)


def parse(text: str) -> Policy:
    """
    Raises:
        ValueError: it is no policy; the sentence says which part, and what is wanted.

    >>> parse("latest:2 credit=3,7").of("credit")
    Named(names=frozenset({'3', '7'}))
    """
    others: Rule | None = None
    by_model: dict[str, Rule] = {}
    for part in text.split():
        model, named, rule = part.rpartition("=")
        if not named:
            if others is not None:
                raise ValueError(f"'{part}' is a second rule for all models; give one, and others as MODEL=RULE")
            others = _rule(rule, part, named=False)
        elif not NAME_PATTERN.fullmatch(model):
            raise ValueError(f"'{part}' begins with '{model}', which is no model's name; write MODEL=RULE")
        elif model in by_model:
            raise ValueError(f"'{part}' is a second rule for model '{model}'; give one")
        else:
            by_model[model] = _rule(rule, part, named=True)
    return Policy(others or Latest(), by_model)


def _rule(text: str, part: str, *, named: bool) -> Rule:
    kind, several, count = text.partition(":")
    if kind == LATEST and not several:
        return Latest()
    if kind == LATEST and count.isdecimal() and int(count) > 0:
        return Latest(int(count))
    versions = text.split(",")
    if named and all(map(NAME_PATTERN.fullmatch, versions)):
        return Named(frozenset(versions))
    raise ValueError(f"'{part}' is no rule for versions; write latest, latest:N, or MODEL=3,7 with a model's versions")


class Judged(Protocol):
    """A version that was looked at."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def ready(self) -> bool: ...


def refusal(found: Sequence[Judged], versions: Collection[str] | None) -> LoadRefused | None:
    """What is said to whoever had a model loaded; None if what was asked for is served.

    Args:
        found: newest first.
        versions: those that were to be looked at; None: the newest.
    """
    asked = found[:1] if versions is None else [one for one in found if one.version in versions]
    refused = [one for one in asked if not one.ready]
    if not refused:
        return None
    first, *more = refused
    also = "".join(f"; version {one.version} was {one.reason}" for one in more)
    serves = next((f"; version {one.version} is served" for one in found if one.ready), "")
    return LoadRefused(model=first.name, version=first.version, reason=first.reason + also + serves)


LookedAt = TypeVar("LookedAt", bound=Judged)


def settled(before: Sequence[LookedAt], new: Sequence[LookedAt], held: Collection[str]) -> tuple[LookedAt, ...]:
    """What a model is from now on: `new`; or where nothing of that is ready, it goes on as it was.

    Args:
        held: versions that an alias names, by now: one that is ready goes on, also if none named it when `new` was
            looked for.
    """
    now = {one.version for one in new if one.ready}
    stays = [one for one in before if one.ready and (not now or (one.version in held and one.version not in now))]
    return tuple(sorted([*new, *stays], key=lambda one: version_order(one.version), reverse=True))
