"""What is found where, and which version is live."""

from __future__ import annotations

import asyncio
import gc
import shutil
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from weakref import ref

import onnx
import pytest

from service.coalescing import Computed
from service.errors import DeadlineExceeded, NotReady, UnknownVersion, WrongCall
from service.places import find
from service.repository import Entry, Repository, load
from service.runtime import place
from service.settings import Settings
from service.signature import Accepted
from service.trial import Trials, Tried
from tests import graphs
from tests.asking import ask
from tests.bundles import golden_rows, write_table_bundle


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


@pytest.mark.parametrize("put", ["a plain file", "a file of any name", "a bundle", "versions", "a repository"])
def test_one_model_is_served_under_the_name_it_is_given(tmp_path: Path, put: str) -> None:
    """However it was laid into the folder: a platform that downloads models names them by itself."""
    mounted = tmp_path / "models"
    match put:
        case "a plain file" | "a file of any name":
            mounted.mkdir()
            onnx.save(graphs.batchnorm_model(), mounted / ("model.onnx" if put == "a plain file" else "net-v3.onnx"))
        case "a bundle":
            shutil.copytree(write_table_bundle(tmp_path / "made", name="credit", version="7"), mounted)
        case "versions":
            shutil.copytree(write_table_bundle(tmp_path / "made", name="credit", version="7").parent, mounted)
        case "a repository":
            write_table_bundle(mounted, name="credit", version="7")
    named = load(mounted, place("cpu"), Settings(threads=1, max_batch_rows=8, name="judge"))
    assert [live.name for live in named.models] == ["judge"]
    assert named.live("judge", "7" if put in ("versions", "a repository") else "1") is named.only()
    assert [entry.name for entry in named.admit("judge")] == ["judge"]


def test_a_name_is_for_one_model(tmp_path: Path) -> None:
    for name in ("credit", "fraud"):
        write_table_bundle(tmp_path, name=name)
    with pytest.raises(WrongCall, match=r"--name 'judge' is for one model, and '.*' holds 'credit', 'fraud'"):
        find(tmp_path, called="judge")
    with pytest.raises(WrongCall, match=r"'\.\./x' cannot be a model's name"):
        find(tmp_path / "credit", called="../x")


def test_which_of_several_files_is_meant_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        onnx.save(graphs.batchnorm_model(), tmp_path / name)
    with pytest.raises(WrongCall, match="holds no models"):
        find(tmp_path)


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


def versions_of(path: Path, policy: str) -> tuple[list[str], dict[str, str]]:
    """Those that are live, and the index."""
    repository = load(path, place("cpu"), Settings(threads=1, max_batch_rows=8, versions=policy))
    return repository.versions("credit"), {entry.version: entry.state for entry in repository.entries}


def test_as_many_are_live_as_the_policy_says(tmp_path: Path) -> None:
    """Of the newest that can be admitted, or by name; what is named and missing is in the index."""
    for version in ("1", "2", "3", "4"):
        folder = write_table_bundle(tmp_path, name="credit", version=version)
        if version == "3":
            (folder / "model.onnx").write_bytes(b"half a file")
    assert versions_of(tmp_path, "latest")[0] == ["4"]
    assert versions_of(tmp_path, "latest:2") == (["2", "4"], {"4": "READY", "3": "UNAVAILABLE", "2": "READY"})
    assert versions_of(tmp_path, "latest:9")[0] == ["1", "2", "4"]
    assert versions_of(tmp_path, "latest credit=1,2,7") == (
        ["1", "2"],
        {"7": "UNAVAILABLE", "2": "READY", "1": "READY"},
    )


def test_a_policy_for_a_model_that_is_not_there_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be a slip, and then another version is served than was meant."""
    write_table_bundle(tmp_path, name="credit")
    assert versions_of(tmp_path, "credt=3")[0] == ["1"]
    assert "--versions names models that are not there: 'credt'; there are: 'credit'" in caplog.text


def test_the_documentation_holds_no_session(tmp_path: Path) -> None:
    """It has each model's types, and is made anew for others."""
    write_table_bundle(tmp_path, name="credit")
    repository = loaded(tmp_path)
    assert ask(repository, "GET", "/openapi.json").status_code == 200
    old = ref(repository.live("credit"))
    repository.swap("credit", repository.admit("credit"))
    gc.collect()
    assert old() is None


