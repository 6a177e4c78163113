"""A checkpoint is whole or not there, holds what was trained, is read with suspicion; and the verb that makes it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from cyclopts import App

from export import checkpoint, training
from export import cli as export_cli
from export.checkpoint import DOCUMENT_FILE, SAMPLES_FILE, WEIGHTS_FILE
from export.cli.train import train
from service.errors import Refused, WrongCall
from service.signature import SampleReader

CREDIT = Path(__file__).parents[2] / "data/german_credit/german_credit.csv"


def evalmode(*arguments: str | Path) -> None:
    """The verb as on the command line, but errors come out."""
    app = App(result_action="return_value", suppress_keyboard_interrupt=False)
    app.command(train)
    app(["train", *map(str, arguments)], exit_on_error=False, print_error=False)


@pytest.fixture
def flats(tmp_path: Path) -> Path:
    """A table with numbers, text, missing values and a rent to predict."""
    random = np.random.default_rng(6)
    size = random.uniform(20, 140, 80)
    frame = pl.DataFrame(
        {
            "size_m2": [None if i % 9 == 0 else value for i, value in enumerate(size)],
            "district": random.choice(["Süd", "Nord", "West", ""], 80),
            "rooms": random.integers(1, 20, 80),
            "rent": 9.5 * size + random.normal(0, 40, 80),
        }
    )
    frame.write_csv(tmp_path / "flats.csv")
    return tmp_path / "flats.csv"


@pytest.fixture
def trained(flats: Path, tmp_path: Path) -> Path:
    """A checkpoint of a regression, made by the verb."""
    folder = tmp_path / "checkpoints/flats"
    evalmode(
        flats, "--target", "rent", "--out", folder, "--epochs", "3", "--leave-out", "rooms", "--card", "For tests."
    )
    return folder


# The verb


def test_the_credit_table_becomes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes: metrics beside both baselines, the columns left out with their reason, and what to do next."""
    folder = tmp_path / "credit"
    left_out = ("personal_status_and_sex", "foreign_worker")
    evalmode(CREDIT, "--target", "creditability", "--out", folder, "--name", "credit", "--leave-out", *left_out)
    made = checkpoint.read(folder)
    document = made.document
    assert list(document.metrics) == ["network", "logistic regression", "majority"]
    assert document.metrics["network"]["AUC"] > 0.65
    assert document.metrics["majority"]["AUC"] == 0.5
    assert set(document.left_out) == set(left_out)
    assert document.outcome.initial_weight <= training.TRUSTED
    data = document.data
    assert (data.training_rows, data.validation_rows, data.test_rows) == (650, 150, 200)
    assert made.signature.target == made.target
    assert [tensor.shape for tensor in made.samples] == [(64, 7), (64, 11)]
    said = capsys.readouterr().out
    assert "650 training, 150 validation, 200 test" in said
    assert f"next:    evalmode export {folder} --name credit" in said
    assert len(list(tmp_path.iterdir())) == 1  # nothing is left beside the folder


def test_several_classes_in_a_parquet_file(tmp_path: Path) -> None:
    """Only continuous features: the graph has one input."""
    random = np.random.default_rng(7)
    x, y = random.normal(5, 3, 90), random.normal(-2, 0.1, 90)
    frame = pl.DataFrame({"x": x, "y": y, "kind": np.where(x < 4, "small", np.where(y < -2, "low", "high"))})
    frame.write_parquet(tmp_path / "kinds.parquet")
    evalmode(tmp_path / "kinds.parquet", "--target", "kind", "--out", tmp_path / "kinds", "--epochs", "2")
    made = checkpoint.read(tmp_path / "kinds")
    assert made.document.task == "multiclass"
    assert [tensor.name for tensor in made.signature.inputs] == ["continuous"]
    answers = made.served()(*made.samples)
    assert answers.shape == (18, 3)
    torch.testing.assert_close(answers.sum(dim=1), torch.ones(18))


def test_a_regression_answers_in_the_targets_unit(trained: Path) -> None:
    """Metrics are R2 and RMSE; the card and the columns left out are kept."""
    made = checkpoint.read(trained)
    document = made.document
    assert (document.task, document.card) == ("regression", "For tests.")
    assert document.left_out == {"rooms": "left out on request"}
    assert set(document.metrics) == {"network", "linear regression", "mean"}
    assert set(document.metrics["network"]) == {"R2", "RMSE"}
    assert 100 < float(made.served()(*made.samples).mean()) < 1500


