"""What `--versions` says, and what a caller hears of versions that were refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.policy import Latest, Named, Policy, parse, refusal
from service.settings import Settings
from service.workers.verdicts import Verdict


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", Policy()),
        ("latest", Policy(Latest(1))),
        ("latest:3", Policy(Latest(3))),
        ("credit=3,7", Policy(Latest(1), {"credit": Named(frozenset({"3", "7"}))})),
        ("credit=spring", Policy(Latest(1), {"credit": Named(frozenset({"spring"}))})),
        (
            "credit=3  latest:2 fraud=latest:4",
            Policy(Latest(2), {"credit": Named(frozenset({"3"})), "fraud": Latest(4)}),
        ),
    ],
)
def test_a_policy_is_read(text: str, policy: Policy) -> None:
    assert parse(text) == policy


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latest:0", "'latest:0' is no rule for versions; write latest, latest:N"),
        ("latest:", "'latest:' is no rule"),
        ("newest", "'newest' is no rule"),
        ("3,7", "'3,7' is no rule"),
        ("credit=", "'credit=' is no rule"),
        ("credit=3,,7", "'credit=3,,7' is no rule"),
        ("credit:3,7", "'credit:3,7' is no rule"),
        ("=3", "begins with '', which is no model's name"),
        (".credit=3", "begins with '.credit', which is no model's name"),
        ("credit=3 credit=7", "'credit=7' is a second rule for model 'credit'"),
        ("latest latest:2", "'latest:2' is a second rule for all models"),
    ],
)
def test_what_is_no_policy_is_a_sentence(text: str, sentence: str) -> None:
    """At the start, as of any other setting."""
    with pytest.raises(ValidationError) as raised:
        Settings(versions=text)
    assert sentence in str(raised.value)


def verdict(version: str, reason: str = "") -> Verdict:
    return Verdict(name="net", version=version, state="UNAVAILABLE" if reason else "READY", reason=reason)


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        (None, None),
        ({"2"}, "version 2 of model 'net' was refused; version 3 is served"),
        ({"3", "2", "1"}, "version 2 of model 'net' was refused; version 1 was cut short; version 3 is served"),
        (set(), None),
    ],
)
def test_a_refusal_is_of_what_was_asked_for(versions: set[str] | None, sentence: str | None) -> None:
    """By request the newest, by the folder whatever changed in it; and what is served all the same is said."""
    said = refusal([verdict("3"), verdict("2", "refused"), verdict("1", "cut short")], versions)
    assert (str(said) if said else None) == sentence