def test_of_several_versions_only_what_changed_is_admitted_anew(tmp_path: Path) -> None:
    """By request the newest too; the others go on, with their statistics."""
    for version in ("1", "2", "3"):
        write_table_bundle(tmp_path, name="credit", version=version)
    repository = load(tmp_path, place("cpu"), Settings(threads=1, max_batch_rows=8, versions="latest:2"))
    two, three = (repository.live("credit", version) for version in ("2", "3"))
    assert repository.swap("credit", repository.admit("credit")) == ["2"]
    assert repository.live("credit", "2") is two
    assert repository.live("credit", "3") is not three
    three = repository.live("credit", "3")
    write_table_bundle(tmp_path, name="credit", version="4")
    assert repository.swap("credit", repository.admit("credit", {"4"})) == ["3"]
    assert (repository.versions("credit"), repository.live("credit", "3")) == (["3", "4"], three)
    shutil.rmtree(tmp_path / "credit" / "4")
    write_table_bundle(tmp_path, name="credit", version="4", regression=True)
    assert repository.swap("credit", repository.admit("credit", {"4"})) == ["3"]
    assert repository.live("credit").reader is not None
    assert repository.live("credit").admitted.signature.outputs[0].name == "value"


def test_what_was_replaced_answers_and_is_let_go(tmp_path: Path) -> None:
    """Whoever waits on the old version gets its answer, also if late; then nothing holds its session.

    Without the collector: what the service froze at its start is never looked at by it.
    """
    write_table_bundle(tmp_path, name="credit")
    repository = loaded(tmp_path)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        told: list[Computed] = []

        async def scenario() -> None:
            old = repository.live("credit")
            rows = Accepted(tuple(golden_rows(1)), 1)
            old.coalescer.submit(rows, told.append)
            old.coalescer.submit(rows, told.append, expires_ns=perf_counter_ns() + 1_000_000)
            write_table_bundle(tmp_path, name="credit", version="2")
            repository.swap("credit", repository.admit("credit"))
            assert told == []
            assert old in repository.answering
            assert old not in repository.lives
            for live in repository.answering:
                live.coalescer.drop_late()
            assert [type(one.error) for one in told] == [DeadlineExceeded]

        session, live = ref(repository.live("credit").admitted.runtime), ref(repository.live("credit"))
        asyncio.run(scenario())
        assert [one.error is None for one in told] == [False, True]
        assert told[1].outputs[0].shape == (1, 2)
        assert len(repository.answering) == 1  # looked for once a second
        assert (session(), live()) == (None, None)
    finally:
        gc.enable()
        gc.unfreeze()


def test_what_workers_refused_together_leaves_what_is_served(tmp_path: Path) -> None:
    """Nothing that one of them admitted is among what they agreed on."""
    write_table_bundle(tmp_path, name="credit")
    repository = loaded(tmp_path)
    serving = repository.live("credit")
    torn = Entry(name="credit", version="2", state="UNAVAILABLE", reason="not admitted: its files changed")
    assert repository.swap("credit", (torn,)) == ["1"]
    assert repository.live("credit") is serving
    assert [(entry.version, entry.state) for entry in repository.entries] == [("2", "UNAVAILABLE"), ("1", "READY")]


def test_what_is_being_loaded_is_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LOADING until it is swapped in, beside what is served; a version that is served stays READY."""
    write_table_bundle(tmp_path, name="credit", version="1")
    repository = loaded(tmp_path)
    write_table_bundle(tmp_path, name="credit", version="2")
    seen: list[list[tuple[str, str]]] = []

    def index() -> list[tuple[str, str]]:
        return [(one["version"], one["state"]) for one in ask(repository, "POST", "/v2/repository/index").json()]

    really_tried = Trials.tried

    def trying(trials: Trials, *facts: Any) -> Tried:
        seen.append(index())
        return Tried(reason="refused for the test") if len(seen) > 2 else really_tried(trials, *facts)

    monkeypatch.setattr(Trials, "tried", trying)
    entries = repository.admit("credit")
    assert index() == [("2", "LOADING"), ("1", "READY")]
    repository.swap("credit", entries)
    assert repository.loading == set()
    assert index() == [("2", "READY")]
    repository.swap("credit", repository.admit("credit"))
    write_table_bundle(tmp_path, name="credit", version="3")
    assert not repository.admit("credit")[0].ready
    repository.give_up("credit")
    assert index() == [("2", "READY")]
    assert seen == [[("2", "LOADING"), ("1", "READY")], [("2", "READY")], [("3", "LOADING"), ("2", "READY")]]


def test_a_load_that_breaks_is_no_load_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table_bundle(tmp_path, name="credit")
    repository = loaded(tmp_path)
    write_table_bundle(tmp_path, name="credit", version="2")

    def breaking(*_: object) -> Tried:
        raise OSError("no more processes")

    monkeypatch.setattr(Trials, "tried", breaking)
    with pytest.raises(OSError, match="no more processes"):
        repository.admit("credit")
    assert repository.loading == set()


def test_the_log_says_when_a_load_begins_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_table_bundle(tmp_path, name="credit")
    repository = loaded(tmp_path)
    with caplog.at_level("INFO"):
        repository.admit("credit")
    assert "credit/1 is being loaded beside what is served" in caplog.text
    assert "credit/1 was admitted after " in caplog.text
