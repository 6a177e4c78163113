"""What lies in the folder of models and can be no version, and that it hides nothing that can."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from service import management
from service.errors import UnknownModel, WrongCall
from service.places import MODEL_FILE, Layout, Misplaced, find, layout, misplaced
from service.repository import load
from service.runtime import place
from service.settings import Settings
from tests import graphs
from tests.asking import ask, loaded, talk
from tests.bundles import write_table_bundle


def folder(models: Path, name: str) -> Path:
    (models / name).mkdir(parents=True)
    return models / name


def file(models: Path, name: str) -> None:
    (models / name).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(graphs.batchnorm_model(), models / name)


ODD: list[tuple[str, Callable[[Path], Any], str, str, str]] = [
    ("an empty folder", lambda m: folder(m, "net"), "net", "", "it holds no version; put one at net/1/model.onnx"),
    ("a folder of other things", lambda m: folder(m, "docs/pictures"), "docs", "pictures", "it holds no model.onnx"),
    ("a name with spaces", lambda m: file(m, "my net/1/model.onnx"), "my net", "", "this cannot be a model's name"),
    ("a name of Chinese", lambda m: file(m, "模型/1/model.onnx"), "模型", "", "this cannot be a model's name"),
    ("a name with a line in it", lambda m: folder(m, "a\nb"), "a\\nb", "", "this cannot be a model's name"),
    ("a name of no text", lambda m: folder(m, os.fsdecode(b"a\xff")), "a\\udcff", "", "this cannot be a model's name"),
    ("a very long name", lambda m: folder(m, "+" * 255), "+" * 255, "", "this cannot be a model's name"),
    ("a file", lambda m: file(m, "my net.onnx"), "my net.onnx", "", "put it at NAME/VERSION/model.onnx, such as"),
    ("a file without an end", lambda m: file(m, "net"), "net", "", "it is a file, where a folder should be"),
    ("no version between", lambda m: file(m, "net/model.onnx"), "net", "model.onnx", "put it at net/VERSION/model"),
    ("a file for a version", lambda m: file(m, "net/2"), "net", "2", "put it at net/2/model.onnx"),
    ("an empty version", lambda m: folder(m, "net/1"), "net", "1", "it holds no model.onnx; put it there, or take"),
    ("another name", lambda m: file(m, "net/1/best.onnx"), "net", "1", "'best.onnx' in it has to be called so"),
    ("a version with spaces", lambda m: file(m, "net/1 copy/model.onnx"), "net", "1 copy", "this cannot be a version"),
    ("a folder for the file", lambda m: folder(m, "net/1/model.onnx"), "net", "1", "is no file that can be read"),
    ("a step too low", lambda m: file(m, "net/all/1/model.onnx"), "net", "all", "it holds no model.onnx"),
    ("a link to nothing", lambda m: (m / "net").symlink_to("gone"), "net", "", "it is a link that leads nowhere"),
    ("a link to itself", lambda m: (m / "net").symlink_to("net"), "net", "", "it is a link that leads nowhere"),
]  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_table_bundle(tmp_path / "models", name="credit")
    return tmp_path / "models"


@pytest.mark.parametrize(("put", "name", "version", "reason"), [odd[1:] for odd in ODD], ids=[odd[0] for odd in ODD])
def test_what_cannot_be_served_where_it_lies_is_named_with_what_to_do(
    models: Path, put: Callable[[Path], Any], name: str, version: str, reason: str
) -> None:
    """And hides nothing: what can be served is found as before."""
    put(models)
    (one,) = misplaced(models)
    assert (one.name, one.version) == (name, version)
    assert reason in one.reason
    assert [(found.name, found.version) for found in find(models)] == [("credit", "1")]


def test_all_of_it_is_in_the_index_and_not_served(models: Path) -> None:
    """In order of the names, whatever they are made of; a version need not be a number."""
    put = {name: put for _, put, name, _, _ in ODD}
    for one in put.values():
        one(models)
    write_table_bundle(models, name="words", version="v2")
    repository = loaded(models)
    index = ask(repository, "POST", "/v2/repository/index").json()
    served = [(one["name"], one["version"]) for one in index if one["state"] == "READY"]
    assert served == [("credit", "1"), ("words", "v2")]
    refused = {one["name"]: one["reason"] for one in index if one["state"] == "UNAVAILABLE"}
    assert refused.keys() == put.keys()
    assert all(refused.values())
    assert [one["name"] for one in index] == sorted(one["name"] for one in index)
    ready = ask(repository, "POST", "/v2/repository/index", {"ready": True}).json()
    assert [(one["name"], one["version"]) for one in ready] == served
    assert ask(repository, "POST", "/v2/repository/models/my%20net/load").status_code == 404


def test_a_folder_that_hangs_keeps_nobody_waiting(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index has what is known, one look is under way however many ask, and the next one asks anew."""
    folder(models, "net")
    repository, looks, released = loaded(models), [], threading.Event()
    monkeypatch.setattr(management, "LOOK_LIMIT_S", 0.05)

    def hanging(path: Path, *, called: str, kind: Layout | None) -> list[Misplaced]:
        looks.append(path)
        released.wait(20)
        return misplaced(path, called=called, kind=kind)

    async def scenario(client: httpx.AsyncClient) -> list[list[str]]:
        async def names() -> list[str]:
            return [one["name"] for one in (await client.post("/v2/repository/index")).json()]

        monkeypatch.setattr("service.repository.misplaced", hanging)
        said = [*await asyncio.gather(names(), names()), await names()]
        assert len(looks) == 1
        released.set()
        monkeypatch.setattr(management, "LOOK_LIMIT_S", 20.0)
        await names()  # of the look that hung
        return [*said, await names()]

    assert talk(repository, scenario) == [["credit"]] * 3 + [["credit", "net"]]


