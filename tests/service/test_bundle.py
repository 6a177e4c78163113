"""Bundles are read once, written whole or not at all, and never overwritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from service import bundle
from service.bundle import MODEL_FILE, PASSPORT_FILE
from service.errors import AdmissionRefused, WrongCall
from service.files import whole_folder, write_whole
from tests import graphs
from tests.bundles import golden_rows, table_contents, table_passport, write_table_bundle


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = write_table_bundle(tmp_path)
    found = bundle.read(folder, name="table", version="1")
    assert found.contents == table_contents()
    assert found.passport == table_passport(table_contents(), name="table", version="1")
    for wrote, read in zip(golden_rows(), found.golden("input"), strict=True):
        np.testing.assert_array_equal(wrote, read)
    assert [array.shape for array in found.golden("output")] == [(12, 2)]


def test_a_version_is_never_overwritten(tmp_path: Path) -> None:
    folder = write_table_bundle(tmp_path)
    before = (folder / PASSPORT_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten"):
        write_table_bundle(tmp_path, regression=True)
    assert (folder / PASSPORT_FILE).read_bytes() == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["1"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    """Not a half bundle, not a temporary folder."""

    def fails_half_way() -> None:
        with whole_folder(tmp_path / "models" / "m" / "1") as beside:
            (beside / MODEL_FILE).write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fails_half_way()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_being_written_is_not_a_version(tmp_path: Path) -> None:
    """A repository that is read meanwhile does not see it."""
    with whole_folder(tmp_path / "m" / "1") as beside:
        (beside / MODEL_FILE).write_bytes(b"half")
        assert bundle.versions_in(tmp_path / "m") == []
    assert bundle.versions_in(tmp_path / "m") == ["1"]


def test_a_file_appears_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", b"old")
    write_whole(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "b", b"x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "b"]


def test_versions_order_numerically(tmp_path: Path) -> None:
    for version in ("10", "9", "2", "beta", "alpha", ".10.tmp"):
        (tmp_path / version).mkdir()
        (tmp_path / version / MODEL_FILE).touch()
    (tmp_path / "11").mkdir()  # no model in it
    assert bundle.versions_in(tmp_path) == ["alpha", "beta", "2", "9", "10"]
    assert bundle.next_version(tmp_path) == "11"
    assert bundle.next_version(tmp_path / "nothing") == "1"


@pytest.mark.parametrize(
    ("passport", "sentence"),
    [
        (b"{", "is not a passport"),
        (b'{"format": "evalmode/2"}', "is not a passport: format"),
        (b"[]", "is not a passport"),
    ],
)
def test_a_wrong_passport_is_a_sentence(tmp_path: Path, passport: bytes, sentence: str) -> None:
    folder = write_table_bundle(tmp_path)
    (folder / PASSPORT_FILE).write_bytes(passport)
    with pytest.raises(AdmissionRefused, match=sentence):
        bundle.read(folder, name="table", version="1")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = write_table_bundle(tmp_path)
    (folder / "test_data_set_0" / "input_1.pb").unlink()
    with pytest.raises(AdmissionRefused, match=r"'test_data_set_0/input_1.pb' cannot be read: No such file"):
        bundle.read(folder, name="table", version="1")


def save_with_external_data(folder: Path, location: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MODEL_FILE
    onnx.save(
        graphs.batchnorm_model(),
        file,
        save_as_external_data=True,
        location=location,
        size_threshold=0,
        all_tensors_to_one_file=True,
    )
    return file


def test_weights_in_another_file_come_along(tmp_path: Path) -> None:
    """PyTorch writes them beside the model by default; the model is the same with them inside."""
    file = save_with_external_data(tmp_path, "model.onnx.data")
    found = bundle.read_plain(file)
    assert set(found.contents) == {MODEL_FILE, "model.onnx.data"}
    inside = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    np.testing.assert_array_equal(inside["mean"], graphs.MEAN)
    np.testing.assert_array_equal(inside["gamma"], graphs.GAMMA)


def redirect(file: Path, location: str) -> None:
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin"])
def test_weights_outside_the_folder_are_never_read(tmp_path: Path, location: str) -> None:
    """Not by climbing, not by an absolute path, not through a link."""
    file = save_with_external_data(tmp_path / "m", "model.onnx.data")
    (tmp_path / "secret.bin").write_bytes(b"x" * 1000)
    (tmp_path / "m" / "link.bin").symlink_to(tmp_path / "secret.bin")
    redirect(file, location)
    with pytest.raises(AdmissionRefused, match="lies outside the bundle's folder"):
        bundle.read_plain(file)


def test_weights_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    file = save_with_external_data(tmp_path, "model.onnx.data")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(AdmissionRefused, match="the file is cut short"):
        _ = bundle.read_plain(file).model


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "a b", "é"])
def test_a_name_is_safe_in_a_path_and_a_url(name: str) -> None:
    with pytest.raises(WrongCall, match="cannot be a model's name"):
        bundle.checked_name(name)


def test_a_name_that_is_safe_is_taken() -> None:
    assert bundle.checked_name("credit-2026.v1_a") == "credit-2026.v1_a"
