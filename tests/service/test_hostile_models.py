"""Hostile ONNX files are refused within a bound of time and memory, by a process that is still there afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from service import repository
from service.places import Found
from service.policy import TORN as TORN_BEFORE
from service.rehearsal import Batching, rehearse
from service.repository import load_bounded
from service.runtime import place
from service.settings import Settings
from service.trial import Trials, Tried
from tests import graphs
from tests.bundles import write_table_bundle
from tests.service.hostile import REFUSED, a_loop_without_end

LIMIT_S = 1.0
MEMORY_BYTES = 2**30
BEGUN_BYTES = 300 * 2**20
"""What a process has that has loaded nothing yet."""

OVERHEAD_S = 15.0
"""For the rest of an admission, on a machine that is busy."""

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from service.places import Found
from service.repository import load_bounded
from service.runtime import place
from service.settings import Settings

root, limit_s, memory_bytes = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + memory_bytes, used + memory_bytes))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
settings, placement = Settings(admission_limit_s=limit_s, threads=1), place("cpu")
for path in sorted(root.iterdir()):
    start = time.perf_counter()
    entry = load_bounded(Found(name=path.name, version="1", path=path / "1"), placement, settings)
    said = {"state": entry.state, "reason": entry.reason, "seconds": time.perf_counter() - start}
    said["peak_bytes"] = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "VmHWM" in line)
    print(json.dumps([path.name, said]), flush=True)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="bounds memory with Linux's means")


def put(root: Path, name: str, content: bytes) -> Path:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.onnx").write_bytes(content)
    return root / name / "1"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process said about every hostile file, and about one that is well meant, the last."""
    root = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in REFUSED.items():
        put(root, name, make())
    put(root, "z_well_meant", graphs.batchnorm_model().SerializeToString())
    command = [sys.executable, "-c", PROGRAM, str(root), str(LIMIT_S), str(MEMORY_BYTES)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_time(verdicts: dict[str, Any], name: str) -> None:
    said = verdicts[name]
    assert said["state"] == "UNAVAILABLE"
    assert REFUSED[name][1] in said["reason"]
    assert said["reason"].isprintable()
    assert said["seconds"] < LIMIT_S + OVERHEAD_S


def test_what_is_well_meant_is_served_after_all_of_them(verdicts: dict[str, Any]) -> None:
    """Within the same bounds, in the same process."""
    assert verdicts["z_well_meant"]["state"] == "READY"
    assert verdicts["z_well_meant"]["peak_bytes"] < MEMORY_BYTES + BEGUN_BYTES


def test_a_version_is_tried_elsewhere_first(tmp_path: Path) -> None:
    """Before a process that serves loads it: what is wrong with it is said in the words of admission."""
    well_meant = put(tmp_path, "well", graphs.batchnorm_model().SerializeToString())
    endless = put(tmp_path, "endless", a_loop_without_end())
    settings = Settings(admission_limit_s=2.0, threads=1)
    tried = Trials().tried
    assert tried(well_meant, "well", "1", place("cpu"), settings).reason == ""
    assert "did not come to an end" in tried(endless, "endless", "1", place("cpu"), settings).reason


def test_what_ends_the_process_that_tries_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that serves does not load it at all."""
    killer = tmp_path / "killer"
    killer.write_text('#!/bin/sh\nkill -SEGV "$$"\n')
    killer.chmod(0o755)
    served = repository.load(put(tmp_path / "models", "net", graphs.batchnorm_model().SerializeToString()).parent,
                             place("cpu"), Settings(threads=1))  # fmt: skip
    monkeypatch.setattr("service.trial.sys.executable", str(killer))
    entry, serving = served.admit("net")
    assert (entry.live, serving.live) == (None, served.live("net"))
    assert "it ended the process that tried it (SIGSEGV)" in entry.reason


def test_what_the_engine_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its providers do, on standard output."""
    net = put(tmp_path, "net", graphs.batchnorm_model().SerializeToString())
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\natexit.register(os.write, 1, b'[W] 12 kernels\\n')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert Trials().tried(net, "net", "1", place("cpu"), Settings(threads=1)).reason == ""


ASKING = """
import sys
from pathlib import Path
from service.runtime import place
from service.settings import Settings
from service.trial import Trials

Trials().tried(Path(sys.argv[1]), "net", "1", place("cpu"), Settings(admission_limit_s=40, threads=1))
"""


@pytest.mark.parametrize("begun", [False, True], ids=["at once", "while it runs"])
def test_a_trial_ends_with_the_process_that_asked(tmp_path: Path, begun: bool) -> None:
    """A worker may be killed while it waits."""
    endless = put(tmp_path, "endless", a_loop_without_end())
    with subprocess.Popen([sys.executable, "-c", ASKING, endless]) as asking:
        children = Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
        while not (trial := children.read_text().split()):
            time.sleep(0.01)
        process = Path("/proc") / trial[0]
        while begun and "onnxruntime_pybind11" not in (process / "maps").read_text():
            time.sleep(0.01)
        asking.kill()
    for _ in range(3000):
        if is_gone(process):
            return
        time.sleep(0.01)
    raise AssertionError("it goes on alone")


def is_gone(process: Path) -> bool:
    """Or waits only for somebody to ask how it ended."""
    try:
        return ") Z " in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def exchanged_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(graphs.batchnorm_model(mean=graphs.MEAN + 1).SerializeToString())


def exchanged_for_the_same_size(folder: Path) -> None:
    content = bytearray((folder / "test_data_set_0" / "output_0.pb").read_bytes())
    content[-1] ^= 1
    (folder / "test_data_set_0" / "output_0.pb").write_bytes(content)


def no_passport(folder: Path) -> None:
    (folder / "model.json").unlink()


def other_passport(folder: Path) -> None:
    with (folder / "model.json").open("a") as file:
        file.write("\n")


TORN = "is not what was tried: its files change while they are read; load it again"


@pytest.mark.parametrize(
    ("exchange", "reason"),
    [
        (exchanged_model, TORN),
        (exchanged_for_the_same_size, TORN),
        (no_passport, "'model.json' cannot be read"),
        (other_passport, TORN),
    ],
)
def test_only_the_bytes_that_were_tried_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: Callable[[Path], None], reason: str
) -> None:
    """What is laid there between the trial and the load is refused, however well it would be admitted."""
    write_table_bundle(tmp_path, name="table")
    served = repository.load(tmp_path, place("cpu"), Settings(threads=1, max_batch_rows=8))
    parsed: list[bytes] = []

    def tried_and_exchanged(trials: Trials, path: Path, *facts: Any) -> Tried:
        said = tried(trials, path, *facts)
        exchange(path)
        monkeypatch.setattr(onnx, "load_model_from_string", parse)
        return said

    def parse(content: bytes) -> onnx.ModelProto:
        parsed.append(content)
        model = onnx.ModelProto()
        model.ParseFromString(content)
        return model

    before = served.live("table").admitted.bundle.contents["model.onnx"]
    tried = Trials.tried
    monkeypatch.setattr(Trials, "tried", tried_and_exchanged)
    entry, serving = served.admit("table")
    assert (entry.live, serving.live) == (None, served.live("table"))
    assert reason in entry.reason
    assert set(parsed) <= {before}


