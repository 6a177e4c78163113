"""What is noticed in the folder of models, and when it is loaded."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from service import watching
from service.bundle import MODEL_FILE, PASSPORT_FILE, Passport, digest
from service.crew import Alone
from service.errors import LoadRefused, NotReady
from service.metrics import Page
from service.places import Layout, find
from service.repository import Repository, load
from service.runtime import place
from service.settings import Settings
from service.watching import Seen, Watch, Watcher, look
from tests import graphs
from tests.bundles import WEIGHT, golden_rows, mixing_contents, table_model, write_table_bundle

EVERY_S = 0.02


def seen(**versions: str) -> Seen:
    """By version, what its files are like now."""
    marks = {("net", version[1:]): ((MODEL_FILE, 1, 1, 1, ord(mark)),) for version, mark in versions.items()}
    return Seen(versions=marks)


HIDDEN = Seen(unreadable={"": "Stale file handle"})
ONE_HIDDEN = Seen(versions=seen(v2="a").versions, unreadable={"net/1": "Permission denied"})


@pytest.mark.parametrize(
    ("looks", "planned"),
    [
        pytest.param([seen(v1="a"), seen(v1="a")], [{}, {}], id="nothing new"),
        pytest.param([seen(v1="a", v2="a"), seen(v1="a", v2="a")], [{}, {"net": {"2"}}], id="new, and quiet"),
        pytest.param([seen(v2="a"), seen(v2="b"), seen(v2="b")], [{}, {"net": set()}, {"net": {"2"}}], id="grows"),
        pytest.param([seen(v1="b"), seen(v1="c"), seen(v1="a")], [{}, {}, {}], id="what it was again"),
        pytest.param([seen(v1="b"), seen(v1="b"), seen(v1="b")], [{}, {"net": {"1"}}, {}], id="changed, once"),
        pytest.param([seen(), seen(), seen()], [{}, {"net": set()}, {}], id="gone"),
        pytest.param([seen(), seen(v1="a"), seen(v1="a")], [{}, {}, {}], id="gone for a moment"),
        pytest.param([HIDDEN, HIDDEN, seen(v1="a")], [{}, {}, {}], id="not to be read for a while"),
        pytest.param(
            [ONE_HIDDEN, ONE_HIDDEN, ONE_HIDDEN], [{}, {"net": {"2"}}, {}], id="beside what is not to be read"
        ),
        pytest.param(
            [seen(), seen(), seen(v1="a"), seen(v1="a")], [{}, {"net": set()}, {}, {"net": {"1"}}], id="mounted again"
        ),
    ],
)
def test_what_is_quiet_and_other_than_before_is_loaded(looks: list[Seen], planned: list[dict[str, set[str]]]) -> None:
    watch = Watch(seen(v1="a"))
    assert [watch.plan(one) for one in looks] == planned


def test_what_could_not_be_loaded_is_planned_again() -> None:
    watch = Watch(seen())
    watch.plan(seen(v1="a"))
    assert watch.plan(seen(v1="a")) == {"net": {"1"}}
    watch.undo("net", {"1"})
    assert watch.plan(seen(v1="a")) == {"net": {"1"}}
    assert watch.plan(seen(v1="a")) == {}


def test_a_look_finds_what_is_served(tmp_path: Path) -> None:
    """A repository, a model, a bundle and a file; nothing with a dot, and nothing without a model."""
    models = tmp_path / "models"
    bundle = write_table_bundle(models, name="credit", version="3")
    shutil.copytree(bundle, models / "credit" / ".4.half")
    (models / "credit" / "5").mkdir()
    for path in (models, models / "credit", bundle):
        assert list(look(path).versions) == [("credit", "3")]
    (marks,) = look(models).versions.values()
    assert {name for name, *_ in marks} >= {MODEL_FILE, PASSPORT_FILE, "test_data_set_0/input_0.pb"}
    (tmp_path / "my net.onnx").touch()
    assert list(look(tmp_path / "my net.onnx").versions) == [("my_net", "1")]
    (models / "credit" / "6").symlink_to(tmp_path / "nowhere")
    assert list(look(models).versions) == [("credit", "3")]


def test_a_look_names_what_it_finds_as_it_is_served(tmp_path: Path) -> None:
    """Under the setting 'name', and where a folder holds one file."""
    bundle = write_table_bundle(tmp_path / "models", name="credit", version="3")
    bare, only = tmp_path / "mounted", tmp_path / "only"
    shutil.copytree(bundle, bare)
    only.mkdir()
    shutil.copy(bundle / MODEL_FILE, only / "net.onnx")
    for path in (tmp_path / "models", bundle, bare, only):
        for name in ("", "judge"):
            served = [(found.name, found.version) for found in find(path, called=name)]
            assert list(look(path, called=name).versions) == served


def test_a_look_finds_what_is_found_beside_what_lies_wrong(tmp_path: Path) -> None:
    """A model that was laid a step too high hides no others, and is said to lie wrong."""
    bundle = write_table_bundle(tmp_path, name="credit", version="3")
    for stray in (tmp_path / "net", tmp_path, tmp_path / "credit"):
        stray.mkdir(exist_ok=True)
        shutil.copy(bundle / MODEL_FILE, stray)
        for path in (tmp_path, tmp_path / "credit", bundle):
            assert list(look(path).versions) == [(found.name, found.version) for found in find(path)]
            assert list(look(path).versions) == [("credit", "3")]
    assert [it.place for it in look(tmp_path).misplaced] == ["credit/model.onnx", "model.onnx", "net/model.onnx"]


def test_a_file_that_is_other_is_seen(tmp_path: Path) -> None:
    """Its size, or its time in any direction."""
    golden = write_table_bundle(tmp_path, name="credit") / "test_data_set_0" / "input_0.pb"
    before = look(tmp_path)
    os.utime(golden, ns=(0, 0))
    set_back = look(tmp_path)
    golden.write_bytes(golden.read_bytes() + b"x")
    os.utime(golden, ns=(0, 0))
    assert before != set_back != look(tmp_path)


@pytest.mark.parametrize("keeping", [True, False], ids=["exchanged", "in its place"])
def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path, keeping: bool) -> None:
    """As `mv` and `cp --preserve` leave it."""
    golden = write_table_bundle(tmp_path, name="credit") / "test_data_set_0" / "input_0.pb"
    os.utime(golden, ns=(5, 5))
    before = look(tmp_path)
    time.sleep(0.02)  # more than a tick of the file system's clock
    other = tmp_path / "other"
    other.write_bytes(golden.read_bytes()[::-1])
    if keeping:
        os.replace(other, golden)
    else:
        shutil.copyfile(other, golden)
    os.utime(golden, ns=(5, 5))
    assert look(tmp_path) != before


def test_one_version_that_cannot_be_looked_at_hides_no_other(tmp_path: Path) -> None:
    """Whatever it is that is wrong with one of its files; in a repository, a model's folder, and under another name."""
    models = tmp_path / "models"
    for version in ("1", "2", "3"):
        write_table_bundle(models, name="credit", version=version)
    (models / "credit" / "1" / "round").symlink_to("round")
    deep = models / "credit" / "2"
    for _ in range(watching.DEEPEST + 2):
        deep /= "d"
    deep.mkdir(parents=True)
    (models / "credit" / "9").mkdir()
    (models / "credit" / "9" / MODEL_FILE).symlink_to(MODEL_FILE)
    for path, called in ((models, ""), (models / "credit", ""), (models, "judge")):
        found = look(path, called=called)
        name = called or "credit"
        assert list(found.versions) == [(name, "3")]
        assert found.unreadable == {
            f"{name}/1": "Too many levels of symbolic links",
            f"{name}/2": "its folders are in one another more than 32 deep",
            f"{name}/9": "Too many levels of symbolic links",
        }
    shutil.rmtree(models / "credit" / "3")
    for path, called in ((models, ""), (models / "credit", ""), (models, "judge")):
        assert not look(path, called=called).versions
        assert len(look(path, called=called).unreadable) == 3


