"""A checkpoint becomes a bundle that the service admits, or nothing, with a sentence."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import checkpoint, exporting, parity
from export.checkpoint import Checkpoint, DataSource, Document, Outcome
from export.cli.export import export
from export.exporting import Check, Exported, export_checkpoint
from export.networks import TabularNet, TabularNetConfig
from export.options import Norm, TrainingOptions
from service import bundle
from service.admission import admit, check_golden
from service.bundle import Passport
from service.errors import AdmissionRefused, Refused, WrongCall
from service.graph.scan import scan
from service.runtime import OnnxRuntime, place
from service.signature import CategoricalFeature, ClassTarget, ContinuousFeature, Feature, NumberTarget, Target
from tests.export.zoo import rows, settled

FEATURES: tuple[Feature, ...] = (
    ContinuousFeature(name="age", unit="years", example=41.0),
    CategoricalFeature(name="purpose", categories=("car", "repairs", "furniture"), example="car"),
    ContinuousFeature(name="amount", unit="DM", missing=3000.0, example=2500.0),
    CategoricalFeature(name="housing", categories=("own", "rent"), example="rent"),
)
CLASSES = ClassTarget(name="creditability", classes=("bad", "good"))
NUMBER = NumberTarget(name="price", unit="EUR")


def made(
    target: Target = CLASSES, *, norm: Norm = "before", spoil: Callable[[TabularNet], None] | None = None
) -> Checkpoint:
    """A checkpoint as training leaves it, of a network with settled statistics and 9 held-out rows."""
    number = isinstance(target, NumberTarget)
    config = TabularNetConfig(
        n_continuous=2,
        cardinalities=(4, 3),
        embedding_sizes=(3, 2),
        outputs=1 if number else 2,
        target="number" if number else "classes",
        hidden=(8, 6),
        dropout=0.25,
        norm=norm,
        norm_eps=0.03,
    )
    continuous = rows(9, 2) * torch.tensor([10.0, 900.0])
    categorical = torch.stack([torch.arange(9) % 4, torch.arange(9) % 3], 1)
    network = settled(TabularNet(config), continuous, categorical)
    assert isinstance(network, TabularNet)
    for part in network.blocks.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.num_batches_tracked = torch.tensor(50)
    if number:
        network.set_unit(mean=250.0, scale=80.0)
    if spoil:
        spoil(network)
    document = Document(
        network=config,
        task="regression" if number else "binary",
        features=FEATURES,
        target=target,
        left_out={"foreign_worker": "left out on request", "telephone": "is 'none' in every training row"},
        training=TrainingOptions(hidden=(8, 6), dropout=0.25),
        outcome=Outcome(epochs=9, best_epoch=7, steps=50, initial_weight=0.9**50, validation_loss=0.5),
        metrics={"network": {"AUC": 0.8}, "majority": {"AUC": 0.5}},
        data=DataSource(file="credit.csv", sha256="ab" * 32, rows=40, training_rows=24, validation_rows=7, test_rows=9),
        versions={"torch": "2.13.0"},
        card="Shows how evalmode works.",
    )
    return Checkpoint(document=document, weights=network.state_dict(), samples=(continuous, categorical))


def written(folder: Path, trained: Checkpoint) -> Path:
    checkpoint.write(folder / "checkpoint", trained)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def credit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, list[Check], Checkpoint]:
    """One export for all tests that only look at it."""
    folder, checks, trained = tmp_path_factory.mktemp("credit"), list[Check](), made()
    models = folder / "models"
    exported = export_checkpoint(written(folder, trained), name="credit", models=models, say=checks.append)
    return exported, checks, trained


Credit = tuple[Exported, list[Check], Checkpoint]


def test_the_service_admits_the_bundle(credit: Credit) -> None:
    """All four doors open, and a row's answer is exactly as independent as the passport says."""
    exported, _, _ = credit
    assert exported.folder.parts[-3:] == ("models", "credit", "1")
    admitted = admit(bundle.read(exported.folder, name="credit", version="1"), place("cpu"))
    assert admitted.golden_rows == 9
    assert admitted.independence == exported.passport.independence
    assert [norm.layer for norm in admitted.batchnorms] == ["standardise", "blocks.0.norm", "blocks.1.norm"]