def test_statistics_that_are_not_learned_are_said(
    flats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of two batches leave 0.9^4 of the initial values: 66 percent."""
    evalmode(flats, "--target", "rent", "--out", tmp_path / "short", "--epochs", "2")
    assert "after 4 batches the running statistics still hold 65.6% of their initial values" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "short").document.outcome.initial_weight == pytest.approx(0.9**4)


def test_the_same_call_writes_the_same_bytes(flats: Path, tmp_path: Path) -> None:
    """All three files; another seed writes others."""
    for name, seed in (("one", "3"), ("same", "3"), ("other", "4")):
        evalmode(flats, "--target", "rent", "--out", tmp_path / name, "--epochs", "3", "--seed", seed)
    for file in (DOCUMENT_FILE, WEIGHTS_FILE, SAMPLES_FILE):
        one, same, other = ((tmp_path / name / file).read_bytes() for name in ("one", "same", "other"))
        assert one == same
        assert one != other


def test_a_checkpoint_says_nothing_of_the_machine(trained: Path) -> None:
    """No path, but the table's name, digest and rows."""
    text = (trained / DOCUMENT_FILE).read_text()
    assert str(trained.parents[1]) not in text
    assert json.loads(text)["data"]["file"] == "flats.csv"


def test_a_folder_that_is_there_is_refused_before_training(
    trained: Path, flats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --overwrite, and with it where the folder is no checkpoint; what is there is not touched."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("training had started")

    monkeypatch.setattr(training, "train", never)
    before = (trained / WEIGHTS_FILE).read_bytes()
    with pytest.raises(WrongCall, match="already there; --overwrite replaces it"):
        evalmode(flats, "--target", "rent", "--out", trained)
    with pytest.raises(WrongCall, match="is no checkpoint, so it is not replaced"):
        evalmode(flats, "--target", "rent", "--out", trained.parents[1], "--overwrite")
    with pytest.raises(WrongCall, match="is not a folder that can be written to"):
        evalmode(flats, "--target", "rent", "--out", flats / "inside")
    assert (trained / WEIGHTS_FILE).read_bytes() == before


def test_a_checkpoint_is_replaced_whole_on_request(trained: Path, flats: Path) -> None:
    """With --overwrite, and nothing is left beside it."""
    before = (trained / WEIGHTS_FILE).read_bytes()
    evalmode(flats, "--target", "rent", "--out", trained, "--epochs", "2", "--seed", "9", "--overwrite")
    assert checkpoint.read(trained).document.training.seed == 9
    assert (trained / WEIGHTS_FILE).read_bytes() != before
    assert list(trained.parent.iterdir()) == [trained]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Refused("the loss is not a finite number")])