@pytest.mark.parametrize(
    "name", [".net", "lost+found", "README.md", "aliases.json", "credit/.2", "credit/aliases.json"]
)
def test_what_nobody_put_there_to_be_served_is_not_named(models: Path, name: str) -> None:
    """What is being written, what a file system keeps for itself, and other files."""
    if "." in name[1:]:
        (models / name).write_text("{}")
    else:
        shutil.copytree(models / "credit" / "1", models / name)
    assert misplaced(models) == []
    assert len(ask(loaded(models), "POST", "/v2/repository/index").json()) == 1


@pytest.mark.parametrize(
    ("files", "path", "is_a"),
    [
        (["credit/1/model.onnx"], "", "repository"),
        (["credit/v1/model.onnx"], "", "repository"),
        (["credit/1/model.onnx"], "credit", "model"),
        (["credit/v1/model.onnx"], "credit", "model"),
        (["credit/1/model.onnx"], "credit/1", "bundle"),
        (["credit/1/model.onnx", "net/model.onnx"], "", "repository"),
        (["credit/1/model.onnx", "model.onnx"], "", "repository"),
        (["credit/1/model.onnx", "credit/model.onnx"], "credit", "model"),
        (["credit/1/model.onnx", "credit/old/1/model.onnx"], "credit", "model"),
        (["credit/1/model.onnx", "credit/1/old/model.onnx"], "credit/1", "bundle"),
        ([], "", "repository"),
    ],
)
def test_what_lies_a_step_too_high_or_too_low_hides_nothing(
    tmp_path: Path, files: list[str], path: str, is_a: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert layout(tmp_path / path) == is_a
    if files:
        assert {found.name for found in find(tmp_path / path)} == {"credit"}


def test_a_folder_that_nobody_may_read_hides_no_other(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table_bundle(models, name="closed")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [found.name for found in find(models)] == ["credit"]
    assert [(it.name, it.reason) for it in misplaced(models)] == [
        ("closed", "it cannot be read: Permission denied; let the service's user read it")
    ]


def test_where_nothing_can_be_served_the_refusal_says_what_is_wrong(tmp_path: Path) -> None:
    folder(tmp_path, "my net")
    with pytest.raises(WrongCall, match=r"holds no models; .*; 'my net': this cannot be a model's name"):
        find(tmp_path)


def test_to_load_what_lies_wrong_says_what_is_wrong(models: Path) -> None:
    repository = loaded(models)
    file(models, "net/" + MODEL_FILE)
    with pytest.raises(UnknownModel, match=r"no model 'net' is served here; 'net/model.onnx': it is a file, where a"):
        repository.admit("net")


def test_under_a_given_name_versions_have_that_name(models: Path) -> None:
    folder(models, "credit/2")
    folder(models, "other")
    assert [(it.name, it.version) for it in misplaced(models, called="judge")] == [("judge", "2"), ("other", "")]
    assert [(it.name, it.version) for it in misplaced(models / "credit", called="judge")] == [("judge", "2")]
    assert misplaced(models / "credit" / "1") == []
    assert misplaced(models / "nothing") == []
    named = load(models, place("cpu"), Settings(threads=1, max_batch_rows=8, name="judge"))
    assert [live.name for live in named.models] == ["judge"]