def test_the_passport_says_what_is_there(credit: Credit) -> None:
    """Signature, layers, parity and where it comes from; the file and the returned value are the same."""
    exported, _, trained = credit
    passport = exported.passport
    assert Passport.model_validate_json((exported.folder / "model.json").read_text()) == passport
    assert passport.signature == trained.signature
    assert [(layer.layer, layer.eps, layer.affine) for layer in passport.batchnorm] == [
        ("standardise", 1e-5, False),
        ("blocks.0.norm", 0.03, True),
        ("blocks.1.norm", 0.03, True),
    ]
    assert passport.batchnorm[1].initial_weight == pytest.approx(0.9**50)
    assert all(figure.difference <= figure.bound for figure in passport.parity)
    provenance: dict[str, Any] = passport.provenance
    assert provenance["data"]["sha256"] == "ab" * 32
    assert provenance["training"]["seed"] == 0
    assert provenance["metrics"]["network"] == {"AUC": 0.8}
    assert provenance["versions"]["training"] == {"torch": "2.13.0"}
    assert set(provenance["versions"]["export"]) == {"python", "torch", "onnx", "onnxscript", "onnxruntime", "evalmode"}
    assert passport.golden is not None
    tolerance = passport.golden.tolerances["probabilities"].absolute
    assert provenance["train_eval_divergence"]["probabilities"] > 100 * tolerance


def test_the_card_says_what_was_left_out(credit: Credit) -> None:
    """For people, in sentences."""
    card = credit[0].passport.card
    assert card is not None
    assert card.startswith("Shows how evalmode works.\n")
    assert "Left out: 'foreign_worker' on request.\nLeft out: 'telephone' is 'none' in every training row.\n" in card
    assert "network: AUC 0.800." in card


def test_golden_samples_are_what_pytorch_gave(credit: Credit) -> None:
    """The held-out rows, and eval mode's answers to them, bit for bit."""
    exported, _, trained = credit
    read = bundle.read(exported.folder, name="credit", version="1")
    for tensor, array in zip(trained.samples, read.golden("input"), strict=True):
        assert np.array_equal(tensor.numpy(), array)
    (wanted,) = parity.torch_outputs(trained.served(), trained.samples)
    assert np.array_equal(read.golden("output")[0], wanted)


def test_train_modes_answers_would_not_pass_the_golden_door(credit: Credit) -> None:
    """The tolerance that is written tells eval mode from train mode."""
    exported, _, trained = credit
    read = bundle.read(exported.folder, name="credit", version="1")
    wrong = parity.torch_outputs(trained.served().train(), trained.samples)
    files = bundle.golden_files([tensor.numpy() for tensor in trained.samples], wrong)
    swapped = bundle.Bundle(
        name="credit", version="1", folder=read.folder, contents={**read.contents, **files}, passport=read.passport
    )
    runtime = OnnxRuntime(read.contents["model.onnx"], place("cpu"))
    with pytest.raises(AdmissionRefused, match="golden door"):
        check_golden(swapped, runtime, swapped.golden("input"))


def test_every_check_is_reported_with_its_figure(credit: Credit) -> None:
    """In the order in which they were made, and the limit beside the figure."""
    _, checks, _ = credit
    assert {check.verdict for check in checks} == {"passed", "noted"}
    said = [check.what for check in checks]
    assert said[:3] == [
        "audit of the BatchNorm layers",
        "modules in eval mode",
        "BatchNorm layers kept, frozen, bit for bit",
    ]
    assert checks[2].figure == "3 of 3"
    assert said[-1] == "the service's admission"
    assert "probabilities, ONNX, optimisation none" in said
    assert "probabilities, with train mode's statistics" in said
    assert "a row alone and among 2, 3, 7, 64" in said