def test_a_version_that_nobody_may_look_into_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it is looked at nor when it is loaded."""
    write_table_bundle(tmp_path, name="credit", version="1")
    write_table_bundle(tmp_path, name="credit", version="2")
    real = os.stat

    def refusing(path: Any, **how: Any) -> os.stat_result:
        if not isinstance(path, int) and Path(path).parts[-2:-1] == ("1",):
            raise PermissionError(13, "Permission denied")
        return real(path, **how)

    monkeypatch.setattr(os, "stat", refusing)
    assert list(look(tmp_path).versions) == [("credit", "2")]
    assert look(tmp_path).unreadable == {"credit/1": "Permission denied"}
    assert [found.version for found in find(tmp_path)] == ["2"]


def test_a_folder_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    assert look(tmp_path / "models") == Seen(unreadable={"": "No such file or directory"})


def test_one_model_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table_bundle(tmp_path, name="closed")
    write_table_bundle(tmp_path, name="open")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = look(tmp_path)
    assert (list(found.versions), dict(found.unreadable)) == ([("open", "1")], {"closed": "Permission denied"})


# Over the real way


async def until(true: Callable[[], bool]) -> None:
    """What is waited for happens in the file system, which tells nobody."""
    for _ in range(int(20 / EVERY_S)):
        if true():
            return
        await asyncio.sleep(EVERY_S)
    raise AssertionError("it did not come to be in time")


class House:
    """A repository that is served and watched, with a file system that can be made to hang."""

    def __init__(self, models: Path, settings: Settings) -> None:
        self.models = models
        self.watcher = Watcher(models, every_s=EVERY_S)
        self.repository: Repository = load(models, place("cpu"), settings)
        self.crew = Alone(self.repository, self.watcher.reading)
        self.loads: list[tuple[str, set[str]]] = []

    async def load(self, model: str, versions: Collection[str] | None = None) -> None:
        self.loads.append((model, set(versions or ())))
        await self.crew.load(model, versions)

    async def until(self, true: Callable[[], bool]) -> None:
        await until(true)

    async def several_looks(self) -> None:
        await asyncio.sleep(8 * EVERY_S)

    async def metric(self, name: str, **labels: str) -> float:
        """What `/metrics` has of it."""
        page = Page(self.repository, await self.crew.reading())
        samples = [sample for family in page.collect() for sample in family.samples]
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def index(self) -> dict[str, tuple[str, str]]:
        return {entry.version: (entry.state, entry.reason) for entry in self.repository.entries}


def watched(
    models: Path, scenario: Callable[[House], Coroutine[Any, Any, None]], settings: Settings | None = None
) -> None:
    async def run() -> None:
        house = House(models, settings or Settings(threads=1, max_batch_rows=8))
        watching = asyncio.create_task(house.watcher.run(house.load))
        try:
            await scenario(house)
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    asyncio.run(run())


def test_a_new_version_is_served_and_an_old_one_can_be_removed(tmp_path: Path) -> None:
    """What is removed while it is served is served on, and the index says so; a copy put back changes nothing."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")

    async def scenario(house: House) -> None:
        write_table_bundle(models, name="table", version="2")
        await house.until(lambda: house.repository.only().version == "2")
        serving = house.repository.only()
        shutil.move(models / "table" / "2", tmp_path / "aside")
        await house.until(lambda: "its folder is gone" in house.index()["2"][1])
        assert house.repository.only() is serving
        await house.several_looks()
        assert await house.metric("evalmode_loads_total", model="table") == 2  # at the start, and of version 2
        shutil.move(tmp_path / "aside", models / "table" / "2")
        await house.until(lambda: house.index()["2"] == ("READY", ""))
        assert house.repository.only() is serving

    watched(models, scenario)


