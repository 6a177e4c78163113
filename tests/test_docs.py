"""What the README states and the code knows is the same; a failing test prints the text that is wanted."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from service import errors
from service.app import create_app
from service.errors import RequestError
from service.repository import Repository
from service.settings import Settings

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
    app = create_app(Repository([]), Settings())._rest
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}  # type: ignore[attr-defined]
    documented = {path for path in routes if "/versions/" not in path and path != "/"}
    assert len(documented) >= 7
    for path in documented:
        assert path.replace("{model}", "{m}") in README, path


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert named <= targets
    assert {"serve", "test", "demo"} <= named


@pytest.mark.parametrize("file", ["README.md", "DECISIONS.md", "CHANGELOG.md", "deploy/README.md"])
def test_links_lead_somewhere(file: str) -> None:
    folder = (ROOT / file).parent
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / file).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (folder / target).exists(), target
