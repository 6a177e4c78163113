"""What is found where, and which version is live."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from service.errors import NotReady, UnknownVersion, WrongCall
from service.places import find
from service.repository import Entry, Repository, load
from service.runtime import place
from service.settings import Settings
from tests import graphs
from tests.bundles import write_table_bundle


def loaded(path: Path, heard: list[Entry] | None = None) -> Repository:
    tell = heard.append if heard is not None else lambda _: None
    return load(path, place("cpu"), Settings(threads=1, max_batch_rows=8), tell=tell)


def test_a_repository_a_model_a_bundle_and_a_file_are_found(tmp_path: Path) -> None:
    folder = write_table_bundle(tmp_path / "models", name="credit", version="3")
    for path in (tmp_path / "models", tmp_path / "models" / "credit", folder):
        assert [(found.name, found.version) for found in find(path)] == [("credit", "3")]
    file = tmp_path / "my net.onnx"
    onnx.save(graphs.batchnorm_model(), file)
    assert [(found.name, found.version) for found in find(file)] == [("my_net", "1")]
    assert loaded(file).only().name == "my_net"


@pytest.mark.parametrize(("make", "sentence"), [(False, "there is nothing at"), (True, "holds no models")])
def test_nothing_to_serve_is_a_sentence(tmp_path: Path, make: bool, sentence: str) -> None:
    path = tmp_path / "models"
    if make:
        path.mkdir()
    with pytest.raises(WrongCall, match=sentence):
        find(path)


def test_the_newest_version_is_live(tmp_path: Path) -> None:
    for version in ("2", "10", "9"):
        write_table_bundle(tmp_path, name="credit", version=version)
    repository = loaded(tmp_path)
    assert repository.only().version == "10"
    assert repository.live("credit", "10").version == "10"
    with pytest.raises(UnknownVersion, match="no live version '9'; version '10' is served"):
        repository.live("credit", "9")


def test_a_refused_version_leaves_the_one_before_it_live(tmp_path: Path) -> None:
    """With its reason told once, and in the index."""
    write_table_bundle(tmp_path, name="credit", version="1")
    bad = write_table_bundle(tmp_path, name="credit", version="2")
    (bad / "model.onnx").write_bytes((bad / "model.onnx").read_bytes()[:-3])
    heard: list[Entry] = []
    repository = loaded(tmp_path, heard)
    assert repository.only().version == "1"
    assert [(entry.version, entry.state) for entry in heard] == [("2", "UNAVAILABLE"), ("1", "READY")]
    assert "refused at the" in heard[0].reason


def test_a_model_without_an_admitted_version_is_not_ready(tmp_path: Path) -> None:
    """It is known, and its reason is in the answer."""
    write_table_bundle(tmp_path, name="credit")
    (tmp_path / "sick" / "1").mkdir(parents=True)
    onnx.save(graphs.batchnorm_model(training=True), tmp_path / "sick" / "1" / "model.onnx")
    repository = loaded(tmp_path)
    assert repository.only().name == "credit"
    with pytest.raises(NotReady, match="model 'sick' is not ready: version 1 was refused at the structure door"):
        repository.live("sick")


def test_a_refused_newer_version_leaves_what_is_served_as_it_is(tmp_path: Path) -> None:
    """The very session goes on, with its statistics; older versions are not looked at."""
    write_table_bundle(tmp_path, name="credit", version="1")
    write_table_bundle(tmp_path, name="credit", version="2")
    repository = loaded(tmp_path)
    serving = repository.live("credit")
    (tmp_path / "credit" / "3").mkdir()
    (tmp_path / "credit" / "3" / "model.onnx").write_bytes(b"half a file")
    repository.swap("credit", repository.admit("credit"))
    assert repository.live("credit") is serving
    assert [(entry.version, entry.state) for entry in repository.entries] == [("3", "UNAVAILABLE"), ("2", "READY")]


def test_a_version_that_was_taken_away_makes_room_for_the_one_before(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_table_bundle(tmp_path, name="credit", version=version)
    repository = loaded(tmp_path)
    shutil.rmtree(tmp_path / "credit" / "2")
    repository.swap("credit", repository.admit("credit"))
    assert repository.live("credit").version == "1"