def test_nothing_in_the_bundle_tells_where_it_was_made(credit: Credit) -> None:
    """No path of this machine, and nothing beside these files."""
    exported, _, _ = credit
    files = sorted(file for file in exported.folder.rglob("*") if file.is_file())
    assert [str(file.relative_to(exported.folder)) for file in files] == [
        "model.json",
        "model.onnx",
        "report.html",
        *(f"test_data_set_0/{name}.pb" for name in ("input_0", "input_1", "output_0")),
    ]
    assert exported.size_bytes == sum(file.stat().st_size for file in files)
    for file in files:
        content = file.read_bytes()
        assert str(exported.folder.parents[2]).encode() not in content
        assert str(Path.home()).encode() not in content


def test_the_next_version_has_the_same_bytes(credit: Credit, tmp_path: Path) -> None:
    """Only the version differs: no clock, no chance; and version 1 is not touched."""
    first, _, trained = credit
    before = {file: file.read_bytes() for file in first.folder.rglob("*.*")}
    models = first.folder.parents[1]
    second = export_checkpoint(written(tmp_path, trained), name="credit", models=models)
    assert second.folder == models / "credit" / "2"
    for file, content in before.items():
        assert file.read_bytes() == content
        if file.name == "report.html":
            assert (second.folder / file.name).read_text() == content.decode().replace("credit/1", "credit/2")
        elif file.name != "model.json":
            assert (second.folder / file.relative_to(first.folder)).read_bytes() == content
    one, two = (json.loads((exported.folder / "model.json").read_text()) for exported in (first, second))
    assert {**one, "version": "2"} == two
    assert not [entry for entry in models.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("norm", ["after", "none"])
def test_a_regression_with_and_without_batchnorm(norm: Norm, tmp_path: Path) -> None:
    """The output is the value in its own unit; what is frozen is what there is."""
    exported = export_checkpoint(written(tmp_path, made(NUMBER, norm=norm)), name="price", models=tmp_path / "models")
    assert [spec.name for spec in exported.passport.signature.outputs] == ["value"]
    assert len(exported.passport.batchnorm) == (3 if norm == "after" else 1)
    read = bundle.read(exported.folder, name="price", version="1")
    assert not scan(read.model).faults
    assert 100 < np.median(read.golden("output")[0]) < 400


# Refusals


def negative_variance(network: TabularNet) -> None:
    assert network.standardise is not None
    assert isinstance(network.standardise.running_var, Tensor)
    network.standardise.running_var[1] = -4.0


def infinite_weight(network: TabularNet) -> None:
    network.head.weight.data[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (negative_variance, r"BN012: .*'standardise' .*negative in 1 channel"),
        (infinite_weight, r"output 'probabilities' is not finite"),
    ],
)
def test_a_sick_network_is_refused_and_leaves_nothing(
    spoil: Callable[[TabularNet], None], sentence: str, tmp_path: Path
) -> None:
    """No model folder, no half version, and the failing check is the last in the report."""
    checks: list[Check] = []
    folder = written(tmp_path, made(spoil=spoil))
    with pytest.raises(Refused, match=sentence):
        export_checkpoint(folder, name="credit", models=tmp_path / "models", say=checks.append)
    assert checks[-1].verdict == "failed"
    assert not (tmp_path / "models").exists()


def test_a_bundle_that_is_not_admitted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word is the service's: golden outputs from train mode get as far as its third door."""
    folder, checks = written(tmp_path, made()), list[Check]()
    right = exporting._golden_files
    monkeypatch.setattr(exporting, "_golden_files", lambda module, rows: right(copy.deepcopy(module).train(), rows))
    with pytest.raises(AdmissionRefused, match="golden door: output 'probabilities' is"):
        export_checkpoint(folder, name="credit", models=tmp_path / "models", say=checks.append)
    assert (checks[-1].what, checks[-1].verdict) == ("the service's admission", "failed")
    assert not (tmp_path / "models").exists()