@pytest.mark.parametrize(
    ("stray", "served", "goes"),
    [
        ("stray/model.onnx", "", "table"),
        ("stray.onnx", "", "table"),
        ("table/backup/1/model.onnx", "table", "table/1"),
    ],
    ids=["a step too high", "a file", "a step too low"],
)
def test_what_goes_away_for_a_moment_makes_no_model_of_what_lies_there_in_vain(
    tmp_path: Path, stray: str, served: str, goes: str
) -> None:
    """What the folder is was told by what lay in it at the start."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")
    (models / stray).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(models / "table" / "1" / MODEL_FILE, models / stray)

    async def scenario(house: House) -> None:
        shutil.move(models / goes, tmp_path / "aside")
        await house.until(lambda: "its folder is gone" in house.index()["1"][1])
        await house.several_looks()
        with pytest.raises(LoadRefused, match=r"any more; put it back\. It is served from memory"):
            await house.crew.load("table")
        shutil.move(tmp_path / "aside", models / goes)
        await house.until(lambda: house.index()["1"] == ("READY", ""))
        assert [entry.name for entry in house.repository.entries] == ["table"]

    watched(models / served, scenario)


def test_nothing_new_is_no_work(tmp_path: Path) -> None:
    """Nor is a folder that begins with a dot, nor a model that was unloaded by request."""
    write_table_bundle(tmp_path, name="table")

    async def scenario(house: House) -> None:
        shutil.copytree(tmp_path / "table" / "1", tmp_path / "table" / ".2")
        await house.several_looks()
        assert house.loads == []
        await house.crew.unload("table")
        (tmp_path / "table" / ".2").rename(tmp_path / "table" / "2")
        await house.until(lambda: len(house.loads) == 1)
        await house.several_looks()
        assert house.repository.models == ()
        assert house.index() == {"1": ("UNAVAILABLE", "unloaded by request")}

    watched(tmp_path, scenario)


def test_a_new_model_is_served(tmp_path: Path) -> None:
    write_table_bundle(tmp_path, name="table")

    async def scenario(house: House) -> None:
        write_table_bundle(tmp_path, name="rate", regression=True)
        await house.until(lambda: len(house.repository.models) == 2)

    watched(tmp_path, scenario)


def test_a_folder_that_vanishes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is served goes on, and what comes with it when it is back is loaded."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")

    async def scenario(house: House) -> None:
        serving = house.repository.only()
        models.rename(tmp_path / "unmounted")
        await house.until(lambda: "cannot be read" in caplog.text)
        await house.several_looks()
        assert caplog.text.count("cannot be read: No such file or directory; what was served goes on") == 1
        assert await house.metric("evalmode_unreadable_folders") == 1
        assert house.repository.only() is serving
        write_table_bundle(tmp_path / "unmounted", name="table", version="2")
        (tmp_path / "unmounted").rename(models)
        await house.until(lambda: house.repository.only().version == "2")
        assert caplog.text.count("can be read again") == 1
        assert await house.metric("evalmode_unreadable_folders") == 0

    with caplog.at_level(logging.WARNING):
        watched(models, scenario)


def test_what_lies_wrong_is_said_once_and_served_once_it_is_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in each look, and not what was there at the start, which is said there; again if it comes again."""
    write_table_bundle(tmp_path, name="table")
    (tmp_path / "at the start").mkdir()
    said = "'my rate' is not served: this cannot be a model's name"

    async def scenario(house: House) -> None:
        for times in (1, 2):
            write_table_bundle(tmp_path, name="my rate", regression=True)
            await house.until(lambda times=times: caplog.text.count(said) == times)  # type: ignore[misc]
            await house.several_looks()
            assert caplog.text.count(said) == times
            (tmp_path / "my rate").rename(tmp_path / "rate")
            await house.until(lambda: any(live.name == "rate" for live in house.repository.models))
            (tmp_path / "rate").rename(tmp_path / ".aside")
            await house.several_looks()
            shutil.rmtree(tmp_path / ".aside")
        assert "at the start" not in caplog.text

    with caplog.at_level(logging.WARNING):
        watched(tmp_path, scenario)


