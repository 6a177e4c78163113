"""Names for versions: who gets what, and what lasts."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from service import aliases as aliasing
from service.aliases import FILE
from service.crew import Alone
from service.errors import WrongCall
from service.loading import loaded
from service.repository import Repository, load
from service.runtime import place
from service.settings import Settings
from tests.asking import ask
from tests.bundles import SAMPLE, write_table_bundle

ALIASES = "/v2/repository/models/table/aliases"
TENSORS = {
    "inputs": [
        {"name": "continuous", "shape": [1, 2], "datatype": "FP32", "data": [41, 2500]},
        {"name": "categorical", "shape": [1, 2], "datatype": "INT64", "data": [1, 1]},
    ]
}


def served(models: Path, versions: str = "latest:2") -> Repository:
    return load(models, place("cpu"), Settings(threads=1, max_batch_rows=8, versions=versions))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for version in ("1", "2", "3"):
        write_table_bundle(tmp_path / "models", name="table", version=version)
    return tmp_path / "models"


def answered_by(repository: Repository, version: str | None = None) -> Any:
    """The version that says it computed, or the code of the refusal."""
    path = "/v2/models/table/infer" if version is None else f"/v2/models/table/versions/{version}/infer"
    said = ask(repository, "POST", path, TENSORS).json()
    return said.get("model_version") or said["code"]


def test_a_request_gets_the_version_it_names(models: Path) -> None:
    repository = served(models)
    assert [answered_by(repository, version) for version in (None, "3", "2", "1")] == ["3", "3", "2", "unknown_version"]
    assert ask(repository, "POST", "/predict", SAMPLE).json()["version"] == "3"
    metadata = ask(repository, "GET", "/v2/models/table/versions/2").json()
    assert metadata["versions"] == ["2", "3"]
    assert (metadata["evalmode"]["version"], metadata["evalmode"]["aliases"]) == ("2", {})
    policy = ask(repository, "GET", "/v2/models/table/config").json()["version_policy"]
    assert policy == {"specific": {"versions": ["2", "3"]}}
    stats = ask(repository, "GET", "/v2/models/table/stats").json()["model_stats"]
    assert [(one["version"], one["inference_stats"]["success"]["count"]) for one in stats] == [("2", 1), ("3", 3)]
    assert "versions '2', '3' are served" in ask(repository, "GET", "/v2/models/table/versions/1").json()["error"]


def test_an_alias_is_set_moved_and_taken_away(models: Path) -> None:
    """Answers name the version, never the alias; `stable` is what callers get who name nothing."""
    repository = served(models)
    moved = ask(repository, "PUT", f"{ALIASES}/stable", {"version": "2"})
    assert moved.json() == {"model": "table", "alias": "stable", "version": "2", "survives_restart": True}
    assert ask(repository, "PUT", f"{ALIASES}/candidate", {"version": "3"}).status_code == 200
    assert [answered_by(repository, name) for name in (None, "stable", "candidate", "3")] == ["2", "2", "3", "3"]
    assert ask(repository, "POST", "/predict", SAMPLE).json()["version"] == "2"
    assert ask(repository, "GET", ALIASES).json() == {"aliases": {"stable": "2", "candidate": "3"}}
    assert ask(repository, "GET", "/v2/models/table/versions/candidate").json()["evalmode"]["version"] == "3"
    assert ask(repository, "PUT", f"{ALIASES}/stable", {"version": "3"}).status_code == 200
    assert answered_by(repository) == "3"
    removed = ask(repository, "DELETE", f"{ALIASES}/candidate")
    assert removed.json() == {"model": "table", "alias": "candidate", "survives_restart": True}
    assert answered_by(repository, "candidate") == "unknown_version"


@pytest.mark.parametrize(
    ("alias", "body", "code", "sentence"),
    [
        ("stable", {"version": "1"}, "unknown_version", "no live version '1'; versions '2', '3' are served"),
        (
            "stable",
            {"version": 3},
            "bad_request",
            "'version' of the body is the number 3, which does not fit: input should",
        ),
        ("stable", {}, "bad_request", "'version' of the body is missing, which does not fit: field required"),
        ("stable", b"", "bad_request", "'version' of the body is missing, which does not fit: field required"),
        (
            "stable",
            {"version": "3", "weight": 1},
            "bad_request",
            "'weight' of the body is the number 1, which does not fit: extra inputs",
        ),
        ("7", {"version": "3"}, "bad_request", "'7' cannot be an alias"),
        (".a", {"version": "3"}, "bad_request", "'.a' cannot be an alias"),
        ("a" * 65, {"version": "3"}, "bad_request", "cannot be an alias"),
    ],
)
def test_what_cannot_be_an_alias_is_a_sentence(models: Path, alias: str, body: Any, code: str, sentence: str) -> None:
    repository = served(models)
    response = ask(repository, "PUT", f"{ALIASES}/{alias}", body)
    assert response.json()["code"] == code
    assert sentence in response.json()["error"]
    assert repository.aliases("table") == {}


def test_a_version_is_no_alias(models: Path) -> None:
    write_table_bundle(models, name="table", version="spring")
    repository = served(models, "table=2,spring")
    response = ask(repository, "PUT", f"{ALIASES}/spring", {"version": "2"})
    assert "'spring' is a version of model 'table'" in response.json()["error"]


def test_what_is_not_there_is_not_found(models: Path) -> None:
    repository = served(models)
    unknown = ask(repository, "DELETE", f"{ALIASES}/stable")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_alias")
    for method in ("GET", "PUT", "DELETE"):
        path = "/v2/repository/models/nobody/aliases" + ("" if method == "GET" else "/stable")
        response = ask(repository, method, path, {"version": "2"} if method == "PUT" else b"")
        assert (response.status_code, response.json()["code"]) == (404, "unknown_model")


def test_aliases_are_set_where_models_are_loaded(models: Path) -> None:
    repository, far = served(models), Settings(host="0.0.0.0")
    for method in ("PUT", "DELETE"):
        response = ask(repository, method, f"{ALIASES}/stable", {"version": "2"}, settings=far)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert ask(repository, "GET", ALIASES, settings=far).status_code == 200


def test_what_an_alias_names_stays_live(models: Path) -> None:
    """When a newer version comes, and after a restart; it goes with the first load after it has lost its name."""
    repository = served(models, "latest")
    crew = Alone(repository)
    asyncio.run(crew.move_alias("table", "stable", "3"))
    write_table_bundle(models, name="table", version="4")
    asyncio.run(crew.load("table", {"4"}))
    assert (repository.versions("table"), repository.live("table").version) == (["3", "4"], "3")
    again = served(models, "latest")
    assert (again.versions("table"), again.live("table").version) == (["3", "4"], "3")
    crew = Alone(again)
    asyncio.run(crew.move_alias("table", "stable", "4"))
    assert again.versions("table") == ["3", "4"]  # to go back takes no loading
    asyncio.run(crew.load("table"))
    assert again.versions("table") == ["4"]


def test_an_alias_without_its_version_is_not_another(models: Path) -> None:
    """Who asks for `stable`, or for nothing, is told; who names a version is answered."""
    (models / "table" / FILE).write_text('{"stable": "9"}')
    repository = served(models)
    assert [answered_by(repository, name) for name in (None, "stable", "3")] == ["not_ready", "not_ready", "3"]
    said = ask(repository, "POST", "/v2/models/table/infer", TENSORS).json()["error"]
    assert "alias 'stable' of model 'table' is version 9, which is not live" in said
    index = {one["version"]: one["reason"] for one in ask(repository, "POST", "/v2/repository/index").json()}
    assert "not found in its folder" in index["9"]


def test_an_alias_whose_version_is_gone_keeps_no_service_from_starting(models: Path) -> None:
    """Who names the other version is answered; the alias can be moved, and everybody is told that it has to be."""
    shutil.rmtree(models / "table" / "1")
    (models / "table" / FILE).write_text('{"stable": "1"}')
    repository = loaded(models, Settings(threads=1, max_batch_rows=8))
    assert answered_by(repository, "3") == "3"
    refused = ask(repository, "POST", "/predict", SAMPLE)
    assert (refused.status_code, answered_by(repository)) == (503, "not_ready")
    assert "alias 'stable' of model 'table' is version 1, which is not live" in refused.json()["error"]
    (missing,) = [entry.reason for entry in repository.entries if not entry.ready]
    assert missing.startswith("not found in its folder, but the alias 'stable' (aliases.json) names it")
    assert ask(repository, "PUT", f"{ALIASES}/stable", {"version": "3"}).status_code == 200
    assert answered_by(repository) == "3"


def test_aliases_outlive_the_process(models: Path) -> None:
    asyncio.run(Alone(served(models)).move_alias("table", "stable", "2"))
    assert json.loads((models / "table" / FILE).read_text()) == {"stable": "2"}
    assert served(models).live("table").version == "2"


def test_where_nothing_can_be_written_they_hold_until_the_end(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is mounted to be read, or a single bundle."""

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(aliasing, "write_whole", read_only)
    repository = served(models)
    moved = ask(repository, "PUT", f"{ALIASES}/stable", {"version": "2"}).json()
    assert (moved["survives_restart"], answered_by(repository)) == (False, "2")
    assert f"aliases of model 'table' hold until the service ends: '{models / 'table' / FILE}' cannot" in caplog.text
    assert ask(repository, "DELETE", f"{ALIASES}/stable").json()["survives_restart"] is False
    alone = served(models / "table" / "1")
    assert ask(alone, "PUT", f"{ALIASES}/stable", {"version": "1"}).json()["survives_restart"] is False


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"stable": 2}', b"\xff"])
def test_aliases_that_cannot_be_read_are_not_left_out(models: Path, content: bytes) -> None:
    """Callers who name nothing would get another version."""
    (models / "table" / FILE).write_bytes(content)
    with pytest.raises(WrongCall, match=r"does not tell the aliases of model 'table': .* Repair it, or remove it"):
        served(models)


def test_an_alias_is_moved_while_another_version_is_admitted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait, and what it names goes on, though the admission began without knowing of it."""
    repository = served(models)  # 2 and 3
    write_table_bundle(models, name="table", version="4")
    write_table_bundle(models, name="table", version="5")
    admitting, moved = threading.Event(), threading.Event()
    admit = repository.admit

    def slow(*asked: Any) -> Any:
        entries = admit(*asked)
        admitting.set()
        assert moved.wait(20)
        return entries

    monkeypatch.setattr(repository, "admit", slow)

    async def scenario() -> None:
        crew = Alone(repository)
        loading = asyncio.create_task(crew.load("table"))
        await asyncio.to_thread(admitting.wait, 20)
        await asyncio.wait_for(crew.move_alias("table", "stable", "2"), 5)
        assert repository.live("table").version == "2"
        moved.set()
        await loading

    asyncio.run(scenario())
    assert repository.versions("table") == ["2", "4", "5"]
    assert answered_by(repository) == "2"