def test_training_that_stops_leaves_nothing_and_what_was_there(
    trained: Path, flats: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    """Neither half a checkpoint nor the loss of the old one."""
    before = {file.name: file.read_bytes() for file in trained.iterdir()}

    def stop(*_: object, **__: object) -> None:
        raise interruption

    monkeypatch.setattr(training, "measured", stop)  # after the first epoch
    for out in (trained, trained.with_name("new")):
        with pytest.raises(type(interruption)):
            evalmode(flats, "--target", "rent", "--out", out, "--overwrite")
    assert list(trained.parent.iterdir()) == [trained]
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before


@pytest.mark.parametrize("failing", ["the first file", "the swap"])
def test_writing_that_fails_leaves_what_was_there(trained: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The disk is full while the files are written, or the new folder cannot be moved into its place."""
    made = checkpoint.read(trained)
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    rename = os.rename

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    def stuck(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".fresh"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    if failing == "the swap":
        monkeypatch.setattr(os, "rename", stuck)
    else:
        monkeypatch.setattr(safetensors.torch, "save", full)
    with pytest.raises(OSError, match=r"error|space"):
        checkpoint.write(trained, made, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before
    checkpoint.write(trained, made, overwrite=True)
    assert list(trained.parent.iterdir()) == [trained]


def test_a_kill_between_the_two_renames_loses_nothing(trained: Path) -> None:
    """The checkpoint that had been moved aside is back before the next write begins."""
    made = checkpoint.read(trained)
    trained.rename(trained.with_name(f".{trained.name}.replaced"))
    with pytest.raises(WrongCall, match="--overwrite"):
        checkpoint.write(trained, made)
    assert checkpoint.read(trained).document == made.document


def test_the_verb_says_what_to_install(monkeypatch: pytest.MonkeyPatch, flats: Path) -> None:
    """Where the training half's libraries are missing, `evalmode train` names them and the extra."""
    monkeypatch.setattr(export_cli, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(WrongCall, match=r"'evalmode train' needs 'torch'; pip install 'evalmode\[export\]'"):
        evalmode(flats, "--target", "rent")


def test_a_card_is_a_text_or_a_file(flats: Path, tmp_path: Path) -> None:
    """A file of that name is read."""
    (tmp_path / "card.md").write_text("# Flats\n\nNot for real rents.\n", encoding="utf-8")
    out = tmp_path / "flats-2"
    evalmode(flats, "--target", "rent", "--out", out, "--epochs", "1", "--card", tmp_path / "card.md")
    assert checkpoint.read(out).document.card == "# Flats\n\nNot for real rents."


# What is read


def test_what_is_read_is_what_was_written(trained: Path, tmp_path: Path) -> None:
    """Weights and samples bit for bit; the network answers in eval mode, without gradients."""
    made = checkpoint.read(trained)
    checkpoint.write(tmp_path / "copy", made)
    again = checkpoint.read(tmp_path / "copy")
    assert again.document == made.document
    assert all(torch.equal(made.weights[key], again.weights[key]) for key in made.weights)
    assert all(map(torch.equal, made.samples, again.samples))
    network = again.network()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(again.served()(*again.samples), made.served()(*made.samples))


def test_samples_are_held_out_rows_as_the_service_reads_them(trained: Path, flats: Path) -> None:
    """Each is a row of the table, through the service's own reader."""
    made = checkpoint.read(trained)
    names = [feature.name for feature in made.features]
    rows = pl.read_csv(flats).select(names).iter_rows(named=True)
    read = [SampleReader(made.signature).accept(row).tensors for row in rows]
    known = {tuple(tensor.tobytes() for tensor in tensors) for tensors in read}
    samples = zip(*(tensor.numpy() for tensor in made.samples), strict=True)
    assert all(tuple(np.ascontiguousarray(part).tobytes() for part in row) in known for row in samples)


def _retouched(folder: Path, name: str, **changes: torch.Tensor | None) -> None:
    tensors = {**safetensors.torch.load_file(folder / name), **changes}
    kept = {key: value for key, value in tensors.items() if value is not None}
    safetensors.torch.save_file(kept, folder / name)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        (WEIGHTS_FILE, {"head.bias": None}, "it lacks 'head.bias'"),
        (WEIGHTS_FILE, {"standardise.running_var": None}, "it lacks 'standardise.running_var'"),
        (WEIGHTS_FILE, {"extra": torch.ones(2)}, "it has 'extra' too many"),
        (WEIGHTS_FILE, {"head.bias": torch.ones(2)}, r"'head.bias' is float32\[2\]; it takes float32\[1\]"),
        (WEIGHTS_FILE, {"head.bias": torch.ones(1).half()}, r"is float16\[1\]; it takes float32\[1\]"),
        (SAMPLES_FILE, {"categorical": None}, "it lacks 'categorical'"),
        (SAMPLES_FILE, {"continuous": torch.ones(3, 1)}, r"'continuous' is float32\[3, 1\]; it takes float32\[16, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    trained: Path, name: str, changes: dict[str, torch.Tensor | None], complaint: str
) -> None:
    """A running statistic that is missing is not taken for one that is 0 or 1."""
    _retouched(trained, name, **changes)
    with pytest.raises(WrongCall, match=complaint):
        checkpoint.read(trained)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "evalmode-checkpoint/2"}, "is no checkpoint: format"),
        ({"unknown": 1}, "is no checkpoint: unknown"),
        ({"features": []}, "the network takes and gives"),
        ({"target": {"kind": "classes", "name": "rent", "classes": ["a", "b"]}}, "the network takes and gives"),
        ({"training": {"sede": 1}}, "is no checkpoint: training"),
    ],
)
def test_a_document_that_is_not_understood_is_refused(trained: Path, changes: dict[str, Any], complaint: str) -> None:
    """Of another format, with an unknown key anywhere, or with features the network does not take."""
    document = json.loads((trained / DOCUMENT_FILE).read_text()) | changes
    (trained / DOCUMENT_FILE).write_text(json.dumps(document))
    with pytest.raises(WrongCall, match=complaint):
        checkpoint.read(trained)


@pytest.mark.parametrize("name", [DOCUMENT_FILE, WEIGHTS_FILE, SAMPLES_FILE])
def test_files_that_are_missing_or_broken_are_refused(trained: Path, name: str) -> None:
    """A pickle is not read either."""
    torch.save({"head.bias": torch.ones(1)}, trained / name)
    with pytest.raises(WrongCall, match=f"{name}.*is no"):
        checkpoint.read(trained)
    (trained / name).unlink()
    with pytest.raises(WrongCall, match=f"'{name}' cannot be read"):
        checkpoint.read(trained)