def test_a_file_system_that_hangs_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on, and so does the end of the process: the thread is a daemon."""
    write_table_bundle(tmp_path, name="table")
    hangs, released = threading.Event(), threading.Event()

    def hanging(path: Path, *, called: str, kind: Layout | None) -> Seen:
        hangs.set()
        assert threading.current_thread().daemon
        released.wait(20)
        return look(path, called=called, kind=kind)

    async def scenario(house: House) -> None:
        monkeypatch.setattr(watching, "look", hanging)
        await house.until(hangs.is_set)
        await house.several_looks()
        assert await house.metric("evalmode_unreadable_folders") == 0
        monkeypatch.setattr(watching, "HANGS_S", 0.0)
        assert await house.metric("evalmode_unreadable_folders") == 1
        monkeypatch.setattr(watching, "HANGS_S", 30.0)
        released.set()

    watched(tmp_path, scenario)


def test_a_look_that_breaks_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it came upon. It is said once, with where in the code, and so is its end."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")
    looks: list[bool] = []

    def breaking(path: Path, *, called: str, kind: Layout | None) -> Seen:
        looks.append(True)
        raise RecursionError("maximum recursion depth exceeded")

    async def scenario(house: House) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(watching, "look", breaking)
            await house.until(lambda: len(looks) > 3)
        write_table_bundle(models, name="table", version="2")
        await house.until(lambda: house.repository.only().version == "2")

    with caplog.at_level(logging.WARNING):
        watched(models, scenario)
    assert caplog.text.count("Traceback") == 1
    assert caplog.text.count("cannot be read: maximum recursion depth exceeded; what was served goes on") == 1
    assert caplog.text.count("can be read again") == 1


def test_who_cannot_load_now_tries_again(tmp_path: Path) -> None:
    """All workers died, say."""
    tried: list[str] = []

    async def load_at_the_second_attempt(model: str, versions: Collection[str] | None = None) -> None:
        tried.append(model)
        if len(tried) == 1:
            raise NotReady("the workers died")

    async def scenario() -> None:
        (tmp_path / "net").mkdir()
        watcher = Watcher(tmp_path, every_s=EVERY_S)
        task = asyncio.create_task(watcher.run(load_at_the_second_attempt))
        write_table_bundle(tmp_path, name="net")
        await until(lambda: len(tried) == 2)
        await asyncio.sleep(5 * EVERY_S)
        task.cancel()
        assert tried == ["net", "net"]

    asyncio.run(scenario())


def test_0_is_never(tmp_path: Path) -> None:
    async def scenario() -> None:
        await Watcher(tmp_path / "nothing", every_s=0).run(Alone(Repository((), **_empty(tmp_path))).load)

    asyncio.run(scenario())


def _empty(path: Path) -> dict[str, Any]:
    return {"path": path, "placement": place("cpu"), "settings": Settings()}


# What is refused


def truncated(folder: Path) -> None:
    (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:-40])


def half_copied(folder: Path) -> None:
    (folder / "test_data_set_0" / "output_0.pb").unlink()


def without_passport(folder: Path) -> None:
    """A copy of which the passport comes last; its weights are others, and nothing says so."""
    bit_flipped(folder)
    (folder / PASSPORT_FILE).unlink()


def with_a_passport_that_leads_nowhere(folder: Path) -> None:
    without_passport(folder)
    shutil.rmtree(folder / "test_data_set_0")
    (folder / PASSPORT_FILE).symlink_to("..data/model.json")


def nothing_but_the_model(folder: Path) -> None:
    without_passport(folder)
    shutil.rmtree(folder / "test_data_set_0")


def bit_flipped(folder: Path) -> None:
    """In a weight: the file is still a model, and would answer."""
    content = bytearray((folder / MODEL_FILE).read_bytes())
    content[content.index(WEIGHT.tobytes()) + 7] ^= 0x01
    (folder / MODEL_FILE).write_bytes(bytes(content))


def wrong_digest(folder: Path) -> None:
    _sign(folder, lambda passport: passport.model_copy(update={"files": {**passport.files, MODEL_FILE: digest(b"")}}))


def training_mode(folder: Path) -> None:
    model = table_model()
    norm = model.graph.node[0]
    norm.attribute.append(helper.make_attribute("training_mode", 1))
    norm.output.extend(["mean_out", "var_out"])
    _replace(folder, model)


def batch_dependent(folder: Path) -> None:
    """Alone each row has its own answer, which is all that the only golden sample shows."""
    for path, content in mixing_contents().items():
        (folder / path).write_bytes(content)
    _sign(folder)


def nan_statistics(folder: Path) -> None:
    model = table_model()
    (mean,) = [tensor for tensor in model.graph.initializer if tensor.name == "mean"]
    mean.CopyFrom(onnx.numpy_helper.from_array(np.array([35.0, np.nan], dtype=np.float32), "mean"))
    _replace(folder, model)


def other_outputs(folder: Path) -> None:
    golden = folder / "test_data_set_0" / "output_0.pb"
    outputs = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(golden.read_bytes()))
    golden.write_bytes(onnx.numpy_helper.from_array(outputs + np.float32(0.01)).SerializeToString())
    _sign(folder)


def weights_elsewhere(folder: Path) -> None:
    model = table_model()
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "weight"]
    (folder.parent / "weights").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, "../weights")
    weight.ClearField("raw_data")
    _replace(folder, model)


def _replace(folder: Path, model: onnx.ModelProto) -> None:
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    _sign(folder)


def _sign(folder: Path, change: Callable[[Passport], Passport] = lambda passport: passport) -> None:
    """A passport that fits the files, as a mistaken or a malicious exporter would write it."""
    passport = Passport.model_validate_json((folder / PASSPORT_FILE).read_bytes())
    files = {path: digest((folder / path).read_bytes()) for path in passport.files}
    passport = change(passport.model_copy(update={"files": files}))
    (folder / PASSPORT_FILE).write_text(passport.model_dump_json())


@pytest.mark.parametrize("by", ["watching", "request"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (half_copied, "'test_data_set_0/output_0.pb' cannot be read"),
        (truncated, "refused at the structure door"),
        (bit_flipped, "refused at the digest door"),
        (without_passport, "it has 'test_data_set_0' and no passport (model.json)"),
        (with_a_passport_that_leads_nowhere, "'model.json' cannot be read: No such file or directory"),
        (nothing_but_the_model, "it has no passport (model.json) and version 1 of the model has one; copy all of the"),
        (wrong_digest, "refused at the digest door"),
        (training_mode, "is in training mode"),
        (batch_dependent, "refused at the independence door"),
        (nan_statistics, "refused at the structure door"),
        (other_outputs, "refused at the golden door"),
        (weights_elsewhere, "lies outside the bundle's folder"),
    ],
)
def test_what_is_refused_leaves_what_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str, spoil: Callable[[Path], None], reason: str
) -> None:
    """The old version answers on; index, log and metrics say so, the log once. Then it is mended, and served."""
    models = tmp_path / "models"
    write_table_bundle(models, name="table")

    async def scenario(house: House) -> None:
        serving = house.repository.only()
        before = serving.admitted.runtime.run(golden_rows())
        made = write_table_bundle(tmp_path / "made", name="table", version="2")
        spoil(made)
        if (made.parent / "weights").exists():
            shutil.copy(made.parent / "weights", models / "table")
        made.rename(models / "table" / "2")
        if by == "request":
            with pytest.raises(LoadRefused, match="version 2 of model 'table' was"):
                await house.crew.load("table")
        else:
            await house.until(lambda: house.loads == [("table", {"2"})])
            await house.until(lambda: "2" in house.index())
            await house.several_looks()
            assert house.loads == [("table", {"2"})]  # not again and again
            assert caplog.text.count("version 2 of model 'table' was") == 1
        state, said = house.index()["2"]
        assert (state, house.index()["1"]) == ("UNAVAILABLE", ("READY", ""))
        assert reason in said
        refusals = await house.metric("evalmode_loads_total", model="table", result="refused")
        assert refusals == 1 or (by == "request" and refusals == 2)  # it is noticed besides
        assert await house.metric("evalmode_model_state", version="2", state="refused") == 1
        assert house.repository.only() is serving
        assert np.array_equal(serving.admitted.runtime.run(golden_rows())[0], before[0])
        shutil.rmtree(models / "table" / "2")
        write_table_bundle(models, name="table", version="2")
        await (house.crew.load("table") if by == "request" else house.until(lambda: house.index()["2"][0] == "READY"))
        assert house.repository.only().version == "2"
        assert await house.metric("evalmode_loads_total", model="table", result="admitted") >= 2
        assert await house.metric("evalmode_model_state", version="2", state="ready") == 1

    with caplog.at_level(logging.WARNING):
        watched(models, scenario, Settings(threads=1, max_batch_rows=8))


def test_what_is_spoiled_where_it_is_served_is_served_as_it_was(tmp_path: Path) -> None:
    """It is one entry of the index, which says both; touched and the same, it is not loaded anew."""
    folder = write_table_bundle(tmp_path, name="table")

    async def scenario(house: House) -> None:
        serving = house.repository.only()
        os.utime(folder / MODEL_FILE, ns=(5, 5))
        await house.until(lambda: len(house.loads) == 1)
        await house.several_looks()
        assert house.repository.only() is serving
        (folder / MODEL_FILE).write_bytes(graphs.batchnorm_model(training=True).SerializeToString())
        await house.until(lambda: "served as it was before its files changed" in house.index()["1"][1])
        assert house.index()["1"][0] == "READY"
        assert await house.metric("evalmode_model_state", version="1", state="stale") == 1
        assert await house.metric("evalmode_model_state", version="1", state="ready") == 0
        assert house.repository.only() is serving

    watched(tmp_path, scenario)


@pytest.mark.parametrize("spoil", [without_passport, nothing_but_the_model])
def test_a_copy_without_its_passport_takes_no_place_of_a_bundle(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Neither over the version that is served, nor beside it at the next start; a passport that comes late mends it."""
    folder = write_table_bundle(tmp_path / "models", name="table")
    passport = (folder / PASSPORT_FILE).read_bytes()
    whole = (folder / MODEL_FILE).read_bytes()

    async def scenario(house: House) -> None:
        serving = house.repository.only()
        spoil(folder)
        await house.until(lambda: "no passport (model.json)" in house.index()["1"][1])
        assert house.repository.only() is serving
        write_table_bundle(tmp_path / "made", name="table")
        shutil.copytree(tmp_path / "made" / "table" / "1", folder, dirs_exist_ok=True)
        assert ((folder / PASSPORT_FILE).read_bytes(), (folder / MODEL_FILE).read_bytes()) == (passport, whole)
        await house.until(lambda: house.index()["1"] == ("READY", ""))

    watched(tmp_path / "models", scenario)
    spoil(write_table_bundle(tmp_path / "models", name="table", version="2"))
    repository = load(tmp_path / "models", place("cpu"), Settings(threads=1, max_batch_rows=8))
    assert repository.only().version == "1"
    assert "no passport (model.json)" in repository.entries[0].reason


def test_plain_files_of_which_none_was_a_bundle_are_served(tmp_path: Path) -> None:
    for version in ("1", "2"):
        nothing_but_the_model(write_table_bundle(tmp_path, name="table", version=version))
    assert load(tmp_path, place("cpu"), Settings(threads=1, max_batch_rows=8)).only().version == "2"


def test_the_one_model_may_be_called_otherwise_than_its_folder(tmp_path: Path) -> None:
    """As `--name` has it: what changes is looked at under that name."""
    write_table_bundle(tmp_path, name="table", version="3")
    assert list(look(tmp_path, called="judge").versions) == [("judge", "3")]
    assert list(look(tmp_path / "table" / "3", called="judge").versions) == [("judge", "3")]
