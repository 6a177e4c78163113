"""What is printed at the start is short enough to read and works as it stands."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service import repository as repositories
from service.loading import loaded
from service.printed import LONGEST_CALL, announcement
from service.protocol import v2
from service.repository import Entry, Repository, load
from service.runtime import place
from service.settings import Settings
from tests import graphs
from tests.bundles import write_table_bundle


def image_model(folder: Path) -> Path:
    path = folder / "pixels.onnx"
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["y"]),
    ]
    x = (onnx.TensorProto.FLOAT, ["batch", 3, 40, 50])
    onnx.save(graphs.model(nodes, {}, x=x, y=["batch", 3]), path)
    return path


def said(repository: Repository) -> str:
    return announcement(repository, "127.0.0.1", 8000, Settings())


def test_who_lets_everybody_in_is_told_so(tmp_path: Path) -> None:
    """Where others reach it; a misspelt variable would not be noticed."""
    write_table_bundle(tmp_path)
    repository = load(tmp_path, place("cpu"), Settings())
    assert "API keys" not in said(repository)
    outside = announcement(repository, "0.0.0.0", 8000, Settings())
    assert "API keys      none, so everybody who reaches the port may predict; see --keys-file" in outside
    locked = announcement(repository, "0.0.0.0", 8000, Settings(keys_file=tmp_path / "keys.txt"))
    assert "API keys      needed" in locked


def test_the_call_for_an_image_is_a_line_that_sends_zeros(tmp_path: Path) -> None:
    """The very bytes that the shell pipes into curl are a request that fits."""
    live = load(image_model(tmp_path), place("cpu"), Settings(threads=1, max_batch_rows=2)).only()
    printed = said(load(image_model(tmp_path), place("cpu"), Settings(threads=1, max_batch_rows=2)))
    call = printed[printed.index("{ printf") :].strip()
    assert len(call) < LONGEST_CALL
    producer, consumer = call.split("|\n")
    length = int(consumer.split("Inference-Header-Content-Length: ")[1].split("'")[0])
    body = subprocess.run(["sh", "-c", producer], capture_output=True, check=True, timeout=10).stdout
    request = v2.parse(live, body, length)
    np.testing.assert_array_equal(request.accepted.tensors[0], np.zeros((1, 3, 40, 50), np.float32))


def test_each_version_is_named_before_it_is_loaded_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes long, and nothing answers meanwhile. What lies wrong comes last."""
    write_table_bundle(tmp_path, name="credit", version="7")
    (tmp_path / "my net").mkdir()
    load_bounded, heard = repositories.load_bounded, ""

    def noting(*arguments: Any) -> Entry:
        nonlocal heard
        heard = capsys.readouterr().out
        return load_bounded(*arguments)

    monkeypatch.setattr(repositories, "load_bounded", noting)
    loaded(tmp_path, Settings(threads=1, max_batch_rows=2, device="cpu", admission_limit_s=45))
    assert heard.splitlines()[1] == "  credit/7  loading 0.0 MB, for at most 45 s"
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "  credit/7  ready"
    assert last.startswith("  my net  NOT SERVED  this cannot be a model's name; use letters")


def test_with_nothing_left_to_serve_the_index_is_named(tmp_path: Path) -> None:
    empty = Repository([], path=tmp_path, placement=place("cpu"), settings=Settings())
    assert "/v2/repository/index" in said(empty)
