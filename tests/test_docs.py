"""What the README states and the code knows is the same; a failing test prints the text that is wanted."""

from __future__ import annotations

import ast
import inspect
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import export.audit
from export.audit import RULES
from service import errors
from service.app import create_app
from service.bodies import RATE_BYTES_S
from service.connection import BEGIN_S
from service.errors import RequestError
from service.repository import Repository
from service.runtime import place
from service.settings import Settings
from service.unread import HURRIED_S, UNREAD_S

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no block '{name}'"
    return found[1]


def request_errors() -> list[type[RequestError]]:
    found = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, RequestError)]
    return sorted((error for error in found if error is not RequestError), key=lambda error: (error.status, error.code))


def test_the_table_of_errors() -> None:
    rows = [f"| {e.status} | `{e.code}` | {(inspect.getdoc(e) or '').splitlines()[0]} |\n" for e in request_errors()]
    assert block("errors") == "".join(rows)


def test_the_table_of_settings() -> None:
    rows = [
        f"| `--{name.replace('_', '-')}` | `EVALMODE_{name.upper()}` | `{field.default}` | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    ]
    assert block("settings") == "".join(rows)


def test_every_route_is_in_the_readme() -> None:
    empty = Repository([], path=Path(), placement=place("cpu"), settings=Settings())
    app = create_app(empty, Settings())._rest
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}  # type: ignore[attr-defined]
    documented = {path for path in routes if "/versions/" not in path and path != "/"}
    assert len(documented) >= 7
    for path in documented:
        assert path.replace("{model}", "{m}") in README, path


def test_how_long_a_client_is_waited_for() -> None:
    said = in_one_line(README)
    assert f"here {BEGIN_S:g} s after it began, and a second more for each {RATE_BYTES_S // 1024} KiB" in said
    assert f"given up after {UNREAD_S:g} s, or after {HURRIED_S:g} s while others need the room" in said


def test_the_alerts_are_counted() -> None:
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text(encoding="utf-8")
    count = ["eleven", "twelve", "thirteen", "fourteen"][rules.count("- alert:") - 11]
    assert f"has {count} alerts" in in_one_line(README)
    assert f"for the {count} alerts" in in_one_line((ROOT / "deploy" / "README.md").read_text(encoding="utf-8"))


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert named <= targets
    assert {"serve", "test", "demo"} <= named


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "DECISIONS.md",
        "CHANGELOG.md",
        "deploy/README.md",
        "docs/rules/README.md",
        "docs/threat-model.md",
        "docs/promises.md",
    ],
)
def test_links_lead_somewhere(file: str) -> None:
    folder = (ROOT / file).parent
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / file).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_the_threat_model_names_what_is_there() -> None:
    """Each protection by the file that does it and the test that shows it."""
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:service|tests)/[\w/.]*)`", page)
    assert len(set(named)) > 15
    for file in named:
        assert (ROOT / file).exists(), file
    for file in re.findall(r"`(test_\w+\.py)`", page):
        assert (ROOT / "tests" / "service" / file).exists(), file


def test_every_promise_has_its_source_and_a_test_that_holds_it() -> None:
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 21)]
    for number, row in rows:
        assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+\)", row), number
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, number
        for file, name in tests:
            there = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            assert name in {node.name for node in there if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def failure_modes() -> list[tuple[str, list[str]]]:
    """The audit's own table: each failure mode with its rules."""
    found = re.findall(r"^ *(F\d+) +(.+?)  +((?:BN\d{3}(?:, )?)+)$", export.audit.__doc__ or "", re.MULTILINE)
    return [(f"{mode}: {what}", rules.split(", ")) for mode, what, rules in found]


def test_the_index_of_the_rules() -> None:
    """Every rule with its page, and every failure mode with its rules."""
    index = (ROOT / "docs" / "rules" / "README.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"| [{rule.id}]({rule.id}.md) | {rule.severity} | {rule.title} |\n" in index, rule.id
    for mode, rules in failure_modes():
        assert f"| {mode} | {', '.join(f'[{rule}]({rule}.md)' for rule in rules)} |\n" in index, mode
    assert len(failure_modes()) == 19
    assert f"[{len(RULES)} rules](docs/rules/README.md)" in README


def test_every_verb_is_in_the_readme() -> None:
    verbs = {entry.name for entry in entry_points(group="evalmode.verbs")} | {"serve", "predict"}
    assert len(verbs) >= 10
    for verb in verbs:
        assert f"evalmode {verb}" in README, verb
