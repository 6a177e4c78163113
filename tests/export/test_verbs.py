"""The verbs as they are typed, on a network of one's own: what they print, write, refuse and leave alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import export_model
from export.audit import RULES
from export.loading import built, read_state, write_state
from service.admission import admit
from service.bundle import Passport, read
from service.cli import run
from service.errors import Refused, WrongCall
from service.runtime import OnnxRuntime, place

NETS = '''
import torch
from torch import nn

class Two(nn.Module):
    """Two inputs, two outputs; BatchNorm over raw numbers and behind a layer."""

    def __init__(self, width=8, norm=True):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.raw = nn.BatchNorm1d(5)
        self.mix = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, 3)

    def forward(self, x, kind):
        hidden = self.norm(self.mix(torch.cat([self.raw(x), self.embedding(kind)], 1))).relu()
        return {"scores": self.head(self.drop(hidden)), "hidden": hidden}

class One(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.two = Two(**options)

    def forward(self, x, kind):
        return self.two(x, kind)["scores"]

def one(**options):
    return One(**options)

def without_statistics():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 2))
'''


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an engineer has it: the code, trained weights, rows."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "own_nets.py").write_text(textwrap.dedent(NETS), encoding="utf-8")
    generator = np.random.default_rng(3)
    x = (generator.normal(size=(300, 5)) * [1, 20, 3, 0.5, 5] + [10, 300, 0, 0.5, -3]).astype(np.float32)
    kind = generator.integers(0, 4, size=300)
    targets = (x[:, 0] > 10).astype(np.int64) + (kind > 1)
    np.savez(folder / "train.npz", x=x, kind=kind, targets=targets)
    np.savez(folder / "val.npz", x=x[:90] + np.float32(0.1), kind=kind[:90], targets=targets[:90])
    np.savez(folder / "sample.npz", kind=kind[:20], x=x[:20])
    np.savez(folder / "bad.npz", x=x[:20, :3], kind=kind[:20])
    sys.path.insert(0, str(folder))
    import own_nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    for name, options in (("bn", {}), ("plain", {"norm": False})):
        network: nn.Module = own_nets.one(**options)
        optimiser = torch.optim.Adam(network.parameters(), 0.01)
        for step in range(100):
            chosen = torch.randperm(300, generator=torch.Generator().manual_seed(step))[:50]
            loss = nn.functional.cross_entropy(
                network(torch.from_numpy(x)[chosen], torch.from_numpy(kind)[chosen]), torch.from_numpy(targets)[chosen]
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        torch.save({"state_dict": network.state_dict(), "epoch": 1}, folder / f"{name}.pt")
    return folder


@pytest.fixture(autouse=True)
def inside(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    monkeypatch.setenv("COLUMNS", "100")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def network_of(weights: str, **options: str) -> nn.Module:
    return built("own_nets:one", weights=Path(weights), settings=[f"{k}={v}" for k, v in options.items()]).module.eval()


def rows_of(file: str = "sample.npz") -> tuple[Tensor, Tensor]:
    arrays = np.load(file)
    return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["kind"])


# export

EXPORT = ["export", "own_nets:one", "--weights", "bn.pt", "--sample", "sample.npz", "--name", "mine"]


def test_export_of_a_network_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle is admitted, answers as PyTorch does in eval mode, and knows where it comes from."""
    arguments = ["--classes", "a", "b", "c", "--softmax", "--data", "train.npz", "--card", "What it is for."]
    assert run([*EXPORT, *arguments, "--models", str(tmp_path)]) == 0
    printed = said(capsys)
    assert "took the weights under 'state_dict'" in printed
    assert "with the statistics as stored" in printed
    assert re.search(r"the running statistics are judged \w+", printed)
    folder = tmp_path / "mine" / "1"
    assert f"look:    {folder / 'report.html'}" in printed
    passport = Passport.model_validate_json((folder / "model.json").read_text())
    assert [spec.name for spec in passport.signature.inputs] == ["x", "kind"]
    assert passport.signature.target is not None
    assert passport.provenance["weights"]["file"] == "bn.pt"  # type: ignore[index, call-overload]
    assert [layer.layer for layer in passport.batchnorm] == ["two.raw", "two.norm"]
    assert passport.card == "What it is for."
    admitted = admit(read(folder, name="mine", version="1"), place("cpu"))
    with torch.no_grad():
        wanted = network_of("bn.pt")(*rows_of()).softmax(1).numpy()
    got = admitted.runtime.run([tensor.numpy() for tensor in rows_of()])
    np.testing.assert_allclose(got[0], wanted, atol=1e-6)
    assert "What it is for." in (folder / "report.html").read_text()