def test_what_another_worker_tried_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded if it is the same, byte by byte, and refused where the other refused it or has not seen it."""
    folder = put(tmp_path / "models", "net", graphs.batchnorm_model().SerializeToString())
    served = repository.load(tmp_path / "models", place("cpu"), Settings(threads=1, versions="latest:3"))
    digests = served.live("net").admitted.bundle.digests
    monkeypatch.delattr(Trials, "tried")
    (entry,) = served.admit("net", None, {"1": Tried(digests=digests)})
    assert entry.ready
    assert entry.live is not served.live("net")
    refused, serving = served.admit("net", None, {"1": Tried(reason="not admitted: a reason")})
    assert (refused.reason, serving.live) == ("not admitted: a reason", served.live("net"))
    put(tmp_path, "new", b"").rename(folder.parent / "2")
    new, serving = served.admit("net", {"2"}, {"1": Tried(digests=digests)})
    assert (new.version, new.reason, serving.live) == ("2", TORN_BEFORE, served.live("net"))
    exchanged_model(folder)
    *_, changed, serving = served.admit("net", {"1"}, {"1": Tried(digests=digests)})
    assert TORN in changed.reason
    assert serving.live is served.live("net")


def test_a_plain_file_with_its_weights_beside_it_is_what_was_tried(tmp_path: Path) -> None:
    """It has another name than in a bundle."""
    model = graphs.batchnorm_model()
    onnx.save_model(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    served = repository.load(tmp_path / "net.onnx", place("cpu"), Settings(threads=1))
    before = served.live("net")
    served.swap("net", served.admit("net"))
    assert served.live("net") is not before
    (tmp_path / "weights").write_bytes(b"")
    entry, serving = served.admit("net")
    assert (entry.live, serving.live) == (None, served.live("net"))


@pytest.mark.parametrize("late_for", ["the last run", "all"])
def test_a_deadline_that_passes_at_the_last_moment_harms_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_for: str
) -> None:
    """It is refused, or admitted and answers for ever: never admitted and without an answer."""
    folder = put(tmp_path, "net", graphs.batchnorm_model().SerializeToString())
    passes: list[Callable[[], None]] = []

    @contextmanager
    def never(limit_s: float, late: Callable[[], None]) -> Iterator[None]:
        passes.append(late)
        yield

    def rehearsed(*arguments: Any) -> Batching:
        batching = rehearse(*arguments)
        if late_for == "the last run":
            passes[-1]()
        return batching

    monkeypatch.setattr(repository, "bounded_time", never)
    monkeypatch.setattr(repository, "rehearse", rehearsed)
    entry = load_bounded(Found(name="net", version="1", path=folder), place("cpu"), Settings(threads=1))
    if late_for == "the last run":
        assert entry.live is None
        assert "it did not come to an end" in entry.reason
        return
    passes[-1]()
    assert entry.live is not None
    assert entry.live.admitted.runtime.run(entry.live.admitted.sample(1).tensors)


def test_memory_is_unbounded_again_afterwards(tmp_path: Path) -> None:
    """The bound is for the admission, not for what is served."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    folder = put(tmp_path, "net", graphs.batchnorm_model().SerializeToString())
    load_bounded(Found(name="net", version="1", path=folder), place("cpu"), Settings(threads=1))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