def test_what_was_written_is_what_is_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are read back and led through the doors before they get their place: a bit that fell over is found."""
    read = bundle.read

    def read_after_damage(folder: Path, *, name: str, version: str) -> bundle.Bundle:
        content = bytearray((folder / "model.onnx").read_bytes())
        content[-1] ^= 1
        (folder / "model.onnx").write_bytes(content)
        return read(folder, name=name, version=version)

    monkeypatch.setattr(bundle, "read", read_after_damage)
    with pytest.raises(AdmissionRefused):
        export_checkpoint(written(tmp_path, made()), name="credit", models=tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_torch_has_one_thread_for_that_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums have one order, on any machine; afterwards the caller has its threads again."""
    seen: list[int] = []

    def measure(*_: object, **__: object) -> object:
        seen.append(torch.get_num_threads())
        raise Refused("seen enough")

    monkeypatch.setattr(parity, "measure", measure)
    torch.set_num_threads(2)
    try:
        with pytest.raises(Refused, match="seen enough"):
            export_checkpoint(written(tmp_path, made()), name="credit", models=tmp_path / "models")
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_a_version_is_never_replaced(credit: Credit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when another export takes it between the look and the move."""
    exported, _, trained = credit
    before = (exported.folder / "model.json").read_bytes()
    monkeypatch.setattr(bundle, "next_version", lambda _: "1")
    with pytest.raises(WrongCall, match="another export has just taken this version"):
        export_checkpoint(written(tmp_path, trained), name="credit", models=exported.folder.parents[1])
    assert (exported.folder / "model.json").read_bytes() == before
    assert not [entry for entry in exported.folder.parents[1].iterdir() if entry.name.startswith(".")]


def test_wrong_calls(tmp_path: Path) -> None:
    """No checkpoint, a name that is none, a place that is none: nothing was begun."""
    with pytest.raises(WrongCall, match="is no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", name="credit", models=tmp_path / "models")
    folder = written(tmp_path, made())
    with pytest.raises(WrongCall, match="cannot be a model's name"):
        export_checkpoint(folder, name="../credit", models=tmp_path / "models")
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongCall, match="cannot be written to"):
        export_checkpoint(folder, name="credit", models=tmp_path / "file")
    assert not (tmp_path / "models").exists()


def test_without_samples_there_is_no_parity(tmp_path: Path) -> None:
    """Noise would not do: the checkpoint is asked to bring real rows."""
    trained = made()
    empty = Checkpoint(
        document=trained.document, weights=trained.weights, samples=tuple(tensor[:0] for tensor in trained.samples)
    )
    with pytest.raises(WrongCall, match="has no samples"):
        export_checkpoint(written(tmp_path, empty), name="credit", models=tmp_path / "models")


def test_the_command_prints_its_checks_the_place_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table within 80 columns, each line a check; no escape codes where nobody looks."""
    monkeypatch.setenv("COLUMNS", "80")
    export(str(written(tmp_path, made())), name="credit", models=tmp_path / "models")
    printed = capsys.readouterr().out
    assert "│ BatchNorm layers kept, frozen, bit for bit " in printed
    assert "│ probabilities, ONNX, optimisation extended " in printed
    assert f"written: {tmp_path / 'models' / 'credit' / '1'} (" in printed
    assert f"next:    evalmode serve {tmp_path / 'models'}" in printed
    assert "\x1b" not in printed


def test_the_command_prints_the_check_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table comes first, then the sentence, which the command line prints."""
    with pytest.raises(Refused, match="not finite"):
        export(str(written(tmp_path, made(spoil=infinite_weight))), name="credit", models=tmp_path / "models")
    assert re.search(r"the ONNX model is eval mode *│ *no │ *rounding │ failed", capsys.readouterr().out)