def test_export_model_from_python(tmp_path: Path) -> None:
    """Several inputs by name, several outputs by theirs; the module is bit for bit what it was."""
    network = network_of("bn.pt").get_submodule("two").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    hooks = [part._forward_hooks.copy() for part in network.modules()]
    x, kind = rows_of()
    exported = export_model(network, {"x": x.numpy(), "kind": kind}, name="two", models=tmp_path)
    assert [spec.name for spec in exported.passport.signature.outputs] == ["scores", "hidden"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(part.training for part in network.modules())
    assert [part._forward_hooks for part in network.modules()] == hooks
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_half_precision_is_exported(tmp_path: Path) -> None:
    """float16 weights and inputs; the tolerance is that of float16."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    for _ in range(100):
        network(torch.randn(32, 5))
    exported = export_model(network.half(), torch.randn(9, 5).half(), name="half", models=tmp_path)
    assert exported.passport.signature.inputs[0].datatype == "FP16"
    content = (exported.folder / "model.onnx").read_bytes()
    x = torch.randn(4, 5).half()
    (got,) = OnnxRuntime(content, place("cpu")).run([x.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(got, network.eval()(x).numpy(), atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (EXPORT[:4] + EXPORT[6:], 2, "--sample is missing: parity is measured on real rows"),
        ([*EXPORT, "--classes", "a", "b"], 2, "--classes names 2, but the output has the shape"),
        ([*EXPORT, "--classes", "a", "b", "c"], 1, "the rows do not sum to 1; --softmax"),
        ([*EXPORT, "--outputs", "a", "b"], 2, "2 output name"),
        ([*EXPORT[:5], "bad.npz", *EXPORT[6:]], 1, r"fails on the sample \(float32\[20, 3\], int64\[20\]\)"),
        ([*EXPORT, "--data", "sample.npz"], 2, "has no answers"),
        ([*EXPORT, "--set", "norm=false"], 2, "the network has no 'two.norm.weight'"),
        ([*EXPORT, "--set", "depth=3"], 1, None),
        (["export", "somewhere", "--name", "mine", "--softmax"], 2, "--softmax is for a network of yours"),
        (["export", "somewhere", "--name", "mine"], 2, "'somewhere' is no checkpoint"),
        ([*EXPORT[:-1], "../mine"], 2, "cannot be a model's name"),
    ],
)
def test_export_that_cannot_be(
    arguments: list[str], code: int, sentence: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence, the right exit code, and nothing written."""
    if sentence is None:
        code, sentence = 2, "failed: TypeError"
    assert run([*arguments, "--models", str(tmp_path / "models")]) == code
    assert re.search(sentence, said(capsys))
    assert not (tmp_path / "models").exists()


# audit


def test_audit_of_everything_that_can_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file with weights, a network, a network with rows, an ONNX file, a bundle."""
    assert run(["audit", "bn.pt"]) == 0
    assert run(["audit", "own_nets:one", "--weights", "bn.pt"]) == 1  # as its builder returned it: in training mode
    assert "BN001" in said(capsys)
    assert run(["audit", "own_nets:one", "--weights", "bn.pt", "--eval"]) == 0
    assert run([*EXPORT, "--models", str(tmp_path)]) == 0
    for target in (tmp_path / "mine", tmp_path / "mine" / "1", tmp_path / "mine" / "1" / "model.onnx"):
        assert run(["audit", str(target)]) == 0
        assert run(["audit", str(target), "--data", "sample.npz"]) == 0
        assert "BN022" in said(capsys)  # one value per channel: only rows can show it
    np.savez(tmp_path / "scaled.npz", x=np.load("train.npz")["x"] * np.float32(255), kind=np.load("train.npz")["kind"])
    assert run(["audit", str(tmp_path / "mine" / "1"), "--data", str(tmp_path / "scaled.npz")]) == 0
    assert "unlike those of 300 rows" in " ".join(said(capsys).split())
    assert run(["audit", str(tmp_path / "mine" / "1"), "--data", "bad.npz"]) == 1
    assert "the model fails on the sample" in said(capsys)


def test_audit_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON as promised, SARIF 2.1.0 with every rule; both on standard output and nothing else."""
    assert run(["audit", "own_nets:one", "--weights", "bn.pt", "--data", "sample.npz", "--format", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert {"rule", "severity", "layer", "message"} <= set(document["findings"][0])
    assert document["findings"][0]["rule"] == "BN001"
    assert run(["audit", "bn.pt", "--steps", "50", "--format", "sarif"]) == 0
    sarif = json.loads(capsys.readouterr().out)
    assert sarif["version"] == "2.1.0"
    assert len(sarif["runs"][0]["tool"]["driver"]["rules"]) == len(RULES)
    assert {result["ruleId"] for result in sarif["runs"][0]["results"]} >= {"BN008"}  # 100 batches in 50 steps


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bn.pt", "--data", "sample.npz"], "without its network nothing can be run; name the network as"),
        (["nowhere.onnx"], "cannot be read|is not there"),
        (["nowhere.pt"], "cannot be read: No such file"),
        (["nowhere"], "'nowhere' is no checkpoint"),
        (["own_nets:three"], "has no 'three'"),
        (["sample.npz"], "is no checkpoint"),
    ],
)
def test_audit_of_what_is_none(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", *arguments]) in (1, 2)
    assert re.search(sentence, said(capsys))


# calibrate

CALIBRATE = ["calibrate", "own_nets:one", "--weights", "bn.pt", "--data", "train.npz"]


def test_calibrate_shows_before_and_after_and_writes_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metric on validation rows, the cost, and a file that every other verb takes."""
    before = Path("bn.pt").read_bytes()
    out = tmp_path / "exact.safetensors"
    assert run([*CALIBRATE, "--validation", "val.npz", "--out", str(out)]) == 0
    printed = said(capsys)
    assert "2 BatchNorm layers, 300 rows: 1 pass over the data (all rows at once)" in printed
    assert "on 90 rows of val.npz" in printed
    assert re.search(r"log loss +│ +[\d.]+ │ +[\d.]+ │ +(better|worse|same)", printed)
    assert Path("bn.pt").read_bytes() == before
    assert read_state(out).settled == {"two.raw", "two.norm"}
    norm = network_of(str(out)).get_submodule("two.raw")
    x, _ = rows_of("train.npz")
    torch.testing.assert_close(norm.running_var, x.double().var(0, correction=0).float())
    assert run(["audit", str(out)]) == 0
    assert run([*CALIBRATE, "--out", str(out)]) == 2
    assert "already there" in said(capsys)


def test_little_memory_costs_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said beforehand; the result is the same."""
    for memory, name in (("0", "passes"), ("1024", "pass")):
        out = str(tmp_path / f"{name}.safetensors")
        assert run([*CALIBRATE, "--memory-mb", memory, "--batch-size", "64", "--out", out]) == 0
    assert "2 passes over the data (all rows at once would take up to" in said(capsys)
    one, two = (read_state(tmp_path / f"{name}.safetensors").tensors for name in ("passes", "pass"))
    assert all(torch.allclose(one[key].double(), two[key].double(), rtol=1e-6) for key in one)


@pytest.mark.slow
def test_calibrate_of_a_trained_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new checkpoint with the test metrics measured again, which exports; the old one stays."""
    generator = np.random.default_rng(1)
    amount, kind = generator.normal(50, 9, 400), generator.choice(["a", "b", "c"], 400)
    lines = [f"{a:.3f},{k},{'yes' if a + 9 * (k == 'a') > 52 else 'no'}" for a, k in zip(amount, kind, strict=True)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["amount,kind,answer", *lines]), encoding="utf-8")
    folder, exact = tmp_path / "checkpoint", tmp_path / "exact"
    assert run(["train", str(table), "--target", "answer", "--out", str(folder), "--epochs", "12"]) == 0
    assert run(["calibrate", str(folder), "--data", str(table), "--out", str(exact)]) == 0
    assert "validation rows" in said(capsys)
    assert run(["audit", str(exact)]) == 0
    assert run(["export", str(exact), "--name", "exact", "--models", str(tmp_path / "models")]) == 0
    passport = json.loads((tmp_path / "models" / "exact" / "1" / "model.json").read_text())
    assert passport["provenance"]["calibration"]["passes"] == 1
    table.write_text(table.read_text() + "\n1,a,no", encoding="utf-8")
    assert run(["calibrate", str(folder), "--data", str(table), "--out", str(tmp_path / "other")]) == 2
    assert "is not the table that the checkpoint learned from" in said(capsys)
    assert not (tmp_path / "other").exists()


def test_a_network_without_statistics_gets_them_and_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """track_running_stats=False: refused, calibrated, and then exported by the command that was printed."""
    target = ["own_nets:without_statistics", "--weights"]
    torch.save(built(target[0], weights=None).module.state_dict(), tmp_path / "none.pt")
    np.savez(tmp_path / "rows.npz", input=np.load("train.npz")["x"])
    export = ["--sample", str(tmp_path / "rows.npz"), "--name", "none", "--models", str(tmp_path / "models")]
    assert run(["export", *target, str(tmp_path / "none.pt"), *export]) == 1
    assert "BN002" in said(capsys)
    out = str(tmp_path / "exact.safetensors")
    data = ["--data", str(tmp_path / "rows.npz"), "--out", out]
    assert run(["calibrate", *target, str(tmp_path / "none.pt"), *data]) == 0
    assert run(["export", *target, out, *export, "--outputs", "[/b]"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "exact.pt"], "must end in .safetensors"),
        (["--out", "x.safetensors", "--validation", "sample.npz"], "has no answers"),
    ],
)
def test_calibrate_that_cannot_be(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*CALIBRATE, *arguments]) == 2
    assert re.search(sentence, said(capsys))
    assert run([*CALIBRATE[:-1], "none.npz", "--out", "x.safetensors"]) == 2
    assert "'none.npz' cannot be read: No such file" in said(capsys)
    assert not list(Path.cwd().glob("*.safetensors"))


# insert


def test_insert_and_then_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The outputs stay, train mode's shift is said, and the file builds its own layers when it is read."""
    out = tmp_path / "inserted.safetensors"
    settings = ["--set", "norm=false", "--weights", "plain.pt"]
    arguments = ["--after", "two.mix", "two.embedding", "--data", "train.npz", "--batch-size", "16", "--out", str(out)]
    assert run(["insert", "own_nets:one", *settings, *arguments]) == 0
    printed = said(capsys)
    assert "on 300 rows the outputs move by" in printed
    assert "in train mode, at 16 rows a batch, the outputs will move by" in printed
    inserted = network_of(str(out), norm="false")
    with torch.no_grad():
        torch.testing.assert_close(inserted(*rows_of()), network_of("plain.pt", norm="false")(*rows_of()))
    found = built("own_nets:one", weights=out, settings=["norm=false"])
    write_state(tmp_path / "trained.safetensors", found.module.state_dict(), found.structure)  # as is printed
    assert "write_state(Path('trained.safetensors'), found.module.state_dict(), found.structure)" in printed
    again = network_of(str(tmp_path / "trained.safetensors"), norm="false")
    assert list(again.state_dict()) == list(inserted.state_dict())
    export = ["export", "own_nets:one", "--set", "norm=false", "--weights", str(out), "--sample", "sample.npz"]
    assert run([*export, "--name", "mine", "--models", str(tmp_path)]) == 0
    passport = Passport.model_validate_json((tmp_path / "mine" / "1" / "model.json").read_text())
    assert {layer.layer for layer in passport.batchnorm} == {"two.raw", "two.mix.norm", "two.embedding.norm"}


def test_insert_after_a_layer_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--weights", "bn.pt", "--after", "two.mixx", "--data", "train.npz", "--out", "x.safetensors"]
    assert run(["insert", "own_nets:one", *arguments]) == 2
    assert "the network has no layer 'two.mixx'; did you mean 'two.mix'" in said(capsys)
    assert not Path("x.safetensors").exists()


# compare


def test_compare_says_which_side_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual reason: the network comes out of its builder in training mode, and the file is right."""
    assert run([*EXPORT, "--models", str(tmp_path)]) == 0
    capsys.readouterr()
    model = str(tmp_path / "mine" / "1" / "model.onnx")
    assert run(["compare", "own_nets:one", model, "--weights", "bn.pt", "--sample", "sample.npz"]) == 1
    assert "the reference was in train mode: the file is the network in eval mode" in said(capsys)
    assert run(["compare", "own_nets:one", model, "--weights", "bn.pt", "--sample", "sample.npz", "--eval"]) == 0
    assert re.search(r"(equal|just noise): the file and the network", said(capsys))
    folder = str(tmp_path / "mine" / "1")
    assert run(["compare", "own_nets:one", folder, "--weights", "bn.pt", "--sample", "sample.npz", "--eval"]) == 0
    assert run([*EXPORT, "--softmax", "--models", str(tmp_path / "soft")]) == 0
    soft = ["compare", "own_nets:one", str(tmp_path / "soft" / "mine" / "1"), "--weights", "bn.pt", "--sample"]
    assert run([*soft, "sample.npz", "--eval"]) == 1
    assert run([*soft, "sample.npz", "--eval", "--softmax"]) == 0
    assert run(["compare", "own_nets:one", model, "--weights", "bn.pt"]) == 2
    assert "--sample is missing" in said(capsys)


# Interrupted, and no space


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["export", "calibrate"])
def test_interrupted_in_the_middle_leaves_nothing(verb: str, tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, one word, no file."""
    arguments = {
        "export": [*EXPORT, "--models", str(tmp_path / "models")],
        "calibrate": [*CALIBRATE, "--memory-mb", "0", "--batch-size", "1", "--out", str(tmp_path / "x.safetensors")],
    }[verb]
    command = [sys.executable, "-m", "service.cli", *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path.cwd())])
    started = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    time.sleep(3.0)  # torch takes two seconds to import; whether it is later or earlier, nothing may be left
    started.send_signal(signal.SIGINT)
    _, printed = started.communicate(timeout=60)
    interrupted = (130, -signal.SIGINT)  # the second is Python's doing, deep inside torch; a shell says 130 to both
    assert started.returncode in (*interrupted, 0), printed
    if started.returncode in interrupted:
        assert "Traceback" not in printed
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_no_space_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file system says, as a sentence."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run([*EXPORT, "--models", str(tmp_path / "models")]) == 2
    assert run([*CALIBRATE, "--out", str(tmp_path / "x.safetensors")]) == 1
    printed = said(capsys)
    assert printed.count("No space left on device") == 2
    assert "Traceback" not in printed
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_python_refuses_as_the_command_does(tmp_path: Path) -> None:
    """NaN in the sample, rows that do not fit, a name that is none: a sentence each."""
    network = network_of("bn.pt")
    x, kind = rows_of()
    cases: Sequence[tuple[dict[str, Tensor], str, type[Exception], str]] = [
        ({"x": x * torch.nan, "kind": kind}, "mine", WrongCall, "sample 'x' has NaN or infinity in it"),
        ({"x": x, "kind": kind[:3]}, "mine", WrongCall, "sample 'x' has 20 rows, 'kind' has 3"),
        ({"x": x[:0], "kind": kind[:0]}, "mine", WrongCall, r"sample 'x' has shape \[0, 5\]"),
        ({"x": x[:, :2], "kind": kind}, "mine", Refused, "the network fails on the sample"),
        ({"x": x, "kind": kind}, "a/b", WrongCall, "cannot be a model's name"),
    ]
    for sample, name, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            export_model(network, sample, name=name, models=tmp_path / "models")
    assert not (tmp_path / "models").exists()
